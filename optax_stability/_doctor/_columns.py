"""Finds loss, norm, learning rate and step among the columns of a log.

Names are compared without case, and with ``_`` for every separator, so that
``train/loss``, ``Train Loss`` and ``train_loss`` are one name. Of several names that a
log has, the first of the lists below is taken.
"""

import re

import numpy as np

from optax_stability._doctor._log import Log, Rows, UnreadableError

LOSS, NORM, RATE, HELD_OUT = "loss", "grad/norm", "learning_rate", "eval/loss"
_NAMES = {
    "step": (
        "step global_step current_steps global_step_max_steps train_global_step "
        "trainer_global_step iteration iter iters iterations steps train_step "
        "training_step optimizer_step learning_step num_updates update updates n_iter "
        "s it"
    ),
    LOSS: (
        "loss train_loss training_loss lm_loss train_lm_loss learning_loss loss_train "
        "loss_training train_crossentropyloss train_cross_entropy_loss ce_loss "
        "cross_entropy_loss reduced_train_loss loss_train_total "
        "loss_metrics_global_avg_loss train_loss_step "
        "train_avg_loss loss_step lm_loss_training nll_loss train_nll_loss total_loss "
        "train_total_loss loss_total losses_total_loss train_loss_epoch batch_loss trl"
    ),
    NORM: (
        "grad_norm learning_raw_grad_norm learning_grad_norm gradient_norm "
        "train_grad_norm train_gradient_norm optim_total_grad_norm grad_norm_total "
        "total_grad_norm global_grad_norm grad_norm_global optim_grad_norm gnorm "
        "train_gnorm grad_grad_norm grad_norm_step grads_norm grad_l2_norm "
        "gradients_norm gradnorm norm"
    ),
    RATE: (
        "learning_rate lr train_learning_rate train_lr learning_current_learning_rate "
        "optim_learning_rate optim_lr optim_learning_rate_group0 optimizer_lr "
        "lr_group0 learning_rate_group0 lr_adamw lr_adam lr_pg1 current_lr schedule_lr "
        "train_lr_step optimizer_learning_rate"
    ),
    HELD_OUT: (
        "eval_loss val_loss valid_loss validation_loss test_loss dev_loss eval_lm_loss "
        "eval_avg_loss evaluation_avg_loss evaluation_loss eval_crossentropyloss "
        "validation_metrics_loss lm_loss_validation lm_loss_value val_loss_epoch "
        "loss_val loss_eval loss_validation loss_valid val_bpb eval_bpb validation_bpb "
        "val_ce_loss tel"
    ),
    "epoch": "epoch train_epoch epochs",
    # Megatron counts them since the last row.
    "grad/nonfinite": "number_of_nan_iterations",
}
_ORDER = {
    name: (ours, place)
    for ours, names in _NAMES.items()
    for place, name in enumerate(names.split())
}
# Columns of this library keep their names.
_OURS = re.compile(
    r"(^|/)(grad|update|params|adam|clip|skip|branch|noise_scale|accumulate|"
    r"microbatches|attention|attention_clip|extra)/"
)


def normalised(name: str) -> str:
    """A name without case, punctuation and separators."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def recognised(names: list[str], chosen: dict[str, str]) -> dict[str, str]:
    """Name in the history → name in the log.

    Args:
      names: the columns of the log.
      chosen: what the user named.

    Raises:
      UnreadableError: a column that the user named is not there.
    """
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        ours, place = _ORDER.get(normalised(name), ("", 0))
        if ours and (ours not in found or place < found[ours][0]):
            found[ours] = (place, name)
    columns = {ours: name for ours, (_, name) in found.items()}
    for ours, name in chosen.items():
        if name not in names:
            raise UnreadableError(
                f"there is no column {name!r} (--{ours.split('/')[-1]}); there are "
                f"{', '.join(map(repr, names[:20]))}."
            )
        columns[ours] = name
    if LOSS not in columns and (name := _any_loss(names, columns)):
        columns[LOSS] = name
    return columns


def _any_loss(names: list[str], known: dict[str, str]) -> str | None:
    """The one column that is called a loss, if there is one that is not held out."""
    held_out = re.compile(r"(^|_)(eval|val|valid|validation|test|dev)(_|$)")
    left = [
        name
        for name in names
        if re.search(r"(^|_)loss(_|$)", normalised(name))
        and not held_out.search(normalised(name))
        and not re.search(r"scale|ppl", normalised(name))
        and name not in known.values()
    ]
    return left[0] if len(left) == 1 else None


def log_of(name: str, rows: Rows, chosen: dict[str, str]) -> Log:
    """The log of a training.

    Raises:
      UnreadableError: neither loss nor gradient norm was found, or there is no row.
    """
    names = list(rows.columns)
    columns = recognised(names, chosen)
    if LOSS not in columns and NORM not in columns:
        seen = ", ".join(map(repr, names[:12])) or "no column of numbers"
        raise UnreadableError(
            f"{name}: neither loss nor gradient norm was found among {seen}; name the "
            "column with --loss or --norm."
        )
    extra = {each: each for each in names if _OURS.search(each)}
    extra = {key: each for key, each in extra.items() if each not in columns.values()}
    step = _steps(rows, columns.get("step"))
    wanted = {key: each for key, each in columns.items() if key != "step"} | extra
    table = {key: rows.columns[each] for key, each in wanted.items()}
    given = {key: rows.given[each] for key, each in wanted.items()}
    history = _training_rows(step, table, given)
    if not len(history["step"]):
        raise UnreadableError(f"{name}: the log has no row with a loss or a norm.")
    return Log(name, rows.trainer, history, columns)


def _steps(rows: Rows, name: str | None) -> np.ndarray:
    """The step of each row: the last one written, or else the number of the row."""
    count = len(next(iter(rows.columns.values())))
    numbered = np.arange(1.0, count + 1)
    if name is None:
        return numbered
    values = rows.columns[name]
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return numbered
    last = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(count), -1))
    return values[np.where(last < 0, known[0], last)]


def _training_rows(
    step: np.ndarray, table: dict[str, np.ndarray], given: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One row per training step, with what was measured until the next."""
    if np.sign(np.diff(step)).sum() < 0:  # Newest first.
        step = step[::-1]
        table = {key: each[::-1] for key, each in table.items()}
        given = {key: each[::-1] for key, each in given.items()}
    measured = [given[key] for key in (LOSS, NORM) if key in given]
    row = _row_of_each_line(step, measured)
    count = row[-1] + 1
    training = np.zeros(count, bool)
    training[row[np.any(measured, axis=0)]] = True
    own = np.flatnonzero(training)
    if not len(own):
        return {"step": step[:0]}
    # A row with an evaluation and no finite number would pass for an evaluation.
    alive = np.zeros(count, bool)
    for key in (LOSS, NORM):
        if key in table:
            alive[row[given[key] & ~np.isnan(table[key])]] = True
    last = np.maximum.accumulate(np.where(training & alive, np.arange(count), -1))
    last = np.where(last < 0, own[0], last)
    merged = {}
    for key, values in table.items():
        there = np.flatnonzero(given[key])
        column = np.full(count, np.nan)
        # What stands between training rows first: what belongs to one comes over it.
        column[last[row[there]]] = values[there]
        at_home = there[training[row[there]]]
        column[row[at_home]] = values[at_home]
        merged[key] = column[own]
    first_line = np.searchsorted(row, own)
    return {"step": step[first_line]} | merged


def _row_of_each_line(step: np.ndarray, measured: list[np.ndarray]) -> np.ndarray:
    """int[n]: lines of one step are one row, unless they repeat a measurement."""
    starts = np.concatenate([[True], np.diff(step) != 0])
    group = np.cumsum(starts) - 1
    repeats = np.zeros(group[-1] + 1, bool)
    for each in measured:
        repeats |= np.bincount(group, each, minlength=len(repeats)) > 1
    return np.cumsum(starts | repeats[group]) - 1


def is_known(name: str) -> bool:
    """Whether a name is one of those that are looked for."""
    return normalised(name) in _ORDER


def is_step(name: str) -> bool:
    """Whether a name is one of those of a step."""
    return _ORDER.get(normalised(name), ("", 0))[0] == "step"

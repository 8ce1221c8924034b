"""What the library says of the logs of real runs, and what its guard would have done.

A folder of CSV files with the columns step, loss, grad_norm, lr, of runs that nobody
here made; files in a folder ``labelled`` are called ``CAUSE_SEED``. For each log:

* **findings** of ``diagnose``, and which of the labelled ones are named;
* **actions** on finite rows of ``spike_guard`` with its defaults, of the same with
  ``max_share=1e-3``, of the rule of MaxText, OLMo and Levanter (loss or norm above
  mean + 6 σ of 128), and of ``clip_by_zscore``;
* **norms alone**, for logs that have them: rows that ``spike_guard(loss=False)`` skips,
  and those that it scales to its limit; rows that ``skip_spikes`` skips, which has no
  bound on their share; and mean + 6 σ of the norm;
* **planted faults**, at random places of the logs in nats: a loss that is higher by one
  or two nats for 1, 5 or 20 rows, and a norm ten times as large with half a nat. Recall
  is the share of places at which a rule acts within the fault; false actions are those
  on the rows around it.

The logs are not part of this repository; the numbers are.

    python benchmarks/real_logs.py FOLDER            # about 3 minutes on two CPU cores
    python benchmarks/real_logs.py FOLDER --quick    # few places, no JSON
    python benchmarks/real_logs.py --quick           # streams of random numbers
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from reporting import Report, finish, markdown, parser

import optax_stability as ost
from optax_stability._doctor import _reading

CHUNK = 1024
SHARE = 1e-3
# Rows before a planted fault: a bucket of max_share has then earned a skip or two.
BEFORE, AFTER, PLACES = 2048, 64, 40
PARAMS = {"w": jnp.zeros(())}

RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "spike_guard": lambda: ost.spike_guard(optax.identity()),
    "max_share=1e-3": lambda: ost.spike_guard(optax.identity(), max_share=SHARE),
    "mean + 6 σ": lambda: peers.maxtext_skip(optax.identity()),
}
# Rules that see the norm and no loss.
WITHOUT_LOSS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "spike_guard(loss=False)": lambda: ost.spike_guard(optax.identity(), loss=False),
    "skip_spikes": lambda: ost.skip_spikes(optax.identity()),
    "mean + 6 σ, norm": lambda: peers.maxtext_skip(optax.identity()),
}
# Fault → (nats, rows, factor of the norm).
FAULTS = {
    "+1 nat, 1 row": (1.0, 1, 1.0),
    "+1 nat, 5 rows": (1.0, 5, 1.0),
    "+1 nat, 20 rows": (1.0, 20, 1.0),
    "+2 nats, 1 row": (2.0, 1, 1.0),
    "+2 nats, 5 rows": (2.0, 5, 1.0),
    "+2 nats, 20 rows": (2.0, 20, 1.0),
    "norm × 10, +0.5 nat, 1 row": (0.5, 1, 10.0),
}
# Cause of a labelled log → kinds that name it; none for a healthy run.
CAUSES = {
    "healthy": (),
    "lr_hot": ("divergence",),
    "lr_zero": ("learning_rate_zero",),
    "fp16_nan": ("nonfinite",),
    "overfit": ("overfitting",),
    "bad_labels": ("plateau",),
}


class Stream(NamedTuple):
    """Loss and norm of a run, row by row; the norm is 1 where none was logged."""

    loss: np.ndarray
    norm: np.ndarray


def stream_of(history: dict[str, np.ndarray]) -> Stream:
    """The rows with a loss."""
    loss = history["loss"]
    rows = ~np.isnan(loss)
    norm = history.get("grad/norm")
    norm = np.ones(len(loss)) if norm is None else np.where(np.isnan(norm), 1.0, norm)
    return Stream(loss[rows].astype(np.float32), norm[rows].astype(np.float32))


@functools.cache
def stepper(rule: str) -> tuple[Any, Any]:
    """(initial state, function of a state and a chunk of rows) of a rule."""
    make = (RULES | WITHOUT_LOSS)[rule]
    tx: Any = optax.with_extra_args_support(make())

    def step(state, row):
        loss, norm = row
        # A constant loss is none for the rule that cannot do without.
        loss = jnp.zeros(()) if rule in WITHOUT_LOSS else loss
        updates, state = tx.update({"w": norm}, state, PARAMS, value=loss)
        return state, (updates["w"] == 0, updates["w"] < norm)

    def chunk(state, rows):
        return jax.lax.scan(step, state, rows)

    return tx.init(PARAMS), chunk


@functools.cache
def compiled(rule: str, many: bool) -> Any:
    """The same, compiled; over many streams at once if wanted."""
    _, chunk = stepper(rule)
    return jax.jit(jax.vmap(chunk) if many else chunk)


class Acts(NamedTuple):
    """The finite rows on which a rule acts; bool, like the losses of a stream."""

    skipped: np.ndarray
    changed: np.ndarray


def acts(rule: str, loss: np.ndarray, norm: np.ndarray) -> Acts:
    """What a rule does with one stream or many: skips rows, or scales them down."""
    many = loss.ndim == 2
    state, _ = stepper(rule)
    if many:
        state = jax.tree.map(lambda x: jnp.stack([x] * len(loss)), state)
    length = loss.shape[-1]
    room = [(0, 0)] * (loss.ndim - 1) + [(0, -length % CHUNK)]
    rows = [np.pad(each, room, constant_values=1.0) for each in (loss, norm)]
    found = []
    for start in range(0, rows[0].shape[-1], CHUNK):
        part = tuple(jnp.asarray(each[..., start : start + CHUNK]) for each in rows)
        state, flags = compiled(rule, many)(state, part)
        found.append(np.stack(flags))
    flags = np.concatenate(found, axis=-1)[..., :length]
    # A norm of 0 is no step that could be skipped.
    flags &= np.isfinite(loss) & np.isfinite(norm) & (norm > 0)
    return Acts(*flags)


@functools.cache
def clipper() -> Any:
    """The share of a chunk of rows that ``clip_by_zscore`` clips."""
    tx: Any = ost.clip_by_zscore()

    def step(state, norm):
        updates, state = tx.update({"w": norm}, state)
        return state, updates["w"] < norm

    return tx.init(PARAMS), jax.jit(lambda state, x: jax.lax.scan(step, state, x))


def clipped(norm: np.ndarray) -> int:
    """Rows that ``clip_by_zscore`` clips."""
    state, chunk = clipper()
    padded, total = np.pad(norm, (0, -len(norm) % CHUNK), constant_values=0.0), 0
    for start in range(0, len(padded), CHUNK):
        state, flags = chunk(state, jnp.asarray(padded[start : start + CHUNK]))
        total += int(np.sum(flags))
    return total


def judge(name: str, kinds: list[str]) -> str:
    """Whether a labelled log was named; "" for others."""
    cause = name.rpartition("_")[0]
    if cause not in CAUSES:
        return ""
    wanted = CAUSES[cause]
    if not wanted:
        return "silent" if not kinds else "false alarm"
    if set(wanted) & set(kinds):
        return "named"
    # What a log without a held-out loss cannot show.
    return "cannot be told" if cause == "overfit" and not kinds else "missed"


def norms_alone(stream: Stream) -> dict[str, list[int]] | None:
    """[skipped, scaled down] of the rules without a loss, if norms were logged."""
    if not np.any(stream.norm != 1):
        return None
    found = {rule: acts(rule, *stream) for rule in WITHOUT_LOSS}
    return {
        rule: [int(each.skipped.sum()), int((each.changed & ~each.skipped).sum())]
        for rule, each in found.items()
    }


def examine(path: Path) -> dict[str, Any]:
    """All about one log."""
    (log,) = _reading.read(str(path), {})
    found = ost.diagnose(log.history)
    stream = stream_of(log.history)
    return {
        "rows": len(stream.loss),
        "findings": [[each.kind, each.step] for each in found],
        "judged": judge(path.stem, [each.kind for each in found]),
        "actions": {rule: int(acts(rule, *stream).skipped.sum()) for rule in RULES},
        "norms_alone": norms_alone(stream),
        "clipped": clipped(stream.norm) if np.any(stream.norm != 1) else None,
    }


def in_nats(stream: Stream) -> bool:
    """Whether a log is long enough, and its loss one of language."""
    level = np.median(stream.loss)
    return len(stream.loss) >= BEFORE // 4 and 0.5 < level < 12


def plant(
    streams: list[Stream], fault: tuple[float, int, float], places: int, seed: int
) -> tuple[np.ndarray, np.ndarray, slice]:
    """(losses, norms, rows of the fault) at random places of random logs."""
    nats, rows, factor = fault
    rng = np.random.default_rng(seed)
    losses, norms = [], []
    for _ in range(places):
        loss, norm = streams[rng.integers(len(streams))]
        # A log that is shorter begins again, so that all streams have one length.
        length = BEFORE + rows + AFTER
        first = int(rng.integers(max(len(loss) - length, 1)))
        at = (first + np.arange(length)) % len(loss)
        loss, norm = loss[at].copy(), norm[at].copy()
        loss[BEFORE : BEFORE + rows] += nats
        norm[BEFORE : BEFORE + rows] *= factor
        losses.append(loss)
        norms.append(norm)
    return np.stack(losses), np.stack(norms), slice(BEFORE, BEFORE + rows)


def recall(streams: list[Stream], places: int) -> dict[str, Any]:
    """Recall and false actions of each rule, by fault."""
    found: dict[str, Any] = {}
    for seed, (name, fault) in enumerate(FAULTS.items()):
        losses, norms, rows = plant(streams, fault, places, seed)
        found[name] = {}
        for rule in RULES:
            flags = acts(rule, losses, norms).skipped
            inside = flags[:, rows]
            outside = flags[:, CHUNK : rows.start].sum() + flags[:, rows.stop :].sum()
            counted = flags.size - flags[:, :CHUNK].size - inside.size
            found[name][rule] = {
                "found": [int(inside.any(axis=1).sum()), places],
                "rows": [int(inside.sum()), inside.size],
                "false_per_1000": round(1000 * float(outside) / counted, 3),
            }
    return found


def made_up() -> dict[str, dict[str, np.ndarray]]:
    """Two streams of random numbers, for a look at the script without logs."""
    rng = np.random.default_rng(0)
    step = np.arange(1500)
    calm = 2 + 5 * np.exp(-step / 200) + 0.05 * rng.standard_normal(1500)
    tails = calm + 0.05 * rng.standard_t(2, 1500)
    return {
        name: {
            "step": step,
            "loss": loss,
            "grad/norm": np.exp(rng.normal(0, 0.2, 1500)),
        }
        for name, loss in (("calm", calm), ("heavy tails", tails))
    }


def make_report(folder: Path | None, quick: bool) -> Report:
    """The numbers of all logs of a folder."""
    if folder is None:
        streams = [stream_of(each) for each in made_up().values()]
        return {"logs": {}, "planted": recall(streams, 4)}
    paths = sorted(folder.glob("*.csv")) + sorted(folder.glob("labelled/*.csv"))
    logs = {path.stem: examine(path) for path in paths}
    read = {path.stem: _reading.read(str(path), {})[0].history for path in paths}
    streams = [stream_of(history) for history in read.values()]
    streams = [each for each in streams if in_nats(each)]
    return {"logs": logs, "planted": recall(streams, 4 if quick else PLACES)}


def log_cells(name: str, row: dict[str, Any]) -> list[str]:
    """One line of the table of logs."""
    kinds = ", ".join(f"{kind} ({step:,})" for kind, step in row["findings"]) or "–"
    counts = [f"{row['actions'][rule]:,}" for rule in RULES]
    clips = "–" if row["clipped"] is None else f"{row['clipped'] / row['rows']:.1%}"
    return [name, f"{row['rows']:,}", kinds, row["judged"] or "–", *counts, clips]


def norm_cells(name: str, row: dict[str, Any]) -> list[str]:
    """One line of the table of rules without a loss: skipped, and scaled down."""
    counts = [row["norms_alone"][rule] for rule in WITHOUT_LOSS]
    cells = [f"{skips:,} + {scaled:,}" for skips, scaled in counts[:-1]]
    return [name, f"{row['rows']:,}", *cells, f"{counts[-1][0]:,}"]


def fault_cells(name: str, row: dict[str, Any]) -> list[str]:
    """One line of the table of planted faults."""
    cells = [name]
    for rule in RULES:
        (found, places), (rows, size) = row[rule]["found"], row[rule]["rows"]
        cells.append(f"{found / places:.0%} ({rows / size:.0%})")
    return cells


def tables(report: Report) -> dict[str, str]:
    """Findings and actions by log; recall by fault."""
    planted = report["planted"]
    false = [
        f"{np.mean([row[rule]['false_per_1000'] for row in planted.values()]):.2f}"
        for rule in RULES
    ]
    rows = [fault_cells(name, row) for name, row in planted.items()]
    rows.append(["false actions per 1,000 rows", *false])
    found = {
        "Planted faults: places (and rows) at which a rule acts": markdown(
            ["fault", *RULES], rows
        )
    }
    if report["logs"]:
        head = ["log", "rows", "findings (step)", "labelled", *RULES, "clipped"]
        lines = [log_cells(name, row) for name, row in report["logs"].items()]
        by_norm = [
            norm_cells(name, row)
            for name, row in report["logs"].items()
            if row["norms_alone"]
        ]
        found = {
            "Findings, and finite rows skipped": markdown(head, lines),
            "Without a loss: finite rows skipped + scaled to the limit": markdown(
                ["log", "rows", *WITHOUT_LOSS], by_norm
            ),
        } | found
    return found


def main() -> None:
    """Examines the logs, prints the tables, writes the JSON."""
    options = parser(__doc__)
    options.add_argument("folder", type=Path, nargs="?", help="of CSV files")
    flags = options.parse_args()
    if flags.folder is None and not flags.quick:
        options.error("name the folder of logs; they are not part of the repository")
    # The name of the folder is nobody's business.
    named = {"command": "python benchmarks/real_logs.py FOLDER"}
    report = named | make_report(flags.folder, flags.quick)
    finish("real_logs", report, tables, quick=flags.quick)


if __name__ == "__main__":
    main()

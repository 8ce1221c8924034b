"""Does the diagnosis find what was done to a run, and nothing in a healthy one?

Trains small byte-level GPTs on the sources of Python's standard library, some of them
healthy and the others with one known fault each, and hands the history of each to
``diagnose``. Every kind that is found must be expected or allowed, every expected one
must be found; otherwise the script fails.

* **expected**: kinds that must be found. A healthy run expects none, and allows none.
* **also allowed**: true of the run, but not what it is there to show.
* **first step**: of the first expected finding; **fault**: when it was put in.

The thresholds are from theory, from published rules, or round numbers beyond what the
healthy runs show (``_diagnosis/_limits.py`` says which). Those margins are in the
JSON: for each statistic the most extreme value of any healthy run.

    python benchmarks/diagnosis.py            # about 7 minutes on two CPU cores
    python benchmarks/diagnosis.py --quick    # two of the runs, no JSON
    python benchmarks/diagnosis.py --reports FOLDER    # and a report of each
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import corpus, windows
from numpy.lib.stride_tricks import sliding_window_view
from reporting import Report, finish, markdown, parser

import optax_stability as ost
from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import gradient_layers
from optax_stability._diagnosis._loss import loss_floor
from optax_stability._diagnosis._series import History, is_vector
from optax_stability._diagnosis._updates import global_and_layers
from optax_stability._diagnosis._windows import smooth

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))

STEPS, WARMUP, MICROBATCHES = 300, 30, 4
# Steps between measurements of what takes passes of its own.
SELDOM = 4
FAULT, END = 120, 180
QUICK = ("healthy", "NaN batch, guarded")

Tree = Any


def unchanged(grads: Tree, step: jax.Array) -> Tree:
    """The gradient as it is."""
    del step
    return grads


def nan_once(grads: Tree, step: jax.Array) -> Tree:
    """One gradient of NaN."""
    return optax.tree.where(step == FAULT, optax.tree.full_like(grads, jnp.nan), grads)


def in_float16(grads: Tree, step: jax.Array) -> Tree:
    """The gradient as float16 keeps it at a loss scale that is far too small."""
    del step
    scale = 2.0**-14

    def cast(g):
        return (g * scale).astype(jnp.float16).astype(jnp.float32) / scale

    return jax.tree.map(cast, grads)


def dead_embeddings(grads: Tree, step: jax.Array) -> Tree:
    """Next to no gradient for the embeddings, for a while."""
    factor = jnp.where((step >= FAULT) & (step < END), 1e-4, 1.0)
    return jax.tree_util.tree_map_with_path(
        lambda path, g: g * factor if "embedding" in jax.tree_util.keystr(path) else g,
        grads,
    )


def safe_adam(eps: float = 0.0) -> optax.GradientTransformation:
    """Adam of this library."""
    return ost.scale_by_safe_adam(b1=0.9, b2=0.95, eps=eps)


def stock_adam() -> optax.GradientTransformation:
    """Adam of optax, which a NaN stays in."""
    return optax.scale_by_adam(b1=0.9, b2=0.95)


class Run(NamedTuple):
    """One run.

    Attributes:
      expected: kinds that must be found.
      allowed: kinds that may be found besides.
      fault: the step at which the fault begins, None without one.
      rate: learning rate at the peak.
      decays: whether it falls along a cosine, to a tenth.
      batch: rows of 64 bytes per step.
      layers: blocks of the model.
      width: of its residual stream.
      seed: of model and data.
      corrupted: steps whose batch is random bytes.
      spoil: what is done to the gradient.
      normalised: whether the model has its layer norms.
      adam: what makes updates of gradients.
      clip: the clip.
      guarded: whether a guard is around clip and Adam.
    """

    expected: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    fault: int | None = None
    rate: float = 3e-3
    decays: bool = True
    batch: int = 8
    layers: int = 2
    width: int = 64
    seed: int = 0
    corrupted: tuple[int, ...] = ()
    spoil: Callable[[Tree, jax.Array], Tree] = unchanged
    normalised: bool = True
    adam: Callable[[], optax.GradientTransformation] = safe_adam
    clip: Callable[[], optax.GradientTransformation] = ost.clip_by_zscore
    guarded: bool = False


def fixed_clip(limit: float) -> Callable[[], optax.GradientTransformation]:
    """Clips at a limit that does not move."""
    return lambda: ost.clip_by_threshold(ost.thresholds.constant(limit))


RUNS = {
    "healthy": Run(),
    "healthy, other seed, guarded": Run(seed=1, guarded=True),
    "healthy, batch 4": Run(seed=2, batch=4),
    "healthy, 4 layers": Run(seed=3, layers=4),
    "healthy, width 32, constant rate": Run(seed=4, width=32, decays=False),
    "healthy, rate 1e-3, fixed clip": Run(seed=5, rate=1e-3, clip=fixed_clip(3.0)),
    "learning rate 0.1": Run(
        expected=("learning_rate_too_high",),
        allowed=("update_too_large", "growing_spectral_norm"),
        fault=WARMUP,
        rate=0.1,
    ),
    "random bytes, 5 steps": Run(
        expected=("loss_spike",), fault=FAULT, corrupted=tuple(range(FAULT, FAULT + 5))
    ),
    "NaN batch, guarded": Run(
        expected=("nonfinite",), fault=FAULT, spoil=nan_once, guarded=True
    ),
    "NaN batch": Run(
        expected=("nonfinite",),
        fault=FAULT,
        spoil=nan_once,
        clip=optax.identity,
        adam=stock_adam,
    ),
    "diverges": Run(
        expected=("divergence",),
        allowed=(
            "exploding_gradient",
            "learning_rate_too_high",
            "update_too_large",
            "growing_spectral_norm",
        ),
        fault=0,
        rate=0.06,
        decays=False,
        normalised=False,
        clip=optax.identity,
    ),
    "diverges, into overflow": Run(
        expected=("divergence", "nonfinite"),
        # The loss swings by a nat and more long before.
        allowed=("loss_spike", "update_too_large"),
        fault=0,
        rate=1.0,
        normalised=False,
        clip=optax.identity,
        adam=optax.identity,
    ),
    "dead embeddings, then alive": Run(
        expected=("vanishing_then_surge",), fault=FAULT, spoil=dead_embeddings
    ),
    "underflow in float16": Run(
        expected=("underflow",), fault=0, spoil=in_float16, guarded=True
    ),
    "ε of 1e-2": Run(
        expected=("eps_dominated",),
        allowed=("correlated_updates",),
        fault=0,
        adam=lambda: safe_adam(1e-2),
    ),
    "random bytes for ever": Run(
        expected=("noise_too_high",),
        allowed=("plateau",),
        fault=0,
        corrupted=tuple(range(STEPS)),
        decays=False,
    ),
    "learning rate 1e-9": Run(
        expected=("update_too_small", "plateau"),
        allowed=("correlated_updates",),
        fault=0,
        rate=1e-9,
        decays=False,
    ),
    "clip at 0.01": Run(
        expected=("clipping_too_often",), fault=0, clip=fixed_clip(0.01)
    ),
    "every fifth batch corrupted, guarded": Run(
        expected=("frequent_skips",),
        allowed=("loss_spike",),
        fault=FAULT,
        corrupted=tuple(range(FAULT, STEPS, 5)),
        guarded=True,
    ),
}


def schedule_of(run: Run) -> optax.Schedule:
    """Warm-up, and what comes after it."""
    return optax.schedules.warmup_cosine_decay_schedule(
        0.0, run.rate, WARMUP, STEPS, run.rate / 10 if run.decays else run.rate
    )


def optimizer_of(run: Run) -> optax.GradientTransformationExtraArgs:
    """The chain with all that is recorded."""
    inner = optax.chain(
        run.clip(),
        run.adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule_of(run)),
        ost.record("update", ratio_to_params=True, correlation=True, every=SELDOM),
    )
    return ost.record_history(
        optax.chain(
            ost.record("grad", every=SELDOM),
            ost.record("params", of="params", spectral=True, every=2 * SELDOM),
            ost.estimate_noise_scale(),
            ost.spike_guard(inner) if run.guarded else inner,
        ),
        length=STEPS,
        slow_every=SELDOM,
    )


def model_of(run: Run):
    """The model, split into structure and parameters."""
    from flax import nnx
    from model import GPT, Size

    class Nothing(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    size = Size(run.layers, run.width, run.width // 32, 64, 256, run.rate)
    model = GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(params=run.seed))
    if not run.normalised:
        places = [(model, "final_norm")]
        for block in model.blocks:
            places += [(block, "attention_norm"), (block, "mlp_norm")]
        for module, name in places:
            setattr(module, name, Nothing())
    return nnx.split(model)


def data_of(run: Run, steps: int) -> np.ndarray:
    """int[steps, batch, 65]: the batches, corrupted where the run says so."""
    clean, _ = corpus()
    rng = np.random.default_rng(run.seed)
    batches = np.stack([windows(clean, rng, run.batch) for _ in range(steps)])
    for step in run.corrupted:
        batches[step] = rng.integers(0, 256, batches[step].shape)
    return batches


def train(run: Run) -> dict[str, np.ndarray]:
    """Trains, and returns the history."""
    from flax import nnx
    from model import next_token_loss

    structure, params = model_of(run)
    tx = optimizer_of(run)

    def loss_fn(params, batch):
        return next_token_loss(nnx.merge(structure, params), batch)

    gradients = ost.microbatch_gradients(loss_fn, MICROBATCHES, reject_nonfinite=False)

    def step(carry, data):
        params, state = carry
        batch, i = data
        loss, grads, moments = gradients(params, batch)
        updates, state = tx.update(
            run.spoil(grads, i), state, params, value=loss, moments=moments
        )
        return (optax.apply_updates(params, updates), state), None

    data = jnp.asarray(data_of(run, STEPS)), jnp.arange(STEPS)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, data)[0])
    _, state = scan((params, tx.init(params)))
    history = ost.history(state)
    rates = np.asarray(jax.vmap(schedule_of(run))(jnp.arange(STEPS)))
    return (
        {"noise_scale/batch_size": np.full(STEPS, run.batch)}
        | history
        | {"learning_rate": rates}
    )


def judge(run: Run, findings: list[Finding]) -> list[str]:
    """What is missing and what should not be there."""
    found = {each.kind for each in findings}
    missing = [f"{kind} is missing" for kind in run.expected if kind not in found]
    wrong = sorted(found - {*run.expected, *run.allowed})
    return missing + [f"{kind} should not be there" for kind in wrong]


def cells_of(name: str, row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    found, expected = row["findings"], row["expected"]
    steps = [each["step"] for each in found if each["kind"] in expected[:1]]
    return [
        name,
        ", ".join(expected) or "–",
        ", ".join(each["kind"] for each in found) or "–",
        str(steps[0]) if steps else "–",
        "–" if row["fault"] is None else str(row["fault"]),
    ]


def extremes(history: dict[str, np.ndarray]) -> dict[str, float]:
    """What the rules look at, at its most suspicious, after the early descent."""
    past = History(history)
    later = slice(past.settled_row(), None)

    def most(name):
        curves = [key for key, _ in global_and_layers(past, name)]
        each = [history[key][later][past.measured(key, name)[later]] for key in curves]
        # For three measurements in a row, the least of which counts.
        return max(sliding_window_view(x, 3).min(axis=1).max() for x in each)

    loss, norm = past.normal("loss"), past.normal("grad/norm", log=True)
    loss_limit = loss.bound(limits.LOSS_SCALES, loss_floor(loss.level))
    matrices = gradient_layers(past).only(lambda name: not is_vector(name))
    level = smooth(np.log(matrices.values[later]))
    growth = past.layers("params/spectral_norm").values[later]
    rho = history["adam/correlation"][past.peak_rate_row() :][::SELDOM][
        : limits.RATE_MEASUREMENTS
    ]
    ratio = history["noise_scale/low"] / history["noise_scale/batch_size"]
    found = {
        "loss, excess / bound": np.nanmax(loss.excess / loss_limit),
        "norm, × its recent level": np.exp(np.nanmax(norm.excess[later])),
        "norm of a layer, ÷ its highest": np.exp(np.max(level.max(0) - level.min(0))),
        "ρ̂ after the warm-up, median": np.median(rho),
        "ρ̂": most("adam/correlation"),
        "bimodality": most("update/bimodality"),
        "param_ratio, whole or layer": most("update/param_ratio"),
        "zero_fraction": most("grad/zero_fraction"),
        "singular value, × its first": np.nanmax(growth[-1] / growth[0]),
        "noise scale / batch": ratio[later].max(),
        "share of steps clipped": np.mean(
            (history["clip/norm"] > history["clip/limit"])[later]
        ),
    }
    return {name: float(value) for name, value in found.items()}


def final_loss(history: dict[str, np.ndarray]) -> float | None:
    """Mean of the last 20 training losses; None of a dead run."""
    loss = float(np.mean(history["loss"][-20:]))
    return loss if np.isfinite(loss) else None


def worst_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The most extreme of the healthy runs; low is suspicious in ρ̂ after warm-up."""
    return {
        name: (min if "after the warm-up" in name else max)(row[name] for row in rows)
        for name in rows[0]
    }


def make_report(quick: bool, pages: Path | None) -> Report:
    """Runs all; with a folder, a page about each goes there."""
    rows, health = {}, []
    for name in QUICK if quick else RUNS:
        run = RUNS[name]
        history = train(run)
        findings = diagnose(history)
        if pages:
            page = pages / f"{name.replace(' ', '_')}.html"
            ost.write_report(history, page, title=name.capitalize())
        rows[name] = {
            "expected": run.expected,
            "allowed": run.allowed,
            "fault": run.fault,
            "final_loss": final_loss(history),
            "findings": [each._asdict() for each in findings],
        }
        sys.stderr.write("\n".join([name, *map(str, findings)]) + "\n")
        if wrong := judge(run, findings):
            sys.exit(f"{name}: {', '.join(wrong)}")
        if not run.expected:
            health.append(extremes(history))
    return {
        "steps": STEPS,
        "most_suspicious_in_health": worst_of(health),
        "runs": rows,
    }


def tables(report: Report) -> dict[str, str]:
    """What was expected of each run, and what was found."""
    head = ["run", "expected", "found", "first step", "fault"]
    rows = [cells_of(name, row) for name, row in report["runs"].items()]
    return {"Findings": markdown(head, rows)}


def main() -> None:
    """Runs them, prints table and findings, writes the JSON; fails if one is wrong."""
    options = parser(__doc__)
    options.add_argument("--reports", type=Path, help="folder for a report of each run")
    flags = options.parse_args()
    report = make_report(flags.quick, flags.reports)
    finish("diagnosis", report, tables, quick=flags.quick)


if __name__ == "__main__":
    main()

"""What it costs to know the gradient noise scale.

*From microbatches* ``estimate_noise_scale`` in the guarded chain of a GPT that is
trained on eight microbatches per step, against the same step without it. *From single
examples* norm taps: see ``norm_taps.py``.

All sides of a table run in one process, taking turns call by call, and are compared as
medians of the ratios of neighbouring calls. Memory and copies come from XLA's analysis
of the compiled program. Operations come from that of the program with all microbatches
at once: XLA counts the body of a loop once.

    python benchmarks/noise_scale.py            # prints, writes results/*.json
    python benchmarks/noise_scale.py --quick    # small models, few rounds, no JSON
"""

from typing import Any, NamedTuple

import jax
import norm_taps
import optax
from accumulation import (
    QUICK,
    SMALL,
    Gpt,
    Program,
    analysis,
    build,
    compare,
    gpt,
    run_alternately,
)
from reporting import Report, markdown, quartiles, run_suite
from step_cost import LEARNING_RATE, summary

import optax_stability as ost

PARTS = 8
WITHOUT = "guarded chain"


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
      shape: (layers, width, heads, context, vocabulary) of the GPT.
      rows: examples per microbatch.
      rounds: timed steps of every side.
      taps: the same for norm taps.
    """

    shape: tuple[int, ...]
    rows: int
    rounds: int
    taps: norm_taps.Scale


# Two rows per microbatch, 512 tokens, as in the example. What the estimate costs does
# not grow with them, the step does.
FULL = Scale(SMALL, rows=2, rounds=31, taps=norm_taps.FULL)
SMALLEST = Scale(QUICK.steps["0.3M"][0], rows=1, rounds=3, taps=norm_taps.SMALLEST)


def guarded(*before_the_clip: optax.GradientTransformation) -> Any:
    """The recommended chain, with something in front of the clip."""
    adamw = ost.safe_adamw(LEARNING_RATE)
    return ost.spike_guard(optax.chain(*before_the_clip, ost.clip_by_zscore(), adamw))


class Side(NamedTuple):
    """One side of the comparison.

    Attributes:
      tx: what takes the step.
      told: whether it is told the moments; XLA leaves out what nobody reads.
    """

    tx: Any
    told: bool = True


SIDES = {
    WITHOUT: Side(guarded(), told=False),
    "estimate_noise_scale": Side(guarded(ost.estimate_noise_scale())),
    "…, whole only": Side(guarded(ost.estimate_noise_scale(scope="global"))),
}


def make_step(side: Side, case: Gpt, vmap_size: int | None) -> Any:
    """A step of a trainer."""
    gradients = ost.microbatch_gradients(case.loss_fn, PARTS, vmap_size=vmap_size)

    def step(params, state, batch):
        loss, grads, moments = gradients(params, batch)
        extra = {"value": loss} | ({"moments": moments} if side.told else {})
        updates, state = side.tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    return step


def build_side(side: Side, case: Gpt) -> Program:
    """The step that is timed: one microbatch after the other."""
    step = make_step(side, case, vmap_size=1)
    return build(step, case.params, side.tx.init(case.params), case.batch)


def operations(side: Side, case: Gpt) -> float:
    """What a step takes, counted where all microbatches are evaluated at once."""
    step = jax.jit(make_step(side, case, vmap_size=None))
    state = jax.eval_shape(side.tx.init, case.params)
    costs = step.lower(case.params, state, case.batch).cost_analysis()
    if costs is None:
        raise RuntimeError("this backend does not analyse its programs")
    return costs["flops"]


def measure(scale: Scale) -> dict[str, Any]:
    """Time, operations and memory of every side."""
    case = gpt(scale.shape, rows=scale.rows)
    # ``gpt`` makes four microbatches.
    shape = PARTS * scale.rows, case.batch.shape[1]
    batch = jax.random.randint(jax.random.key(1), shape, 0, scale.shape[4])
    case = case._replace(batch=batch)
    programs = {name: build_side(side, case) for name, side in SIDES.items()}
    seconds = run_alternately(programs, scale.rounds, 1)
    base, first = seconds[WITHOUT].ravel(), operations(SIDES[WITHOUT], case)
    rows = {}
    for name, program in programs.items():
        flops = operations(SIDES[name], case)
        rows[name] = analysis(program) | {
            "ms": summary(list(seconds[name].ravel()), 1e3),
            "time_ratio": compare(seconds[name].ravel(), base),
            "flops_ratio": round(flops / first, 5),
        }
    for row in rows.values():
        row["temp_mb_more"] = round(row["temp_mb"] - rows[WITHOUT]["temp_mb"], 3)
    return rows


def readme_table(report: Report) -> str:
    """From microbatches."""
    return table(report["microbatches"])


def table(rows: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        [
            name,
            f"{row['ms']['median']:.0f}",
            quartiles(row["time_ratio"], 2),
            f"{row['flops_ratio']:.4f}",
            f"{row['temp_mb']:.1f}",
            f"{row['temp_mb_more']:+.2f}",
            str(row["copies"]),
        ]
        for name, row in rows.items()
    ]
    head = ["step with", "ms", "time", "flops", "temp MB", "more", "copies"]
    return markdown(head, lines)


def make_report(quick: bool) -> Report:
    """Measures both."""
    scale = SMALLEST if quick else FULL
    return {
        "rows": scale.rows,
        "tokens": scale.shape[3],
        "taps": {"rows": scale.taps.rows, "tokens": scale.taps.shape[3]},
        "microbatches": measure(scale),
        "examples": norm_taps.measure(scale.taps),
    }


def tables(report: Report) -> dict[str, str]:
    """Both tables."""
    size = f"GPT of {report['microbatches'][WITHOUT]['parameters'] / 1e6:.1f}M"
    parts = f"{PARTS} microbatches of {report['rows']}×{report['tokens']} tokens"
    whole = "{rows}×{tokens} tokens".format(**report["taps"])
    return {
        f"From {parts}, {size}": table(report["microbatches"]),
        f"From single examples, a batch of {whole}, {size}": norm_taps.table(
            report["examples"]
        ),
    }


if __name__ == "__main__":
    run_suite("noise_scale", __doc__, make_report, tables)

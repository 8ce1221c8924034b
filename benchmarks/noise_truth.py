"""Is the noise scale that is reported that of the model as it is at that step?

Runs of the GPT of ``examples/gpt`` are recorded once (``noise_recording.py``): S and G²
of every step, and at 20 steps tr Σ and ‖G‖² of the frozen parameters from up to 384
other windows. Every rule reads the same recordings, so that a rule costs seconds. The
rules beside ours: one average with Fieller's interval, with two lengths of memory; and
the longest of three averages that agrees with all shorter ones.

A linear regression, trained by gradient descent until its noise scale has risen about
twentyfold, has its truth in closed form at every step. Its noise scale rises slowly and
without a jump: there our intervals lag for some dozen steps.

*within* is the share of intervals called 95 % that hold the truth; *off by* the median
of the factor between estimate and truth; *bias* the mean of log(estimate/truth), both
where there is an estimate; *width* the median of high/low; *open* the share of steps
after the first fifty without an upper end; *back after* how many steps after a tenfold
change within 30 steps the truth is in the interval again, the longest time.

    python benchmarks/noise_truth.py             # from the recordings, a minute
    python benchmarks/noise_truth.py --record    # first records what is missing
    python benchmarks/noise_truth.py --quick     # a short run of its own, no JSON
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from noise_recording import GROUPS, PARTS, RUNS, Recording, load, record, short_run
from reporting import Report, finish, markdown, parser
from scipy import stats

import optax_stability as ost

RECORDINGS = Path(__file__).parent / "recordings" / "noise_truth.npz"
DECAY, CONFIDENCE = 0.99, 0.95
# Of the linear regression: entries, standard deviation of the noise, rate, examples.
ENTRIES, SIGMA, RATE, EXAMPLES = 20, 1.0, 0.007, 32


class Estimates(NamedTuple):
    """Of every step and stream, [steps, n]; ``scale`` and ``high`` are ∞ if unknown."""

    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray


Rule = Callable[[np.ndarray, np.ndarray, int], Estimates]


def ours(trace: np.ndarray, grad_sq: np.ndarray, examples: int) -> Estimates:
    """What ``estimate_noise_scale`` reports of each stream, as it does in a chain."""
    tx = ost.estimate_noise_scale(decay=DECAY, confidence=CONFIDENCE)
    tree = list(np.zeros(trace.shape[1], np.float32))

    def step(state, both):
        trace, grad_sq = both
        moments = ost.Moments(
            num_microbatches=jnp.int32(PARTS),
            weight=jnp.float32(examples),
            deviation=trace * (PARTS - 1),
            mean_square=None,
            norm=jnp.sqrt(jnp.maximum(grad_sq + trace / examples, 0)),
        )
        state = tx.update(tree, state, moments=moments)[1]
        found = ost.metrics(state)
        names = ("b_simple", "low", "high", "valid")
        return state, [found[f"noise_scale/{name}/per_leaf"] for name in names]

    both = np.float32(trace), np.float32(grad_sq)
    run = jax.jit(lambda both: jax.lax.scan(step, tx.init(tree), both)[1])
    scale, low, high, valid = map(np.asarray, run(both))
    return Estimates(np.where(valid, scale, np.inf), low, high)


def _weighted_means(values: np.ndarray, decay: float) -> np.ndarray:
    """Σ decayᵃᵍᵉ·value at every step."""
    sums = np.empty_like(values)
    total = np.zeros(values.shape[1:])
    for i, value in enumerate(values):
        total = decay * total + value
        sums[i] = total
    return sums


def average(
    decay: float, confidence: float, trace: np.ndarray, grad_sq: np.ndarray, _: int
) -> Estimates:
    """Fieller's interval for the ratio of the weighted means of S and G²."""
    sums = functools.partial(_weighted_means, decay=decay)
    total = sums(np.ones_like(trace))
    total_sq = _weighted_means(np.ones_like(trace), decay**2)
    steps = total**2 / total_sq
    with np.errstate(all="ignore"):
        a, b = sums(trace) / total, sums(grad_sq) / total
        t = stats.t.ppf((1 + confidence) / 2, np.maximum(steps - 1, 0.5))
        per = t**2 / (steps - 1)
        saa, sbb = (
            per * np.maximum(sums(x**2) / total - mean**2, 0)
            for x, mean in ((trace, a), (grad_sq, b))
        )
        sab = per * (sums(trace * grad_sq) / total - a * b)
        b = np.maximum(b, 0)
        q0, q1, q2 = a * a - saa, a * b - sab, b * b - sbb
        root = np.sqrt(np.maximum(q1**2 - q0 * q2, 0))
        known = (steps > 2.5) & (q2 > 0)
        low = np.where((steps > 2.5) & (q0 > 0), q0 / (q1 + root), 0.0)
        return Estimates(
            np.where(known, a / b, np.inf),
            low,
            np.where(known, (q1 + root) / q2, np.inf),
        )


def agreeing(trace: np.ndarray, grad_sq: np.ndarray, examples: int) -> Estimates:
    """The longest of three memories whose 75 % interval meets those of the shorter."""
    decays = [DECAY**power for power in (10, 3, 1)]
    arguments = trace, grad_sq, examples
    chosen = average(decays[0], CONFIDENCE, *arguments)
    _, low, high = average(decays[0], 0.75, *arguments)
    agree = np.ones(trace.shape, bool)
    for decay in decays[1:]:
        longer = average(decay, 0.75, *arguments)
        agree &= (longer.low <= high) & (longer.high >= low)
        agree &= np.isfinite(longer.high) | np.isinf(high)
        found = average(decay, CONFIDENCE, *arguments)
        both = zip(found, chosen, strict=True)
        chosen = Estimates(*(np.where(agree, new, old) for new, old in both))
        low = np.where(agree, np.maximum(low, longer.low), low)
        high = np.where(agree, np.minimum(high, longer.high), high)
    return chosen


RULES: dict[str, Rule] = {
    "ours": ours,
    "average over 199 steps": functools.partial(average, DECAY, CONFIDENCE),
    "average over 20 steps": functools.partial(average, DECAY**10, CONFIDENCE),
    "longest average that agrees": agreeing,
}


class Judged(NamedTuple):
    """A rule and the truth, at the frozen steps of one run and stream."""

    at: np.ndarray
    truth: np.ndarray
    error: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    open: float

    @property
    def within(self) -> np.ndarray:
        """Whether each interval holds the truth."""
        return (self.low <= self.truth) & (self.truth <= self.high)

    @property
    def log_ratio(self) -> np.ndarray:
        """log(estimate/truth); NaN where there is no estimate."""
        known = np.isfinite(self.high)
        return np.log(np.where(known, self.scale, np.nan) / self.truth)

    def back_after(self) -> list[int]:
        """Steps from each tenfold change to the next interval that holds the truth."""
        found = []
        for i, start in enumerate(self.at):
            for j in range(i + 1, len(self.at)):
                change = abs(np.log(self.truth[j] / self.truth[i]))
                if self.at[j] - start > 30 or change < np.log(10):
                    continue
                later = np.flatnonzero(self.within[j:])
                end = self.at[j + later[0]] if len(later) else self.at[-1]
                found.append(int(end - self.at[j]))
                break
        return found


def open_after_fifty(high: np.ndarray) -> float:
    """The share of later steps without an upper end; 0 if there are none."""
    later = high[50:]
    return float(np.mean(~np.isfinite(later))) if len(later) else 0.0


def judge_run(rule: Rule, recording: Recording) -> list[Judged]:
    """The rule on the whole gradient and on every group, in the order of GROUPS."""
    kept = recording.series[~recording.skipped].astype(np.float64)
    both = np.concatenate([kept.sum(1, keepdims=True), kept], 1)
    found = rule(both[..., 0], both[..., 1], recording.examples)
    # After a skipped step the estimate is that of before.
    row = np.maximum(np.cumsum(~recording.skipped) - 1, 0)
    judged = []
    for stream in range(len(GROUPS)):
        trace, grad_sq, error = recording.truth[:, stream].T
        scale, low, high = (values[row, stream] for values in found)
        here = recording.at - 1
        with np.errstate(divide="ignore"):
            truth = np.where(grad_sq > 0, trace / grad_sq, np.inf)
        judged.append(
            Judged(
                recording.at,
                truth,
                error,
                scale[here],
                low[here],
                high[here],
                open_after_fifty(high),
            )
        )
    return judged


def regression(seed: int, steps: int, runs: int) -> tuple[np.ndarray, ...]:
    """S, G² and the true noise scale of linear regressions, [steps, runs] each.

    For x ~ N(0, 1) and y = N(0, σ²) the gradient of half the squared error has the mean
    w and the trace (d + 1)‖w‖² + dσ².
    """
    rng = np.random.default_rng(seed)
    w = 3 * rng.standard_normal((runs, ENTRIES))
    found: list[list[np.ndarray]] = [[], [], []]
    for _ in range(steps):
        x = rng.standard_normal((runs, PARTS, EXAMPLES // PARTS, ENTRIES))
        noise = SIGMA * rng.standard_normal(x.shape[:3])
        residual = np.einsum("rkbd,rd->rkb", x, w) - noise
        parts = np.mean(residual[..., None] * x, 2)
        mean = parts.mean(1)
        spread = np.square(parts - mean[:, None]).sum((1, 2))
        trace = EXAMPLES / PARTS * spread / (PARTS - 1)
        norm_sq = np.square(w).sum(-1)
        values = (
            trace,
            np.square(mean).sum(-1) - trace / EXAMPLES,
            (ENTRIES + 1) + ENTRIES * SIGMA**2 / norm_sq,
        )
        for each, value in zip(found, values, strict=True):
            each.append(value)
        w = w - RATE * mean
    return tuple(map(np.array, found))


def judge_regression(rule: Rule, steps: int, runs: int) -> list[Judged]:
    """The rule at every tenth step of many regressions."""
    trace, grad_sq, truth = regression(0, steps, runs)
    found, at = rule(trace, grad_sq, EXAMPLES), np.arange(10, steps + 1, 10)
    return [
        Judged(
            at,
            truth[at - 1, i],
            np.zeros(len(at)),
            found.scale[at - 1, i],
            found.low[at - 1, i],
            found.high[at - 1, i],
            open_after_fifty(found.high[:, i]),
        )
        for i in range(runs)
    ]


def summary(judged: list[Judged]) -> dict[str, Any]:
    """One row of a table."""
    ratios = np.concatenate([each.log_ratio for each in judged])
    ratios = ratios[np.isfinite(ratios)]
    width = np.concatenate([each.high / np.maximum(each.low, 1e-30) for each in judged])
    back = [steps for each in judged for steps in each.back_after()]
    within = np.concatenate([each.within for each in judged])
    truth_error = np.concatenate([each.error for each in judged])
    return {
        "within": [int(within.sum()), len(within)],
        "off_by": round(float(np.exp(np.median(np.abs(ratios)))), 2),
        "bias": round(float(np.mean(ratios)), 2),
        "known": round(len(ratios) / len(within), 2),
        "width": round(float(np.median(width)), 2),
        "open": round(max(each.open for each in judged), 2),
        "back_after": max(back, default=None),
        "truth_error": round(float(np.median(truth_error)), 2),
    }


def curve(judged: Judged) -> list[list[float | None]]:
    """Step, estimate, interval and truth of one run, to be looked at."""
    columns = judged.at, judged.scale, judged.low, judged.high, judged.truth
    rows = np.stack([np.asarray(each, float) for each in columns], 1)
    # JSON has no ∞.
    return [
        [float(f"{value:.3g}") if np.isfinite(value) else None for value in row]
        for row in rows.tolist()
    ]


def make_report(recordings: dict[str, Recording], *, quick: bool) -> Report:
    """All rules on all runs."""
    judged = {
        rule: {name: judge_run(f, run) for name, run in recordings.items()}
        for rule, f in RULES.items()
    }
    whole = {rule: [each[0] for each in by.values()] for rule, by in judged.items()}
    size = (200, 4) if quick else (600, 40)
    return {
        "rules": {rule: summary(each) for rule, each in whole.items()},
        "runs": {name: summary([each[0]]) for name, each in judged["ours"].items()},
        "groups": {
            group: summary([each[i] for each in judged["ours"].values()])
            for i, group in enumerate(GROUPS)
        },
        "regression": {
            rule: summary(judge_regression(f, *size)) for rule, f in RULES.items()
        },
        "first_run": curve(next(iter(judged["ours"].values()))[0]),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ["", "within", "off by", "bias", "width", "open", "back after"]
    lines = [
        [
            name,
            f"{row['within'][0] / row['within'][1]:.0%} of {row['within'][1]:,}",
            f"×{row['off_by']:.2f}",
            f"{row['bias']:+.2f}",
            f"×{row['width']:.1f}",
            f"{row['open']:.0%}",
            "–" if row["back_after"] is None else f"{row['back_after']} steps",
        ]
        for name, row in rows.items()
    ]
    return markdown(head, lines)


def first_run(report: Report) -> str:
    """Every frozen step of the first run."""
    lines = []
    for step, scale, low, high, truth in report["first_run"]:
        ends = f"≥ {low:.3g}" if high is None else f"{low:.3g}–{high:.3g}"
        shown = "–" if high is None else f"{scale:.3g}"
        missed = "" if low <= truth <= (high or np.inf) else "outside"
        lines.append([f"{step:.0f}", shown, ends, f"{truth:.3g}", missed])
    return markdown(["step", "reported", "95 % interval", "truth", ""], lines)


def tables(report: Report) -> dict[str, str]:
    """One table per question."""
    error = next(iter(report["rules"].values()))["truth_error"]
    return {
        "Whole gradient, all runs of the GPT (the truth itself is known to "
        f"{error:.0%})": table(report["rules"]),
        "Ours, run by run": table(report["runs"]),
        "Ours, by group of parameters, all runs": table(report["groups"]),
        "Linear regression, closed form": table(report["regression"]),
        "The first run, step by step": first_run(report),
    }


def evidence_table(report: Report) -> str:
    """All rules on the whole gradient, as the documentation shows them."""
    return table(report["rules"])


def main() -> None:
    """Records if asked to, and compares the rules."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--record", action="store_true", help="record the runs that are missing"
    )
    given = arguments.parse_args()
    if given.record:
        record(RECORDINGS, RUNS)
    recordings = short_run() if given.quick else load(RECORDINGS)
    report = make_report(recordings, quick=given.quick)
    finish("noise_truth", report, tables, quick=given.quick)


if __name__ == "__main__":
    main()

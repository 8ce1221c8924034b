"""Which noise scale tells which batch is worth its examples: that of L2, or of L1?

Runs of a small GPT with Adam are recorded once (``noise_norms_recording.py``). Two
questions are asked of the recordings:

*Its own truth*: is what ``estimate_noise_scale`` reports at a step the noise scale of
the model as it is, in that norm? For L1 also the definition of arXiv:2602.03001 as its
authors estimate it, (mean ‖σ‖₁/mean ‖ḡ‖₁)², with means that decay by .9.

*The worth of a batch*: of branches of 50 steps of Adam from one checkpoint, with
batches of 2 to 64 and the learning rate that suits each best, the loss falls by Δ(B). A
noise scale B₀ predicts Δ(B)/Δ(64) = (1 + B₀/64)/(1 + B₀/B). *Measured* is the B₀ that
fits best; *off by* the factor between both, *apart from a factor* what remains of it
when every noise scale is multiplied by one number for all checkpoints, which a user
cannot know; *error* the mean difference of Δ(B)/Δ(64), in percentage points.

    python benchmarks/noise_norms.py             # from the recordings
    python benchmarks/noise_norms.py --record    # records again first, half an hour
    python benchmarks/noise_norms.py --quick     # a short run of its own, no JSON
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from noise_norms_recording import BATCH, BATCHES, PARTS, Frozen, record, short_run
from noise_truth import CONFIDENCE, DECAY, Estimates, ours
from reporting import Report, finish, markdown, parser, share

import optax_stability as ost
from optax_stability import SignMoments

RECORDINGS = Path(__file__).parent / "recordings" / "noise_norms.npz"
# Where the published means decay.
PUBLISHED_DECAY = 0.9
LABELS = {"l2": "L2", "l1": "L1", "published": "L1 as published"}
CANDIDATES = np.geomspace(0.05, 5000, 2000)


class Checkpoint(NamedTuple):
    """A frozen step of a run.

    Attributes:
      seed: of the run.
      at: the step.
      truth: the noise scale by norm: "l2", "l1" and "published".
      found: what is reported, by the same names: estimate, low, high.
      fell: float64[batches] – how far the loss fell, or empty.
    """

    seed: int
    at: int
    truth: dict[str, float]
    found: dict[str, np.ndarray]
    fell: np.ndarray


def l1(sigma: np.ndarray, signal: np.ndarray) -> Estimates:
    """What ``estimate_noise_scale(norm="l1")`` reports at every step."""
    tx = ost.estimate_noise_scale(
        norm="l1", decay=DECAY, confidence=CONFIDENCE, scope="global"
    )
    tree = np.zeros(1, np.float32)

    def step(state, both):
        sigma, signal = both
        moments = ost.Moments(
            num_microbatches=jnp.int32(PARTS),
            weight=jnp.float32(BATCH),
            deviation=jnp.ones(1),
            mean_square=None,
            norm=jnp.ones(1),
            l1=SignMoments(
                sigma[None] * (PARTS - 1), signal[None] * (PARTS * (PARTS - 1) / 2)
            ),
        )
        state = tx.update(tree, state, moments=moments)[1]
        found = ost.metrics(state)
        return state, [
            found[f"noise_scale/{x}"] for x in ("b_simple", "low", "high", "valid")
        ]

    both = np.float32(sigma), np.float32(signal)
    run = jax.jit(lambda both: jax.lax.scan(step, tx.init(tree), both)[1])
    scale, low, high, valid = map(np.asarray, run(both))
    return Estimates(np.where(valid, scale, np.inf), low, high)


def published(sigma: np.ndarray, size: np.ndarray) -> Estimates:
    """The ratio of decaying means of ‖σ‖₁ and ‖ḡ‖₁, squared; it has no interval."""
    means, found = np.zeros(2), []
    for both in zip(sigma, size, strict=True):
        means = PUBLISHED_DECAY * means + (1 - PUBLISHED_DECAY) * np.array(both)
        found.append((means[0] / means[1]) ** 2)
    return Estimates(*[np.array(found)] * 3)


def limit(progress: np.ndarray) -> float:
    """‖G‖₁: what the progress tends to, by a²(B) = ‖G‖₁²·B/(B + B₀)."""
    size, value = progress.T
    return np.polyfit(1 / size, 1 / value**2, 1, w=value**2)[1] ** -0.5


def lowest(rates: np.ndarray, losses: np.ndarray) -> float:
    """The lowest loss: of the parabola through the best rate and its neighbours."""
    order = np.argsort(rates)
    x, y = np.log(rates[order]), losses[order]
    best = int(np.nanargmin(y))
    if not 0 < best < np.isfinite(y).sum() - 1:
        return float(y[best])
    a, b, c = np.polyfit(x[best - 1 : best + 2] - x[best], y[best - 1 : best + 2], 2)
    return float(c - b**2 / (4 * a))


def judge(arrays: dict[str, np.ndarray]) -> list[Checkpoint]:
    """The checkpoints of recordings, with what would have been reported there."""
    checkpoints = []
    for seed in sorted({int(name.partition("/")[0]) for name in arrays}):
        series = arrays[f"{seed}/series"].astype(np.float64)
        trace, grad_sq, sigma, signal, size = series.T
        of_one = trace[:, None], grad_sq[:, None]
        rules = {
            "l2": Estimates(*(x[:, 0] for x in ours(*of_one, BATCH))),
            "l1": l1(sigma, signal),
            "published": published(sigma, size),
        }
        names = [name.split("/") for name in arrays if name.startswith(f"{seed}/")]
        for at in sorted({int(parts[1]) for parts in names if len(parts) == 3}):
            of = {key: arrays[f"{seed}/{at}/{key}"] for key in Frozen._fields}
            sigma_1, signal_1 = of["l1"][:2]
            truth = {
                "l2": of["l2"][0] / of["l2"][1],
                "l1": sigma_1 / signal_1,
                "published": (sigma_1 / limit(of["progress"])) ** 2,
            }
            found = {
                name: np.array([x[at - 1] for x in rule])
                for name, rule in rules.items()
            }
            branches = zip(of["rates"], of["losses"], strict=True)
            fell = np.array([of["start"] - lowest(*both) for both in branches])
            checkpoints.append(Checkpoint(seed, at, truth, found, fell))
    return checkpoints


def predicted(b_0: np.ndarray | float) -> np.ndarray:
    """Δ(B)/Δ(64) of all batches, [..., batches]."""
    sizes, largest = np.array(BATCHES), BATCHES[-1]
    b_0 = np.asarray(b_0)[..., None]
    return (1 + b_0 / largest) / (1 + b_0 / sizes)


def critical(fell: np.ndarray) -> float:
    """The B₀ that fits best, with a free Δ(∞)."""
    shape = 1 / (1 + CANDIDATES[:, None] / np.array(BATCHES))
    scale = (shape @ fell) / (shape**2).sum(1)
    error = ((scale[:, None] * shape - fell) ** 2).sum(1)
    return float(CANDIDATES[np.argmin(error)])


def own_truth(checkpoints: list[Checkpoint], name: str) -> dict[str, Any]:
    """How well a noise scale is estimated."""
    truth = np.array([each.truth[name] for each in checkpoints])
    scale, low, high = np.array([each.found[name] for each in checkpoints]).T
    known = np.isfinite(scale)
    ratio = np.log(scale[known] / truth[known])
    within = (low <= truth) & (truth <= high)
    return {
        "within": None if name == "published" else [int(within.sum()), len(within)],
        "off_by": round(float(np.exp(np.median(np.abs(ratio)))), 2),
        "bias": round(float(np.mean(ratio)), 2),
        "known": [int(known.sum()), len(known)],
        "width": round(float(np.median(high / np.maximum(low, 1e-30))), 1),
    }


def worth(checkpoints: list[Checkpoint], scales: list[float]) -> dict[str, Any]:
    """How well noise scales predict what batches achieve."""
    ratio, error = [], []
    for each, scale in zip(checkpoints, scales, strict=True):
        if not np.isfinite(scale):
            continue
        ratio.append(math.log(scale / critical(each.fell)))
        fell = each.fell / each.fell[-1]
        error.append(np.abs(predicted(scale) - fell)[:-1].mean())
    logs = np.array(ratio)
    return {
        "checkpoints": len(logs),
        "off_by": round(float(np.exp(np.median(np.abs(logs)))), 2),
        "factor": round(float(np.exp(np.median(logs))), 2),
        "apart": round(float(np.exp(np.median(np.abs(logs - np.median(logs))))), 2),
        "error": round(100 * float(np.mean(error)), 1),
    }


def make_report(checkpoints: list[Checkpoint]) -> Report:
    """Both questions, for every noise scale."""
    branched = [each for each in checkpoints if len(each.fell)]
    names = ("l2", "l1", "published")
    microbatch = BATCH / PARTS
    above = [each for each in checkpoints if each.truth["l1"] > microbatch]
    return {
        "own_truth": {name: own_truth(checkpoints, name) for name in names}
        | {f"{name}, above": own_truth(above, name) for name in names if above},
        "worth": {
            f"{name}, {kind}": worth(
                branched,
                [
                    each.truth[name] if kind == "true" else each.found[name][0]
                    for each in branched
                ],
            )
            for name in names
            for kind in ("true", "estimated")
        },
        "checkpoints": [
            {
                "seed": each.seed,
                "at": each.at,
                "measured": round(critical(each.fell), 2),
                **{name: float(f"{each.truth[name]:.3g}") for name in names},
                "share": [round(float(x), 3) for x in each.fell / each.fell[-1]],
            }
            for each in branched
        ],
    }


def truth_table(rows: dict[str, dict[str, Any]]) -> str:
    """How well each noise scale is estimated, as Markdown."""
    head = ["", "within", "off by", "bias", "width"]
    lines = [
        [
            LABELS[name.removesuffix(", above")]
            + (", above a microbatch" if name.endswith(", above") else ""),
            "–" if row["within"] is None else share(row["within"]),
            f"×{row['off_by']:.2f}",
            f"{row['bias']:+.2f}",
            "–" if row["within"] is None else f"×{row['width']:.1f}",
        ]
        for name, row in rows.items()
    ]
    return markdown(head, lines)


def worth_table(rows: dict[str, dict[str, Any]]) -> str:
    """How well each noise scale predicts the worth of a batch, as Markdown."""
    head = ["", "checkpoints", "off by", "factor", "apart from a factor", "error"]
    lines = [
        [
            f"{LABELS[name]}, {kind}",
            str(row["checkpoints"]),
            f"×{row['off_by']:.2f}",
            f"×{row['factor']:.2f}",
            f"×{row['apart']:.2f}",
            f"{row['error']:.1f} pp",
        ]
        for (name, kind), row in ((key.split(", "), row) for key, row in rows.items())
    ]
    return markdown(head, lines)


def checkpoint_table(rows: list[dict[str, Any]]) -> str:
    """Every checkpoint with branches."""
    head = ["seed", "step", "measured", *LABELS.values()]
    head += [f"Δ({size})/Δ({BATCHES[-1]})" for size in BATCHES[:-1]]
    lines = [
        [
            str(row["seed"]),
            str(row["at"]),
            *(f"{row[name]:.3g}" for name in ("measured", *LABELS)),
            *(f"{part:.0%}" for part in row["share"][:-1]),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def tables(report: Report) -> dict[str, str]:
    """One table per question."""
    return {
        "Of its own truth": truth_table(report["own_truth"]),
        "Which batch is worth its examples": worth_table(report["worth"]),
        "Checkpoints": checkpoint_table(report["checkpoints"]),
    }


def truth_evidence(report: Report) -> str:
    """How well each is estimated, as the documentation shows it."""
    return truth_table(report["own_truth"])


def worth_evidence(report: Report) -> str:
    """How well each predicts, as the documentation shows it."""
    return worth_table(report["worth"])


def main() -> None:
    """Records if asked to, and answers both questions."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--record", action="store_true", help="record all runs again"
    )
    given = arguments.parse_args()
    if given.record:
        record(RECORDINGS)
    if given.quick:
        arrays = short_run()
    else:
        with np.load(RECORDINGS) as file:
            arrays = dict(file)
    finish("noise_norms", make_report(judge(arrays)), tables, quick=given.quick)


if __name__ == "__main__":
    main()

"""What protection costs a run in which nothing goes wrong: small GPTs on clean text.

Every chain sees the same batches with the same seeds, at a third, once and three times
the best learning rate of plain AdamW. The result is the held-out loss at the end, minus
that of clip 1.0 + adamw of the same seed (or of the optimizer that a row is around), in
nats: the mean over the seeds and the half-width of its 95 % interval (Student's t). The
row "another batch" shows how far a run moves without a reason: one batch is another,
just as good. All settings but the first have the main rows only.

    python benchmarks/clean_cost.py                   # all, hours on two CPU cores
    python benchmarks/clean_cost.py --only small      # one setting, about ten minutes
    python benchmarks/clean_cost.py --quick           # two chains, two seeds, no JSON
"""

import functools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import (
    CLIP,
    OURS,
    Optimizer,
    adamw,
    clip_then_muon,
    clipped,
    guarded,
    in_steps_of_eight,
    muon,
    safe_adamw,
)
from faulty_streams import (
    Change,
    Setting,
    Stream,
    at,
    clean_stream,
    new_domain,
    nothing,
    other_batches,
    prose,
)
from reporting import Report, finish, markdown, parser
from scipy import stats
from stability import held_out_loss, learning_rate, loss_of, make_model, stack

import optax_stability as ost

BEST = 1e-2  # of AdamW without a clip, for all these models
RATES = (BEST / 3, BEST, 3 * BEST)
CONFIDENCE = 0.95
NOISE = "another batch at 45"
MUON = "muon"
MULTI_STEPS = "MultiSteps"


class Row(NamedTuple):
    """One chain.

    Attributes:
      make: the optimizer.
      change: what happens to the data.
      against: the row that it is compared with.
    """

    make: Optimizer
    change: Change = nothing
    against: str = CLIP


def without_warmup() -> optax.GradientTransformation:
    """``clip_by_zscore`` whose first limits are whole medians."""
    outliers = ost.thresholds.relearn(ost.thresholds.zscore(), after=25)
    evened = ost.thresholds.at_most_median(outliers, warmup=1)
    return ost.clip_by_threshold(evened)


def with_clip(clip: optax.GradientTransformation) -> optax.GradientTransformation:
    """The recommended chain with another clip."""
    return ost.spike_guard(optax.chain(clip, safe_adamw()))


ROWS = {
    CLIP: Row(clipped),
    NOISE: Row(clipped, other_batches(at(45))),
    "adamw": Row(adamw),
    OURS: Row(guarded),
    "guard around clip 1.0 + adamw": Row(lambda: ost.spike_guard(clipped())),
    "ours, adamw of optax": Row(
        lambda: ost.spike_guard(optax.chain(ost.clip_by_zscore(), adamw()))
    ),
    "ours, clip 1.0": Row(lambda: with_clip(optax.clip_by_global_norm(1.0))),
    "ours, median from the start": Row(lambda: with_clip(without_warmup())),
    "ours, clip of outliers alone": Row(
        lambda: with_clip(ost.clip_by_zscore(at_most_median=False))
    ),
    "guard around adamw": Row(lambda: ost.spike_guard(adamw()), against="adamw"),
    MUON: Row(muon, against=MUON),
    "guard around clip_by_zscore + muon": Row(
        lambda: ost.spike_guard(clip_then_muon()), against=MUON
    ),
    MULTI_STEPS: Row(lambda: in_steps_of_eight(clipped()), against=MULTI_STEPS),
    "accumulate_moments": Row(
        lambda: ost.accumulate_moments(clipped(), 8), against=MULTI_STEPS
    ),
}
ALL = tuple(ROWS)
MAIN = CLIP, NOISE, "adamw", OURS


class Run(NamedTuple):
    """One setting.

    Attributes:
      setting: what is trained.
      data: what happens to the data of all rows.
      rows: names of the chains.
      seeds: runs of each row and rate.
    """

    setting: Setting
    data: Change = nothing
    rows: Sequence[str] = ALL
    seeds: int = 8


RUNS = {
    "small": Run(Setting()),
    "english": Run(Setting(), new_domain(slice(None), kind=prose), rows=MAIN),
    "large": Run(Setting(layers=4, width=128), rows=MAIN),
    "long": Run(Setting(calls=1000), rows=MAIN),
}
QUICK = Run(Setting(calls=60), rows=(CLIP, OURS), seeds=2)


def trainer(setting: Setting, make: Optimizer) -> Any:
    """``(seeds, streams, peak) -> held-out losses``, with a leading axis of runs."""
    tx = optax.with_extra_args_support(make())
    shape = learning_rate(setting._replace(learning_rate=1.0))

    def train(seed, stream: Stream, peak):
        structure, params = make_model(setting, jax.random.key(seed))
        loss_fn = loss_of(structure)

        def step(carry, data):
            params, state = carry
            call, batch, labels = data
            loss, grads = jax.value_and_grad(loss_fn)(params, batch, labels)
            updates, state = tx.update(
                grads, state, params, value=loss, rate=peak * shape(call)
            )
            return (optax.apply_updates(params, updates), state), None

        data = jnp.arange(setting.calls), stream.batch, stream.labels
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), data)
        return held_out_loss(loss_fn, params, stream)

    return jax.jit(jax.vmap(train, in_axes=(0, 0, None)))


def streams(run: Run, change: Change) -> Stream:
    """The data of a row, with a leading axis of seeds."""

    def one(seed: int) -> Stream:
        stream = run.data(
            clean_stream(run.setting, seed), np.random.default_rng([seed, 0])
        )
        return change(stream, np.random.default_rng([seed, 1]))

    return stack([one(seed) for seed in range(run.seeds)])


def measure(name: str, run: Run) -> dict[str, Any]:
    """The held-out losses of all rows: row, then rate, then seed."""
    make_streams = functools.cache(functools.partial(streams, run))
    found = {}
    for title in run.rows:
        row, start = ROWS[title], time.perf_counter()
        train = trainer(run.setting, row.make)
        data, seeds = make_streams(row.change), np.arange(run.seeds)
        losses = [train(seeds, data, rate) for rate in RATES]
        found[title] = [np.round(each, 5).tolist() for each in jax.device_get(losses)]
        seconds = time.perf_counter() - start
        sys.stderr.write(f"{name}: {title}, {seconds:.0f} s\n")
    return found


def cell(losses: list[float], others: list[float]) -> str:
    """The mean difference and the half-width of its interval."""
    difference = np.subtract(losses, others)
    runs = len(difference)
    error = np.std(difference, ddof=1) / math.sqrt(runs)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, runs - 1) * error
    return f"{difference.mean():+.3f} ± {half:.3f}"


def tables(report: Report) -> dict[str, str]:
    """Rate × chain, paired differences with intervals."""
    losses, lines = report["losses"], []
    for title, each in losses.items():
        against = ROWS[title].against
        if title == against:
            cells = [f"{np.mean(values):.3f}" for values in each]
        else:
            cells = list(map(cell, each, losses[against]))
        lines.append([title, *cells])
    head = ["learning rate", *[f"{rate:.2g}" for rate in report["rates"]]]
    title = f"{report['run']}: held-out loss, nats, {report['seeds']} seeds"
    return {title: markdown(head, lines)}


def main() -> None:
    """Trains, prints the tables and writes the JSON."""
    options = parser(__doc__)
    options.add_argument("--only", choices=tuple(RUNS), nargs="+", help="only these")
    flags = options.parse_args()
    for name in flags.only or (["small"] if flags.quick else RUNS):
        run = QUICK if flags.quick else RUNS[name]
        report = {
            "run": name,
            "setting": run.setting._asdict(),
            "seeds": run.seeds,
            "rates": RATES,
            "losses": measure(name, run),
        }
        finish(f"clean_cost_{name}", report, tables, quick=flags.quick)


if __name__ == "__main__":
    main()

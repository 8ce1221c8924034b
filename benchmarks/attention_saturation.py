"""Loss against learning rate, with and without normalised queries and keys.

Small GPTs, each trained at rates from 1e-3 to 0.3 with the recommended chain. Of every
step the largest attention logit and its bound from the weights are kept, so that the
levels of the finding ``attention_saturates`` are held against other sizes, data and
rates than those they were found on:

*bad*     a run at a rate above the best one that ends .1 nat or more behind it
*alarm*   the logit (or the bound) is above its level in three steps in a row
*lead*    steps from the alarm until the loss is .1 nat behind that of the same seed at
          the best rate, and stays so

    python benchmarks/attention_saturation.py            # 10 minutes; writes the JSON
    python benchmarks/attention_saturation.py --quick    # two rates, no JSON
"""

import functools
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from early_warning.data import batches_of, held_out_of
from early_warning.settings import Setting
from early_warning.training import rate_at
from flax import nnx
from reporting import Report, markdown, run_suite, share

import optax_stability as ost
from optax_stability._diagnosis import _limits as limits

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "gpt"))
from heads import fused_heads
from model import GPT, Size, next_token_loss

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
STEPS, SEEDS = 200, 2
# The first is where the levels were found.
SETTINGS = {
    "2 layers of 64": Setting(zero_head=True),
    "1 layer of 32": Setting(layers=1, width=32, zero_head=True),
    "English": Setting(data="English", zero_head=True),
}
BEHIND, IN_A_ROW, SMOOTH = 0.1, 3, 16
LEVELS = {"logit": limits.ATTENTION_LOGIT, "bound": limits.LOGIT_BOUND}


class Run(NamedTuple):
    """One run.

    Attributes:
      end: the held-out loss at the end.
      loss: float[steps] – the training loss.
      logit: float[steps] – the largest attention logit of the batch.
      bound: float[steps] – the largest bound of a head.
    """

    end: Any
    loss: Any
    logit: Any
    bound: Any


def largest_logit(model: GPT, windows: jax.Array) -> jax.Array:
    """The largest |logit| of all heads of a model without qk-layernorm."""
    tokens = windows[:, :-1]
    x = model.tokens(tokens) + model.positions(jnp.arange(tokens.shape[1]))
    seen = []
    for block in model.blocks:
        normed = block.attention_norm(x)
        split = (*x.shape[:2], block.heads, 3, -1)
        query, key, _ = jnp.moveaxis(block.query_key_value(normed).reshape(split), 3, 0)
        query, key = block.query_norm(query), block.key_norm(key)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        seen.append(jnp.max(jnp.abs(logits), initial=0.0, where=causal))
        x = block(x)
    return jnp.max(jnp.stack(seen))


def chain(rate: jax.Array, setting: Setting, steps: int):
    """The recommended chain."""
    decay = functools.partial(rate_at, peak=rate, setting=setting, steps=steps)
    adamw = ost.safe_adamw(decay, b2=setting.b2, weight_decay=setting.weight_decay)
    return ost.spike_guard(optax.chain(ost.clip_by_zscore(), adamw))


@functools.cache
def trainer(setting: Setting, qk_norm: bool):
    """Compiles ``(rate, key, batches, held_out) -> Run`` once for all rates."""
    heads = setting.width // 32
    size = Size(setting.layers, setting.width, heads, 64, 256, 0.0, qk_norm)

    def train(rate, key, batches, held_out):
        structure, params = nnx.split(GPT(size, 256, jnp.float32, nnx.Rngs(key)))
        tx = chain(rate, setting, len(batches))

        def loss_of(params, batch):
            return next_token_loss(nnx.merge(structure, params), batch)

        def step(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, state = tx.update(grads, state, params, value=loss)
            bounds = [
                ost.attention_logit_bound(**each._asdict()).max()
                for each in fused_heads(params, heads).values()
            ]
            seen = Run(
                end=0.0,
                loss=loss,
                logit=largest_logit(nnx.merge(structure, params), batch),
                bound=jnp.max(jnp.stack(bounds)),
            )
            return (optax.apply_updates(params, updates), state), seen

        (params, _), trace = jax.lax.scan(step, (params, tx.init(params)), batches)
        end = jax.lax.map(lambda x: loss_of(params, x), held_out).mean()
        return trace._replace(end=end)

    return jax.jit(train)


def runs(setting: Setting, qk_norm: bool, rates, seeds: int, steps: int):
    """Run by (rate, seed)."""
    # One program for all data.
    train = trainer(setting._replace(data=""), qk_norm)
    held_out = held_out_of(setting)
    return {
        (rate, seed): jax.device_get(
            train(
                rate, jax.random.key(seed), batches_of(setting, seed, steps), held_out
            )
        )
        for rate in rates
        for seed in range(seeds)
    }


def first(flags: np.ndarray, rows: int) -> int | None:
    """The first of so many true flags in a row."""
    for start in range(len(flags) - rows + 1):
        if flags[start : start + rows].all():
            return start
    return None


def behind_from(loss: np.ndarray, control: np.ndarray) -> int | None:
    """The step from which the loss is behind the control until the end."""
    weights = np.full(SMOOTH, 1 / SMOOTH)
    excess = np.convolve(loss - control, weights, "valid")
    late = np.flatnonzero(~(excess > BEHIND))
    start = int(late[-1]) + 1 if len(late) else 0
    return start + SMOOTH - 1 if start < len(excess) else None


def ends(found, rates) -> list[float]:
    """The mean held-out loss at the end of each rate."""
    return [
        float(np.mean([run.end for (r, _), run in found.items() if r == rate]))
        for rate in rates
    ]


def alarms(found, rates) -> dict[str, Any]:
    """Of the bad and the good runs, those with an alarm, and its lead."""
    best = rates[int(np.nanargmin(ends(found, rates)))]
    level = float(np.nanmin(ends(found, rates)))
    counts = {name: {"bad": [0, 0], "good": [0, 0], "lead": []} for name in LEVELS}
    for (rate, seed), run in found.items():
        bad = rate > best and not run.end < level + BEHIND
        for name, row in counts.items():
            alarm = first(getattr(run, name) > LEVELS[name], IN_A_ROW)
            kind = row["bad" if bad else "good"]
            kind[0] += alarm is not None
            kind[1] += 1
            behind = behind_from(run.loss, found[best, seed].loss)
            if bad and alarm is not None and behind is not None:
                row["lead"].append(behind - (alarm + IN_A_ROW - 1))
    return counts


def violations(found) -> list[int]:
    """Steps in which a logit was above its bound, and all steps."""
    above = [int(np.sum(run.logit > run.bound * 1.0001)) for run in found.values()]
    return [sum(above), sum(len(run.logit) for run in found.values())]


def measure(settings, rates, seeds: int, steps: int) -> Iterator[tuple[str, Any]]:
    """By setting: the ends of both models, and the alarms of the plain one."""
    for name, setting in settings.items():
        plain = runs(setting, False, rates, seeds, steps)
        normed = runs(setting, True, rates, seeds, steps)
        largest = [
            max(plain[rate, s].logit.max() for s in range(seeds)) for rate in rates
        ]
        yield (
            name,
            {
                "rates": list(rates),
                "plain": ends(plain, rates),
                "qk_norm": ends(normed, rates),
                "logit": [float(x) for x in largest],
                "alarms": alarms(plain, rates),
                "above_bound": violations(plain),
            },
        )


def picture(report: Report) -> bytes:
    """Loss against rate as PNG, one panel for each setting."""
    import matplotlib.style
    from matplotlib.figure import Figure

    settings, file = report["settings"], io.BytesIO()
    with matplotlib.style.context(["default", "optax_stability.report"]):
        figure = Figure((3.2 * len(settings), 2.8), layout="constrained")
        panels = figure.subplots(1, len(settings), sharex=True, squeeze=False)[0]
        for axes, (name, row) in zip(panels, settings.items(), strict=True):
            axes.plot(row["rates"], row["plain"], "o-", color="C1", label="plain")
            style = {"color": "C0", "label": "--qk-norm", "ms": 4}
            axes.plot(row["rates"], row["qk_norm"], "s--", **style)
            axes.set(xscale="log", title=name, xlabel="learning rate")
        panels[0].set_ylabel("held-out loss at the end")
        panels[0].legend(loc="upper center")
        figure.savefig(file, dpi=120)
    return file.getvalue()


def make_report(quick: bool) -> Report:
    """All settings; or one, at two rates, for a few steps."""
    if quick:
        one = {"1 layer of 32": SETTINGS["1 layer of 32"]}
        return {"settings": dict(measure(one, (1e-2, 3e-1), 1, 40))}
    return {"settings": dict(measure(SETTINGS, RATES, SEEDS, STEPS))}


def rate_table(report: Report) -> str:
    """The held-out loss at the end, by setting and rate."""
    lines = []
    for name, row in report["settings"].items():
        for what in ("plain", "qk_norm", "logit"):
            digits = 0 if what == "logit" else 3
            numbers = [f"{x:,.{digits}f}" for x in row[what]]
            lines.append([f"{name}, {what.replace('_', '-')}", *numbers])
    rates = next(iter(report["settings"].values()))["rates"]
    return markdown(["held-out loss", *[f"{rate:g}" for rate in rates]], lines)


def alarm_table(report: Report) -> str:
    """Recall, false alarms and lead, by setting."""
    lines = []
    for name, row in report["settings"].items():
        for what, counts in row["alarms"].items():
            lead = f"{np.median(counts['lead']):.0f}" if counts["lead"] else "–"
            line = [
                f"{name}, {what}",
                share(counts["bad"]),
                share(counts["good"]),
                lead,
            ]
            lines.append([*line, share(row["above_bound"])])
    head = ["alarm by", "bad runs found", "good runs", "lead, steps", "above the bound"]
    return markdown(head, lines)


def tables(report: Report) -> dict[str, str]:
    """Both tables."""
    return {
        "Loss against learning rate": rate_table(report),
        "Attention that saturates": alarm_table(report),
    }


if __name__ == "__main__":
    run_suite("attention_saturation", __doc__, make_report, tables)

"""The state of the noise scale estimate, and its metrics.

*Cost*: a few dozen scalars per stream; with pairs one buffer like the gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _numerics, _scopes, _tree
from optax_stability._noise import _drift, _pairs, _signs, _statistics
from optax_stability._noise._drift import Drift
from optax_stability._noise._statistics import Averages, Observed


class EstimateNoiseScaleState(NamedTuple):
    """State of :func:`estimate_noise_scale`. Stream 0 is the whole gradient.

    Attributes:
      averages: of S and G² in units of the mean trace, float32[n_streams] each: what
        the noise scale is if it is constant.
      drift: what it is if it changes.
      size: float32[n_streams] – number of entries that were measured, d.
      param_rms: float32[n_streams] – root mean square of the parameters; −1 where it is
        not known.
      batch: float32[] – weight of the last step, N.
      microbatch: float32[] – mean weight of its microbatches, N/K.
      biased: bool[] – whether the averages are of pairs of successive gradients.
      pairs: the stored gradient for pairs, or None without ``difference``.
      confidence: float32[] – of the intervals.
      stream: int32[n_leaves] – the stream of each leaf; all are in stream 0 too.
      signs: marks that the averages are of Σσᵢ and ΣGᵢ²/σᵢ, for ``norm="l1"``, or
        None.
      leaves: marks that name the entries of per-leaf vectors, or None if stream 0 is
        the only stream.
      labels: marks that name the streams from 1 on, or None if they are the leaves.
    """

    averages: Averages
    drift: Drift
    size: jax.Array
    param_rms: jax.Array
    batch: jax.Array
    microbatch: jax.Array
    biased: jax.Array
    pairs: Any
    confidence: jax.Array
    stream: jax.Array
    signs: Any
    leaves: Any
    labels: Any

    reports_metrics = True  # For ost.metrics.
    number = "batch"  # This field is one number.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``noise_scale/…``: the estimate and its interval, global and per leaf."""
        by_name = readings(self)
        found = {f"noise_scale/{key}": values[0] for key, values in by_name.items()}
        found["noise_scale/biased"] = self.biased
        found["noise_scale/batch_size"] = self.batch
        if self.leaves is None:
            return found
        return found | {
            f"noise_scale/{key}/per_leaf": values[self.stream]
            for key, values in by_name.items()
        }


@jax.jit  # Outside jit it is one program, and in a step it is traced once.
def readings(state: EstimateNoiseScaleState) -> dict[str, jax.Array]:
    """The estimates of all streams, by name, [n_streams] each; 0 where not known."""
    scale = _drift.present(state.drift, state.averages, state.confidence)
    if state.signs is not None:
        scale = _signs.unsaturated(scale, state.microbatch)
    trace = scale.trace
    # Without noise the signal is in the unit of the gradient.
    size = jnp.where(trace > 0, trace, 1.0)
    return {
        "b_simple": scale.ratio,
        "low": scale.low,
        "high": scale.high,
        "valid": scale.valid,
        "trace": trace,
        "grad_sq": scale.signal * size,
        "noise_to_weight": _noise_to_weight(trace, state),
        "steps": state.drift.steps,
    }


@jax.jit
def which_known(
    state: EstimateNoiseScaleState, by_name: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Whether each stream has the reading, bool[n_streams]; the others always are."""
    learned = by_name["steps"] > 0
    return {
        "b_simple": by_name["valid"],
        "trace": learned,
        "grad_sq": learned,
        "noise_to_weight": learned & (state.param_rms >= 0),
    }


def _noise_of_entry(trace, state: EstimateNoiseScaleState):
    """√var_g, or the mean σᵢ of a microbatch gradient if the norm is L1."""
    if state.signs is None:
        return jnp.sqrt(_numerics.ratio(trace, state.microbatch * state.size))
    return _numerics.ratio(trace, jnp.sqrt(state.microbatch) * state.size)


def _noise_to_weight(trace, state: EstimateNoiseScaleState):
    """√(var_g/var_p); ∞ for x/0, and 0 for 0/0 and where the parameters are unknown."""
    noise = _noise_of_entry(trace, state)
    present = (noise > 0) & (state.param_rms >= 0)
    return jnp.where(present, noise / jnp.where(present, state.param_rms, 1.0), 0.0)


def _streams(tree: Any, scope: _scopes.Scope) -> tuple[list[int], Any, Any]:
    """The stream of each leaf, marks of the leaves and marks of the labels."""
    count = len(jax.tree.leaves(tree))
    if scope == "global":
        return [0] * count, None, None
    if scope == "leaf":
        return list(range(1, 1 + count)), _tree.mark_leaves(tree), None
    labels = [str(label) for label in _scopes.per_leaf(scope, tree)]
    # Sorted, as JAX flattens a dict.
    names = sorted(set(labels))
    stream = [1 + names.index(label) for label in labels]
    marks = dict.fromkeys(names, _tree.Leaf())
    return stream, _tree.mark_leaves(tree), _tree.unless_placeholder(tree, marks)


def sum_by_stream(values, state: EstimateNoiseScaleState):
    """Sums of per-leaf values over each stream; stream 0 contains all leaves."""
    streams = state.size.shape[0]
    sums = jnp.zeros((streams,), jnp.float32)
    if streams > 1:
        sums = sums.at[state.stream].add(values)
    return sums.at[0].set(jnp.sum(values))


def init_state(
    params: Any,
    scope: _scopes.Scope,
    confidence: Any,
    *,
    difference: bool,
    signs: bool = False,
) -> EstimateNoiseScaleState:
    """The state before the first step."""
    stream, leaves, labels = _streams(params, scope)
    streams = 1 + max(stream, default=0)
    return EstimateNoiseScaleState(
        averages=_statistics.init_averages(streams),
        drift=_drift.init_drift(streams),
        size=jnp.zeros((streams,), jnp.float32),
        param_rms=jnp.full((streams,), -1.0, jnp.float32),
        batch=jnp.zeros((), jnp.float32),
        microbatch=jnp.zeros((), jnp.float32),
        biased=jnp.zeros((), bool),
        pairs=_pairs.init_pairs(params) if difference else None,
        confidence=jnp.asarray(confidence, jnp.float32),
        stream=jnp.array(stream, jnp.int32),
        signs=_tree.Leaf() if signs else None,
        leaves=leaves,
        labels=labels,
    )


def stored_leaves(state: EstimateNoiseScaleState) -> Any:
    """What the state holds per leaf of the gradient: the pair, marks, or nothing."""
    return state.leaves if state.pairs is None else state.pairs.previous


def update_streams(
    state: EstimateNoiseScaleState, observed: Observed, known, sizes, decay
):
    """Adds one step to the averages of all streams."""
    size = sum_by_stream(jnp.where(known, sizes, 0.0), state)

    def total(values):
        # A stream without known leaves is not updated: ∞ does not enter an average.
        sums = sum_by_stream(jnp.where(known, values, 0.0), state)
        return jnp.where(size > 0, sums, jnp.inf)

    trace, grad_sq = total(observed.trace), total(observed.grad_sq)
    summed = observed._replace(trace=trace, grad_sq=grad_sq)
    drift, averages = _drift.update(state.drift, state.averages, summed, decay)
    return state._replace(
        averages=averages,
        drift=drift,
        size=jnp.where(jnp.isfinite(trace), size, state.size),
    )

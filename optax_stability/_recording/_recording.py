"""Measures what passes through a chain, and passes it on.

*Problem*: one number per step, the global norm, hides which layer broke first, and how.

*Where in the chain*: anywhere, as often as you like: ``record("grad")`` first,
``record("update")`` last.

*Cost*: one pass over the leaves for the norms, at every step, unless something around
has measured them (``record_history`` does); every ``every`` steps three more for the
rest, and what the options say. State: scalars, and vectors with one entry per leaf.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import (
    _known_norms,
    _mesh_axes,
    _norms,
    _numerics,
    _scopes,
    _tree,
    _validate,
)
from optax_stability._core._in_place import measure_if
from optax_stability._recording import _measuring, _similarity, _spectrum
from optax_stability._recording._distribution import Parts
from optax_stability._recording._measuring import Measured, Memory, Options

Of = Literal["updates", "params"]


class RecordState(NamedTuple):
    """State of :func:`record`.

    Attributes:
      step: int32[] – calls of ``update``.
      metrics: ``<name>/…`` – float32[] and, for ``…/per_leaf``, float32[n_leaves]: what
        was measured last; zeros before.
      memory: what a measurement needs of the one before.
      leaves: marks that name the entries of the per-leaf vectors, or None without them.
    """

    step: jax.Array
    metrics: dict[str, jax.Array]
    memory: Any
    leaves: Any


def _mark_parts(tree: Any, layered: _norms.Layered) -> Any:
    """Marks of the leaves; a stacked leaf has one for each of its layers."""
    leaves, treedef = jax.tree.flatten(_tree.pure(tree))
    counts = _norms.count_parts(leaves, layered)
    marks = [
        tuple(_tree.Leaf() for _ in range(count)) if split else _tree.Leaf()
        for count, split in zip(counts, layered, strict=True)
    ]
    return jax.tree.unflatten(treedef, marks)


def record(
    name: str,
    *,
    of: Of = "updates",
    per_leaf: bool = True,
    ratio_to_params: bool = False,
    correlation: bool = False,
    spectral: bool = False,
    histogram: bool = False,
    every: int = 1,
    stacked: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Records norms and distribution of the updates at this place in the chain.

    **Rule**, over the entries x of the whole and of each leaf, n of them, n₊ not 0::

      at every step            norm = √Σx²        rms = norm/√n
      every ``every`` steps    max_abs = max|x|   zero_fraction = 1 − n₊/n
                               nonfinite = share of NaN and Inf
                               bimodality = (Σx²)²/(n₊·Σx⁴)
        ratio_to_params        param_ratio = norm/norm of the parameters
        correlation            correlation = cosine with what was measured before
        spectral               spectral_norm = largest singular value of a matrix
        histogram              entries between successive powers of two

    Bimodality is 1/3 for a Gaussian, less with heavy tails, 0.56 for a uniform
    distribution and 1 if all entries are plus or minus the same. That of the whole
    takes every leaf relative to its own rms.

    **Guarantees**

    * The updates pass bit for bit, whatever they hold.
    * What is reported is what passed: a NaN gradient has the norm NaN. The next
      measurement does not remember it.
    * A finite norm is reported right even where its square overflows float32; so are
      the ratios, the bimodality and the singular values.
    * ``spectral_norm`` is never above the largest singular value, to rounding. It
      starts with 32 power iterations and goes on with 2 per measurement, from where the
      last one ended: weights, which change slowly, are followed to one percent. Of
      gradients, which are new at every step, it is a lower bound.

    **Edge cases**

    * An empty tree or leaf measures 0. So do param_ratio where the parameters are 0,
      bimodality and correlation where there is no entry but 0.
    * In between, what is measured every ``every`` steps keeps its value. The first step
      measures, and so does a step whose norm is not finite.
    * zero_fraction and bimodality of a leaf with a NaN are NaN; Inf counts as above.
    * ``spectral_norm`` of a leaf that is no matrix is NaN; kernels of convolutions are
      none. Of the whole it is the largest.

    Args:
      name: first part of the metric names. The diagnosis knows ``"grad"``, ``"update"``
        and ``"params"``.
      of: ``"updates"``, or ``"params"`` to look at the parameters instead, as they are
        before the step.
      per_leaf: also keep a vector with one entry per leaf, in ``leaf_names`` order.
      ratio_to_params: compare with the norm of the parameters: two passes more.
      correlation: needs a buffer like the parameters, and three passes.
      spectral: of leaves with two axes; costs two passes per iteration. Not under
        ``shard_map``, where a device has but a part of the matrix.
      histogram: absolute values in 50 bins, see :func:`histogram_edges`: 49 passes.
      every: steps between measurements of what is not measured at every step, ≥ 1.
      stacked: which leaves hold several layers along their first axis, as ``nnx.scan``
        stacks them: a tree (or tree prefix) of bools, or a callable from the tree to
        one. Each layer is then measured as a leaf, ``blocks/kernel/3``.
      axis_name: under ``shard_map``, the mesh axes that shard the updates; see
        :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`RecordState` and metrics ``<name>/…`` of the
      names above, float32[], and with ``per_leaf`` also ``<name>/…/per_leaf``,
      float32[n_leaves]. ``<name>/histogram`` is float32[50], per leaf [n_leaves, 50].

    Raises:
      ValueError: ``name`` is empty or no string, ``of`` is unknown, ``every`` is below
        1, options exclude each other, ``stacked`` marks a scalar; at ``update``, the
        parameters are needed and missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = record("grad")
      >>> grads = {"w": jnp.array([3.0, -4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(state.metrics["grad/norm"], state.metrics["grad/max_abs"])
      5.0 4.0
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be a non-empty string, such as 'grad'.")
    _validate.check_choice("of", of, get_args(Of))
    _validate.check_count("every", every, 1, "1 measures at every step")
    if of == "params" and ratio_to_params:
        raise ValueError(
            "ratio_to_params=True compares with what of='params' measures; give one."
        )
    if spectral and axis_name is not None:
        raise ValueError(
            f"spectral=True needs whole matrices, but axis_name={axis_name!r} says "
            "that shard_map divides them; leave one of them out."
        )
    options = Options(ratio_to_params, correlation, spectral, histogram)
    needs_params = of == "params" or ratio_to_params

    def named(measured: Measured) -> dict[str, jax.Array]:
        last = {f"{name}/{key}": whole for key, (whole, _) in measured.items()}
        if per_leaf:
            for key, (_, each) in measured.items():
                last[f"{name}/{key}/per_leaf"] = each
        return last

    def layers(tree) -> _norms.Layered:
        return _scopes.split(tree, "global", stacked).layered

    def init_fn(params):
        tree = _tree.pure(params)
        parts = Parts(jax.tree.leaves(tree), layers(tree))
        memory = Memory(
            previous=_similarity.init_previous(params, parts.num_parts)
            if correlation
            else None,
            spectrum=_spectrum.init_spectrum(parts) if spectral else None,
        )
        return RecordState(
            step=jnp.zeros((), jnp.int32),
            metrics=named(_measuring.init_measured(parts.num_parts, options)),
            memory=memory,
            leaves=_mark_parts(tree, parts.layered) if per_leaf else None,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if needs_params and params is None:
            raise ValueError(
                f"record({name!r}) looks at the parameters; pass params to update."
            )
        tree = params if of == "params" else updates
        layered = layers(tree)

        def parts_of(tree):
            return Parts(jax.tree.leaves(tree), layered, axis_name)

        norms = _measuring.measure_norms(parts_of(tree))
        often = named(_measuring.measure_every_step(parts_of(tree), norms))
        seldom = {key: x for key, x in state.metrics.items() if key not in often}

        def measure(updates, extra, last):
            (params, norms), (often, _, memory) = extra, last
            tree = params if of == "params" else updates
            measured, memory = _measuring.measure_when_due(
                parts_of(tree), norms, parts_of(params), memory, options
            )
            return often, named(measured), memory

        now = (state.step % every == 0) | ~jnp.isfinite(norms.whole)
        passed, (often, seldom, memory) = measure_if(
            now,
            measure,
            updates,
            (params, norms),
            (often, seldom, state.memory),
        )
        _known_norms.alias_norms(updates, passed)
        return passed, RecordState(
            step=_numerics.increment(state.step),
            metrics=often | seldom,
            memory=memory,
            leaves=state.leaves,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

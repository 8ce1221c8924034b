"""Measures the updates at a place in a chain, and passes them on unchanged.

*Problem*: one number per step, the global norm, hides which layer broke first, and how.

*Where in the chain*: anywhere, as often as you like: ``record("grad")`` first,
``record("update")`` last.

*Cost*: one pass over the leaves for the norms at every step, unless an outer
transformation has measured them (``record_history`` does). Every ``every`` steps three
more passes, and those of the options. Whether they are due is a condition; on a GPU the
host has to read it, unless the argument ``look=`` of ``update`` says so beforehand.
State: scalars, and vectors with one entry per leaf.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import (
    _known_norms,
    _leaves,
    _mesh_axes,
    _numerics,
    _parts,
    _scopes,
    _tree,
    _validate,
)
from optax_stability._core._checked import checked
from optax_stability._core._in_place import measure_if
from optax_stability._core._look import is_due
from optax_stability._recording import _measuring, _similarity, _spectrum
from optax_stability._recording._distribution import Parts
from optax_stability._recording._measuring import Measured, Memory, Options

Of = Literal["updates", "params"]


class RecordState(NamedTuple):
    """State of :func:`record`.

    Attributes:
      step: int32[] – calls of ``update``.
      metrics: ``<name>/…`` – real[] and, for ``…/per_leaf``, real[n_leaves]: the last
        measurement; zeros before the first. "real" is float64 if a parameter is
        float64 or complex128, else float32.
      memory: memory from one measurement to the next.
      leaves: one mark per entry of the per-leaf vectors, to name it; or None.
    """

    step: jax.Array
    metrics: dict[str, jax.Array]
    memory: Any
    leaves: Any

    reports_metrics = True  # For ost.metrics.


def _mark_parts(tree: Any, layered: _parts.Layered) -> Any:
    """One mark per leaf; a stacked leaf has one per layer."""
    leaves, treedef = jax.tree.flatten(_tree.pure(tree))
    counts = _parts.count_parts(leaves, layered)
    marks = [
        tuple(_tree.Leaf() for _ in range(count)) if split else _tree.Leaf()
        for count, split in zip(counts, layered, strict=True)
    ]
    return _tree.unless_placeholder(tree, jax.tree.unflatten(treedef, marks))


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

    **Rule**, over the n entries x of the tree and of each leaf, n₊ of them not 0; a
    complex x counts by its modulus::

      at every step            norm = √Σ|x|²      rms = norm/√n
      every ``every`` steps    norm and rms of the parameters
                               max_abs = max|x|   zero_fraction = 1 − n₊/n
                               nonfinite = share of NaN and Inf
                               bimodality = (Σ|x|²)²/(n₊·Σ|x|⁴)
        ratio_to_params        param_ratio = norm/norm of the parameters
        correlation            correlation = cosine with the previous measurement;
                               of complex x from the real part of the inner product
        spectral               spectral_norm = largest singular value of a matrix
        histogram              entries between successive powers of two

    Bimodality is 1/3 for a Gaussian, less with heavy tails, 0.56 for a uniform
    distribution and 1 if all entries are plus or minus the same value. For the whole
    tree every leaf is divided by its own rms.

    **Guarantees**

    * The updates pass bit for bit, NaN and Inf included.
    * Non-finite values are reported: a NaN gradient has the norm NaN. They are not
      remembered for the next measurement.
    * A finite norm is correct even where its square overflows float32; so are the
      ratios, the bimodality and the singular values.
    * ``spectral_norm`` is never above the largest singular value, up to rounding. The
      first measurement makes 32 power iterations; each later one makes 2, starting
      from the previous vector. For weights, which change slowly, it is accurate to one
      percent. For gradients, which are new at every step, it is a lower bound.

    **Edge cases**

    * An empty tree or leaf measures 0. ``param_ratio`` is 0 where the parameters are 0;
      bimodality and correlation are 0 where all entries are 0.
    * Between two measurements, quantities that follow ``every`` keep their value. The
      first step is measured, and so is a step whose norm is not finite.
    * With ``look=False`` nothing is measured, except a norm that an outer
      transformation knows; every other quantity keeps its value, also in a step that is
      not finite. With ``look=True`` everything is measured.
    * ``zero_fraction`` of a leaf with a NaN is NaN; Inf counts as nonzero. Bimodality
      is NaN with either.
    * ``spectral_norm`` of a leaf that is not a matrix is 0, also of a convolution
      kernel. For the whole tree it is the largest of all matrices.

    Args:
      name: first part of the metric names. :func:`diagnose` uses ``"grad"``,
        ``"update"`` and ``"params"``.
      of: ``"updates"``, or ``"params"`` to measure the parameters instead, as they are
        before the step.
      per_leaf: also keep a vector with one entry per leaf, in ``leaf_names`` order.
      ratio_to_params: divide by the norm of the parameters: two more passes.
      correlation: needs a buffer of the size of the parameters, and three passes.
      spectral: for leaves with two axes; two passes per iteration. Not under
        ``shard_map``, where a device has only a part of the matrix.
      histogram: count |x| in 50 bins, see :func:`histogram_edges`: 49 passes.
      every: steps between measurements of all but ``norm`` and ``rms`` of the updates,
        ≥ 1.
      stacked: which leaves hold several layers along their first axis, as ``nnx.scan``
        stacks them: a tree (or tree prefix) of bools, or a callable from the tree to
        one. Each layer is then measured as a leaf of its own, ``blocks/kernel/3``.
      axis_name: under ``shard_map``, the mesh axes that shard the updates; see
        :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`RecordState` and metrics ``<name>/…`` of the
      names above, float32[], and with ``per_leaf`` also ``<name>/…/per_leaf``,
      float32[n_leaves]. ``<name>/histogram`` is float32[50], per leaf [n_leaves, 50].
      Its ``update`` takes ``look=``, which replaces ``every``: a plain bool, a static
      argument of the jitted step. XLA then makes two programs, and the host, which
      knows the number of the step, chooses: ``look=step % 10 == 0``.

    Raises:
      ValueError: ``name`` is empty or not a string, ``of`` is unknown, ``every`` is
        below 1, options exclude each other, ``stacked`` marks a scalar; at ``update``,
        the parameters are needed and missing, or ``look`` is no bool.

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
    _validate.check_flags(
        per_leaf=per_leaf,
        ratio_to_params=ratio_to_params,
        correlation=correlation,
        spectral=spectral,
        histogram=histogram,
    )
    _validate.check_axis_name("axis_name", axis_name)
    if of == "params" and ratio_to_params:
        raise ValueError(
            "ratio_to_params=True divides by the norm that of='params' measures; "
            "leave one of them out."
        )
    if spectral and axis_name is not None:
        raise ValueError(
            f"spectral=True needs whole matrices, but axis_name={axis_name!r} means "
            "that shard_map splits them; leave one of them out."
        )
    options = Options(ratio_to_params, correlation, spectral, histogram)
    needs_params = of == "params" or ratio_to_params

    def to_metrics(measured: Measured, dtype) -> dict[str, jax.Array]:
        metrics = {f"{name}/{key}": total for key, (total, _) in measured.items()}
        if per_leaf:
            for key, (_, each) in measured.items():
                metrics[f"{name}/{key}/per_leaf"] = each
        return jax.tree.map(lambda x: x.astype(dtype), metrics)

    def which_layered(tree) -> _parts.Layered:
        return _scopes.split(tree, "global", stacked).layered

    def init_fn(params):
        tree = _tree.pure(params)
        parts = Parts(jax.tree.leaves(tree), which_layered(tree))
        dtype = _numerics.real_dtype(tree)
        measured = _measuring.init_measured(parts.num_parts, options, dtype)
        memory = Memory(
            previous=_similarity.init_previous(params, parts.num_parts, dtype)
            if correlation
            else None,
            spectrum=_spectrum.init_spectrum(params, parts) if spectral else None,
        )
        return RecordState(
            step=jnp.zeros((), jnp.int32),
            metrics=to_metrics(measured, dtype),
            memory=memory,
            leaves=_mark_parts(tree, parts.layered) if per_leaf else None,
        )

    def update_fn(updates, state, params=None, **extra_args):
        if needs_params and params is None:
            raise ValueError(
                f"record({name!r}) measures the parameters; pass params to update."
            )
        measured_tree = params if of == "params" else updates
        layered = which_layered(measured_tree)
        if per_leaf:
            place = (
                f"record({name!r}): {'params' if of == 'params' else 'the gradient'}"
            )
            marks = _mark_parts(measured_tree, layered)
            _leaves.check_leaves(place, state.leaves, marks)
        if correlation and state.memory.previous is not None:
            known = state.memory.previous.directions
            _leaves.check_leaves(f"record({name!r})", known, measured_tree)
        if needs_params:
            _leaves.check_params(f"record({name!r})", params, updates)

        def parts_of(tree):
            return Parts(jax.tree.leaves(tree), layered, axis_name)

        norms, fresh = None, {}
        dtype = state.metrics[f"{name}/norm"].dtype
        if of == "updates" and not _measuring.is_costly(parts_of(updates), extra_args):
            norms = _measuring.measure_norms(parts_of(updates))
            fresh = to_metrics(_measuring.from_norms(parts_of(updates), norms), dtype)

        def rule():
            due = state.step % every == 0
            return due if norms is None else due | ~jnp.isfinite(norms.total)

        def measure(updates, extra, last):
            (params, norms), (metrics, memory) = extra, last
            parts = parts_of(params if of == "params" else updates)
            norms = _measuring.measure_norms(parts) if norms is None else norms
            measured, memory = _measuring.measure_when_due(
                parts, norms, parts_of(params), memory, options
            )
            measured |= _measuring.from_norms(parts, norms)
            return metrics | to_metrics(measured, dtype), memory

        passed, (metrics, memory) = measure_if(
            is_due(extra_args, rule),
            measure,
            updates,
            (params, norms),
            (state.metrics | fresh, state.memory),
        )
        _known_norms.alias_norms(updates, passed)
        return passed, RecordState(
            step=_numerics.increment(state.step),
            metrics=metrics,
            memory=memory,
            leaves=state.leaves,
        )

    return checked("record", RecordState, init_fn, update_fn)

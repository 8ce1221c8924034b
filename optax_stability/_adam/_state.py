"""The state of safe Adam, its metrics, and the conversion from and to optax.

*Cost*: nothing while training. ``metrics`` reads μ and r once per call.

*Source*: the correlation is derived in the docstring of ``scale_by_safe_adam``.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _states, _tree, _validate
from optax_stability._core._leafwise import leafwise_sums


class SafeAdamState(NamedTuple):
    """State of :func:`scale_by_safe_adam`.

    "real" is float64 if a parameter is float64 or complex128, else float32.

    Attributes:
      step: int32[] – calls of ``update``.
      microbatches: int32[] – microbatch gradients in the moments; ``step`` if each call
        counts as one.
      mu: tree like the parameters, ``mu_dtype`` – m, mean of the gradients; complex
        where the parameters are.
      rms: tree like the parameters, ``rms_dtype`` – r = √v, root mean square of the
        gradients.
      mu_unit: real[] – the value of ``mu`` if every gradient were 1; m̂ is
        ``mu / mu_unit``. Equals 1 − Πβ₁, also for a β₁ that changes.
      rms_unit: real[] – the same for ``rms``: r̂ is ``rms / rms_unit``. Equals
        √(1 − Πβ₂).
      noise: real[] – the mean of ``mu²`` if the gradients were independent, with
        mean 0 and mean square 1.
      b1: real[] – β₁ of the last step, for the metrics.
      b2: real[] – β₂ of the last step, for the metrics.
      eps: real[] – ε of the last step, for the metrics.
    """

    step: jax.Array
    microbatches: jax.Array
    mu: Any
    rms: Any
    mu_unit: jax.Array
    rms_unit: jax.Array
    noise: jax.Array
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array

    reports_metrics = True  # For ost.metrics.
    # Tells a reader of metrics that each call takes a pass over the moments.
    costly_metrics = True

    @property
    def leaves(self) -> Any:
        """Marks that name the entries of the per-leaf metrics."""
        return _tree.mark_leaves(self.mu)

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``adam/…``: the distribution of the update, from the present moments."""
        return _metrics(self)


def _log(decay):
    """The logarithm, in double precision where the decay is a plain number."""
    if not _validate.is_concrete(decay):
        return jnp.log(decay)
    return math.log(decay) if decay > 0 else -math.inf


def mu_dtype_for(leaf, mu_dtype: Any) -> Any:
    """The dtype that stores m of a leaf: complex where the leaf is."""
    if mu_dtype is None:
        return _numerics.wide_dtype(leaf)
    is_complex = _numerics.is_complex(leaf)
    return _numerics.promote(mu_dtype, jnp.complex64) if is_complex else mu_dtype


def rms_dtype_for(leaf, rms_dtype: Any) -> Any:
    """The dtype that stores r of a leaf, a real one."""
    return _numerics.real_dtype(leaf) if rms_dtype is None else rms_dtype


def bias_correction(count, decay, dtype=_numerics.FLOAT32) -> jax.Array:
    """1 − decayᵗ after t gradients, without cancellation, of a real dtype."""
    count = jnp.asarray(count, dtype)
    return jnp.where(count > 0, -jnp.expm1(count * _log(decay)), 0.0)


def update_bound(b1, b2):
    """Greatest possible |m̂/r̂|: (1−β₁)/√((1−β₂)(1−β₁²/β₂)), by Cauchy–Schwarz.

    It holds at every step t, because (1−(β₁²/β₂)ᵗ)(1−β₂ᵗ) ≤ (1−β₁ᵗ)² by the inequality
    of arithmetic and geometric means. Where β₁² ≥ β₂ there is no bound: the largest
    number of the dtype of β.
    """
    margin = 1 - b1 * b1 / b2
    bound = (1 - b1) / jnp.sqrt((1 - b2) * jnp.where(margin > 0, margin, 1.0))
    return jnp.where(margin > 0, bound, jnp.finfo(b1.dtype).max)


def _ratio(x, y):
    """x/y, or 0 where y is not positive."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)


def _terms(mu, rms, largest, eps):
    """|m/r|², ε/(r+ε) and 1 where r ≠ 0.

    Squares are limited to ``largest``, and 0/0 = 0. On CPU, XLA writes the result of a
    ``where`` or a comparison to memory before it sums it, but not maxima, minima and
    signs.
    """
    dtype = eps.dtype
    rms, tiny = rms.astype(dtype), _numerics.tiny(dtype)
    ratio = _numerics.by_component(
        lambda part: part.astype(dtype) / jnp.maximum(rms, tiny), mu
    )
    return (
        jnp.minimum(_numerics.abs_sq(ratio), largest),
        eps / jnp.maximum(rms + eps, tiny),
        jnp.sign(rms),
    )


def _correlation(mean_square, c):
    """Lag-1 correlation of the gradients, from the mean square of the update.

    ``c`` is the mean square for independent gradients; for equal ones it is 1.
    """
    return _ratio((mean_square - c) * (1 + c), (mean_square + c) * (1 - c))


@jax.jit
def _metrics(state: SafeAdamState) -> dict[str, jax.Array]:
    """All ``adam/…`` metrics; inside an outer ``jit`` unused ones are not computed."""
    mus, rmss = jax.tree.leaves(state.mu), jax.tree.leaves(state.rms)
    scale = _ratio(state.rms_unit, state.mu_unit)
    independent = _ratio(state.noise, jnp.square(state.mu_unit))
    bound, eps = update_bound(state.b1, state.b2), state.eps * state.rms_unit
    largest = jnp.square(_ratio(bound, scale))
    squares, shares, nonzero = leafwise_sums(
        lambda mu, rms: _terms(mu, rms, largest, eps),
        mus,
        rmss,
        outputs=3,
        batches_on_cpu=True,
    )
    sizes = jnp.array([mu.size for mu in mus], eps.dtype)
    totals = jnp.stack([squares * jnp.square(scale), shares, sizes - nonzero])

    per_leaf = totals / jnp.maximum(sizes, 1.0)[None]
    overall = jnp.sum(totals, axis=1) / jnp.maximum(jnp.sum(sizes), 1.0)

    def named(means, suffix=""):
        mean_square, eps_share, zero_fraction = means
        # Coordinates without a gradient have no correlation to average.
        active = _ratio(mean_square, 1 - zero_fraction)
        return {
            f"adam/update_rms{suffix}": jnp.sqrt(mean_square),
            f"adam/correlation{suffix}": _correlation(active, independent),
            f"adam/eps_share{suffix}": eps_share,
            f"adam/zero_fraction{suffix}": zero_fraction,
        }

    return named(overall) | named(per_leaf, "/per_leaf")


def from_optax_adam_state(
    state: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 0.0,
    mu_dtype: Any = None,
    rms_dtype: Any = None,
) -> optax.OptState:
    """Converts the state of optax's Adam to that of safe Adam, for a running job.

    **Rule**: rms = √nu; mu and the count stay; the units are 1 − b1ᵗ and √(1 − b2ᵗ).
    Both moments get the dtypes that ``scale_by_safe_adam`` gives them: a mu that optax
    keeps in bfloat16 for bfloat16 parameters becomes float32, with the same values.

    **Guarantees**: the next update is that of optax's Adam with the same β and ε, to
    float32 rounding; all other parts of the optimizer state are returned unchanged.

    Args:
      state: an ``optax.ScaleByAdamState``, or any optimizer state with at least one in
        it: of a chain, masked, MultiSteps …. NNX variables become plain arrays.
      b1: β₁ that the state was made with, in [0, 1).
      b2: β₂ that the state was made with, in (0, 1).
      eps: ε to show in the metrics until the next step.
      mu_dtype: storage of ``mu``, as in ``scale_by_safe_adam``; None also keeps a dtype
        that differs from that of the parameters.
      rms_dtype: storage of ``rms``, as in ``scale_by_safe_adam``.

    Returns:
      The same tree, with a :class:`SafeAdamState` for every ``ScaleByAdamState``.

    Raises:
      ValueError: there is no Adam state in ``state``, or a β is outside its range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> old = optax.adamw(1e-3).init({"w": jnp.ones(3)})
      >>> new = from_optax_adam_state(old)
      >>> print(type(new[0]).__name__)
      SafeAdamState
    """
    _validate.check_interval("b1", b1, "[0, 1)", "0.9 is usual")
    _validate.check_interval("b2", b2, "(0, 1)", "0.999 is usual")
    _validate.check_interval("eps", eps, "[0, inf)", "it is for the metrics alone")
    for name, dtype in (("mu_dtype", mu_dtype), ("rms_dtype", rms_dtype)):
        _validate.check_float_dtype(name, dtype, optional=True)

    def convert(adam: optax.ScaleByAdamState) -> SafeAdamState:
        def root(nu):
            # optax keeps nu of a complex parameter complex, with imaginary part 0.
            root = jnp.sqrt(jnp.real(nu).astype(_numerics.real_dtype(nu)))
            dtype = rms_dtype_for(nu, rms_dtype)
            return _numerics.round_stochastically(root, adam.count, dtype)

        def widened(mu, nu):
            # nu has the dtype of the parameter. A mu of another dtype was asked for.
            given = mu.dtype if mu_dtype is None and mu.dtype != nu.dtype else mu_dtype
            return _numerics.saturating_cast(mu, mu_dtype_for(mu, given))

        count, dtype = jnp.asarray(adam.count), _numerics.real_dtype(adam.nu)
        return SafeAdamState(
            step=count,
            microbatches=count,
            mu=jax.tree.map(widened, adam.mu, adam.nu),
            rms=jax.tree.map(root, adam.nu),
            mu_unit=bias_correction(count, b1, dtype),
            rms_unit=jnp.sqrt(bias_correction(count, b2, dtype)),
            noise=(1 - b1) / (1 + b1) * bias_correction(count, b1 * b1, dtype),
            b1=jnp.asarray(b1, dtype),
            b2=jnp.asarray(b2, dtype),
            eps=jnp.asarray(eps, dtype),
        )

    return _replace(state, optax.ScaleByAdamState, convert)


def to_optax_adam_state(
    state: Any, *, mu_dtype: Any = None, nu_dtype: Any = jnp.float32
) -> optax.OptState:
    """Converts the state of safe Adam to that of ``optax.scale_by_adam``.

    **Rule**: nu = rms², count = microbatches, and mu. ``nu`` underflows where
    |g| < 1e-19.

    Args:
      state: a :class:`SafeAdamState`, or any optimizer state with at least one in it.
      mu_dtype: dtype of ``mu``; None keeps it. optax's is that of the parameters,
        unless it was given one.
      nu_dtype: dtype of ``nu``; optax's is that of the parameters. Complex, as in
        optax, where the parameters are.

    Returns:
      The same tree with every :class:`SafeAdamState` replaced by an
      ``optax.ScaleByAdamState``.

    Raises:
      ValueError: there is no safe Adam state in ``state``.
    """
    _validate.check_float_dtype("mu_dtype", mu_dtype, optional=True)
    _validate.check_float_dtype("nu_dtype", nu_dtype)

    def convert(safe: SafeAdamState) -> optax.ScaleByAdamState:
        def square(rms, mu):
            square = jnp.square(rms.astype(_numerics.real_dtype(rms)))
            return square.astype(mu_dtype_for(mu, nu_dtype))

        def cast(mu):
            dtype = mu.dtype if mu_dtype is None else mu_dtype_for(mu, mu_dtype)
            return _numerics.saturating_cast(mu, dtype)

        nu = jax.tree.map(square, safe.rms, safe.mu)
        mu = jax.tree.map(cast, safe.mu)
        return optax.ScaleByAdamState(count=safe.microbatches, mu=mu, nu=nu)

    return _replace(state, SafeAdamState, convert)


def _replace(state: Any, kind: type, convert) -> Any:
    """Applies ``convert`` to every ``kind`` in a tree, which must hold at least one."""
    _states.check_not_transformation(state)
    nodes, treedef = jax.tree.flatten(
        _tree.pure(state), is_leaf=lambda node: isinstance(node, kind)
    )
    if not any(isinstance(node, kind) for node in nodes):
        raise ValueError(
            f"state={type(state).__name__} holds no {kind.__name__}; pass the state of "
            "an optimizer that has one."
        )
    return jax.tree.unflatten(
        treedef, [convert(node) if isinstance(node, kind) else node for node in nodes]
    )

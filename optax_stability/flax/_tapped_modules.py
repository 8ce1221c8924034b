"""NNX modules that measure the norm of every example's gradient.

*Problem*: the gradient of a batch is a sum, which no longer shows how large the
gradients of its examples were.

*How*: use them in place of the modules of ``nnx`` with the same name. Without taps they
are identical. :func:`per_example_gradients` attaches taps to a copy of the model.

*Cost*: none without taps; with taps that of ``_gradients/_norm_taps.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend import core

from optax_stability._core import _numerics
from optax_stability._gradients import _norm_taps


class NormTap(nnx.Param[jax.Array]):
    """A zero array beside a parameter; its cotangent returns the gradient norms.

    A tap is a ``Param`` with the leading axes of its parameter, so that ``nnx.scan``
    and ``nnx.vmap`` over layers slice both in the same way. Its cotangent contains,
    along the last axis: the squared norms of B examples, how often the parameter was
    used, and the squared norm of its gradient.
    """

    @property
    def squares(self) -> jax.Array:
        """The part for the squared norms, [B]."""
        return self[...][:-2]

    @property
    def seen(self) -> jax.Array:
        """The part for the number of uses and the norm of the gradient, [2]."""
        return self[...][-2:]


class _Use(NamedTuple):
    """A use of a parameter; for a lookup, also the arrays that the output head needs.

    Attributes:
      trace: the JAX trace of the use; the arrays must not leak out of it.
      ids: int[B, ...] – the ids that were looked up, or None.
      link: float[B, ..., D] – from :func:`_norm_taps.tap_lookup`, or None.
      embedding: float[V, D] – the embedding that was used, or None.
    """

    trace: Any
    ids: Any = None
    link: Any = None
    embedding: Any = None


_uses: ContextVar[dict[str, _Use] | None] = ContextVar("uses", default=None)


@contextmanager
def record_uses() -> Iterator[None]:
    """Records the uses of all parameters while the loss is traced once."""
    token = _uses.set({})
    try:
        yield
    finally:
        _uses.reset(token)


def _current_trace() -> Any:
    return core.get_opaque_trace_state(convention="nnx")


def _earlier_use(tap: NormTap) -> _Use | None:
    """The use of this parameter in the function that is being traced, if any."""
    use = (_uses.get() or {}).get(tap.parameter)
    # Uses in a loop body or a checkpoint belong to another trace and are ignored: JAX
    # may trace a body twice, which is not a second use. The tap counts the real uses.
    return use if use is not None and use.trace == _current_trace() else None


def _record_use(tap: NormTap, **lookup: Any) -> None:
    if _earlier_use(tap) is not None:
        raise ValueError(
            f"{tap.parameter!r} is used twice in one evaluation of loss_fn; the norms "
            "of two uses cannot be added. Use nnx's own module there, which leaves the "
            "noise of this parameter unknown, or one module per use."
        )
    uses = _uses.get()
    if uses is not None:
        uses[tap.parameter] = _Use(_current_trace(), **lookup)


def _check_rows(x: Any, tap: NormTap, min_ndim: int) -> None:
    """Raises unless axis 0 of an input is the axis of examples."""
    taps = tap[...].shape
    if len(taps) != 1:
        raise ValueError(
            f"{tap.parameter!r} is stacked but its tap, of shape {taps}, was not split "
            "into layers; split variables of type nnx.Param along axis 0."
        )
    if x.ndim < min_ndim or x.shape[0] != taps[0] - 2:
        raise ValueError(
            f"{tap.parameter!r} is used on an input of shape {x.shape}, whose axis 0 "
            f"does not hold the {taps[0] - 2} examples of the batch. Broadcast the "
            "input to all examples, or use nnx's own module there."
        )


def _reject_options(module: nnx.Module, tap: NormTap, **given: bool) -> None:
    """Raises if an option is given that a tapped module does not support."""
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{type(module).__name__}: norm taps cannot be used with {name}; use "
                f"nnx's own module for {tap.parameter!r}, or leave its type out of "
                "only=."
            )


def _first_tap(*taps: NormTap | None) -> NormTap | None:
    return next((tap for tap in taps if tap is not None), None)


def _tapped_value(
    variable: nnx.Param | None, tap: NormTap | None, x: Any, min_ndim: int
) -> Any:
    """The value of a parameter; with a tap, its use is checked and recorded."""
    if variable is None or tap is None:
        return None if variable is None else variable[...]
    _check_rows(x, tap, min_ndim)
    _record_use(tap)
    return _norm_taps.tap_parameter(variable[...], tap.seen)


def _matmul(x: Any, kernel: Any, tap: NormTap | None, *options: Any) -> jax.Array:
    if tap is None:
        return _norm_taps.multiply(x, kernel, *options)
    return _norm_taps.dense(x, kernel, tap.squares, *options)


def _add_bias(y: jax.Array, bias: jax.Array | None, tap: NormTap | None) -> jax.Array:
    if bias is None:
        return y
    dtype = _numerics.promote(y.dtype, bias.dtype)
    y, bias = y.astype(dtype), bias.astype(dtype)
    if tap is None:
        return y + _norm_taps.along_features(bias, y)
    return _norm_taps.shift(y, bias, tap.squares)


def _apply_scale(
    x: jax.Array, scale: jax.Array | None, tap: NormTap | None
) -> jax.Array:
    if scale is None:
        return x
    scale = scale.astype(x.dtype)
    if tap is None:
        return x * _norm_taps.along_features(scale, x)
    return _norm_taps.scale(x, scale, tap.squares)


def _check_normalization(module: Any, tap: NormTap, mask: Any) -> None:
    last = -1, (-1,)
    _reject_options(
        module,
        tap,
        mask=mask is not None,
        axis_name=module.axis_name is not None,
        reduction_axes=module.reduction_axes not in last,
        feature_axes=module.feature_axes not in last,
    )


def _normalization_options(module: Any, x: jax.Array) -> dict[str, Any]:
    """Options for the module's normalisation without parameters.

    The result is at least float32, as inside nnx: rounding before the scale would
    round twice.
    """
    return {
        "epsilon": module.epsilon,
        "dtype": _numerics.promote(x.dtype, _numerics.FLOAT32),
        "use_fast_variance": module.use_fast_variance,
        "rngs": nnx.Rngs(),
    }


class Linear(nnx.Linear):
    """``nnx.Linear`` that supports :func:`per_example_gradients`.

    Arguments, variables and results are those of ``nnx.Linear``. Not supported with
    taps: a custom ``dot_general``, ``out_sharding``.
    """

    tapped: ClassVar[dict[str, int]] = {"kernel": 2, "bias": 1}
    kernel_tap: NormTap | None = None
    bias_tap: NormTap | None = None

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Applies the linear map along the last axis of ``inputs[batch, ...]``."""
        tap = _first_tap(self.kernel_tap, self.bias_tap)
        if tap is None:
            return super().__call__(inputs, out_sharding=out_sharding)
        _reject_options(
            self,
            tap,
            dot_general=self.dot_general is not lax.dot_general,
            out_sharding=out_sharding is not None,
        )
        kernel = _tapped_value(self.kernel, self.kernel_tap, inputs, 2)
        bias = _tapped_value(self.bias, self.bias_tap, inputs, 2)
        inputs, kernel, bias = self.promote_dtype(
            (inputs, kernel, bias), dtype=self.dtype
        )
        options = self.precision, self.preferred_element_type
        y = _matmul(inputs, kernel, self.kernel_tap, *options)
        return _add_bias(y, bias, self.bias_tap)


class Embed(nnx.Embed):
    """``nnx.Embed`` that supports :func:`per_example_gradients`.

    Arguments, variables and results are those of ``nnx.Embed``. Not supported with
    taps: ``out_sharding``. The norms are exact for one lookup, for one ``attend``, and
    for a lookup followed by one ``attend`` (an output head that shares the matrix).
    """

    tapped: ClassVar[dict[str, int]] = {"embedding": 2}
    embedding_tap: NormTap | None = None

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Looks up ``inputs``, int[batch, ...]."""
        tap = self.embedding_tap
        if tap is None:
            return super().__call__(inputs, out_sharding=out_sharding)
        _reject_options(self, tap, out_sharding=out_sharding is not None)
        _check_rows(inputs, tap, 1)
        embedding = _norm_taps.tap_parameter(self.embedding[...], tap.seen)
        (rows,) = self.promote_dtype((embedding,), dtype=self.dtype, inexact=False)
        # With one row, nnx returns this row for every id.
        ids = inputs % 1 if self.num_embeddings == 1 else inputs
        y = jnp.take(rows, ids, axis=0)
        ids = jnp.where(ids < 0, ids + self.num_embeddings, ids)
        y, link = _norm_taps.tap_lookup(y, ids, tap.squares)
        _record_use(tap, ids=ids, link=link, embedding=embedding)
        return y

    def attend(self, query: Any, out_sharding: Any = None) -> jax.Array:
        """Inner products of ``query[batch, ..., features]`` with every embedding."""
        tap = self.embedding_tap
        if tap is None:
            return super().attend(query, out_sharding=out_sharding)
        _reject_options(self, tap, out_sharding=out_sharding is not None)
        _check_rows(query, tap, 2)
        lookup = _earlier_use(tap)
        if lookup is None or lookup.link is None:
            embedding = _tapped_value(self.embedding, tap, query, 2)
            return self._multiply(query, embedding, tap)[1]
        query, logits = self._multiply(query, lookup.embedding, tap)
        # A second head then finds a use without a link, and raises.
        self._clear_link(tap)
        return _norm_taps.link_to_lookup(logits, query, lookup.ids, lookup.link)

    def _multiply(self, query: Any, embedding: Any, tap: NormTap) -> tuple[Any, Any]:
        query, embedding = self.promote_dtype((query, embedding), dtype=self.dtype)
        return query, _norm_taps.dense(query, embedding.T, tap.squares)

    def _clear_link(self, tap: NormTap) -> None:
        uses = _uses.get()
        if uses is not None:
            uses[tap.parameter] = _Use(_current_trace())


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` that supports :func:`per_example_gradients`.

    Arguments, variables and results are those of ``nnx.LayerNorm``. Not supported with
    taps: a ``mask``, ``axis_name``, axes other than the last.
    """

    tapped: ClassVar[dict[str, int]] = {"scale": 1, "bias": 1}
    scale_tap: NormTap | None = None
    bias_tap: NormTap | None = None

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        """Normalises ``x[batch, ..., features]`` along its last axis."""
        tap = _first_tap(self.scale_tap, self.bias_tap)
        if tap is None:
            return super().__call__(x, mask=mask)
        _check_normalization(self, tap, mask)
        scale = _tapped_value(self.scale, self.scale_tap, x, 2)
        bias = _tapped_value(self.bias, self.bias_tap, x, 2)
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        normalize = nnx.LayerNorm(
            self.num_features,
            use_bias=False,
            use_scale=False,
            **_normalization_options(self, x),
        )
        y = _apply_scale(normalize(x), scale, self.scale_tap)
        return _add_bias(y, bias, self.bias_tap).astype(x.dtype)


class RMSNorm(nnx.RMSNorm):
    """``nnx.RMSNorm`` that supports :func:`per_example_gradients`.

    Arguments, variables and results are those of ``nnx.RMSNorm``. Not supported with
    taps: a ``mask``, ``axis_name``, axes other than the last.
    """

    tapped: ClassVar[dict[str, int]] = {"scale": 1}
    scale_tap: NormTap | None = None

    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        """Normalises ``x[batch, ..., features]`` along its last axis."""
        tap = self.scale_tap
        if tap is None:
            return super().__call__(x, mask=mask)
        _check_normalization(self, tap, mask)
        scale = _tapped_value(self.scale, tap, x, 2)
        x, scale = self.promote_dtype((x, scale), dtype=self.dtype)
        normalize = nnx.RMSNorm(
            self.num_features, use_scale=False, **_normalization_options(self, x)
        )
        return _apply_scale(normalize(x), scale, tap).astype(x.dtype)


# ``tapped`` is the number of axes of each parameter when it is not stacked.
DROP_INS = Linear, Embed, LayerNorm, RMSNorm

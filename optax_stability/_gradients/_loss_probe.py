"""The loss reaches the optimizer inside the gradient, where a trainer does not pass it.

*Problem*: many trainers call ``tx.update(grads, state, params)`` themselves. A guard
that judges a step by its loss then has none.

*Where*: ``probed`` around the loss function, ``loss_probe`` among the parameters,
``with_loss_probe`` around the whole optimizer.

*Cost*: two numbers among the parameters; nothing in the state of the optimizer.

*Source*: ours.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _tree, _validate

LossFn = TypeVar("LossFn", bound=Callable[..., Any])

NAME = "loss_probe"
# So small that no norm of the gradient shows it, and far above the smallest float32.
_SCALE = 2.0**-40


def _is_probe(path: tuple) -> bool:
    keys = jax.tree_util.keystr(path, simple=True, separator="/")
    return NAME in keys.split("/")


def _find(tree: Any) -> list:
    """The arrays of a tree that are probes."""
    found = jax.tree_util.tree_flatten_with_path(_tree.pure(tree))[0]
    return [leaf for path, leaf in found if _is_probe(path)]


def _the_probe(tree: Any) -> jax.Array:
    """The one probe of a tree."""
    found = _find(tree)
    if len(found) != 1 or jnp.shape(found[0]) != (2,):
        raise ValueError(
            f"params must hold one {NAME!r} of shape (2,), got "
            f"{[jnp.shape(leaf) for leaf in found]}; add it before the optimizer is "
            f"initialised: params[{NAME!r}] = loss_probe(), or with NNX model.{NAME} = "
            "nnx.Param(loss_probe()), of the type that the optimizer trains."
        )
    return found[0]


def _replace_probe(tree: Any, make: Callable[[Any], Any]) -> Any:
    """The tree with something else in the place of the probe."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: make(leaf) if _is_probe(path) else leaf,
        tree,
        is_leaf=_tree.is_variable,
    )


def _hide(tree: Any) -> Any:
    """The tree without its probe, as ``optax.masked`` hides a leaf."""
    return _replace_probe(tree, lambda leaf: optax.MaskedNode())


def _show(tree: Any, like: Any) -> Any:
    """The tree with a probe of zeros, where ``like`` has the probe."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, part: jnp.zeros_like(leaf) if _is_probe(path) else part,
        like,
        tree,
    )


def _read(gradient: jax.Array) -> jax.Array:
    """The loss: the quotient of both entries; 0 if nothing is there."""
    loss, one = gradient.astype(jnp.float32)
    return jnp.where(one == 0, 0.0, loss / jnp.where(one == 0, 1.0, one))


@jax.custom_jvp
def _tie(z, loss):
    """0, with the derivative 2⁻⁴⁰·(loss, 1) with respect to ``z``."""
    del z
    return jnp.zeros_like(loss)


@_tie.defjvp
def _tie_jvp(primals, tangents):
    z, loss = primals
    along = tangents[0].astype(jnp.float32)
    slope = _SCALE * (along[0] * loss.astype(jnp.float32) + along[1])
    return _tie(z, loss), slope.astype(loss.dtype)


def loss_probe() -> jax.Array:
    """The parameter that carries the loss: zeros, float32[2], and it stays so.

    See :func:`with_loss_probe`.
    """
    return jnp.zeros((2,), jnp.float32)


def probed(loss_fn: LossFn) -> LossFn:
    """The same loss function, whose gradient tells its value.

    **Rule**, for the loss l and the probe z: the derivative with respect to z is
    2⁻⁴⁰·(l, 1), and nothing else changes.

    **Guarantees**: the value is that of ``loss_fn``, bit for bit, and so is the
    gradient of all other parameters.

    Args:
      loss_fn: ``loss_fn(params, …) -> loss``, or ``(loss, aux)``; params, the first
        argument, is a tree or an NNX module with a :func:`loss_probe`.

    Returns:
      A function with the same arguments and results.

    Raises:
      TypeError: ``loss_fn`` is not a function.
      ValueError: when it is called with parameters without a probe.
    """
    _validate.check_callable("loss_fn", loss_fn)

    @functools.wraps(loss_fn)
    def with_probe(params, *args, **kwargs):
        z = _the_probe(params)
        out = loss_fn(params, *args, **kwargs)
        loss, *aux = out if isinstance(out, tuple) else (out,)
        loss += _tie(z, jax.lax.stop_gradient(loss))
        return (loss, *aux) if isinstance(out, tuple) else loss

    return cast(LossFn, with_probe)


def with_loss_probe(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Takes the loss out of the gradient and hands it on as ``value=``.

    For trainers that take a loss function and an optimizer, and call ``update`` without
    the loss. Three lines: the probe among the parameters, :func:`probed` around the
    loss function, and this around the optimizer. Where the call of ``update`` is yours,
    write ``value=loss`` instead.

    **Rule**: the gradient of the probe is c·(l, 1), with c = 2⁻⁴⁰; the loss is the
    quotient of both. ``tx`` sees gradients and parameters without the probe.

    **Guarantees**

    * ``value`` is the loss, to the precision of the gradient's dtype, whatever scales
      the gradient as a whole: a loss scale, divided out or not, a sum instead of a mean
      over devices, a clip.
    * Behind an accumulation of gradients it is the mean loss of the window.
    * The probe itself stays 0, and its gradient, below 2⁻³⁰ for a loss below 1,000,
      is too small to change a norm of gradients that the trainer logs or clips.
    * The state is that of ``tx`` without the probe: one from a run without a probe is
      adopted by :func:`adopt_state`.
    * A loss that is NaN or Inf is handed on as such.

    **Edge cases**

    * If ``loss_fn`` was not given to :func:`probed`, ``value`` is always 0, and the run
      looks healthy; :func:`diagnose` finds it from step 24 on
      (``guard_loss_constant``). A gradient that is rounded to float16 loses the probe
      as well.
    * Checkpoints of the *parameters* hold two numbers more. Delete the probe before an
      export: ``del model.loss_probe``.
    * A loss that the caller passes as ``value=`` wins.
    * Inside, trees have ``optax.MaskedNode`` where the probe is: masks and labels must
      be functions of the parameters, not trees made before.

    Args:
      tx: the whole optimizer, such as ``spike_guard(chain)``.

    Returns:
      A transformation with the state of ``tx``.

    Raises:
      TypeError: ``tx`` is not a transformation.
      ValueError: the parameters hold no probe, or several.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_stability import safe_adamw, spike_guard
      >>> params = {"w": jnp.ones(2), "loss_probe": loss_probe()}
      >>> tx = with_loss_probe(spike_guard(safe_adamw(1e-3)))
      >>> grads = jax.grad(probed(lambda p: jnp.sum(p["w"] ** 2)))(params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(state.value, updates["loss_probe"])
      2.0 [0. 0.]
    """
    _validate.check_transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        if not _tree.is_placeholder(params):
            _the_probe(params)
        return tx.init(_hide(params))

    def update_fn(updates, state, params=None, **extra_args):
        extra_args = {"value": _read(_the_probe(updates)), **extra_args}
        hidden = None if params is None else _hide(params)
        new, state = tx.update(_hide(updates), state, hidden, **extra_args)
        return _show(new, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

"""The norm of the gradient in the loss, against closed forms."""

import chex
import jax
import jax.numpy as jnp
import model
import numpy as np
import pytest
from flax import nnx
from tiers import full

import optax_stability as ost
from optax_stability import flax as ost_flax

RNG = np.random.default_rng(0)
# ½θᵀAθ + bᵀθ, A symmetric and indefinite.
HALF = RNG.standard_normal((6, 6))
A, B, THETA = HALF + HALF.T, RNG.standard_normal(6), RNG.standard_normal(6)
WEIGHT = 0.3


def quadratic(params, scale=1.0):
    x = jnp.concatenate([params["a"], params["b"].ravel()])
    x = x.astype(jnp.float32)
    product = jnp.sum(x[:, None] * jnp.asarray(A, jnp.float32) * x[None])
    return scale * (0.5 * product + jnp.sum(jnp.asarray(B, jnp.float32) * x))


def split(theta, dtype=jnp.float32):
    return {"a": jnp.array(theta[:2], dtype), "b": jnp.array(theta[2:], dtype)}


def expected(theta, weight):
    """Value and gradient in float64: ∇L = Aθ + b and H = A."""
    gradient = A @ theta + B
    norm = np.linalg.norm(gradient)
    value = 0.5 * theta @ A @ theta + B @ theta + weight * norm
    return value, gradient + weight * A @ gradient / norm


@pytest.mark.parametrize("power", [0, -40, 40])
def test_value_and_gradient_are_those_of_a_quadratic(power):
    scale = 2.0**power
    loss_fn = jax.jit(jax.value_and_grad(ost.penalize_gradient_norm(quadratic, WEIGHT)))
    value, grads = loss_fn(split(THETA), scale)
    closed, gradient = expected(THETA, WEIGHT)
    np.testing.assert_allclose(value / scale, closed, rtol=1e-5)
    found = np.concatenate([grads["a"], grads["b"]]) / scale
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5)


@full
def test_the_gradient_is_that_of_reverse_over_reverse():
    def loss_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2 * jnp.cos(params["b"]))

    def direct(params, x):
        grads = jax.grad(loss_fn)(params, x)
        squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
        return loss_fn(params, x) + WEIGHT * jnp.sqrt(squares)

    params = {"w": jnp.array(RNG.standard_normal((3, 2)), jnp.float32)}
    params["b"] = jnp.array([0.3, -0.4])
    x = jnp.array(RNG.standard_normal((5, 3)), jnp.float32)
    found = jax.value_and_grad(ost.penalize_gradient_norm(loss_fn, WEIGHT))(params, x)
    chex.assert_trees_all_close(
        found, jax.value_and_grad(direct)(params, x), rtol=1e-5, atol=1e-6
    )


def test_without_a_gradient_there_is_no_penalty_and_no_nan():
    minimum = np.linalg.solve(A, -B)
    flat = ost.penalize_gradient_norm(lambda x: jnp.sum(0 * x) + 2.0, WEIGHT)
    value, grads = jax.value_and_grad(flat)(jnp.asarray(minimum, jnp.float32))
    assert float(value) == 2.0
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_makes_the_loss_none(bad):
    # A finite loss whose gradient is not: only the first entry's is.
    @jax.custom_jvp
    def broken(x):
        return x

    broken.defjvp(lambda primals, tangents: (primals[0], bad * tangents[0]))
    loss_fn = ost.penalize_gradient_norm(lambda x: jnp.sum(x**2) + broken(x[0]), WEIGHT)
    assert np.isnan(float(loss_fn(jnp.ones(3))))


@full
def test_a_weight_of_zero_is_the_loss_itself():
    assert ost.penalize_gradient_norm(quadratic, 0.0) is quadratic
    traced = jax.jit(
        lambda weight: ost.penalize_gradient_norm(quadratic, weight)(split(THETA))
    )
    np.testing.assert_allclose(traced(0.0), quadratic(split(THETA)), rtol=1e-5)


@full
def test_what_the_loss_returns_beside_it_is_kept():
    def loss_fn(params):
        return quadratic(params), {"seen": params["a"] + 1}

    fn = jax.value_and_grad(
        ost.penalize_gradient_norm(loss_fn, WEIGHT, has_aux=True), has_aux=True
    )
    (value, aux), _ = fn(split(THETA))
    np.testing.assert_allclose(value, expected(THETA, WEIGHT)[0], rtol=1e-5)
    np.testing.assert_array_equal(aux["seen"], split(THETA)["a"] + 1)


def test_gradients_have_the_dtype_of_the_parameters():
    fn = jax.value_and_grad(ost.penalize_gradient_norm(quadratic, WEIGHT))
    value, grads = fn(split(THETA, jnp.bfloat16))
    chex.assert_type(jax.tree.leaves(grads), jnp.bfloat16)
    theta = np.asarray(split(THETA, jnp.bfloat16)["a"], np.float64)
    theta = np.append(theta, np.asarray(split(THETA, jnp.bfloat16)["b"], np.float64))
    # Three significant digits in the direction.
    np.testing.assert_allclose(value, expected(theta, WEIGHT)[0], rtol=2e-2)


@pytest.mark.parametrize("weight", [-1.0, float("inf")])
def test_a_bad_weight_is_refused(weight):
    with pytest.raises(ValueError, match=r"weight=.* is outside \[0, inf\)"):
        ost.penalize_gradient_norm(quadratic, weight)


class Noisy(nnx.Module):
    """Dropout, and a count of how often it was called."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.linear(x))


def noisy_loss(model, x):
    return jnp.mean(model(x) ** 2)


@full
def test_a_module_is_used_once():
    x = jnp.ones((8, 4))
    plain, penalized = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    loss, grads = nnx.value_and_grad(noisy_loss)(plain, x)
    fn = ost_flax.penalize_gradient_norm(noisy_loss, WEIGHT)
    total, _ = nnx.value_and_grad(fn)(penalized, x)
    # The same dropout in both looks, or else the norm would not be this one.
    squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(total, loss + WEIGHT * jnp.sqrt(squares), rtol=1e-5)
    assert float(penalized.calls[...]) == 1
    count = [each.dropout.rngs.count[...] for each in (plain, penalized)]
    assert int(count[0]) == int(count[1])


@full
def test_microbatches_of_a_gpt_pay_for_their_own_gradients():
    shape = model.Size(1, 16, 2, 8, 32, 1e-2)
    gpt = model.GPT(shape, 32, jnp.float32, nnx.Rngs(0))
    windows = jax.random.randint(jax.random.key(0), (4, 9), 0, 32)
    loss_fn = ost_flax.penalize_gradient_norm(model.next_token_loss, WEIGHT)

    @nnx.jit
    def both(gpt, windows):
        gradients = ost_flax.microbatch_gradients(loss_fn, 2, vmap_size=1)
        total, grads, moments = gradients(gpt, windows)
        each = [
            nnx.value_and_grad(model.next_token_loss)(gpt, windows[k::2])
            for k in range(2)
        ]
        norms = [
            jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
            for _, grads in each
        ]
        plain = sum(loss for loss, _ in each) / 2 + WEIGHT * sum(norms) / 2
        return total, plain, moments.num_microbatches, grads

    total, plain, parts, grads = both(gpt, windows)
    np.testing.assert_allclose(total, plain, rtol=1e-5)
    assert int(parts) == 2
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))

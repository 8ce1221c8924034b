"""The loss inside the gradient: it arrives whatever the trainer does with gradients."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_stability as ost

# A quotient of two float32 numbers; of numbers with 8 bits.
ROUNDING, BFLOAT16 = 1e-6, 2.0**-7
X = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)


def plain_loss(params, x):
    return jnp.mean((x @ params["w"] - 1) ** 2)


def make_params():
    return {"loss_probe": ost.loss_probe(), "w": jnp.array([1.0, -2.0, 0.5])}


def make_tx():
    return ost.with_loss_probe(ost.spike_guard(ost.safe_adamw(1e-2)))


TX = make_tx()
UPDATE = jax.jit(TX.update)


@functools.cache
def gradient(x_scale=1.0):
    """Loss and gradient of a batch, the probe's with them."""
    params = make_params()
    return jax.value_and_grad(ost.probed(plain_loss))(params, X * x_scale)


def value_of(grads):
    """The loss that the guard is told."""
    params = make_params()
    _, state = UPDATE(grads, TX.init(params), params)
    return state.value


def test_value_and_gradients_are_unchanged():
    params = make_params()
    loss, grads = gradient()
    expected = jax.value_and_grad(plain_loss)(params, X)
    np.testing.assert_array_equal(loss, expected[0])
    np.testing.assert_array_equal(grads["w"], expected[1]["w"])
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    # No norm shows the probe.
    assert optax.tree.norm(grads) == optax.tree.norm(expected[1])


def test_aux_and_the_signature_stay():
    def loss_fn(params, x, *, factor):
        return factor * plain_loss(params, x), x.shape

    grads, aux = jax.grad(ost.probed(loss_fn), has_aux=True)(
        make_params(), X, factor=2.0
    )
    assert aux == X.shape
    assert value_of(grads) == pytest.approx(2 * float(gradient()[0]), rel=ROUNDING)
    assert ost.probed(loss_fn).__wrapped__ is loss_fn


@pytest.mark.parametrize("factor", [2.0**15, 1e-4, 8.0])
def test_a_scale_of_the_gradient_does_not_matter(factor):
    """A loss scale that is not divided out, a clip, a sum over devices."""
    loss, grads = gradient()
    scaled = optax.tree.scale(factor, grads)
    assert value_of(scaled) == pytest.approx(float(loss), rel=ROUNDING)


def test_a_loss_scale_in_float16_does_not_matter():
    def loss_fn(params, x):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        return plain_loss(low, x.astype(jnp.float16))

    probed = ost.probed(loss_fn)
    scale = jnp.float16(2.0**10)
    grads = jax.grad(lambda p: probed(p, X) * scale)(make_params())
    expected = float(loss_fn(make_params(), X))
    assert value_of(grads) == pytest.approx(expected, rel=2.0**-10)


def test_gradients_in_bfloat16_keep_two_digits():
    loss, grads = gradient()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grads)
    assert value_of(low) == pytest.approx(float(loss), rel=BFLOAT16)


@pytest.mark.parametrize("wrap", ["MultiSteps", "accumulate_moments"])
def test_behind_an_accumulation_it_is_the_mean_of_the_window(wrap):
    inside, params = make_tx(), make_params()
    tx = {
        "MultiSteps": lambda: optax.MultiSteps(inside, 2),
        "accumulate_moments": lambda: ost.accumulate_moments(inside, 2),
    }[wrap]()
    state, update = tx.init(params), jax.jit(tx.update)
    losses = []
    for x_scale in (1.0, 3.0):
        loss, grads = gradient(x_scale)
        losses.append(float(loss))
        updates, state = update(grads, state, params)
    value = ost.metrics(state)["skip/value"]
    assert value == pytest.approx(np.mean(losses), rel=ROUNDING)
    np.testing.assert_array_equal(updates["loss_probe"], 0.0)


@pytest.mark.parametrize("reduce", [jax.lax.pmean, jax.lax.psum])
def test_on_a_mesh_it_is_the_mean_over_devices(reduce):
    mesh = Mesh(jax.devices()[:4], "data")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    def grads_of(params, x):
        return reduce(jax.grad(ost.probed(plain_loss))(params, x), "data")

    grads = grads_of(make_params(), X)
    assert value_of(grads) == pytest.approx(float(gradient()[0]), rel=ROUNDING)


def test_under_jit_with_a_sharded_batch_it_is_the_loss():
    mesh = Mesh(jax.devices()[:4], "data")
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    grads = jax.jit(jax.grad(ost.probed(plain_loss)))(make_params(), x)
    assert value_of(grads) == pytest.approx(float(gradient()[0]), rel=ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_handed_on(bad):
    """Even where no other gradient shows it."""

    def loss_fn(params, x):
        return plain_loss(params, x) + jax.lax.stop_gradient(jnp.float32(bad))

    loss, grads = jax.value_and_grad(ost.probed(loss_fn))(make_params(), X)
    np.testing.assert_array_equal(loss, bad)
    assert np.isfinite(grads["w"]).all()
    np.testing.assert_array_equal(value_of(grads), bad)


def test_without_probed_nothing_is_known_and_nothing_freezes():
    params = make_params()
    grads = jax.grad(plain_loss)(params, X)
    _, state = UPDATE(grads, TX.init(params), params)
    assert state.value == 0.0
    assert not state.skipped


def test_a_given_loss_wins():
    params = make_params()
    _, state = TX.update(gradient()[1], TX.init(params), params, value=7.0)
    assert state.value == 7.0


def test_the_guard_skips_by_the_loss():
    """A loss two nats above the trend, with a gradient of ordinary size."""
    params = make_params()
    state, (_, grads) = TX.init(params), gradient()
    for _ in range(40):
        _, state = UPDATE(grads, state, params)
    raised = grads | {"loss_probe": grads["loss_probe"] + 2 * grads["loss_probe"][1]}
    raised["loss_probe"] = raised["loss_probe"].at[1].set(grads["loss_probe"][1])
    updates, state = UPDATE(raised, state, params)
    assert state.skipped
    assert state.metrics["skip/value_total"] == 1
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))


def test_an_old_state_is_adopted_and_the_probe_stays_zero():
    params, old_tx = {"w": make_params()["w"]}, optax.adamw(1e-2)
    grads = jax.grad(plain_loss)(params, X)
    _, old = old_tx.update(grads, old_tx.init(params), params)
    tx = ost.with_loss_probe(ost.spike_guard(old_tx))
    with_probe = params | {"loss_probe": ost.loss_probe()}
    state = ost.adopt_state(tx, with_probe, old)
    expected, _ = old_tx.update(grads, old, params)
    updates, _ = tx.update(
        jax.grad(ost.probed(plain_loss))(with_probe, X), state, with_probe
    )
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=ROUNDING)
    np.testing.assert_array_equal(updates["loss_probe"], 0.0)


def test_the_state_is_that_without_the_probe():
    inner = ost.safe_adamw(1e-2)
    with_probe = ost.with_loss_probe(inner).init(make_params())
    without = inner.init({"w": make_params()["w"]})
    chex.assert_trees_all_equal(jax.tree.leaves(with_probe), jax.tree.leaves(without))


# --- Flax ------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, kind, rngs):
        self.layer = nnx.Linear(3, 1, rngs=rngs)
        self.adapter = nnx.LoRA(3, 2, 1, rngs=rngs)
        self.loss_probe = kind(ost.loss_probe())

    def __call__(self, x):
        return self.layer(x) + self.adapter(x)


def test_optax_places_the_arrays_of_its_state_like_the_parameters():
    params = {"w": jnp.ones((2, 3)), "loss_probe": ost.loss_probe()}
    tx = ost.with_loss_probe(ost.spike_guard(optax.scale_by_adam()))
    placed = optax.tree.map_params(
        tx,
        lambda _, place: place,
        tx.init(params),
        {"w": "split", "loss_probe": "whole"},
        transform_non_params=lambda _: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert placed.inner_state.mu["w"] == placed.inner_state.nu["w"] == "split"


@pytest.mark.parametrize("kind", [nnx.Param, nnx.LoRAParam])
def test_nnx_modules_and_their_adapters(kind):
    model = Model(kind, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_tx(), wrt=kind)

    @nnx.jit
    def step(model, optimizer, x):
        loss_fn = ost.probed(lambda model, x: jnp.mean((model(x) - 1) ** 2))
        wrt = nnx.DiffState(0, kind)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model, x)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, X), step(model, optimizer, X)]
    assert losses[1] < losses[0]
    value = ost.metrics(optimizer)["skip/value"]
    np.testing.assert_allclose(value, losses[1], rtol=ROUNDING)
    np.testing.assert_array_equal(model.loss_probe[...], 0.0)


def test_linen_parameters():
    module = nn.Dense(1)
    params = module.init(jax.random.key(0), X)["params"]
    params |= {"loss_probe": ost.loss_probe()}

    def loss_fn(params, x):
        return jnp.mean((module.apply({"params": params}, x) - 1) ** 2)

    loss, grads = jax.value_and_grad(ost.probed(loss_fn))(params, X)
    tx = make_tx()
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.value, loss, rtol=ROUNDING)


# --- errors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"w": jnp.ones(3)},
        {"w": jnp.ones(3), "loss_probe": jnp.zeros(())},
        {"w": {"loss_probe": jnp.zeros(2)}, "loss_probe": jnp.zeros(2)},
    ],
    ids=["missing", "of another shape", "twice"],
)
def test_a_probe_that_is_not_there_once_raises(params):
    message = r"must hold one 'loss_probe' of shape \(2,\).*= loss_probe\(\)"
    with pytest.raises(ValueError, match=message):
        make_tx().init(params)
    with pytest.raises(ValueError, match=message):
        ost.probed(plain_loss)(params, X)

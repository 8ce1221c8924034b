"""Half precision with a loss scale: overflow is skipped, underflow is seen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from tiers import full, quick_only

import optax_stability as ost
from optax_stability.flax import TrainState, microbatch_gradients, update_dynamic_scale

X = jax.random.normal(jax.random.key(0), (8, 4))
Y = X @ jnp.arange(8.0).reshape(4, 2) / 8


def create(tx):
    model = nn.Dense(2, dtype=jnp.float16)
    params = model.init(jax.random.key(1), X)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def step(state, scaler):
    """One step; gradients reach the chain as they come, without a look at is_finite."""

    def loss_fn(params):
        error = state.apply_fn({"params": params}, X) - Y.astype(jnp.float16)
        return jnp.mean(jnp.square(error)).astype(jnp.float32)

    scaler, _, loss, grads = scaler.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, extra_args={"value": loss}), scaler, loss


@full
def test_an_overflow_of_the_loss_scale_is_skipped_and_counted():
    tx = ost.spike_guard(optax.chain(ost.clip_by_zscore(), ost.safe_adamw(0.05)))
    state, scaler = create(tx), DynamicScale(scale=jnp.float32(2.0**24))
    losses = []
    for _ in range(60):
        state, scaler, loss = step(state, scaler)
        losses.append(float(loss))
    overflows = 24 - int(np.log2(scaler.scale))
    assert overflows > 3
    metrics = ost.metrics(state)
    assert int(metrics["skip/nonfinite_total"]) == overflows
    assert int(metrics["skip/total"]) == overflows
    assert int(metrics["clip/nonfinite_total"]) == 0  # They never came that far.
    assert losses[overflows] == losses[0]  # Nothing moved until the scale fitted.
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(("scale", "lost"), [(1.0, False), (2.0**-22, True)])
@quick_only("2.384185791015625e-07-True")
def test_gradients_that_underflow_before_the_optimizer_are_counted(scale, lost):
    state = create(ost.safe_adamw(0.05))
    scaler = DynamicScale(growth_interval=1000, scale=jnp.float32(scale))
    for _ in range(3):
        state, scaler, _ = step(state, scaler)
    assert (float(ost.metrics(state)["adam/zero_fraction"]) > 0.5) == lost


# --- the rule of the scale ---------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"growth_interval": 2},
        {"growth_factor": 4.0, "backoff_factor": 0.1, "minimum_scale": 100.0},
        {"growth_interval": 3, "minimum_scale": None, "scale": 1e38},
    ],
    ids=["defaults", "bounded below", "bounded above"],
)
def test_the_scale_is_step_by_step_that_of_flax(options):
    ours = flaxs = DynamicScale(**{"growth_interval": 1, **options})
    slopes = np.random.default_rng(0).choice([1.0, -2.0, np.nan, np.inf], 60)
    slopes[20:40] = 1.0  # Long enough to grow to where float32 ends.
    own = jax.jit(lambda scale, a: scale.value_and_grad(lambda x: a * x)(0.0)[:2])
    update = jax.jit(update_dynamic_scale)
    seen = set()
    for slope in slopes:
        flaxs, finite = own(flaxs, slope)
        ours = update(ours, finite)
        assert float(ours.scale) == float(flaxs.scale)
        assert int(ours.fin_steps) == int(flaxs.fin_steps)
        seen.add(float(ours.scale))
    assert len(seen) > 4


# --- microbatches ------------------------------------------------------------------

K = 4


class Net(nnx.Module):
    """Parameters of float32, evaluated in another dtype."""

    def __init__(self, dtype=jnp.float16):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(4, 8, dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(8, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.inner(x)))


def weighted_error(model, batch):
    error = (model(batch["x"]) - batch["y"]).astype(jnp.float32)
    return jnp.mean(batch["weight"] * jnp.square(error))


def make_batch(weight=1.0):
    return {
        "x": np.asarray(X),
        "y": np.asarray(Y).astype(np.float16),
        "weight": np.full((8, 1), weight, np.float32),
    }


in_parts = microbatch_gradients(weighted_error, K)
guarded = ost.spike_guard(optax.chain(ost.clip_by_zscore(), ost.safe_adamw(0.02)))
recorded = ost.record_history(optax.chain(ost.record("grad"), guarded), length=64)


@nnx.jit
def train_step(model, optimizer, scale, batch):
    loss, grads, moments = in_parts(model, batch, loss_scale=scale.scale)
    optimizer.update(model, grads, value=loss)
    scale = update_dynamic_scale(scale, moments.num_microbatches == K)
    return scale, loss, grads, moments.num_microbatches


def make_run(scale):
    model = Net()
    optimizer = nnx.Optimizer(model, recorded, wrt=nnx.Param)
    return model, optimizer, at(DynamicScale(), scale)


def at(scale, value):
    """The loss scale with another value, of the type that a step returns."""
    return scale.replace(scale=jnp.float32(value), fin_steps=jnp.int32(0))


@full
def test_an_overflow_costs_its_microbatch_alone():
    batch = make_batch()
    batch["y"][1] = 1000  # Rows 1 and 5; in the backward pass alone it is too large.
    model, optimizer, scale = make_run(2.0**10)
    scale, loss, grads, kept = train_step(model, optimizer, scale, batch)
    assert int(kept) == 3
    assert float(scale.scale) == 2.0**9
    rest = jax.tree.map(lambda leaf: np.delete(leaf, [1, 5], axis=0), batch)
    expected = nnx.value_and_grad(weighted_error)(Net(jnp.float32), rest)
    # Sums of a dozen roundings of float16, relative to entries of about 1.
    np.testing.assert_allclose(loss, expected[0], rtol=4e-3)
    for found, wanted in zip(*map(jax.tree.leaves, (grads, expected[1])), strict=True):
        np.testing.assert_allclose(found, wanted, atol=4e-3)
    assert int(ost.metrics(optimizer)["skip/total"]) == 0


@full
def test_far_too_large_a_scale_recovers_by_itself():
    model, optimizer, scale = make_run(2.0**24)
    start = jax.tree.map(np.array, nnx.as_pure(nnx.state(model)))
    losses, kept = [], []
    while not kept or not kept[-1]:
        before = float(scale.scale)
        scale, loss, _, number = train_step(model, optimizer, scale, make_batch())
        kept.append(int(number))
        assert float(scale.scale) == (before if number == K else before / 2)
        if not number:
            for a, b in zip(
                *map(jax.tree.leaves, (start, nnx.as_pure(nnx.state(model)))),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)
    for _ in range(60):
        scale, loss, _, number = train_step(model, optimizer, scale, make_batch())
        losses.append(float(loss))
        kept.append(int(number))
    overflows = kept.count(0)
    assert overflows > 3
    assert kept[-50:] == [K] * 50
    metrics = ost.metrics(optimizer)
    assert int(metrics["skip/nonfinite_total"]) == overflows
    assert int(metrics["skip/total"]) == overflows
    assert int(metrics["clip/nonfinite_total"]) == 0
    assert losses[-1] < 0.05 * max(losses)


@full
def test_a_limit_does_not_jump_with_the_scale():
    limits = []
    for scales in ([2.0**8] * 40, [2.0**4, 2.0**12] * 20):
        model, optimizer, scale = make_run(1.0)
        for value in scales:
            train_step(model, optimizer, at(scale, value), make_batch())
        limits.append(ost.history(optimizer)["clip/limit"])
    assert np.isfinite(limits[0]).sum() > 10
    # Both have the roundings of float16, along a few dozen steps.
    np.testing.assert_allclose(*limits, rtol=0.02)


@pytest.mark.parametrize(("value", "lost"), [(1.0, True), (2.0**15, False)])
@quick_only("1.0-True")
def test_underflow_is_counted_before_the_optimizer_and_diagnosed(value, lost):
    model, optimizer, scale = make_run(value)
    for _ in range(20):
        # A part of the gradient is below the smallest number of float16, 2⁻²⁴.
        scale, *_ = train_step(model, optimizer, scale, make_batch(2.0**-22))
    history = ost.history(optimizer)
    zeros = history["grad/zero_fraction"]
    assert zeros.min() > 0.2 if lost else zeros.max() < 0.05
    kinds = [finding.kind for finding in ost.diagnose(history)]
    assert ("underflow" in kinds) == lost

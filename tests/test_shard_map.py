"""The whole stack under ``shard_map``, on leaves that are sharded and that are not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from tiers import full

import optax_stability as ost
from optax_stability._core import _mesh_axes, _norms

K = 4
AXES = ("data", "model")
# Rows over "data" (FSDP), columns over "model" (tensor), the scale everywhere.
SPECS = {
    "hidden": PartitionSpec("data", "model"),
    "out": PartitionSpec("model"),
    "scale": PartitionSpec(),
}
WHOLE, ROWS = PartitionSpec(), PartitionSpec("data")
CLOSE = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=1e-6)


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_params():
    return {"hidden": draw(0, 8, 4), "out": draw(1, 4, 3), "scale": jnp.ones(8)}


def loss_of(hidden):
    return jnp.mean(hidden**2)


def loss_fn(params, x):
    """What one device computes."""
    return loss_of(jnp.tanh((x * params["scale"]) @ params["hidden"]) @ params["out"])


def device_loss(params, x):
    """The same of the rows of one device; the parameters are sharded twice."""
    kernel = lax.all_gather(params["hidden"], "data", axis=0, tiled=True)
    parts = jnp.tanh((x * params["scale"]) @ kernel) @ params["out"]
    return loss_of(lax.psum(parts, "model"))


def shared_loss(params, x):
    return lax.pmean(device_loss(params, x), "data")


def stack(**axes):
    inside = optax.chain(
        ost.estimate_noise_scale(**axes),
        ost.clip_by_zscore(**axes),
        ost.safe_adamw(1e-2),
        ost.record("update", ratio_to_params=True, **axes),
    )
    guarded = ost.spike_guard(inside, **axes)
    return ost.record_history(
        optax.chain(ost.record("grad", correlation=True, **axes), guarded),
        length=8,
        **axes,
    )


def gradients_of(loss, **options):
    """Microbatches weigh what one device's share of them weighs."""
    return ost.microbatch_gradients(loss, K, weight_fn=lambda _: 2.0, **options)


def take_step(tx, loss, params, state, x):
    loss, grads, moments = gradients_of(loss, vmap_size=1)(params, x)
    updates, state = tx.update(grads, state, params, value=loss, moments=moments)
    return optax.apply_updates(params, updates), state, loss


def spec_of(path, leaf):
    del leaf
    names = [getattr(key, "key", None) for key in path]
    return next((SPECS[name] for name in names if name in SPECS), WHOLE)


def batch(seed):
    return draw(seed, 32, 8)


def as_on_devices(x):
    """The rows in the order in which one device cuts the microbatches of all."""
    per_device = np.asarray(x).reshape(4, 2, K, -1)  # device, row, microbatch
    return jnp.asarray(per_device.reshape(32, -1))


@full
def test_the_stack_takes_the_steps_of_one_device():
    """Clean, then with a NaN in one row of one device, then with nothing but Inf."""
    params = others = make_params()
    state = expected = stack().init(params)
    specs = jax.tree_util.tree_map_with_path(spec_of, state)
    mapped = jax.shard_map(
        functools.partial(take_step, stack(axis_name=AXES), shared_loss),
        mesh=mesh(),
        in_specs=(SPECS, specs, ROWS),
        out_specs=(SPECS, specs, WHOLE),
    )
    together = jax.jit(mapped)
    alone = jax.jit(functools.partial(take_step, stack(), loss_fn))
    batches = [batch(seed) for seed in range(4)]
    batches += [batch(4).at[5].set(jnp.nan), jnp.inf * batch(5)]
    for x in batches:
        params, state, loss = together(params, state, x)
        others, expected, reference = alone(others, expected, as_on_devices(x))
        CLOSE((params, loss), (others, reference))
    found, known = ost.metrics(state), ost.metrics(expected)
    exact = [key for key in known if key.startswith("skip/") and "total" in key]
    chex.assert_trees_all_equal(*({k: m[k] for k in exact} for m in (found, known)))
    assert int(found["skip/total"]) == 1
    smooth = {key: x for key, x in known.items() if "correlation" not in key}
    chex.assert_trees_all_close(
        {key: found[key] for key in smooth}, smooth, rtol=1e-3, atol=1e-5
    )


@full
def test_a_nan_on_one_device_costs_its_microbatch_everywhere():
    """Here all microbatches at once."""

    def kept(loss, params, x):
        _, grads, moments = gradients_of(loss)(params, x)
        return grads, moments.num_microbatches, moments.deviation

    together = jax.shard_map(
        functools.partial(kept, shared_loss),
        mesh=mesh(),
        in_specs=(SPECS, ROWS),
        out_specs=(SPECS, WHOLE, WHOLE),
    )
    params, bad = make_params(), batch(0).at[17].set(jnp.nan)
    found = jax.jit(together)(params, bad)
    alone = jax.jit(functools.partial(kept, loss_fn))
    CLOSE(found, alone(params, as_on_devices(bad)))
    assert int(found[1]) == K - 1


@pytest.mark.parametrize("vmap_size", [1, K])
def test_gradients_that_were_added_up_are_refused(vmap_size):
    """Else all devices have the same gradient, and the noise reads 0."""
    gradients = ost.microbatch_gradients(device_loss, K, vmap_size=vmap_size)
    step = jax.shard_map(
        lambda params, x: gradients(params, x)[1],
        mesh=mesh(),
        in_specs=(SPECS, ROWS),
        out_specs=SPECS,
    )
    with pytest.raises(ValueError, match=r"'data', while params\['out'\].*pmean"):
        jax.eval_shape(step, make_params(), batch(0))


@full
def test_parameters_that_were_made_local_keep_their_noise():
    """One gradient per device, as for local training: nothing is added up."""

    def local(params, x):
        params = lax.pcast(params, "data", to="varying")
        _, _, moments = ost.microbatch_gradients(loss_fn, K)(params, x)
        return moments.deviation[None], moments.num_microbatches[None]

    step = jax.shard_map(local, mesh=mesh(), in_specs=(WHOLE, ROWS), out_specs=ROWS)
    params, x = make_params(), batch(0)
    deviations, counts = jax.jit(step)(params, x)
    one = jax.jit(ost.microbatch_gradients(loss_fn, K))
    for i in range(4):
        _, _, moments = one(params, x[8 * i : 8 * i + 8])
        np.testing.assert_allclose(deviations[i], moments.deviation, rtol=1e-5)
    assert counts.tolist() == [K] * 4


@full
def test_accumulation_takes_microbatches_of_shards():
    tx = ost.accumulate_moments(optax.sgd(1.0), 2, l1=True)
    sharded = ost.accumulate_moments(optax.sgd(1.0), 2, l1=True, axis_name=AXES)

    def step(tx, loss, params, state, x):
        gradients = gradients_of(loss, mean_square=True, l1=True)
        loss, grads, moments = gradients(params, x)
        return tx.update(grads, state, params, value=loss, moments=moments)

    params = make_params()
    state = expected = tx.init(params)
    specs = jax.tree_util.tree_map_with_path(spec_of, state)
    specs = specs._replace(moments=specs.moments._replace(mean_square=SPECS))
    together = jax.shard_map(
        functools.partial(step, sharded, shared_loss),
        mesh=mesh(),
        in_specs=(SPECS, specs, ROWS),
        out_specs=(SPECS, specs),
    )
    together = jax.jit(together)
    alone = jax.jit(functools.partial(step, tx, loss_fn))
    for seed in range(2):
        found, state = together(params, state, batch(seed))
        updates, expected = alone(params, expected, as_on_devices(batch(seed)))
        CLOSE(found, updates)
    CLOSE(state.moments.deviation, expected.moments.deviation)
    CLOSE(state.moments.l1, expected.moments.l1)
    CLOSE(state.value, expected.value)


def norm_by(spec, **options):
    tree = {"w": jnp.arange(1.0, 9.0)}
    norm = jax.shard_map(
        lambda tree: _norms.global_norm(tree, "data"),
        mesh=mesh(),
        in_specs=({"w": spec},),
        out_specs=WHOLE,
        **options,
    )
    return float(jax.jit(norm)(tree) / jnp.linalg.norm(tree["w"]))


@full
def test_a_leaf_counts_once_where_types_tell():
    assert norm_by(ROWS) == pytest.approx(1)
    assert norm_by(WHOLE) == pytest.approx(1)
    # Documented: without types all leaves count as sharded.
    assert norm_by(ROWS, check_vma=False) == pytest.approx(1)
    assert norm_by(WHOLE, check_vma=False) == pytest.approx(2)


def test_an_axis_of_vmap_counts_as_sharding():
    norm = jax.vmap(lambda x: _norms.global_norm(x, "part"), axis_name="part")
    np.testing.assert_allclose(norm(jnp.ones((4, 4))), 4.0)


def test_counts_of_any_dtype_are_added_up():
    """By the device that is first along the axes that only copy a leaf."""

    def count(x, y):
        values = jnp.array([3, 5], jnp.int32)
        return _mesh_axes.sum_shards(values, [x, y], AXES)

    step = jax.shard_map(count, mesh=mesh(), in_specs=(ROWS, WHOLE), out_specs=WHOLE)
    assert jax.jit(step)(jnp.ones(4), jnp.ones(4)).tolist() == [12, 5]


def test_an_unknown_axis_is_named():
    tx = ost.clip_by_zscore(axis_name="dta")
    with pytest.raises(NameError, match="dta"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))

"""Optimizers of ``optax.contrib`` inside our wrappers; and optax's own checks on ours.

The first half is a contract: states of fixed shapes, dtypes and weak types; a NaN batch
survived; extra arguments passed on. The second is what optax asks of each optimizer in
contrib: it finds minima under ``jit``, takes schedules by ``inject_hyperparams``, keeps
dtypes and shardings.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import contrib
from tiers import full, quick_only

import optax_stability as ost

OPTIMIZERS = {
    "acprop": lambda: contrib.acprop(1e-2),
    "ademamix": lambda: contrib.ademamix(1e-2),
    "adopt": lambda: contrib.adopt(1e-2),
    "cocob": contrib.cocob,
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "galore": lambda: contrib.galore(1e-2, rank=2),
    "madgrad": lambda: contrib.madgrad(1e-2),
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "muon": lambda: contrib.muon(1e-2),
    "normalize": lambda: optax.chain(contrib.normalize(), optax.sgd(0.1)),
    "prodigy": contrib.prodigy,
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(1e-2), contrib.reduce_on_plateau()
    ),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(1e-2),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(1e-2),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(1e-2, alpha=0.1),
    "sophia": lambda: contrib.sophia(1e-2),
}
WRAPPERS = {
    "guard": ost.spike_guard,
    "branch": ost.branch_on_spike,
    "accumulation": lambda tx: ost.accumulate_moments(tx, 2),
    "record and history": lambda tx: ost.record_history(
        optax.chain(ost.record("grad"), tx), length=3
    ),
    "all": lambda tx: ost.accumulate_moments(
        ost.record_history(
            ost.spike_guard(optax.chain(ost.record("grad"), tx)), length=3
        ),
        2,
    ),
}
PARAMS = {"b": jnp.ones(4), "w": jnp.ones((8, 4))}


def objective(params):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def signature(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


# In the quick tier every optimizer once, and every wrapper several times.
SOME_PAIRS = map("-".join, zip(OPTIMIZERS, itertools.cycle(WRAPPERS)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@quick_only(*SOME_PAIRS)
def test_the_state_is_fixed_and_extra_arguments_arrive(optimizer, wrapper):
    """Sophia needs ``obj_fn``, momo and reduce_on_plateau need ``value``."""
    tx = WRAPPERS[wrapper](OPTIMIZERS[optimizer]())

    def step(grads, state, params):
        return tx.update(grads, state, params, value=1.0, obj_fn=objective)

    state = jax.eval_shape(tx.init, PARAMS)
    updates, after = jax.eval_shape(step, PARAMS, state, PARAMS)
    assert signature(after) == signature(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)


def survives(optimizer, wrapper, bad):
    """Updates of six calls, of which one has a NaN; and the last state."""
    tx = WRAPPERS[wrapper](OPTIMIZERS[optimizer]())

    def step(carry, factor):
        params, state = carry
        loss, grads = jax.value_and_grad(objective)(params)
        grads = optax.tree.scale(factor, grads)
        updates, state = tx.update(
            grads, state, params, value=factor * loss, obj_fn=objective
        )
        return (optax.apply_updates(params, updates), state), updates

    factors = jnp.ones(6).at[bad].set(jnp.nan)
    run = jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), factors))
    (params, state), updates = run()
    return params, state, updates


def check_survival(optimizer, wrapper):
    params, state, updates = survives(optimizer, wrapper, bad=2)
    for tree in (params, updates):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    assert objective(params) < objective(PARAMS)
    metrics = ost.metrics(state)
    lost = metrics.get("accumulate/rejected_total", metrics["skip/nonfinite_total"])
    assert lost == 1


@pytest.mark.parametrize("optimizer", ["muon", "prodigy"])
def test_a_nan_batch_is_survived(optimizer):
    check_survival(optimizer, "all")


@full
@pytest.mark.parametrize("wrapper", ["guard", "branch", "all"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_nan_batch_is_survived_by_each(optimizer, wrapper):
    check_survival(optimizer, wrapper)


def test_the_nan_alone_would_end_it():
    """The check above can fail."""
    tx = contrib.muon(1e-2)
    grads = optax.tree.full_like(PARAMS, jnp.nan)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert not np.isfinite(updates["w"]).any()


def last_update(tx, **extra_args):
    """After a normal gradient, a NaN and another normal one."""
    state = tx.init(PARAMS)
    bad = optax.tree.full_like(PARAMS, jnp.nan)
    step = jax.jit(tx.update)
    for grads in (PARAMS, bad, PARAMS):
        updates, state = step(grads, state, PARAMS, **extra_args)
    return updates["w"]


def test_mechanize_goes_inside_the_guard():
    around = contrib.mechanize(ost.spike_guard(optax.sgd(0.1)))
    inside = ost.spike_guard(contrib.mechanize(optax.sgd(0.1)))
    assert not np.isfinite(last_update(around, value=1.0)).all()
    assert np.isfinite(last_update(inside, value=1.0)).all()


def test_sam_takes_no_loss():
    sam = contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2)
    with pytest.raises(TypeError, match="value"):
        last_update(ost.spike_guard(sam), value=1.0)
    assert np.isfinite(last_update(ost.spike_guard(sam, loss=False))).all()


# --- what optax asks of an optimizer ----------------------------------------------

OURS = {
    "safe_adamw": lambda learning_rate=0.1: ost.safe_adamw(
        learning_rate, weight_decay=0.0
    ),
    "guarded chain": lambda learning_rate=0.1: ost.spike_guard(
        optax.chain(
            ost.clip_by_zscore(), ost.safe_adamw(learning_rate, weight_decay=0.0)
        )
    ),
    "branching chain": lambda learning_rate=0.1: ost.branch_on_spike(
        ost.safe_adamw(learning_rate, weight_decay=0.0)
    ),
}
every_one_of_ours = pytest.mark.parametrize("name", OURS)


def parabola(params):
    return jnp.sum(jnp.square(params - jnp.array([1.0, -1.0], params.dtype)))


def rosenbrock(params):
    a, b = params
    return (1.0 - a) ** 2 + 100.0 * (b - a**2) ** 2


def minimise(tx, loss_fn, params, steps):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])
    return run(params)


@every_one_of_ours
def test_it_finds_the_minimum_of_a_parabola(name):
    schedule = optax.schedules.cosine_decay_schedule(0.1, 300)
    found = minimise(OURS[name](schedule), parabola, jnp.zeros(2), 300)
    np.testing.assert_allclose(found, [1.0, -1.0], atol=0.03)


def test_it_finds_the_minimum_of_a_valley():
    found = minimise(OURS["safe_adamw"](0.03), rosenbrock, jnp.zeros(2), 3000)
    np.testing.assert_allclose(found, [1.0, 1.0], atol=0.05)


@every_one_of_ours
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(name, dtype):
    tx, params = OURS[name](), jnp.ones(2, dtype)
    updates, _ = jax.eval_shape(
        lambda p: tx.update(p, tx.init(p), p, value=1.0), params
    )
    assert updates.dtype == dtype


@every_one_of_ours
def test_schedules_by_inject_hyperparams_are_those_given_directly(name):
    schedule = optax.schedules.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(OURS[name])(learning_rate=schedule)
    (direct, by_injection) = (
        minimise(tx, parabola, jnp.zeros(2), 8)
        for tx in (OURS[name](schedule), injected)
    )
    np.testing.assert_allclose(direct, by_injection, rtol=1e-6)


@functools.cache
def placed():
    """Parameters that are split over four devices."""
    mesh = Mesh(jax.devices()[:4], "data")
    return jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("data")))


@every_one_of_ours
def test_shardings_are_kept(name):
    tx, params = OURS[name](), placed()
    state = tx.init(params)
    step = jax.jit(tx.update)
    updates, after = step(params, state, params, value=1.0)
    assert updates.sharding.is_equivalent_to(params.sharding, 2)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if old.shape == params.shape:
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)

"""A run goes on with more protection than it began with, and forgets nothing."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiers import full, quick_only

import optax_stability as ost

PARAMS = {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}
SCHEDULE = optax.linear_schedule(1e-3, 1e-4, 100)


def grads(seed):
    key = jax.random.key(seed)
    return jax.tree.map(lambda x: 0.01 * jax.random.normal(key, x.shape), PARAMS)


def trained(tx, steps=3, params=PARAMS):
    state = tx.init(params)
    for seed in range(steps):
        _, state = tx.update(grads(seed), state, params)
    return state


def old_adamw():
    return optax.adamw(SCHEDULE)


def old_chain():
    return optax.chain(optax.clip_by_global_norm(1.0), old_adamw())


INACTIVE_CLIP = ost.clip_by_threshold(ost.thresholds.constant(1e3))
# What the new transformation adds must do nothing to the next step.
NEW = {
    "prepended": optax.chain(ost.record("grad"), old_chain()),
    "prepended in the same chain": optax.chain(
        ost.record("grad"), optax.clip_by_global_norm(1.0), old_adamw()
    ),
    "appended": optax.chain(
        optax.clip_by_global_norm(1.0), old_adamw(), ost.record("updates")
    ),
    "put between": optax.chain(
        optax.clip_by_global_norm(1.0), INACTIVE_CLIP, old_adamw()
    ),
    "a stateless part left out": optax.chain(INACTIVE_CLIP, old_adamw()),
    "wrapped": ost.skip_spikes(old_chain()),
    "wrapped, and another clip": ost.skip_spikes(
        optax.chain(INACTIVE_CLIP, old_adamw())
    ),
    "wrapped twice": optax.chain(
        ost.record("grad"), ost.skip_spikes(ost.skip_spikes(old_chain()))
    ),
    "named": optax.named_chain(("clip", INACTIVE_CLIP), ("adamw", old_adamw())),
    "written out": optax.chain(
        INACTIVE_CLIP,
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(SCHEDULE),
    ),
}


@pytest.mark.parametrize("new", NEW.values(), ids=NEW.keys())
@quick_only("wrapped")
def test_the_next_update_is_the_one_the_old_run_would_have_made(new):
    old = old_chain()
    old_state = trained(old)
    state = ost.adopt_state(new, PARAMS, old_state)
    fresh = new.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
    expected, _ = jax.jit(old.update)(grads(9), old_state, PARAMS)
    found, _ = jax.jit(new.update)(grads(9), state, PARAMS)
    # Another program may round the last bit differently.
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@full
def test_a_bare_state_and_our_own_are_adopted_too():
    state = trained(optax.scale_by_adam())
    adopted = ost.adopt_state(
        optax.chain(ost.clip_by_zscore(), optax.scale_by_adam()), PARAMS, state
    )
    chex.assert_trees_all_equal(adopted[1], state)
    ours = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-3))
    state = trained(ours)
    adopted = ost.adopt_state(ost.skip_spikes(ours), PARAMS, state)
    chex.assert_trees_all_equal(adopted.inner_state, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition(
            {"x": tx, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}
        ),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["MultiSteps", "masked", "partition", "apply_if_finite"],
)
@quick_only("masked", "MultiSteps", "partition")
def test_what_grows_inside_a_wrapper_is_adopted(wrap):
    old_state = trained(wrap(old_adamw()))
    new = wrap(ost.skip_spikes(optax.chain(INACTIVE_CLIP, old_adamw())))
    state = ost.adopt_state(new, PARAMS, old_state)
    for name in ("mu", "nu", "count"):
        old_values = [v for _, v in optax.tree.get_all_with_path(old_state, name)]
        new_values = [v for _, v in optax.tree.get_all_with_path(state, name)]
        chex.assert_trees_all_equal(new_values, old_values)


def test_injected_hyperparameters_are_adopted():
    old = optax.inject_hyperparams(optax.adamw)(1e-3)
    old_state = trained(old)
    old_state.hyperparams["learning_rate"] = jnp.float32(7e-4)
    state = ost.adopt_state(ost.skip_spikes(old), PARAMS, old_state)
    chex.assert_trees_all_equal(state.inner_state, old_state)


def test_equal_states_go_in_their_order():
    def chain(*first):
        schedules = (optax.linear_schedule(1.0, 0.5, 10), SCHEDULE)
        return optax.chain(*first, *map(optax.scale_by_schedule, schedules))

    old_state = trained(chain())
    state = ost.adopt_state(chain(ost.record("grad")), PARAMS, old_state)
    chex.assert_trees_all_equal(state[1:], old_state)
    state = ost.adopt_state(
        optax.chain(ost.record("grad"), ost.skip_spikes(chain())), PARAMS, old_state
    )
    chex.assert_trees_all_equal(state[1].inner_state, old_state)


REFUSED = {
    "another class": (
        old_adamw(),
        ost.safe_adamw(SCHEDULE),
        "ScaleByAdamState: the new state has no place for it.*from_optax_adam_state",
    ),
    "another dtype": (
        old_adamw(),
        optax.adamw(SCHEDULE, mu_dtype=jnp.bfloat16),
        r"ScaleByAdamState\.mu: b: float32\[4\] .* bfloat16\[4\]",
    ),
    "two places": (
        old_adamw(),
        optax.chain(old_adamw(), optax.scale_by_schedule(SCHEDULE)),
        "ScaleByScheduleState: it fits in several places",
    ),
    "two wrappers' insides": (
        old_adamw(),
        optax.chain(old_adamw(), old_adamw()),
        "ScaleByAdamState: it fits in several places",
    ),
    "two wrappers": (
        old_adamw(),
        optax.chain(ost.skip_spikes(old_adamw()), ost.skip_spikes(old_adamw())),
        "the chain: it fits in several places",
    ),
    "two inside one wrapper": (
        optax.scale_by_schedule(SCHEDULE),
        optax.partition(
            dict.fromkeys("xy", optax.scale_by_schedule(SCHEDULE)), {"w": "x", "b": "y"}
        ),
        "ScaleByScheduleState: it fits in several places",
    ),
    "two into one": (
        optax.chain(
            optax.scale_by_schedule(SCHEDULE), optax.scale_by_schedule(SCHEDULE)
        ),
        ost.skip_spikes(optax.scale_by_schedule(SCHEDULE)),
        "the chain: the new state has no place for it",
    ),
    "nothing left": (
        ost.skip_spikes(old_adamw()),
        old_adamw(),
        "SkipSpikesState: the new state has no place for it",
    ),
}


@pytest.mark.parametrize(("old", "new", "reason"), REFUSED.values(), ids=REFUSED.keys())
@quick_only(
    "another class",
    "another dtype",
    "two places",
    "two wrappers' insides",
    "two wrappers",
    "two inside one wrapper",
    "two into one",
)
def test_what_has_no_place_is_refused_by_name(old, new, reason):
    with pytest.raises(ValueError, match=f"cannot adopt {reason}") as raised:
        ost.adopt_state(new, PARAMS, trained(old))
    assert "new_tx.init(params)" in str(raised.value)


@pytest.mark.parametrize(
    "other",
    [{"w": jnp.ones((4, 5)), "b": jnp.zeros(4)}, {"w": jnp.ones((4, 4))}],
    ids=["another shape", "another tree"],
)
def test_other_parameters_are_refused(other):
    with pytest.raises(ValueError, match=r"cannot adopt ScaleByAdamState\.mu: "):
        ost.adopt_state(ost.skip_spikes(old_adamw()), other, trained(old_adamw()))


def test_a_new_parameter_is_refused():
    more = PARAMS | {"new": jnp.zeros(3)}
    with pytest.raises(ValueError, match="'new' is in only one of the two states"):
        ost.adopt_state(ost.skip_spikes(old_adamw()), more, trained(old_adamw()))


def test_a_checkpoint_without_the_wrapper_is_taken_up(tmp_path):
    old = old_chain()
    old_state = trained(old)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", old_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", old.init(PARAMS))
    new = ost.spike_guard(optax.chain(ost.clip_by_zscore(), old_adamw()))
    state = ost.adopt_state(new, PARAMS, restored)
    chex.assert_trees_all_equal(state.inner_state[1], old_state[1])


@full
def test_an_nnx_optimizer_takes_up_an_older_one():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    old = nnx.Optimizer(model, old_adamw(), wrt=nnx.Param)
    gradient = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) ** 2))(model)
    old.update(model, gradient)

    new_tx = ost.skip_spikes(optax.chain(INACTIVE_CLIP, old_adamw()))
    new = nnx.Optimizer(model, new_tx, wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = ost.adopt_state(new_tx, params, nnx.as_pure(old.opt_state))
    nnx.update(new.opt_state, nnx.state(state))
    mu = nnx.as_pure(new.opt_state).inner_state[1][0].mu
    chex.assert_trees_all_equal(mu, nnx.as_pure(old.opt_state)[0].mu)
    assert any(
        re.search("kernel", str(path)) for path, _ in jax.tree.leaves_with_path(mu)
    )
    new.update(model, gradient)


@pytest.mark.parametrize("state", [None, {"0": {"mu": 1}}, "state"])
def test_what_is_no_state_of_arrays_raises_and_names_the_remedy(state):
    with pytest.raises(TypeError, match=r"old_tx\.init\(params\) as the target"):
        ost.adopt_state(old_adamw(), PARAMS, state)

"""What the rules believe about transformations is measured on the installed optax."""

import contextlib
import inspect
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from tiers import quick_only

import optax_stability as ost
from optax_stability._checking import _roles
from optax_stability._checking._description import describe

WEIGHTS = jnp.full((3, 4), 0.7)
# A factor on every gradient changes the update by less than this part: what ε does.
SCALE_FREE = 0.02
# Scale-free, and not in the table of optimizers: clips at a tiny limit, what has no
# state of its own and follows the parameters, and steps that are not linear in the
# gradient.
NOT_OPTIMIZERS = {
    "scale_by_cocob",
    "scale_by_distance_over_gradients",
    "scale_by_trust_ratio",
}
# They need more than a gradient and a loss, or learn in later steps only.
NOT_MEASURED = {
    "scale_by_backtracking_linesearch",
    "scale_by_lbfgs",
    "scale_by_zoom_linesearch",
    "scale_by_noise_scale",
    "scale_by_schedule",
}


def make(factory):
    """The transformation of a factory, with a learning rate if it needs one."""
    required = [
        each
        for each in inspect.signature(factory).parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    return optax.with_extra_args_support(factory(*[0.1] * len(required)))


def gradients(steps):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(steps, 3, 4)), jnp.float32)


def last_update(tx, grads):
    """The update of the last step."""
    state, update = tx.init(WEIGHTS), None
    for each in grads:
        update, state = tx.update(each, state, WEIGHTS, value=jnp.float32(1))
    return np.asarray(update)


def is_scale_free(tx):
    grads = gradients(6)
    first, second = last_update(tx, grads), last_update(tx, 100 * grads)
    return bool(np.abs(second - first).max() < SCALE_FREE * np.abs(first).max())


def moves_on_zero(tx):
    return bool(last_update(tx, [*gradients(4), jnp.zeros_like(WEIGHTS)]).any())


FACTORIES = {
    name: value
    for module in (optax, contrib, ost)
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and name not in NOT_MEASURED
    and (
        name.startswith("scale_by_") or name in _roles.SCALE_FREE | _roles.WITH_MOMENTUM
    )
}
every_factory = pytest.mark.parametrize("name", sorted(FACTORIES))


@pytest.fixture(autouse=True)
def _quiet():
    """Some factories of optax warn of arguments to come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# In the quick tier those that the library recommends.
@every_factory
@quick_only("scale_by_adam", "scale_by_muon", "scale_by_safe_adam")
def test_the_update_is_as_free_of_scale_as_the_table_says(name):
    listed = name in _roles.SCALE_FREE | NOT_OPTIMIZERS
    assert is_scale_free(make(FACTORIES[name])) == listed


@every_factory
@quick_only("scale_by_adam", "scale_by_muon", "scale_by_safe_adam")
def test_momentum_moves_the_parameters_where_the_table_says(name):
    listed = name in _roles.WITH_MOMENTUM
    assert moves_on_zero(make(FACTORIES[name])) == listed


@every_factory
def test_a_part_has_the_name_of_its_factory(name):
    part = describe(make(FACTORIES[name]))
    # The learning rate is one of two things.
    assert part.known
    assert part.name == name or name == "scale_by_learning_rate"


ADAM, GUARD = optax.scale_by_adam(), ost.spike_guard(optax.identity())


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.scale_by_learning_rate(0.1), -0.1),
        (optax.scale_by_learning_rate(0.1, flip_sign=False), 0.1),
        (optax.scale_by_learning_rate(optax.constant_schedule(0.5)), -0.5),
        (optax.scale_by_schedule(optax.linear_schedule(0.0, -0.2, 100)), -0.2),
        (optax.scale_by_schedule(lambda step: {}[step]), 0.0),
        (optax.scale(jnp.float32(-0.1)), -0.1),
        (optax.scale("unknown"), 0.0),
        (optax.sgd(0.1), 0.0),
    ],
)
def test_the_learning_rate_is_read_where_it_can_be(tx, expected):
    assert _roles.step_size(describe(tx)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tx", "decays"),
    [
        (optax.add_decayed_weights(0.1), True),
        (optax.add_decayed_weights(0.0), False),
        (optax.add_decayed_weights(-0.1), False),
        (optax.add_decayed_weights(jnp.float32(0.1)), True),
        (optax.add_decayed_weights(lambda step: 0.1), True),
        (optax.add_decayed_weights(lambda step: -0.1), False),
        (ADAM, False),
    ],
)
def test_a_decay_of_zero_or_less_is_none(tx, decays):
    assert _roles.decays_weights(describe(tx)) == decays


@pytest.mark.parametrize(
    ("tx", "needs"),
    [
        (GUARD, True),
        (ost.skip_spikes(optax.identity()), False),
        (ost.branch_on_spike(optax.identity()), True),
        (ost.estimate_noise_scale(), True),
        (ost.scale_by_safe_adam(), False),
        (ost.scale_by_safe_adam(second_moment="microbatch"), True),
        (ADAM, False),
    ],
)
def test_what_needs_extra_arguments_is_known(tx, needs):
    assert _roles.needs_extra_args(describe(tx)) == needs
    tx = optax.with_extra_args_support(tx)
    try:
        tx.update(WEIGHTS, tx.init(WEIGHTS), WEIGHTS)
    except ValueError:
        assert needs
    else:
        assert not needs


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: True
    ),
    "flatten": optax.flatten,
    "galore": lambda tx: contrib.scale_by_galore(base_optimizer=tx),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(0.1),
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "masked": lambda tx: optax.masked(tx, True),
    "mechanize": contrib.mechanize,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "partition": lambda tx: optax.partition({"a": tx}, "a"),
    "sam": lambda tx: contrib.sam(tx, optax.sgd(0.1)),
    "schedule_free": lambda tx: contrib.schedule_free(tx, 0.1),
    "split_real_and_imaginary": contrib.split_real_and_imaginary,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_which_wrappers_hand_extra_arguments_on(name):
    """By a part inside that notes whether it was given the loss."""
    given = []

    def update(updates, state, params=None, **extra_args):
        given.append("value" in extra_args)
        return updates, state

    notes = optax.GradientTransformationExtraArgs(lambda params: (), update)
    # A chain leaves out what a part is declared not to take.
    tx = optax.chain(WRAPPERS[name](notes))
    params = WEIGHTS
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(WEIGHTS)
    with contextlib.suppress(TypeError):  # sam is given what it does not take.
        tx.update(WEIGHTS, tx.init(params), params, value=jnp.float32(1))
    (part,) = describe(tx).parts
    assert any(given) != _roles.hands_nothing_on(part)

"""A transformation as a tree of named parts: every wrapper is seen through."""

import ast
import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training import train_state
from optax import contrib

import optax_stability as ost
from optax_stability import _checking
from optax_stability._checking import _roles
from optax_stability._checking._description import describe
from optax_stability._checking._placement import Place, places_in

WEIGHTS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}


def names_in(tx, params=None):
    return [place.part.name for place in places_in(Place(describe(tx, params)))]


def inner():
    return optax.scale_by_adam()


def by_name(params):
    return {name: name for name in params}


# Every way in optax to put one transformation into another.
WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: True
    ),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(0.1),
    "inject_hyperparams of a schedule": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(optax.constant_schedule(0.1)),
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "mechanize": contrib.mechanize,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 4),
    "MultiSteps as a pair": lambda tx: optax.MultiSteps(
        tx, 4
    ).gradient_transformation(),
    "multi_transform": lambda tx: optax.multi_transform({"a": tx}, "a"),
    "named_chain": lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
    "partition": lambda tx: optax.partition({"w": tx, "b": optax.sgd(0.1)}, by_name),
    "sam": lambda tx: contrib.sam(tx, optax.sgd(0.1)),
    "schedule_free": lambda tx: contrib.schedule_free(tx, 0.1),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask={"w": False, "b": True}
    ),
    "split_real_and_imaginary": contrib.split_real_and_imaginary,
    "with_extra_args_support": optax.with_extra_args_support,
    "accumulate_moments": lambda tx: ost.accumulate_moments(tx, 4),
    "branch_on_spike": ost.branch_on_spike,
    "record_history": ost.record_history,
    "restart_moments": lambda tx: ost.restart_moments(tx, every=10),
    "skip_spikes": ost.skip_spikes,
    "spike_guard": ost.spike_guard,
    "when_noisy": lambda tx: ost.when_noisy(tx, above=1.0),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_is_seen_through(name):
    assert names_in(WRAPPERS[name](inner())).count("scale_by_adam") == 1


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_in_wrappers_are_seen_through(name):
    wrapped = WRAPPERS[name](optax.chain(optax.masked(inner(), True)))
    assert "scale_by_adam" in names_in(optax.flatten(optax.chain(wrapped)))


def takes_a_transformation(function):
    """Whether the first argument of a function is a transformation."""
    parameters = list(inspect.signature(function).parameters.values())
    return bool(parameters) and "GradientTransformation" in str(
        parameters[0].annotation
    )


# One is deprecated, of one the transformations only look, one returns none.
NO_WRAPPERS = {"inject_stateful_hyperparams", "monitor", "tree_map_params"}


def test_there_is_no_wrapper_of_optax_that_the_table_lacks():
    found = {
        name
        for module in (optax, contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and takes_a_transformation(value)
    }
    assert found - NO_WRAPPERS <= set(WRAPPERS)


def test_what_only_looks_is_left_alone():
    looks = optax.monitor({"size": optax.ema(0.9)})
    assert names_in(looks) == ["monitor"]
    assert ost.check(optax.chain(ost.spike_guard(optax.sgd(0.1)), looks)) == []


def mine(tx):
    """A wrapper that nobody knows."""

    def update(updates, state, params=None):
        return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


class Mine:
    """The same as a class."""

    def __init__(self, tx):
        self.parts = [tx]

    def init(self, params):
        return self.parts[0].init(params)

    def update(self, updates, state, params=None):
        return self.parts[0].update(updates, state, params)


def jitted(tx):
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


def partial(tx):
    return optax.GradientTransformationExtraArgs(
        tx.init, functools.partial(tx.update, value=1.0)
    )


@pytest.mark.parametrize("wrap", [mine, Mine, jitted, partial])
def test_what_is_not_known_is_read_as_far_as_it_can_be(wrap):
    assert "scale_by_adam" in names_in(wrap(optax.chain(inner())))


def test_a_part_says_whether_it_is_known():
    parts = {
        place.part.name: place.part.known for place in places_in(Place(describe(WHOLE)))
    }
    assert parts == {"chain": True, "mine": False, "scale_by_adam": True}


WHOLE = optax.chain(mine(inner()))


class Opaque:
    """Nothing in it can be read."""

    __slots__ = ()

    def init(self, params):
        return ()

    def update(self, updates, state, params=None):
        return updates, state


def late():
    """An update whose variable is not assigned yet."""

    def update(updates, state, params=None):
        return tx.update(updates, state, params)

    described = describe(optax.GradientTransformation(lambda params: (), update))
    tx = optax.identity()
    return described


def fails(rate):
    raise ValueError(f"no {rate}")


@pytest.mark.parametrize(
    "tx",
    [
        Opaque(),
        optax.GradientTransformation(len, max),
        optax.inject_hyperparams(fails)(0.1),
        optax.stateless(lambda updates, params: updates),
    ],
)
def test_what_cannot_be_read_is_no_fault(tx):
    assert ost.check(tx) == []
    assert ost.check(optax.chain(ost.clip_by_zscore(), optax.flatten(tx))) == []


def test_a_variable_that_is_not_assigned_yet_is_no_error():
    assert late().parts == ()


def test_a_transformation_that_holds_itself_is_read_once():
    def update(updates, state, params=None):
        return (tx if params is None else inside).update(updates, state, params)

    inside = inner()
    tx = optax.GradientTransformation(lambda params: (), update)
    assert names_in(tx).count("scale_by_adam") == 1
    assert ost.check(ost.spike_guard(tx)) == []


GROUPS = optax.partition({"w": optax.scale_by_lion(), "b": inner()}, by_name)


def test_groups_without_parameters_are_left_out():
    assert names_in(GROUPS) == ["partition", "scale_by_lion", "scale_by_adam"]
    weights = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert names_in(GROUPS, weights) == ["partition", "scale_by_lion"]


def test_labels_that_fail_leave_all_groups():
    labels = {"w": optax.scale_by_lion(), "b": inner()}
    tx = optax.partition(labels, lambda params: params["missing"])
    assert names_in(tx, WEIGHTS) == names_in(tx)


def test_objects_of_flax_are_read():
    wrong = optax.chain(ost.safe_adamw(0.1), ost.clip_by_zscore())
    state = train_state.TrainState.create(apply_fn=None, params=WEIGHTS, tx=wrong)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, wrong, wrt=nnx.Param)
    assert ost.check(state) == ost.check(optimizer) == ost.check(wrong) != []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (optax.adamw(0.1).init(WEIGHTS), r"got a tuple; pass .*, not its state\."),
        (optax.adamw, r"got a function; pass the result of its call"),
        (None, "got a NoneType"),
        ({"tx": optax.adamw(0.1)}, "got a dict"),
        (ost.thresholds.constant(1.0), r"got a Threshold; .* clip_by_threshold\("),
        (optax.GradientTransformation, r"got a type; pass the result of its call"),
    ],
)
def test_what_is_no_transformation_is_refused(given, said):
    with pytest.raises(TypeError, match=said):
        ost.check(given)


def test_nothing_is_called():
    def init(params):
        raise AssertionError

    def update(updates, state, params=None):
        raise AssertionError

    tx = optax.GradientTransformation(init, update)
    assert ost.check(optax.chain(ost.spike_guard(tx)), WEIGHTS) == []


PUBLIC = {**vars(optax), **vars(contrib), **vars(ost)}


@pytest.mark.parametrize("role", ["SCALE_FREE", "WITH_MOMENTUM", "ACCUMULATES"])
def test_every_name_in_a_role_is_a_public_name(role):
    assert {name for name in getattr(_roles, role) if name not in PUBLIC} == set()


def names_in_rules():
    """The names in calls of ``named`` in the source of the package."""
    for module in pkgutil.iter_modules(_checking.__path__):
        found = importlib.import_module(f"{_checking.__name__}.{module.name}")
        for node in ast.walk(ast.parse(inspect.getsource(found))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id == "named":
                for each in node.args:
                    if isinstance(each, ast.Constant):
                        yield each.value


def test_every_name_in_a_rule_is_a_public_name():
    assert set(names_in_rules()) - set(PUBLIC) == set()
    assert "set_to_zero" in set(names_in_rules())

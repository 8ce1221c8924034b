"""Each mistake gets one sentence with the argument, its value and the remedy.

Tables: every argument of every factory × values that it cannot have; every row of
``CASES`` × states and trees that do not belong to it; every reader × what is no state.
"""

import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_contract import CASES, halves, make_params, signature
from tiers import quick_only

import optax_stability as ost
import optax_stability.flax as ost_flax
from optax_stability import thresholds
from optax_stability._moments._moments import single

INNER = optax.sgd(0.1)


def loss_fn(params, batch):
    return jnp.mean(batch @ params["w"])


# --- arguments -------------------------------------------------------------------

# Every factory, with the arguments that it needs.
FACTORIES = {
    ost.clip_by_threshold: {"threshold": thresholds.constant(1.0)},
    ost.clip_by_zscore: {},
    ost.clip_by_quantile: {"q": 0.9},
    ost.clip_by_leaf_history: {},
    ost.skip_spikes: {"inner": INNER},
    ost.spike_guard: {"inner": INNER},
    ost.branch_on_spike: {"inner": INNER},
    ost.accumulate_moments: {"inner": INNER, "every_k": 2},
    ost.restart_moments: {"inner": INNER, "every": 5},
    ost.scale_gradients: {"factors": {"": 1.0}},
    ost.scale_by_safe_adam: {},
    ost.safe_adamw: {"learning_rate": 0.1},
    ost.estimate_noise_scale: {},
    ost.when_noisy: {"inner": INNER, "above": 10.0, "below": 1.0},
    ost.scale_by_noise_scale: {"batch_size": 64.0},
    ost.clip_attention_logits: {"inner": INNER, "heads_of": halves},
    ost.with_loss_probe: {"tx": INNER},
    ost.probed: {"loss_fn": loss_fn},
    ost.record: {"name": "grad"},
    ost.record_extra: {"name": "accuracy"},
    ost.record_logit_bound: {"heads_of": halves},
    ost.record_history: {"inner": INNER},
    ost.microbatch_gradients: {"loss_fn": loss_fn, "num_microbatches": 2},
    ost_flax.microbatch_gradients: {"loss_fn": loss_fn, "num_microbatches": 2},
    ost.penalize_gradient_norm: {"loss_fn": loss_fn, "weight": 0.1},
    ost.batch_size_schedule: {"max_k": 8},
    ost.scale_learning_rate: {"lr": 0.1, "num_microbatches": 2},
    ost.RewindPolicy: {},
    thresholds.constant: {"limit": 1.0},
    thresholds.zscore: {},
    thresholds.window_quantile: {"q": 0.9},
    thresholds.window_median: {"ratio": 2.0},
    thresholds.window_zscore: {},
    thresholds.ema_ratio: {},
    thresholds.detrended_mad: {"floor": 2.0},
    thresholds.at_most_median: {"threshold": thresholds.zscore()},
    thresholds.relearn: {"threshold": thresholds.zscore(), "after": 5},
}
# What an argument cannot be, whatever else it can be.
BAD = {
    "number": ("1e-3", -1, math.nan, True, (1, 2), jnp.ones(2), 1j, object()),
    "flag": ("no", 0, None, jnp.ones(())),
    "dtype": ("float33", 7, jnp.int32, object()),
    "choice": ("sometimes", 3),
    "axis": (3, ["data"], ("data", 2), True),
    "threshold": ("5", 5.0, optax.sgd(0.1)),
    "inner": (None, "adam", optax.sgd, 3, thresholds.constant(1.0)),
    "function": ("loss", 3, (loss_fn,)),
}
# Arguments whose default does not show what they are.
NUMBERS = (
    *("q", "learning_rate", "weight", "every", "max_share", "update_rms_max"),
    *("spike_ratio", "half_life", "above", "below", "batch_size", "every_k"),
    *("num_microbatches", "vmap_size", "max_k", "lr", "limit", "ratio", "floor"),
    *("after", "relearn_after"),
)
KINDS = {
    "threshold": "threshold",
    "grad_norm": "threshold",
    "value": "threshold",
    "confirm": "threshold",
    "on_spike": "threshold",
    "inner": "inner",
    "tx": "inner",
    "loss_fn": "function",
    "heads_of": "function",
    "weight_fn": "function",
    "axis_name": "axis",
    "spmd_axis_name": "axis",
    "mu_dtype": "dtype",
    "rms_dtype": "dtype",
    "accumulator_dtype": "dtype",
    **dict.fromkeys(NUMBERS, "number"),
}
# Their own tests are elsewhere: trees, patterns, names, filters, other functions.
ELSEWHERE = {
    *("stacked", "mask", "factors", "name", "metric", "wrt", "estimator", "like"),
    "measured",
}


def kind_of(name, default):
    if name in KINDS:
        return KINDS[name]
    for kind, types in {"flag": bool, "number": (int, float), "choice": str}.items():
        if isinstance(default, types):
            return kind
    raise AssertionError(f"say in KINDS what {name} is")


def argument_rows():
    for factory, needed in FACTORIES.items():
        for name, parameter in inspect.signature(factory).parameters.items():
            if name in ELSEWHERE:
                continue
            for i, bad in enumerate(BAD[kind_of(name, parameter.default)]):
                where = f"{factory.__module__.split('.')[1]}.{factory.__name__}"
                yield pytest.param(factory, needed, name, bad, id=f"{where}-{name}-{i}")


@pytest.mark.parametrize(("factory", "needed", "name", "bad"), list(argument_rows()))
def test_an_impossible_argument_is_named_with_its_value(factory, needed, name, bad):
    with pytest.raises((TypeError, ValueError)) as raised:
        factory(**{**needed, name: bad})
    said = str(raised.value)
    assert name in said
    assert repr(bad) in said or "array" in said


def heads_clip(measured):
    return ost.clip_attention_logits(INNER, heads_of=halves, measured=measured)


def logit_bound(**options):
    return ost.attention_logit_bound(
        jnp.ones((4, 1, 2)), jnp.ones((4, 1, 2)), **options
    )


def test_every_public_factory_is_in_the_table():
    assert {case.factory for case in CASES.values()} <= FACTORIES.keys()


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_an_unknown_keyword_names_the_function_that_was_called(factory):
    with pytest.raises(TypeError, match="misspelt") as raised:
        factory(**FACTORIES[factory], misspelt=3)
    assert factory.__name__ in str(raised.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ost.clip_by_leaf_history(stacked="w").init(P), ("stacked", "'w'")),
        (lambda: ost.record("g", stacked=3).init(P), ("stacked", "3")),
        (lambda: ost.safe_adamw(0.1, mask="w"), ("mask", "'w'")),
        (lambda: ost.safe_adamw(0.1, mask={"w": "yes"}), ("mask", "'yes'")),
        (lambda: ost.RewindPolicy(metric=3), ("metric", "3")),
        (lambda: ost.record(3), ("name", "3")),
        (lambda: ost.record_extra("a b"), ("name", "'a b'")),
        (lambda: ost.record_extra("load", like={}), ("like", "{}")),
        (lambda: heads_clip("a b"), ("measured", "'a b'")),
        (lambda: heads_clip(3), ("measured", "3")),
        (lambda: logit_bound(rotary="no"), ("rotary", "'no'")),
        (lambda: ost.when_noisy(INNER, above=1.0, estimator=3), ("estimator", "3")),
        (
            lambda: ost.from_optax_adam_state(OPTAX_ADAM, eps="x"),
            ("eps", "'x'"),
        ),
        (
            lambda: ost.to_optax_adam_state(SAFE_ADAM, nu_dtype=jnp.int32),
            ("nu_dtype", "int32"),
        ),
        (
            lambda: ost.scale_by_safe_adam(b1=optax.constant_schedule(0.9)),
            ("b1", "optax.inject_hyperparams"),
        ),
    ],
)
def test_other_arguments_are_named(call, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


# --- states and trees ------------------------------------------------------------

P = {"w": jnp.ones((4, 4))}
OPTAX_ADAM = optax.adam(0.1).init(P)
SAFE_ADAM = ost.scale_by_safe_adam().init(P)

# Their states hold the number of the leaves, and nothing about each.
COUNTS_LEAVES = {ost.when_noisy, ost.scale_by_noise_scale}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def refused(tx, updates, state, params):
    """What ``update`` says while it is traced, or None if it says nothing."""
    try:
        jax.eval_shape(lambda: tx.update(updates, state, params))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@every_case
def test_the_state_of_another_optimizer_is_named(case):
    if not case.has_state:
        return
    tx, params = case.make(), make_params()
    for other in (optax.adam(0.1), optax.sgd(0.1), ost.record("other")):
        said = refused(tx, params, other.init(params), params)
        if said is None:  # A row of record.
            assert case.factory is ost.record
            continue
        assert "adopt_state" in said, said
    for no_state in (None, {}, params):
        assert "adopt_state" in refused(tx, params, no_state, params)


@every_case
def test_a_state_that_was_replicated_for_pmap_is_named(case):
    if not case.has_state:
        return
    tx, params = case.make(), make_params()
    state = tx.init(params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    said = refused(tx, params, stacked, params)
    assert "pmap" in said, said
    assert "x[0]" in said
    with pytest.raises(ValueError, match="pmap"):
        ost.metrics(stacked)


@every_case
def test_a_leaf_that_was_added_after_init_is_named(case):
    tx, params = case.make(), make_params()
    more = params | {"new": jnp.ones(2)}
    state = tx.init(params)
    if signature(state) == signature(tx.init(more)):
        assert refused(tx, more, state, more) is None
        return
    said = refused(tx, more, state, more)
    assert (case.factory in COUNTS_LEAVES and said is None) or "'new'" in said


@every_case
def test_a_leaf_that_was_removed_after_init_is_named(case):
    tx, params = case.make(), make_params()
    fewer = {key: value for key, value in params.items() if key != "scale"}
    said = refused(tx, fewer, tx.init(params), fewer)
    # Leaves without a gradient are no mistake where nothing is stored for them.
    assert said is None or "'scale'" in said, said


@every_case
def test_a_shape_that_changed_after_init_is_named_with_both_shapes(case):
    tx, params = case.make(), make_params()
    other = params | {"scale": jnp.ones(3)}
    state = tx.init(params)
    if signature(state) == signature(tx.init(other)):
        assert refused(tx, other, state, other) is None
        return
    said = refused(tx, other, state, other)
    if case is CASES["clip_by_threshold groups"]:  # Labels have no names of leaves.
        assert "a shape or a label changed" in said, said
        return
    assert "'scale'" in said, said
    assert "(3,)" in said
    assert "()" in said


@pytest.mark.parametrize("name", ["scale_by_safe_adam", "accumulate_moments"])
def test_a_complex_gradient_for_real_parameters_is_named(name):
    tx, params = CASES[name].make(), make_params()
    other = params | {"scale": jnp.ones((), jnp.complex64)}
    said = refused(tx, other, tx.init(params), params)
    assert "'scale'" in said
    assert "complex64" in said


# The same transformation with other arguments, or around another one.
OTHERS = {
    "scope": (ost.clip_by_zscore(), ost.clip_by_zscore(scope="leaf")),
    "threshold": (ost.clip_by_zscore(), ost.clip_by_quantile(0.5)),
    "name": (ost.record("grad"), ost.record("update")),
    "option": (ost.record("grad", correlation=True), ost.record("grad")),
    "length": (
        ost.record_history(INNER, length=4),
        ost.record_history(INNER, length=5),
    ),
    "mean_square": (
        ost.accumulate_moments(INNER, 2),
        ost.accumulate_moments(INNER, 2, mean_square=False),
    ),
    "norm": (
        ost.estimate_noise_scale(),
        ost.estimate_noise_scale(norm="l1"),
    ),
    "l1": (
        ost.accumulate_moments(INNER, 2),
        ost.accumulate_moments(INNER, 2, l1=True),
    ),
    "keep": (
        ost.branch_on_spike(ost.safe_adamw(0.1), keep="all"),
        ost.branch_on_spike(ost.safe_adamw(0.1)),
    ),
    "inner": (ost.skip_spikes(optax.adam(0.1)), ost.skip_spikes(INNER)),
    "inner of history": (
        ost.record_history(optax.adam(0.1)),
        ost.record_history(INNER),
    ),
    "restart": (
        ost.restart_moments(INNER, on_spike=thresholds.zscore()),
        ost.restart_moments(INNER, every=2),
    ),
    "adamw": (ost.safe_adamw(0.1), optax.adamw(0.1)),
    "adam": (ost.safe_adamw(0.1), optax.adam(0.1)),
}


@pytest.mark.parametrize(("ours", "other"), OTHERS.values(), ids=OTHERS.keys())
def test_a_state_of_other_arguments_is_named(ours, other):
    with pytest.raises(TypeError, match="state") as raised:
        jax.eval_shape(lambda: ours.update(P, other.init(P), P, value=1.0))
    assert "tx.init(params)" in str(raised.value)


NEED_PARAMS = {
    "branch_on_spike": ost.branch_on_spike(INNER),
    "restart_moments": ost.restart_moments(INNER, every=2),
    "record of params": ost.record("p", of="params"),
    "record ratio": ost.record("g", ratio_to_params=True),
    "safe_adamw": ost.safe_adamw(0.1),
    "safe_adamw mask": ost.safe_adamw(0.1, mask={"w": True}),
}


@pytest.mark.parametrize("name", NEED_PARAMS)
def test_missing_params_are_named(name):
    tx = NEED_PARAMS[name]
    with pytest.raises(ValueError, match="params"):
        tx.update(P, tx.init(P), value=1.0)


@pytest.mark.parametrize("name", ["branch_on_spike", "record of params", "safe_adamw"])
def test_the_parameters_of_another_model_are_named(name):
    tx = NEED_PARAMS[name]
    said = refused(tx, P, tx.init(P), {"v": jnp.ones(2)})
    assert "'v'" in said or "'w'" in said, said


@every_case
def test_params_may_be_missing_where_nothing_needs_them(case):
    tx, params = case.make(), make_params()
    said = refused(tx, params, tx.init(params), None)
    assert said is None or "params" in said


def test_without_weight_decay_adamw_needs_no_params():
    tx = ost.safe_adamw(0.1, weight_decay=0.0)
    updates, _ = tx.update(P, tx.init(P))
    with_params, _ = tx.update(P, tx.init(P), P)
    np.testing.assert_array_equal(updates["w"], with_params["w"])


def test_the_state_of_adamw_does_not_depend_on_the_decay():
    states = [ost.safe_adamw(0.1, weight_decay=w).init(P) for w in (0.0, 0.1)]
    assert signature(states[0]) == signature(states[1])


# --- extra arguments -------------------------------------------------------------

LOSS = {
    "spike_guard": ost.spike_guard(INNER),
    "skip_spikes": ost.skip_spikes(INNER),
    "branch_on_spike": ost.branch_on_spike(INNER),
    "record_history": ost.record_history(INNER),
    "accumulate_moments": ost.accumulate_moments(INNER, 2),
}
BAD_LOSSES = [(1.0, {}), "1.0", {"loss": 1.0}, [1.0], jnp.ones(2), 1j, len, object()]


@pytest.mark.parametrize("tx", LOSS.values(), ids=LOSS.keys())
@pytest.mark.parametrize("value", BAD_LOSSES, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", ["value", "loss"])
def test_a_loss_that_is_no_number_is_named(tx, value, name):
    with pytest.raises((TypeError, ValueError), match="value must be") as raised:
        jax.eval_shape(lambda: tx.update(P, tx.init(P), P, **{name: value}))
    shown = type(value).__name__, str(np.shape(value)), "complex"
    assert any(each in str(raised.value) for each in shown)


@pytest.mark.parametrize("name", ["spike_guard", "branch_on_spike"])
def test_a_missing_loss_is_named(name):
    with pytest.raises(ValueError, match=r"no loss was given.*value=loss"):
        LOSS[name].update(P, LOSS[name].init(P), P)


@pytest.mark.parametrize("weight", ["x", (1,), jnp.ones(2)], ids=["str", "tuple", "2"])
def test_a_weight_that_is_no_number_is_named(weight):
    tx = LOSS["accumulate_moments"]
    with pytest.raises((TypeError, ValueError), match="weight must be"):
        tx.update(P, tx.init(P), P, weight=weight)


@pytest.mark.parametrize("look", ["x", jnp.ones(2, bool), 1.0, object()])
def test_a_look_that_is_no_bool_is_named(look):
    tx = ost.record("grad")
    with pytest.raises(ValueError, match="look must be True or False"):
        tx.update(P, tx.init(P), P, look=look)


MOMENTS = single(P, 0.0, 2.0, mean_square=True).moments
READS_MOMENTS = {
    "estimate_noise_scale": ost.estimate_noise_scale(),
    "scale_by_safe_adam": ost.scale_by_safe_adam(second_moment="microbatch"),
    "accumulate_moments": ost.accumulate_moments(INNER, 2),
    "when_noisy": ost.when_noisy(INNER, above=2.0, below=1.0),
    "scale_by_noise_scale": ost.scale_by_noise_scale(64.0),
    "inside a guard": ost.skip_spikes(ost.estimate_noise_scale()),
}
BAD_MOMENTS = {
    "tuple": ((1, 2), "a tuple"),
    "text": ("x", "a str"),
    "gradient": (P, "a dict"),
    "stacked": (jax.tree.map(lambda x: jnp.stack([x, x]), MOMENTS), "vmap"),
    "other tree": (
        single({"v": jnp.ones(2)}, 0.0, 2.0, mean_square=True).moments,
        "another tree",
    ),
}


@pytest.mark.parametrize("tx", READS_MOMENTS.values(), ids=READS_MOMENTS.keys())
@pytest.mark.parametrize(("moments", "word"), BAD_MOMENTS.values(), ids=BAD_MOMENTS)
def test_moments_of_another_kind_are_named(tx, moments, word):
    with pytest.raises((TypeError, ValueError), match="moments") as raised:
        jax.eval_shape(lambda: tx.update(P, tx.init(P), P, moments=moments))
    assert word in str(raised.value)


# --- batches ---------------------------------------------------------------------

BATCHES = {
    "empty": (np.zeros((0, 4)), "no examples"),
    "one array of none": ({"x": np.ones((4, 4)), "y": np.ones((0, 4))}, "'y'"),
    "not divisible": (np.ones((3, 4)), "multiple"),
    "of two lengths": ({"x": np.ones((4, 4)), "y": np.ones((3, 4))}, "'y'"),
    "a number": (3.0, "()"),
    "no array": ({}, "no array"),
    "texts": (np.array(["a", "b"]), "<U1"),
}
MICROBATCHES = {
    "together": ost.microbatch_gradients(loss_fn, 2),
    "in turn": ost.microbatch_gradients(loss_fn, 2, vmap_size=1),
}


@pytest.mark.parametrize("fn", MICROBATCHES.values(), ids=MICROBATCHES.keys())
@pytest.mark.parametrize(("batch", "word"), BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_that_cannot_be_cut_is_named(fn, batch, word):
    with pytest.raises((TypeError, ValueError), match="batch") as raised:
        fn(P, batch)
    assert word in str(raised.value)


def test_an_empty_batch_is_named_for_modules_too():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    fn = ost_flax.microbatch_gradients(lambda model, x: jnp.mean(model(x)), 2)
    with pytest.raises(ValueError, match="no examples"):
        fn(model, jnp.ones((0, 4)))


class Returned(NamedTuple):
    loss_fn: Any
    words: tuple[str, ...]
    options: dict[str, Any] | None = None


RETURNED = [
    Returned(lambda p, x: x @ p["w"], ("loss_fn", "one number", "(1, 4)")),
    Returned(lambda p, x: (jnp.mean(x @ p["w"]), 1), ("loss_fn", "has_aux=True")),
    Returned(loss_fn, ("has_aux=True", "(loss, aux)"), {"has_aux": True}),
    Returned(loss_fn, ("weight_fn", "(3,)"), {"weight_fn": lambda batch: jnp.ones(3)}),
]


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_function_returns_is_named(case):
    fn = ost.microbatch_gradients(case.loss_fn, 2, **(case.options or {}))
    with pytest.raises((TypeError, ValueError)) as raised:
        jax.eval_shape(fn, P, jnp.ones((2, 4)))
    assert all(word in str(raised.value) for word in case.words), raised.value


@pytest.mark.parametrize(
    ("leaf", "word"),
    [
        (jnp.ones(3, jnp.int32), "int32"),
        (np.ones(3, np.int32), "int32"),
        (jax.nn.relu, "a custom_jvp"),
        ("relu", "a str"),
        (1.0, "a float"),
    ],
    ids=["integers", "NumPy", "function", "text", "number"],
)
def test_parameters_without_a_float_are_named(leaf, word):
    """Beside floats such leaves are static: tests/moments/test_static_leaves.py."""
    with pytest.raises(ValueError, match="nothing to differentiate") as raised:
        MICROBATCHES["together"]({"table": leaf}, jnp.ones((2, 4)))
    assert f"{word} in the leaf 'table'" in str(raised.value)


def test_integers_among_the_parameters_are_static():
    params = P | {"table": jnp.ones(3, jnp.int32)}
    _, grads, _ = MICROBATCHES["together"](params, jnp.ones((2, 4)))
    assert grads["table"] is None


# --- readers ---------------------------------------------------------------------

READERS = {
    "metrics": ost.metrics,
    "history": ost.history,
    "noise_scale": ost.noise_scale,
    "has_updated": ost.has_updated,
    "eval_params": lambda state: ost.eval_params(P, state),
    "flush": lambda state: ost.flush(INNER, state, P),
    "adopt_state": lambda state: ost.adopt_state(INNER, P, state),
    "from_optax_adam_state": ost.from_optax_adam_state,
    "to_optax_adam_state": ost.to_optax_adam_state,
}
ALL = ost.accumulate_moments(
    ost.record_history(
        ost.branch_on_spike(
            optax.chain(ost.estimate_noise_scale(), ost.safe_adamw(0.1))
        )
    ),
    2,
)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("tx", [ALL, INNER, optax.MultiSteps(INNER, 2)])
def test_a_transformation_in_place_of_its_state_is_named(name, tx):
    with pytest.raises(TypeError, match=r"state must be.*the transformation itself"):
        READERS[name](tx)


@pytest.mark.parametrize(
    "name",
    ["metrics", "history", "noise_scale", "has_updated", "eval_params", "flush"],
)
@quick_only("metrics")
def test_a_replicated_state_is_named_by_every_reader(name):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), ALL.init(P))
    with pytest.raises(ValueError, match=r"pmap.*x\[0\]"):
        READERS[name](stacked)


def test_adopting_into_what_is_no_transformation_is_named():
    with pytest.raises(TypeError, match="new_tx"):
        ost.adopt_state(OPTAX_ADAM, P, OPTAX_ADAM)

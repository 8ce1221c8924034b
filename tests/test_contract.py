"""Every public transformation against every rule that holds for all of them.

A new export without a row in ``CASES`` fails ``test_every_factory_has_a_row``.
"""

import functools
import inspect
import itertools
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import survival
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import full, quick_only, together

import optax_stability as ost
from optax_stability._core._leaves import as_arrays
from optax_stability._moments._moments import single

# Another order of adding: a few ulps of float32 are all that may differ.
REORDERED = 1e-5


class Case(NamedTuple):
    """One row: a factory and which of the rules apply to it in which form."""

    factory: Callable
    make: Callable[..., optax.GradientTransformation]
    passes_nonfinite: bool = False  # It reports and never touches the updates.
    can_be_inactive: bool = True
    hyperparameters: Mapping[str, float] = types.MappingProxyType({})
    takes_axis_name: bool = True
    has_state: bool = True
    needs_moments: bool = False
    reports_loss: bool = False
    longest_pause: int = 0  # Steps in a row that it may withhold from finite gradients.
    tolerance: float = REORDERED


def with_loss(tx):
    """``tx``, told that the loss is 1 unless it is told otherwise."""

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **{"value": 1.0, **extra_args})

    return optax.GradientTransformationExtraArgs(tx.init, update)


def with_moments(tx):
    """``tx``, told that the gradient is the mean of two that are close to it."""

    def update(updates, state, params=None, **extra_args):
        given = as_arrays("microbatch_gradients: the gradient", updates)
        moments = single(given, 0.0, 2.0, mean_square=True, l1=True).moments
        moments = moments._replace(
            num_microbatches=jnp.int32(2),
            deviation=jnp.full_like(moments.deviation, 0.01),
            l1=jax.tree.map(lambda x: jnp.full_like(x, 0.01), moments.l1),
        )
        return tx.update(updates, state, params, moments=moments, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def with_probe(tx):
    """``tx``, whose parameters have a loss probe beside them, and its gradient.

    Beside leaves with the names that they have without it, whatever container they are
    in: metrics are read with the parameters of the row, which have no probe.
    """

    def beside(tree, probe):
        if tree is None:
            return None
        named = zip(ost.leaf_names(tree), jax.tree.leaves(tree), strict=True)
        return {"loss_probe": probe, **dict(named)}

    def init(params):
        return tx.init(beside(params, ost.loss_probe()))

    def update(updates, state, params=None, **extra_args):
        new, state = tx.update(
            beside(updates, jnp.array([1e-12, 1e-12])),
            state,
            beside(params, ost.loss_probe()),
            **extra_args,
        )
        leaves = [new[name] for name in ost.leaf_names(updates)]
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


def halves(params):
    """Each matrix as an attention head: its first columns are those of the query."""
    named = zip(ost.leaf_names(params), jax.tree.leaves(params), strict=True)

    def split(x):
        cut = x.shape[1] // 2
        return ost.AttentionHeads(x[:, None, :cut], x[:, None, cut : 2 * cut])

    return {name: split(x) for name, x in named if x.ndim == 2}


QUICK_ZSCORE = ost.thresholds.zscore(warmup=2)

CASES = {
    "clip_by_threshold": Case(
        ost.clip_by_threshold,
        lambda **kw: ost.clip_by_threshold(ost.thresholds.constant(1e3), **kw),
    ),
    "clip_by_threshold leaf": Case(
        ost.clip_by_threshold,
        lambda **kw: ost.clip_by_threshold(QUICK_ZSCORE, scope="leaf", **kw),
    ),
    "clip_by_threshold groups": Case(
        ost.clip_by_threshold,
        lambda **kw: ost.clip_by_threshold(
            QUICK_ZSCORE,
            scope=functools.partial(jax.tree.map, lambda x: f"{x.ndim}-D"),
            **kw,
        ),
    ),
    "clip_by_zscore": Case(
        ost.clip_by_zscore,
        lambda **kw: ost.clip_by_zscore(**{"warmup": 2, **kw}),
        can_be_inactive=False,  # It shortens the first steps.
        hyperparameters={"z_max": 2.0, "decay": 0.9},
    ),
    "clip_by_threshold stacked": Case(
        ost.clip_by_threshold,
        lambda **kw: ost.clip_by_threshold(
            QUICK_ZSCORE,
            scope="leaf",
            stacked=functools.partial(jax.tree.map, lambda x: x.ndim == 2),
            **kw,
        ),
        # Under shard_map the layers themselves would be sharded.
        takes_axis_name=False,
    ),
    "clip_by_quantile": Case(
        ost.clip_by_quantile,
        lambda **kw: ost.clip_by_quantile(0.5, window=4, **kw),
    ),
    "clip_by_leaf_history": Case(
        ost.clip_by_leaf_history,
        lambda **kw: ost.clip_by_leaf_history(**{"warmup": 2, **kw}),
        hyperparameters={"ratio": 1.1, "decay": 0.9},
    ),
    "clip_attention_logits": Case(
        ost.clip_attention_logits,
        lambda: ost.clip_attention_logits(optax.identity(), 1e6, heads_of=halves),
        passes_nonfinite=True,
        takes_axis_name=False,
    ),
    "clip_attention_logits active": Case(
        ost.clip_attention_logits,
        lambda: ost.skip_spikes(
            ost.clip_attention_logits(ost.safe_adamw(0.1), 1.0, heads_of=halves)
        ),
        can_be_inactive=False,
        takes_axis_name=False,
        reports_loss=True,
        longest_pause=5,
    ),
    "skip_spikes": Case(
        ost.skip_spikes,
        lambda **kw: ost.skip_spikes(optax.identity(), **kw),
        reports_loss=True,
        longest_pause=5,
    ),
    "skip_spikes adam": Case(
        ost.skip_spikes,
        lambda: ost.skip_spikes(
            optax.chain(ost.clip_by_zscore(warmup=2), ost.scale_by_safe_adam()),
            grad_norm=ost.thresholds.window_median(3.0, window=4),
            max_consecutive=2,
        ),
        can_be_inactive=False,
        takes_axis_name=False,
        reports_loss=True,
        longest_pause=2,
    ),
    "spike_guard": Case(
        ost.spike_guard,
        lambda **kw: with_loss(ost.spike_guard(optax.identity(), **kw)),
        reports_loss=True,
    ),
    "spike_guard without a loss": Case(
        ost.spike_guard,
        lambda **kw: ost.spike_guard(optax.identity(), loss=False, **kw),
        reports_loss=True,
    ),
    "with_loss_probe": Case(
        ost.with_loss_probe,
        lambda: with_probe(ost.with_loss_probe(ost.spike_guard(optax.identity()))),
        takes_axis_name=False,
        reports_loss=True,
    ),
    "branch_on_spike": Case(
        ost.branch_on_spike,
        lambda **kw: with_loss(ost.branch_on_spike(optax.identity(), **kw)),
        reports_loss=True,
    ),
    "branch_on_spike all": Case(
        ost.branch_on_spike,
        lambda **kw: with_loss(
            ost.branch_on_spike(ost.safe_adamw(0.1), keep="all", **kw)
        ),
        can_be_inactive=False,
        reports_loss=True,
    ),
    "accumulate_moments": Case(
        ost.accumulate_moments,
        lambda **kw: ost.accumulate_moments(
            optax.identity(), **{"every_k": 1, "mean_square": False, **kw}
        ),
        takes_axis_name=False,  # Its state is sharded: test_accumulation.py.
        reports_loss=True,
    ),
    "accumulate_moments adam": Case(
        ost.accumulate_moments,
        lambda **kw: ost.accumulate_moments(
            ost.safe_adamw(0.1, second_moment="microbatch"), every_k=2, **kw
        ),
        can_be_inactive=False,
        takes_axis_name=False,
        reports_loss=True,
        longest_pause=1,
    ),
    "restart_moments": Case(
        ost.restart_moments,
        lambda **kw: ost.restart_moments(
            ost.scale_by_safe_adam(),
            every=3,
            on_spike=ost.thresholds.window_median(3.0, window=4),
            warmup=2,
            **kw,
        ),
        can_be_inactive=False,
        takes_axis_name=False,
    ),
    "scale_gradients": Case(
        ost.scale_gradients,
        lambda: ost.scale_gradients({"": 1.0}),
        passes_nonfinite=True,
        takes_axis_name=False,
        has_state=False,
    ),
    "scale_by_safe_adam": Case(
        ost.scale_by_safe_adam,
        ost.scale_by_safe_adam,
        can_be_inactive=False,
        hyperparameters={"b1": 0.9, "b2": 0.99, "eps": 1e-8},
        takes_axis_name=False,
    ),
    "scale_by_safe_adam bf16": Case(
        ost.scale_by_safe_adam,
        lambda: ost.scale_by_safe_adam(
            mu_dtype=jnp.bfloat16,
            rms_dtype=jnp.bfloat16,
            update_rms_max=1.0,
            spike_ratio=50.0,
        ),
        can_be_inactive=False,
        takes_axis_name=False,
        tolerance=2.0**-6,  # An ulp of float32 may tip two roundings to bfloat16.
    ),
    "scale_by_safe_adam microbatch": Case(
        ost.scale_by_safe_adam,
        lambda **kw: with_moments(
            ost.scale_by_safe_adam(second_moment="microbatch", **kw)
        ),
        can_be_inactive=False,
        hyperparameters={"b1": 0.9, "b2": 0.99},
        takes_axis_name=False,
    ),
    "safe_adamw": Case(
        ost.safe_adamw,
        lambda **kw: ost.safe_adamw(**{"learning_rate": 0.1, **kw}),
        can_be_inactive=False,
        hyperparameters={"learning_rate": 0.1, "weight_decay": 0.01},
        takes_axis_name=False,
    ),
    "estimate_noise_scale": Case(
        ost.estimate_noise_scale,
        lambda **kw: with_moments(ost.estimate_noise_scale(**kw)),
        passes_nonfinite=True,
        hyperparameters={"decay": 0.9, "confidence": 0.9},
        needs_moments=True,
    ),
    "estimate_noise_scale l1": Case(
        ost.estimate_noise_scale,
        lambda **kw: with_moments(ost.estimate_noise_scale(norm="l1", **kw)),
        passes_nonfinite=True,
        hyperparameters={"decay": 0.9, "confidence": 0.9},
        needs_moments=True,
    ),
    "estimate_noise_scale labels": Case(
        ost.estimate_noise_scale,
        lambda **kw: with_moments(
            ost.estimate_noise_scale(
                scope=functools.partial(jax.tree.map, lambda x: f"{x.ndim}-D"),
                half_life=10.0,
                difference=True,
                **kw,
            )
        ),
        passes_nonfinite=True,
        takes_axis_name=False,  # The buffer in its state is sharded.
    ),
    "when_noisy": Case(
        ost.when_noisy,
        lambda: with_moments(
            ost.when_noisy(
                ost.clip_by_threshold(ost.thresholds.constant(1e-3)), above=1e9
            )
        ),
        passes_nonfinite=True,
        takes_axis_name=False,
    ),
    "scale_by_noise_scale": Case(
        ost.scale_by_noise_scale,
        lambda **kw: with_moments(
            ost.scale_by_noise_scale(**{"batch_size": 64.0, **kw})
        ),
        passes_nonfinite=True,
        hyperparameters={"batch_size": 64.0, "max_scale": 1.5},
        needs_moments=True,
        takes_axis_name=False,
    ),
    "record": Case(
        ost.record, lambda **kw: ost.record("grad", **kw), passes_nonfinite=True
    ),
    "record everything": Case(
        ost.record,
        lambda: ost.record(
            "grad", ratio_to_params=True, correlation=True, spectral=True, every=2
        ),
        passes_nonfinite=True,
        takes_axis_name=False,  # The buffer in its state is sharded.
    ),
    "record_extra": Case(
        ost.record_extra,
        lambda: ost.record_extra("accuracy"),
        passes_nonfinite=True,
        takes_axis_name=False,
    ),
    "record_extra entries": Case(
        ost.record_extra,
        lambda: ost.record_extra("load", like=np.zeros(2)),
        passes_nonfinite=True,
        takes_axis_name=False,
    ),
    "record_logit_bound": Case(
        ost.record_logit_bound,
        lambda: ost.record_logit_bound(halves, every=2),
        passes_nonfinite=True,
        takes_axis_name=False,
    ),
    "record_history": Case(
        ost.record_history,
        lambda **kw: ost.record_history(ost.record("grad", **kw), length=3, **kw),
        passes_nonfinite=True,
        reports_loss=True,
    ),
}
NOT_FACTORIES = {
    "adopt_state",
    "attention_logit_bound",
    "batch_efficiency",
    "batch_size_schedule",
    "check",
    "critical_batch_range",
    "diagnose",
    "eval_params",
    "find_damage",
    "flush",
    "from_optax_adam_state",
    "has_updated",
    "histogram_edges",
    "history",
    "leaf_names",
    "loss_probe",
    "metrics",
    "microbatch_gradients",
    "noise_scale",
    "penalize_gradient_norm",
    "plot_history",
    "probed",
    "read_log",
    "scale_learning_rate",
    "to_optax_adam_state",
    "verify_step",
    "write_checksums",
    "write_report",
}

every_case = pytest.mark.parametrize("case", together("row", CASES))
# One row for each function.
ONE_EACH = tuple(name for name in CASES if " " not in name)
# Small programs of three kinds: a clip, a guard, an accumulation.
FEW = ("clip_by_zscore", "skip_spikes", "accumulate_moments")


def make_params(dtype=jnp.float32):
    return {
        "dense": {"bias": jnp.ones(8, dtype), "kernel": jnp.ones((16, 8), dtype)},
        "scale": jnp.ones((), dtype),
    }


def make_grads(seed, params):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


@functools.cache
def compiled(make):
    """A transformation and its update, one program for all tests of a row."""
    tx = make()
    return tx, jax.jit(tx.update)


def run(make, params, steps=4):
    """A few jitted steps; returns updates and state of the last."""
    tx, step = compiled(make)
    state, updates = tx.init(params), None
    for seed in range(steps):
        updates, state = step(make_grads(seed, params), state, params)
    return updates, state


def trace(tx, params, **extra_args):
    """Shapes and dtypes of updates and state after a step: nothing is compiled."""

    def step(grads, params):
        return tx.update(grads, tx.init(params), params, **extra_args)

    return jax.eval_shape(step, make_grads(0, params), params)


def program(tx, params, **extra_args):
    """A step as text, without the addresses of Python's objects."""

    def step(grads, state, params):
        return tx.update(grads, state, params, **extra_args)

    state = jax.eval_shape(tx.init, params)
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(step)(params, state, params)))


def signature(tree):
    """Structure, shapes, dtypes and weak types of a tree of arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def public_functions():
    return {
        name: value
        for name, value in vars(ost).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def named_tuples(tree):
    """All NamedTuple classes of this library in a state."""
    found = set()

    def visit(node):
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            if type(node).__module__.startswith("optax_stability"):
                found.add(type(node))
            for child in node:
                visit(child)
        elif isinstance(node, tuple | list):
            for child in node:
                visit(child)

    visit(tree)
    return found


def test_every_factory_has_a_row():
    covered = {case.factory for case in CASES.values()}
    missing = {
        name
        for name, function in public_functions().items()
        if name not in NOT_FACTORIES and function not in covered
    }
    assert not missing, f"add a row to CASES for {sorted(missing)}"


def test_no_public_name_is_a_name_of_optax():
    names = {name for name in vars(ost) if not name.startswith("_")}
    assert not names & set(vars(optax))


@every_case
def test_takes_and_ignores_extra_args(case):
    tx = case.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = make_params()
    loss = {} if case.reports_loss else {"value": jnp.float32(3.0)}
    given = program(tx, params, **loss, unheard_of="x")
    assert given == program(tx, params)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_never_changes_its_signature(case, dtype):
    tx, params = case.make(), make_params(dtype)
    fresh = jax.eval_shape(tx.init, params)
    _, updated = jax.eval_shape(tx.update, params, fresh, params)
    assert signature(updated) == signature(fresh)


@every_case
def test_init_works_on_shapes(case):
    tx, params = case.make(), make_params()
    shapes = jax.eval_shape(lambda: params)
    assert signature(tx.init(shapes)) == signature(tx.init(params))


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_keep_structure_shapes_and_dtypes(case, dtype):
    params = make_params(dtype)
    updates, _ = trace(case.make(), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_case
def test_every_field_of_the_state_is_documented(case):
    for kind in named_tuples(case.make().init(make_params())):
        attributes = inspect.getdoc(kind).partition("Attributes:")[2]
        documented = re.findall(r"^  (\w+): ", attributes, re.MULTILINE)
        assert documented == list(kind._fields), kind.__name__


def key_is_open(key):
    """Whether NaN says "not known" there, and infinity "no upper end"."""
    names = "b_simple", "high", "noise_to_weight", "trace", "grad_sq"
    open_ones = *(f"noise_scale/{name}" for name in names), "spectral_norm"
    return key.removesuffix("/per_leaf").endswith(open_ones)


@every_case
def test_metric_keys_and_shapes_are_fixed_at_init(case):
    tx, params = case.make(), make_params()
    fresh = jax.eval_shape(lambda: ost.metrics(tx.init(params)))
    later = jax.eval_shape(ost.metrics, trace(tx, params)[1])
    assert fresh.keys() == later.keys()
    for key, value in later.items():
        if key.endswith("/per_entry"):
            assert value.shape == fresh[key].shape
            assert value.ndim == 1
        else:
            assert value.shape == ((3,) if key.endswith("/per_leaf") else ()), key
        assert value.dtype == fresh[key].dtype


@every_case
@quick_only(*FEW)
def test_metrics_are_finite_at_init(case):
    for key, value in ost.metrics(case.make().init(make_params())).items():
        assert np.isfinite(value).all() or key_is_open(key), key


@every_case
def test_three_steps_are_one_trace(case):
    tx, params = case.make(), make_params()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(n=1)(lambda g, s: tx.update(g, s, params)))
    state = jax.eval_shape(tx.init, params)
    for _ in range(3):
        _, state = jax.eval_shape(step, params, state)


@every_case
def test_can_be_made_while_something_else_is_traced(case):
    made = []
    jax.jit(lambda: made.append(case.make()))()
    trace(made[0], make_params())


@every_case
@quick_only(*FEW)
def test_nothing_of_a_trace_is_kept(case):
    with jax.checking_leaks():
        trace(case.make(), make_params())


@every_case
def test_no_two_leaves_of_a_fresh_state_share_a_buffer(case):
    params = make_params()
    leaves = jax.tree.leaves((params, case.make().init(params)))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]
    assert len(set(buffers)) == len(buffers)


@every_case
@quick_only(*FEW)
def test_a_fresh_state_can_be_donated(case):
    tx, params = case.make(), make_params()
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state = tx.init(params)
    for seed in range(2):
        _, state = step(make_grads(seed, params), state, params)


@every_case
@quick_only(*FEW)
def test_a_scan_equals_a_loop(case):
    tx, params = case.make(), make_params()
    grads = [make_grads(seed, params) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

    def body(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    state, updates = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(
        tx.init(params), stacked
    )
    expected_updates, expected_state = run(case.make, params)
    last = jax.tree.map(lambda x: x[-1], updates)
    # Where terms of the size of 1 cancel, an ulp of 1 remains.
    ulp = 2.0**-23
    chex.assert_trees_all_close(last, expected_updates, rtol=REORDERED, atol=ulp)
    chex.assert_trees_all_close(state, expected_state, rtol=REORDERED, atol=ulp)


@every_case
@quick_only(*FEW)
def test_a_vmap_equals_a_loop(case):
    tx, params = case.make(), make_params()
    grads = [make_grads(seed, params) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

    def once(grads):
        return tx.update(grads, tx.init(params), params)[0]

    updates = jax.jit(jax.vmap(once))(stacked)
    for i, each in enumerate(grads):
        chosen = jax.tree.map(lambda x, i=i: x[i], updates)
        expected, _ = compiled(case.make)[1](each, tx.init(params), params)
        chex.assert_trees_all_close(chosen, expected, rtol=REORDERED)


@every_case
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 5])
@quick_only(*(f"{at}-nan-{name}" for at in (0, 5) for name in ONE_EACH))
def test_a_nonfinite_gradient_poisons_nothing(case, bad, at):
    params = make_params()
    tx, step = compiled(case.make)
    state = tx.init(params)
    for seed in range(8):
        grads = make_grads(seed, params)
        if seed == at:
            grads["dense"]["kernel"] = grads["dense"]["kernel"].at[3, 3].set(bad)
        updates, state = step(grads, state, params)
        if not (case.passes_nonfinite and seed == at):
            chex.assert_tree_all_finite(updates)
    # Before a threshold is armed its limit is infinite: that is no poison.
    reported = ost.metrics(state)
    closed = {k for k in reported if "limit" not in k and not key_is_open(k)}
    chex.assert_tree_all_finite({key: reported[key] for key in closed})
    moved = jax.tree.map(lambda x: np.abs(x).max() > 0, updates)
    assert all(jax.tree.leaves(moved))


@every_case
@quick_only(*ONE_EACH)
def test_a_lasting_shift_freezes_nothing(case):
    params = make_params()
    tx, step = compiled(case.make)
    state, pause = tx.init(params), 0
    for seed in range(60):
        factor = 1.0 if seed < 20 else 50.0
        grads = jax.tree.map(lambda x, f=factor: f * x, make_grads(seed, params))
        updates, state = step(grads, state, params)
        moved = jax.tree.map(lambda x: np.abs(x).max() > 0, updates)
        pause = 0 if all(jax.tree.leaves(moved)) else pause + 1
        assert pause <= case.longest_pause, seed


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@quick_only(*(f"float32-{name}" for name in ONE_EACH))
def test_inactive_means_bitwise_identity(case, dtype):
    if not case.can_be_inactive:
        return
    params = make_params(dtype)
    tx, step = compiled(case.make)
    grads = make_grads(0, params)
    updates, _ = step(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates, grads)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_converts_no_dtype_and_adds_no_axis_implicitly(case, dtype):
    params = make_params(dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        _, state = trace(case.make(), params)
        jax.eval_shape(lambda state: ost.metrics(state, params=params), state)


@every_case
@pytest.mark.parametrize("jitted", [True, False], ids=["jitted", "eager"])
@quick_only(*(f"jitted-{name}" for name in ONE_EACH), "eager-clip_by_zscore")
def test_a_healthy_run_makes_no_nan(case, jitted):
    """So that jax.debug_nans stops at faults only; a gradient of 0 is healthy."""
    params = make_params()
    with jax.debug_nans(True):
        tx, step = compiled(case.make)
        step, state = step if jitted else tx.update, tx.init(params)
        for seed in range(3):
            grads = make_grads(seed, params)
            grads["dense"]["bias"] = jnp.zeros_like(grads["dense"]["bias"])
            _, state = step(grads, state, params)
            ost.metrics(state, params=params)


def loss_after_steps(case, start):
    """The loss after two steps from ``start``, whose gradients depend on it."""
    tx, params = case.make(), start
    state, noise = tx.init(params), make_grads(0, params)
    for _ in range(2):
        grads = jax.tree.map(lambda p, n: 0.3 * jnp.cos(p + n), params, noise)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    return optax.tree.sum(jax.tree.map(jnp.sin, params))


@every_case
@quick_only("clip_by_zscore", "skip_spikes")
def test_reverse_mode_is_the_derivative_of_the_steps(case):
    loss = jax.jit(functools.partial(loss_after_steps, case))
    params, along = make_params(), make_grads(1, make_params())
    slope = optax.tree.vdot(jax.jit(jax.grad(loss))(params), along)

    def at(distance):
        moved = jax.tree.map(lambda p, d: p + distance * d, params, along)
        return float(loss(moved))

    # Of central differences at 0.03, whose third order and rounding are below 1e-3; the
    # rounding to bfloat16 makes steps of 1 % in the loss.
    differences = (at(0.03) - at(-0.03)) / 0.06
    close = 1e-2 if case.tolerance == REORDERED else 0.2
    np.testing.assert_allclose(slope, differences, rtol=close, atol=1e-3)


@every_case
def test_an_empty_tree_passes(case):
    assert trace(case.make(), {})[0] == {}


@every_case
@quick_only(*FEW)
def test_an_empty_tree_leaves_finite_metrics(case):
    tx = case.make()
    _, state = jax.jit(tx.update)({}, tx.init({}), {})
    for key, value in ost.metrics(state).items():
        assert np.isfinite(value).all() or "limit" in key or key_is_open(key), key


def label(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


WRAPPERS = {
    "chain": lambda make: optax.chain(make(), optax.scale(-1.0)),
    "named_chain": lambda make: optax.named_chain(
        ("ours", make()), ("lr", optax.scale(-1.0))
    ),
    "masked": lambda make: optax.masked(make(), is_matrix),
    "partition": lambda make: optax.partition(
        {"matrix": make(), "vector": make()}, label
    ),
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 3),
    "conditionally_transform": lambda make: optax.conditionally_transform(
        make(), lambda step: step >= 1
    ),
}


every_wrapper = pytest.mark.parametrize(
    "wrapper", WRAPPERS.values(), ids=WRAPPERS.keys()
)
A_WRAPPER_EACH = map("-".join, zip(itertools.cycle(WRAPPERS), CASES, strict=False))


@every_case
@every_wrapper
@quick_only(*A_WRAPPER_EACH)
def test_is_read_inside_every_wrapper(case, wrapper):
    tx, params = wrapper(case.make), make_params()
    _, state = trace(tx, params)
    bare = jax.eval_shape(lambda: ost.metrics(case.make().init(params)))
    found = jax.eval_shape(lambda state: ost.metrics(state, params=params), state)
    vectors = {key for key in bare if key.endswith("/per_leaf")}
    scalars = {key for key in bare if not key.endswith(("/per_leaf", "/per_entry"))}
    stripped = {re.sub("^(matrix|vector)/", "", key) for key in found}
    assert scalars <= stripped
    for key in vectors:
        stem = key.removesuffix("per_leaf")
        assert f"{stem}dense/kernel" in stripped
        assert all(value.shape == () for value in found.values())


@full
@every_case
@every_wrapper
def test_works_inside_every_wrapper(case, wrapper):
    params = make_params()
    updates, _ = run(functools.partial(wrapper, case.make), params)
    chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name].hyperparameters]
)
@quick_only("clip_by_zscore", "safe_adamw")
def test_hyperparameters_can_be_injected(name):
    case = CASES[name]
    told = with_moments if case.needs_moments else lambda tx: tx
    injected = optax.inject_hyperparams(case.factory)
    params = make_params()
    updates, state = run(lambda: told(injected(**case.hyperparameters)), params)
    expected, _ = run(lambda: told(case.factory(**case.hyperparameters)), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3)
    assert ost.metrics(state)


class Model(nnx.Module):
    """Two layers, to have a nested state."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# Flax 0.12.2 has the graph mode only.
HAS_MODES = "graph" in inspect.signature(nnx.jit).parameters
NNX_MODES = {"graph": {"graph": True}, "tree": {"graph": False}} if HAS_MODES else {}


@every_case
@pytest.mark.parametrize("mode", NNX_MODES or {"graph": {}})
@quick_only(*(f"graph-{name}" for name in FEW[:2]))
def test_works_and_is_read_in_an_nnx_optimizer(case, mode):
    mode = NNX_MODES.get(mode, {})
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param, **mode)

    def loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    @functools.partial(nnx.jit, **mode)
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_fn, **mode)(model, x)
        optimizer.update(model, grads, value=loss)
        return ost.metrics(optimizer, params=nnx.state(model, nnx.Param))

    structure = jax.tree.structure(nnx.state(optimizer))
    for _ in range(3):
        inside = step(model, optimizer, jnp.ones((2, 4)))
    assert jax.tree.structure(nnx.state(optimizer)) == structure
    outside = ost.metrics(optimizer, params=nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(inside, outside, rtol=REORDERED)
    vectors = [k for k in ost.metrics(optimizer) if k.endswith("/per_leaf")]
    for key in vectors:
        assert key.replace("per_leaf", "layers/1/kernel") in inside
    chex.assert_tree_all_finite(nnx.state(model))


@every_case
def test_works_and_is_read_in_a_linen_train_state(case):
    params = make_params()
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=case.make())

    def read(state, grads):
        state = state.apply_gradients(grads=grads)
        return ost.metrics(state), ost.metrics(state.opt_state)

    found, expected = jax.eval_shape(read, state, params)
    assert found.keys() == expected.keys()
    assert bool(found) == case.has_state


@every_case
@quick_only(*FEW)
def test_orbax_restores_the_state(case, tmp_path):
    if not case.has_state:  # Orbax refuses to save nothing.
        return
    tx, params = case.make(), make_params()
    _, state = run(case.make, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    chex.assert_trees_all_equal(restored, state)
    assert ost.metrics(restored).keys() == ost.metrics(state).keys()
    survival.count(survival.RESTORES)


def shard(tree, mesh):
    """Kernels over both axes, vectors over one, scalars replicated."""
    specs = {0: (), 1: ("model",), 2: ("data", "model")}
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs[x.ndim]))),
        tree,
    )


# A small difference has the rounding of its parts: their bounds are those of optimized
# code.
SUBTRACT_SQUARES = ost.estimate_noise_scale, ost.when_noisy, ost.scale_by_noise_scale


@every_case
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@quick_only("AxisType.Explicit-clip_by_zscore")
def test_sharded_parameters_give_the_same_and_keep_their_sharding(
    case, axis_type, request
):
    if case.factory in SUBTRACT_SQUARES:
        request.getfixturevalue("optimized")
    tx, params = case.make(), make_params()
    expected, expected_state = run(case.make, params)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharded = shard(params, mesh)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p))
        state, updates = tx.init(sharded), None
        for seed in range(4):
            grads = shard(make_grads(seed, params), mesh)
            updates, state = step(grads, state, sharded)
    close = functools.partial(
        chex.assert_trees_all_close, rtol=case.tolerance, atol=case.tolerance / 100
    )
    close(updates, expected)
    close(state, expected_state)
    for tree in (updates, *(f for f in state if jax.tree.structure(f) == PARAMS)):
        for leaf, like in zip(*map(jax.tree.leaves, (tree, sharded)), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


PARAMS = jax.tree.structure(make_params())


@every_case
def test_optax_places_the_arrays_of_a_state_like_the_parameters(case):
    """``optax.tree.map_params``, by which states are split as the parameters are."""
    if case.factory is ost.with_loss_probe:
        return  # This row renames the parameters.
    specs = {
        "dense": {
            "bias": PartitionSpec("model"),
            "kernel": PartitionSpec("data", "model"),
        },
        "scale": PartitionSpec("none"),
    }
    params = make_params()
    spec_of = {
        leaf.shape: spec
        for leaf, spec in zip(*map(jax.tree.leaves, (params, specs)), strict=True)
    }
    tx = case.make()
    state = jax.eval_shape(tx.init, params)
    placed = optax.tree.map_params(
        tx,
        lambda leaf, spec: (leaf, spec),
        state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )
    pairs = [x for x in jax.tree.leaves(placed, is_leaf=is_pair) if is_pair(x)]
    assert all(spec == spec_of[leaf.shape] for leaf, spec in pairs)
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (16, 8)]
    assert len(matrices) == sum(leaf.shape == (16, 8) for leaf, _ in pairs)


def is_pair(node):
    return isinstance(node, tuple) and len(node) == 2 and hasattr(node[0], "shape")


@every_case
@quick_only("spike_guard")
def test_norms_are_summed_over_the_axes_of_shard_map_that_shard_a_leaf(case):
    """And what other axes hold copies of counts once."""
    if not case.takes_axis_name:
        return
    params = make_params()
    expected, expected_state = run(case.make, params)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx, replicated = case.make(axis_name=("data", "model")), PartitionSpec()
    sharded = {
        "dense": {
            "bias": PartitionSpec("model"),
            "kernel": PartitionSpec("data", "model"),
        },
        "scale": replicated,
    }
    state = case.make().init(params)
    of_state = replicated
    if case.factory is ost.branch_on_spike:  # It keeps a copy of the parameters.
        of_state = optax.tree.map_params(
            tx,
            lambda _, spec: spec,
            state,
            sharded,
            transform_non_params=lambda _: replicated,
        )
    step = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(sharded, of_state, sharded),
            out_specs=(sharded, of_state),
        )
    )
    for seed in range(4):
        updates, state = step(make_grads(seed, params), state, params)
    chex.assert_trees_all_close(updates, expected, rtol=REORDERED)
    # A deviation is some 1e-3 of what it is the deviation of. The noise scale is made
    # of differences, a tenth of what they are taken from.
    rtol = REORDERED * (10 if case.factory is ost.estimate_noise_scale else 1)
    chex.assert_trees_all_close(state, expected_state, rtol=rtol, atol=1e-6)


@every_case
def test_every_argument_is_documented(case):
    documented = inspect.getdoc(case.factory)
    for name in inspect.signature(case.factory).parameters:
        assert re.search(rf"^  {name}: ", documented, re.MULTILINE), name
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in documented


def annotated(value: Any) -> bool:
    hints = inspect.get_annotations(value)
    return set(inspect.signature(value).parameters) | {"return"} == set(hints)


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_every_public_function_is_annotated(name):
    assert annotated(public_functions()[name])

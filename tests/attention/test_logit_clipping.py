"""Heads above the limit land on it; nothing else moves by a bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from layouts import DIM, HEADS, LAYOUTS, WIDTH, draw, fused, fused_params, separate
from meshes import place

import optax_stability as ost
from optax_stability import AttentionHeads

# A factor, a root and a difference in float32.
RTOL = 2e-5
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def bounds(heads_of, params):
    def bound(each):
        return ost.attention_logit_bound(**each._asdict())

    return {
        name: jax.vmap(bound)(each) if each.query.ndim == 4 else bound(each)
        for name, each in heads_of(params).items()
    }


def middle(found):
    """A limit that half of the heads are above."""
    return float(np.median(np.concatenate([np.ravel(x) for x in found.values()])))


def step(tx, updates, params, **extra_args):
    return jax.jit(tx.update)(updates, tx.init(params), params, **extra_args)


def small(params):
    return jax.tree.map(lambda x: 1e-2 * draw(9, *x.shape), params)


@every_layout
def test_heads_above_the_limit_land_on_it_and_others_stay(layout):
    heads_of, params = LAYOUTS[layout]
    updates = small(params)
    before = bounds(heads_of, optax.apply_updates(params, updates))
    limit = middle(before)
    tx = ost.clip_attention_logits(optax.identity(), limit, heads_of=heads_of)
    clipped, state = step(tx, updates, params)
    after = bounds(heads_of, optax.apply_updates(params, clipped))
    above = jax.tree.map(lambda x: x > limit, before)
    count = sum(int(x.sum()) for x in above.values())
    assert count == sum(x.size for x in above.values()) // 2
    for name, hot in above.items():
        np.testing.assert_allclose(after[name][hot], limit, rtol=RTOL)
        np.testing.assert_allclose(after[name][~hot], before[name][~hot], rtol=1e-6)
    found = state.metrics
    assert found["attention_clip/heads"] == count
    assert found["attention_clip/steps"] == 1
    largest = max(float(x.max()) for x in before.values())
    np.testing.assert_allclose(found["attention_clip/largest"], largest, rtol=1e-6)


@every_layout
def test_entries_of_no_clipped_head_pass_bit_for_bit(layout):
    heads_of, params = LAYOUTS[layout]
    updates = small(params)
    before = bounds(heads_of, optax.apply_updates(params, updates))
    limit = middle(before)
    tx = ost.clip_attention_logits(optax.identity(), limit, heads_of=heads_of)
    clipped, _ = step(tx, updates, params)
    # An entry belongs to a clipped head if its mark does.
    marks = jax.tree.map(
        lambda x: np.arange(1, x.size + 1, dtype=np.float32).reshape(x.shape), params
    )
    hot = set()
    for name, heads in heads_of(marks).items():
        above = np.asarray(before[name] > limit)[..., None, :, None]
        hot |= set(np.ravel(np.where(above, heads.query, 0)))
        if heads.key.shape == heads.query.shape:
            hot |= set(np.ravel(np.where(above, heads.key, 0)))
    changed = jax.tree.map(lambda a, b: np.asarray(a) != b, clipped, updates)
    assert any(x.any() for x in jax.tree.leaves(changed))
    matrices = jax.tree.map(lambda x: x.ndim > 1, params)
    for x, mark, wide in zip(
        *map(jax.tree.leaves, (changed, marks, matrices)), strict=True
    ):
        assert not wide or set(mark[x]) <= hot


def test_only_queries_and_keys_and_their_biases_are_touched():
    params = fused_params()
    updates = small(params)
    tx = ost.clip_attention_logits(optax.identity(), 1e-3, heads_of=fused)
    clipped, _ = step(tx, updates, params)
    chex.assert_trees_all_equal(clipped["norm"], updates["norm"])
    chex.assert_trees_all_equal(clipped["out"], updates["out"])
    for name in ("kernel", "bias"):
        moved = np.asarray(clipped["qkv"][name]) != updates["qkv"][name]
        moved = moved.reshape(-1, HEADS, 3, DIM)
        assert moved[:, :, :2].all()
        assert not moved[:, :, 2].any()


def test_the_factor_is_that_of_the_paper():
    """√(limit/S) for queries and keys after the step, from measured logits."""
    heads_of, params = LAYOUTS["separate"]
    updates = small(params)
    logits = {"block": np.array([25.0, -400.0, 99.0, 101.0], np.float32)}
    tx = ost.clip_attention_logits(
        optax.identity(), heads_of=heads_of, measured="attention_logits"
    )
    clipped, state = step(tx, updates, params, attention_logits=logits)
    factor = np.array([1, 100 / 400, 1, 100 / 101]) ** 0.5
    for name in ("q", "k"):
        new = (params[name] + updates[name]).reshape(WIDTH, HEADS, DIM)
        found = (params[name] + clipped[name]).reshape(WIDTH, HEADS, DIM)
        np.testing.assert_allclose(found, new * factor[:, None], rtol=1e-5, atol=1e-6)
    assert state.metrics["attention_clip/largest"] == 400
    assert state.metrics["attention_clip/heads"] == 2


def test_shared_keys_stay_and_their_queries_take_the_whole_factor():
    heads_of, params = LAYOUTS["grouped"]
    zeros = jax.tree.map(np.zeros_like, params)
    logits = {"block": np.array([50.0, 400.0, 50.0, 50.0], np.float32)}
    tx = ost.clip_attention_logits(optax.identity(), heads_of=heads_of, measured="s")
    clipped, _ = step(tx, zeros, params, s=logits)
    np.testing.assert_array_equal(clipped["k"], zeros["k"])
    query = params["q"].reshape(WIDTH, HEADS, DIM)
    expected = np.where(np.arange(HEADS)[:, None] == 1, -0.75 * query, 0)
    np.testing.assert_allclose(
        np.reshape(clipped["q"], query.shape), expected, rtol=1e-6
    )


def test_the_logits_of_the_same_inputs_land_on_the_limit():
    params = fused_params()

    def largest(params):
        (heads,) = fused(params).values()
        x = draw(8, 32, WIDTH)
        q = jnp.einsum("nw,whd->nhd", x, heads.query) + heads.query_bias
        k = jnp.einsum("nw,whd->nhd", x, heads.key) + heads.key_bias
        return jnp.abs(jnp.einsum("nhd,mhd->hnm", q, k)).max((1, 2)) / DIM**0.5

    before = largest(params)
    limit = float(np.median(before))
    tx = ost.clip_attention_logits(
        optax.identity(), limit, heads_of=fused, measured="logits"
    )
    zeros = jax.tree.map(np.zeros_like, params)
    clipped, _ = step(tx, zeros, params, logits={"block": before})
    after = largest(optax.apply_updates(params, clipped))
    np.testing.assert_allclose(after, np.minimum(before, limit), rtol=RTOL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_ignored(bad):
    heads_of, params = LAYOUTS["separate"]
    updates = small(params)
    tx = ost.clip_attention_logits(optax.identity(), heads_of=heads_of, measured="s")
    logits = {"block": np.array([bad, 20.0, bad, 30.0], np.float32)}
    clipped, state = step(tx, updates, params, s=logits)
    chex.assert_trees_all_equal(clipped, updates)
    assert state.metrics["attention_clip/largest"] == 30
    assert state.metrics["attention_clip/steps"] == 0


def test_a_weight_that_is_not_finite_stops_no_other_head():
    heads_of, params = LAYOUTS["separate"]
    params = {name: x.copy() for name, x in params.items()}
    params["q"][0, 0] = np.nan
    tx = ost.clip_attention_logits(optax.identity(), 1e-3, heads_of=heads_of)
    clipped, state = step(tx, jax.tree.map(np.zeros_like, params), params)
    assert state.metrics["attention_clip/heads"] == HEADS - 1
    chex.assert_tree_all_finite(clipped)


def test_while_no_head_is_above_the_limit_nothing_differs():
    params = fused_params()
    inner = ost.safe_adamw(0.1)
    tx = ost.clip_attention_logits(inner, 1e9, heads_of=fused)
    found, state = step(tx, small(params), params)
    expected, inner_state = step(inner, small(params), params)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal(state.inner_state, inner_state)


@pytest.mark.parametrize("bad", [np.nan, 1e6])
def test_inside_the_guard_a_skipped_step_changes_nothing(bad):
    params = fused_params()
    inner = ost.clip_attention_logits(ost.safe_adamw(0.1), 1.0, heads_of=fused)
    tx = ost.skip_spikes(inner, grad_norm=ost.thresholds.constant(100.0))
    state, grads = tx.init(params), small(params)
    _, state = jax.jit(tx.update)(grads, state, params)
    assert state.metrics["skip/skipped"] == 0
    assert ost.metrics(state)["attention_clip/heads"] == HEADS
    poisoned = jax.tree.map(lambda x: x * bad, grads)
    updates, later = jax.jit(tx.update)(poisoned, state, params)
    assert later.metrics["skip/skipped"] == 1
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, params))
    chex.assert_trees_all_equal(later.inner_state, state.inner_state)


def test_bfloat16_lands_within_half_a_percent():
    heads_of, params = LAYOUTS["separate"]
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    tx = ost.clip_attention_logits(optax.identity(), 1.0, heads_of=heads_of)
    updates = jax.tree.map(jnp.zeros_like, narrow)
    clipped, _ = step(tx, updates, narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    after = bounds(heads_of, optax.apply_updates(narrow, clipped))
    np.testing.assert_allclose(after["block"], 1.0, rtol=5e-3)


def test_the_parameters_of_many_steps_stay_below_the_limit():
    """Updates that only ever enlarge the logits."""
    heads_of, params = LAYOUTS["separate"]
    tx = ost.clip_attention_logits(optax.identity(), 30.0, heads_of=heads_of)
    state = tx.init(params)
    for _ in range(20):
        grow = jax.tree.map(lambda x: 0.1 * x, params)
        updates, state = jax.jit(tx.update)(grow, state, params)
        params = optax.apply_updates(params, updates)
        assert np.all(bounds(heads_of, params)["block"] <= 30.0 * (1 + RTOL))
    assert state.metrics["attention_clip/steps"] > 10


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_do_what_one_does(kind):
    def heads_of(params):
        return {"block": AttentionHeads(params["q"], params["k"])}

    params = {"q": draw(0, WIDTH, HEADS, DIM), "k": draw(1, WIDTH, HEADS, DIM)}
    updates = small(params)
    limit = middle(bounds(heads_of, optax.apply_updates(params, updates)))
    tx = ost.clip_attention_logits(optax.identity(), limit, heads_of=heads_of)
    expected, _ = step(tx, updates, params)
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        given = [
            {k: place(x, mesh, "fsdp", "model") for k, x in tree.items()}
            for tree in (updates, params)
        ]
        found, _ = step(tx, *given)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    for name, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(given[1][name].sharding, leaf.ndim)


def test_no_program_of_an_accelerator_has_a_condition():
    params = fused_params()
    tx = ost.clip_attention_logits(ost.safe_adamw(0.1), heads_of=fused)
    lowered = jax.jit(tx.update).trace(params, tx.init(params), params)
    for platform in ("cuda", "tpu"):
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" not in text
        assert "stablehlo.case" not in text
        assert "callback" not in text


@pytest.mark.parametrize("limit", [0, -1.0, float("inf")])
def test_a_limit_that_is_none_raises(limit):
    with pytest.raises(ValueError, match=r"limit=.* is outside \(0, inf\)"):
        ost.clip_attention_logits(optax.identity(), limit, heads_of=separate)


def test_missing_inputs_raise():
    heads_of, params = LAYOUTS["separate"]
    tx = ost.clip_attention_logits(optax.identity(), heads_of=heads_of, measured="s")
    state = tx.init(params)
    with pytest.raises(ValueError, match="pass params to update"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"measured='s'.* needs the largest logits"):
        tx.update(params, state, params)
    for wrong in ({"block": np.ones(3)}, {"other": np.ones(HEADS)}, np.ones(HEADS)):
        with pytest.raises(ValueError, match="but the heads have"):
            tx.update(params, state, params, s=wrong)

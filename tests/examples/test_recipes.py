"""The recipes in examples/recipes.py do what they say."""

import heads
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest
import recipes

import optax_stability as ost

ROUNDING = 1e-5


def run(tx, trees, params=None):
    """The updates of each step, and the last state."""
    state, out = tx.init(trees[0] if params is None else params), []
    step = jax.jit(lambda g, s: tx.update(g, s, params))
    for grads in trees:
        updates, state = step(grads, state)
        out.append(updates)
    return out, state


def with_norms(norms):
    return [{"w": np.array([norm, 0.0], np.float32)} for norm in norms]


def test_clipping_begins_after_the_warmup():
    clip = ost.clip_by_threshold(ost.thresholds.constant(1.0))
    updates, _ = run(recipes.clip_after_warmup(clip, 3), with_norms([5.0] * 5))
    assert [float(u["w"][0]) for u in updates] == [5.0, 5.0, 5.0, 1.0, 1.0]


def test_unit_wise_agc_clips_units_and_leaves_a_nan_out():
    params = {"w": np.array([[1.0, 10.0], [1.0, 10.0]], np.float32)}
    grads = {"w": np.array([[1.0, 1.0], [1.0, 1.0]], np.float32)}
    bad = {"w": grads["w"].copy()}
    bad["w"][0, 0] = np.nan
    (clipped, left_out), _ = run(recipes.unit_wise_agc(0.01), [grads, bad], params)
    norms = np.linalg.norm(clipped["w"], axis=0)
    expected = 0.01 * np.linalg.norm(params["w"], axis=0)
    np.testing.assert_allclose(norms, expected, rtol=ROUNDING)
    np.testing.assert_array_equal(left_out["w"], 0.0)


class ReferenceAdaGC:
    """AdaGC in float64, from the equations of arXiv:2502.11034."""

    def __init__(self, max_norm, warmup, ratio=1.05, decay=0.98):
        self.max_norm, self.warmup = max_norm, warmup
        self.ratio, self.decay = ratio, decay
        self.step, self.level = 0, None

    def __call__(self, leaves):
        norms = np.array([np.linalg.norm(leaf) for leaf in leaves])
        if self.step < self.warmup:
            factors = np.full_like(norms, min(1, self.max_norm / np.linalg.norm(norms)))
            clipped = factors * norms
            level = clipped if self.step == 0 else np.minimum(self.level, clipped)
        else:
            factors = np.minimum(self.ratio * self.level / norms, 1)
            level = self.decay * self.level + (1 - self.decay) * factors * norms
        self.step, self.level = self.step + 1, level
        return [by * leaf for by, leaf in zip(factors, leaves, strict=True)]


def test_adagc_follows_the_paper():
    rng = np.random.default_rng(0)
    trees = [
        {"a": rng.normal(size=3).astype("f4"), "b": 3 * rng.normal(size=9).astype("f4")}
        for _ in range(120)
    ]
    reference = ReferenceAdaGC(1.0, 10)
    expected = [reference([tree["a"], tree["b"]]) for tree in trees]
    updates, _ = run(recipes.adagc(1.0, 10, relearn_after=None), trees)
    for found, (a, b) in zip(updates, expected, strict=True):
        np.testing.assert_allclose(found["a"], a, rtol=1e-4)
        np.testing.assert_allclose(found["b"], b, rtol=1e-4)


def test_the_learning_rate_falls_after_a_spike_and_comes_back():
    threshold = ost.thresholds.window_median(3.0, window=8)
    tx = recipes.lower_after_spike(optax.sgd(1.0), threshold, recovery_steps=20)
    norms = [1.0] * 10 + [50.0] + [1.0] * 30
    updates, _ = run(tx, with_norms(norms))
    steps = -np.array([u["w"][0] for u in updates])
    np.testing.assert_allclose(steps[:10], 1.0, rtol=ROUNDING)
    assert steps[10] == pytest.approx(25.0, rel=ROUNDING)
    assert steps[11] == pytest.approx(0.5 * 2 ** (1 / 20), rel=ROUNDING)
    assert (np.diff(steps[11:31]) > 0).all()
    np.testing.assert_allclose(steps[31:], 1.0, rtol=ROUNDING)


def test_the_learning_rate_has_a_floor_and_ignores_nan():
    tx = recipes.lower_after_spike(
        optax.sgd(1.0), ost.thresholds.constant(1.0), recovery_steps=10
    )
    norms = [9.0] * 20 + [np.nan]
    _, state = run(tx, with_norms(norms))
    assert float(state.scale) == pytest.approx(0.05)
    assert jnp.isfinite(state.scale)


# --- Muon ------------------------------------------------------------------------

BLOCKS = {
    "blocks": {"kernel": np.eye(4, 3, dtype=np.float32), "bias": np.ones(3)},
    "tokens": {"embedding": np.ones((5, 4), np.float32)},
}


def muon_leaves(state):
    """The leaves for which Muon keeps a momentum."""
    (found,) = (
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda node: isinstance(node, optax.contrib.MuonState)
        )
        if isinstance(node, optax.contrib.MuonState)
    )
    return ost.leaf_names(found.mu)


def test_muon_has_the_matrices_inside_the_blocks_alone():
    params = jax.tree.map(jnp.float32, BLOCKS)
    assert muon_leaves(recipes.muon(0.1).init(params)) == ["blocks/kernel"]
    # What optax would do by itself.
    everything = optax.contrib.muon(0.1).init(params)
    assert muon_leaves(everything) == ["blocks/kernel", "tokens/embedding"]


def test_guarded_muon_survives_a_nan_and_clips_in_front():
    params = jax.tree.map(jnp.float32, BLOCKS)
    grads = optax.tree.ones_like(params)
    bad = optax.tree.full_like(params, np.nan)
    tx = recipes.guarded_muon(0.1, weight_decay=0.1)
    state, step = tx.init(params), jax.jit(tx.update)
    for each in (grads, bad, grads):
        updates, state = step(each, state, params, value=1.0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    metrics = ost.metrics(state)
    assert metrics["skip/nan_total"] == 1
    # The clip sees the gradient, not the orthogonal update.
    assert metrics["clip/norm"] == pytest.approx(float(optax.tree.norm(grads)))


def test_muons_updates_are_as_large_as_those_of_adam():
    """So that one learning rate serves both; the warm-up of the momentum aside."""
    params = {"kernel": jnp.zeros((32, 32))}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (32, 32))}
    tx = recipes.muon(1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    rms = float(jnp.sqrt(jnp.mean(jnp.square(updates["kernel"]))))
    assert rms == pytest.approx(0.2, rel=0.3)


def astray(tx, factor):
    """Steps after a spike in which the update points elsewhere than without it."""
    params = {"kernel": jnp.zeros((8, 8))}
    noise = jax.random.normal(jax.random.key(0), (260, 8, 8))
    grads = jax.random.normal(jax.random.key(1), (8, 8)) + 0.3 * noise

    def step(state, grads):
        updates, state = tx.update({"kernel": grads}, state, params, value=1.0)
        return state, updates["kernel"].ravel()

    run = jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1])
    spiked = grads.at[40].set(factor * jax.random.normal(jax.random.key(2), (8, 8)))
    with_it, without = run(spiked), run(grads)
    cosine = jnp.sum(with_it * without, 1) / (
        jnp.linalg.norm(with_it, axis=1) * jnp.linalg.norm(without, axis=1)
    )
    return int(jnp.sum(~(cosine > 0.9)[40:]))


def test_muons_momentum_remembers_a_spike_that_the_guard_leaves_out():
    assert astray(recipes.muon(1.0), 1e4) > 100
    assert astray(recipes.guarded_muon(1.0), 1e4) < 20


def test_a_clip_behind_muon_makes_the_rate_depend_on_the_width():
    def norms(tx, width):
        grads = {"kernel": jax.random.normal(jax.random.key(0), (width, width))}
        updates, _ = tx.update(grads, tx.init(grads), grads)
        return float(optax.tree.norm(updates))

    alone = recipes.muon(1.0, consistent_rms=None)
    behind = optax.chain(alone, optax.clip_by_global_norm(1.0))
    for width in (16, 64):
        assert norms(alone, width) == pytest.approx(width**0.5, rel=0.3)
        assert norms(behind, width) == pytest.approx(1.0)


def test_muon_clip_keeps_the_logits_of_every_head_below_the_limit():
    """Whatever the learning rate, and though a guarded NaN comes in between."""
    width, heads, dim = 8, 2, 4

    def heads_of(params):
        query, key = (params[x].reshape(width, heads, dim) for x in ("query", "key"))
        return {"block": ost.AttentionHeads(query, key)}

    def random(seed):
        draw = np.random.default_rng(seed).standard_normal
        return {x: draw((width, width), np.float32) for x in ("query", "key", "out")}

    params, limit = random(0), 40.0
    tx = recipes.muon_clip(0.3, heads_of, limit)
    plain = ost.spike_guard(optax.chain(ost.clip_by_zscore(), optax.contrib.muon(0.3)))
    step, known = jax.jit(tx.update), jax.jit(plain.update)
    state, expected, free = tx.init(params), plain.init(params), params
    for seed in range(1, 9):
        grads = random(seed)
        if seed == 5:
            grads["out"][0, 0] = np.nan
        before = params
        updates, state = step(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        plain_updates, expected = known(grads, expected, free, value=1.0)
        free = optax.apply_updates(free, plain_updates)
        (each,) = heads_of(params).values()
        bound = ost.attention_logit_bound(each.query, each.key)
        assert np.all(bound <= limit * (1 + ROUNDING))
        if seed == 5:
            jax.tree.map(np.testing.assert_array_equal, params, before)
        np.testing.assert_array_equal(params["out"], free["out"])
    assert ost.metrics(state)["attention_clip/steps"] >= 4
    (each,) = heads_of(free).values()
    assert ost.attention_logit_bound(each.query, each.key).max() > limit


def test_the_fused_heads_of_the_trainer_are_those_it_attends_with():
    params = {
        "blocks": {
            0: {
                "attention_norm": {"scale": np.ones(4), "bias": np.zeros(4)},
                "query_key_value": {
                    "kernel": np.arange(48.0).reshape(4, 12),
                    "bias": np.arange(12.0),
                },
            }
        },
        "out": np.ones(2),
    }
    (name,) = found = heads.fused_heads(params, 2)
    assert name == "blocks/0"
    # Columns: head 0 with query, key, value of size 2, then head 1.
    assert found[name].query[0].tolist() == [[0, 1], [6, 7]]
    assert found[name].key[0].tolist() == [[2, 3], [8, 9]]
    assert found[name].query_bias.tolist() == [[0, 1], [6, 7]]
    assert found[name].key_bias.tolist() == [[2, 3], [8, 9]]
    assert heads.fused_heads({"w": np.ones(3)}, 2) == {}


def test_the_bound_costs_less_than_a_thousandth_of_a_step():
    """FLOPs of the size "small", with a measurement every ten steps."""
    size = model.SIZES["small"]
    width, dim = size.width, size.width // size.heads
    weight = jax.ShapeDtypeStruct((width, size.heads, dim), jnp.float32)
    vector = jax.ShapeDtypeStruct((width,), jnp.float32)

    def bound(query, key, scale, bias):
        return ost.attention_logit_bound(query, key, scale=scale, bias=bias)

    lowered = jax.jit(bound).lower(weight, weight, vector, vector)
    counted = lowered.cost_analysis()
    assert counted is not None
    parameters = 12 * size.layers * width**2
    step = size.flops_per_token(parameters) * 8 * size.context
    share = size.layers * counted["flops"] / 10 / step
    assert 1e-5 < share < 1e-3

"""No logit is above the bound, and where the largest one is known, the bound is it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from meshes import collectives, place

import optax_stability as ost

WIDTH, HEADS, DIM = 24, 4, 6
# Sums of a few dozen float32 products.
RTOL = 1e-5
# How much tr(Pᵏ)^(1/2k) may be above σ₁, with k = 64.
LOOSE = DIM ** (1 / 128)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def head(matrix):
    return jnp.asarray(matrix, jnp.float32)[:, None, :]


def sigma(query, key):
    """σ₁(Q Kᵀ) of each head, by NumPy in float64; heads of key are shared."""
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    return [
        np.linalg.norm(np.float64(query[:, h]) @ np.float64(key[:, h]).T, 2)
        for h in range(query.shape[1])
    ]


# --- closed forms -------------------------------------------------------------------


def test_one_direction():
    """A rank of 1: σ₁ is the product of the lengths, and the bound is exact."""
    u, v, c = draw(0, WIDTH), draw(1, WIDTH), np.array([0.6, 0.8])
    found = ost.attention_logit_bound(head(np.outer(u, c)), head(np.outer(v, c)))
    known = WIDTH * np.linalg.norm(u) * np.linalg.norm(v) / np.sqrt(2)
    np.testing.assert_allclose(found, [known], rtol=RTOL)


def test_directions_that_never_meet():
    eye = np.eye(4)
    found = ost.attention_logit_bound(
        head(eye[:, :2] @ eye[:2]), head(eye[:, 2:] @ eye[2:])
    )
    # Not above what rounding could hide: √(32·2⁻²⁴) of the bound of parallel ones.
    assert 0 <= found[0] <= 2e-3 * np.sqrt(4)


def test_the_worst_case_of_the_trace():
    """Where all singular values are equal the bound is head_dim^(1/128) too large."""
    found = ost.attention_logit_bound(head(np.eye(DIM)), head(np.eye(DIM)))
    np.testing.assert_allclose(found, [DIM**0.5 * LOOSE], rtol=RTOL)


def test_offsets_alone():
    """Weights of 0: the logit is that of the biases."""
    zeros, a, b = (
        jnp.zeros((WIDTH, HEADS, DIM)),
        draw(0, HEADS, DIM),
        draw(1, HEADS, DIM),
    )
    found = ost.attention_logit_bound(zeros, zeros, query_bias=a, key_bias=b)
    np.testing.assert_allclose(
        found, np.abs(np.sum(a * b, axis=1)) / DIM**0.5, rtol=RTOL
    )


def test_the_bias_of_the_norm_is_not_scaled_by_its_scale():
    bias, scale = draw(2, WIDTH), jnp.zeros(WIDTH)
    query, key = draw(0, WIDTH, HEADS, DIM), draw(1, WIDTH, HEADS, DIM)
    found = ost.attention_logit_bound(query, key, scale=scale, bias=bias)
    q, k = (np.einsum("w,whd->hd", bias, x) for x in (query, key))
    np.testing.assert_allclose(
        found, np.abs(np.sum(q * k, axis=1)) / DIM**0.5, rtol=1e-4
    )


def test_rotary_is_the_product_of_both_norms():
    query, key = draw(0, WIDTH, 1, DIM), draw(1, WIDTH, 1, DIM)
    found = ost.attention_logit_bound(query, key, rotary=True)
    norms = [np.linalg.norm(np.float64(x[:, 0]), 2) for x in (query, key)]
    known = WIDTH * np.prod(norms) / DIM**0.5
    assert known * (1 - RTOL) <= found[0] <= known * LOOSE**2 * (1 + RTOL)


def test_shared_keys_are_those_of_successive_heads():
    query, key = draw(0, WIDTH, HEADS, DIM), draw(1, WIDTH, 2, DIM)
    found = ost.attention_logit_bound(query, key)
    repeated = ost.attention_logit_bound(query, np.repeat(key, 2, axis=1))
    np.testing.assert_allclose(found, repeated, rtol=RTOL)
    known = WIDTH * np.array(sigma(query, key)) / DIM**0.5
    assert np.all(found >= known * (1 - RTOL))
    assert np.all(found <= known * LOOSE * (1 + RTOL))


# --- the largest logit of the worst inputs ------------------------------------------


def norm(x, scale, bias, centred):
    """A layer norm, or an RMS norm, without ε."""
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True)) * scale + bias


def rotate(x, position):
    """Rotary embeddings: each pair of channels, by its own angle."""
    half = x.shape[-1] // 2
    angle = position * 0.3 ** np.arange(half)
    first, second = x[..., :half], x[..., half:]
    turned = [
        first * np.cos(angle) - second * np.sin(angle),
        first * np.sin(angle) + second * np.cos(angle),
    ]
    return np.concatenate(turned, axis=-1)


def worst_inputs(query, key):
    """The singular vectors of each head, which RMS norm leaves where they are."""
    pairs = [np.linalg.svd(query[:, h] @ key[:, h].T) for h in range(query.shape[1])]
    return np.concatenate([[u[:, 0], v[0]] for u, _, v in pairs])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    biased=st.booleans(),
    centred=st.booleans(),
    rotary=st.booleans(),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    rank=st.integers(1, DIM),
)
@example(seed=3988, biased=False, centred=False, rotary=False, size=1e-12, rank=1)
def test_no_logit_is_above_the_bound(seed, biased, centred, rotary, size, rank):
    rng = np.random.default_rng(seed)

    def weights(heads):
        flat = rng.standard_normal((WIDTH, heads, rank))
        return flat @ rng.standard_normal((rank, DIM)) * rng.lognormal(size=DIM)

    kv_heads = int(rng.choice([1, 2, HEADS]))
    query, key = weights(HEADS) * size, weights(kv_heads) / size
    scale, bias = rng.lognormal(size=WIDTH), np.zeros(WIDTH)
    q0, k0 = np.zeros((HEADS, DIM)), np.zeros((kv_heads, DIM))
    if biased:
        bias = rng.standard_normal(WIDTH)
        q0, k0 = rng.standard_normal(q0.shape), rng.standard_normal(k0.shape)
        q0, k0 = q0 * size, k0 / size
    named = {"scale": scale, "bias": bias, "query_bias": q0, "key_bias": k0}
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in named.items()}
    found = ost.attention_logit_bound(
        jnp.asarray(query, jnp.float32),
        jnp.asarray(key, jnp.float32),
        rotary=rotary,
        **arrays,
    )
    repeated = np.repeat(key, HEADS // kv_heads, axis=1)
    scaled = query * scale[:, None, None], repeated * scale[:, None, None]
    x = np.concatenate([rng.standard_normal((64, WIDTH)), worst_inputs(*scaled)])
    x = norm(x, scale, bias, centred)
    q = np.einsum("nw,whd->nhd", x, query) + q0
    k = np.einsum("nw,whd->nhd", x, repeated) + np.repeat(k0, HEADS // kv_heads, 0)
    logits = [
        np.abs(np.einsum("nhd,mhd->hnm", rotate(q, position), k)).max((1, 2))
        for position in (range(4) if rotary else [0])
    ]
    largest = np.max(logits, axis=0) / DIM**0.5
    assert np.all(np.asarray(found) >= largest * (1 - RTOL)), (found, largest)


def test_an_input_reaches_the_bound_of_an_rms_norm():
    query, key = draw(0, WIDTH, HEADS, DIM), draw(1, WIDTH, HEADS, DIM)
    x = norm(worst_inputs(query, key), 1, 0, centred=False)
    q, k = (np.einsum("nw,whd->nhd", x, each) for each in (query, key))
    largest = np.abs(np.einsum("nhd,mhd->hnm", q, k)).max((1, 2)) / DIM**0.5
    found = ost.attention_logit_bound(query, key)
    assert np.all(found <= largest * LOOSE * (1 + RTOL))


# --- edge cases ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-18, 1e18])
def test_large_and_small_weights_neither_overflow_nor_vanish(size):
    query, key = draw(0, WIDTH, HEADS, DIM), draw(1, WIDTH, HEADS, DIM)
    found = ost.attention_logit_bound(query * np.float32(size), key)
    usual = ost.attention_logit_bound(query, key)
    np.testing.assert_allclose(found, size * usual, rtol=RTOL)


def test_a_weight_that_is_not_finite_concerns_its_head_alone():
    query, key = draw(0, WIDTH, HEADS, DIM), draw(1, WIDTH, HEADS, DIM)
    usual = ost.attention_logit_bound(query, key)
    query[3, 2, 1] = np.nan
    found = ost.attention_logit_bound(query, key)
    assert np.isnan(found).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(found[:2], usual[:2])


def test_bfloat16_weights_are_measured_in_float32():
    query, key = draw(0, WIDTH, HEADS, DIM), draw(1, WIDTH, HEADS, DIM)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (query, key)]
    wide = [x.astype(jnp.float32) for x in narrow]
    found = ost.attention_logit_bound(*narrow)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, ost.attention_logit_bound(*wide))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": draw(0, WIDTH, DIM)}, r"query has the shape \(24, 6\), but must be"),
        ({"key": draw(0, WIDTH, HEADS, 5)}, "width and head_dim must be the same"),
        ({"key": draw(0, WIDTH, 3, DIM)}, "key must divide those of query"),
        ({"scale": draw(0, 5)}, r"scale has the shape \(5,\), but must be \(24,\)"),
        ({"key_bias": draw(0, DIM)}, r"key_bias has the shape \(6,\), but must be"),
    ],
)
def test_shapes_that_do_not_belong_together_raise(change, message):
    usual = {"query": draw(0, WIDTH, HEADS, DIM), "key": draw(1, WIDTH, HEADS, DIM)}
    with pytest.raises(ValueError, match=message):
        ost.attention_logit_bound(**usual | change)


# --- eight devices ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_give_the_same_and_send_only_small_matrices(kind):
    query, key, bias = draw(0, 24, 4, 6), draw(1, 24, 2, 6), draw(2, 24)
    known = ost.attention_logit_bound(query, key, scale=bias, bias=bias)
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        given = [place(x, mesh, "fsdp", "model") for x in (query, key)]
        replicated = place(bias, mesh)
        bound = jax.jit(
            lambda q, k, b: ost.attention_logit_bound(q, k, scale=b, bias=b)
        )
        compiled = bound.lower(*given, replicated).compile()
        found = compiled(*given, replicated)
    np.testing.assert_allclose(found, known, rtol=RTOL)
    sent = [shape for _, shapes in collectives(compiled) for shape in shapes]
    assert max(np.prod(shape, dtype=int) for shape in sent) <= 4 * 6 * 6, sent


def test_the_logits_of_complex_weights_are_bounded_by_their_moduli():
    rng = np.random.default_rng(0)
    shape = (6, 2, 3)
    query, key = rng.standard_normal((2, *shape)) + 1j * rng.standard_normal(
        (2, *shape)
    )
    x = rng.standard_normal((500, 6))
    x *= 6**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    q, k = (np.einsum("nw,whd->nhd", x, weight) for weight in (query, key))
    largest = np.abs(np.einsum("nhd,mhd->hnm", q, k.conj())).max((1, 2)) / 3**0.5
    bound = ost.attention_logit_bound(query.astype("c8"), key.astype("c8"))
    assert np.all(largest <= bound)
    real = ost.attention_logit_bound(abs(query).astype("f4"), abs(key).astype("f4"))
    np.testing.assert_allclose(bound, real, rtol=RTOL)

"""Norms of single examples' gradients, against all of these gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full, quick_only

from optax_stability._gradients import _norm_taps

# Sums of a few hundred products of both signs, each rounded to 2⁻²⁴ of its size.
RTOL = 1e-5
B = 4


def draw(seed, *shape):
    # NumPy's, which need not be compiled for every shape.
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def draw_ids(words, *shape):
    return jnp.asarray(np.random.default_rng(0).integers(words, size=shape))


def pull(function, *arguments, along):
    """Cotangents of all arguments for that of the result."""

    @jax.jit
    def cotangents(arguments, along):
        return jax.vjp(function, *arguments)[1](along)

    return cotangents(arguments, along)


def squares_of(parts):
    """Squared norms along axis 0, in float64."""
    parts = np.asarray(parts, np.float64)
    return np.square(parts).reshape(len(parts), -1).sum(1)


def dense_parts(x, g):
    """Weight gradients of all examples, in float64."""
    x, g = (np.asarray(a, np.float64).reshape(B, -1, a.shape[-1]) for a in (x, g))
    return np.einsum("bti,bto->bio", x, g)


# --- dense ----------------------------------------------------------------------------

INPUTS = {
    "one position": (B, 6),
    "short": (B, 3, 6),
    "long": (B, 40, 6),
    "two axes of positions": (B, 5, 4, 6),
}


@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS.keys())
def test_dense_taps_the_norm_of_every_example(shape):
    x, kernel, g = draw(0, *shape), draw(1, 6, 5), draw(2, *shape[:-1], 5)
    dx, dkernel, squares = pull(_norm_taps.dense, x, kernel, jnp.zeros(B), along=g)
    parts = dense_parts(x, g)
    np.testing.assert_allclose(dx, g @ np.transpose(kernel), rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(dkernel, parts.sum(0), rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(squares, squares_of(parts), rtol=RTOL)
    np.testing.assert_array_equal(_norm_taps.dense(x, kernel, 0.0), jnp.dot(x, kernel))


ROUTES = (
    _norm_taps.gram_route,
    _norm_taps.weights_route,
    _norm_taps._all_at_once,
    _norm_taps._one_by_one,
)


@pytest.mark.parametrize("length", [1, 40])
def test_all_routes_agree(length):
    x, g = draw(0, B, length, 6), draw(1, B, length, 5)
    parts = dense_parts(x, g)
    for total, squares in jax.jit(lambda: [route(x, g, None) for route in ROUTES])():
        np.testing.assert_allclose(total, parts.sum(0), rtol=RTOL, atol=RTOL)
        np.testing.assert_allclose(squares, squares_of(parts), rtol=RTOL)


@pytest.mark.parametrize(
    ("length", "fan_in", "fan_out", "gram"),
    [
        (1, 4096, 4096, True),
        (1, 2, 1, True),
        (64, 1024, 1024, True),
        (256, 384, 1536, False),
        (256, 384, 256, False),
        (1024, 768, 3072, False),
    ],
)
def test_the_route_is_the_one_with_less_to_do(length, fan_in, fan_out, gram):
    assert _norm_taps.prefers_gram(length, fan_in, fan_out) == gram


def test_the_gram_route_never_goes_below_zero():
    # Three positions that cancel but for rounding.
    x, (g, h) = draw(0, 64, 1, 8), draw(1, 2, 64, 1, 8)
    three = jnp.concatenate([x, x, x], 1), jnp.concatenate([g, h, -g - h], 1)
    assert float(jnp.min(_norm_taps.gram_route(*three)[1])) >= 0


# --- bias, scale, embedding -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(B, 6), (B, 2, 3, 6)])
def test_shift_and_scale_tap_the_norm_of_every_example(shape):
    x, g, vector = draw(0, *shape), draw(1, *shape), draw(2, 6)
    for layer, dx, products in (
        (_norm_taps.shift, g, g),
        (_norm_taps.scale, g * vector, g * x),
    ):
        *found, squares = pull(layer, x, vector, jnp.zeros(B), along=g)
        parts = np.asarray(products, np.float64).reshape(B, -1, 6).sum(1)
        np.testing.assert_array_equal(found[0], dx)
        np.testing.assert_allclose(found[1], parts.sum(0), rtol=RTOL, atol=RTOL)
        np.testing.assert_allclose(squares, squares_of(parts), rtol=RTOL)


def embedding_parts(ids, g, words):
    """Gradients of the embedding for all examples, in float64."""
    parts = np.zeros((B, words, g.shape[-1]))
    for b, row in enumerate(np.asarray(ids).reshape(B, -1)):
        np.add.at(parts[b], row, np.asarray(g, np.float64).reshape(B, len(row), -1)[b])
    return parts


@pytest.mark.parametrize("shape", [(B,), (B, 3, 3)])
def test_a_lookup_taps_the_norm_of_every_example(shape):
    ids = draw_ids(3, *shape)  # repeats itself
    y, g = draw(1, *shape, 6), draw(2, *shape, 6)

    def rows(y, tap):
        return _norm_taps.tap_lookup(y, ids, tap)[0]

    dy, squares = pull(rows, y, jnp.zeros(B), along=g)
    np.testing.assert_array_equal(dy, g)
    expected = squares_of(embedding_parts(ids, g, 3))
    np.testing.assert_allclose(squares, expected, rtol=RTOL)


@pytest.mark.parametrize("length", [1, 30])
@quick_only("1")
def test_a_head_that_shares_the_embedding_adds_the_cross_term(length):
    # As many positions in the head as it likes.
    ids = draw_ids(5, B, length)
    embedding, target = draw(1, 5, 6), draw(2, B, length + 1, 5)

    def loss(embedding, tap, ids, target):
        y = jnp.take(embedding, ids, axis=0)
        y, link = _norm_taps.tap_lookup(y, ids, tap)
        hidden = jnp.tanh(jnp.concatenate([y, y[:, :1]], axis=1))
        logits = _norm_taps.dense(hidden, embedding.T, tap)
        logits = _norm_taps.link_to_lookup(logits, hidden, ids, link)
        return jnp.sum((logits - target) ** 2)

    def part(ids, target):
        return jax.grad(loss)(embedding, jnp.zeros(1), ids[None], target[None])

    squares = jax.jit(jax.grad(loss, 1))(embedding, jnp.zeros(B), ids, target)
    parts = jax.jit(jax.vmap(part))(ids, target)
    np.testing.assert_allclose(squares, squares_of(parts), rtol=RTOL)


def test_a_watch_counts_uses_and_measures_their_gradients():
    w, seen = draw(0, 3), jnp.zeros(2)

    def once(w, seen):
        return jnp.sum(_norm_taps.tap_parameter(w, seen) ** 2)

    def twice(w, seen):
        return once(w, seen) + jnp.sum(3 * _norm_taps.tap_parameter(w, seen))

    square = np.sum(4 * np.square(w))
    np.testing.assert_allclose(jax.grad(once, 1)(w, seen), [1, square], rtol=RTOL)
    found = jax.grad(twice, 1)(w, seen)
    np.testing.assert_allclose(found, [2, square + 27], rtol=RTOL)


# --- under transformations ------------------------------------------------------------


def model_loss(parameters, taps, x):
    """Layers that are scanned over, in a checkpoint."""

    @jax.checkpoint
    def layer(x, inputs):
        (kernel, bias, factors), (on_kernel, on_bias, on_factors) = inputs
        y = _norm_taps.dense(x, kernel, on_kernel)
        y = _norm_taps.scale(_norm_taps.shift(y, bias, on_bias), factors, on_factors)
        return jnp.tanh(y), None

    return jnp.sum(jax.lax.scan(layer, x, (parameters, taps))[0] ** 2)


LAYERS = 3
PARAMETERS = draw(0, LAYERS, 6, 6), draw(1, LAYERS, 6), draw(2, LAYERS, 6)
TAPS = (jnp.zeros((LAYERS, B)),) * 3
# Both routes.
X = {length: draw(3, B, length, 6) for length in (2, 40)}


def each_gradient(x):
    """Gradients of all examples."""
    taps = (jnp.zeros((LAYERS, 1)),) * 3

    def part(x):
        return jax.grad(model_loss)(PARAMETERS, taps, x[None])

    return jax.jit(jax.vmap(part))(x)


norms = jax.jit(jax.grad(model_loss, 1))


@pytest.mark.parametrize("length", X)
@quick_only("2")
def test_taps_go_through_jit_scan_and_checkpoint(length):
    found = norms(PARAMETERS, TAPS, X[length])
    for squares, parts in zip(found, each_gradient(X[length]), strict=True):
        for layer in range(LAYERS):
            expected = squares_of(parts[:, layer])
            # Through three layers, each of which rounds.
            np.testing.assert_allclose(squares[layer], expected, rtol=10 * RTOL)


@full
def test_taps_go_through_vmap():
    def squares(x):
        return norms(PARAMETERS, TAPS, x)

    x = jnp.stack([X[40], 2 * X[40]])
    found = jax.jit(jax.vmap(squares))(x)
    for i in range(2):
        for a, b in zip(found, squares(x[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=10 * RTOL)


@pytest.mark.parametrize("length", X)
def test_a_nan_example_is_nan_for_itself_only(length):
    clean = norms(PARAMETERS, TAPS, X[length])
    x = X[length].at[1, 0, 0].set(jnp.nan)
    for found, expected in zip(norms(PARAMETERS, TAPS, x), clean, strict=True):
        assert np.isnan(found[:, 1]).all()
        others = [0, 2, 3]
        np.testing.assert_allclose(found[:, others], expected[:, others], rtol=RTOL)


def test_a_nan_row_of_a_lookup_is_nan_for_its_example_only():
    ids = jnp.zeros((B, 3), int)
    g = jnp.ones((B, 3, 2)).at[1, 0, 0].set(jnp.nan)

    def rows(y, tap):
        return _norm_taps.tap_lookup(y, ids, tap)[0]

    squares = pull(rows, g, jnp.zeros(B), along=g)[1]
    np.testing.assert_array_equal(squares, [18, jnp.nan, 18, 18])


LAYERS_OF_ONES = {
    "dense": (_norm_taps.dense, jnp.ones((2, 1))),
    "shift": (_norm_taps.shift, jnp.ones(1)),
    "scale": (_norm_taps.scale, jnp.ones(1)),
    "lookup": (lambda y, ids, tap: _norm_taps.tap_lookup(y, ids, tap)[0], None),
}


@pytest.mark.parametrize("name", LAYERS_OF_ONES)
def test_norms_of_narrow_layers_are_summed_in_float32(name):
    layer, parameter = LAYERS_OF_ONES[name]
    # In bfloat16 a sum of ones ends at 256, and 1023 is not a number.
    g = jnp.ones((B, 1023, 1), jnp.bfloat16)
    if parameter is None:
        x, parameter = g, jnp.zeros((B, 1023), int)
    else:
        x = jnp.ones((B, 1023, parameter.shape[0]), g.dtype)
        parameter = parameter.astype(g.dtype)
    squares = pull(layer, x, parameter, jnp.zeros(B), along=g)[2]
    assert squares.dtype == jnp.float32
    np.testing.assert_array_equal(squares, x.shape[-1] * 1023.0**2)

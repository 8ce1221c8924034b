"""Norms of trees: no overflow, no contagion, measured once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from optax_stability._core import _norms

# A float32 sum of a few hundred squares, and its root.
ROUNDING = 1e-6
# Central differences in float32: at step 1e-2 rounding leaves 1e-5 of a norm of 5 per
# difference, and the curvature 1/norm adds step²; a factor of 10 is kept.
DIFFERENCES = 1e-3


norms_of = jax.jit(_norms.leaf_norms)
global_norm_of = jax.jit(_norms.global_norm)
join = jax.jit(_norms.join_norms)


def random_tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (), "b": (7,), "c": (3, 5), "d": (2, 3, 4)}
    return {name: rng.standard_normal(s).astype(dtype) for name, s in shapes.items()}


def reference(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.array([np.sqrt(np.sum(x * x)) for x in leaves])


# --- leaf_norms ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_norms_of_leaves_equal_float64_for_every_dtype(dtype):
    tree = jax.tree.map(lambda x: jnp.asarray(10 * x, dtype), random_tree())
    norms = norms_of(tree)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, reference(tree), rtol=ROUNDING)


def test_norms_are_in_leaf_order():
    tree = {"z": jnp.ones(1), "a": [jnp.ones(4), jnp.ones(9)]}
    np.testing.assert_array_equal(norms_of(tree), [2.0, 3.0, 1.0])


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e9, 1e10, 1e20, 1e30, 1e37])
def test_a_tree_of_any_size_is_measured(scale):
    tree = jax.tree.map(lambda x: np.float32(scale) * (1 + np.abs(x)), random_tree())
    np.testing.assert_allclose(norms_of(tree), reference(tree), rtol=ROUNDING)


@pytest.mark.parametrize("exponent", [-61, -1, 1, 31, 32, 33, 61, 100])
def test_a_power_of_two_scales_the_norms_bit_for_bit(exponent):
    tree, factor = random_tree(), np.float32(2.0**exponent)
    scaled = norms_of(jax.tree.map(lambda x: x * factor, tree))
    np.testing.assert_array_equal(scaled, np.asarray(norms_of(tree)) * factor)


@pytest.mark.parametrize("exponent", [-60, 0, 40, 120])
def test_what_is_exact_in_integers_is_exact_at_every_scale(exponent):
    factor = np.float32(2.0**exponent)
    triples = [(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29)]
    leaves = [factor * np.array(sides, np.float32) for *sides, _ in triples]
    expected = [factor * np.float32(length) for *_, length in triples]
    np.testing.assert_array_equal(norms_of(leaves), expected)


@pytest.mark.parametrize("huge", [1e20, 3e38])
def test_an_entry_whose_square_overflows_leaves_other_leaves_as_they_were(huge):
    tree = random_tree()
    tree["b"][3] = huge
    norms = norms_of(tree)
    np.testing.assert_allclose(norms, reference(tree), rtol=ROUNDING)
    np.testing.assert_array_equal(norms[2:], norms_of(random_tree())[2:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_leaf_that_is_not_finite_is_seen_and_disturbs_no_other(bad):
    tree = random_tree()
    tree["c"][1, 1] = bad
    norms = np.asarray(norms_of(tree))
    assert not np.isfinite(norms[2])
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(norms[others], norms_of(random_tree())[others])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_leaf_that_is_not_finite_disturbs_no_other_of_an_unusual_size(bad, scale):
    tree = jax.tree.map(lambda x: (x * scale).astype(np.float32), random_tree())
    expected = norms_of(tree)
    tree["c"][1, 1] = bad
    norms = np.asarray(norms_of(tree))
    assert not np.isfinite(norms[2])
    others = np.array([0, 1, 3])
    np.testing.assert_allclose(norms[others], expected[others], rtol=ROUNDING)


def test_zero_and_empty_leaves_have_norm_zero():
    tree = {"zero": jnp.zeros(3), "none": jnp.zeros((0, 4)), "one": jnp.ones(1)}
    np.testing.assert_array_equal(norms_of(tree), [0.0, 1.0, 0.0])


@pytest.mark.parametrize("tree", [{}, (), None, {"a": None}])
def test_a_tree_without_leaves_has_no_norms(tree):
    norms = norms_of(tree)
    assert (norms.shape, norms.dtype) == ((0,), jnp.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e25])
def test_the_derivative_is_the_direction_of_each_leaf(scale):
    tree = jax.tree.map(lambda x: (x * scale).astype(np.float32), random_tree())
    weights = np.array([1.0, -2.0, 3.0, 0.5], np.float32)
    found = jax.jit(jax.grad(lambda tree: weights @ _norms.leaf_norms(tree)))(tree)
    norms = dict(zip(tree, reference(tree), strict=True))
    expected = {
        name: weight * np.asarray(tree[name], np.float64) / norms[name]
        for name, weight in zip(tree, weights, strict=True)
    }
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING)


def test_the_derivative_agrees_with_differences_forwards_and_backwards():
    check_grads(
        norms_of,
        (random_tree(),),
        order=1,
        atol=DIFFERENCES,
        rtol=DIFFERENCES,
        eps=1e-2,
    )


def test_the_derivative_is_zero_at_a_zero_leaf():
    tree = {"zero": np.zeros(3, np.float32), "one": np.array([3.0, 4.0], np.float32)}
    directions = jax.tree.map(np.ones_like, tree)

    @jax.jit
    def derivatives(tree):
        backwards = jax.grad(lambda tree: jnp.sum(_norms.leaf_norms(tree)))(tree)
        return backwards, jax.jvp(_norms.leaf_norms, (tree,), (directions,))[1]

    backwards, forwards = derivatives(tree)
    expected = {"zero": np.zeros(3), "one": np.array([0.6, 0.8])}
    chex.assert_trees_all_close(backwards, expected, rtol=ROUNDING)
    np.testing.assert_allclose(forwards, [1.4, 0.0], rtol=ROUNDING)


def test_vmap_equals_a_loop_whatever_size_each_tree_has():
    scales = [1e-15, 1.0, 1e20, 1e37]
    trees = [
        jax.tree.map(lambda x, s=s, i=i: (x * s).astype(np.float32), random_tree(i))
        for i, s in enumerate(scales)
    ]
    trees[1]["b"][2] = np.nan
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *trees)
    together = jax.jit(jax.vmap(_norms.leaf_norms))(stacked)
    one_by_one = np.stack([norms_of(tree) for tree in trees])
    np.testing.assert_allclose(together, one_by_one, rtol=ROUNDING)


def test_a_named_axis_is_summed_over():
    shards = {"a": jnp.arange(12.0).reshape(4, 3), "b": jnp.full((4, 2), 1e25)}
    each = jax.vmap(lambda x: _norms.leaf_norms(x, "shard"), axis_name="shard")
    norms = jax.jit(each)(shards)
    expected = np.broadcast_to(reference(shards), (4, 2))
    np.testing.assert_allclose(norms, expected, rtol=ROUNDING)


# --- norms of several leaves -----------------------------------------------------

PARTS = [3.0, 4.0, 0.0, 12.0, 1e-3]


@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e-20, 1.0, 1e20, 5e36])
def test_norms_of_parts_are_joined_without_overflow(scale):
    parts = np.float32(scale) * np.array(PARTS, np.float32)
    expected = np.sqrt(np.sum(parts.astype(np.float64) ** 2))
    assert float(join(parts)) == pytest.approx(expected, rel=ROUNDING)


def test_each_group_is_joined_by_itself():
    parts = np.array([3e30, 4e30, 5.0, 0.0, np.nan, 1.0, 12.0, np.inf], np.float32)
    groups = np.array([0, 0, 1, 2, 3, 3, 1, 5])
    norms = jax.jit(lambda parts: _norms.join_norms_by_group(parts, groups, 7))(parts)
    expected = [5e30, 13.0, 0.0, np.nan, 0.0, np.inf, 0.0]
    np.testing.assert_allclose(norms, expected, rtol=ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_part_that_is_not_finite_makes_the_whole_the_same(bad):
    whole = join(np.array([1.0, bad, 2.0, 0.0, 0.0], np.float32))
    np.testing.assert_array_equal(whole, bad)


def test_nothing_joined_is_zero():
    assert float(_norms.join_norms(np.zeros(0, np.float32))) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_global_norm_is_the_norm_of_everything(scale):
    tree = jax.tree.map(lambda x: np.float32(scale) * (1 + np.abs(x)), random_tree())
    norm = global_norm_of(tree)
    assert (norm.shape, norm.dtype) == ((), jnp.float32)
    assert float(norm) == pytest.approx(np.hypot.reduce(reference(tree)), rel=ROUNDING)


@pytest.mark.parametrize("tree", [{}, {"a": jnp.zeros(3)}, {"a": jnp.zeros((0, 2))}])
def test_the_global_norm_of_nothing_is_zero(tree):
    assert float(global_norm_of(tree)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_global_norm_is_not_finite_if_one_entry_is_not(bad):
    tree = random_tree()
    tree["c"][1, 1] = bad
    assert not np.isfinite(global_norm_of(tree))


def test_the_global_norm_of_zeros_has_derivative_zero():
    tree = {"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}
    chex.assert_trees_all_equal(jax.jit(jax.grad(_norms.global_norm))(tree), tree)


# --- complex and 64 bits ------------------------------------------------------------


def of_each_dtype(x):
    """The same numbers in all dtypes that hold them, and mixtures of them."""
    single, double = x.astype(np.complex64), x.astype(np.complex128)
    return {
        "complex64": [single, single[:2]],
        "complex128": [double, double[:2]],
        "mixed": [single, double[:2]],
        "with real": [double, double[:2].real],
    }


@pytest.mark.parametrize("kind", of_each_dtype(np.ones(1, complex)))
@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_a_complex_leaf_counts_by_the_square_of_its_modulus(kind, platform):
    x = np.array([3 + 4j, -12j, 0, 1e-3 + 2j]) * np.exp(0.3j)
    with jax.enable_x64(True):
        leaves = of_each_dtype(x)[kind]
        measure = {
            "cpu": _norms._measure_in_two_passes,
            "accelerator": _norms._measure_in_one_pass,
        }[platform]
        scope = _norms._Scope(False, (False,) * 2, None)
        found = measure([jnp.asarray(leaf) for leaf in leaves], scope)
        expected = [np.linalg.norm(leaf.astype(np.complex128)) for leaf in leaves]
        double = kind != "complex64"
        assert found.dtype == (np.float64 if double else np.float32)
        tolerance = 1e-15 if double and kind != "mixed" else 1e-6
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("size", [1e-200, 1e-60, 1.0, 1e60, 1e150, 3e307])
@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_norms_of_float64_have_its_range_and_digits(size, platform):
    with jax.enable_x64(True):
        x = size * jnp.array([0.3, -0.4, 0.0, 1.2])  # Its norm is 1.3·size.
        measure = {
            "cpu": _norms._measure_in_two_passes,
            "accelerator": _norms._measure_in_one_pass,
        }[platform]
        found = measure([x], _norms._Scope(True, (False,), None))
        np.testing.assert_allclose(found, 1.3 * size, rtol=1e-15)


def test_one_wide_leaf_makes_the_norm_of_the_tree_wide():
    with jax.enable_x64(True):
        tree = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.full(3, 1e60)}
        assert _norms.global_norm(tree).dtype == np.float64
        assert _norms.global_norm(tree["a"]).dtype == np.float32
        np.testing.assert_allclose(_norms.global_norm(tree), 3**0.5 * 1e60)


def test_a_nan_in_one_component_makes_the_norm_non_finite():
    for bad in (complex(0, np.nan), complex(np.nan, 0), complex(1, np.inf)):
        assert not np.isfinite(_norms.global_norm(jnp.array([1 + 1j, bad])))


def test_the_derivative_of_a_complex_norm_is_that_of_its_components():
    x, y = jnp.array([3.0, 0.0]), jnp.array([4.0, -12.0])
    split = jax.grad(lambda x, y: _norms.global_norm((x, y)), argnums=(0, 1))(x, y)
    joint = jax.grad(lambda x, y: _norms.global_norm(x + 1j * y), argnums=(0, 1))(x, y)
    np.testing.assert_allclose(joint, split, rtol=1e-6)

"""Norms that were measured once are found again, for these very arrays alone."""

import jax
import jax.numpy as jnp
import pytest

from optax_stability._core import _known_norms, _norms

KNOWN = _norms.Norms(jnp.array([3.0, 4.0]), jnp.float32(5.0))


def test_known_norms_are_not_measured_again():
    tree = {"a": jnp.ones(3), "b": jnp.ones(2)}
    with _known_norms.reuse_norms(tree, KNOWN, None):
        assert _known_norms.global_norm(tree) is KNOWN.total
        assert _known_norms.measure(dict(tree)) is KNOWN
        equal_but_another = jax.tree.map(lambda x: x + 0, tree)
        for other in (equal_but_another, {"a": tree["a"]}, tree["a"]):
            assert _known_norms.global_norm(other) is not KNOWN.total
            assert _known_norms.measure(other) is not KNOWN
    assert _known_norms.global_norm(tree) is not KNOWN.total


def test_known_norms_are_forgotten_after_an_error():
    tree = {"a": jnp.ones(3), "b": jnp.zeros(2)}
    with (
        pytest.raises(ZeroDivisionError),
        _known_norms.reuse_norms(tree, KNOWN, None),
    ):
        raise ZeroDivisionError
    assert float(_known_norms.global_norm(tree)) == pytest.approx(3**0.5)


def test_an_alias_has_the_norms_of_what_it_is_an_alias_of():
    tree, other = {"a": jnp.ones(3)}, {"a": jnp.ones(3)}
    passed, unknown = jax.tree.map(lambda x: x + 0, (tree, other))
    with _known_norms.reuse_norms(tree, KNOWN, None):
        _known_norms.alias_norms(tree, passed)
        _known_norms.alias_norms(other, unknown)
        assert _known_norms.measure(passed) is KNOWN
        assert _known_norms.measure(unknown) is not KNOWN

"""The trainer with ``--optimizer muon``: Muon inside the guard, behind the clip."""

import jax
import optax
import training
from config import Config
from flax import nnx

import optax_stability as ost


def nodes(tree, kind):
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in leaves if isinstance(node, kind)]


def test_muon_has_the_matrices_of_the_blocks_inside_the_guard():
    _, optimizer = nnx.eval_shape(lambda: training.create(Config(optimizer="muon"), 64))
    (guard,) = nodes(nnx.as_pure(optimizer.opt_state), ost.SkipSpikesState)
    (muon,) = nodes(guard, optax.contrib.MuonState)
    names = ost.leaf_names(muon.mu)
    assert len(names) == 4 * 4  # Four kernels in each of four blocks.
    assert all("kernel" in name for name in names)


def test_the_baseline_can_have_it_too():
    tx = training.make_optimizer(Config(optimizer="muon", baseline=True))
    state = jax.eval_shape(tx.init, {"kernel": jax.numpy.ones((4, 4))})
    assert nodes(state, optax.contrib.MuonState)
    assert not nodes(state, ost.SkipSpikesState)

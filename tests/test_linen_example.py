"""The Linen example, as its users run it, with fewer steps."""

import re

import jax
import linen_train_state
import numpy as np

import optax_stability as ost

STEPS = 50


def test_it_learns_and_leaves_out_the_one_batch_that_is_nan(tmp_path, capsys):
    state = linen_train_state.main(tmp_path, steps=STEPS)
    shown = capsys.readouterr().out
    assert re.findall("(.*)  skipped", shown) == [f"step {STEPS // 2}  loss nan"]
    # Uniform guesses cost ln 256 = 5.5 nats, how often each byte occurs 3.15.
    (loss,) = re.findall(rf"step {STEPS}  loss (\S+)", shown)
    assert 2 < float(loss) < 3.15
    assert re.search(r"B_simple (=|≥) \S+ examples", shown)
    skipped = ost.history(state)["skip/skipped"]
    np.testing.assert_array_equal(np.flatnonzero(skipped), [STEPS // 2 - 1])
    assert int(ost.metrics(state)["skip/nonfinite_total"]) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert (tmp_path / "linen.png").read_bytes().startswith(b"\x89PNG")

"""What the flight recorder keeps is what was measured, step by step."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiers import full, quick_only

import optax_stability as ost
from optax_stability._core import _norms


@pytest.fixture
def params():
    return {"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}


@functools.cache  # With the functions goes what they were compiled to.
def chain(**kwargs):
    inside = optax.chain(
        ost.clip_by_zscore(warmup=2), ost.safe_adamw(0.1), ost.record("update")
    )
    tx = optax.chain(ost.record("grad"), ost.skip_spikes(inside))
    return ost.record_history(tx, **{"length": 4, "slow_every": 1} | kwargs)


def gradients(params, step):
    keys = jax.random.split(jax.random.key(step), len(jax.tree.leaves(params)))
    leaves, treedef = jax.tree.flatten(params)
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def train(tx, params, steps, state=None, start=0):
    """Runs some steps; returns the state and what was measured on the way."""
    update = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    seen = []
    for step in range(start, start + steps):
        loss = jnp.float32(10.0 - step)
        _, state = update(gradients(params, step), state, params, value=loss)
        found = ost.metrics(state, params=params) | {"loss": loss}
        seen.append({key: np.float32(x) for key, x in found.items()})
    return state, seen


def assert_kept(state, seen, first):
    """The history is what was seen, from step ``first`` to the last."""
    kept = ost.history(state)
    steps = kept.pop("step")
    assert steps.tolist() == list(range(first, len(seen)))
    expected = seen[first:]
    assert kept.keys() == seen[0].keys() - {"history/steps"}
    for key, values in kept.items():
        np.testing.assert_allclose(
            values, [row[key] for row in expected], rtol=1e-5, err_msg=key
        )


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 11])
@quick_only("11")
def test_the_last_rows_are_kept_across_any_number_of_turns(params, steps):
    state, seen = train(chain(), params, steps)
    assert_kept(state, seen, first=max(0, steps - 4))


@full
def test_it_goes_on_after_a_restart(params, tmp_path):
    tx = chain()
    state, seen = train(tx, params, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    state, more = train(tx, params, 2, restored, start=5)
    assert_kept(state, seen + more, first=3)


@full
def test_under_accumulation_there_is_one_row_per_step(params):
    tx = ost.accumulate_moments(chain(), every_k=2)
    state, _ = train(tx, params, 7)
    kept = ost.history(state)
    assert kept["step"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(kept["loss"], [9.5, 7.5, 5.5])


def test_before_the_first_step_there_is_nothing(params):
    kept = ost.history(chain().init(params))
    assert all(values.shape == (0,) for values in kept.values())
    assert "grad/norm/dense/kernel" in kept


def test_without_a_loss_there_is_none(params):
    tx = ost.record_history(optax.identity(), length=3)
    _, state = tx.update(params, tx.init(params))
    assert "loss" not in ost.history(state)
    for given in ({"loss": jnp.float32(2.0)}, {}):
        _, state = tx.update(params, state, **given)
    np.testing.assert_array_equal(ost.history(state)["loss"], [np.nan, 2.0, np.nan])


@full
def test_the_bad_step_itself_is_in_the_record(params):
    tx = chain()
    state, _ = train(tx, params, 3)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    _, state = tx.update(bad, state, params, value=jnp.float32(jnp.nan))
    kept = ost.history(state)
    assert np.isnan(kept["loss"]).tolist() == [False, False, False, True]
    assert np.isnan(kept["grad/norm/dense/kernel"]).tolist() == [False] * 3 + [True]
    assert kept["grad/nonfinite"][-1] == pytest.approx(4 / 9)
    assert kept["skip/skipped"].tolist() == [0, 0, 0, 1]


@full
def test_updates_and_inner_state_are_bitwise_what_they_are_without(params):
    recorded = chain()
    plain = optax.chain(
        ost.record("grad"),
        ost.skip_spikes(
            optax.chain(
                ost.clip_by_zscore(warmup=2), ost.safe_adamw(0.1), ost.record("update")
            )
        ),
    )
    states = recorded.init(params), plain.init(params)
    updates = jax.jit(recorded.update), jax.jit(plain.update)
    for step in range(8):
        grads = jax.tree.map(lambda x, s=step: (1 + 9 * s) * x, gradients(params, step))
        found, left = updates[0](grads, states[0], params)
        expected, right = updates[1](grads, states[1], params)
        chex.assert_trees_all_equal(found, expected)
        chex.assert_trees_all_equal(left.inner_state, right)
        states = left, right


@full
def test_what_costs_a_pass_is_read_every_so_often(params):
    tx = chain(length=8, slow_every=3)
    state, seen = train(tx, params, 7)
    kept = ost.history(state)["adam/update_rms"]
    true = [row["adam/update_rms"] for row in seen]
    expected = [true[step - step % 3] for step in range(7)]
    np.testing.assert_allclose(kept, expected, rtol=1e-5)


class Counted(NamedTuple):
    """A state that counts calls, as if that cost a pass."""

    step: jax.Array
    reports_metrics = True
    costly_metrics = True

    @property
    def metrics(self):
        return {"count": self.step}


def test_what_is_not_read_keeps_its_last_value():
    inner = optax.GradientTransformation(
        lambda params: Counted(jnp.int32(0)),
        lambda updates, state, params=None: (updates, Counted(state.step + 1)),
    )
    tx = ost.record_history(inner, length=4, slow_every=3)
    params = jnp.ones(2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(8):
        _, state = update(params, state)
    assert ost.history(state)["count"].tolist() == [4, 4, 7, 7]


def test_nothing_goes_to_the_host(params):
    tx = chain()
    update = jax.jit(tx.update)
    state, loss = tx.init(params), jnp.float32(1.0)
    grads = [gradients(params, step) for step in range(3)]
    _, state = update(grads[0], state, params, value=loss)
    with jax.transfer_guard("disallow"):
        for each in grads[1:]:
            _, state = update(each, state, params, value=loss)
    assert len(ost.history(state)["step"]) == 3


@full
def test_it_is_read_from_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(jnp.ones((1, 2))) ** 2))(
            model
        )
        optimizer.update(model, grads, value=loss)

    for _ in range(3):
        step(model, optimizer)
    kept = ost.history(optimizer)
    assert kept["step"].tolist() == [0, 1, 2]
    assert np.all(np.diff(kept["loss"]) < 0)
    assert "update/norm/kernel" in kept


@full
def test_two_states_with_one_key_have_a_column_each(params):
    labels = {"dense": {"bias": "plain", "kernel": "decayed"}}
    parts = {"plain": ost.safe_adamw(1e-3), "decayed": ost.safe_adamw(1e-3)}
    tx = ost.record_history(optax.partition(parts, labels), length=2, slow_every=1)
    _, state = tx.update(params, tx.init(params), params)
    kept = ost.history(state)
    expected = ost.metrics(state, params=params).keys() | {"step"}
    assert kept.keys() == expected - {"history/steps"}
    assert {"plain/adam/update_rms", "adam/update_rms/dense/bias"} <= kept.keys()


def test_histograms_are_left_out(params):
    tx = ost.record_history(ost.record("grad", histogram=True), length=2)
    _, state = tx.update(params, tx.init(params))
    assert not any("histogram" in key for key in ost.history(state))


@full
def test_of_two_recorders_the_outermost_is_read(params):
    tx = ost.record_history(ost.record_history(ost.record("grad"), length=2), length=3)
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state)
    assert len(ost.history(state)["step"]) == 3


def test_a_state_without_a_recorder_is_refused(params):
    with pytest.raises(ValueError, match="holds no history; put record_history"):
        ost.history(ost.record("grad").init(params))


@pytest.mark.parametrize("name", ["length", "slow_every"])
def test_lengths_must_be_counts(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        ost.record_history(optax.identity(), **{name: 0})


def test_the_gradient_is_measured_once_for_all_within(params, monkeypatch):
    measure, measured = _norms._norms, []

    def counted(leaves, *rest):
        measured.append(len(leaves))
        return measure(leaves, *rest)

    monkeypatch.setattr(_norms, "_norms", counted)
    clip = ost.clip_by_threshold(ost.thresholds.constant(1e9))
    inner = optax.chain(ost.record("grad", every=2), ost.skip_spikes(clip))
    tx = ost.record_history(inner)
    state = tx.init(params)
    jax.eval_shape(tx.update, params, state, params)
    assert len(measured) == 1
    # Without a recorder each measures for itself; a clip within a guard is told.
    measured.clear()
    jax.eval_shape(inner.update, params, state.inner_state, params)
    assert len(measured) == 2

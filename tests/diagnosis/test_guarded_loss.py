"""A guard that is given one number as the loss: found, and only then."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from histories import (
    ROWS,
    guard_loss_constant,
    guard_loss_constant_and_nothing_else,
    healthy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_stability as ost

KIND = "guard_loss_constant"
STEPS = 120


def kinds(history):
    return [each.kind for each in ost.diagnose(history)]


def zero():
    """A history with the loss, and a guard that is given 0."""
    return guard_loss_constant()[-1]


def one():
    """A history with no loss but that of a guard, which is given 1."""
    return guard_loss_constant_and_nothing_else()[-1]


def squares(params, x):
    return jnp.mean((x @ params["w"] - 1) ** 2)


def trained(tx, loss_fn, *, probe=False, **extra):
    """The history of a run whose trainer gives no loss but ``extra``."""
    params = {"w": jnp.ones((4, 2))}
    if probe:
        params["loss_probe"] = ost.loss_probe()

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    x = np.random.default_rng(0).standard_normal((STEPS, 16, 4)).astype(np.float32)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, x)[0])
    return ost.history(scan((params, tx.init(params)))[1])


def guard(**options):
    inner = ost.spike_guard(ost.safe_adamw(1e-2), **options)
    return ost.record_history(inner, length=STEPS)


def probing():
    return ost.with_loss_probe(guard())


# --- Real runs. -----------------------------------------------------------------------


def test_a_probe_that_nothing_feeds_is_found_and_what_feeds_it_is_named():
    (found,) = ost.diagnose(trained(probing(), squares, probe=True))
    assert (found.kind, found.metric, found.step) == (KIND, "skip/value", 0)
    assert "the loss 0 in all 120 rows" in found.evidence
    assert "`probed`" in found.causes[0]
    assert "`probed`" in found.remedies[0]


def test_a_probe_that_is_fed_is_no_finding():
    assert kinds(trained(probing(), ost.probed(squares), probe=True)) == []


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_a_constant_in_place_of_the_loss_is_found(value):
    assert kinds(trained(guard(), squares, value=value)) == [KIND]


def test_a_guard_without_a_loss_is_no_finding():
    assert kinds(trained(guard(loss=False), squares)) == []


def test_a_loss_that_was_learned_to_exactly_0_is_no_finding():
    """In float32 a cross-entropy of 0 still has a gradient, and a small one."""

    def sure(params, x):
        logits = (jnp.abs(x) @ params["w"]) * jnp.array([1, -1]) + jnp.array([20, 0])
        labels = jnp.zeros(len(x), jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    history = trained(probing(), ost.probed(sure), probe=True)
    assert not history["skip/value"].any()
    assert history["skip/norm"].all()
    assert np.isfinite(history["skip/value_limit"]).any()
    assert KIND not in kinds(history)


# --- What it must not be mistaken for. ------------------------------------------------


def test_a_loss_that_falls_to_exactly_0_is_no_finding():
    history = zero()
    history["skip/value"][:30] = np.geomspace(3, 1e-30, 30)
    assert KIND not in kinds(history)


def test_one_other_number_anywhere_is_enough():
    for row in (0, ROWS // 2, ROWS - 1):
        history = zero()
        history["skip/value"][row] = 1e-30
        assert KIND not in kinds(history)


def test_0_with_next_to_no_gradient_is_no_finding():
    history = zero()
    history["skip/norm"] = history["skip/norm"] * 1e-6
    assert KIND not in kinds(history)


def test_a_log_that_rounds_is_no_finding():
    """Of a loss below half a thousandth, say."""
    history = zero()
    history["skip/norm"] = np.round(history["skip/norm"], 3)
    assert KIND not in kinds(history)


def test_a_gradient_that_is_not_finite_is_not_among_the_evidence():
    history = zero()
    history["skip/norm"][[30, 40]] = np.nan, np.inf
    (found,) = (each for each in ost.diagnose(history) if each.kind == KIND)
    assert "nan" not in found.evidence
    assert "inf" not in found.evidence


def test_a_number_other_than_0_must_be_there_from_the_beginning():
    """A run that has converged may repeat its loss for long."""
    history = one()
    history["step"] = history["step"] + 5000
    assert KIND not in kinds(history)
    history = zero()
    history["step"] = history["step"] + 5000
    assert kinds(history) == [KIND]


@pytest.mark.parametrize(("make", "least"), [(zero, 24), (one, 100)])
def test_it_takes_so_many_rows(make, least):
    """A new model in 16 bits may begin with the same loss again and again."""
    for rows, found in ((least - 1, False), (least, True)):
        history = make()
        history["skip/value_limit"][:] = 0.5
        part = {key: each[:rows] for key, each in history.items()}
        assert (KIND in kinds(part)) == found, rows


def test_one_batch_again_and_again_is_no_finding():
    """The loss may stand still in float32 while the norm still moves a little."""
    history = one()
    history["skip/norm"] = 0.3 * (1 + 1e-3 * np.random.default_rng(0).random(ROWS))
    assert KIND not in kinds(history)


@pytest.mark.parametrize("missing", ["skip/norm", "skip/value_limit"])
def test_without_the_rest_of_the_guard_nothing_is_said(missing):
    history = zero()
    del history[missing]
    assert KIND not in kinds(history)


def test_a_guard_without_a_limit_on_the_loss_is_no_finding():
    history = zero()
    history["skip/value_limit"][:] = np.inf
    assert KIND not in kinds(history)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 500),
    first=st.sampled_from([0, 300, 10**6]),
    noise=st.floats(1e-4, 0.5),
    digits=st.sampled_from([1, 2, 3, 4, 6, 17]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_no_loss_of_a_healthy_run_is_a_finding(seed, rows, first, noise, digits, scale):
    """However small, with however little noise, and however the log rounds."""
    history = healthy(seed, rows, first, noise)
    history["loss"] = scale * history["loss"]
    history |= {"skip/value": history["loss"], "skip/norm": history["grad/norm"]}
    history["skip/value_limit"] = history["loss"] + 0.5
    rounded = {
        key: np.round(each, digits) if key != "step" else each
        for key, each in history.items()
    }
    assert KIND not in kinds(rounded)


# --- What else is said of such a run. -------------------------------------------------


def test_a_true_loss_that_is_stuck_as_well_is_a_finding_of_its_own():
    history = zero()
    history["loss"][200:] = 1.7
    assert kinds(history) == ["loss_stuck", KIND]


def test_what_the_guard_was_given_is_not_judged_as_the_loss():
    """It would be stuck, and a plateau; the gradient is judged all the same."""
    history = one()
    assert kinds(history) == [KIND]
    for key in ("skip/norm", "grad/norm"):
        history[key] = history[key].copy()
        history[key][200:204] = np.nan
    assert kinds(history) == ["nonfinite", KIND]


def test_each_guard_of_a_partition_is_looked_at():
    history = {
        f"decayed/{key}" if key.startswith("skip/") else key: each
        for key, each in zero().items()
    }
    (found,) = ost.diagnose(history)
    assert (found.kind, found.metric) == (KIND, "decayed/skip/value")

"""Every kind is found where it was put, and nothing is found in health."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from histories import (
    EVERY,
    FAULT,
    FAULTS,
    HEADS,
    LAYERS,
    MLP,
    QKV,
    ROWS,
    divergence,
    divergence_to_the_death,
    eps_dominated,
    exploding_gradient,
    frequent_skips,
    healthy,
    held,
    loss_spike,
    noise_too_high,
    nonfinite_for_good,
    nonfinite_once,
    put,
    scaled,
    wobbling,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiers import full

import optax_stability as ost
from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import ADVICE
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._finding import KINDS, Finding
from optax_stability._diagnosis._series import History, depth
from optax_stability._diagnosis._windows import median, stretches


def kinds(history):
    return [each.kind for each in diagnose(history)]


def test_the_loss_of_a_probe_is_no_finding():
    """It is one of parameters that are not in use."""
    history = healthy()
    history["loss"][FAULT] += 9
    assert kinds(history) == ["loss_spike"]
    history["branch/probed"] = np.zeros(ROWS)
    history["branch/probed"][FAULT] = 1
    assert kinds(history) == []
    history["vector/branch/probed"] = np.zeros(ROWS)
    assert kinds(history) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_is_found_where_it_was_put(fault):
    kind, step, layer, history = fault()
    found = {each.kind: each for each in diagnose(history)}
    assert kind in found
    assert found[kind].metric in history
    if step is not None:
        assert found[kind].step == step
        assert type(found[kind].step) is int
    if layer is not ...:
        assert found[kind].layer == layer
    # What else is found must be true of the fault too: a death is also NaN.
    brings = {"nonfinite"} if fault is divergence_to_the_death else set()
    assert set(found) == {kind} | brings


def test_every_kind_has_a_fault_and_advice():
    assert {fault()[0] for fault in FAULTS} == set(KINDS) == set(ADVICE)


# --- Health. --------------------------------------------------------------------------


def one_clipped_step():
    history = healthy()
    scaled(history, "grad/norm", 30, FAULT, FAULT + 1)
    history["clip/norm"] = history["grad/norm"]
    return history


def a_gradient_at_eight_times_its_trend():
    """For longer than a finding needs, but not ten times."""
    history = healthy()
    level = np.median(history["grad/norm"][FAULT - limits.CENTRE : FAULT])
    put(history, "grad/norm", 8 * level, FAULT, FAULT + 4)
    return history


def a_fixed_clip_that_often_acts():
    history = healthy()
    return history | {"clip/limit": np.full(ROWS, 0.5)}


def a_clip_at_the_median_of_rising_norms():
    """All are clipped, by a tenth."""
    history = healthy()
    return history | {"clip/limit": history["clip/norm"] / 1.1}


def sign_updates():
    """Of Lion, say: plus or minus the same from beginning to end."""
    return healthy() | {"update/bimodality": wobbling(0.99)}


def rare_tokens():
    """Rows without a gradient for long: zeros, and no √v̂ to speak of."""
    history = healthy()
    for key in ("grad/zero_fraction", "adam/eps_share", "adam/zero_fraction"):
        history[f"{key}/{LAYERS[0]}"] = wobbling(0.95)
    history["grad/zero_fraction"] = wobbling(0.9)
    history[f"adam/zero_fraction/{LAYERS[0]}"] = wobbling(0.5)
    return history


def a_bias_without_a_gradient():
    """That of keys: attention does not see it."""
    return healthy() | {"adam/eps_share/head/bias": wobbling(0.9)}


def coordinates_that_never_had_a_gradient():
    """Of them ε is all there is."""
    history = healthy()
    history[f"adam/eps_share/{QKV}"] = wobbling(0.9)
    history[f"adam/zero_fraction/{QKV}"] = wobbling(0.9)
    return history


def frozen_layers():
    history = healthy()
    for layer in (QKV, MLP):
        history[f"grad/norm/{layer}"] = np.zeros(ROWS)
        history[f"grad/zero_fraction/{layer}"] = np.ones(ROWS)
    return history


def zeros_at_the_first_step():
    """A head that starts at zero lets nothing through to the layers below."""
    history = healthy()
    for key in history:
        if key.startswith("grad/zero_fraction"):
            put(history, key, 1.0, 0, EVERY)
        if key.startswith("grad/norm/"):
            put(history, key, 0.0, 0, 1)
    return history


def attention_just_below_its_level():
    """A high bound is none either if the logits are measured, and are not high."""
    history = healthy() | {"extra/attention_logits/blocks/0/0": wobbling(49.0)}
    history[f"attention/logit_bound/{HEADS[0]}"] = wobbling(900.0)
    return history


def a_bound_just_below_its_level():
    return healthy() | {f"attention/logit_bound/{HEADS[0]}": wobbling(249.0)}


def one_high_measurement():
    """Repeated between measurements, it is still one."""
    history = healthy()
    put(history, "update/bimodality", 0.9, FAULT, FAULT + EVERY)
    put(history, f"adam/eps_share/{QKV}", 0.9, FAULT, FAULT + EVERY)
    put(history, f"update/param_ratio/{QKV}", 0.9, FAULT, FAULT + EVERY)
    put(history, "adam/correlation", 0.99, FAULT, FAULT + EVERY)
    put(history, f"attention/logit_bound/{HEADS[0]}", 900.0, FAULT, FAULT + EVERY)
    return history


def thawed():
    """Frozen for a hundred steps."""
    history = healthy(decays=False)
    put(history, "update/param_ratio", wobbling(1e-9)[:120], 50, 170)
    return history


def much_growth_that_slows_down():
    history = healthy()
    history[f"params/spectral_norm/{QKV}"] = held(
        0.1 + np.clip(np.arange(ROWS) - 55, 0, None) ** 0.5, 8
    )
    return history


def large_updates_for_a_moment():
    """Measured three times, but over fewer steps than matter."""
    history = healthy(decays=False)
    put(history, "update/param_ratio", wobbling(0.2)[:12], FAULT, FAULT + 12)
    return history


def a_measurement_every_64_steps():
    history = healthy()
    for key in history:
        if key.startswith(("update", "adam", "params")):
            history[key] = held(history[key], 64)
    return history


def gradient_falls_with_the_loss():
    """A regression without noise: both go to zero."""
    history = healthy()
    fall = np.exp(-np.arange(ROWS) / 20)
    history["loss"] = 1e-12 + 3 * fall**2
    for key in history:
        if key.startswith("grad/norm"):
            history[key] = history[key] * fall
    history["clip/norm"] = history["grad/norm"]
    return history


def converged():
    """Flat, because it is done."""
    return healthy(first=5000, decays=False)


def vectors_that_start_at_zero():
    history = healthy()
    history["update/param_ratio/head/bias"] = held(1 / np.arange(1, ROWS + 1) ** 0.25)
    return history


def a_learning_rate_that_is_not_known():
    history = healthy()
    del history["learning_rate"]
    return history


def five_skips_in_a_row():
    history = healthy()
    put(history, "skip/skipped", 1, FAULT, FAULT + 5)
    return history


def sparse_loss():
    history = healthy()
    history["loss"] = np.where(np.arange(ROWS) % 10 == 0, history["loss"], np.nan)
    return history


def one_row_in_ten():
    """Of a log that has every step, but numbers now and then."""
    history = healthy(rows=2000)
    for key in history:
        if key != "step":
            history[key] = np.where(np.arange(2000) % 10 == 0, history[key], np.nan)
    return history


def a_low_first_value():
    history = healthy()
    history["loss"][0] = 0.1
    return history


def evaluations_in_rows_of_their_own():
    """They have no loss of the training, and no norm."""
    rows = healthy(rows=2 * ROWS)
    alone = np.arange(2 * ROWS) % 20 == 19
    rows["eval/loss"] = np.where(alone, 2.3 + 3 * np.exp(-np.arange(800) / 60), np.nan)
    for key in rows:
        if key not in ("step", "eval/loss"):
            rows[key] = np.where(alone, np.nan, rows[key])
    return rows


def a_wobble_in_the_first_rows():
    """Of a few values the noise is not known."""
    history = healthy(noise=0.01)
    history["loss"][4] += 0.9
    return history


def a_log_that_rounds():
    """To one decimal place: the loss is 2.2 for the last half."""
    history = healthy(noise=0.01)
    return history | {"loss": np.round(history["loss"], 1)}


def a_step_that_is_counted_in_each_epoch():
    history = healthy(decays=False)
    del history["learning_rate"]
    return history | {"step": np.arange(ROWS) % 100, "epoch": np.arange(ROWS) // 100}


def a_loss_scale_that_looks_for_its_level():
    """The first gradients overflow in float16, and are left out."""
    steps = np.arange(100)
    norm = np.full(100, 0.5)
    norm[:2] = np.inf
    return {"step": steps, "loss": 2 + np.exp(-steps / 20), "grad/norm": norm}


def a_schedule_that_restarts():
    """Twice, and the loss goes on as before."""
    history = healthy()
    rows = np.arange(ROWS) % 200
    history["learning_rate"] = 3e-3 * (0.5 + 0.5 * np.cos(np.pi * rows / 200))
    return history


def harder_data():
    """Training loss and held-out loss rise together."""
    history = healthy(noise=0.02)
    rise = 0.4 * np.maximum(0, np.arange(ROWS) - FAULT) / ROWS
    history["loss"] = history["loss"] + rise
    held_out = np.full(ROWS, np.nan)
    held_out[20::20] = (history["loss"] + 0.1)[20::20]
    return history | {"eval/loss": held_out}


def loss_not_given_now_and_then():
    history = healthy()
    put(history, "loss", np.nan, FAULT, FAULT + 1)
    return history


def old_counters():
    """The history begins after a restart; what was counted before is old."""
    history = healthy(first=5000)
    return history | {
        "skip/nonfinite_total": np.full(ROWS, 3),
        "skip/total": np.full(ROWS, 90),
        "clip/fraction": np.full(ROWS, 0.04),
    }


def only_steps():
    return {"step": np.arange(ROWS)}


def other_metrics():
    return {"step": np.arange(ROWS), "accuracy": np.linspace(0, 1, ROWS) * 1e9}


def nothing_measured():
    return {key: np.full(ROWS, np.nan) for key in healthy()} | only_steps()


HEALTHY = (
    healthy,
    lambda: healthy(noise=0.5),
    lambda: healthy(rows=40),
    lambda: healthy(first=100_000),
    lambda: healthy(decays=False),
    one_clipped_step,
    a_gradient_at_eight_times_its_trend,
    a_fixed_clip_that_often_acts,
    a_clip_at_the_median_of_rising_norms,
    sign_updates,
    rare_tokens,
    a_bias_without_a_gradient,
    coordinates_that_never_had_a_gradient,
    frozen_layers,
    zeros_at_the_first_step,
    attention_just_below_its_level,
    a_bound_just_below_its_level,
    one_high_measurement,
    thawed,
    much_growth_that_slows_down,
    large_updates_for_a_moment,
    a_measurement_every_64_steps,
    gradient_falls_with_the_loss,
    converged,
    vectors_that_start_at_zero,
    a_learning_rate_that_is_not_known,
    five_skips_in_a_row,
    sparse_loss,
    a_low_first_value,
    one_row_in_ten,
    evaluations_in_rows_of_their_own,
    loss_not_given_now_and_then,
    a_wobble_in_the_first_rows,
    a_log_that_rounds,
    a_schedule_that_restarts,
    a_step_that_is_counted_in_each_epoch,
    a_loss_scale_that_looks_for_its_level,
    harder_data,
    old_counters,
    only_steps,
    other_metrics,
    nothing_measured,
)


@pytest.mark.parametrize("make", HEALTHY)
def test_health_has_no_findings(make):
    assert [str(each) for each in diagnose(make())] == []


@settings(derandomize=True, max_examples=40, deadline=None)
@example(seed=100_000, rows=24, first=300, noise=0.5, decays=False)  # Low by chance.
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 500),
    first=st.sampled_from([0, 7, 300, 10**6]),
    noise=st.floats(0.0, 0.5),
    decays=st.booleans(),
)
@full
def test_no_healthy_run_has_a_finding(seed, rows, first, noise, decays):
    assert kinds(healthy(seed, rows, first, noise, decays)) == []


VALUES = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-320, 1e308, 0.5, 1.0])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0, 1, 2, 3, 30, 130, 260]))
@full
def test_garbage_never_raises(data, rows):
    history = {"step": np.arange(rows)}
    for key in healthy(rows=1):
        pool = data.draw(st.lists(VALUES, min_size=1, max_size=5), label=key)
        history.setdefault(key, np.resize(pool, rows))
    for each in diagnose(history):
        assert each.step in history["step"]
        assert each.metric in history
        assert str(each)


# --- What a finding says. -------------------------------------------------------------


def test_a_nan_step_does_not_blind_what_comes_later():
    _, _, _, history = loss_spike()
    for key in history:
        if key.startswith(("loss", "grad/norm")):
            put(history, key, np.nan, FAULT - 20, FAULT - 15)
    assert {"nonfinite", "loss_spike"} == set(kinds(history))


def test_a_gradient_that_was_left_out_is_no_underflow():
    history = healthy()
    # Every microbatch overflowed, until the loss scale fitted.
    put(history, "grad/norm", 0.0, 0, 12)
    put(history, "loss", np.nan, 0, 12)
    assert "underflow" not in [each.kind for each in diagnose(history)]
    put(history, "loss", 3.0, 0, 12)
    assert "underflow" in [each.kind for each in diagnose(history)]


def test_neighbouring_steps_are_one_event_with_its_worst():
    _, _, _, history = loss_spike()
    history["loss"][FAULT : FAULT + 4] += [0, 7, -4, 3]
    history["loss"][FAULT + 100] += 3
    (found,) = diagnose(history)
    worst = re.search(
        rf"steps above the limit: 4, events: 2, worst \+(\S+) at step {FAULT + 1}",
        found.evidence,
    )
    assert worst is not None
    assert 10 < float(worst[1]) < 11


def test_a_few_high_losses_at_the_end_are_no_divergence_yet():
    history = healthy()
    history["loss"][-8:] += 3
    assert kinds(history) == ["loss_spike"]
    history = healthy()
    history["loss"][-16:] += 3
    assert kinds(history) == ["divergence"]


def test_what_a_divergence_brings_with_it_is_left_out():
    _, _, _, history = divergence()
    scaled(history, "loss", 2, FAULT + 50, FAULT + 52)
    scaled(history, "loss", 2, FAULT - 7, FAULT - 6)
    assert kinds(history) == ["divergence"]


def test_what_came_before_a_divergence_is_kept():
    _, _, _, history = divergence()
    scaled(history, "loss", 3, FAULT - 80, FAULT - 78)
    assert kinds(history) == ["divergence", "loss_spike"]


def test_a_gradient_that_jumps_with_the_loss_is_one_finding():
    _, _, _, history = loss_spike()
    scaled(history, "grad/norm", 50, FAULT, FAULT + 3)
    assert kinds(history) == ["loss_spike"]


def test_a_gradient_that_jumps_before_the_loss_is_another():
    _, _, _, history = loss_spike()
    scaled(history, "grad/norm", 50, FAULT - 1, FAULT + 3)
    assert kinds(history) == ["exploding_gradient", "loss_spike"]


def test_the_last_rows_of_a_sparse_log_are_no_death():
    history = one_row_in_ten()
    history["loss"][[-20, -10]] += 3
    assert kinds(history) == ["loss_spike"]


def test_a_high_loss_at_the_end_is_a_divergence_only_if_it_lasts():
    history = healthy()
    history["loss"][-8:] += 3
    assert kinds(history) == ["loss_spike"]
    history["loss"][-24:-8] += 3
    assert kinds(history) == ["divergence"]


def test_of_layers_at_the_same_step_the_furthest_for_its_own_scale_is_named():
    history = healthy()
    calm = np.random.default_rng(1).standard_normal(ROWS)
    history[f"grad/norm/{QKV}"] = np.exp(0.02 * calm)
    history["loss"][FAULT] += 3
    scaled(history, f"grad/norm/{QKV}", 20, FAULT, FAULT + 1)
    scaled(history, f"grad/norm/{MLP}", 60, FAULT, FAULT + 1)
    (found,) = diagnose(history)
    assert found.layer == QKV


def test_a_gradient_that_comes_back_slowly_is_no_surge():
    history = healthy()
    away = np.clip((np.arange(ROWS) - FAULT) / 20, 0, None)
    back = np.clip((np.arange(ROWS) - FAULT - 100) / 20, 0, None)
    fall = np.exp(np.minimum(back - np.minimum(away, 7), 0))
    history[f"grad/norm/{LAYERS[0]}"] = history[f"grad/norm/{LAYERS[0]}"] * fall
    assert kinds(history) == ["vanishing_gradient"]


def test_a_surge_of_a_deep_layer_is_no_sign():
    history = healthy()
    scaled(history, f"grad/norm/{MLP}", 1e-4, FAULT, FAULT + 40)
    assert kinds(history) == ["vanishing_gradient"]


def test_findings_are_sorted_by_severity():
    _, _, _, history = nonfinite_once()
    for fault in (eps_dominated, noise_too_high, loss_spike, frequent_skips):
        other = fault()[-1]
        changed = [
            key
            for key, values in other.items()
            if not np.array_equal(values, healthy()[key], equal_nan=True)
        ]
        history |= {key: other[key] for key in changed}
    found = kinds(history)
    assert len(found) == 5
    assert found == sorted(found, key=KINDS.index)


def test_steps_may_have_gaps_and_start_anywhere():
    _, _, _, history = eps_dominated()
    history["step"] = 1000 + 10 * np.arange(ROWS)
    (found,) = diagnose(history)
    assert found.step == 1000 + 10 * FAULT


@pytest.mark.parametrize("fault", [loss_spike, exploding_gradient, eps_dominated])
def test_a_prefix_may_stand_before_a_name(fault):
    kind, step, layer, history = fault()
    history = {
        f"decayed/{key}" if key.startswith(("adam", "grad")) else key: values
        for key, values in history.items()
    }
    (found,) = diagnose(history)
    assert (found.kind, found.step, found.layer) == (kind, step, layer)


def test_after_a_short_warmup_the_first_steps_are_left_alone():
    steps = np.arange(100)
    rate = 1e-3 * np.minimum(1, (steps + 1) / 5)
    late = np.where(steps < 30, 0.3, -0.5)
    late = late + 1e-3 * np.sin(steps)  # Each step is a measurement of its own.
    history = {"step": steps, "learning_rate": rate, "adam/correlation": late}
    (found,) = diagnose(history)
    assert (found.kind, found.step) == ("learning_rate_too_high", 30)
    assert diagnose(history | {"adam/correlation": -late}) == []


def test_groups_of_parameters_must_agree_on_the_learning_rate():
    history = healthy()
    del history["adam/correlation"]
    for key in [key for key in history if key.startswith("adam/correlation/")]:
        del history[key]
    history["decayed/adam/correlation"] = wobbling(-0.5)
    history["rest/adam/correlation"] = wobbling(-0.4, seed=6)
    assert kinds(history) == ["learning_rate_too_high"]
    history["rest/adam/correlation"] = wobbling(0.1)
    assert kinds(history) == []


@pytest.mark.parametrize(
    ("present", "missing"),
    [("skip/value", ["loss"]), ("skip/norm", ["grad/norm"])],
)
def test_what_the_guard_saw_stands_in(present, missing):
    fault = loss_spike if present == "skip/value" else exploding_gradient
    kind, step, _, history = fault()
    history[present] = history.pop(missing[0])
    (found,) = diagnose(history)
    assert (found.kind, found.step, found.metric) == (kind, step, present)


def test_an_evidence_names_value_past_and_limit():
    history = {"step": np.arange(100), "loss": np.full(100, 2.31)}
    history["loss"][60] = 5.81
    (found,) = diagnose(history)
    assert found.evidence.startswith(
        "loss 5.81 at step 60, 2.31 before (median of 8): +3.50, limit +0.50"
    )
    assert str(found).startswith("loss_spike at step 60 (loss)\n  evidence: loss 5.81")
    assert "\n  likely:   " in str(found)
    assert "\n  try:      " in str(found)


def test_a_finding_prints_its_layer():
    found = Finding("plateau", "loss", 3, "w", "flat", ("a",), ("b", "c"))
    assert str(found) == (
        "plateau at step 3, first in w (loss)\n  evidence: flat\n  likely:   a\n"
        "  try:      b\n  try:      c"
    )


NAMES = re.compile(r"([A-Za-z_.0-9]+)(\((?:[^()]|\([^()]*\))*\))?")


def function_of(name):
    """The function of that name, here or in optax."""
    for place in (ost, optax):
        found = place
        for part in name.removeprefix("optax.").split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_remedy_names_functions_and_arguments_that_exist(kind):
    advice = ADVICE[kind]
    assert advice.causes
    quoted = [each for text in advice.remedies for each in re.findall("`(.*?)`", text)]
    assert quoted
    for call in quoted:
        name, _ = NAMES.match(call).groups()
        function = function_of(name)
        assert callable(function), call
        for keyword in re.findall(r"(\w+)=", call):
            parameters = inspect.signature(function).parameters
            variadic = any(
                each.kind == each.VAR_KEYWORD for each in parameters.values()
            )
            assert keyword in parameters or variadic, call
    assert not re.search(r"\w\(", re.sub("`.*?`|jax.debug_nans", "", str(advice[1])))


def test_the_real_runs_on_record_have_what_they_should():
    import diagnosis
    import reporting

    report = reporting.read("diagnosis")
    assert list(report["runs"]) == list(diagnosis.RUNS)
    for name, run in diagnosis.RUNS.items():
        assert set(run.expected) | set(run.allowed) <= set(KINDS)
        findings = [Finding(**each) for each in report["runs"][name]["findings"]]
        assert diagnosis.judge(run, findings) == []


# --- Bad input. -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        (None, TypeError, "history must be a dict of arrays, got NoneType; pass"),
        ({"loss": np.ones(3)}, ValueError, "history has no 'step' among its 1 keys"),
        (
            {"step": np.arange(3), "loss": np.ones(2)},
            ValueError,
            r"history\['loss'\] has shape \(2,\), but history\['step'\] has \(3,\)",
        ),
        (
            {"step": np.ones((2, 2))},
            ValueError,
            r"history\['step'\] has shape \(2, 2\)",
        ),
        (
            {"step": np.array([0, np.nan])},
            ValueError,
            r"history\['step'\] = array\(\[ 0., nan\]\) contains NaN or Inf; pass",
        ),
        (
            {"step": np.arange(1), "loss": ["high"]},
            TypeError,
            r"history\['loss'\] must be an array of numbers, got \['high'\]; remove",
        ),
    ],
)
def test_bad_input_is_explained(history, error, message):
    with pytest.raises(error, match=message):
        diagnose(history)


def test_the_history_is_not_changed():
    history = nonfinite_for_good()[-1]
    before = {key: values.copy() for key, values in history.items()}
    diagnose(history)
    for key, values in before.items():
        np.testing.assert_array_equal(history[key], values)


# --- Parts. ---------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_the_median_leaves_out_nan(axis):
    values = np.random.default_rng(0).standard_normal((7, 6))
    values[values > 0.7] = np.nan
    np.testing.assert_allclose(median(values, axis), np.nanmedian(values, axis))
    assert np.isnan(median(np.full(3, np.nan)))


def test_stretches_that_are_close_are_one():
    flags = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1], bool)
    assert stretches(flags) == [(1, 3), (5, 6), (10, 11)]
    assert stretches(flags, 3) == [(1, 6), (10, 11)]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("tokens/embedding", -1),
        ("wte", -1),
        ("blocks/3/attn/qkv/kernel", 3),
        ("layers_12/kernel", 12),
        ("blocks/kernel/5", 5),
        ("conv2d/kernel", np.inf),
        ("unembed/kernel", np.inf),
    ],
)
def test_the_depth_of_a_layer_is_in_its_name(layer, expected):
    assert depth(layer) == expected


def test_the_warm_up_ends_where_the_learning_rate_peaks():
    history = healthy(rows=100)
    assert History(history).settled_row() == limits.EARLY_STEPS
    history["learning_rate"] = np.minimum(np.arange(100), 70)
    assert History(history).settled_row() == 70
    assert History(healthy(rows=20)).settled_row() == 20


@full
@pytest.mark.parametrize(
    ("behind", "expected"), [(True, ["misplaced_clip"]), (False, [])]
)
def test_a_clip_behind_muon_is_seen(behind, expected):
    """In a real run: the norm of an orthogonal update hardly changes."""
    params = {
        f"l{i}": 0.3 * jax.random.normal(jax.random.key(i), (16, 16)) for i in range(3)
    }

    def loss_fn(params, x):
        out = functools.reduce(lambda x, w: jnp.tanh(x @ w), params.values(), x)
        return jnp.mean((out - jnp.roll(x, 1, 1)) ** 2)

    clip, muon = ost.clip_by_zscore(), optax.contrib.muon(0.01)
    order = (muon, clip) if behind else (clip, muon)
    tx = ost.record_history(optax.chain(ost.record("grad"), *order), length=150)

    @jax.jit
    def step(params, state, key):
        x = jax.random.normal(key, (8, 16))
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(150):
        params, state = step(params, state, jax.random.key(100 + i))
    assert kinds(ost.history(state)) == expected

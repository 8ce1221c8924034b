"""The benchmark of the noise scale: its truth, its counts, and what it has found."""

import math

import noise_recording
import noise_truth
import numpy as np
import pytest
import reporting
from noise_truth import Judged


def test_the_truth_has_no_bias_and_the_error_that_it_says():
    """Of Gaussian gradients, tr Σ = 6·4 and ‖G‖² = 6 in every trial."""
    rng, part, found = np.random.default_rng(0), noise_recording.PART, []
    for _ in range(400):
        noise = rng.standard_normal((1, 32, 6)) * np.sqrt(4 / part)
        gradients = 1 + noise
        gram = gradients @ gradients.swapaxes(1, 2)
        found.append(noise_recording.u_statistics(gram)[0])
    trace, grad_sq, error = np.array(found).T
    for values, true in ((trace, 24.0), (grad_sq, 6.0)):
        assert abs(values.mean() - true) < 4 * values.std() / math.sqrt(len(values))
    np.testing.assert_allclose(
        np.median(error), np.log(trace / grad_sq).std(), rtol=0.1
    )


def judged(truth, low, high):
    at = np.array([10, 20, 30, 40, 50])
    scale = np.sqrt(np.array(low) * np.array(high))
    ends = np.array(low, float), np.array(high, float)
    return Judged(at, np.array(truth, float), np.zeros(5), scale, *ends, 0.0)


def test_how_long_a_change_takes_to_be_seen():
    truth = [1, 1, 20, 20, 20]
    seen = judged(truth, [0.5, 0.5, 15, 15, 15], [2, 2, 30, 30, 30])
    assert seen.back_after() == [0, 0]
    late = judged(truth, [0.5, 0.5, 0.5, 0.5, 15], [2, 2, 2, 2, 30])
    assert late.back_after() == [20, 20]
    assert late.within.tolist() == [True, True, False, False, True]
    never = judged(truth, [0.5] * 5, [2] * 5)
    assert never.back_after() == [20, 20]
    assert judged([1, 2, 4, 8, 16], [1] * 5, [2] * 5).back_after() == []


def test_the_regression_is_that_of_its_closed_form():
    trace, grad_sq, truth = noise_truth.regression(0, 400, 200)
    for at in (0, 399):
        # ‖w‖² from the truth, and tr Σ from that.
        norm_sq = 20 / (truth[at] - 21)
        np.testing.assert_allclose(grad_sq[at].mean(), norm_sq.mean(), rtol=0.1)
        expected = np.mean(truth[at] * norm_sq)
        np.testing.assert_allclose(trace[at].mean(), expected, rtol=0.1)
    assert np.median(truth[399]) > 2 * np.median(truth[0])


def test_rules_that_average_agree_with_the_library_while_nothing_changes():
    rng = np.random.default_rng(0)
    trace = rng.uniform(80, 120, (150, 1))
    grad_sq = 10 * rng.uniform(0.5, 1.5, (150, 1))
    ours = noise_truth.ours(trace, grad_sq, 8)
    average = noise_truth.RULES["average over 199 steps"](trace, grad_sq, 8)
    agreeing = noise_truth.agreeing(trace, grad_sq, 8)
    np.testing.assert_allclose(ours.scale[-1], average.scale[-1], rtol=0.03)
    np.testing.assert_allclose(agreeing.scale[-1], average.scale[-1], rtol=1e-6)


@pytest.mark.parametrize("rule", ["ours"])
def test_what_the_documentation_claims_of_the_interval_was_measured(rule):
    row = reporting.read("noise_truth")["rules"][rule]
    held, all_of_them = row["within"]
    assert held >= 0.9 * all_of_them
    assert math.log(row["off_by"]) <= 0.35
    assert abs(row["bias"]) <= 0.15
    assert row["open"] <= 1 / 3
    assert row["back_after"] <= 30

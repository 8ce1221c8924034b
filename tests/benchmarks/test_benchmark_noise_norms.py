"""The benchmark of both norms: its truth, what a batch is worth, and its fit."""

import noise_norms
import noise_norms_recording as recording
import numpy as np
import pytest
import reporting


def test_the_truth_in_the_l1_norm_has_no_bias():
    """Of Gaussian gradients, with Σσ and ΣG²/σ by hand, in 400 trials."""
    rng, sigma = np.random.default_rng(0), np.array([1.0, 2.0, 0.5, 0.0])
    mean = np.array([0.2, -0.5, 0.0, 0.0])
    noise = sigma * rng.standard_normal((400, 24, 4)) / np.sqrt(recording.PART)
    found = np.array([recording.l1_statistics(parts) for parts in mean + noise])
    expected = sigma.sum(), 0.04 / 1 + 0.25 / 2
    error = found.std(0) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(0) - expected) < 4 * error)


def test_the_progress_of_a_sign_tends_to_the_norm():
    """Without noise it is ‖G‖₁ for every batch."""
    parts = np.tile([1.0, -2.0, 0.5], (12, 1))
    assert [recording.progress(parts, n) for n in (1, 3, 6)] == [3.5] * 3


def test_the_limit_of_the_curve_is_its_norm():
    size = np.array([8.0, 16.0, 64.0, 256.0])
    value = 5 * np.sqrt(size / (size + 30))
    np.testing.assert_allclose(noise_norms.limit(np.stack([size, value], 1)), 5)


@pytest.mark.parametrize("b_0", [0.5, 12.0, 300.0])
def test_the_measured_noise_scale_is_that_of_the_curve(b_0):
    fell = 0.3 * noise_norms.predicted(b_0)
    np.testing.assert_allclose(noise_norms.critical(fell), b_0, rtol=0.01)


def test_the_best_rate_is_looked_for_until_it_is_inside():
    for best in (1e-4, 1e-3, 8e-3):
        found = recording.best_rate(lambda x, best=best: np.log(x / best) ** 2, 1e-3)
        rates, losses = map(np.array, (list(found), list(found.values())))
        assert rates.min() < best < rates.max()
        np.testing.assert_allclose(noise_norms.lowest(rates, losses), 0, atol=1e-9)


def test_a_rule_reads_what_the_recording_holds():
    """A constant noise scale, from exact statistics: Σσ = 10 and ΣG²/σ = 10/400."""
    found = noise_norms.l1(np.full(60, 10.0), np.full(60, 10 / 400))
    np.testing.assert_allclose(found.scale[-1], 400, rtol=0.01)


def test_what_the_documentation_says_of_both_norms_was_measured():
    report = reporting.read("noise_norms")
    truth, worth = report["own_truth"], report["worth"]
    held, all_of_them = truth["l1, above"]["within"]
    assert held >= 0.9 * all_of_them
    assert truth["l1, above"]["width"] < truth["l2, above"]["width"]
    assert truth["published, above"]["off_by"] > 2 * truth["l1, above"]["off_by"]
    # No better, and no worse.
    for kind in ("true", "estimated"):
        errors = [worth[f"{norm}, {kind}"]["error"] for norm in ("l1", "l2")]
        assert abs(errors[0] - errors[1]) < 2

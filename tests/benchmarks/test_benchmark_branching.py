"""What is said of the cost and the exactness of a branch is what was measured."""

import branching
import pytest
import reporting
from tiers import full


@pytest.mark.parametrize("probes", branching.PROBES)
@pytest.mark.parametrize("dtype", branching.DTYPES)
@full
def test_what_comes_back_is_rounded_once(dtype, probes):
    close, far = (
        branching.exactness(dtype, drift, probes, size=2000) for drift in (1e-3, 1.0)
    )
    assert close["exact"] > 0.99
    assert far["exact"] > 0.6
    # The largest difference is some six deviations.
    assert far["largest"] < 6 * far["spacing"]


@pytest.fixture(scope="module")
def report():
    return reporting.read("branching")


def test_a_branch_takes_room_for_what_it_keeps_and_no_other(report):
    guard, params, whole = report["cost"].values()
    held, temp = "held_bytes_per_parameter", "temp_bytes_per_parameter"
    assert params[held] - guard[held] == pytest.approx(4, abs=0.01)
    assert whole[held] - guard[held] == pytest.approx(12, abs=0.01)
    for each in (params, whole):
        assert each[temp] - guard[temp] < 0.05


def test_while_nothing_is_wrong_a_branch_costs_no_time(report):
    _, params, _ = report["cost"].values()
    assert params["time_ratio"] <= 1.02


def test_more_probes_round_no_further(report):
    for name, row in report["exactness"].items():
        once = report["exactness"][name.replace("4 probes", "0 probes")]
        assert row == once

"""What accumulation costs by XLA's own analysis; times are for the benchmark alone."""

import sys
from pathlib import Path

import chex
import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accumulation

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the XLA of older versions copies more"
)


def test_across_steps_nothing_is_copied():
    scale = accumulation.QUICK
    batch, differentiate = accumulation.across_cases(scale)["gradient given"]
    params = accumulation.parameters(scale)
    programs = accumulation.accumulators(params, batch, differentiate)
    rows = accumulation.measure_across(programs, cycles=2)
    table = accumulation.across_table(rows, targets=True)
    assert all(name in table for name in rows)
    baseline = rows.pop(accumulation.MULTI_STEPS)
    # What is counted as a copy is one: MultiSteps is known to make them.
    assert baseline["copies"] > 0
    for row in rows.values():
        assert row["copies"] == 0
        assert row["temp_ratio"] <= 0.15
    # Both took the same steps, so it is the same that was compared.
    ends = [
        programs[name].arguments[0]
        for name in (accumulation.MULTI_STEPS, "accumulate_moments(adamw), no Σg²")
    ]
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["microbatch_gradients", "…, mean_square=True"])
def test_inside_a_step_it_is_what_one_writes_by_hand(name):
    (shape, rows, _), *_ = accumulation.QUICK.steps.values()
    case = accumulation.gpt(shape, rows)
    side = accumulation.INSIDE[name]
    programs = {
        key: accumulation.build_inside(accumulation.INSIDE[key], case)
        for key in (side.baseline, name)
    }
    found = accumulation.measure_inside(programs, rounds=2)
    assert name in accumulation.inside_table(found)
    gradient_mb = 4e-6 * found[name]["parameters"]
    assert abs(found[name]["temp_mb_more"]) <= 0.25 * gradient_mb
    assert found[name]["flops_ratio"] <= 1.02
    losses = [p.step(*p.arguments, p.batch)[2] for p in programs.values()]
    chex.assert_trees_all_close(*losses, rtol=1e-4)

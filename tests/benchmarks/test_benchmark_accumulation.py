"""What accumulation costs by XLA's own analysis; times are for the benchmark alone."""

import accumulation
import chex
import jax
import jax.numpy as jnp
import pytest
from tiers import full

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the XLA of older versions copies more"
)


@full
def test_across_steps_nothing_is_copied():
    # Two leaves compile in a fraction of the time.
    scale = accumulation.QUICK._replace(shapes={"w": (512, 256), "b": (512,)})
    batch, differentiate = accumulation.across_cases(scale)["gradient given"]
    params = accumulation.parameters(scale)
    programs = accumulation.accumulators(params, batch, differentiate)
    rows = accumulation.measure_across(programs, cycles=2)
    table = accumulation.across_table(rows)
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


def gpt():
    (shape, rows, _), *_ = accumulation.QUICK.steps.values()
    return accumulation.gpt(shape, rows)


def perceptron():
    """Compiles in a quarter of the time."""
    params = {"w": jnp.eye(256), "b": jnp.zeros(256)}
    data = jax.random.normal(jax.random.key(0), (128, 256))

    def loss_fn(params, scales):
        x = scales[:, None, None] * data
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - 1) ** 2)

    # The same microbatches whether they are neighbours, as by hand, or k and k + 4.
    scales = jnp.array([1.0, 2, 3, 4, 2, 1, 4, 3])
    return accumulation.Gpt(params, loss_fn, scales)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("microbatch_gradients", gpt),
        ("…, mean_square=True", perceptron),
    ],
)
@full
def test_inside_a_step_it_is_what_one_writes_by_hand(name, make):
    case, side = make(), accumulation.INSIDE[name]
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

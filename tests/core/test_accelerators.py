"""The programs for accelerators: what they compute, and what they do not ask.

No accelerator is needed: a program is lowered for one, or its form is run on a CPU.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from tiers import full, quick_only

import optax_stability as ost
from optax_stability import thresholds
from optax_stability._core import _in_place, _norms
from optax_stability._spikes import _exchange, _guarded_step


@pytest.fixture
def accelerator(monkeypatch):
    """Takes the other side of every fork between platforms, from here on.

    What was traced before, or is traced here, has one side of it.
    """

    def switch():
        jax.clear_caches()
        monkeypatch.setattr(
            jax.lax,
            "platform_dependent",
            lambda *args, cpu, default, **_: default(*args),
        )

    yield switch
    jax.clear_caches()


def fresh(function):
    """The same function, as one that was never traced."""
    return lambda *args: function(*args)


def step(grads, state):
    return RECORD.update(grads, state)


RECORD = ost.record("grad")
BATCH = jnp.arange(8.0).reshape(4, 2)


def gradients(scale):
    def loss_fn(params, x):
        return scale * jnp.mean((x @ params["w"]) ** 2) + jnp.sum(params["b"] * x)

    fn = ost.microbatch_gradients(loss_fn, 2, vmap_size=1)
    return fn({"w": jnp.ones(2), "b": jnp.ones(2)}, BATCH)


@pytest.mark.parametrize(
    "value", [1.0, 0.0, 1e-25, 3e9, 1e15, 1e38, np.inf, -np.inf, np.nan]
)
@quick_only("nan")
def test_norms_and_counts_are_the_same(accelerator, value):
    grads = {"a": jnp.full((3, 5), value), "b": jnp.array([2.0, value, -1.0])}
    grads["c"] = jnp.ones(4)
    state = RECORD.init(grads)
    expected = jax.jit(fresh(step))(grads, state)
    tangent = jax.jvp(_norms.global_norm, (grads,), (grads,))
    accelerator()
    chex.assert_trees_all_equal(jax.jit(fresh(step))(grads, state), expected)
    chex.assert_trees_all_close(
        jax.jvp(_norms.global_norm, (grads,), (grads,)), tangent, rtol=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38, np.nan])
@quick_only("nan")
def test_microbatches_are_kept_or_left_out_as_on_cpu(accelerator, scale):
    expected = jax.jit(fresh(gradients))(scale)
    accelerator()
    chex.assert_trees_all_equal(jax.jit(fresh(gradients))(scale), expected)


# --- whole optimizers --------------------------------------------------------------

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.ones(4)}
# Armed soon, so that a short run meets every limit.
LIMITS = {
    "grad_norm": thresholds.detrended_mad(5.0, floor=5.0, centre=3, window=4, arm=4),
    "value": thresholds.detrended_mad(7.0, floor=0.5, centre=3, arm=4, log=False),
    "confirm": thresholds.detrended_mad(4.0, floor=0.3, centre=3, arm=4, log=False),
    "max_consecutive": 2,
}


def inner():
    return optax.chain(ost.clip_by_zscore(warmup=3), ost.safe_adamw(1e-2))


def guard(tx):
    return ost.spike_guard(tx, **LIMITS)


OPTIMIZERS = {
    "guard": lambda: guard(inner()),
    "skip": lambda: ost.skip_spikes(inner(), grad_norm=LIMITS["grad_norm"]),
    "branch": lambda: ost.branch_on_spike(inner(), max_length=8, **LIMITS),
    "branch all": lambda: ost.branch_on_spike(
        inner(), keep="all", max_length=8, **LIMITS
    ),
    "restart": lambda: guard(ost.restart_moments(inner(), every=7, warmup=3)),
    "accumulate": lambda: ost.accumulate_moments(guard(inner()), 2),
    "recorded": lambda: ost.record_history(
        optax.chain(
            ost.record("grad", every=4),
            ost.record("params", of="params", every=4),
            guard(optax.chain(inner(), ost.record("update", every=4))),
        ),
        length=8,
        slow_every=4,
    ),
}


def hostile_stream(steps=24):
    """Gradients and losses with NaN, Inf, huge numbers and lasting spikes."""
    rng = np.random.default_rng(0)
    w, b = (
        (1 + 0.1 * rng.standard_normal((steps, *x.shape))).astype("f4")
        for x in PARAMS.values()
    )
    losses = (3 + 0.05 * rng.standard_normal(steps)).astype("f4")
    w[3, 0, 0], b[5, 1], losses[6] = np.nan, np.inf, np.nan
    b[8] *= 1000
    losses[10:14] += 3
    w[17] *= 1e25
    losses[19:] -= 1
    return list(zip(w, b, losses, strict=True))


def train(make, wrap):
    """Parameters and states after every step of the hostile stream."""
    tx = make()
    step = wrap(lambda g, s, p, loss: tx.update(g, s, p, value=loss))
    params, state, found = PARAMS, tx.init(PARAMS), []
    for w, b, loss in hostile_stream():
        updates, state = step({"w": w, "b": b}, state, params, loss)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


def one_by_one(step):
    """Operation by operation.

    XLA rounds a product that is part of a sum, or not, depending on what else is in the
    program.
    """

    def run(*args):
        with jax.disable_jit():
            return step(*args)

    return run


@pytest.fixture
def selects(monkeypatch):
    """Takes the other side of the forks in control flow; sums keep their order."""

    def switch():
        for module in (_in_place, _guarded_step, _exchange):
            monkeypatch.setattr(
                module,
                "by_platform",
                lambda *args, cpu, accelerator, **_: accelerator(*args),
            )

    return switch


@pytest.fixture
def steps_as_they_are(monkeypatch):
    """No step is traced for its derivative: its own forks would then be compiled."""
    monkeypatch.setattr(
        _in_place,
        "_with_explicit_inputs",
        lambda step, carry: (lambda carry, inputs: step(carry), ()),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("steps_as_they_are")
@full
def test_a_hostile_run_is_the_same_bit_for_bit(selects, name):
    expected = train(OPTIMIZERS[name], one_by_one)
    selects()
    chex.assert_trees_all_equal(train(OPTIMIZERS[name], one_by_one), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@quick_only("guard", "branch")
def test_a_hostile_run_differs_by_rounding_alone(accelerator, name):
    expected = train(OPTIMIZERS[name], jax.jit)
    accelerator()
    found = train(OPTIMIZERS[name], jax.jit)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


# --- programs ----------------------------------------------------------------------


def count_asked(text):
    """Loops whose length XLA does not know, and conditionals."""
    loops = [line for line in text.splitlines() if " while(" in line]
    unknown = [line for line in loops if "known_trip_count" not in line]
    return len(unknown) + text.count(" conditional(")


@pytest.mark.parametrize(
    ("name", "extra", "asked"),
    [
        ("guard", {}, 0),
        ("skip", {}, 0),
        ("restart", {}, 0),
        ("accumulate", {}, 1),
        ("recorded", {"look": False}, 0),
        ("recorded", {"look": True}, 0),
    ],
)
@quick_only("guard-extra0-0", "recorded-extra4-0")
def test_an_ordinary_step_asks_nothing_of_the_host(accelerator, name, extra, asked):
    accelerator()
    tx = OPTIMIZERS[name]()

    def step(params, state, grads, loss):
        return tx.update(grads, state, params, value=loss, **extra)

    state = jax.eval_shape(tx.init, PARAMS)
    text = jax.jit(step).lower(PARAMS, state, PARAMS, 1.0).compile().as_text()
    assert count_asked(text) == asked


def chosen_branches(text):
    """Which side of the forks between platforms a lowered program takes."""
    found = set()
    for function in text.split("func.func")[1:]:
        numbers = dict(
            re.findall(
                r"(%\w+) = stablehlo.constant dense<(\d)> : tensor<i32>", function
            )
        )
        forks = re.findall(r'"stablehlo.case"\((%\w+)\)', function)
        found |= {numbers[fork] for fork in forks if fork in numbers}
    return found


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_program_is_for_the_platform_that_it_is_exported_for(platform):
    tx = OPTIMIZERS["guard"]()
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
    exported = export.export(step, platforms=[platform])(
        PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS
    )
    on_cpu = chosen_branches(exported.mlir_module()) == {"0"}
    assert on_cpu == (platform == "cpu")
    assert exported.platforms == (platform,)

"""Safe Adam: Adam as published, at any scale, with a bound, whatever arrives."""

import functools
import warnings

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import full, quick_only

import optax_stability as ost

# r: 300 steps of hypot, each within 1 ulp of 1.2e-7, add up like a random walk to 2e-6
# and in the worst case to 4e-5 of r; m: remembers 1/(1 − 0.9) = 10 roundings of 6e-8.
RTOL = 1e-5
# Where m cancels, its 10 roundings remain: 6e-7 of the largest m̂ ≤ 7.27·r̂.
ATOL = 5e-6
# A quotient and a product or two in float32.
ROUNDING = 1e-6
# float32 holds β₂ to 3e-8, which is 3e-5 of 1 − β₂ = 1e-3 and half of it in the root.
BOUND = 2e-5
# rms_unit is a float32 average too: it stands still where (1 − r²)(1 − β₂)/2 of it is
# half an ulp, 6e-5 below 1 at β₂ = 0.999.
STALL = 6e-5
# Half a spacing of the storage dtype.
HALF_SPACING = {jnp.float32: 1e-7, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}

BETAS = [(0.9, 0.999), (0.9, 0.95), (0.9, 0.9), (0.0, 0.99)]
WITH_BETAS = {betas: ost.scale_by_safe_adam(*betas) for betas in BETAS}
PLAIN = WITH_BETAS[0.9, 0.999]
NARROW = {
    dtype: ost.scale_by_safe_adam(rms_dtype=dtype)
    for dtype in (jnp.bfloat16, jnp.float16)
}
NARROW_MU = {
    dtype: ost.scale_by_safe_adam(mu_dtype=dtype)
    for dtype in (jnp.bfloat16, jnp.float16)
}
WITH_EPS = {
    (eps, mode): ost.scale_by_safe_adam(eps=eps, eps_mode=mode)
    for eps, mode in [
        (1e-8, "add"),
        (1e-3, "add"),
        (1e-3, "max"),
        (0, "max"),
        (0, "atan2"),
    ]
}
SPIKES = ost.scale_by_safe_adam(spike_ratio=4.0)
CLIPPING = ost.scale_by_safe_adam(update_rms_max=1.0, spike_ratio=4.0)


class ReferenceAdam:
    """Kingma & Ba 2015, Algorithm 1, in float64, for one leaf; no bound on the update.

    With StableAdamW's update clipping (arXiv:2304.13013, §3.2) and SPAM's element
    clipping (arXiv:2501.06842, eq. 1) with a bias-corrected v.
    """

    def __init__(
        self, b1=0.9, b2=0.999, eps=0.0, *, mode="add", rms_max=None, spike=None
    ):
        self.b1, self.b2, self.mode = b1, b2, mode
        self.eps = eps if callable(eps) else lambda step: eps
        self.rms_max, self.spike = rms_max, spike
        self.step, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, g):
        g, eps = np.asarray(g, np.float64), float(self.eps(self.step))
        if self.spike is not None and self.step:
            limit = np.sqrt(self.spike * self.v / (1 - self.b2**self.step))
            g = np.where(self.v > 0, np.clip(g, -limit, limit), g)
        self.step += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m_hat = self.m / (1 - self.b1**self.step)
        r_hat = np.sqrt(self.v / (1 - self.b2**self.step))
        if self.mode == "atan2":
            return 1.27 * np.arctan2(m_hat, r_hat)
        floored = np.maximum(r_hat, eps)
        divisor = floored if self.mode == "max" else r_hat + eps
        u = m_hat / np.where(divisor > 0, divisor, 1.0)
        if self.rms_max is not None:
            ratio = g / np.where(floored > 0, floored, 1.0)
            u = u / max(1.0, np.sqrt(np.mean(ratio**2)) / self.rms_max)
        return u


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


def run(tx, grads):
    """The update of each step, and the last state."""
    state, updates = tx.init(jax.tree.map(lambda g: g[0], grads)), []
    for i in range(len(jax.tree.leaves(grads)[0])):
        update, state = compiled(tx)(jax.tree.map(lambda g, i=i: g[i], grads), state)
        updates.append(update)
    return jax.tree.map(lambda *us: np.stack(us), *updates), state


def run_reference(grads, *args, **kwargs):
    reference = ReferenceAdam(*args, **kwargs)
    return np.stack([reference(g) for g in grads])


def bound(b1, b2):
    return (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))


def noisy(steps, *, seed=0, scale=1.0, n=32):
    """Dense, sparse and heavy-tailed coordinates, a third each."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((steps, n))
    sparse = dense * (rng.random((steps, n)) < 0.1)
    heavy = rng.standard_t(2, (steps, n))
    return (scale * np.concatenate([dense, sparse, heavy], axis=1)).astype(np.float32)


def at_every_scale(steps):
    """Coordinates of sizes from 1e-25 to 1e25 side by side."""
    grads = noisy(steps)
    exponents = np.random.default_rng(1).uniform(-25, 25, grads.shape[1])
    return (grads * 10.0**exponents).astype(np.float32)


# --- the rule --------------------------------------------------------------------


@pytest.mark.parametrize(("b1", "b2"), BETAS)
def test_without_eps_it_is_adam_as_published_for_coordinates_of_any_size(b1, b2):
    grads = at_every_scale(300)
    reference = ReferenceAdam(b1, b2)
    expected = np.stack([reference(g) for g in grads])
    updates, state = run(WITH_BETAS[b1, b2], grads)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    assert int(state.step) == 300
    r_hat = np.sqrt(reference.v / (1 - b2**300))
    np.testing.assert_allclose(state.rms / state.rms_unit, r_hat, rtol=RTOL)


@pytest.mark.parametrize(("eps", "mode"), [(1e-8, "add"), (1e-3, "add"), (1e-3, "max")])
def test_eps_is_added_or_a_floor(eps, mode):
    # Sizes from 1e-6, where ε = 1e-3 dominates, to 1e2.
    sizes = 10.0 ** np.random.default_rng(1).uniform(-6, 2, 96)
    grads = (noisy(300) * sizes).astype(np.float32)
    expected = run_reference(grads, eps=eps, mode=mode)
    updates, _ = run(WITH_EPS[eps, mode], grads)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)


def test_atan2_replaces_the_quotient():
    grads = at_every_scale(300)
    expected = run_reference(grads, mode="atan2")
    updates, _ = run(WITH_EPS[0, "atan2"], grads)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)


def test_eps_may_be_a_schedule_that_starts_at_step_zero():
    grads = noisy(40, scale=1e-2)

    def schedule(step):
        return 1e-1 * 0.8 ** step.astype(jnp.float32)

    expected = run_reference(grads, eps=schedule)
    updates, state = run(ost.scale_by_safe_adam(eps=schedule), grads)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    assert float(state.eps) == pytest.approx(schedule(39), rel=RTOL)


def test_two_steps_by_hand():
    # m = ½·1, then ½·½ + ½·3 = 1.75, m̂ = 1.75/.75; v = ¼·1, then ¾·¼ + ¼·9 = 2.4375,
    # v̂ = 2.4375/.4375.
    updates, _ = run(ost.scale_by_safe_adam(0.5, 0.75), np.array([[1.0], [3.0]], "f4"))
    expected = [[1.0], [(1.75 / 0.75) / np.sqrt(2.4375 / 0.4375)]]
    np.testing.assert_allclose(updates, expected, rtol=ROUNDING)


def test_it_agrees_with_adam_of_optax():
    grads = noisy(100)
    expected, _ = run(optax.scale_by_adam(eps=1e-8), grads)
    updates, _ = run(WITH_EPS[1e-8, "add"], grads)
    # optax forms 1 − β₂ᵗ in float32: 1e-7 of 1e-3 at the first steps, half of it in √.
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=ATOL)


def computation(tx):
    """What init and update compute, as text."""
    params = np.zeros(3, np.float32)
    state = jax.eval_shape(tx.init, params)
    return str(jax.make_jaxpr(tx.init)(params)), str(
        jax.make_jaxpr(tx.update)(params, state)
    )


def test_defaults_are_those_of_adam_without_eps():
    written_out = ost.scale_by_safe_adam(
        0.9,
        0.999,
        0.0,
        eps_mode="add",
        second_moment="mean",
        update_rms_max=None,
        spike_ratio=None,
        mu_dtype=None,
        rms_dtype=jnp.float32,
    )
    assert computation(ost.scale_by_safe_adam()) == computation(written_out)


# --- any scale -------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx", [PLAIN, *WITH_EPS.values()], ids=["plain", *map(str, WITH_EPS)]
)
def test_zero_over_zero_is_zero(tx):
    updates, state = run(tx, np.zeros((3, 96), np.float32))
    assert not updates.any()
    assert not np.asarray(state.rms).any()


def test_a_coordinate_that_never_had_a_gradient_is_not_updated():
    grads = noisy(50)
    grads[:, ::3] = 0.0
    updates, _ = run(PLAIN, grads)
    assert not updates[:, ::3].any()
    assert np.isfinite(updates).all()


@pytest.mark.parametrize(
    ("rms_dtype", "b2"),
    [(jnp.float32, 0.95), (jnp.float32, 0.99999), (jnp.bfloat16, 0.999)],
)
def test_the_first_step_has_length_one_from_1e_minus_36_to_1e36(rms_dtype, b2):
    exponents = np.arange(-36, 37)
    # √(1−β₂)·g has to be a normal number.
    exponents = exponents[10.0**exponents * np.sqrt(1 - b2) > 1.2e-38]
    sizes = 10.0**exponents
    grads = np.concatenate([sizes, -sizes]).astype(np.float32)[None]
    updates, _ = run(ost.scale_by_safe_adam(0.9, b2, rms_dtype=rms_dtype), grads)
    # The narrow dtypes round up or down: a whole spacing.
    tolerance = ROUNDING + 2 * HALF_SPACING[rms_dtype]
    np.testing.assert_allclose(updates, np.sign(grads), rtol=tolerance)


SCALE_FREE = {
    "float32": PLAIN,
    "bfloat16 rms": NARROW[jnp.bfloat16],
    "bfloat16 mu": NARROW_MU[jnp.bfloat16],
    "atan2": WITH_EPS[0, "atan2"],
    "max": WITH_EPS[0, "max"],
    "update and spike clipping": CLIPPING,
}


@pytest.mark.parametrize("tx", SCALE_FREE.values(), ids=SCALE_FREE.keys())
def test_a_power_of_two_changes_no_bit_of_the_update(tx):
    grads = noisy(50)
    updates, _ = run(tx, grads)
    assert np.abs(updates).max() > 0.5
    for exponent in (-60, -31, -1, 1, 31, 60):
        scaled, _ = run(tx, grads * np.float32(2.0**exponent))
        np.testing.assert_array_equal(scaled, updates, err_msg=f"2^{exponent}")


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e36])
def test_constant_gradients_at_the_ends_of_the_range_keep_length_one(scale):
    grads = np.full((60, 96), scale, np.float32)
    grads[:, ::2] *= -1
    updates, _ = run(PLAIN, grads)
    np.testing.assert_allclose(updates, np.sign(grads), rtol=RTOL)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.9, 0.9)])
def test_gradients_that_underflow_stay_within_the_bound(b1, b2):
    # Some are below the smallest normal number, or √(1−β₂)·g is.
    grads = np.tile(np.geomspace(1e-40, 1e-36, 96).astype(np.float32), (60, 1))
    updates, _ = run(WITH_BETAS[b1, b2], grads)
    bound = (1 - b1) / np.sqrt((1 - b2) * (1 - b1 * b1 / b2))
    assert np.abs(updates).max() <= bound * (1 + RTOL)


# --- the bound -------------------------------------------------------------------


BOUNDED = {
    (0.9, 0.999): [PLAIN, *NARROW.values()],
    (0.9, 0.9): [WITH_BETAS[0.9, 0.9]],
}
SOME_GRADIENTS = st.one_of(
    st.floats(-(2.0**119), 2.0**119, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 1e-36, -1e-36, 1e36, 1e-8, 1e3, np.nan, np.inf]),
)


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(grads=hnp.arrays(np.float32, (16, 3), elements=SOME_GRADIENTS))
@full
def test_no_sequence_of_gradients_exceeds_the_bound(grads):
    for betas, transformations in BOUNDED.items():
        for tx in transformations:
            updates, state = run(tx, grads)
            chex.assert_tree_all_finite((updates, state))
            assert np.abs(updates).max() <= bound(*betas) * (1 + BOUND)


@pytest.mark.parametrize(("b1", "b2", "zeros"), [(0.9, 0.95, 120), (0.9, 0.999, 6000)])
@quick_only("0.9-0.95-120")
def test_the_worst_sequence_comes_within_a_percent_of_the_bound_untouched(
    b1, b2, zeros
):
    # Equality in Cauchy–Schwarz: gᵢ ∝ (β₂/β₁)ⁱ, after so many zeros that β₂ᵗ → 0.
    growth = (b2 / b1) ** np.arange(200 if b2 < 0.99 else 100)
    grads = np.concatenate([np.zeros(zeros), growth / growth[-1]])
    grads = grads.astype(np.float32)[:, None]
    expected = run_reference(grads, b1, b2)[-1]
    updates, _ = run(WITH_BETAS[b1, b2], grads)
    assert 0.99 * bound(b1, b2) < expected[0] < bound(b1, b2)
    np.testing.assert_allclose(updates[-1], expected, rtol=STALL)


def test_the_bound_is_what_the_docstring_says():
    assert bound(0.9, 0.999) == pytest.approx(7.27, abs=0.005)
    assert bound(0.9, 0.95) == pytest.approx(1.165, abs=0.0005)


@pytest.mark.parametrize("b", [0.9, 0.9999])
def test_with_equal_betas_a_constant_gradient_gives_one_the_bound_itself(b):
    grads = np.array([[1.0, -3.0, 0.1, 7e-5] * 24] * 100, np.float32)
    tx = WITH_BETAS[b, b] if b == 0.9 else ost.scale_by_safe_adam(b, b)
    updates, _ = run(tx, grads)
    # Both moments remember 1/(1−β) = up to 100 steps' roundings.
    np.testing.assert_allclose(updates, np.sign(grads), rtol=RTOL)


def test_without_a_bound_the_update_is_still_adam_as_published():
    grads = noisy(100)
    with pytest.warns(UserWarning, match="b1=0.9 and b2=0.5"):
        tx = ost.scale_by_safe_adam(0.9, 0.5)
    expected = run_reference(grads, 0.9, 0.5)
    updates, _ = run(tx, grads)
    assert np.abs(expected).max() > 5
    # m can outlive r by far: what is left is rounding of m over a small r.
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-3)


# --- gradients that are not finite -----------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "tx",
    [PLAIN, *NARROW.values(), NARROW_MU[jnp.bfloat16], SPIKES],
    ids=["float32", "bfloat16 rms", "float16 rms", "bfloat16 mu", "spike clipping"],
)
def test_a_bad_coordinate_keeps_its_moments_and_leaves_the_others_alone(tx, bad):
    grads = noisy(8)
    state = tx.init(grads[0])
    others = np.arange(grads.shape[1]) != 1
    for g in grads:  # the first step included
        poisoned_g = np.where(others, g, bad).astype(np.float32)
        poisoned_u, poisoned = compiled(tx)(poisoned_g, state)
        u, clean = compiled(tx)(g, state)
        assert np.isfinite(poisoned_u).all()
        np.testing.assert_array_equal(np.asarray(poisoned_u)[others], u[others])
        for name in ("mu", "rms"):
            old, new, without = (
                np.asarray(getattr(each, name)) for each in (state, poisoned, clean)
            )
            assert new[1] == old[1]
            np.testing.assert_array_equal(new[others], without[others])
        state = clean


@pytest.mark.parametrize("dtype", NARROW)
def test_a_bad_gradient_keeps_every_value_that_a_narrow_rms_can_have(dtype):
    rms = np.arange(0x0400, 0x7800, dtype=np.uint16).view(dtype)  # from 1e-36, 6e-5
    bad = np.full(rms.shape, np.nan, np.float32)
    state = (
        NARROW[dtype]
        .init(bad)
        ._replace(rms=rms, mu_unit=jnp.float32(0.5), rms_unit=jnp.float32(0.5))
    )
    for step in range(16):
        _, after = compiled(NARROW[dtype])(bad, state._replace(step=jnp.int32(step)))
        np.testing.assert_array_equal(after.rms, rms)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tx", [PLAIN, CLIPPING], ids=["plain", "clipping"])
@pytest.mark.parametrize("at", [0, 1, 10])
def test_training_recovers_after_a_bad_step(at, tx, bad):
    grads = noisy(30)
    grads[at] = bad
    updates, state = run(tx, grads)
    chex.assert_tree_all_finite((updates, state))
    if at == 0:
        assert not updates[0].any()
    if tx is PLAIN:  # only the bias correction saw the bad step
        _, clean = run(tx, np.delete(grads, at, axis=0))
        chex.assert_trees_all_equal((state.mu, state.rms), (clean.mu, clean.rms))


# --- update clipping and spike clipping ------------------------------------------


@pytest.mark.parametrize(("rms_max", "eps"), [(1.0, 0.0), (0.5, 1e-2)])
def test_update_rms_max_is_stable_adamw_leaf_by_leaf(rms_max, eps):
    leaves = {"quiet": noisy(60), "loud": noisy(60, seed=1)}
    leaves["loud"][40] *= 30.0
    tx = ost.scale_by_safe_adam(eps=eps, update_rms_max=rms_max)
    updates, _ = run(tx, leaves)
    for name, grads in leaves.items():
        expected = run_reference(grads, eps=eps, rms_max=rms_max)
        np.testing.assert_allclose(updates[name], expected, rtol=RTOL, atol=ATOL)
    plain = run_reference(leaves["loud"], eps=eps)
    assert np.abs(updates["loud"][40]).max() < 0.3 * np.abs(plain[40]).max()


def test_spike_ratio_is_element_clipping_of_spam():
    grads = noisy(200)
    reference = ReferenceAdam(spike=4.0)
    expected = np.stack([reference(g) for g in grads])
    updates, state = run(SPIKES, grads)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(np.square(state.rms), reference.v, rtol=3 * RTOL)
    plain = ReferenceAdam()
    for g in grads:
        plain(g)
    assert (reference.v < 0.98 * plain.v).mean() > 0.2  # it was not idle


def test_a_spike_after_zeros_is_not_clipped_to_zero():
    grads = np.zeros((5, 96), np.float32)
    grads[3:] = 2.0
    updates, state = run(SPIKES, grads)
    np.testing.assert_allclose(updates, run_reference(grads, spike=4.0), rtol=RTOL)
    assert (np.asarray(state.rms) > 0).all()


def test_both_clippings_pass_ordinary_gradients():
    grads = np.random.default_rng(0).choice([-1.0, 1.0], (30, 96)).astype(np.float32)
    tx = ost.scale_by_safe_adam(update_rms_max=1.001, spike_ratio=1.001)
    updates, state = run(tx, grads)
    expected, plain = run(PLAIN, grads)
    np.testing.assert_allclose(updates, expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(state.mu, plain.mu, atol=ROUNDING)
    np.testing.assert_allclose(state.rms, plain.rms, rtol=ROUNDING)


# --- storage ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW_MU)
def test_mu_may_be_narrow(dtype):
    grads = noisy(100)
    updates, state = run(NARROW_MU[dtype], grads)
    assert state.mu.dtype == dtype
    assert state.rms.dtype == updates.dtype == np.float32
    expected = run_reference(grads)
    # Ten roundings of half a spacing of an m̂ up to 7.27·r̂, and typically up to r̂.
    tolerance = 10 * HALF_SPACING[dtype]
    np.testing.assert_allclose(updates, expected, atol=7.27 * tolerance)
    assert np.sqrt(np.mean(np.square(updates - expected))) < tolerance


@pytest.mark.parametrize("dtype", NARROW)
def test_rms_may_be_narrow(dtype):
    grads = noisy(200)
    updates, state = run(NARROW[dtype], grads)
    assert state.rms.dtype == dtype
    assert state.mu.dtype == updates.dtype == np.float32
    reference = ReferenceAdam()
    expected = np.stack([reference(g) for g in grads])
    # A random walk of 200 steps of at most half a spacing each, three deviations.
    spread = 3 * HALF_SPACING[dtype] * np.sqrt(200)
    rms, known = np.asarray(state.rms).astype(np.float64), reference.v > 0
    np.testing.assert_allclose(rms[known], np.sqrt(reference.v[known]), rtol=spread)
    np.testing.assert_allclose(updates, expected, rtol=spread, atol=ATOL)


@pytest.mark.parametrize(
    ("dtype", "spread"), [(jnp.bfloat16, 0.06), (jnp.float16, 0.02)]
)
@quick_only("bfloat16-0.06")
def test_a_narrow_rms_decays_after_a_spike_as_it_should(dtype, spread):
    # Per step a coordinate moves one spacing s ≤ 2⁻⁷ (2⁻¹⁰) down with probability
    # 5e-4/s: over 1400 steps a random walk of deviation √(0.7·s) = 7 % (2.6 %). Equal
    # mantissas round alike, so the coordinates act like the half dozen paths that stay
    # apart: 3 % (1 %), of which two.
    steps, b2, tx = 1400, 0.999, NARROW[dtype]
    spike = np.exp(np.random.default_rng(0).uniform(-2, 2, 1024)).astype(np.float32)

    @jax.jit
    def decay(spike):
        def step(state, _):
            share = state.rms.astype(jnp.float32) / first.rms.astype(jnp.float32)
            return tx.update(0 * spike, state)[1], jnp.mean(share)

        _, first = tx.update(spike, tx.init(spike))
        return first.rms, jax.lax.scan(step, first, None, length=steps)[1]

    first, share = decay(spike)
    np.testing.assert_allclose(share, b2 ** (np.arange(steps) / 2), rtol=spread)

    if dtype == jnp.bfloat16:  # rounding to nearest would stay here for ever
        nearest = (np.float32(np.sqrt(b2)) * first.astype(jnp.float32)).astype(dtype)
        np.testing.assert_array_equal(nearest, first)


def test_float16_rms_is_never_infinite_and_never_zero_when_it_should_not_be():
    sizes = np.array([1e-30, 1e-12, 1e-7, 1e-3, 1e4, 1e6, 1e9, 1e30], np.float32)
    grads = np.concatenate([np.tile(sizes, (20, 12)), np.zeros((200, 96), np.float32)])
    updates, state = run(NARROW[jnp.float16], grads)
    chex.assert_tree_all_finite((updates, state))
    assert (np.asarray(state.rms) > 0).all()
    assert np.abs(updates).max() <= bound(0.9, 0.999) * (1 + BOUND)


@pytest.mark.parametrize("name", ["mu_dtype", "rms_dtype"])
def test_huge_gradients_do_not_poison_float16(name):
    grads = noisy(400)
    grads[:5] = 1e6
    # At β₂ = 0.9 they are forgotten in the last 50 steps: 0.9¹⁷⁰ = 2e-8 of 5e5.
    tx = ost.scale_by_safe_adam(0.8, 0.9, **{name: jnp.float16})
    updates, state = run(tx, grads)
    chex.assert_tree_all_finite((updates, state))
    expected = run_reference(grads, 0.8, 0.9)
    # 1/(1 − β) = 5 or 2·10 roundings of half a spacing, at twice a typical size.
    tolerance = 2 * 20 * HALF_SPACING[jnp.float16]
    deviation = updates[-50:] - expected[-50:]
    assert np.sqrt(np.mean(deviation**2)) < tolerance


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_give_narrow_updates_and_float32_moments(dtype):
    grads = noisy(50).astype(dtype)
    updates, state = run(PLAIN, grads)
    assert updates.dtype == dtype
    assert state.mu.dtype == state.rms.dtype == jnp.float32
    expected = run_reference(grads.astype(np.float64))
    tolerance = 10 * HALF_SPACING[dtype]
    deviation = updates.astype(np.float64) - expected
    assert np.abs(deviation).max() <= 7.27 * tolerance
    assert np.sqrt(np.mean(deviation**2)) < tolerance


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_are_averaged_in_float32(dtype):
    grads, reference = noisy(50).astype(dtype), ReferenceAdam()
    state = PLAIN.init(np.zeros(96, np.float32))
    for g in grads:
        expected = reference(g.astype(np.float64))
        updates, state = compiled(PLAIN)(g, state)
    np.testing.assert_allclose(state.mu, reference.m, rtol=RTOL, atol=ROUNDING)
    np.testing.assert_allclose(np.square(state.rms), reference.v, rtol=2 * RTOL)
    once = 2 * HALF_SPACING[dtype]
    np.testing.assert_allclose(updates.astype("f4"), expected, rtol=once, atol=once**2)


def test_the_update_has_the_dtype_of_the_gradient_and_the_moments_are_float32():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.bfloat16)}
    grads = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    state = jax.eval_shape(PLAIN.init, params)
    updates, updated = jax.eval_shape(PLAIN.update, grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated, state)
    moments = jax.tree.leaves((state.mu, state.rms))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


def test_float16_gradients_whose_square_leaves_float16_are_safe():
    grads = np.array([[300.0, 1e-3, -6e4] * 32] * 3, np.float16)  # 300² > 65 504
    updates, _ = run(PLAIN, grads)
    np.testing.assert_allclose(
        updates, np.sign(grads), rtol=4 * HALF_SPACING[jnp.float16]
    )


# --- hyperparameters that change -------------------------------------------------

INJECT = functools.partial(optax.inject_hyperparams, static_args=("rms_dtype",))


def test_bias_correction_is_exact_when_the_betas_change():
    def b1(step):
        return jnp.where(step < 5, 0.9, jnp.where(step < 10, 0.0, 0.97))

    def b2(step):
        return jnp.where(step < 7, 0.95, 0.9 + 0.005 * (step % 19).astype(jnp.float32))

    tx = INJECT(ost.scale_by_safe_adam)(b1=b1, b2=b2)
    grads = np.tile(np.array([2.0, -1e-20, 3e15], np.float32), (60, 1))
    updates, state = run(tx, grads)
    np.testing.assert_allclose(updates, np.sign(grads), rtol=RTOL)
    inner, steps = state.inner_state, np.arange(60)
    kept1, kept2 = np.prod(np.asarray(b1(steps), "f8")), np.prod(np.asarray(b2(steps)))
    assert float(inner.mu_unit) == pytest.approx(1 - kept1, rel=RTOL)
    assert float(inner.rms_unit) == pytest.approx(np.sqrt(1 - kept2), rel=RTOL)
    assert float(inner.b1) == pytest.approx(float(b1(59)))
    assert float(inner.b2) == pytest.approx(float(b2(59)))


def test_bias_correction_stays_exact_over_a_long_run():
    # After 100 000 steps nothing is left to correct: 0.9999¹⁰⁰⁰⁰⁰ = 5e-5.
    tx = ost.scale_by_safe_adam(0.9, 0.9999)

    @jax.jit
    def last(state):
        def step(_, state):
            return tx.update(jnp.ones(()), state)[1]

        return jax.lax.fori_loop(0, 100_000, step, state)

    state = last(tx.init(jnp.ones(())))
    assert float(state.mu_unit) == pytest.approx(1.0, rel=RTOL)
    rms_unit = np.sqrt(-np.expm1(100_000 * np.log(0.9999)))
    assert float(state.rms_unit) == pytest.approx(rms_unit, rel=1e-4)


@full
def test_injected_constants_equal_static_ones():
    grads = noisy(60)
    options = {"b2": 0.99, "eps": 1e-3, "update_rms_max": 1.0, "spike_ratio": 25.0}
    injected, _ = run(INJECT(ost.scale_by_safe_adam)(**options), grads)
    static, _ = run(ost.scale_by_safe_adam(**options), grads)
    np.testing.assert_allclose(injected, static, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "make",
    [
        lambda inject: inject(ost.scale_by_safe_adam)(b1=0.9, b2=0.999),
        lambda inject: inject(ost.safe_adamw)(learning_rate=0.1),
    ],
    ids=["scale_by_safe_adam", "safe_adamw"],
)
def test_hyperparameters_can_be_injected_without_naming_static_arguments(make):
    tx = make(optax.inject_hyperparams)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    _, updated = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated, state)


@pytest.mark.parametrize("betas", [{"b2": 0.999}, {"b1": 0.999, "b2": 0.9999}], ids=str)
def test_betas_that_bfloat16_rounds_to_one_neither_freeze_nor_poison(betas):
    # inject_hyperparams holds them in the dtype of the parameters.
    tx = optax.inject_hyperparams(ost.scale_by_safe_adam)(**betas)
    updates, _ = run(tx, jnp.ones((3, 96), jnp.bfloat16))
    assert np.isfinite(updates).all()
    assert (updates != 0).all()


def test_numpy_hyperparameters_do_not_widen_the_state():
    with jax.enable_x64(True):
        tx = ost.scale_by_safe_adam(np.float64(0.9), np.float64(0.999), np.float64(0.1))
        params = jax.ShapeDtypeStruct((3,), jnp.float32)
        state = jax.eval_shape(tx.init, params)
        _, updated = jax.eval_shape(tx.update, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated, state)


# --- trees -----------------------------------------------------------------------


@pytest.mark.parametrize("tx", [PLAIN, CLIPPING], ids=["plain", "clipping"])
def test_leaves_without_entries_are_updated_to_themselves(tx):
    tree = {"a": None, "b": np.zeros((0, 2), np.float32), "c": {}}
    updates, state = compiled(tx)(tree, tx.init(tree))
    chex.assert_trees_all_equal(updates, tree)
    assert int(state.step) == 1


def test_a_scalar_parameter_is_a_leaf_like_any_other():
    updates, _ = run(CLIPPING, noisy(5)[:, 0])
    assert updates.shape == (5,)
    chex.assert_tree_all_finite(updates)


def test_a_masked_leaf_is_left_alone():
    tx = optax.masked(ost.scale_by_safe_adam(), {"a": True, "b": False})
    grads = {"a": jnp.array([2.0]), "b": jnp.array([7.0])}
    updates, _ = compiled(tx)(grads, tx.init(grads))
    expected = {"a": jnp.array([1.0]), "b": jnp.array([7.0])}
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING)


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "remedy"),
    [
        ("b1", 1.0, ValueError, "0.9 is usual"),
        ("b1", -0.1, ValueError, "0.9 is usual"),
        ("b1", "0.9", TypeError, "must be a number"),
        ("b2", 1.0, ValueError, "0.95 to 0.999 is usual"),
        ("b2", 0.0, ValueError, "0.95 to 0.999 is usual"),
        ("b2", None, TypeError, "must be a number"),
        ("eps", -1e-8, ValueError, "0 is safe here"),
        ("eps", np.inf, ValueError, "0 is safe here"),
        ("eps", np.nan, ValueError, "0 is safe here"),
        ("eps", None, TypeError, "must be a number"),
        ("eps_mode", "sum", ValueError, "'add', 'max', 'atan2'"),
        ("second_moment", "median", ValueError, "'mean'"),
        ("update_rms_max", 0.0, ValueError, "StableAdamW uses 1"),
        ("update_rms_max", True, TypeError, "must be a number"),
        ("spike_ratio", 0, ValueError, "SPAM uses 5000"),
        ("spike_ratio", np.inf, ValueError, "SPAM uses 5000"),
        ("rms_dtype", jnp.int32, ValueError, "jnp.float32"),
        ("mu_dtype", jnp.int32, ValueError, "jnp.float32"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_remedy(
    name, value, error, remedy
):
    with pytest.raises(error) as raised:
        ost.scale_by_safe_adam(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
    assert remedy in str(raised.value)


def test_atan2_has_no_place_for_eps():
    with pytest.raises(ValueError, match=r"eps=1e-08 .* leave it 0"):
        ost.scale_by_safe_adam(eps=1e-8, eps_mode="atan2")


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.81), (0.99, 0.95), (0.999, 0.998)])
def test_betas_without_a_bound_warn_where_they_are_passed(b1, b2):
    with pytest.warns(UserWarning, match=f"b1={b1} and b2={b2}.*no bound") as caught:
        ost.scale_by_safe_adam(b1, b2)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("b1", "b2"), BETAS)
def test_betas_with_a_bound_do_not_warn(b1, b2):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ost.scale_by_safe_adam(b1, b2)

"""Safe Adam with the mean square of microbatch gradients: rule, bound, clips."""

import functools
import itertools
import warnings

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import full, quick_only

import optax_stability as ost

# As in test_adam: a walk of roundings of r, ten roundings of m, a few operations.
RTOL, ATOL, ROUNDING = 1e-5, 5e-6, 1e-6
# float32 holds β₂ to 3e-8, which is 3e-5 of 1 − β₂ = 1e-3 and half of it in the root.
TRACED = 3e-5
# Half a spacing of the storage dtype.
HALF_SPACING = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}

BETAS = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.99)]
SAFE = functools.partial(ost.scale_by_safe_adam, second_moment="microbatch")
ADAM = {betas: SAFE(*betas) for betas in BETAS}
DEFAULT = ADAM[0.9, 0.999]

# Steps of one, many and no microbatches; the first has none.
COUNTS = [0, 8, 1, 3, 0, 8, 2, 1, 1, 0, 0, 5, 8, 8, 1, 7, 4, 2, 6, 8] * 3


class Reference:
    """The docstring's formulas in float64, for one leaf; no bound on the update.

    ``clip`` is what a clip multiplies the whole leaf with: each microbatch of it.
    """

    def __init__(
        self, b1=0.9, b2=0.999, eps=0.0, *, mode="add", rms_max=None, spike=None
    ):
        self.b1, self.b2, self.mode = b1, b2, mode
        self.eps = eps if callable(eps) else lambda step: eps
        self.rms_max, self.spike = rms_max, spike
        self.step, self.m, self.v = 0, 0.0, 0.0
        # Πβ₁ᴷ and Πβ₂ᴷ.
        self.left1, self.left2 = 1.0, 1.0

    def at(self, beta):
        return beta(self.step) if callable(beta) else beta

    def held(self, x):
        if self.spike is None or self.left2 == 1:
            return x
        limit = np.sqrt(self.spike * self.v / (1 - self.left2))
        return np.where(self.v > 0, np.clip(x, -limit, limit), x)

    def __call__(self, microbatches, weights=None, clip=1.0):
        parts = clip * np.asarray(microbatches, np.float64)
        count, eps = len(parts), float(self.eps(self.step))
        kept1, kept2 = self.at(self.b1) ** count, self.at(self.b2) ** count
        g, s = np.zeros(parts.shape[1:]), np.zeros(parts.shape[1:])
        if count:
            g = self.held(np.average(parts, 0, weights))
            s = self.held(np.sqrt(np.average(parts**2, 0, weights)))
        self.m = kept1 * self.m + (1 - kept1) * g
        self.v = kept2 * self.v + (1 - kept2) * s**2
        self.left1, self.left2 = kept1 * self.left1, kept2 * self.left2
        self.step += 1
        return self.direction(s, eps)

    def direction(self, s, eps):
        if self.left2 == 1:
            return np.zeros_like(s)
        m_hat, r_hat = self.m / (1 - self.left1), self.r_hat
        if self.mode == "atan2":
            return 1.27 * np.arctan2(m_hat, r_hat)
        floored = np.maximum(r_hat, eps)
        divisor = floored if self.mode == "max" else r_hat + eps
        u = m_hat / np.where(divisor > 0, divisor, 1.0)
        if self.rms_max is not None:
            ratio = s / np.where(floored > 0, floored, 1.0)
            u = u / max(1.0, np.sqrt(np.mean(ratio**2)) / self.rms_max)
        return u

    @property
    def r_hat(self):
        return np.sqrt(self.v / (1 - self.left2))


def run_reference(parts, reference):
    return np.stack([reference(step) for step in parts])


def split(data):
    """From the data of a run to the microbatches that are kept in each step."""
    return [step[np.isfinite(step).all(axis=1)] for step in data]


def stream(counts, *, seed=0, n=48, mean=0.3):
    """Microbatch gradients [steps, most, n], with NaN for those a step does not have.

    A third each is dense, sparse and heavy-tailed, of sizes from 1e-6 to 1e6.
    """
    rng = np.random.default_rng(seed)
    shape = len(counts), max(counts), n // 3
    dense = mean + rng.standard_normal(shape)
    sparse = rng.standard_normal(shape) * (rng.random(shape) < 0.1)
    heavy = rng.standard_t(2, shape)
    data = np.concatenate([dense, sparse, heavy], axis=2)
    data = (data * 10.0 ** rng.uniform(-6, 6, n)).astype(np.float32)
    for step, count in enumerate(counts):
        data[step, count:] = np.nan
    return data


def gradients(data, **options):
    """Mean and moments of microbatch gradients, which are the data themselves."""

    def loss(params, microbatch):
        terms = jax.tree.map(lambda p, x: jnp.sum(p * x[0]), params, microbatch)
        return sum(jax.tree.leaves(terms))

    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), data)
    count = len(jax.tree.leaves(data)[0])
    fn = ost.microbatch_gradients(loss, count, mean_square=True, **options)
    _, grads, moments = fn(params, data)
    return grads, moments


MOST = 8


@functools.cache
def compiled(function, **options):
    return jax.jit(functools.partial(function, **options))


def padded(leaf):
    """With NaN for microbatches up to MOST, so that most tests share one program."""
    missing = max(MOST - leaf.shape[1], 0)
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)
    return np.pad(leaf, widths, constant_values=np.nan)


def run(tx, data, state=None, pad=padded, **options):
    """Update and state after every step, and the last state."""
    tx, data = optax.with_extra_args_support(tx), jax.tree.map(pad, data)
    if state is None:
        state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape[2:], x.dtype), data))
    update, outputs = compiled(tx.update), []
    for step in range(len(jax.tree.leaves(data)[0])):
        parts = jax.tree.map(lambda x, i=step: x[i], data)
        grads, moments = compiled(gradients, **options)(parts)
        updates, state = update(grads, state, grads, moments=moments)
        outputs.append(jax.device_get((updates, state)))
    updates, states = jax.tree.map(lambda *x: np.stack(x), *outputs)
    return updates, states, state


def adam_state(state):
    """The one state of Adam in a state."""

    def is_adam(node):
        return isinstance(node, ost.SafeAdamState)

    (found,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return found


def bound(b1, b2):
    return (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))


# --- the rule --------------------------------------------------------------------


@pytest.mark.parametrize(("b1", "b2"), BETAS)
@quick_only("0.9-0.95")
def test_it_is_the_rule_while_the_number_of_microbatches_varies(b1, b2):
    data, reference = stream(COUNTS), Reference(b1, b2)
    expected = run_reference(split(data), reference)
    updates, states, state = run(ADAM[b1, b2], data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(state.rms / state.rms_unit, reference.r_hat, rtol=RTOL)
    total = np.cumsum(COUNTS)
    np.testing.assert_array_equal(states.step, np.arange(1, len(COUNTS) + 1))
    np.testing.assert_array_equal(states.microbatches, total)
    np.testing.assert_allclose(states.mu_unit, 1 - b1**total, rtol=ROUNDING)
    rms_unit = np.sqrt(-np.expm1(total * np.log(b2)))
    np.testing.assert_allclose(states.rms_unit, rms_unit, rtol=ROUNDING)


@pytest.mark.parametrize(("k", "b2"), [(8, 0.999), (5, 0.95)])
def test_with_constant_k_it_is_the_sum_of_squares_bias_corrected(k, b2):
    data = stream([k] * 40)
    v = m = unit = 0.0
    kept = b2**k
    for i, parts in enumerate(data.astype(np.float64), start=1):
        v = kept * v + (1 - b2) * np.sum(parts**2, 0)
        unit = kept * unit + (1 - b2) * k  # what v would be of squares that are all 1
        m = 0.9**k * m + (1 - 0.9**k) * parts.mean(0)
        expected = m / (1 - 0.9 ** (k * i)) / np.sqrt(np.where(v > 0, v / unit, 1))
    updates, _, _ = run(ADAM[0.9, b2], data)
    np.testing.assert_allclose(updates[-1], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("b2", [0.999, 0.95])
def test_one_microbatch_per_step_is_plain_adam(b2):
    # Sizes at which squares of float32 leave its range, too.
    data = stream([1] * 60) * 10.0 ** np.linspace(-28, 28, 48)
    data = data.astype(np.float32)
    plain = ost.scale_by_safe_adam(0.9, b2)
    expected, _, plain_state = run(plain, data)
    updates, _, state = run(ADAM[0.9, b2], data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(state.rms, plain_state.rms, rtol=RTOL)
    rms = np.where(state.rms > 0, state.rms, 1.0)
    np.testing.assert_allclose(state.mu / rms, plain_state.mu / rms, RTOL, ATOL)
    assert float(state.noise) == pytest.approx(float(plain_state.noise), rel=RTOL)
    for name in ("step", "microbatches", "mu_unit", "rms_unit", "b1", "b2"):
        assert getattr(state, name) == getattr(plain_state, name)


def test_two_steps_by_hand():
    # One microbatch of 1, then 3 and 1: m = ½·1, then ¼·½ + ¾·2 = 1.625 over ⅞;
    # v = ¼·1, then 9/16·¼ + 7/16·5 = 2.328125 over 37/64.
    data = np.array([[[1.0], [np.nan]], [[3.0], [1.0]]], np.float32)
    updates, _, _ = run(SAFE(0.5, 0.75), data)
    expected = [[1.0], [(1.625 / 0.875) / np.sqrt(2.328125 / 0.578125)]]
    np.testing.assert_allclose(updates, expected, rtol=ROUNDING)


def test_microbatches_that_are_alike_count_like_steps_that_are_alike():
    # Eight steps on one gradient, or one step on eight microbatches of it.
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((12, 1, 48)).astype(np.float32)
    _, _, slow = run(DEFAULT, np.repeat(blocks, 8, axis=0))
    _, _, fast = run(DEFAULT, np.repeat(blocks, 8, axis=1))
    assert (int(slow.step), int(fast.step)) == (96, 12)
    for name in ("microbatches", "mu", "rms", "mu_unit", "rms_unit"):
        a, b = getattr(slow, name), getattr(fast, name)
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=ROUNDING)


def test_a_step_without_microbatches_changes_nothing_but_the_step():
    _, _, before = run(DEFAULT, stream([3, 5, 1]))
    updates, _, after = run(DEFAULT, np.full((2, 5, 48), np.nan, np.float32), before)
    assert int(after.step) == 5
    chex.assert_trees_all_equal(after._replace(step=before.step), before)
    np.testing.assert_array_equal(updates[0], updates[1])
    expected = (before.mu / before.mu_unit) / (before.rms / before.rms_unit)
    known = np.asarray(before.rms) > 0
    np.testing.assert_allclose(updates[0][known], expected[known], rtol=RTOL)
    assert not updates[0][~known].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@quick_only("float32")
def test_a_first_step_without_microbatches_gives_no_update(dtype):
    tx = DEFAULT if dtype == jnp.float32 else SAFE(rms_dtype=dtype)
    updates, _, state = run(tx, np.full((3, 5, 48), np.nan, np.float32))
    assert not updates.any()
    chex.assert_trees_all_equal(state.mu, jnp.zeros(48))
    assert int(state.microbatches) == 0
    chex.assert_tree_all_finite(state.metrics)
    assert float(state.metrics["adam/correlation"]) == 0.0
    assert float(state.metrics["adam/zero_fraction"]) == 1.0


def test_weights_of_microbatches_weigh_squares_and_not_the_clock():
    data, k = stream([4] * 30), 4
    weights = np.random.default_rng(1).uniform(0.1, 10, (30, k)).astype(np.float32)
    reference, tx = Reference(), ost.accumulate_moments(DEFAULT, k)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(48))
    for parts, ns in zip(data, weights, strict=True):
        for part, n in zip(parts, ns, strict=True):
            updates, state = update(part, state, weight=n)
        np.testing.assert_allclose(
            updates, reference(parts, weights=ns), rtol=RTOL, atol=ATOL
        )
    assert int(state.inner_opt_state.microbatches) == 120


@pytest.mark.parametrize("exponent", [-12, -1, 3, 20])
def test_a_power_of_two_changes_no_bit_of_the_update(exponent):
    data = stream([4] * 20)
    updates, _, _ = run(DEFAULT, data)
    scaled, _, _ = run(DEFAULT, data * np.float32(2.0**exponent))
    np.testing.assert_array_equal(scaled, updates)


@pytest.mark.parametrize("scale", [1e-33, 1e-25, 1e-20, 1e20, 1e25, 1e33])
def test_where_squares_leave_float32_the_mean_itself_is_the_size(scale):
    data = np.full((20, 4, 48), scale, np.float32)
    data[:, :, ::2] *= -1
    updates, _, _ = run(DEFAULT, data)
    np.testing.assert_allclose(updates, np.sign(data[:, 0]), rtol=RTOL)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@quick_only("bfloat16")
def test_gradients_may_be_narrow(dtype):
    data = stream([8] * 10)
    data = jnp.asarray(data / np.abs(data).max(axis=(0, 1)), dtype)
    updates, _, state = run(DEFAULT, data)
    assert updates.dtype == dtype
    assert state.rms.dtype == jnp.float32
    parts = np.asarray(data.astype(jnp.float32))
    expected = run_reference(parts, Reference())
    # The mean that arrives is rounded, and so is the update.
    atol = 8 * HALF_SPACING[dtype]
    np.testing.assert_allclose(updates.astype("f4"), expected, atol=atol)


# --- arguments -------------------------------------------------------------------


def schedule_b1(step):
    return 0.9 - 0.3 * 0.9**step


def schedule_b2(step):
    return 0.999 - 0.1 * 0.8**step


INJECT = optax.inject_hyperparams(ost.scale_by_safe_adam, static_args=("rms_dtype",))


@pytest.mark.parametrize("kind", ["constant", "schedule"])
@quick_only("schedule")
def test_traced_betas_correct_the_bias_of_every_one_they_were(kind):
    betas = (0.9, 0.99) if kind == "constant" else (schedule_b1, schedule_b2)
    data, reference = stream(COUNTS), Reference(*betas)
    expected = run_reference(split(data), reference)
    tx = INJECT(*betas, second_moment="microbatch")
    updates, _, state = run(tx, data)
    np.testing.assert_allclose(updates, expected, rtol=TRACED, atol=TRACED)
    found = adam_state(state)
    np.testing.assert_allclose(found.mu_unit, 1 - reference.left1, rtol=TRACED)
    unit = np.sqrt(1 - reference.left2)
    np.testing.assert_allclose(found.rms_unit, unit, rtol=TRACED)


EPS_MODES = [(1e-2, "add"), (1e-2, "max"), (0.0, "max"), (0.0, "atan2")]


@pytest.mark.parametrize(("eps", "mode"), EPS_MODES)
@quick_only("0.01-add", "0.01-max")
def test_every_mode_of_eps_is_as_without_microbatches(eps, mode):
    # Sizes from 1e-6, where ε dominates, to 1e6.
    data = stream(COUNTS)
    expected = run_reference(split(data), Reference(eps=eps, mode=mode))
    updates, _, _ = run(SAFE(eps=eps, eps_mode=mode), data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)


def test_a_schedule_of_eps_counts_steps_and_not_microbatches():
    def eps(step):
        return 10.0 * 0.8**step

    data = stream(COUNTS)
    expected = run_reference(split(data), Reference(eps=eps))
    updates, _, state = run(SAFE(eps=eps), data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    assert float(state.eps) == pytest.approx(eps(len(COUNTS) - 1), rel=RTOL)


@full
def test_update_rms_max_looks_at_the_microbatches_leaf_by_leaf():
    leaves = {"quiet": stream(COUNTS), "loud": stream(COUNTS, seed=1)}
    # The microbatches of one step cancel: only their squares tell of the spike.
    step = COUNTS.index(6)
    leaves["loud"][step, :6] *= 30 * np.array([[1], [-1]] * 3)
    leaves["loud"][step, 1:6:2] = -leaves["loud"][step, :6:2]
    updates, _, _ = run(SAFE(update_rms_max=1.0), leaves)
    for name, data in leaves.items():
        expected = run_reference(split(data), Reference(rms_max=1.0))
        np.testing.assert_allclose(updates[name], expected, rtol=RTOL, atol=ATOL)
    plain = run_reference(split(leaves["loud"]), Reference())
    assert np.abs(updates["loud"][step]).max() < 0.5 * np.abs(plain[step]).max()


def test_spike_ratio_holds_mean_and_mean_square():
    data = stream(COUNTS)
    data[COUNTS.index(7), :, ::2] *= 100
    reference, plain = Reference(spike=4.0), Reference()
    expected = run_reference(split(data), reference)
    run_reference(split(data), plain)
    updates, _, state = run(SAFE(spike_ratio=4.0), data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(state.rms / state.rms_unit, reference.r_hat, rtol=RTOL)
    assert np.median(reference.r_hat[::2] / plain.r_hat[::2]) < 0.5  # it was not idle


@pytest.mark.parametrize("dtype", HALF_SPACING)
@quick_only("bfloat16")
def test_rms_may_be_narrow(dtype):
    data = stream(COUNTS)
    if dtype == jnp.float16:  # which ends at 6e4
        data = data / np.nanmax(np.abs(data), axis=(0, 1)) * 10
    data = data.astype(np.float32)
    reference = Reference()
    expected = run_reference(split(data), reference)
    updates, _, state = run(SAFE(rms_dtype=dtype), data)
    assert state.rms.dtype == dtype
    # A random walk of at most half a spacing each step, three deviations.
    spread = 3 * HALF_SPACING[dtype] * np.sqrt(len(COUNTS))
    known = reference.v > 0
    r_hat = np.asarray(state.rms, np.float64) / state.rms_unit
    np.testing.assert_allclose(r_hat[known], reference.r_hat[known], rtol=spread)
    np.testing.assert_allclose(updates, expected, rtol=spread, atol=ATOL)


def test_mu_may_be_narrow():
    data = stream(COUNTS)
    updates, _, state = run(SAFE(mu_dtype=jnp.bfloat16), data)
    assert state.mu.dtype == jnp.bfloat16
    expected = run_reference(split(data), Reference())
    error = updates - expected
    assert np.sqrt(np.mean(error**2)) < 10 * HALF_SPACING[jnp.bfloat16]


GRADS = {"w": np.ones(3, np.float32)}


def moments_of(tree, **options):
    data = jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    return compiled(gradients, **options)(data)[1]


def test_without_moments_it_says_where_they_come_from():
    state = DEFAULT.init(GRADS)
    for extra in ({}, {"moments": None}):
        with pytest.raises(ValueError, match="needs moments=") as raised:
            DEFAULT.update(GRADS, state, **extra)
        for remedy in ("accumulate_moments", "microbatch_gradients", "mean_square"):
            assert remedy in str(raised.value)


def test_inside_multi_steps_of_optax_there_are_no_moments():
    tx = optax.MultiSteps(DEFAULT, 2)
    with pytest.raises(ValueError, match="put accumulate_moments around"):
        jax.eval_shape(tx.update, GRADS, tx.init(GRADS))


def test_moments_without_the_mean_square_say_what_to_do():
    moments = moments_of(GRADS)._replace(mean_square=None)
    with pytest.raises(ValueError, match="mean_square=True"):
        DEFAULT.update(GRADS, DEFAULT.init(GRADS), moments=moments)
    tx = ost.accumulate_moments(DEFAULT, 2, mean_square=False)
    with pytest.raises(ValueError, match="mean_square=True"):
        jax.eval_shape(tx.update, GRADS, tx.init(GRADS))


def test_moments_of_another_tree_raise():
    moments = moments_of({"v": GRADS["w"]})
    with pytest.raises(ValueError, match="moments belong to another tree"):
        DEFAULT.update(GRADS, DEFAULT.init(GRADS), moments=moments)


def test_an_unknown_second_moment_raises_and_names_the_choices():
    with pytest.raises(ValueError, match="'mean', 'microbatch'"):
        ost.scale_by_safe_adam(second_moment="microbatches")


def test_moments_are_not_looked_at_unless_asked_for():
    data = stream([4] * 20)
    plain = ost.scale_by_safe_adam()
    means = data.mean(axis=1, keepdims=True)
    updates, _, state = run(plain, data)
    assert int(state.microbatches) == 20
    expected, _, _ = run(plain, means)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.81), (0.99, 0.95)])
def test_it_warns_where_there_is_no_bound_whatever_k_is(b1, b2):
    # β₁²ᴷ ≥ β₂ᴷ just where β₁² ≥ β₂.
    with pytest.warns(UserWarning, match="no bound"):
        SAFE(b1, b2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAFE(b1, b1 * b1 + 1e-3)


@pytest.mark.parametrize("second_moment", ["mean", "microbatch"])
@quick_only("microbatch")
def test_safe_adamw_hands_the_choice_on(second_moment):
    data = stream([4] * 10)
    tx = ost.safe_adamw(1.0, weight_decay=0.0, second_moment=second_moment)
    expected, _, _ = run(ost.scale_by_safe_adam(second_moment=second_moment), data)
    updates, _, _ = run(tx, data)
    np.testing.assert_allclose(-updates, expected, rtol=ROUNDING)


# --- gradients that are not finite -----------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_coordinate_keeps_its_moments_if_no_microbatch_is_rejected(bad):
    _, _, before = run(DEFAULT, stream([5, 5]))
    data = stream([5], seed=1)
    data[0, 2, 7] = bad
    updates, _, after = run(DEFAULT, data, before, reject_nonfinite=False)
    assert np.isfinite(updates).all()
    chex.assert_tree_all_finite(after)
    data[0, 2, 7] = 0.0
    clean_updates, _, clean = run(DEFAULT, data, before, reject_nonfinite=False)
    others = np.arange(48) != 7
    np.testing.assert_allclose(updates[0][others], clean_updates[0][others], RTOL)
    for name in ("mu", "rms"):
        old, new, without = (getattr(each, name) for each in (before, after, clean))
        assert new[7] == old[7]
        np.testing.assert_allclose(new[others], without[others], rtol=RTOL)


# --- the bound -------------------------------------------------------------------


def falling(counts, factor=1e-3):
    """Gradients of size 1 that fall 1000×, of one sign, as far as signs go."""
    data = np.abs(stream([max(counts)] * len(counts))).clip(0.5, 2.0)
    data[len(counts) // 2 :] *= factor
    for step, count in enumerate(counts):
        data[step, count:] = np.nan
    return data.astype(np.float32)


class MixedClocks(Reference):
    """β₁ per step on m, β₂ᴷ on v: the clock of steps and that of microbatches."""

    def __call__(self, microbatches, weights=None, clip=1.0):
        beta, self.b1 = self.b1, self.b1 ** (1 / max(len(microbatches), 1))
        u = super().__call__(microbatches, weights, clip)
        self.b1 = beta
        return u


def largest_ratio(states, b1, b2):
    """The largest |m̂|/r̂ of a run, that is |u| before it is held to the bound."""
    mu, rms = (np.asarray(each, np.float64) for each in (states.mu, states.rms))
    unit = np.asarray(states.rms_unit / states.mu_unit, np.float64)[:, None]
    known = rms > 0
    return np.max(np.where(known, np.abs(mu), 0) / np.where(known, rms, 1) * unit)


@pytest.mark.parametrize("pattern", [(8,), (32,), (1, 32, 0, 8)], ids=str)
def test_the_bound_holds_where_that_of_mixed_clocks_breaks(pattern):
    counts = pattern * (120 // len(pattern))
    data, betas = falling(counts), (0.9, 0.95)
    mixed = run_reference(split(data), MixedClocks(*betas))
    if pattern == (32,):
        assert np.abs(mixed).max() > 300
    assert np.abs(mixed).max() > 5 * bound(*betas)
    expected = run_reference(split(data), Reference(*betas))
    assert np.abs(expected).max() <= bound(*betas)
    updates, states, _ = run(ADAM[betas], data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)
    assert np.abs(updates).max() <= bound(*betas) * (1 + ROUNDING)
    used = jax.tree.map(lambda x: x[np.cumsum(counts) > 0], states)
    assert largest_ratio(used, *betas) <= bound(*betas) * (1 + TRACED)


def test_the_worst_sequence_comes_close_to_the_bound_untouched():
    # Equality in Cauchy–Schwarz: gᵢ ∝ (β₂/β₁)ⁱ, all microbatches of a step alike.
    b1, b2 = 0.9, 0.95
    counts = [8] * 15 + [1, 2] * 60
    ends = np.cumsum(counts)
    growth = (b2 / b1) ** (ends - ends[-1])
    growth[:15] = 0
    data = np.full((len(counts), 8, 48), np.nan, np.float32)
    for step, count in enumerate(counts):
        data[step, :count] = growth[step]
    expected = run_reference(split(data), Reference(b1, b2))
    assert 0.98 * bound(b1, b2) < expected[-1, 0] < bound(b1, b2)
    updates, _, _ = run(ADAM[b1, b2], data)
    np.testing.assert_allclose(updates, expected, rtol=RTOL, atol=ATOL)


ENTRIES = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 1e-36, 1e-20, -1e-19, 1e3, 1e19, -1e36, np.nan]),
)


@hypothesis.settings(derandomize=True, max_examples=40, deadline=None)
@hypothesis.given(
    st.lists(st.lists(ENTRIES, min_size=12, max_size=12), min_size=10, max_size=10)
)
@full
def test_no_sequence_of_microbatches_exceeds_the_bound(entries):
    data = np.tile(np.array(entries, np.float32).reshape(10, 4, 3), 16)
    for betas in ((0.9, 0.999), (0.9, 0.95)):
        updates, _, state = run(ADAM[betas], data)
        chex.assert_tree_all_finite((updates, state))
        assert np.abs(updates).max() <= bound(*betas) * (1 + TRACED)


# --- clips between the microbatches and Adam -------------------------------------

K, WINDOWS, SPIKE = 4, 24, 15


def two_leaves():
    """Microbatch gradients of a tree, [windows, K, …], with a spike in one window."""
    rng = np.random.default_rng(0)
    data = {
        "a": 0.1 + rng.standard_normal((WINDOWS, K, 3, 4)),
        "b": 0.1 + 0.01 * rng.standard_normal((WINDOWS, K, 5)),
    }
    for leaf in data.values():
        leaf[SPIKE] *= 1000
    return {name: leaf.astype(np.float32) for name, leaf in data.items()}


def accumulate(tx, data, every_k=K):
    """The update of every window of accumulate_moments(tx, K), and the last state."""
    tx = ost.accumulate_moments(tx, every_k)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)

    def step(state, grads):
        updates, state = tx.update(grads, state, grads)
        return state, updates

    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), flat))
    state, updates = jax.jit(lambda *args: jax.lax.scan(step, *args))(state, flat)
    assert not any(np.any(u[::K]) for u in jax.tree.leaves(updates))
    return jax.tree.map(lambda u: np.asarray(u)[K - 1 :: K], updates), state


def norms(data):
    """Norm of the mean of every window, leaf by leaf."""
    return {
        name: np.linalg.norm(x.astype(np.float64).mean(1).reshape(WINDOWS, -1), axis=1)
        for name, x in data.items()
    }


def limits_of(data, kind):
    """What each clip multiplies each leaf of each window with."""
    by_leaf = norms(data)
    if kind == "global":
        norm = np.hypot(*by_leaf.values())
        by_leaf = dict.fromkeys(by_leaf, norm)
    return {name: np.minimum(1, 1 / norm) for name, norm in by_leaf.items()}


CLIPS = {
    "global": optax.clip_by_global_norm(1.0),
    "leaf": ost.clip_by_threshold(ost.thresholds.constant(1.0), scope="leaf"),
}

CLIPPED = {kind: optax.chain(clip, DEFAULT) for kind, clip in CLIPS.items()}


def clipped_reference(data, factors):
    found = {}
    for name, leaf in data.items():
        reference = Reference()
        found[name] = np.stack(
            [
                reference(parts, clip=factor)
                for parts, factor in zip(leaf, factors[name], strict=True)
            ]
        )
    return found


@pytest.mark.parametrize("kind", CLIPS)
@quick_only("leaf")
def test_a_clip_acts_on_the_mean_square_as_if_on_every_microbatch(kind):
    data = two_leaves()
    factors = limits_of(data, kind)
    assert factors["a"][SPIKE] < 1e-2
    expected = clipped_reference(data, factors)
    updates, _ = accumulate(CLIPPED[kind], data)
    chex.assert_trees_all_close(updates, expected, rtol=RTOL, atol=ATOL)
    # Had it not, the spike would stay in r.
    unclipped = dict.fromkeys(data, np.ones(WINDOWS))
    wrong = clipped_reference(data, unclipped)["a"][-1]
    assert np.abs(updates["a"][-1]).mean() > 3 * np.abs(wrong).mean()


@pytest.mark.parametrize("kind", CLIPS)
@full
def test_a_clip_acts_likewise_after_microbatch_gradients(kind):
    data = two_leaves()
    expected = clipped_reference(data, limits_of(data, kind))
    updates, _, _ = run(CLIPPED[kind], data)
    chex.assert_trees_all_close(updates, expected, rtol=RTOL, atol=ATOL)


@full
def test_a_leaf_whose_mean_is_zero_keeps_its_mean_square():
    data = jax.tree.map(lambda x: x[:4], two_leaves())
    data["a"][2] = np.array([1, -1, 2, -2], np.float32)[:, None, None]
    updates, states, _ = run(CLIPPED["leaf"], data)
    chex.assert_tree_all_finite(updates)
    before, after = np.asarray(states[1].rms["a"], np.float64)[1:3]
    expected = np.sqrt(0.999**4 * before**2 + (1 - 0.999**4) * 2.5)
    np.testing.assert_allclose(after, expected, rtol=RTOL)


# --- groups of parameters --------------------------------------------------------

FIRST = optax.chain(SAFE(0.9, 0.95), optax.scale(-0.1))
SECOND = optax.chain(CLIPS["global"], SAFE(0.8, 0.99), optax.scale(-0.2))
LABELS = {"a": "first", "b": "second"}
LEAF_B = {"a": False, "b": True}


@functools.cache
def alone(tx, name):
    updates, _ = accumulate(tx, {name: two_leaves()[name]})
    return updates[name]


@full
def test_groups_of_a_partition_are_each_group_alone():
    tx = optax.partition({"first": FIRST, "second": SECOND}, LABELS)
    updates, _ = accumulate(tx, two_leaves())
    np.testing.assert_allclose(updates["a"], alone(FIRST, "a"), rtol=ROUNDING)
    np.testing.assert_allclose(updates["b"], alone(SECOND, "b"), rtol=ROUNDING)


@full
def test_masks_hide_the_moments_of_what_they_hide():
    data = two_leaves()
    tree = {"hidden": data, "shown": data}
    # One mask hides a whole subtree, the other, a callable, a leaf.
    inner = optax.masked(SECOND, lambda _: {"hidden": False, "shown": LEAF_B})
    updates, state = accumulate(
        optax.masked(inner, {"hidden": False, "shown": True}), tree
    )
    found = updates["shown"]["b"]
    np.testing.assert_allclose(found, alone(SECOND, "b"), rtol=ROUNDING)
    # What is hidden passes as it came: the means.
    for group, name in (("hidden", "a"), ("hidden", "b"), ("shown", "a")):
        means = data[name].mean(1)
        np.testing.assert_allclose(updates[group][name], means, RTOL, ATOL)
    assert len(jax.tree.leaves(adam_state(state).rms)) == 1


class Model(nnx.Module):
    def __init__(self):
        self.a = nnx.Param(jnp.zeros((3, 4)))
        self.b = nnx.Param(jnp.zeros(5))
        self.seen = nnx.BatchStat(jnp.zeros(2))


def nnx_labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: LABELS[path[0].key], params)


@full
def test_it_runs_under_nnx_in_groups():
    data = jax.tree.map(lambda x: x[:4], two_leaves())
    groups = {"first": FIRST, "second": SECOND}
    tx = ost.accumulate_moments(optax.partition(groups, nnx_labels), K)
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model, x):
        return jnp.sum(model.a[...] * x["a"]) + jnp.sum(model.b[...] * x["b"])

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    for window in range(4):
        for k in range(K):
            x = jax.tree.map(lambda leaf, w=window, k=k: leaf[w, k], data)
            step(model, optimizer, x)
    for found, tx, name in ((model.a, FIRST, "a"), (model.b, SECOND, "b")):
        expected = alone(tx, name)[:4].sum(0)
        np.testing.assert_allclose(found[...], expected, rtol=RTOL, atol=ATOL)


# --- metrics ---------------------------------------------------------------------


def expected_noise(counts, b1):
    """Mean of m² had the gradients been independent, of mean 0 and mean square 1."""
    noise = 0.0
    for k in counts:
        b = b1**k
        noise = b * b * noise + ((1 - b) ** 2 / k if k else 0.0)
    return noise


@pytest.mark.parametrize("b1", [0.9, 0.0])
def test_noise_is_what_independent_gradients_leave_in_the_mean(b1):
    tx = ADAM[b1, 0.999 if b1 else 0.99]
    _, states, _ = run(tx, stream(COUNTS))
    expected = [expected_noise(COUNTS[: i + 1], b1) for i in range(len(COUNTS))]
    np.testing.assert_allclose(states.noise, expected, rtol=RTOL)


@pytest.mark.parametrize("k", [1, 8, 32])
def test_noise_has_a_closed_form_for_constant_k(k):
    data = np.ones((6, k, 1), np.float32)
    _, _, state = run(DEFAULT, data)
    b = 0.9**k
    expected = (1 - b) / (1 + b) / k * (1 - b**12)
    assert float(state.noise) == pytest.approx(expected, rel=RTOL)


SIZE, CORRELATIONS = 2048, (-0.5, 0.0, 0.5, 0.9)
STEPS = {1: 500, 8: 100, 32: 40}


def ar1(k, correlation, seed):
    """Microbatch gradients of AR(1), [steps, k, SIZE]."""
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((STEPS[k] * k, SIZE), np.float32)
    data[1:] *= np.sqrt(1 - correlation**2)
    for before, now in itertools.pairwise(data):
        now += correlation * before
    return data.reshape(STEPS[k], k, SIZE)


@functools.cache
def metrics_after_ar1(k):
    """Metrics where microbatch gradients follow AR(1), leaf i CORRELATIONS[i]."""
    data = [ar1(k, each, seed) for seed, each in enumerate(CORRELATIONS)]
    return run(DEFAULT, data, pad=np.asarray)[2].metrics


def ar1_update(k, correlation, b1=0.9):
    """Mean of u² for microbatch gradients of AR(1), and for independent ones.

    From the covariances of the means of successive steps,
    Cⱼ = Σₐₑ ρ^|jK + e − a| / K², by (1−b)/(1+b)·(C₀ + 2Σbʲ·Cⱼ) with b = β₁ᴷ.
    """
    b, within = b1**k, np.arange(k)

    def covariance(j):
        lags = np.abs(j * k + within[:, None] - within)
        return np.mean(correlation ** lags.astype(float))

    total = covariance(0) + 2 * sum(b**j * covariance(j) for j in range(1, 400))
    return (1 - b) / (1 + b) * total, (1 - b) / (1 + b) / k


# R = mean(u²) over 2048 coordinates has a deviation of √(2/2048) = 3.1 % of R; two of
# these, and 1/v̂ of T effective squares exceeds 1/v by 2/T, 3 % for ρ = 0.9.
MEAN_SQUARE = 2 * np.sqrt(2 / SIZE) + 0.03


@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("correlation", CORRELATIONS)
@quick_only("-0.5-8")
def test_correlation_is_that_of_successive_microbatches(correlation, k):
    found = metrics_after_ar1(k)
    i = CORRELATIONS.index(correlation)
    mean_square, c = ar1_update(k, correlation)
    update_rms = float(found["adam/update_rms/per_leaf"][i])
    assert update_rms**2 == pytest.approx(mean_square, rel=MEAN_SQUARE)
    # It is exact for K = 1, for independent and for equal gradients.
    exact = (mean_square - c) / (mean_square + c) * (1 + c) / (1 - c)
    assert exact == pytest.approx(correlation, abs=1e-9 if k == 1 else 0.05)
    error = 2 * c * mean_square / (mean_square + c) ** 2 * (1 + c) / (1 - c)
    measured = float(found["adam/correlation/per_leaf"][i])
    assert measured == pytest.approx(exact, abs=error * MEAN_SQUARE)


def test_the_correlation_of_independent_gradients_is_zero_from_the_first_step():
    # (Σg)²/(K·Σg²) has the mean 1/K, whatever K is; over 2048 of them, to 3 %.
    _, _, state = run(DEFAULT, ar1(8, 0.0, seed=0)[:1], pad=np.asarray)
    found = float(state.metrics["adam/correlation"])
    assert found == pytest.approx(0.0, abs=0.06)


def test_update_rms_of_independent_gradients_depends_on_k():
    roots = {k: np.sqrt(ar1_update(k, 0.0)[0]) for k in STEPS}
    assert roots == pytest.approx({1: 0.229, 8: 0.223, 32: 0.171}, abs=5e-4)


@pytest.mark.parametrize("k", [1, 8, 32])
def test_the_correlation_of_a_constant_gradient_is_one(k):
    data = np.tile(np.array([1, -2, 3e10, 4e-10] * 12, np.float32), (60, k, 1))
    _, _, state = run(DEFAULT, data)
    assert float(state.metrics["adam/correlation"]) == pytest.approx(1.0, abs=1e-4)


def test_the_correlation_of_a_constant_gradient_is_one_while_k_varies():
    data = np.full((len(COUNTS), 8, 48), np.nan, np.float32)
    for step, count in enumerate(COUNTS):
        data[step, :count] = np.tile([1.0, -3.0], 24)
    _, _, state = run(DEFAULT, data)
    found = float(state.metrics["adam/correlation"])
    assert found == pytest.approx(1.0, abs=1e-4)


# --- from and to optax -----------------------------------------------------------


def test_a_run_with_microbatches_goes_on_as_adam_of_optax():
    _, _, state = run(DEFAULT, stream(COUNTS))
    later = stream([1] * 20, seed=1)
    expected, _, _ = run(DEFAULT, later, state)
    converted = ost.to_optax_adam_state(state)
    assert int(converted.count) == sum(COUNTS)
    updates, _, _ = run(optax.scale_by_adam(eps=0.0, eps_root=1e-30), later, converted)
    known = np.asarray(state.rms) > 0
    found = np.where(known, updates, expected)
    # optax forms 1 − β₂ᵗ in float32.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_run_of_optax_goes_on_with_microbatches():
    before, later = stream([1] * 25), stream(COUNTS, seed=1)
    _, _, state = run(optax.scale_by_adam(), before)
    converted = ost.from_optax_adam_state(state)
    assert int(converted.microbatches) == int(converted.step) == 25
    reference = Reference()
    run_reference(split(before), reference)
    expected = run_reference(split(later), reference)
    updates, _, end = run(DEFAULT, later, converted)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-4)
    assert int(end.microbatches) == 25 + sum(COUNTS)
    assert int(end.step) == 25 + len(COUNTS)


def test_there_and_back_keeps_moments_units_and_the_count_of_microbatches():
    _, _, state = run(DEFAULT, stream(COUNTS))
    back = ost.from_optax_adam_state(ost.to_optax_adam_state(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    for name in ("microbatches", "mu", "rms", "mu_unit", "rms_unit"):
        a, b = getattr(back, name), getattr(state, name)
        np.testing.assert_allclose(a, b, rtol=ROUNDING)
    # optax knows of no steps but those that its count counts.
    assert int(back.step) == sum(COUNTS)


def test_the_state_inside_of_accumulation_is_found_both_ways():
    tx = ost.accumulate_moments(optax.chain(DEFAULT, optax.scale(-1.0)), K)
    state = tx.init(GRADS)
    update = jax.jit(tx.update)
    for _ in range(2 * K):
        _, state = update(GRADS, state, GRADS)
    there = ost.to_optax_adam_state(state)
    assert int(there.inner_opt_state[0].count) == 2 * K
    back = ost.from_optax_adam_state(there)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    assert int(back.inner_opt_state[0].microbatches) == 2 * K

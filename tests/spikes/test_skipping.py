"""Skipping: the rule against a reference, and every guarantee by its name."""

import fractions
import functools
from typing import NamedTuple

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiers import full, quick_only

import optax_stability as ost
from optax_stability import thresholds

# A norm of a few dozen float32 squares, a quotient and a product.
ROUNDING = 1e-6
# Limits in float32: some ulps of a logarithm of up to 60, or of the loss.
LIMIT = 1e-4

KINDS = ("nan", "inf", "norm", "value")
NEVER = -1
AT_FIVE = thresholds.constant(5.0)

IDENTITY = optax.identity()
# The same settings are compiled once.
skipping = functools.cache(ost.skip_spikes)
guarding = functools.cache(ost.spike_guard)

PARAMS = {
    "body": {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)},
    "gain": np.ones((), np.float32),
}


def direction(seed=0):
    """A gradient of norm 1."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda x: rng.standard_normal(x.shape), PARAMS)
    norm = np.sqrt(sum(np.sum(x * x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: np.float32(x / norm), tree)


def grads_of(norm, seed=0):
    """A gradient of this norm; where that is not finite, in one entry of it."""
    grads = direction(seed)
    if np.isfinite(norm):
        return jax.tree.map(lambda x: x * np.float32(norm), grads)
    grads["body"]["w"][2, 1] = norm
    return grads


@functools.cache
def compiled(function):
    return jax.jit(function)


def run(tx, norms, losses=None, state=None, params=PARAMS):
    """The updates and states of several steps."""
    state = compiled(tx.init)(params) if state is None else state
    losses = [None] * len(norms) if losses is None else losses
    updates, states = [], []
    for norm, loss in zip(norms, losses, strict=True):
        extra = {} if loss is None else {"value": np.float32(loss)}
        update, state = compiled(tx.update)(grads_of(norm), state, params, **extra)
        updates.append(update)
        states.append(state)
    return updates, states


def bits(tree):
    """The bits of every leaf, so that −0, NaN and rounding are compared exactly."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def norm_of(tree):
    leaves = [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.sum(x * x) for x in leaves))


def skips(states):
    return [bool(state.skipped) for state in states]


# --- the rule, against a reference in float64 ------------------------------------


class ReferenceConstant:
    """A fixed limit."""

    def __init__(self, limit):
        self.fixed = limit

    def limit(self):
        return self.fixed

    def learn(self, x):
        pass

    def rebase(self, x):
        pass


class ReferenceDetrendedMad:
    """detrended_mad from its docstring, with lists."""

    def __init__(self, num_mads, floor, arm=24, log=True):
        self.num_mads, self.arm, self.log = num_mads, arm, log
        self.floor = np.log(floor) if log else floor
        self.learned, self.values, self.residuals = 0, [], []

    def margin(self):
        if self.learned < self.arm:
            return 2 * self.floor if self.log else np.inf
        around = np.abs(self.residuals - np.median(self.residuals))
        most = 4 * self.floor if self.log else np.inf
        return min(max(self.num_mads * 1.4826 * np.median(around), self.floor), most)

    def highest(self):
        return np.median(self.values) + self.margin() if self.values else np.inf

    def limit(self):
        return np.exp(self.highest()) if self.log else self.highest()

    def learn(self, x):
        if self.log and x == 0:
            return
        x = min(np.log(x) if self.log else x, self.highest())
        if self.values:
            self.residuals = [*self.residuals, x - np.median(self.values)][-32:]
        self.values = [*self.values, x][-8:]
        self.learned += 1

    def rebase(self, x):
        if self.log and x == 0:
            return
        self.learned = max(self.learned, 1)
        x = np.log(x) if self.log else x
        self.values = [x] * min(self.learned, 8)


class Step(NamedTuple):
    """What the reference says of one step."""

    action: str
    kinds: tuple
    norm_limit: float
    value_limit: float
    factor: float  # of the gradient, 0 where it is skipped
    credit: fractions.Fraction
    close: bool  # so close to a limit that float32 may decide otherwise


def reference(norms, losses, watch, max_consecutive, budget):
    """The rule of the docstring, step by step."""
    by_norm, by_value, confirm = watch
    credit, row, steps = fractions.Fraction(budget), 0, []
    for n, loss in zip(map(float, norms), map(float, losses), strict=True):
        seen, limits = (n, loss, loss), [each.limit() for each in watch]
        nan = np.isnan(n) or np.isnan(loss)
        inf = not nan and (np.isinf(n) or np.isinf(loss))
        finite = not (nan or inf)
        above = [finite and x > y for x, y in zip(seen, limits, strict=True)]
        kinds = nan, inf, above[0] and above[2], above[1]
        spike = kinds[2] or kinds[3]
        if nan or inf:
            action = "skip"
        elif spike and row == max_consecutive:
            action, row = "accept", 0
            by_norm.rebase(min(n, 10 * limits[0]))
            by_value.rebase(loss)
            confirm.rebase(loss)
        elif spike and credit >= 1:
            action, row, credit = "skip", row + 1, credit - 1
        else:
            action, row = "step", 0
            if not spike:
                credit = min(credit + fractions.Fraction(1, budget), budget)
            for each, x in zip(watch, seen, strict=True):
                each.learn(x)
        factor = limits[0] / n if n > limits[0] else 1.0
        factor = 0.0 if action == "skip" else factor
        close = any(
            np.isfinite(y) and abs(x - y) <= LIMIT * abs(y)
            for x, y in zip(seen, limits, strict=True)
        )
        steps.append(Step(action, kinds, *limits[:2], factor, credit, close))
    return steps


def random_stream(seed, length=400):
    """Norms and losses with spikes, bursts, shifts, NaN, Inf and zeros."""
    rng = np.random.default_rng(seed)
    norms = np.exp(0.3 * rng.standard_normal(length))
    losses = (
        2 + 3 * np.exp(-np.arange(length) / 60) + 0.05 * rng.standard_normal(length)
    )
    at = 0
    while (at := at + int(rng.integers(1, 25))) < length:
        hit = slice(at, at + int(rng.choice([1, 1, 2, 5, 8, 14])))
        match rng.integers(9):
            case 0:
                norms[hit] *= 10 ** rng.uniform(1, 5)
            case 1:
                losses[hit] += rng.uniform(1, 5)
            case 2:
                norms[hit] *= 10 ** rng.uniform(1, 3)
                losses[hit] += rng.uniform(1, 5)
            case 3:
                norms[hit] = rng.choice([np.nan, np.inf, -np.inf])
            case 4:
                losses[hit] = rng.choice([np.nan, np.inf, -np.inf])
            case 5:
                norms[hit] = 0.0
            case 6:  # every second batch of another kind
                losses[at : at + 40 : 2] += 3
            case 7:
                norms[at:] *= rng.choice([0.05, 10.0])
            case 8:
                losses[at:] += rng.choice([-1.0, 2.0])
    return norms.astype(np.float32), losses.astype(np.float32)


INF = ReferenceConstant(np.inf)
ANY = ReferenceConstant(-np.inf)
mad, reference_mad = thresholds.detrended_mad, ReferenceDetrendedMad
SETTINGS = {
    "default": (
        {},
        lambda: (reference_mad(5.0, 5.0), INF, ANY),
    ),
    "guard": (
        {
            "value": mad(6.0, floor=0.5, log=False),
            "confirm": mad(4.0, floor=0.3, log=False),
        },
        lambda: (
            reference_mad(5.0, 5.0),
            reference_mad(6.0, 0.5, log=False),
            reference_mad(4.0, 0.3, log=False),
        ),
    ),
    "constants": (
        {
            "grad_norm": thresholds.constant(3.0),
            "value": thresholds.constant(4.0),
            "confirm": thresholds.constant(2.5),
            "max_consecutive": 2,
            "budget": 3,
        },
        lambda: map(ReferenceConstant, (3.0, 4.0, 2.5)),
    ),
    "loss alone": (
        {
            "grad_norm": None,
            "value": mad(6.0, floor=0.5, log=False, arm=5),
            "max_consecutive": 1,
            "budget": 1,
        },
        lambda: (INF, reference_mad(6.0, 0.5, log=False, arm=5), ANY),
    ),
    "long rows": (
        {"value": thresholds.constant(3.0), "max_consecutive": 9, "budget": 12},
        lambda: (reference_mad(5.0, 5.0), ReferenceConstant(3.0), ANY),
    ),
}
SEEDS = range(8)


@functools.cache
def outcome(name):
    """The streams of a setting and what the library made of them, by step."""
    tx = skipping(IDENTITY, **SETTINGS[name][0])
    streams = [random_stream(seed) for seed in SEEDS]
    unit = direction()

    def step(state, now):
        norm, loss = now
        grads = jax.tree.map(lambda x: x * norm, unit)
        updates, state = tx.update(grads, state, PARAMS, value=loss)
        return state, (optax.tree.norm(updates), state)

    def scan(norms, losses):
        return jax.lax.scan(step, tx.init(PARAMS), (norms, losses))[1]

    norms, losses = (np.stack(each) for each in zip(*streams, strict=True))
    return (
        norms,
        losses,
        jax.tree.map(np.asarray, jax.jit(jax.vmap(scan))(norms, losses)),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SETTINGS)
@quick_only("guard-2", "default-0")
def test_every_decision_count_and_limit_is_that_of_the_reference(name, seed):
    settings, make = SETTINGS[name]
    norms, losses, (sizes, states) = outcome(name)
    budget = settings.get("budget", 16)
    # −Inf times a unit vector has the norm Inf.
    norms, losses = np.abs(norms[seed]), losses[seed]
    expected = reference(
        norms, losses, tuple(make()), settings.get("max_consecutive", 5), budget
    )
    # Up to where float32 may decide otherwise.
    cut = next((i for i, each in enumerate(expected) if each.close), len(expected))
    assert cut >= 50, "take another seed"
    norms, losses, expected = norms[:cut], losses[:cut], expected[:cut]
    size, state = sizes[seed][:cut], jax.tree.map(lambda x: x[seed][:cut], states)
    actions = np.array([each.action for each in expected])
    assert {"skip", "step"} <= set(actions)
    np.testing.assert_array_equal(state.skipped, actions == "skip")
    np.testing.assert_array_equal(state.total, np.cumsum(actions == "skip"))
    np.testing.assert_array_equal(state.accepted_total, np.cumsum(actions == "accept"))
    np.testing.assert_array_equal(
        state.credit, [each.credit * budget for each in expected]
    )
    for limit in ("norm_limit", "value_limit"):
        np.testing.assert_allclose(
            getattr(state, limit), [getattr(each, limit) for each in expected], LIMIT
        )
    factors = np.array([each.factor for each in expected])
    taken = np.where(factors > 0, norms, 0.0)
    np.testing.assert_allclose(size, factors * taken, 2 * LIMIT)
    at = np.arange(len(norms))
    by_kind = np.array([each.kinds for each in expected])
    np.testing.assert_array_equal(state.kind_total, np.cumsum(by_kind, axis=0))
    last = np.maximum.accumulate(np.where(by_kind, at[:, None], NEVER), axis=0)
    np.testing.assert_array_equal(state.kind_step, last)
    last = np.maximum.accumulate(np.where(actions == "skip", at, NEVER))
    np.testing.assert_array_equal(state.last_step, last)
    np.testing.assert_array_equal(state.step, at + 1)
    rows = at - np.maximum.accumulate(np.where(actions == "skip", NEVER, at))
    # Before the first step taken, all were skipped.
    taken = np.cumsum(actions != "skip") > 0
    np.testing.assert_array_equal(state.consecutive, np.where(taken, rows, at + 1))


@full
def test_the_streams_of_the_reference_meet_every_case():
    for name, (settings, make) in SETTINGS.items():
        actions, kinds, bare = set(), np.zeros(4, bool), False
        for seed in SEEDS:
            norms, losses = random_stream(seed)
            steps = reference(
                np.abs(norms),
                losses,
                tuple(make()),
                settings.get("max_consecutive", 5),
                settings.get("budget", 16),
            )
            actions |= {each.action for each in steps}
            kinds |= np.any([each.kinds for each in steps], axis=0)
            bare |= any(each.credit < 1 for each in steps)
        assert actions == {"skip", "step", "accept"}, name
        assert kinds[[0, 1]].all(), name
        assert kinds[2] == (settings.get("grad_norm", 0) is not None), name
        assert kinds[3] == ("value" in settings), name
        if name != "default":
            assert bare, name


# --- what is not finite ----------------------------------------------------------

RICH = optax.adamw(0.1, nesterov=True)


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", [np.nan, np.inf, -np.inf, 1.0])
def test_what_is_not_finite_never_reaches_inner_at_any_step(norm, loss):
    tx = skipping(RICH)
    loss = 1.0 if norm != 1.0 and loss == np.nan else loss
    _, clean = run(tx, [1.0] * 30, [1.0] * 30)
    before = [tx.init(PARAMS), *clean]
    for at in (0, 1, 5, 29):
        (update,), (after,) = run(tx, [norm], [loss], before[at])
        assert bits(after.inner_state) == bits(before[at].inner_state)
        assert bits(after.detector) == bits(before[at].detector)
        assert not any(np.any(x) for x in jax.tree.leaves(update))
        assert bool(after.skipped)


@pytest.mark.parametrize("watched", [{}, {"grad_norm": None}], ids=["norm", "nothing"])
@pytest.mark.usefixtures("optimized")
@full
def test_steps_that_are_not_finite_are_skipped_however_many_there_are(watched):
    tx = skipping(RICH, max_consecutive=2, budget=1, **watched)
    bad = [np.nan, np.inf, -np.inf] * 20
    updates, states = run(tx, [1.0, *bad, 1.0], [1.0] * 62)
    assert skips(states) == [False, *[True] * 60, False]
    assert bits(states[60].inner_state) == bits(states[0].inner_state)
    assert not any(np.any(x) for x in jax.tree.leaves(updates[1:-1]))
    expected, _ = run(RICH, [1.0, 1.0])
    assert bits([updates[0], updates[-1]]) == bits(expected)


def test_steps_that_are_not_finite_cost_nothing_and_earn_nothing():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, budget=4)
    _, states = run(tx, [9.0, np.nan, np.inf, np.nan, 1.0])
    assert [int(state.credit) for state in states] == [12, 12, 12, 12, 13]


def test_a_step_that_is_not_finite_neither_counts_nor_ends_a_row():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, max_consecutive=2)
    norms = [9.0, np.nan, 9.0, np.inf, 9.0]
    _, states = run(tx, norms)
    assert skips(states) == [True, True, True, True, False]
    assert [int(state.spikes_in_row) for state in states] == [1, 1, 2, 2, 0]
    assert [int(state.consecutive) for state in states] == [1, 2, 3, 4, 0]


def test_nan_goes_before_inf_and_both_before_spikes():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, value=thresholds.constant(2.0))
    norms = [np.nan, np.inf, 1.0, np.inf, 9.0, 9.0, 1.0]
    losses = [np.inf, np.nan, np.nan, 9.0, np.inf, 9.0, 9.0]
    _, states = run(tx, norms, losses)
    expected = [*[0] * 3, *[1] * 2]
    for state, kind in zip(states, expected, strict=False):
        assert int(state.kind_step[kind]) == int(state.step) - 1
    assert states[-1].kind_total.tolist() == [3, 2, 1, 2]
    assert states[-1].kind_step.tolist() == [2, 4, 5, 6]


# --- what a skip leaves alone ----------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "loss"), [(1.0, 9.0), (99.0, 1.0), (99.0, 9.0), (np.nan, 1.0)]
)
def test_on_a_skipped_step_the_state_of_inner_is_untouched_bit_for_bit(norm, loss):
    tx = skipping(RICH, grad_norm=AT_FIVE, value=thresholds.constant(5.0))
    _, before = run(tx, [1.0, 2.0, 0.5], [1.0] * 3)
    (update,), (after,) = run(tx, [norm], [loss], before[-1])
    assert bool(after.skipped)
    assert bits(after.inner_state) == bits(before[-1].inner_state)
    assert bits(update) == bits(jax.tree.map(np.zeros_like, PARAMS))


@pytest.mark.usefixtures("optimized")
@full
def test_training_goes_on_after_a_skip_as_if_it_had_not_been():
    tx = skipping(RICH, grad_norm=AT_FIVE)
    norms = [1.0, 2.0, 0.5, 1.5]
    expected, _ = run(RICH, norms)
    updates, _ = run(tx, [*norms[:2], 50.0, np.nan, *norms[2:]])
    assert bits(updates[:2] + updates[4:]) == bits(expected)


@full
def test_what_is_skipped_is_not_learned():
    tx = guarding(IDENTITY)
    rng = np.random.default_rng(0)
    _, before = run(tx, np.exp(0.1 * rng.standard_normal(40)), [2.0] * 40)
    for norm, loss in ((1.0, 9.0), (99.0, 9.0), (np.nan, 2.0), (1.0, np.inf)):
        _, (after,) = run(tx, [norm], [loss], before[-1])
        assert bool(after.skipped)
        assert bits(after.detector) == bits(before[-1].detector)


# --- what a normal step leaves alone ---------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@quick_only("float32")
def test_on_a_normal_step_the_gradient_passes_bit_for_bit(dtype):
    tx = skipping(IDENTITY)
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), direction())
    grads["body"]["b"] = jnp.asarray([-0.0, 0.0, 1e-7], dtype)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = compiled(tx.update)(grads, state, PARAMS)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        assert bits(updates) == bits(grads)


def test_a_norm_and_a_loss_at_their_limits_are_normal():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, value=thresholds.constant(2.0))
    grads = {"w": np.array([3.0, 4.0], np.float32)}
    updates, state = compiled(tx.update)(grads, tx.init(grads), value=2.0)
    assert bits(updates) == bits(grads)
    assert not state.skipped
    assert state.kind_total.tolist() == [0, 0, 0, 0]


def test_without_thresholds_everything_finite_is_normal():
    tx = skipping(IDENTITY, grad_norm=None)
    norms, losses = [1.0, 1e30, 1e-20, 0.0, 1e10], [1.0, 1e30, -1e30, 0.0, 5.0]
    updates, states = run(tx, norms, losses)
    assert bits(updates) == bits([grads_of(norm) for norm in norms])
    assert not any(skips(states))
    assert int(states[-1].credit) == 16 * 16
    assert float(states[-1].norm_limit) == float(states[-1].value_limit) == np.inf


def test_a_gradient_of_zero_passes_and_is_not_learned():
    tx = skipping(IDENTITY)
    _, before = run(tx, [1.0] * 5)
    updates, (after,) = run(tx, [0.0], None, before[-1])
    assert bits(updates) == bits([grads_of(0.0)])
    assert bits(after.detector) == bits(before[-1].detector)


def test_a_tree_without_a_leaf_has_nothing_to_skip():
    tx = skipping(IDENTITY)
    updates, state = compiled(tx.update)({}, tx.init({}), {})
    assert updates == {}
    assert float(state.norm) == 0.0


# --- rows and the bucket ---------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 5])
def test_at_most_max_consecutive_spikes_in_a_row_are_skipped(most):
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, max_consecutive=most)
    _, states = run(tx, [9.0] * (2 * most + 2))
    assert skips(states) == ([True] * most + [False]) * 2
    assert int(states[-1].accepted_total) == 2


def test_a_normal_step_ends_a_row():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, max_consecutive=2)
    _, states = run(tx, [9.0, 9.0, 1.0, 9.0, 9.0, 9.0])
    assert skips(states) == [True, True, False, True, True, False]


def test_an_accepted_spike_is_taken_at_the_limit_and_is_the_new_normal():
    tx = guarding(IDENTITY, max_consecutive=2)
    _, before = run(tx, [1.0] * 30, [2.0] * 30)
    updates, states = run(tx, [20.0] * 4, [4.0] * 4, before[-1])
    assert skips(states) == [True, True, False, False]
    assert norm_of(updates[2]) == pytest.approx(5.0, rel=LIMIT)
    assert bits(updates[3]) == bits(grads_of(20.0))
    assert float(states[3].norm_limit) == pytest.approx(100.0, rel=LIMIT)
    assert float(states[3].value_limit) == pytest.approx(4.5, rel=LIMIT)
    assert int(states[3].accepted_total) == 1


def test_of_a_norm_ten_times_its_limit_is_accepted_at_once_and_no_more():
    tx = skipping(IDENTITY, max_consecutive=1)
    _, before = run(tx, [1.0] * 30)
    updates, states = run(tx, [1e30] * 2 + [1.0], None, before[-1])
    assert norm_of(updates[1]) == pytest.approx(5.0, rel=LIMIT)
    assert float(states[2].norm_limit) == pytest.approx(250.0, rel=LIMIT)


@full
def test_an_accepted_loss_does_not_move_the_level_of_a_normal_norm():
    tx = guarding(IDENTITY, max_consecutive=1)
    _, before = run(tx, [1.0] * 30, [2.0] * 30)
    updates, states = run(tx, [0.5] * 3, [9.0] * 3, before[-1])
    assert skips(states) == [True, False, False]
    assert bits(updates[1:]) == bits([grads_of(0.5)] * 2)
    assert float(states[2].norm_limit) == pytest.approx(2.5, rel=LIMIT)


@full
def test_what_is_confirmed_by_the_loss_is_accepted_in_the_lower_threshold_too():
    confirm = thresholds.detrended_mad(4.0, floor=0.3, arm=2, log=False)
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, confirm=confirm, max_consecutive=1)
    _, before = run(tx, [1.0] * 9, [2.0] * 9)
    _, states = run(tx, [9.0] * 3, [3.0] * 3, before[-1])
    assert skips(states) == [True, False, False]
    assert states[-1].kind_total.tolist() == [0, 0, 2, 0]


def test_with_an_empty_bucket_a_spike_is_taken_at_the_limit_and_not_rebased():
    tx = skipping(IDENTITY, max_consecutive=9, budget=1)
    _, before = run(tx, [1.0] * 30)
    updates, states = run(tx, [100.0] * 3, None, before[-1])
    assert skips(states) == [True, False, False]
    for update in updates[1:]:
        assert norm_of(update) == pytest.approx(5.0, rel=LIMIT)
    assert int(states[-1].accepted_total) == 0
    # Learned at the limit, as one of eight values: the centre has not moved.
    assert float(states[-1].norm_limit) == pytest.approx(5.0, rel=LIMIT)


@pytest.mark.parametrize("budget", [1, 3, 16])
@quick_only("16")
def test_a_mixture_loses_the_bucket_and_what_its_normal_steps_earn(budget):
    """Every second batch is abnormal, for ever."""
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, budget=budget)

    @jax.jit
    def scan(norms):
        def step(state, norm):
            grads = jax.tree.map(lambda x: x * norm, direction())
            _, state = tx.update(grads, state)
            return state, state.skipped

        return jax.lax.scan(step, tx.init(PARAMS), norms)[1]

    skipped = np.asarray(scan(jnp.where(jnp.arange(600) % 2, 9.0, 1.0)))
    assert not skipped[::2].any()
    # 300 normal steps earn 300/budget skips at most.
    assert budget <= skipped.sum() <= budget + 300 / budget
    assert skipped[1 : 2 * budget : 2].all()
    # In the end one abnormal batch in ``budget`` is left out.
    assert skipped[-100:].sum() == pytest.approx(50 / budget, abs=1)


def test_a_mixture_is_learned_by_a_threshold_that_learns():
    tx = skipping(IDENTITY, budget=4)
    _, states = run(tx, [1.0] * 30 + [1.0, 50.0] * 40)
    skipped = skips(states)
    assert sum(skipped) <= 4 + 4
    assert not any(skipped[65:])


def test_the_bucket_is_never_fuller_than_budget():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, budget=2)
    _, states = run(tx, [1.0] * 9 + [9.0] + [1.0] * 3)
    assert [int(state.credit) for state in states[8:]] == [4, 2, 3, 4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_of_any_steps_no_more_are_skipped_than_the_bucket_holds_and_earns(seed):
    budget, most, size = 3, 2, 500
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, budget=budget, max_consecutive=most)
    share = (0.1, 0.5, 0.95)[seed]
    spikes = np.random.default_rng(seed).random(size) < share
    _, states = run(tx, np.where(spikes, 9.0, 1.0))
    skipped = np.cumsum([0, *skips(states)])
    for length in range(1, size + 1):
        lost = skipped[length:] - skipped[:-length]
        assert lost.max() <= budget + length / (budget + 1)
        assert length <= most or lost.max() < length


# --- confirmation by the loss ----------------------------------------------------

CONFIRMED = skipping(
    IDENTITY,
    grad_norm=AT_FIVE,
    value=thresholds.constant(3.0),
    confirm=thresholds.constant(2.0),
)


@pytest.mark.parametrize(
    ("norm", "loss", "skipped", "kinds"),
    [
        (9.0, 1.0, False, [0, 0, 0, 0]),
        (9.0, 2.5, True, [0, 0, 1, 0]),
        (9.0, 3.5, True, [0, 0, 1, 1]),
        (1.0, 2.5, False, [0, 0, 0, 0]),
        (1.0, 3.5, True, [0, 0, 0, 1]),
    ],
)
def test_a_norm_counts_if_the_loss_confirms_it(norm, loss, skipped, kinds):
    (update,), (state,) = run(CONFIRMED, [norm], [loss])
    assert bool(state.skipped) == skipped
    assert state.kind_total.tolist() == kinds
    size = 0.0 if skipped else min(norm, 5.0)
    assert norm_of(update) == pytest.approx(size, rel=ROUNDING)


def test_a_norm_jump_with_a_normal_loss_is_shortened_to_the_limit_not_skipped():
    (update,), (state,) = run(CONFIRMED, [1e20], [1.0])
    expected = jax.tree.map(lambda x: 5 * x, direction())
    chex.assert_trees_all_close(update, expected, rtol=ROUNDING)
    assert int(state.credit) == 16 * 16
    assert int(state.total) == 0


@pytest.mark.parametrize("deviation", [0.5, 0.0, -1.0, np.nan, np.inf])
def test_it_is_shortened_whatever_is_known_of_the_microbatches(deviation):
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, confirm=thresholds.constant(9.0))
    moments = ost.Moments(
        num_microbatches=jnp.int32(4),
        weight=jnp.float32(4),
        deviation=jnp.full(3, deviation, jnp.float32),  # −1 if it is unknown.
        mean_square=None,
        norm=jnp.full(3, 50, jnp.float32),
    )
    update, _ = compiled(tx.update)(
        grads_of(50.0), tx.init(PARAMS), PARAMS, value=np.float32(1), moments=moments
    )
    np.testing.assert_allclose(norm_of(update), 5.0, rtol=ROUNDING)


def test_a_negative_loss_confirms_nothing_and_its_rise_does():
    confirm = thresholds.detrended_mad(4.0, floor=0.3, arm=2, log=False)
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, confirm=confirm)
    _, states = run(tx, [1.0] * 9 + [9.0, 9.0], [-3.0] * 10 + [-2.0])
    assert skips(states)[-2:] == [False, True]


# --- the loss --------------------------------------------------------------------


def recorder():
    """Keeps the extra arguments it was given in its state."""

    def update(updates, state, params=None, **extra_args):
        del state
        return updates, {name: extra_args[name] for name in ("value", "size")}

    return optax.GradientTransformationExtraArgs(
        lambda params: {"value": jnp.float32(0), "size": jnp.int32(0)}, update
    )


def test_extra_arguments_reach_inner():
    tx = skipping(recorder())
    state = tx.init(PARAMS)
    grads = direction()
    for value in (2.0, 3.0):
        extra = {"value": jnp.float32(value), "size": jnp.int32(7)}
        _, state = compiled(tx.update)(grads, state, PARAMS, **extra)
        assert float(state.inner_state["value"]) == value
        assert int(state.inner_state["size"]) == 7


def test_parameters_reach_inner():
    tx = skipping(optax.add_decayed_weights(0.5))
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    updates, _ = compiled(tx.update)(zeros, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 0.5 * x, PARAMS))


def test_inner_may_take_no_extra_arguments():
    plain = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (updates, state)
    )
    tx = skipping(plain)
    grads = direction()
    updates, _ = compiled(tx.update)(grads, tx.init(PARAMS), PARAMS, value=1.0, x=2)
    assert bits(updates) == bits(grads)


@pytest.mark.parametrize("name", ["value", "loss"])
@pytest.mark.parametrize("kind", [float, np.float64, jnp.bfloat16, int])
@quick_only("float-value", "bfloat16-loss")
def test_the_loss_is_given_as_value_or_as_loss_in_any_dtype(name, kind):
    tx = skipping(IDENTITY, value=thresholds.constant(2.0))
    for loss, skipped in ((1, False), (3, True)):
        _, state = compiled(tx.update)(
            direction(), tx.init(PARAMS), **{name: kind(loss)}
        )
        assert bool(state.skipped) == skipped
        assert float(state.value) == loss


def test_value_goes_before_loss():
    tx = skipping(IDENTITY, value=thresholds.constant(2.0))
    _, state = compiled(tx.update)(direction(), tx.init(PARAMS), value=1.0, loss=9.0)
    assert not state.skipped
    _, state = compiled(tx.update)(direction(), tx.init(PARAMS), value=None, loss=9.0)
    assert state.skipped


@pytest.mark.parametrize("name", ["value", "confirm"])
def test_a_loss_that_is_needed_and_missing_raises_and_names_the_remedy(name):
    tx = skipping(IDENTITY, **{name: thresholds.constant(2.0)})
    with pytest.raises(ValueError, match="value=loss") as raised:
        tx.update(direction(), tx.init(PARAMS), PARAMS)
    for remedy in ("tx.update", "optimizer.update", "apply_gradients", "value=None"):
        assert remedy in str(raised.value)


@pytest.mark.parametrize("shape", [(1,), (8,), (2, 2), (0,)])
def test_a_loss_that_is_no_scalar_raises_and_shows_its_shape(shape):
    tx = skipping(IDENTITY)
    with pytest.raises(ValueError, match="mean") as raised:
        tx.update(direction(), tx.init(PARAMS), value=np.ones(shape))
    assert str(shape) in str(raised.value)


def test_a_loss_of_nan_with_a_finite_gradient_is_skipped_though_no_loss_is_watched():
    (update,), (state,) = run(skipping(IDENTITY), [1.0], [np.nan])
    assert norm_of(update) == 0.0
    assert state.kind_total.tolist() == [1, 0, 0, 0]
    assert float(state.norm) == pytest.approx(1.0, rel=ROUNDING)


# --- the start -------------------------------------------------------------------


def test_a_finite_spike_in_the_very_first_gradient_passes():
    updates, (state,) = run(skipping(IDENTITY), [1e30])
    assert bits(updates) == bits([grads_of(1e30)])
    assert float(state.norm_limit) == np.inf


@full
def test_a_fixed_clip_keeps_a_first_spike_out_of_the_second_moment():
    def update_after(tx):
        updates, _ = run(tx, [1e30, *[1.0] * 60])
        return norm_of(updates[-1])

    adam = ost.scale_by_safe_adam(b2=0.95)
    fixed = ost.clip_by_threshold(thresholds.constant(1.0))
    bare = update_after(skipping(adam))
    assert bare < 0.1
    for tx in (
        skipping(optax.chain(fixed, adam)),
        optax.chain(fixed, skipping(adam)),
    ):
        assert update_after(tx) > 1.0


def test_a_spike_is_found_from_the_second_step_on():
    for before in (1, 2, 10, 23):
        _, states = run(skipping(IDENTITY), [1.0] * before + [1e30])
        assert skips(states) == [False] * before + [True]


# --- dtypes ----------------------------------------------------------------------


def casting(dtype):
    """An inner whose updates have another dtype than the gradient, with a state."""

    def update(updates, state, params=None):
        wide = jax.tree.map(lambda g, s: g.astype(dtype) + s, updates, state)
        return wide, wide

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), dtype), params),
        update,
    )


@pytest.mark.parametrize(
    ("grads_dtype", "dtype"),
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)],
)
@quick_only("float32-bfloat16")
def test_updates_have_the_dtype_that_inner_gives_them_skipped_or_not(
    grads_dtype, dtype
):
    tx = skipping(casting(dtype), grad_norm=AT_FIVE)
    state, total = tx.init(PARAMS), 0.0
    for norm in (1.0, np.nan, 2.0, 50.0, 1.5):
        grads = jax.tree.map(lambda x: jnp.asarray(x, grads_dtype), grads_of(norm))
        before = state
        updates, state = compiled(tx.update)(grads, state, PARAMS)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        if bool(state.skipped):
            assert norm_of(updates) == 0.0
            assert bits(state.inner_state) == bits(before.inner_state)
        else:
            total += norm
            assert norm_of(updates) == pytest.approx(total, rel=2.0**-7)
    assert total == 4.5


@full
def test_only_some_leaves_may_change_their_dtype():
    def update(updates, state, params=None):
        return updates | {"gain": updates["gain"].astype(jnp.bfloat16)}, state + 1

    inner = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    tx = skipping(inner)
    for norm in (1.0, np.nan):
        updates, _ = compiled(tx.update)(grads_of(norm), tx.init(PARAMS))
        assert updates["gain"].dtype == jnp.bfloat16
        assert updates["body"]["w"].dtype == jnp.float32


def test_a_shortened_bf16_gradient_keeps_its_dtype():
    tx = skipping(IDENTITY, grad_norm=AT_FIVE, confirm=thresholds.constant(9.0))
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), grads_of(50.0))
    updates, _ = compiled(tx.update)(grads, tx.init(PARAMS), value=1.0)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    assert norm_of(updates) == pytest.approx(5.0, rel=2.0**-7)


# --- inside and around others ----------------------------------------------------


@full
def test_inside_multi_steps_one_bad_mean_is_left_out():
    tx = optax.MultiSteps(skipping(optax.sgd(1.0), grad_norm=AT_FIVE), 2)
    updates, states = run(tx, [1.0, 3.0, 50.0, 1.0, 1.0, 3.0])
    sizes = [norm_of(update) for update in updates]
    np.testing.assert_allclose(sizes, [0, 2, 0, 0, 0, 2], rtol=ROUNDING)
    assert int(states[-1].inner_opt_state.total) == 1
    assert int(states[-1].inner_opt_state.step) == 3


@full
def test_inside_multi_steps_optax_must_leave_out_what_is_not_finite_itself():
    """The sum of MultiSteps keeps a NaN for ever, and every mean is then skipped."""
    inner = skipping(optax.sgd(1.0), grad_norm=AT_FIVE)
    tx = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)
    updates, states = run(tx, [1.0, np.nan, 3.0, 1.0, 1.0])
    sizes = [norm_of(update) for update in updates]
    np.testing.assert_allclose(sizes, [0, 0, 2, 0, 1], rtol=ROUNDING)
    assert int(states[-1].inner_opt_state.total) == 0


def test_around_multi_steps_one_bad_microbatch_is_left_out():
    tx = skipping(
        optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
        grad_norm=AT_FIVE,
    )
    updates, states = run(tx, [1.0, np.nan, 3.0, 50.0, 1.0, 1.0])
    sizes = [norm_of(update) for update in updates]
    np.testing.assert_allclose(sizes, [0, 0, 2, 0, 0, 1], rtol=ROUNDING)
    assert skips(states) == [False, True, False, True, False, False]


@full
def test_a_scan_equals_a_loop():
    tx = skipping(RICH, grad_norm=AT_FIVE, max_consecutive=2)
    norms = [1.0, 2.0, np.nan, 9.0, 9.0, 9.0, 1.0, np.inf, 0.5]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *map(grads_of, norms))

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates

    state, updates = jax.jit(lambda grads: jax.lax.scan(step, tx.init(PARAMS), grads))(
        stacked
    )
    expected, states = run(tx, norms)
    chex.assert_trees_all_close(state, states[-1], rtol=ROUNDING)
    for i, each in enumerate(expected):
        chosen = jax.tree.map(lambda x, i=i: x[i], updates)
        chex.assert_trees_all_close(chosen, each, rtol=ROUNDING, atol=1e-9)


@full
def test_under_vmap_each_member_decides_for_itself():
    tx = skipping(RICH, value=thresholds.constant(2.0))
    streams = [[1.0, 2.0, 1.5], [1.0, np.nan, 1.5], [1.0, 900.0, 1.5]]
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    found = []
    losses = jnp.ones(3)
    for norms in zip(*streams, strict=True):
        grads = jax.tree.map(lambda *xs: np.stack(xs), *map(grads_of, norms))
        step = jax.jit(jax.vmap(lambda g, s, loss: tx.update(g, s, PARAMS, value=loss)))
        updates, state = step(grads, state, losses)
        found.append(updates)
    assert state.total.tolist() == [0, 1, 1]
    for member, norms in enumerate(streams):
        expected, states = run(tx, norms, [1.0] * 3)
        chosen = jax.tree.map(lambda x, i=member: x[i], found)
        chex.assert_trees_all_close(chosen, expected, rtol=ROUNDING, atol=1e-9)
        last = jax.tree.map(lambda x, i=member: x[i], state)
        chex.assert_trees_all_close(last, states[-1], rtol=ROUNDING, atol=1e-9)


def test_hyperparameters_of_inner_can_be_injected_inside_jit():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    tx = skipping(inner, grad_norm=AT_FIVE)
    updates, states = run(tx, [1.0, np.nan, 1.0])
    np.testing.assert_allclose(
        [norm_of(update) for update in updates], [0.5, 0, 0.5], rtol=ROUNDING
    )
    assert int(states[-1].inner_state.count) == 2


@full
def test_max_consecutive_and_budget_can_be_injected():
    factory = functools.partial(ost.skip_spikes, grad_norm=AT_FIVE)

    def make(max_consecutive, budget):
        return factory(RICH, max_consecutive=max_consecutive, budget=budget)

    injected = optax.inject_hyperparams(make)(max_consecutive=2, budget=3)
    norms = [1.0] + [9.0] * 6 + [1.0] * 3
    _, states = run(injected, norms)
    _, expected = run(make(2, 3), norms)
    found = [state.inner_state for state in states]
    assert skips(found) == skips(expected)
    assert int(found[-1].credit) == int(expected[-1].credit)


# --- several devices -------------------------------------------------------------


@functools.cache
def sharded_step():
    """One step over eight devices: each one's update norm and its own state."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = skipping(
        optax.trace(0.9),
        grad_norm=AT_FIVE,
        value=thresholds.constant(2.0),
        axis_name="data",
    )
    row, everywhere = PartitionSpec("data"), PartitionSpec()

    def step(grads, losses, state):
        updates, state = tx.update(grads, state, value=losses[0])
        local = {"skipped": state.skipped, "norm": state.norm, "value": state.value}
        # Every device shows its own.
        local = jax.tree.map(lambda x: x[None], local)
        return updates, local

    spec = ost.SkipSpikesState(
        *[everywhere] * len(ost.SkipSpikesState._fields[:-1]),
        inner_state=optax.TraceState(trace={"w": row}),
    )
    return tx, jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(row, row, spec), out_specs=(row, row))
    )


@pytest.mark.parametrize(
    ("entry", "loss", "skipped"),
    [
        (0.1, 1.0, False),
        (50.0, 1.0, True),  # a spike on one device
        (np.nan, 1.0, True),
        (-np.inf, 1.0, True),
        (0.1, 10.0, True),  # the mean of the losses is 17/8
        (0.1, 8.0, False),  # 15/8
        (0.1, np.nan, True),
    ],
)
def test_all_devices_decide_alike_though_one_alone_is_abnormal(entry, loss, skipped):
    tx, step = sharded_step()
    grads = {"w": np.full((8, 3), 0.1, np.float32)}
    grads["w"][5, 1] = entry
    losses = np.ones(8, np.float32)
    losses[3] = loss
    updates, local = step(grads, losses, tx.init(grads))
    assert local["skipped"].tolist() == [skipped] * 8
    assert len(set(bits([*map(np.asarray, local["norm"])]))) == 1
    if np.isfinite(entry):
        np.testing.assert_allclose(local["norm"], norm_of(grads), rtol=ROUNDING)
    np.testing.assert_allclose(local["value"], losses.mean(), rtol=ROUNDING)
    expected = np.zeros_like(grads["w"]) if skipped else grads["w"]
    np.testing.assert_array_equal(updates["w"], expected)


# --- checkpoints -----------------------------------------------------------------


@pytest.mark.parametrize("at", [10, 42], ids=["mid-warm-up", "mid-spike"])
@quick_only("mid-spike")
def test_a_restored_run_continues_bit_for_bit(at, tmp_path):
    tx = guarding(optax.chain(ost.clip_by_zscore(warmup=20), RICH))
    rng = np.random.default_rng(3)
    norms = np.exp(0.2 * rng.standard_normal(60))
    losses = 2 + 0.05 * rng.standard_normal(60)
    norms[40:48], losses[40:48] = 50.0, 6.0
    norms[12] = np.nan
    updates, states = run(tx, norms, losses)
    assert skips(states)[41:43] == [True, True]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states[at])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(PARAMS))
    assert bits(restored) == bits(states[at])
    again, later = run(tx, norms[at + 1 :], losses[at + 1 :], restored)
    assert bits(again) == bits(updates[at + 1 :])
    assert bits(later) == bits(states[at + 1 :])


# --- metrics ---------------------------------------------------------------------


def test_the_metrics_of_several_steps():
    tx = skipping(
        IDENTITY,
        grad_norm=AT_FIVE,
        value=thresholds.constant(2.0),
        max_consecutive=2,
    )
    norms = [1.0, np.nan, np.inf, 9.0, 9.0, 9.0, 1.0]
    losses = [1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 0.5]
    _, states = run(tx, norms, losses)
    found = [ost.metrics(state) for state in states]
    by_leaf = [each.pop("skip/nonfinite/per_leaf").tolist() for each in found]
    assert by_leaf == [[0, n, 0] for n in (0, 1, 2, 2, 2, 2, 2)]
    columns = {key: [each[key].item() for each in found] for key in found[0]}
    expected = {
        "skip/skipped": [False, True, True, True, True, False, False],
        "skip/total": [0, 1, 2, 3, 4, 4, 4],
        "skip/nonfinite_total": [0, 1, 2, 2, 2, 2, 2],
        "skip/accepted_total": [0, 0, 0, 0, 0, 1, 1],
        "skip/declined_total": [0] * 7,
        "skip/left": [16, 16, 16, 15, 14, 14, 14],
        "skip/consecutive": [0, 1, 2, 3, 4, 0, 0],
        "skip/last_step": [-1, 1, 2, 3, 4, 4, 4],
        "skip/nan_total": [0, 1, 1, 1, 1, 1, 1],
        "skip/nan_last_step": [-1, 1, 1, 1, 1, 1, 1],
        "skip/inf_total": [0, 0, 1, 1, 1, 1, 1],
        "skip/inf_last_step": [-1, -1, 2, 2, 2, 2, 2],
        "skip/norm_total": [0, 0, 0, 1, 2, 3, 3],
        "skip/norm_last_step": [-1, -1, -1, 3, 4, 5, 5],
        "skip/value_total": [0, 0, 0, 0, 1, 1, 1],
        "skip/value_last_step": [-1, -1, -1, -1, 4, 4, 4],
        "skip/value": losses,
        "skip/norm_limit": [5.0] * 7,
        "skip/value_limit": [2.0] * 7,
    }
    assert columns.keys() == {*expected, "skip/norm"}
    np.testing.assert_allclose(columns.pop("skip/norm"), norms, rtol=ROUNDING)
    assert columns == expected


def test_before_the_first_step_nothing_was_skipped():
    found = ost.metrics(skipping(IDENTITY).init(PARAMS))
    assert found.pop("skip/left") == 16
    for key, value in found.items():
        assert (value == (NEVER if key.endswith("last_step") else 0)).all(), key


def test_without_a_loss_its_value_is_zero_and_its_limit_infinite():
    _, (state,) = run(skipping(IDENTITY), [1.0])
    assert float(state.value) == 0.0
    assert float(state.value_limit) == np.inf


def test_counters_stop_at_the_largest_integer():
    tx = skipping(IDENTITY)
    largest = jnp.int32(2**31 - 1)
    full = tx.init(PARAMS)._replace(
        step=largest,
        total=largest,
        consecutive=largest,
        kind_total=jnp.full(4, largest),
    )
    _, (state,) = run(tx, [np.nan], None, full)
    assert int(state.step) == int(state.total) == int(state.consecutive) == largest
    assert state.kind_total.tolist() == [largest] * 4


# --- spike_guard -----------------------------------------------------------------


def computation(tx):
    """What update computes, as text."""
    grads = direction()
    state = jax.eval_shape(tx.init, grads)
    update = functools.partial(tx.update, value=1.0)
    return str(jax.make_jaxpr(update)(grads, state, grads))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_consecutive": 25},
        {"budget": 4},
        {"grad_norm": None},
        {"value": None},
        {"confirm": None},
        {"value": thresholds.constant(3.0)},
    ],
    ids=" ".join,
)
@quick_only("budget", "confirm")
def test_spike_guard_is_skip_spikes_with_the_three_thresholds(overrides):
    settings = {
        "grad_norm": thresholds.detrended_mad(5.0, floor=5.0),
        "value": thresholds.detrended_mad(7.0, floor=0.5, log=False),
        "confirm": thresholds.detrended_mad(4.0, floor=0.3, log=False),
    }
    composed = computation(skipping(RICH, **settings | overrides))
    assert computation(guarding(RICH, **overrides)) == composed
    if overrides:
        assert computation(guarding(RICH)) != composed


@pytest.mark.parametrize(
    ("norm", "loss", "skipped"),
    [
        (1.0, 2.6, True),  # half a nat above the trend, with the norm of always
        (1.0, 2.4, False),
        (5.5, 2.4, True),  # five times the trend, and the loss agrees
        (5.5, 2.2, False),
        (4.5, 2.4, False),
        (1e6, 2.0, False),
        (0.01, 1.0, False),
    ],
)
def test_spike_guard_skips_by_loss_or_by_norm_and_loss_together(norm, loss, skipped):
    _, before = run(guarding(IDENTITY), [1.0] * 30, [2.0] * 30)
    (update,), (state,) = run(guarding(IDENTITY), [norm], [loss], before[-1])
    assert bool(state.skipped) == skipped
    size = 0.0 if skipped else min(norm, 5.0)
    assert norm_of(update) == pytest.approx(size, rel=LIMIT)


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(
            st.floats(0, 2.0**100, width=32) | st.just(np.nan) | st.just(np.inf),
            st.floats(width=32),
        ),
        min_size=40,
        max_size=40,
    )
)
def test_whatever_comes_nothing_is_poisoned_and_no_more_skipped_than_promised(stream):
    norms, losses = map(np.array, zip(*stream, strict=True))
    updates, states = run(GUARDED, norms, losses)
    chex.assert_tree_all_finite(updates)
    chex.assert_tree_all_finite([states[-1].inner_state, states[-1].detector.grad_norm])
    finite = np.isfinite(norms) & np.isfinite(losses)
    skipped = np.array(skips(states))
    assert skipped[~finite].all()
    in_finite_steps = skipped[finite]
    assert in_finite_steps.sum() <= 16 + finite.sum() / 17
    rows = np.convolve(in_finite_steps, np.ones(6), "valid")
    assert not rows.size or rows.max() < 6


GUARDED = guarding(ost.safe_adamw(0.1))


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grad_norm", "value", "confirm"])
@pytest.mark.parametrize("threshold", [1.0, "zscore", thresholds.zscore])
def test_what_is_no_threshold_raises_and_names_the_remedy(name, threshold):
    for make in (ost.skip_spikes, ost.spike_guard):
        with pytest.raises(TypeError, match=rf"{name}=thresholds\.constant") as raised:
            make(IDENTITY, **{name: threshold})
        assert repr(threshold) in str(raised.value)


@pytest.mark.parametrize("name", ["max_consecutive", "budget"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_a_count_that_is_out_of_range_raises(name, value):
    for make in (ost.skip_spikes, ost.spike_guard):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            make(IDENTITY, **{name: value})


def test_spike_guard_takes_no_argument_that_skip_spikes_does_not_know():
    with pytest.raises(TypeError, match="patience"):
        ost.spike_guard(IDENTITY, patience=3)


@full
def test_reverse_mode_is_that_of_the_step_that_is_taken():
    tx = skipping(IDENTITY)

    def loss(grads):
        return optax.tree.norm(tx.update(grads, tx.init(PARAMS))[0])

    found, expected = (jax.grad(f)(direction()) for f in (loss, optax.tree.norm))
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING)


# --- the norm is measured once ---------------------------------------------------


def clipped_within(*first):
    clip = ost.clip_by_threshold(thresholds.constant(0.5))
    return ost.skip_spikes(optax.chain(*first, clip), grad_norm=AT_FIVE)


@pytest.mark.parametrize(
    ("first", "factor"),
    [((), 1.0), ((optax.scale(0.25),), 0.25)],
    ids=["alone", "scaled"],
)
@pytest.mark.parametrize("norm", [2.0, 100.0], ids=["normal", "shortened"])
@quick_only("shortened-alone", "shortened-scaled")
def test_a_clip_inside_sees_the_norm_of_what_reaches_it(norm, first, factor):
    tx = clipped_within(*first)
    state, update = tx.init(PARAMS), compiled(tx.update)
    for _ in range(6):  # The sixth of a row of spikes is taken, at the limit.
        updates, state = update(grads_of(norm), state)
    seen = float(state.inner_state[-1].norm)
    assert seen == pytest.approx(factor * min(norm, 5.0), rel=ROUNDING)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, abs=0.01)


@full
def test_the_clip_inside_costs_no_pass_over_the_gradient():
    params = {str(i): jnp.ones((64, 64)) for i in range(3)}

    def bytes_of(tx):
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
        return lowered.compile().cost_analysis()["bytes accessed"]

    size = sum(x.nbytes for x in params.values())
    once, twice = bytes_of(clipped_within()), bytes_of(clipped_within(optax.scale(1.0)))
    assert twice - once > 0.9 * size

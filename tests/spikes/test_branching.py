"""Branching: the rule against a state machine in plain Python, and every guarantee."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import full, quick_only

import optax_stability as ost
from optax_stability import thresholds

NORMAL, BRANCH, PROBE = 0, 1, 2
RATE, MOMENTUM = 0.125, 0.5
START = np.array([1.0, -2.0, 0.5], np.float32)

# The last loss that was learned plus one: a branch and what is kept differ by it.
ONE_ABOVE = thresholds.Threshold(
    init=lambda: jnp.zeros((), jnp.float32),
    update=lambda x, level: (level + 1, jnp.where(jnp.isfinite(x), x, level)),
    rebase=lambda x, level: jnp.asarray(x, jnp.float32),
)
AT_TEN = thresholds.constant(10.0)


@functools.cache
def branching(**options):
    settings = {"grad_norm": AT_TEN, "value": ONE_ABOVE, "confirm": None}
    inner = optax.sgd(RATE, momentum=MOMENTUM)
    return ost.branch_on_spike(inner, **settings | options)


@functools.cache
def compiled(function):
    return jax.jit(function)


def run(tx, events, params=START, state=None):
    """Trains on (norm, loss) pairs; yields parameters and state after each."""
    state = compiled(tx.init)(params) if state is None else state
    for norm, loss in events:
        grads = jax.tree.map(
            lambda x, norm=norm: np.full_like(x, norm / np.sqrt(x.size)), params
        )
        updates, state = compiled(tx.update)(
            grads, state, params, value=np.float32(loss)
        )
        params = compiled(optax.apply_updates)(params, updates)
        yield params, state


def last(tx, events, **start):
    *_, found = run(tx, events, **start)
    return found


class Machine:
    """The rule, in plain Python and float64."""

    def __init__(self, keep, max_length, rollback_budget, max_consecutive, budget):
        self.keep, self.max_length = keep, max_length
        self.rollback_budget = rollback_budget
        self.max_consecutive, self.budget = max_consecutive, budget
        self.params = START.astype(float)
        self.trace = np.zeros(3)
        self.level = 0.0
        self.mode, self.length, self.waited = NORMAL, 0, 0
        self.bucket, self.rollbacks_saved = float(budget), float(rollback_budget)
        self.row, self.skipped = 0, 0
        self.rollbacks = self.probes = self.accepted = 0
        self.old = None

    def take(self, norm, loss):
        gradient = np.full(3, min(norm, 10.0) / np.sqrt(3))
        self.trace = gradient + MOMENTUM * self.trace
        self.params = self.params - RATE * self.trace
        self.level = loss
        self.row = 0

    def exchange(self):
        now = self.params, self.level, self.trace
        self.params, self.level, trace = self.old
        if self.keep == "all":
            self.trace = trace
        self.old = now

    def is_spike(self, norm, loss):
        return norm > 10 or loss > self.level + 1

    def skip_or_take(self, norm, loss):
        """What ``skip_spikes`` does."""
        if not self.is_spike(norm, loss):
            self.bucket = min(self.bucket + 1 / self.budget, self.budget)
            self.take(norm, loss)
        elif self.row < self.max_consecutive and self.bucket > 1 - 1e-9:
            self.bucket -= 1
            self.row += 1
            self.skipped += 1
        else:
            self.take(norm, loss)

    def step(self, norm, loss):
        finite = np.isfinite(norm) and np.isfinite(loss)
        if self.mode == NORMAL:
            self.step_normal(norm, loss, finite)
        elif self.mode == BRANCH:
            self.step_branch(norm, loss, finite)
        else:
            self.step_probe(norm, loss, finite)

    def step_normal(self, norm, loss, finite):
        if not finite:
            self.skipped += 1
            return
        payable = self.row >= self.max_consecutive or self.bucket > 1 - 1e-9
        can_roll_back = self.rollbacks_saved > 1 - 1e-9
        if self.is_spike(norm, loss) and self.row and payable and can_roll_back:
            self.old = self.params, self.level, self.trace
            self.take(norm, loss)
            self.mode, self.length, self.waited = BRANCH, 1, 0
            self.gap, self.patience, self.trusting = 16, 2, True
            return
        if not self.is_spike(norm, loss):
            saved = self.rollbacks_saved + 1 / 60
            self.rollbacks_saved = min(saved, self.rollback_budget)
        self.skip_or_take(norm, loss)

    def step_branch(self, norm, loss, finite):
        self.waited += 1
        too_long = self.length >= self.max_length
        self.length += 1
        if too_long:
            self.mode, self.length, self.waited = NORMAL, 0, 0
            self.accepted += 1
        elif finite:
            familiar = loss <= self.old[1] + 1 and self.trusting
            surprising = norm > 10 or loss > self.level + 1
            surprising = surprising and self.waited >= self.patience
            if familiar or surprising or self.waited >= self.gap:
                self.reasons = familiar, surprising
                self.mode = PROBE
        if finite:
            self.skip_or_take(norm, loss)
        else:
            self.skipped += 1
        if self.mode == PROBE:
            self.waited = 0
            self.exchange()

    def step_probe(self, norm, loss, finite):
        self.probes += 1
        if finite and not self.is_spike(norm, loss):
            if self.keep == "params":
                self.trace = np.zeros(3)
            self.bucket = min(self.bucket + 1 / self.budget, self.budget)
            self.take(norm, loss)
            self.mode, self.length, self.waited = NORMAL, 0, 0
            self.rollbacks += 1
            self.rollbacks_saved -= 1
            return
        self.exchange()
        self.mode, self.waited = BRANCH, 0
        self.length += 1
        familiar, surprising = self.reasons
        self.trusting = self.trusting and not familiar
        if surprising:
            self.patience = min(2 * self.patience, 32)
        if not any(self.reasons):
            self.gap *= 2


NORMS = st.sampled_from([1.0, 2.0, 3.0, 50.0, np.nan, np.inf])
LOSSES = st.sampled_from([0.0, 0.5, 1.5, 4.0, 4.5, 9.0, np.nan, -np.inf])
# Stretches of one kind: single draws would hardly ever make a branch grow old.
STRETCHES = st.lists(
    st.tuples(
        st.tuples(NORMS, LOSSES)
        | st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([0.0, 4.0])),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=12,
)
SETTINGS = {
    f"{keep}, {name}": {"keep": keep, "max_length": 20, "rollback_budget": 1} | more
    for keep in ("params", "all")
    for name, more in {
        "short": {},
        "long": {"max_length": 256, "rollback_budget": 3},
        "accepts at once": {"max_consecutive": 1, "max_length": 256},
        "small bucket": {"max_consecutive": 2, "budget": 3, "max_length": 2},
    }.items()
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@functools.cache
def scanned(**options):
    """(events) -> all parameters and states, compiled per length."""
    tx = branching(**options)

    def step(carry, event):
        params, state = carry
        norm, loss = event
        grads = jnp.full(3, norm / np.sqrt(3), jnp.float32)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return jax.jit(lambda events: jax.lax.scan(step, (START, tx.init(START)), events))


LONGEST = 500


def follow(events, **options):
    """The same course, by the library and by the machine."""
    padded = np.full((LONGEST, 2), np.nan, np.float32)
    padded[: len(events)] = events
    course = scanned(**options)((padded[:, 0], padded[:, 1]))
    _, (params, states) = jax.device_get(course)
    defaults = {"max_consecutive": 5, "budget": 16}
    return params, states, Machine(**defaults | options)


@every_setting
@hypothesis.settings(derandomize=True, deadline=None, max_examples=20)
@hypothesis.given(stretches=STRETCHES)
@quick_only("all, small bucket")
def test_every_transition_is_that_of_the_machine(stretches, options):
    events = [event for event, length in stretches for _ in range(length)][:LONGEST]
    params, states, machine = follow(events, **options)
    for i, event in enumerate(events):
        machine.step(*event)
        state = jax.tree.map(lambda x, i=i: x[i], states)
        for name in ("mode", "length", "waited", "rollbacks", "probes", "accepted"):
            assert getattr(state, name) == getattr(machine, name), (i, name)
        assert state.skip.total == machine.skipped, i
        assert state.skip.detector.value == machine.level, i
        assert state.credit == pytest.approx(60 * machine.rollbacks_saved), i
        np.testing.assert_allclose(params[i], machine.params, rtol=1e-5, atol=1e-5)
        trace = state.skip.inner_state[0].trace
        np.testing.assert_allclose(trace, machine.trace, rtol=1e-5, atol=1e-5)
        if machine.mode != NORMAL:
            kept, level, _ = machine.old
            np.testing.assert_allclose(state.kept.params, kept, rtol=1e-5, atol=1e-5)
            assert state.kept.detector.value == level, i


@every_setting
@quick_only("params, short")
@hypothesis.settings(derandomize=True, deadline=None, max_examples=20)
@hypothesis.given(stretches=STRETCHES)
def test_nothing_freezes_and_nothing_is_poisoned(stretches, options):
    events = [event for event, length in stretches for _ in range(length)][:LONGEST]
    params, states, _ = follow(events, **options)
    assert np.isfinite(params).all()
    assert np.isfinite(states.kept.params).all()
    assert np.isfinite(states.skip.inner_state[0].trace).all()
    longest = options.get("max_consecutive", 5) + 1
    still, before = 0, START
    for i, (norm, loss) in enumerate(events):
        moved = (np.asarray(params[i]) != before).any()
        before = np.asarray(params[i])
        finite = np.isfinite(norm) and np.isfinite(loss)
        still = 0 if moved else still + finite
        assert still <= longest, i
    assert (states.length <= options["max_length"] + 2).all()
    assert (states.credit >= 0).all()
    assert (states.credit <= 60 * options["rollback_budget"]).all()


# --- courses, one by one --------------------------------------------------------------

CLEAN, OTHER = (1.0, 0.0), (1.0, 5.0)


def modes(tx, events):
    return [int(state.mode) for _, state in run(tx, events)]


def test_one_spike_is_skipped_and_opens_nothing():
    _, state = last(branching(), [CLEAN, OTHER, CLEAN])
    assert (state.mode, state.probes, state.skip.total) == (NORMAL, 0, 1)


@full
def test_a_stretch_of_faults_is_taken_back():
    """The model from before the fault goes on, as if it had not been."""
    for keep in ("params", "all"):
        events = [CLEAN] * 3 + [OTHER] * 6 + [CLEAN]
        *_, (before, _) = run(branching(keep=keep), events[:3])
        found = list(run(branching(keep=keep), [*events, CLEAN]))
        assert [int(s.mode) for _, s in found[3:]] == [0, 1, 1, 1, 1, 1, 2, 0]
        restored, state = found[-2]
        np.testing.assert_allclose(restored, before, atol=1e-6)
        assert (state.rollbacks, state.probes, state.accepted) == (0, 0, 0)
        rolled_back = found[-1][1]
        assert (rolled_back.rollbacks, rolled_back.probes) == (1, 1)
        assert rolled_back.probed
        assert not found[-2][1].probed


def test_a_shift_that_stays_is_trained_on_after_one_step():
    found = list(run(branching(max_length=110), [CLEAN] * 3 + [OTHER] * 130))
    params = np.stack([params for params, _ in found])
    states = [state for _, state in found]
    still = (np.diff(params, axis=0) == 0).all(1)[2:]
    assert still.sum() == 1  # The one that was skipped; probes move parameters.
    assert states[-1].accepted == 1
    assert states[-1].mode == NORMAL
    assert states[-1].rollbacks == 0
    # Without a reason after 16 steps and after 32 more; before 64 more it is too old.
    assert states[-1].probes == 2


@full
def test_without_spikes_it_is_the_guard_bit_for_bit():
    rng = np.random.default_rng(0)
    events = [(n, 3 + 0.1 * x) for n, x in np.abs(rng.standard_normal((60, 2)))]
    inner = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(0.1))
    for keep in ("params", "all"):
        ours = run(ost.branch_on_spike(inner, keep=keep), events)
        guard = run(ost.spike_guard(inner), events)
        for (params, _), (expected, _) in zip(ours, guard, strict=True):
            np.testing.assert_array_equal(params, expected)


@full
def test_a_rollback_with_all_kept_has_the_moments_from_before():
    inner = optax.adam(0.1)
    for keep in ("params", "all"):
        tx = ost.branch_on_spike(
            inner, keep=keep, grad_norm=AT_TEN, value=ONE_ABOVE, confirm=None
        )
        *_, (_, before) = run(tx, [CLEAN] * 5)
        *_, (_, probing) = run(tx, [CLEAN] * 5 + [OTHER] * 4 + [CLEAN])
        assert probing.mode == PROBE
        adam, old = probing.skip.inner_state[0], before.skip.inner_state[0]
        if keep == "all":
            chex.assert_trees_all_equal(adam, old)
        else:
            assert adam.count == old.count + 4


def test_with_parameters_kept_the_first_moment_starts_at_zero():
    tx = branching()
    *_, (_, probing), (_, back) = run(tx, [CLEAN] * 5 + [OTHER] * 4 + [CLEAN] * 2)
    assert np.abs(probing.skip.inner_state[0].trace).min() > 0.6
    np.testing.assert_allclose(back.skip.inner_state[0].trace, 1 / np.sqrt(3), 1e-6)


@pytest.mark.parametrize("at", range(4, 12))
@pytest.mark.parametrize("bad", [(np.nan, 0.0), (1.0, np.nan), (np.inf, np.inf)])
def test_a_nan_at_any_moment_of_a_branch_does_no_harm(at, bad):
    events = [CLEAN] * 3 + [OTHER] * 5 + [CLEAN] * 80
    events[at] = bad
    params, state = last(branching(), events)
    assert np.isfinite(params).all()
    assert state.mode == NORMAL
    assert state.rollbacks == 1
    assert ost.metrics(state)["skip/nonfinite_total"] == 1


# --- a real course, with the detector as recommended ---------------------------------

OLD, NEW, CORRUPT = 0, 1, 2
TARGETS = np.stack([np.zeros(8), np.full(8, 3.0), np.full(8, -4.0)]).astype("f4")
COURSE = 400


@functools.cache
def descent(keep):
    """Follows targets with noise, by Adam; gradients may be multiplied by anything."""
    tx = ost.branch_on_spike(
        optax.chain(ost.clip_by_zscore(), ost.safe_adamw(0.05, weight_decay=0.0)),
        keep=keep,
    )

    def step(carry, data):
        params, state = carry
        kind, factor, noise = data
        loss, grads = jax.value_and_grad(
            lambda w: (
                jnp.mean((w - jnp.asarray(TARGETS)[kind]) ** 2) + jnp.mean(w * noise)
            )
        )(params)
        loss = jnp.where(jnp.isnan(factor), factor, loss)
        updates, state = tx.update(grads * factor, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.mode, state.rollbacks)

    start = jnp.full(8, 1.0)
    return jax.jit(lambda data: jax.lax.scan(step, (start, tx.init(start)), data)[1])


def course(keep, kinds, factors=None, seed=0):
    noise = 0.1 * np.random.default_rng(seed).standard_normal((COURSE, 8))
    factors = np.ones(COURSE, np.float32) if factors is None else factors
    return jax.device_get(descent(keep)((kinds, factors, noise.astype("f4"))))


def distance(params, kind):
    return np.abs(params - TARGETS[kind]).max(-1)


@pytest.mark.parametrize("keep", ["params", "all"])
@pytest.mark.parametrize("length", [1, 2, 5, 20, 60, 200])
@quick_only("5-params")
def test_what_was_learned_from_corrupted_data_is_forgotten_when_they_end(keep, length):
    kinds = np.zeros(COURSE, np.int32)
    kinds[100 : 100 + length] = CORRUPT
    params, mode, rollbacks = course(keep, kinds)
    if length > 20:
        # It has gone after them.
        assert distance(params[100 : 100 + length], OLD).max() > 1
    assert rollbacks[-1] == (length > 1)
    assert mode[-1] == NORMAL
    # Two steps to notice, and it is where it was.
    assert distance(params[103 + length], OLD) < distance(params[99], OLD) + 0.3


@pytest.mark.parametrize("keep", ["params", "all"])
@quick_only("params")
def test_what_has_changed_for_good_is_followed(keep):
    kinds = np.where(np.arange(COURSE) < 100, OLD, NEW).astype(np.int32)
    params, mode, rollbacks = course(keep, kinds)
    assert distance(params[-1], NEW) < 0.3
    assert (mode[-1], rollbacks[-1]) == (NORMAL, 0)
    reached = np.flatnonzero(distance(params, NEW) < 1)[0]
    assert reached < 100 + 2 / 0.05 + 20  # The way there, and no more than a few steps.


@hypothesis.settings(derandomize=True, deadline=None, max_examples=40)
@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from([OLD, NEW, CORRUPT]),
            st.sampled_from([1.0, 1.0, 1.0, 1e4, 1e-4, np.nan, np.inf]),
            st.integers(1, 30),
        ),
        max_size=8,
    ),
    st.sampled_from(["params", "all"]),
)
@full
def test_whatever_happens_training_goes_on_afterwards(stretches, keep):
    kinds, factors = np.zeros(COURSE, np.int32), np.ones(COURSE, np.float32)
    at = 60
    for kind, factor, length in stretches:
        kinds[at : at + length], factors[at : at + length] = kind, factor
        at += length
    params, _, _ = course(keep, kinds, factors)
    assert np.isfinite(params).all()
    # In what is left it gets to where the data are: 100 steps of 0.05 at least.
    if at < COURSE - 150:
        assert distance(params[-1], OLD) < 1


# --- exactness ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@quick_only("float32")
def test_an_exchange_restores_to_within_a_rounding(dtype):
    """Half a spacing of the difference and half of the result; exactly when close."""
    rng = np.random.default_rng(0)
    kept = jnp.asarray(rng.standard_normal(10_000), dtype)
    close = kept * jnp.asarray(rng.uniform(0.75, 1.3, 10_000), dtype)
    far = jnp.asarray(rng.standard_normal(10_000), dtype)
    half = float(jnp.finfo(dtype).eps) / 2
    for now, exact in ((close, True), (far, False)):
        tx = branching()
        state = tx.init(now)._replace(mode=jnp.int32(BRANCH))
        state = state._replace(kept=state.kept._replace(params=kept))
        grads = jnp.full_like(now, 1e-3)
        updates, state = jax.jit(tx.update)(grads, state, now, value=0.0)
        assert state.mode == PROBE
        taken = optax.apply_updates(now, RATE * -grads)
        np.testing.assert_array_equal(state.kept.params, taken)
        restored = optax.apply_updates(now, updates)
        assert restored.dtype == dtype
        error = np.abs(np.float64(restored) - np.float64(kept))
        difference = np.abs(np.float64(kept) - np.float64(now))
        assert (error <= 1.001 * half * (difference + np.abs(np.float64(kept)))).all()
        assert (error == 0).all() == exact


def test_an_exchange_of_the_state_is_exact_whatever_is_in_it():
    """Floats of every width, integers and bools, NaN and −0."""
    from optax_stability._core._in_place import exchange_if

    values = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 3.1], np.float32)
    first = {
        "f32": values,
        "bf16": jnp.asarray(values, jnp.bfloat16),
        "i32": np.arange(6, dtype=np.int32) - 3,
        "bool": values > 1,
        "scalar": np.float32(-7),
    }
    second = jax.tree.map(
        lambda x: jnp.asarray(x)[..., ::-1] if x.ndim else x + 1, first
    )

    def bits(tree):
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]

    swap = jax.jit(exchange_if)
    assert list(map(bits, swap(True, first, second))) == [bits(second), bits(first)]
    assert list(map(bits, swap(False, first, second))) == [bits(first), bits(second)]


@full
def test_updates_narrower_than_the_parameters_round_an_exchange_and_no_more():
    """Gradients of bfloat16 make updates of bfloat16."""
    tx = ost.branch_on_spike(
        optax.scale(-RATE), grad_norm=AT_TEN, value=ONE_ABOVE, confirm=None
    )
    params, state, seen = START, tx.init(START), []
    for norm, loss in [CLEAN] * 3 + [OTHER] * 5 + [CLEAN]:
        grads = jnp.full(3, norm, jnp.bfloat16)
        updates, state = compiled(tx.update)(grads, state, params, value=loss)
        assert updates.dtype == jnp.bfloat16
        branch, params = params, optax.apply_updates(params, updates)
        seen.append(params)
    assert state.mode == PROBE
    np.testing.assert_array_equal(state.kept.params, branch - RATE)
    error = np.abs(params - seen[2])
    assert (error <= 2.0**-8 * np.abs(branch - seen[2])).all()


@pytest.mark.parametrize("keep_in", ["device", "host"])
@full
def test_what_has_no_bits_to_mix_is_exchanged_as_well(keep_in):
    """A random key in the state of ``inner``."""
    tx = ost.branch_on_spike(
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(RATE)),
        keep="all",
        keep_in=keep_in,
        grad_norm=AT_TEN,
        value=ONE_ABOVE,
        confirm=None,
    )
    found = list(run(tx, [CLEAN] * 3 + [OTHER] * 5 + [CLEAN]))
    before, back = found[2], found[-1]
    assert back[1].mode == PROBE
    np.testing.assert_allclose(back[0], before[0], rtol=1e-6)
    chex.assert_trees_all_equal(back[1].skip.inner_state, before[1].skip.inner_state)


@pytest.mark.parametrize("wrap", ["accumulate_moments", "MultiSteps"])
@full
def test_accumulated_gradients_branch_as_whole_ones_do(wrap):
    tx = {
        "accumulate_moments": ost.accumulate_moments(branching(), 2),
        "MultiSteps": optax.MultiSteps(branching(), 2).gradient_transformation(),
    }[wrap]
    events = [CLEAN] * 4 + [OTHER] * 6 + [CLEAN] * 4
    whole, state = last(branching(), events)
    halves = [event for event in events for _ in range(2)]
    params, accumulated = last(tx, halves)
    np.testing.assert_allclose(params, whole, rtol=1e-5)
    assert state.rollbacks == ost.metrics(accumulated)["branch/rollbacks"] == 1


# --- what to evaluate -----------------------------------------------------------------


def test_what_is_evaluated_is_kept_until_the_branch_is_dropped():
    tx, events = branching(), [CLEAN] * 3 + [OTHER] * 5 + [CLEAN] * 2
    found = list(run(tx, events))
    before = found[2][0]
    for params, state in found[3:9]:
        np.testing.assert_allclose(ost.eval_params(params, state), before, atol=1e-6)
    params, state = found[-1]
    np.testing.assert_array_equal(ost.eval_params(params, state), params)
    opened, state = found[4]
    assert np.abs(opened - before).max() > 0.01


def open_branch(tx, params, **extra):
    state = tx.init(params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.1), params)
    for loss in (0.0, 0.0, 9.0, 9.0, 9.0):
        updates, state = tx.update(grads, state, params, value=loss, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("wrap", ["chain", "masked", "partition", "inject"])
@full
def test_what_is_evaluated_is_found_in_any_state(wrap):
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    whole = optax.partition(
        {"matrix": branching(), "vector": branching()},
        {"a": "matrix", "b": "vector"},
    )
    made = {
        "chain": optax.chain(optax.identity(), branching()),
        "masked": optax.masked(branching(), {"a": True, "b": False}),
        "partition": whole,
        "inject": optax.inject_hyperparams(
            lambda rate: ost.branch_on_spike(
                optax.sgd(rate), grad_norm=AT_TEN, value=ONE_ABOVE, confirm=None
            )
        )(rate=0.1),
    }
    now, state = open_branch(made[wrap], params)
    found = jax.jit(ost.eval_params)(now, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    assert (now["a"] != found["a"]).all()
    assert ((now["b"] != found["b"]).all()) == (wrap != "masked")


@full
def test_what_is_evaluated_of_an_nnx_optimizer_goes_back_into_its_model():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, branching(), wrt=nnx.Param)
    for loss in (0.0, 9.0, 9.0):
        before = nnx.state(model, nnx.Param)
        before = jax.tree.map(jnp.copy, before)
        grads = jax.tree.map(jnp.ones_like, before)
        optimizer.update(model, grads, value=loss)
    now = nnx.state(model, nnx.Param)
    kept = ost.eval_params(now, optimizer)
    assert jax.tree.structure(kept) == jax.tree.structure(now)
    chex.assert_trees_all_equal(kept, before)
    nnx.update(model, kept)
    np.testing.assert_array_equal(model.bias[...], before["bias"][...])


def test_what_cannot_be_evaluated_says_why():
    params = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match="no state of branch_on_spike"):
        ost.eval_params(params, optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match=r"no leaf \['a'\] of shape \(3,\)"):
        ost.eval_params({"b": jnp.ones(3)}, branching().init(params))
    with pytest.raises(ValueError, match="made for"):
        ost.eval_params({"a": jnp.ones(4)}, branching().init(params))


# --- checkpoints and donation ---------------------------------------------------------

COURSE_OF_ALL_MODES = [CLEAN] * 3 + [OTHER] * 20 + [CLEAN] * 4


@pytest.mark.parametrize("keep", ["params", "all"])
@full
def test_orbax_restores_every_mode_and_the_course_goes_on(keep, tmp_path):
    tx = branching(keep=keep)
    course = list(run(tx, COURSE_OF_ALL_MODES))
    at = {int(state.mode): i for i, (_, state) in enumerate(course)}
    assert at.keys() == {NORMAL, BRANCH, PROBE}
    at[NORMAL] = 3  # With a skip behind it; the others are the last of their kind.
    with ocp.StandardCheckpointer() as checkpointer:
        for mode, i in at.items():
            checkpointer.save(tmp_path / str(mode), course[i])
            checkpointer.wait_until_finished()
            fresh = START, tx.init(START)
            params, state = checkpointer.restore(tmp_path / str(mode), fresh)
            chex.assert_trees_all_equal((params, state), course[i])
            rest = COURSE_OF_ALL_MODES[i + 1 :]
            again = list(run(tx, rest, params=params, state=state))
            chex.assert_trees_all_equal(again, course[i + 1 :])


@pytest.mark.parametrize("keep", ["params", "all"])
@full
def test_in_the_buffers_it_is_given_it_takes_the_same_course(keep):
    tx, start = branching(keep=keep), {"a": START, "b": np.ones((2, 3), np.float32)}

    def step(params, state, norm, loss):
        grads = jax.tree.map(lambda x: jnp.full_like(x, norm / 3), params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    courses = []
    for donated in ((), (0, 1)):
        compiled_step = jax.jit(step, donate_argnums=donated)
        params, course = jax.tree.map(jnp.copy, start), []
        state = tx.init(params)
        for event in COURSE_OF_ALL_MODES:
            params, state = compiled_step(params, state, *event)
            course.append(jax.tree.map(np.array, (params, state)))
        courses.append(course)
    assert {int(state.mode) for _, state in courses[0]} == {NORMAL, BRANCH, PROBE}
    chex.assert_trees_all_equal(*courses)


# --- memory, sharding, arguments ------------------------------------------------------


def footprint(tx, size=1 << 20):
    """Bytes per parameter of a training step: arguments and temporaries."""
    params = {f"w{i}": jnp.ones(size // 8) for i in range(8)}

    def step(params, state, x):
        def loss_fn(params):
            return sum(jnp.sum((w * x) ** 2) for w in jax.tree.leaves(params))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    shapes = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, shapes, 1.0)
    memory = lowered.compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return held / size


@pytest.mark.parametrize(("keep", "copies"), [("params", 1), ("all", 3)])
@full
def test_it_takes_room_for_what_it_keeps_and_for_nothing_else(keep, copies):
    inner = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-3))
    guard = footprint(ost.spike_guard(inner))
    ours = footprint(ost.branch_on_spike(inner, keep=keep))
    assert ours - guard == pytest.approx(4 * copies, abs=0.05)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("keep", ["params", "all"])
@pytest.mark.parametrize("keep_in", ["device", "host"])
@quick_only("host-all-AxisType.Auto")
def test_what_is_kept_is_sharded_as_the_parameters_are(axis_type, keep, keep_in):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    events = [CLEAN] * 3 + [OTHER] * 5 + [CLEAN] * 3
    start = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    expected = list(run(branching(keep=keep), events, params=start))
    with jax.set_mesh(mesh):
        tx = branching(keep=keep, keep_in=keep_in)
        params = jax.device_put(start, split)
        state, memory = tx.init(params), {"device": "device", "host": "pinned_host"}
        beside = split.with_memory_kind(memory[keep_in])
        assert state.kept.params.sharding.is_equivalent_to(beside, 2)
        for event, (wanted, machine) in zip(events, expected, strict=True):
            grads = jax.device_put(np.full_like(start, event[0] / 8), split)
            updates, state = jax.jit(tx.update)(grads, state, params, value=event[1])
            params = optax.apply_updates(params, updates)
            assert state.mode == machine.mode
            np.testing.assert_allclose(params, wanted, rtol=1e-5)
            assert state.kept.params.sharding.is_equivalent_to(beside, 2)
            assert params.sharding.is_equivalent_to(split, 2)


@pytest.mark.parametrize("keep", ["params", "all"])
@quick_only("all")
def test_what_is_kept_can_lie_in_the_memory_of_the_host(keep):
    events = [CLEAN] * 3 + [OTHER] * 5 + [CLEAN] * 3 + [OTHER] * 30
    expected = run(branching(keep=keep), events)
    ours = run(branching(keep=keep, keep_in="host"), events)
    for (params, state), (wanted, machine) in zip(ours, expected, strict=True):
        assert state.mode == machine.mode
        np.testing.assert_array_equal(params, wanted)
        np.testing.assert_array_equal(
            ost.eval_params(params, state), ost.eval_params(wanted, machine)
        )
        kept = jax.tree.leaves((state.kept.params, state.kept.inner_state))
        assert {leaf.sharding.memory_kind for leaf in kept} == {"pinned_host"}
        assert params.sharding.memory_kind != "pinned_host"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"keep_in": "disk"}, ValueError, "keep_in='disk' is unknown"),
        ({"keep": "both"}, ValueError, "keep='both' is unknown; choose one of"),
        ({"max_length": 1}, ValueError, "max_length=1 must be an integer of at least"),
        ({"rollback_budget": 0}, ValueError, "rollback_budget=0"),
        ({"value": None}, TypeError, "value must be a Threshold, got None"),
        ({"max_consecutive": 0}, ValueError, "max_consecutive=0"),
        ({"budget": 0}, ValueError, "budget=0"),
    ],
)
def test_a_wrong_argument_is_named(options, error, says):
    with pytest.raises(error, match=says):
        ost.branch_on_spike(optax.sgd(0.1), **options)


def test_what_is_missing_at_an_update_is_named():
    tx = branching()
    with pytest.raises(ValueError, match=r"params=None.*copies the parameters; call"):
        tx.update(START, tx.init(START), value=1.0)
    with pytest.raises(ValueError, match="the loss is watched"):
        tx.update(START, tx.init(START), START)

"""Fault injection: what thousands of bad gradients and losses do to whole optimizers.

Faults are data. A case is a stream of gradients and losses with one fault (the grid) or
several (drawn by hypothesis); one compiled program per stack runs hundreds at once. All
see the same clean stream, so that case 0, the *twin*, shows what was lost.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import survival
from tiers import full, quick_only, together

import optax_stability as ost
from optax_stability import thresholds

STEPS, LANES = 170, 384
WARMUP, WINDOW, RELEARN, B2 = 20, 32, 25, 0.95
MAX_CONSECUTIVE, BUDGET = 5, 16  # the defaults of skip_spikes
# Norms are lognormal: three deviations above the median.
SPREAD = math.exp(3 * 0.2)
# The first moment has forgotten, and a window is long enough to compare: 1/(1 − b1).
SETTLE = 10
# Steps by which every threshold here is armed: the slowest is detrended_mad.
ARMED = 24

LEAVES = {
    "bias": ((4,), jnp.bfloat16),
    "kernel": ((2, 3), jnp.float32),
    "nothing": ((0, 2), jnp.float32),
    "scale": ((), jnp.float32),
}
MOVING = ["bias", "kernel", "scale"]
NUM_ENTRIES = 11

# Where a value is written: the leaf, and the entry or all of them.
PLACES = {
    "nowhere": {},
    "bias": {"bias": ()},
    "bias[1]": {"bias": (1,)},
    "kernel": {"kernel": ()},
    "kernel[1, 2]": {"kernel": (1, 2)},
    "scale": {"scale": ()},
    "tree": dict.fromkeys(LEAVES, ()),
}
STARTS = (0, 1, 5, 12, 24, 60)
LENGTHS = (1, 3, MAX_CONSECUTIVE, MAX_CONSECUTIVE + 1, 30)
VALUES = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf, "1e30": 1e30, "zero": 0.0}
LOSSES = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf, "20": 20.0, "1e30": 1e30}


# --- the stacks ------------------------------------------------------------------


def adamw():
    """Without weight decay, which would move what Adam does not."""
    return ost.safe_adamw(0.01, b2=B2, weight_decay=0.0)


def restarting(threshold):
    return optax.chain(
        ost.restart_moments(ost.scale_by_safe_adam(b2=B2), on_spike=threshold),
        optax.scale_by_learning_rate(0.01),
    )


def clipped(threshold):
    relearned = thresholds.relearn(threshold, after=RELEARN)
    return optax.chain(ost.clip_by_threshold(relearned), adamw())


FAR_ABOVE = thresholds.detrended_mad(5.0, floor=5.0)
THRESHOLDS = {
    "constant": thresholds.constant(3.0),
    "zscore": thresholds.zscore(6.0, warmup=WARMUP),
    "window_zscore": thresholds.window_zscore(window=WINDOW),
    "window_quantile": thresholds.window_quantile(0.9, window=WINDOW),
    "window_median": thresholds.window_median(3.0, window=WINDOW),
    "ema_ratio": thresholds.ema_ratio(3.0, warmup=WARMUP),
    "detrended_mad": FAR_ABOVE,
}
ZSCORE = ost.clip_by_zscore(warmup=WARMUP)
BY_LEAF = ost.clip_by_leaf_history(warmup=WARMUP)
STACKS = {
    "guard": ost.spike_guard(optax.chain(ZSCORE, adamw())),
    "skip": ost.skip_spikes(optax.chain(BY_LEAF, adamw())),
    "quantile": optax.chain(ost.clip_by_quantile(0.9, window=WINDOW), adamw()),
    "zscore": optax.chain(ZSCORE, adamw()),
    "restart": ost.skip_spikes(restarting(FAR_ABOVE)),
    **{f"clip at {name}": clipped(each) for name, each in THRESHOLDS.items()},
    **{
        f"skip at {name}": ost.skip_spikes(adamw(), grad_norm=each)
        for name, each in THRESHOLDS.items()
    },
}
SKIPPING = [name for name in STACKS if name.split()[0] in ("guard", "skip", "restart")]
every_stack = pytest.mark.parametrize(
    "stack", together("stack", {name: name for name in STACKS})
)
# A tenth of a clean stream is above its own quantile: that is nothing to skip by.
SELECTIVE = [name for name in STACKS if name != "skip at window_quantile"]
every_selective_stack = pytest.mark.parametrize(
    "stack", together("stack", {name: name for name in SELECTIVE})
)


# --- the faults ------------------------------------------------------------------


class Program(NamedTuple):
    """A stream, as arrays over the steps."""

    source: Any  # the step of the clean stream that the gradient is taken from
    factor: Any  # what it is multiplied by
    place: Any  # the number of the place where …
    value: Any  # … this is written instead
    loss: Any


class Case(NamedTuple):
    kind: str
    place: str
    start: int
    length: int
    program: Program

    @property
    def end(self):
        """The first step after the fault, or the first of a fault that never ends."""
        return self.start + self.length if self.length else self.start


def clean_stream():
    """Gradients that keep their signs three times in four, and a falling loss."""
    rng = np.random.default_rng(0)
    level = 0.5 * np.exp(0.2 * rng.standard_normal(STEPS))
    grads = {}
    for name, (shape, _) in LEAVES.items():
        flips = np.where(rng.random((STEPS, *shape)) < 0.25, -1.0, 1.0)
        signs = np.cumprod(flips, axis=0)
        grads[name] = np.float32(signs * level.reshape(-1, *[1] * len(shape)))
    loss = 2 + 2 * np.exp(-np.arange(STEPS) / 40) + 0.05 * rng.standard_normal(STEPS)
    return grads, loss.astype(np.float32)


GRADS, LOSS = clean_stream()


def clean():
    return Program(
        source=np.arange(STEPS, dtype=np.int32),
        factor=np.ones(STEPS, np.float32),
        place=np.zeros(STEPS, np.int32),
        value=np.zeros(STEPS, np.float32),
        loss=LOSS.copy(),
    )


def write(program, kind, place, hit):
    """Writes a fault into the steps ``hit`` of a program."""
    if kind in VALUES or kind == "1e30 and loss":
        program.place[hit] = place
        program.value[hit] = VALUES[kind.split()[0]]
        program.loss[hit] += 10.0 * kind.endswith("loss")
    elif kind.startswith("loss "):
        program.loss[hit] = LOSSES[kind.removeprefix("loss ")]
    elif kind == "higher loss":
        program.loss[hit] += 3.0
    elif kind.startswith("×"):
        program.factor[hit] *= float(kind[1:])
    elif kind.startswith("mixture"):
        every_second = slice(hit.start, hit.stop, 2)
        program.factor[every_second] *= 50.0
        program.loss[every_second] += 3.0 * kind.endswith("loss")
    elif kind in ("constant", "jitter"):
        program.source[hit] = hit.start
        size = len(program.source[hit])
        noise = np.random.default_rng(1).standard_normal(size)
        program.factor[hit] *= 1 + 1e-5 * noise * (kind == "jitter")


def case(kind, place, start, length):
    program, number = clean(), list(PLACES).index(place)
    write(program, kind, number, slice(start, start + length if length else STEPS))
    return Case(kind, place, start, length, program)


ENDING = ["1e30 and loss", *(f"loss {name}" for name in LOSSES)]
MIXTURES = ["mixture", "mixture by loss"]
SHIFTS = ["×10", "×50", "×0.02", "constant", "jitter", "higher loss", *MIXTURES]


@functools.cache
def grid():
    """Every kind × place × start × length; the twin first."""
    places = list(PLACES)[1:]
    product = itertools.product
    kinds = itertools.chain(
        product(VALUES, places, STARTS, LENGTHS),
        product(ENDING, ["tree"], STARTS, LENGTHS),
        product(SHIFTS, ["tree"], STARTS, [0]),
    )
    twin = Case("clean", "nowhere", 0, 0, clean())
    return [twin, *itertools.starmap(case, kinds)]


# --- one program per stack -------------------------------------------------------


class Seen(NamedTuple):
    """What each step left behind, bool[] unless it says otherwise."""

    rms: jax.Array  # float32[3], of the update of each leaf
    moved: jax.Array  # bool[3], whether any entry of it is not zero
    usable: jax.Array  # gradient and loss are finite, no leaf of the gradient is zero
    updates: jax.Array  # these are finite, and so on
    params: jax.Array
    statistics: jax.Array
    reports: jax.Array


# What shows the last step, and may be infinite or NaN with it.
REPORTS = {
    ost.SkipSpikesState: ("norm", "norm_limit", "value", "value_limit"),
    ost.ClipByThresholdState: ("norm", "limit", "leaf_norm", "leaf_limit"),
}


def split_state(state):
    """The state without what only reports, and the nodes that do report."""
    found = []

    def visit(node):
        fields = REPORTS.get(type(node))
        if fields is None:
            return node
        found.append(node)
        node = node._replace(**dict.fromkeys(fields))
        return type(node)(*(strip(child) for child in node))

    def strip(tree):
        return jax.tree.map(visit, tree, is_leaf=lambda node: type(node) in REPORTS)

    return strip(state), found


def reported(nodes, suffix):
    """What the nodes report of norms and losses, or of their limits."""
    values = [
        jnp.ravel(getattr(node, field))
        for node in nodes
        for field in REPORTS[type(node)]
        if field.endswith("limit") == (suffix == "limit")
        and getattr(node, field) is not None
    ]
    return jnp.concatenate(values)


def is_finite(tree):
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves)


def masks():
    """For each leaf and place, which entries are written."""
    found = {}
    for name, (shape, _) in LEAVES.items():
        found[name] = np.zeros((len(PLACES), *shape), bool)
        for number, place in enumerate(PLACES.values()):
            if name in place:
                found[name][number, *place[name]] = True
    return found


def gradient(now, clean_grads, written):
    """The gradient of one step of a program."""
    return {
        name: jnp.where(
            written[name][now.place],
            now.value,
            clean_grads[name][now.source] * now.factor,
        ).astype(dtype)
        for name, (_, dtype) in LEAVES.items()
    }


@functools.cache
def program_of(stack):
    """Runs ``LANES`` programs through a stack: what was seen, and the last limits."""
    tx = STACKS[stack]
    clean_grads, written = jax.tree.map(jnp.asarray, (GRADS, masks()))

    def step(carry, now):
        params, state = carry
        grads = gradient(now, clean_grads, written)
        updates, state = tx.update(grads, state, params, value=now.loss)
        params = optax.apply_updates(params, updates)
        statistics, nodes = split_state(state)
        wide = [updates[name].astype(jnp.float32) for name in MOVING]
        known = is_finite(grads) & jnp.isfinite(now.loss)
        nonzero = [jnp.any(grads[name] != 0) for name in MOVING]
        limits = reported(nodes, "limit")
        return (params, state), Seen(
            rms=jnp.stack([jnp.sqrt(jnp.mean(u * u)) for u in wide]),
            moved=jnp.stack([jnp.any(u != 0) for u in wide]),
            usable=known & jnp.all(jnp.stack(nonzero)),
            updates=is_finite(updates),
            params=is_finite(params),
            statistics=is_finite(statistics),
            reports=(is_finite(reported(nodes, "value")) | ~known)
            & ~jnp.any(jnp.isnan(limits)),
        )

    def run(program):
        params = {name: jnp.ones(*leaf) for name, leaf in LEAVES.items()}
        carry, seen = jax.lax.scan(step, (params, tx.init(params)), program)
        return seen, reported(split_state(carry[1])[1], "limit")

    # To compile takes longer than to run.
    options = {"xla_backend_optimization_level": 1}
    return jax.jit(jax.vmap(run), compiler_options=options)


def run_programs(stack, programs):
    """What was seen of any number of programs, and their last limits."""
    count = len(programs)
    filled = [*programs, *[clean()] * (-count % LANES)]
    parts = []
    for first in range(0, count, LANES):
        batch = filled[first : first + LANES]
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *batch)
        parts.append(jax.tree.map(np.asarray, program_of(stack)(stacked)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)


@functools.cache
def outcomes(stack):
    """The grid of a stack; all tests of a stack run in one worker."""
    return run_programs(stack, [each.program for each in grid()])


def names(cases, failed):
    """The cases that failed, for the message."""
    chosen = itertools.compress(cases, failed)
    return [" ".join(map(str, each[:4])) for each in chosen]


# --- nothing is poisoned ---------------------------------------------------------

FINITE = ["updates", "params", "statistics", "reports"]


@every_stack
@quick_only("zscore")
def test_everything_stays_finite_at_every_step(stack):
    seen, _ = outcomes(stack)
    for what in FINITE:
        failed = ~getattr(seen, what).all(axis=1)
        assert not failed.any(), (what, names(grid(), failed))
    survival.count(survival.SEQUENCES, len(grid()))


# What reports a limit that nobody has set: the loss without a threshold on it, and the
# leaf that never has a gradient, which makes the joint limit of all leaves infinite.
UNSET = {name: [1] for name in SKIPPING if name != "guard"} | {"skip": [1, 2, 5]}


@every_stack
@quick_only("zscore")
def test_in_the_end_every_limit_is_finite(stack):
    _, limits = outcomes(stack)
    unset = np.isin(np.arange(limits.shape[1]), UNSET.get(stack, []))
    failed = (np.isfinite(limits) == unset).any(axis=1)
    assert not failed.any(), names(grid(), failed)


# --- nothing freezes -------------------------------------------------------------


def stuck(seen):
    """Whether a leaf stood still in more usable steps in a row than may be skipped."""
    size = MAX_CONSECUTIVE + 1
    still = seen.usable[:, :, None] & ~seen.moved
    rows = np.lib.stride_tricks.sliding_window_view(still, size, axis=1)
    return rows.all(axis=-1).any(axis=(1, 2))


def lost(seen):
    """Usable steps at which nothing moved."""
    return (seen.usable & ~seen.moved.any(axis=2)).sum(axis=1)


@every_stack
@quick_only("zscore")
def test_every_leaf_moves_within_six_steps_whatever_came_before(stack):
    seen, _ = outcomes(stack)
    failed = stuck(seen)
    assert not failed.any(), names(grid(), failed)


@every_stack
@quick_only("zscore")
def test_the_bucket_bounds_the_steps_lost(stack):
    seen, _ = outcomes(stack)
    most = BUDGET + STEPS // (BUDGET + 1) if stack in SKIPPING else 0
    failed = lost(seen) > most
    assert not failed.any(), names(grid(), failed)


@every_selective_stack
@quick_only("zscore")
def test_no_step_of_the_clean_stream_is_lost(stack):
    seen, _ = outcomes(stack)
    assert seen.moved[0].all()


@every_selective_stack
@quick_only("zscore")
def test_a_nonfinite_gradient_or_a_loss_costs_no_step_after_it(stack):
    seen, _ = outcomes(stack)
    for i, each in enumerate(grid()):
        if each.kind in ("NaN", "Inf", "-Inf") or each.kind.startswith("loss"):
            assert seen.moved[i, each.end :].all(), each[:4]


# --- the update regains its size -------------------------------------------------


def forgotten(multiple, steps=1, entries=NUM_ENTRIES):
    """Steps until gradients ``multiple`` times the usual hold no update below 10 %.

    ``steps`` of them leave r = multiple·√(1 − β₂ⁿ), which falls by √β₂ a step; the
    update is a tenth once r is ten times the usual gradient. A norm may lie in one of
    ``entries`` alone.
    """
    root = multiple * math.sqrt(entries * (1 - B2**steps)) * SPREAD
    return math.ceil(2 * math.log(max(root / 10, 1.0)) / -math.log(B2))


# How long a burst of 1e30 each stack holds back, once it is armed: skip_spikes five
# and the sixth at the limit, relearn 25 and five more at ten times the limit, and
# what learns raw values as many as its docstring says. Beyond it, 1e30 is the new
# normal, and fills Adam's second moment for thousands of steps.
HOLDS = {
    "guard": 30,
    "skip": 30,
    "quantile": 3,  # (1 − q)·window
    "zscore": 30,
    "restart": 30,
    "clip at constant": 30,
    "clip at zscore": 30,
    "clip at window_zscore": 1,
    "clip at window_quantile": 3,
    "clip at window_median": 6,
    "clip at ema_ratio": 6,
    "clip at detrended_mad": 3,  # half of its centre
    "skip at constant": 30,
    **{f"skip at {name}": 6 for name in THRESHOLDS if name != "constant"},
}
# Before a detrended_mad is armed it holds what comes to 25 times the centre.
UNARMED = 25.0
ACCEPTED = 15.0  # ten times the limit, and that is 1.5 times the level


def recovery_from_1e30(stack, case):
    """Steps within which the update has a tenth of its size, or None: no promise."""
    start, length = case.start, case.length
    if "constant" in stack:
        return SETTLE + forgotten(ACCEPTED, min(length, 5))
    if start == 0:  # There is nothing to compare the first gradient with.
        return None
    if start >= ARMED:
        if length > HOLDS[stack]:
            return None
        return SETTLE + forgotten(ACCEPTED, min(length, 5))
    if stack == "restart":  # The moments are started afresh.
        return SETTLE + forgotten(UNARMED)
    if stack in ("guard", "clip at detrended_mad"):  # No loss confirms so early.
        # As many as leave the median of the centre (up to eight values) alone.
        most = {1: 1, 5: 3, 12: 3}[start]
        return SETTLE + forgotten(UNARMED, length) if length <= most else None
    if stack in ("skip", "skip at detrended_mad") and length <= MAX_CONSECUTIVE:
        return SETTLE
    return None


def recovery(stack, case):
    """Steps within which the update has a tenth of its size, or None: no promise."""
    if case.kind.startswith("1e30"):
        return recovery_from_1e30(stack, case)
    if case.kind == "×0.02":  # The usual gradient was 50 times what it is now.
        return SETTLE + forgotten(50.0, STEPS, entries=1)
    if case.kind in ("×10", "×50", *MIXTURES):
        # Two rows of relearn after the warm-up of a clip, or Adam's memory of a level
        # that was learned, and then held down.
        return SETTLE + max(WARMUP + 2 * RELEARN, forgotten(50.0, WARMUP, entries=1))
    return SETTLE


def share_of_the_twin(seen):
    """The least share of the twin's update in ten steps, by case and first step."""
    square = np.square(seen.rms.astype(np.float64))
    rows = np.lib.stride_tricks.sliding_window_view(square, 10, axis=1).sum(axis=-1)
    return np.sqrt(rows / rows[0]).min(axis=2)


@every_selective_stack
@quick_only("zscore")
def test_the_update_regains_a_tenth_of_its_size(stack):
    shares = share_of_the_twin(outcomes(stack)[0])
    slow, judged = [], 0
    for each, share in zip(grid(), shares, strict=True):
        within = recovery(stack, each)
        if within is None:
            continue
        after = share[each.end + within :]
        assert after.size, "the stream ends before the bound"
        judged += 1
        if after.min() < 0.1:
            slow.append((*each[:4], within, float(after.min())))
    assert not slow
    assert judged > 900


@every_selective_stack
@quick_only("zscore")
def test_where_nothing_is_promised_the_update_is_not_zero(stack):
    seen, _ = outcomes(stack)
    for i, each in enumerate(grid()):
        if recovery(stack, each) is None:
            assert seen.moved[i, each.end + MAX_CONSECUTIVE :].all(), each[:4]


@full
def test_one_tiny_gradient_in_the_warm_up_holds_a_leaf_down_for_a_few_rows_only():
    """From 1e-10 to 1 the rises are 10, 10², 10⁴ and 10⁸: four rows."""
    state = BY_LEAF.init({"w": jnp.ones(3)})
    update = jax.jit(BY_LEAF.update)
    for step in range(WARMUP + 4 * RELEARN + 1):
        size = 1e-10 if step == 5 else 1.0
        updates, state = update({"w": jnp.full(3, size)}, state)
    assert updates["w"][0] > 0.5


# --- several faults at once ------------------------------------------------------

segments = st.tuples(
    st.sampled_from([*VALUES, *ENDING, *SHIFTS]),
    st.integers(0, 30),  # clean steps before
    st.integers(1, 40),  # length
)


def written_out(drawn):
    """Each list of segments at every place and from four starts."""
    programs = []
    for faults, place, late in itertools.product(
        drawn, range(1, len(PLACES)), (0, 3, 20, 50)
    ):
        program, at = clean(), late
        for kind, gap, length in faults:
            at += gap
            write(program, kind, place, slice(min(at, STEPS), min(at + length, STEPS)))
            at += length
        programs.append(program)
    return programs


@every_stack
@hypothesis.settings(derandomize=True, max_examples=2, deadline=None, database=None)
@hypothesis.given(
    st.lists(st.lists(segments, min_size=1, max_size=5), min_size=16, max_size=16)
)
@quick_only("zscore")
def test_any_sequence_of_faults_is_survived(stack, drawn):
    programs = written_out(drawn)
    seen, _ = run_programs(stack, programs)
    for what in FINITE:
        failed = np.flatnonzero(~getattr(seen, what).all(axis=1))
        assert not failed.size, (what, failed)
    failed = np.flatnonzero(stuck(seen))
    assert not failed.size, failed
    most = BUDGET + STEPS // (BUDGET + 1) if stack in SKIPPING else 0
    failed = np.flatnonzero(lost(seen) > most)
    assert not failed.size, failed
    survival.count(survival.SEQUENCES, len(programs))

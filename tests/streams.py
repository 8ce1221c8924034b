"""Streams of numbers, and how the tests run a threshold over them."""

import functools

import jax
import numpy as np


def noisy(steps, *, seed=0, level=1.0, spikes=0.0):
    """Positive values around a level that drifts, some of them far above it."""
    rng = np.random.default_rng(seed)
    drift = level * (1 + 0.2 * np.sin(np.arange(steps) / 70))
    values = drift * np.exp(0.3 * rng.standard_normal(steps))
    high = rng.random(steps) < spikes
    return np.where(high, values * rng.uniform(5, 1000, steps), values).astype("f4")


@functools.cache
def compiled(function):
    return jax.jit(function)


def run(threshold, values, state=None):
    """The limit at each value, and the states after each value."""
    update = compiled(threshold.update)
    state = threshold.init() if state is None else state
    limits, states = [], []
    for x in np.asarray(values, np.float32):
        limit, state = update(x, state)
        limits.append(limit)
        states.append(state)
    return np.array(limits), jax.tree.map(lambda *xs: np.array(xs), *states)


def follow(threshold, values):
    """The same as one scan."""

    def step(state, x):
        limit, state = threshold.update(x, state)
        return state, (limit, state)

    return jax.lax.scan(step, threshold.init(), values)[1]


@functools.cache
def together(threshold):
    """Limits and states of many streams, (streams, values) each."""
    return jax.jit(jax.vmap(lambda values: follow(threshold, values)))


def last(states):
    return jax.tree.map(lambda x: x[-1], states)


def signature(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.weak_type), tree)

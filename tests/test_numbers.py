"""Complex, 64-bit and 16-bit parameters, for every public transformation.

What is not refused is right: compared with NumPy in float64 and complex128.
"""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from test_contract import (
    CASES,
    ONE_EACH,
    compiled,
    every_case,
    key_is_open,
    make_grads,
    make_params,
    signature,
)
from tiers import full, quick_only

import optax_stability as ost

# The dtype of each leaf: bias, kernel, scale.
KINDS = {
    "float32": ("float32",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "float16": ("float16",) * 3,
    "float64": ("float64",) * 3,
    "complex64": ("complex64",) * 3,
    "complex128": ("complex128",) * 3,
    "mixed": ("bfloat16", "float64", "complex64"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# A few float32 sums and products, and their roots.
ROUNDING = 1e-5


def params_of(kind):
    bias, kernel, scale = KINDS[kind]
    ones = make_params()
    return {
        "dense": {
            "bias": ones["dense"]["bias"].astype(bias),
            "kernel": ones["dense"]["kernel"].astype(kernel),
        },
        "scale": ones["scale"].astype(scale),
    }


# --- every transformation -----------------------------------------------------------


@every_case
@every_kind
@quick_only(*(f"mixed-{name}" for name in CASES))
def test_every_dtype_is_kept_with_64_bits_enabled(case, kind):
    """Of updates and of the state, with its metrics: so it can be scanned."""
    with jax.enable_x64(True):
        tx, params = case.make(), params_of(kind)
        fresh = jax.eval_shape(tx.init, params)
        updates, updated = jax.eval_shape(tx.update, params, fresh, params)
        assert signature(updated) == signature(fresh)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        metrics = [jax.eval_shape(ost.metrics, state) for state in (fresh, updated)]
        chex.assert_trees_all_equal_shapes_and_dtypes(*metrics)
        real = jax.tree.map(lambda x: not jnp.iscomplexobj(x), metrics[0])
        assert all(real.values()), real


@every_case
def test_float32_states_are_the_same_with_64_bits_enabled(case):
    params = make_params()
    with jax.enable_x64(True):
        wide = signature(jax.eval_shape(case.make().init, params))
    assert wide == signature(jax.eval_shape(case.make().init, params))


@every_case
@quick_only(*ONE_EACH)
def test_a_nan_in_an_imaginary_part_poisons_nothing(case):
    params = params_of("complex64")
    tx, step = compiled(case.make)
    state = tx.init(params)
    for seed in range(4):
        grads = make_grads(seed, params)
        if seed == 1:
            kernel = grads["dense"]["kernel"]
            grads["dense"]["kernel"] = kernel.at[3, 3].set(complex(0, np.nan))
        updates, state = step(grads, state, params)
        if not (case.passes_nonfinite and seed == 1):
            chex.assert_tree_all_finite(updates)
    reported = ost.metrics(state)
    closed = {k for k in reported if "limit" not in k and not key_is_open(k)}
    chex.assert_tree_all_finite({key: reported[key] for key in closed})


@every_case
@quick_only(*ONE_EACH)
def test_inactive_passes_complex_gradients_bit_for_bit(case):
    if not case.can_be_inactive:
        return
    params = params_of("complex64")
    tx, step = compiled(case.make)
    grads = make_grads(0, params)
    updates, _ = step(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates, grads)


def split(tree):
    """Each complex leaf as two real ones."""
    return jax.tree.map(lambda z: {"real": z.real, "imag": z.imag}, tree)


# They treat the whole tree alike, so that it does not matter how leaves are split.
SPLITTABLE = (
    "clip_by_threshold",
    "clip_by_zscore",
    "clip_by_quantile",
    "skip_spikes",
    "spike_guard",
    "branch_on_spike",
    "accumulate_moments",
    "scale_gradients",
    "when_noisy",
    "scale_by_noise_scale",
    "estimate_noise_scale",
    "estimate_noise_scale l1",
    "record",
    "record_history",
)


@pytest.mark.parametrize("name", SPLITTABLE)
@quick_only("clip_by_zscore", "skip_spikes", "accumulate_moments", "record")
def test_complex_leaves_are_as_good_as_their_real_and_imaginary_parts(name):
    make, params = CASES[name].make, params_of("complex64")
    tx, step = compiled(make)
    state, parts = tx.init(params), tx.init(split(params))
    for seed in range(6):
        # At first as usual, then a spike, then a lasting rise.
        grads = make_grads(seed, params)
        grads = jax.tree.map(
            lambda z, s=seed: z * (30.0 if s in (2, 4, 5) else 1), grads
        )
        updates, state = step(grads, state, params)
        expected, parts = step(split(grads), parts, split(params))
    chex.assert_trees_all_close(split(updates), expected, rtol=ROUNDING)
    found, wanted = ost.metrics(state), ost.metrics(parts)
    for key in found:
        # Counts of entries, of leaves and of their zeros do depend on the split, and so
        # does the noise: the moments of these tests have one deviation for each leaf.
        per_entry = "rms", "zero_fraction", "bimodality", "noise_scale/", "max_abs"
        if not (key.endswith("/per_leaf") or any(word in key for word in per_entry)):
            np.testing.assert_allclose(
                found[key], wanted[key], rtol=10 * ROUNDING, err_msg=key
            )


# --- against optax ------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_adam_trains_complex_parameters_as_optax_does(eps):
    tx, reference = ost.scale_by_safe_adam(eps=eps), optax.scale_by_adam(eps=eps)
    params = {"w": jnp.zeros((3, 4), jnp.complex64)}
    state, expected_state = tx.init(params), reference.init(params)
    for seed in range(5):
        grads = make_grads(seed, params)
        updates, state = tx.update(grads, state, params)
        expected, expected_state = reference.update(grads, expected_state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"eps_mode": "atan2"}, {"eps": 1e-3}])
def test_adam_does_not_see_the_phase_of_a_complex_gradient(options):
    """It is that of the update; with a real gradient, the update is the real one."""
    tx = ost.scale_by_safe_adam(spike_ratio=5.0, update_rms_max=1.0, **options)
    step = jax.jit(tx.update)
    phase = np.exp(0.7j).astype(np.complex64)
    params = {"w": jnp.zeros(16)}
    turned = {"w": jnp.zeros(16, jnp.complex64)}
    state, turned_state = tx.init(params), tx.init(turned)
    for seed in range(5):
        grads = make_grads(seed, params)
        updates, state = step(grads, state)
        found, turned_state = step({"w": grads["w"] * phase}, turned_state)
        np.testing.assert_allclose(found["w"], updates["w"] * phase, atol=1e-5)


def test_optax_states_of_complex_parameters_convert_there_and_back():
    tx = optax.scale_by_adam()
    params = {"w": jnp.ones(3, jnp.complex64)}
    _, state = tx.update({"w": jnp.array([3 + 4j, 0, 1j])}, tx.init(params))
    safe = ost.from_optax_adam_state(state)
    assert safe.rms["w"].dtype == jnp.float32
    chex.assert_trees_all_close(ost.to_optax_adam_state(safe), state, rtol=1e-6)


# --- microbatches and losses --------------------------------------------------------

X = np.array([[1 + 2j, 3j], [2 - 1j, 1], [0, 5 + 5j], [1 + 1j, -4j]], np.complex64)


def complex_loss(params, rows):
    return jnp.mean(jnp.abs(rows @ params["w"] - 1) ** 2)


@pytest.mark.parametrize("vmap_size", [None, 1])
@pytest.mark.parametrize("loss_scale", [None, 2.0**10])
def test_the_moments_of_complex_microbatches(vmap_size, loss_scale):
    params = {"w": jnp.array([1 + 1j, 2 - 1j], jnp.complex64)}
    fn = ost.microbatch_gradients(
        complex_loss, 4, vmap_size=vmap_size, mean_square=True
    )
    _, grads, moments = fn(params, X, loss_scale=loss_scale)
    each = [
        np.asarray(jax.grad(complex_loss)(params, X[i : i + 1])["w"]) for i in range(4)
    ]
    mean = np.mean(each, axis=0)
    np.testing.assert_allclose(grads["w"], mean, rtol=ROUNDING)
    deviation = sum(np.sum(np.abs(g - mean) ** 2) for g in each)
    np.testing.assert_allclose(moments.deviation, [deviation], rtol=ROUNDING)
    squares = np.mean(np.abs(each) ** 2, axis=0)
    np.testing.assert_allclose(moments.mean_square["w"], squares, rtol=ROUNDING)
    np.testing.assert_allclose(moments.norm, [np.linalg.norm(mean)], rtol=ROUNDING)
    # The same, one call after the other.
    tx = ost.accumulate_moments(ost.scale_by_safe_adam(second_moment="microbatch"), 4)
    state = tx.init(params)
    for g in each:
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
    np.testing.assert_allclose(state.moments.deviation, [deviation], rtol=ROUNDING)
    # m̂ = ḡ and r̂ is the root of the mean square.
    np.testing.assert_allclose(updates["w"], mean / np.sqrt(squares), rtol=ROUNDING)


def test_a_microbatch_with_a_nan_in_an_imaginary_part_is_rejected():
    rows = X.copy()
    rows[1] = complex(0, np.nan)
    params = {"w": jnp.array([1 + 1j, 2 - 1j], jnp.complex64)}
    for vmap_size in (None, 1):
        fn = ost.microbatch_gradients(complex_loss, 4, vmap_size=vmap_size)
        _, grads, moments = fn(params, rows)
        assert moments.num_microbatches == 3
        assert np.isfinite(grads["w"]).all()


def test_the_penalty_of_a_complex_gradient_is_its_norm():
    def loss_of(z):
        return jnp.sum(jnp.abs(z) ** 2 * jnp.arange(1.0, 3.0))

    def of_parts(x, y):
        return loss_of(x + 1j * y)

    z = jnp.array([3 + 4j, 1 - 2j], jnp.complex64)
    value, grads = jax.value_and_grad(ost.penalize_gradient_norm(loss_of, 0.1))(z)
    norm = jnp.linalg.norm(jax.grad(loss_of)(z))
    np.testing.assert_allclose(value, loss_of(z) + 0.1 * norm, rtol=ROUNDING)

    def penalized(x, y):
        gx, gy = jax.grad(of_parts, argnums=(0, 1))(x, y)
        return of_parts(x, y) + 0.1 * jnp.sqrt(jnp.sum(gx**2 + gy**2))

    expected = jax.grad(penalized, argnums=(0, 1))(z.real, z.imag)
    np.testing.assert_allclose(grads, expected[0] - 1j * expected[1], rtol=ROUNDING)


def test_a_complex_record():
    """Moduli, the singular values of a complex matrix, and the real part of ⟨·,·⟩."""
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(6, 4)) + 1j * rng.normal(size=(6, 4))).astype(np.complex64)
    tx = ost.record("g", correlation=True, spectral=True, histogram=True)
    state = tx.init({"w": jnp.zeros_like(a)})
    _, state = tx.update({"w": jnp.asarray(a)}, state)
    found, size = state.metrics, np.abs(a)
    np.testing.assert_allclose(found["g/max_abs"], size.max(), rtol=ROUNDING)
    values = np.linalg.svd(a, compute_uv=False)
    np.testing.assert_allclose(found["g/spectral_norm"], values[0], rtol=1e-3)
    bimodality = np.sum(size**2) ** 2 / (size.size * np.sum(size**4))
    np.testing.assert_allclose(found["g/bimodality"], bimodality, rtol=ROUNDING)
    counts, _ = np.histogram(size, ost.histogram_edges())
    np.testing.assert_array_equal(found["g/histogram"], counts)
    _, state = tx.update({"w": jnp.asarray(a * np.exp(0.5j))}, state)
    np.testing.assert_allclose(state.metrics["g/correlation"], np.cos(0.5), rtol=1e-5)


# --- 64 bits, and 16 ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-200, 1e-60, 1.0, 1e60, 1e200])
def test_float64_keeps_its_range_and_its_digits(size):
    """Clips, Adam and accumulation, to 12 digits."""
    g = np.array([3.0, -4.0, 12.0]) * size  # The norm is 13·size.
    with jax.enable_x64(True):
        params = {"w": jnp.zeros(3)}
        assert params["w"].dtype == np.float64

        def first(tx):
            return tx.update({"w": jnp.asarray(g)}, tx.init(params), params)

        limit = ost.thresholds.constant(0.5 * size)
        updates, state = first(ost.clip_by_threshold(limit))
        np.testing.assert_allclose(updates["w"], 0.5 * g / 13, rtol=1e-12)
        np.testing.assert_allclose(state.metrics["clip/norm"], 13 * size, rtol=1e-12)
        updates, _ = first(ost.scale_by_safe_adam())
        np.testing.assert_allclose(updates["w"], np.sign(g), rtol=1e-12)
        tx = ost.accumulate_moments(optax.identity(), 2)
        state = tx.init(params)
        for factor in (1.0, 2.0):
            updates, state = tx.update({"w": jnp.asarray(factor * g)}, state, params)
        np.testing.assert_allclose(updates["w"], 1.5 * g, rtol=1e-12)


THRESHOLDS = {
    "zscore": ost.thresholds.zscore(warmup=4),
    "window_zscore": ost.thresholds.window_zscore(window=8),
    "window_quantile": ost.thresholds.window_quantile(0.9, window=8),
    "window_median": ost.thresholds.window_median(2.0, window=8),
    "ema_ratio": ost.thresholds.ema_ratio(warmup=4),
    "detrended_mad": ost.thresholds.detrended_mad(5.0, floor=5.0, arm=4),
    "at_most_median": ost.thresholds.at_most_median(
        ost.thresholds.zscore(warmup=4), window=8
    ),
    "relearn": ost.thresholds.relearn(ost.thresholds.zscore(warmup=4), after=3),
}


@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_thresholds_have_the_range_of_float64_norms(threshold):
    """The limits of a stream of 2²⁰⁰ times the norms are 2²⁰⁰ times as high."""
    norms = 1 + 0.1 * np.random.default_rng(0).normal(size=12)
    norms[9:] *= 20.0
    with jax.enable_x64(True):
        tx = ost.clip_by_threshold(threshold)
        step = jax.jit(tx.update)
        limits = {}
        for size in (1.0, 2.0**200, 2.0**-200):
            state = tx.init(jnp.zeros(()))
            limits[size] = []
            for norm in norms:
                _, state = step(jnp.asarray(norm * size), state)
                limits[size].append(float(state.limit) / size)
        for size in (2.0**200, 2.0**-200):
            np.testing.assert_allclose(limits[size], limits[1.0], rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_first_moment_of_16_bit_parameters_does_not_underflow(dtype):
    """G = 1e-7 in float16: (1 − β₁)·g is below what float16 can hold."""
    params = {"w": jnp.zeros(4, dtype)}
    grads = {"w": jnp.full(4, 1e-7, dtype)}
    tx = ost.scale_by_safe_adam()
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(grads, state, params)
    assert state.mu["w"].dtype == jnp.float32
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), 1.0, rtol=1e-2)


def test_adopting_a_narrow_first_moment_names_the_remedy():
    """A checkpoint of bfloat16 parameters, with m in bfloat16."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    narrow = ost.safe_adamw(1e-2, mu_dtype=jnp.bfloat16)
    old = narrow.init(params)
    with pytest.raises(
        ValueError, match=r"mu: w: bfloat16\[3\] .* float32\[3\].*mu_dtype"
    ):
        ost.adopt_state(ost.safe_adamw(1e-2), params, old)
    chex.assert_trees_all_equal(ost.adopt_state(narrow, params, old), old)


def test_a_bfloat16_run_of_optax_continues_with_its_moments():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    old_tx, tx = optax.adamw(1e-2), ost.safe_adamw(1e-2)
    _, old = old_tx.update(params, old_tx.init(params), params)
    state = ost.adopt_state(tx, params, ost.from_optax_adam_state(old))
    assert state[0].mu["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state[0].mu["w"], old[0].mu["w"].astype(jnp.float32))


@pytest.mark.parametrize("vmap_size", [None, 1])
def test_microbatches_of_mixed_parameters_with_64_bits_enabled(vmap_size):
    def loss_fn(params, x):
        squares = jax.tree.map(lambda p: jnp.sum(jnp.abs(p) ** 2), params)
        return jnp.mean(x) * sum(s.astype(float) for s in jax.tree.leaves(squares))

    with jax.enable_x64(True):
        params = params_of("mixed")
        fn = ost.microbatch_gradients(loss_fn, 4, vmap_size=vmap_size, mean_square=True)
        value, grads, moments = fn(params, jnp.arange(1.0, 5.0))
        chex.assert_trees_all_equal_dtypes(grads, params)
        assert (
            value.dtype == moments.deviation.dtype == moments.norm.dtype == np.float64
        )
        np.testing.assert_allclose(value, 2.5 * 137, rtol=1e-12)
        # The gradients are 2x, for x of variance 5/4; four microbatches of weight 1.
        np.testing.assert_allclose(moments.deviation, np.array([8, 128, 1]) * 20)
        squares = jax.tree.map(lambda s: str(s.dtype), moments.mean_square)
        assert squares == {
            "dense": {"bias": "float32", "kernel": "float64"},
            "scale": "float32",
        }


@pytest.mark.parametrize("name", ["clip_by_zscore", "safe_adamw", "accumulate_moments"])
def test_numpy_gradients_are_read_as_jax_reads_them(name):
    """Those of float64 are float32 without 64 bits, and no warning says so."""
    grads = {"w": np.full((3, 2), 0.5), "b": np.ones(2)}
    as_jax = jax.tree.map(jnp.asarray, grads)
    tx = CASES[name].make()
    updates, _ = tx.update(grads, tx.init(grads), grads)
    expected, _ = tx.update(as_jax, tx.init(as_jax), as_jax)
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal_dtypes(updates, expected)


# --- a reference in NumPy, over dtypes, trees and transformations ---------------------

# For each dtype: the decades of the gradients that are drawn, and one rounding.
DTYPES = {
    "float16": ((-4, 3), 2.0**-11),
    "bfloat16": ((-30, 30), 2.0**-8),
    "float32": ((-30, 30), 2.0**-24),
    "complex64": ((-30, 30), 2.0**-24),
    "float64": ((-250, 250), 2.0**-53),
    "complex128": ((-250, 250), 2.0**-53),
}
# Roundings on the way to a result: chains of a dozen operations, sums of a dozen terms.
OPERATIONS = 64
SHAPES = ((), (3,), (2, 2), (0,))
STEPS = 3


def norm_of(grads):
    """In units of the largest entry, so that no square overflows."""
    largest = max((np.abs(g).max(initial=0.0) for g in grads), default=0.0)
    if largest == 0:
        return 0.0
    return largest * np.sqrt(sum(np.sum(np.abs(g / largest) ** 2) for g in grads))


# Each maps gradients and a state to updates, the sizes of the terms that were added to
# compute them, and the next state.


def passes(grads, state):
    return grads, [np.abs(g) for g in grads], state


def is_halved(grads, state):
    return passes([g / 2 for g in grads], state)


def is_clipped_to_one(grads, state):
    return passes([g * min(1.0, 1 / max(norm_of(grads), 1e-300)) for g in grads], state)


def is_averaged(grads, state):
    seen = [*(state or []), grads]
    if len(seen) < STEPS:
        return [0 * g for g in grads], [0.0 * np.abs(g) for g in grads], seen
    means = [sum(each) / STEPS for each in zip(*seen, strict=True)]
    sizes = [sum(map(np.abs, each)) / STEPS for each in zip(*seen, strict=True)]
    return means, sizes, seen


def is_divided_by_its_root_mean_square(grads, state):
    """Adam as published, with β = 0.9, 0.95 and ε = 0."""
    zeros = [0 * g for g in grads], [0.0 * np.abs(g) for g in grads]
    t, m, r = state or (0, *zeros)
    m = [0.9 * old + 0.1 * g for old, g in zip(m, grads, strict=True)]
    r = [
        np.hypot(0.95**0.5 * old, 0.05**0.5 * np.abs(g))
        for old, g in zip(r, grads, strict=True)
    ]
    t += 1
    units = (1 - 0.9**t) / np.sqrt(1 - 0.95**t)
    updates = [a / b / units for a, b in zip(m, r, strict=True)]
    return updates, [np.ones(np.shape(u)) for u in updates], (t, m, r)


def told_its_loss(tx):
    def update(updates, state, params=None):
        return tx.update(updates, state, params, value=1.0)

    return optax.GradientTransformationExtraArgs(tx.init, update)


REFERENCES = {
    "clip": (ost.clip_by_threshold(ost.thresholds.constant(1.0)), is_clipped_to_one),
    "adam": (ost.scale_by_safe_adam(0.9, 0.95), is_divided_by_its_root_mean_square),
    "accumulation": (ost.accumulate_moments(optax.identity(), STEPS), is_averaged),
    "guard": (
        told_its_loss(ost.spike_guard(optax.scale(0.5), grad_norm=None)),
        is_halved,
    ),
    "branch": (
        told_its_loss(ost.branch_on_spike(optax.scale(0.5), grad_norm=None)),
        is_halved,
    ),
    "record": (ost.record_history(ost.record("g"), length=2), passes),
}


def random_leaf(rng, dtype, shape, scale):
    """Entries of any sign or phase; those of one leaf differ by up to a hundred."""
    x = rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(-2, 0, shape) * scale
    if "complex" in dtype:
        x = x * np.exp(2j * np.pi * rng.uniform(size=shape))
    return np.asarray(jnp.asarray(x, dtype))


@st.composite
def random_streams(draw, most_leaves, shapes):
    """A few gradients of one tree: leaves of different dtypes, shapes and scales."""
    dtypes = draw(
        st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=most_leaves)
    )
    drawn = [
        (
            dtype,
            draw(st.sampled_from(shapes)),
            10.0 ** draw(st.integers(*DTYPES[dtype][0])),
        )
        for dtype in dtypes
    ]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    with jax.enable_x64(True):
        return [[random_leaf(rng, *leaf) for leaf in drawn] for _ in range(STEPS)]


@functools.cache
def program_of(name):
    return jax.jit(REFERENCES[name][0].update)


def exactly(leaf):
    """In complex128 or float64."""
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def check_stream(name, stream):
    """Every step is that of the reference, to the digits of each leaf.

    What belongs to the whole tree has the digits of float32, or of float64 if a leaf
    has; numbers below the smallest normal one may be lost.
    """
    tx, reference = REFERENCES[name]
    dtypes = [str(leaf.dtype) for leaf in stream[0]]
    double = any(DTYPES[dtype][1] == 2.0**-53 for dtype in dtypes)
    of_tree = 2.0**-53 if double else 2.0**-24
    with jax.enable_x64(True):
        params = [jnp.zeros_like(leaf) for leaf in stream[0]]
        state, expected_state = tx.init(params), None
        for grads in stream:
            updates, state = program_of(name)(grads, state, params)
            exact = [exactly(g) for g in grads]
            expected, sizes, expected_state = reference(exact, expected_state)
            for found, wanted, size, dtype in zip(
                updates, expected, sizes, dtypes, strict=True
            ):
                assert found.dtype == dtype
                rounding = DTYPES[dtype][1]
                on_the_way = OPERATIONS * max(min(rounding, 2.0**-24), of_tree)
                info = jnp.finfo(dtype)
                lost = float(
                    info.smallest_subnormal if dtype == "float16" else info.tiny
                )
                bound = (rounding + on_the_way) * size + lost
                error = np.abs(exactly(np.asarray(found)) - wanted)
                assert (error <= bound).all(), (name, dtype, found, wanted)
            if name == "record":
                norm = float(ost.metrics(state)["g/norm"])
                np.testing.assert_allclose(norm, norm_of(exact), OPERATIONS * of_tree)


# Few trees in the quick tier: each is a program.
@pytest.mark.parametrize("dtypes", [("float16", "complex64"), ("float64", "bfloat16")])
@pytest.mark.parametrize("name", REFERENCES)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), decades=st.tuples(*[st.floats(0, 1)] * 2)
)
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_every_size_of_gradient_gives_what_numpy_gives(name, dtypes, seed, decades):
    rng = np.random.default_rng(seed)
    scales = []
    for dtype, share in zip(dtypes, decades, strict=True):
        low, high = DTYPES[dtype][0]
        scales.append(10.0 ** (low + share * (high - low)))
    with jax.enable_x64(True):
        stream = [
            [
                random_leaf(rng, dtype, shape, scale)
                for dtype, shape, scale in zip(dtypes, [(3,), ()], scales, strict=True)
            ]
            for _ in range(STEPS)
        ]
    check_stream(name, stream)


@full
@pytest.mark.parametrize("name", REFERENCES)
@hypothesis.given(stream=random_streams(3, SHAPES))
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_trees_of_any_dtypes_and_shapes_give_what_numpy_gives(name, stream):
    check_stream(name, stream)

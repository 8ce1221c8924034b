"""The baselines are as published, and the fault table counts what it says."""

import subprocess
import sys
from pathlib import Path

import chex
import fault_table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import reporting
from early_warning.learning_rate.statistics import RHO, RHO_LATER
from tiers import full

DIAGNOSIS_PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "diagnosis.md"

# Statistics of some hundred float32 values against float64.
STATISTICS = 1e-4


def norms_of(steps, seed=0, level=0.5):
    rng = np.random.default_rng(seed)
    return level * np.exp(0.2 * rng.standard_normal(steps))


def losses_of(steps, seed=1):
    return 2 + 0.05 * np.random.default_rng(seed).standard_normal(steps)


def run(tx, norms, losses=None):
    """What the rule makes of gradients with these norms, ``[steps, …]``."""
    norms = np.asarray(norms, np.float32)
    losses = np.zeros(len(norms)) if losses is None else losses
    params = jnp.zeros(norms.shape[1:])

    def tree(x):
        return dict(enumerate(jnp.atleast_1d(x)))

    def step(state, data):
        grads, loss = data
        updates, state = tx.update(tree(grads), state, tree(params), value=loss)
        return state, jnp.stack(jax.tree.leaves(updates))

    data = jnp.asarray(norms), jnp.asarray(losses, jnp.float32)
    scan = jax.jit(lambda state: jax.lax.scan(step, state, data))
    state, updates = scan(tx.init(tree(params)))
    return np.asarray(updates).reshape(norms.shape), state


def applied(wrapper, norms, losses=None):
    """The steps at which a skip rule applied the gradient, by an inner SGD."""
    updates, _ = run(wrapper(optax.sgd(1.0)), norms, losses)
    return updates != 0


# --- references in float64, from the papers' equations ------------------------------


def zclip_reference(norms, max_norm):
    mean = var = 0.0
    for step, g in enumerate(norms):
        if step < 25:
            first = norms[: step + 1]
            mean, var = np.mean(first), np.var(first)
            yield g if max_norm is None else min(g, max_norm)
            continue
        z = (g - mean) / (np.sqrt(var) + 1e-6)
        x = mean + 2.5 * np.sqrt(var) / (z / 2.5) if z > 2.5 else g
        yield x if max_norm is None else min(x, max_norm)
        mean = 0.97 * mean + 0.03 * x
        var = 0.97 * var + 0.03 * (x - mean) ** 2


def adagc_reference(norms, warmup):
    usual = np.full(norms.shape[1], np.inf)
    for step, g in enumerate(norms, start=1):
        if step < warmup:
            clipped = g * min(1 / np.linalg.norm(g), 1)
            usual = np.minimum(usual, clipped)
        else:
            clipped = np.minimum(g, 1.05 * usual)
            usual = 0.98 * usual + 0.02 * clipped
        yield clipped


def autoclip_reference(norms, percentile):
    for step, g in enumerate(norms):
        yield min(g, np.percentile(norms[: step + 1], percentile))


def within_six_sigma(history, x, ddof):
    return x <= np.mean(history) + 6 * np.std(history, ddof=ddof)


def window_reference(norms, losses, ddof, first):
    """The decisions of MaxText and OLMo-core (ddof 1) or Levanter (ddof 0)."""
    for step in range(len(norms)):
        past = slice(max(0, step - 128), step)
        yield step < first or (
            within_six_sigma(norms[past], norms[step], ddof)
            and within_six_sigma(losses[past], losses[step], ddof)
        )


def axlearn_reference(norms):
    mean, learned = 1.0, 0
    for g in norms:
        usual = g < 20 * mean
        if usual:
            decay = 0.99 * (1 - 0.99**learned) / (1 - 0.99 ** (learned + 1))
            mean, learned = decay * mean + (1 - decay) * g, learned + 1
        yield usual


def lollcat_reference(norms):
    window = [1e30] * 66 + [np.nan] * 34
    for g in norms:
        median = np.nanmedian(window)
        yield 0.0 if g > 20 * median else min(g, 5 * median)
        window = [*window[1:], g]


# --- on finite data the rules equal their equations ----------------------------------


def eventful(steps=300):
    """Norms with a spike, a dip and a lasting rise."""
    norms = norms_of(steps)
    norms[[90, 150]] *= [40.0, 0.01]
    norms[200:] *= 3
    return norms


@pytest.mark.parametrize("max_norm", [None, 0.4])
def test_zclip_is_its_equations(max_norm):
    norms = eventful()
    clipped, _ = run(peers.zclip(max_norm), norms)
    expected = list(zclip_reference(norms, max_norm))
    np.testing.assert_allclose(clipped, expected, rtol=STATISTICS)
    assert (clipped < 0.99 * norms).sum() > 5


def test_adagc_is_its_equations():
    norms = np.stack([eventful(), 4 * norms_of(300, seed=2), norms_of(300, seed=3)], 1)
    clipped, _ = run(peers.adagc(warmup=50), norms)
    expected = list(adagc_reference(norms, warmup=50))
    np.testing.assert_allclose(clipped, expected, rtol=STATISTICS)


@pytest.mark.parametrize("percentile", [10.0, 90.0])
def test_autoclip_is_its_equations(percentile):
    norms = eventful()
    clipped, _ = run(peers.autoclip(percentile, capacity=300), norms)
    expected = list(autoclip_reference(norms, percentile))
    np.testing.assert_allclose(clipped, expected, rtol=STATISTICS)


@pytest.mark.parametrize(
    ("rule", "ddof", "first"),
    [(peers.maxtext_skip, 1, 63), (peers.levanter_skip, 0, 64)],
)
def test_window_rules_are_their_equations(rule, ddof, first):
    norms, losses = eventful(), losses_of(300)
    losses[[120, 260]] += [1.0, -1.0]
    norms[first] *= 100
    # Between the limits of the two rules, whose stds differ by 0.4 %.
    norms[210] = norms[82:210].mean() + 6 * 1.002 * norms[82:210].std()
    expected = list(window_reference(norms, losses, ddof, first))
    decisions = applied(rule, norms, losses)
    np.testing.assert_array_equal(decisions, expected)
    assert not decisions[[first, 120]].any()
    assert decisions[[first - 1, 260]].all()
    assert decisions[210] == bool(ddof)


def test_olmo_is_adamw_until_it_skips():
    norms, losses = norms_of(200, level=1.0), losses_of(200)
    norms[150] *= 100
    tx = peers.olmo_skip(1e-3, max_norm=1.0, weight_decay=1e-4)
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=1e-4)
    )
    updates, _ = run(tx, norms, losses)
    expected, _ = run(peers.maxtext_skip(inner), norms, losses)
    np.testing.assert_allclose(updates, expected, rtol=STATISTICS)
    assert updates[150] == 0


def test_axlearn_is_its_equations():
    norms = eventful()
    decisions = applied(peers.axlearn_skip, norms)
    np.testing.assert_array_equal(decisions, list(axlearn_reference(norms)))
    assert not decisions[90]


def test_lollcat_is_its_equations():
    norms = eventful()
    updates, _ = run(peers.lollcat_clip(optax.sgd(1.0)), norms)
    expected = np.array(list(lollcat_reference(norms)))
    np.testing.assert_allclose(-updates, expected, rtol=STATISTICS)
    assert updates[90] == 0


# --- the defects that were measured on the official code -----------------------------


def test_one_nan_costs_maxtext_129_steps():
    norms = norms_of(400)
    norms[200] = np.nan
    decisions = applied(peers.maxtext_skip, norms, losses_of(400))
    assert (~decisions).sum() == 129
    assert not decisions[200:329].any()


def test_maxtext_applies_a_nan_in_the_warmup():
    norms = norms_of(20)
    norms[12] = np.nan
    updates, _ = run(peers.maxtext_skip(optax.sgd(1.0)), norms, losses_of(20))
    assert np.isnan(updates[12])


def test_one_nan_makes_levanter_emit_nan_and_128_zeros():
    norms = norms_of(400)
    norms[200] = np.nan
    updates, _ = run(peers.levanter_skip(optax.sgd(1.0)), norms, losses_of(400))
    assert np.flatnonzero(np.isnan(updates)).tolist() == [200]
    assert np.flatnonzero(updates == 0).tolist() == list(range(201, 329))


def test_one_nan_poisons_the_moments_of_olmo():
    norms = norms_of(201)
    norms[200] = np.nan
    tx = peers.olmo_skip(1e-3, max_norm=1.0, weight_decay=0.0)
    _, state = run(tx, norms, losses_of(201))
    assert float(state.inner.taken) == 200
    assert np.isnan(state.inner.mu[0])
    assert np.isnan(state.inner.nu[0])


def test_axlearn_never_accepts_a_rise_of_50():
    norms = norms_of(800)
    norms[200:] *= 50
    decisions = applied(peers.axlearn_skip, norms)
    assert decisions.sum() == 200
    assert not applied(peers.axlearn_skip, norms_of(200, level=50.0)).any()


def test_axlearn_drops_a_constant_norm_once_its_std_counts():
    decisions = applied(lambda tx: peers.axlearn_skip(tx, "std"), np.ones(1500))
    assert decisions[:500].all()
    assert not decisions[500:].any()


def test_zclip_without_a_maximum_never_accepts_a_rise_of_10():
    norms = norms_of(400)
    norms[200:] *= 10
    clipped, _ = run(peers.zclip(None), norms)
    assert clipped[-1] < 1.1 * clipped[:200].mean()


def test_zclip_says_nothing_after_a_nan():
    norms = norms_of(200)
    norms[[100, 150]] = [np.nan, 500.0]
    clipped, _ = run(peers.zclip(None), norms)
    np.testing.assert_array_equal(clipped[150], np.float32(500.0))


def test_a_leaf_asleep_in_the_warmup_of_adagc_is_nan_after_it():
    norms = np.stack([norms_of(60), norms_of(60, seed=1) * (np.arange(60) > 55)], 1)
    clipped, _ = run(peers.adagc(warmup=50), norms)
    assert np.isnan(clipped[49:, 1]).all()
    assert np.isfinite(clipped[:, 0]).all()


# --- the measures --------------------------------------------------------------------


@pytest.fixture
def stream():
    return fault_table.make_stream("NaN", seed=0)


@pytest.fixture
def twin():
    shape = fault_table.STEPS, fault_table.ENTRIES
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_run_like_its_twin_loses_nothing(stream, twin):
    nothing = dict.fromkeys(["lost", "slow", "frozen_entries", "no_update"], 0)
    expected = nothing | {"nan": False, "passed": False}
    assert fault_table.judge(twin, twin, stream) == expected


def test_only_steps_with_a_good_gradient_are_lost(stream, twin):
    updates = twin.copy()
    updates[fault_table.FAULT - 1 : fault_table.FAULT + 2] = 0
    measured = fault_table.judge(updates, twin, stream)
    assert (measured["lost"], measured["no_update"]) == (2, 3)


def test_one_leaf_at_rest_is_a_lost_step(stream, twin):
    updates = twin.copy()
    updates[100:110, :5] *= 0.9 * fault_table.LOST
    measured = fault_table.judge(updates, twin, stream)
    assert (measured["lost"], measured["slow"]) == (10, 0)


def test_a_small_update_is_slow(stream, twin):
    updates = twin.copy()
    updates[100:110] *= 0.9 * fault_table.SLOW
    measured = fault_table.judge(updates, twin, stream)
    assert (measured["lost"], measured["slow"]) == (0, 10)


def test_entries_at_rest_are_frozen_and_nan_is_seen(stream, twin):
    updates = twin.copy()
    updates[700:, [3, 40]] = 0
    measured = fault_table.judge(updates, twin, stream)
    assert (measured["frozen_entries"], measured["nan"]) == (2, False)
    updates[0, 0] = np.nan
    assert fault_table.judge(updates, twin, stream)["nan"]


def test_a_large_update_on_a_spike_has_passed(twin):
    stream, updates = fault_table.make_stream("×1e3", seed=0), twin.copy()
    updates[fault_table.FAULT] *= 1.1 * fault_table.PASSED
    assert fault_table.judge(updates, twin, stream)["passed"]
    assert not fault_table.judge(updates, twin, fault_table.clean_stream(0))["passed"]


def test_equal_norms_are_equal_to_the_last_bit():
    grads = fault_table.make_stream("norms equal", seed=0).grads
    trees = [{name: g[step] for name, g in grads.items()} for step in (0, 1, 999)]
    chex.assert_trees_all_equal(*[jax.tree.map(np.abs, tree) for tree in trees])


def test_faults_are_where_they_should_be():
    for name in fault_table.ALL:
        stream = fault_table.make_stream(name, seed=0)
        expected = name in fault_table.FAULTS and name != "clean"
        assert stream.faulty.any() == expected, name


@full
def test_the_page_quotes_the_early_warning_benchmark():
    report = reporting.read("early_warning")
    rates, words = report["rates"], " ".join(DIAGNOSIS_PAGE.read_text().split())
    shipped = rates["limits"][RHO_LATER]["-0.2"]
    (bad, all_bad), (good, all_good) = (shipped[x] for x in ("bad", "good"))
    assert f"{bad} of {all_bad} runs that end more than 0.1 nat worse" in words
    assert f"and in {good} of {all_good} good ones" in words
    found = rates["limits"][RHO]["0"]
    bad, good = (found[x][0] for x in ("bad", "good"))
    assert f"below 0: {bad} and {good}." in words
    (early, caught), lead = rates["others"]["in_time"], rates["others"]["lead"][1]
    assert f"Of these {caught}, {early} come before the loss" in words
    assert f"by {lead:.0f} steps in the median" in words
    usual, slow = (
        report["spikes"][b2]["precursors"]["update rms"] for b2 in ("0.95", "0.999")
    )
    auc = (x["before_onset"]["auc"] for x in (usual, slow))
    text = "(AUC {:.2f} at β₂ = 0.95, {:.2f} at 0.999; 0.5 is chance)"
    assert text.format(*auc) in words
    more = slow["minus_loss"]
    text = "{auc:.2f} more, 95 % {low:.2f}–{high:.2f}"
    assert text.format(**more) in words
    caught, spikes = usual["alarm"]["recall"]
    text = f"before {caught} of {spikes} spikes and {usual['alarm']['controls']:.0%}"
    assert text.replace("%", " %") in words


def test_they_need_nothing_that_the_examples_alone_need():
    """A machine with an accelerator may lack what reads data, flags and checkpoints."""
    missing = ("grain", "tyro", "filelock", "orbax", "tensorboardX")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); "
    code += "import trainer_step, accelerator_programs, stability"
    folder = Path(reporting.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)

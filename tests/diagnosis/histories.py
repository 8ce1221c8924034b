"""Histories as the flight recorder keeps them: a healthy run, and one of each fault.

Each fault is a function that returns (kind, first step, layer, history).
"""

import numpy as np

LAYERS = ("tokens/embedding", "blocks/0/qkv/kernel", "blocks/1/mlp/kernel", "head/bias")
QKV, MLP = LAYERS[1:3]
HEADS = ("blocks/0/0", "blocks/0/1", "blocks/1/0", "blocks/1/1")
ROWS, EVERY, FAULT = 400, 4, 200


def held(values, every=EVERY):
    """As ``record`` has it: measured now and then, repeated in between."""
    return values[np.arange(len(values)) // every * every]


def healthy(seed=0, rows=ROWS, first=0, noise=0.1, decays=True, **levels):
    """A run as those of benchmarks/diagnosis.py look: descent, warm-up, decay."""
    rng = np.random.default_rng(seed)
    t = first + np.arange(rows)

    def around(level, spread):
        return level * np.exp(spread * rng.standard_normal(rows))

    end = first + rows if decays else np.inf
    rate = 3e-3 * np.minimum(1, (t + 1) / 30) * (0.55 + 0.45 * np.cos(np.pi * t / end))
    descent = np.exp(-t / 30)
    history = {
        "step": t,
        "loss": 2.2 + 3.3 * descent + noise * rng.standard_normal(rows),
        "learning_rate": rate,
        "grad/norm": around(0.5 + 3 * descent, 0.25),
        "update/param_ratio": held(around(rate, 0.1)),
        "update/bimodality": held(around(0.37 + 0.6 * descent, 0.05)),
        "update/correlation": held(around(0.8, 0.05)),
        "grad/zero_fraction": held(np.abs(rng.normal(0, 1e-4, rows))),
        "grad/nonfinite": np.zeros(rows),
        "adam/correlation": held(around(0.3 + 0.69 * descent, 0.1)),
        "adam/eps_share": held(around(1e-3, 0.1)),
        "adam/zero_fraction": held(around(1e-3, 0.1)),
        "clip/norm": np.zeros(rows),
        "clip/limit": np.full(rows, 5.0),
        "skip/skipped": np.zeros(rows),
        "skip/nonfinite_total": np.zeros(rows),
        "noise_scale/low": around(10.0, 0.3),
        "noise_scale/batch_size": np.full(rows, 8.0),
    }
    history["clip/norm"] = history["grad/norm"]
    growth = 1 - np.exp(-t / 100)
    for i, layer in enumerate(LAYERS):
        history |= {
            f"grad/norm/{layer}": around(0.2 + descent, 0.3),
            f"grad/nonfinite/{layer}": np.zeros(rows),
            f"grad/zero_fraction/{layer}": held(np.full(rows, 0.8 * (i == 0))),
            f"update/param_ratio/{layer}": held(around(3 * rate, 0.2)),
            f"update/bimodality/{layer}": held(around(0.37 + 0.6 * descent, 0.1)),
            f"adam/correlation/{layer}": held(rng.normal(0.0, 0.3, rows)),
            f"adam/eps_share/{layer}": held(around(1e-3, 0.1)),
            f"params/spectral_norm/{layer}": held(around(1 + 3 * growth, 0.01), 8),
        }
    # Of their own stream, so that the columns above stay what they are.
    rng = np.random.default_rng([seed, 1])
    for head in HEADS:
        history[f"attention/logit_bound/{head}"] = held(around(20 + 60 * growth, 0.1))
    return history | levels


def scaled(history, key, factor, start=FAULT, stop=None):
    history[key] = history[key].copy()
    history[key][start:stop] *= factor


def put(history, key, value, start=FAULT, stop=None):
    history[key] = history[key].copy()
    history[key][start:stop] = value


def wobbling(level, rows=ROWS, seed=5):
    """Measured every few steps, and never twice the same."""
    return held(level * (1 + 1e-3 * np.random.default_rng(seed).standard_normal(rows)))


# --- One fault each: (kind, first step, layer, history). ------------------------------


def loss_spike():
    history = healthy()
    scaled(history, "loss", 2.5, stop=FAULT + 3)
    put(history, f"grad/norm/{QKV}", 30.0, FAULT - 1, FAULT + 2)
    put(history, f"grad/norm/{MLP}", 300.0, FAULT, FAULT + 2)
    return "loss_spike", FAULT, QKV, history


def divergence():
    history = healthy()
    history["loss"][FAULT:] += np.linspace(0.7, 3, ROWS - FAULT)
    scaled(history, "grad/norm", 50, FAULT + 5)
    return "divergence", FAULT, None, history


def divergence_to_the_death():
    history = healthy()
    for key in ("loss", "grad/norm"):
        put(history, key, np.nan, FAULT + 3)
    put(history, "loss", 9.0, FAULT, FAULT + 3)
    return "divergence", FAULT, None, history


def nonfinite_once():
    history = healthy()
    put(history, "grad/norm", np.nan, stop=FAULT + 1)
    put(history, "grad/nonfinite", 0.01, stop=FAULT + 1)
    put(history, f"grad/nonfinite/{MLP}", 0.2, stop=FAULT + 1)
    return "nonfinite", FAULT, MLP, history


def nonfinite_for_good():
    history = healthy()
    for key in history:
        if key.startswith(("loss", "grad/norm", "update")):
            put(history, key, np.nan)
        if key.startswith("grad/nonfinite"):
            put(history, key, 1.0)
    return "nonfinite", FAULT, None, history


def nonfinite_by_a_counter():
    history = healthy()
    put(history, "skip/nonfinite_total", 1)
    return "nonfinite", FAULT, None, history


def infinite_loss():
    history = {"step": np.arange(3), "loss": np.array([np.inf, 1, 1])}
    return "nonfinite", 0, None, history


def underflow():
    history = healthy()
    for layer in LAYERS[1:3]:
        history[f"grad/zero_fraction/{layer}"] = wobbling(0.6)
    put(history, f"grad/zero_fraction/{QKV}", 0.0, 0, FAULT)
    put(history, f"grad/zero_fraction/{MLP}", 0.0, 0, FAULT - 8)
    return "underflow", FAULT, MLP, history


def underflow_without_layers():
    history = healthy()
    for key in list(history):
        if key.startswith("grad/zero_fraction/"):
            del history[key]
    history["grad/zero_fraction"] = wobbling(0.9)
    put(history, "grad/zero_fraction", 0.5, 0, FAULT)
    return "underflow", FAULT, None, history


def underflow_of_everything():
    history = healthy()
    put(history, "grad/norm", 0.0)
    return "underflow", FAULT, None, history


def vanishing_then_surge():
    history = healthy()
    scaled(history, f"grad/norm/{LAYERS[0]}", 1e-4, FAULT, FAULT + 40)
    return "vanishing_then_surge", FAULT, LAYERS[0], history


def exploding_gradient():
    history = healthy()
    scaled(history, "grad/norm", 40, FAULT, FAULT + 4)
    scaled(history, f"grad/norm/{MLP}", 60, FAULT - 2, FAULT + 4)
    scaled(history, f"grad/norm/{QKV}", 600, FAULT, FAULT + 4)
    return "exploding_gradient", FAULT, MLP, history


def exploding_with_the_loss():
    """A jump of one step, which the loss confirms without being a spike itself."""
    history = healthy(noise=0.02)
    scaled(history, "grad/norm", 40, FAULT, FAULT + 1)
    history["loss"][FAULT + 1] += 0.45
    return "exploding_gradient", FAULT, None, history


def learning_rate_too_high():
    history = healthy()
    history["adam/correlation"] = wobbling(-0.2)
    return "learning_rate_too_high", 32, None, history


def update_too_large():
    history = healthy(decays=False)
    history[f"update/param_ratio/{MLP}"] = wobbling(0.5)
    put(history, f"update/param_ratio/{MLP}", 0.01, 0, FAULT)
    return "update_too_large", FAULT, MLP, history


def update_too_large_as_a_whole():
    history = healthy(decays=False)
    history["update/param_ratio"] = wobbling(0.2)
    return "update_too_large", 50, None, history


def growing_spectral_norm():
    history = healthy()
    grown = np.exp(np.maximum(0, np.arange(ROWS) - 100) / 60)
    history[f"params/spectral_norm/{QKV}"] = held(grown, 8)
    return "growing_spectral_norm", None, QKV, history


def attention_saturates():
    history = healthy()
    grows = held(np.exp(0.02 * np.clip(np.arange(ROWS) - FAULT + 100, 0, 200)))
    for head, late in zip(HEADS, (60, 0, 30, 120), strict=True):
        key = f"attention/logit_bound/{head}"
        history[key] = 40 * np.roll(grows, late)
        history[key][:late] = 40
    return "attention_saturates", 192, HEADS[1], history


def attention_saturates_as_measured():
    """What the model says counts, whatever the bound is."""
    history = healthy()
    for i, head in enumerate(HEADS):
        level = np.where(np.arange(ROWS) < FAULT + 10 * i, 12.0, 80.0)
        history[f"extra/attention_logits/{head}"] = level
    return "attention_saturates", FAULT, HEADS[0], history


def attention_saturates_as_a_whole():
    history = healthy()
    history["extra/attention_logits"] = np.where(np.arange(ROWS) < FAULT, 12.0, 80.0)
    return "attention_saturates", FAULT, None, history


def vanishing_gradient():
    history = healthy()
    scaled(history, f"grad/norm/{MLP}", 1e-4)
    return "vanishing_gradient", FAULT, MLP, history


def vanishing_slowly():
    history = healthy()
    fall = np.exp(-np.maximum(0, np.arange(ROWS) - 100) / 30)
    history["grad/norm"] = history["grad/norm"] * fall
    return "vanishing_gradient", None, None, history


def eps_dominated():
    history = healthy()
    history[f"adam/eps_share/{QKV}"] = wobbling(0.7)
    put(history, f"adam/eps_share/{QKV}", 0.01, 0, FAULT)
    return "eps_dominated", FAULT, QKV, history


def frequent_skips():
    history = healthy()
    put(history, "skip/skipped", np.arange(ROWS - FAULT) % 5 == 0)
    return "frequent_skips", FAULT, None, history


def frequent_skips_by_total():
    history = healthy()
    history["skip/total"] = np.cumsum(
        (np.arange(ROWS) % 5 == 0) * (history["step"] >= FAULT)
    )
    del history["skip/skipped"]
    return "frequent_skips", FAULT, None, history


def clipping_too_often():
    history = healthy()
    put(history, "clip/limit", 0.01)
    return "clipping_too_often", None, None, history


def clipping_too_often_by_fraction():
    history = healthy()
    del history["clip/norm"]
    clipped = np.cumsum(history["step"] >= FAULT)
    history["clip/fraction"] = clipped / (history["step"] + 1)
    return "clipping_too_often", None, None, history


def bimodal_updates():
    history = healthy()
    history["update/bimodality"] = wobbling(0.8)
    put(
        history, "update/bimodality", 0.4 + 0.01 * (np.arange(FAULT) // 4 % 2), 0, FAULT
    )
    put(history, f"update/bimodality/{MLP}", history["update/bimodality"][FAULT:])
    return "bimodal_updates", FAULT, MLP, history


def correlated_updates():
    history = healthy()
    history["adam/correlation"] = wobbling(0.97)
    put(history, "adam/correlation", 0.4, 0, FAULT)
    return "correlated_updates", FAULT, None, history


def correlated_updates_without_adam():
    history = healthy()
    for key in list(history):
        if key.startswith("adam/correlation"):
            del history[key]
    history["update/correlation"] = wobbling(0.998)
    put(history, "update/correlation", 0.9, 0, FAULT)
    return "correlated_updates", FAULT, None, history


def noise_too_high():
    history = healthy()
    scaled(history, "noise_scale/low", 1000)
    return "noise_too_high", FAULT, None, history


def update_too_small():
    history = healthy(decays=False)
    history["update/param_ratio"] = wobbling(1e-8)
    return "update_too_small", 50, None, history


def plateau():
    history = healthy(decays=False)
    history["loss"] = 5.5 + 0.02 * np.random.default_rng(1).standard_normal(ROWS)
    return "plateau", 50, None, history


def plateau_half_way():
    history = healthy(decays=False, first=5000)
    history["adam/correlation"] = wobbling(0.7)
    return "plateau", 5000, None, history


def loss_stuck():
    history = healthy()
    put(history, "loss", 1.7)
    return "loss_stuck", FAULT, None, history


def guard_loss_constant():
    """Of a probe that nothing feeds: the loss is logged, and the guard is given 0."""
    history = healthy()
    limit = np.where(np.arange(ROWS) < 24, np.inf, 0.5)
    given = {"skip/value": np.zeros(ROWS), "skip/value_limit": limit}
    history |= given | {"skip/norm": history["grad/norm"]}
    return "guard_loss_constant", 0, None, history


def guard_loss_constant_and_nothing_else():
    """A history of the guard alone; its loss is a constant that somebody passed."""
    _, _, _, history = guard_loss_constant()
    ones = np.ones(ROWS)
    history |= {"loss": ones, "skip/value": ones}
    return "guard_loss_constant", 0, None, history


def learning_rate_zero():
    history = healthy()
    put(history, "learning_rate", 0.0)
    return "learning_rate_zero", FAULT, None, history


def overfitting():
    """The training loss falls on, and the held-out loss turns."""
    history = healthy()
    history["loss"] = history["loss"] - np.maximum(0, np.arange(ROWS) - 150) / 400
    held_out = np.full(ROWS, np.nan)
    held_out[::40] = 2.0 + np.abs(np.arange(ROWS) - FAULT)[::40] / 500
    return "overfitting", FAULT + 40, None, history | {"eval/loss": held_out}


def skip_budget_spent():
    history = healthy()
    history["skip/declined_total"] = np.maximum(np.arange(ROWS) - FAULT + 1, 0)
    return "skip_budget_spent", FAULT, None, history


def clustered_skips():
    history = healthy(decays=False)
    put(history, "skip/skipped", np.arange(ROWS) % 90 == 60, 0, ROWS)
    return "clustered_skips", 60, None, history


def clustered_skips_by_epoch():
    """Epochs of another length each."""
    history = healthy()
    history["epoch"] = np.sort(np.random.default_rng(3).uniform(0, 6, ROWS))
    skips = np.searchsorted(history["epoch"], np.arange(5) + 0.3)
    put(history, "skip/skipped", 0.0, 0, ROWS)
    history["skip/skipped"][skips] = 1
    return "clustered_skips", skips[0], None, history


def misplaced_clip():
    """Of the update of Muon, whose norm follows the learning rate."""
    history = healthy()
    wobble = 1 + 0.002 * np.random.default_rng(7).standard_normal(ROWS)
    history["clip/norm"] = 20 * history["learning_rate"] * wobble
    history["clip/limit"] = np.full(ROWS, 1.0)
    return "misplaced_clip", 50, None, history


def dominant_layer():
    history = healthy()
    for i in range(4):
        history[f"grad/norm/blocks/{i + 2}/kernel"] = wobbling(0.1)
    scaled(history, f"grad/norm/{MLP}", 30, 0)
    return "dominant_layer", 50, MLP, history


def several_runs():
    """The learning rate starts again, and the loss with it."""
    history = healthy(decays=False)
    one, other = healthy(1, FAULT), healthy(2, FAULT)
    history = {key: np.concatenate([one[key], other[key]]) for key in one}
    history["step"] = np.arange(ROWS)
    return "several_runs", FAULT, None, history


def several_runs_from_step_0():
    """Appended to the same file."""
    one, other = healthy(1, FAULT), healthy(2, FAULT)
    history = {key: np.concatenate([one[key], other[key]]) for key in one}
    del history["learning_rate"]
    return "several_runs", 0, None, history


def blow_up_in_the_third_row():
    history = {"step": np.arange(1, 61), "loss": np.full(60, 8.0)}
    history["loss"] += 0.1 * np.random.default_rng(0).standard_normal(60)
    history["loss"][:4] = 1.4, 1.5, 3.0, 20.0
    return "divergence", 3, None, history


def divergence_that_ends_by_itself():
    history = healthy()
    history["loss"][FAULT : FAULT + 60] += 3
    return "divergence", FAULT, None, history


def norm_that_grows_by_and_by():
    history = healthy()
    growth = np.geomspace(1, 1e5, ROWS - FAULT)
    history["grad/norm"] = history["grad/norm"].copy()
    history["grad/norm"][FAULT:] *= growth
    return "exploding_gradient", None, None, history


def shuffled_labels():
    """It begins above any guess, and stays where no usual run stays."""
    rng = np.random.default_rng(0)
    rows = np.arange(60)
    loss = 5.8 + 13 * np.exp(-rows / 3) + 0.1 * rng.standard_normal(60)
    return "plateau", None, None, {"step": 5 * rows, "loss": loss}


def nan_of_the_loss_alone():
    history = healthy()
    put(history, "loss", np.nan)
    return "nonfinite", FAULT, None, history


def nan_of_the_norm_alone():
    """Of an accumulator, say: the weights are intact."""
    history = healthy()
    put(history, "grad/norm", np.nan)
    return "nonfinite", FAULT, None, history


def nan_throughout():
    nothing = np.full(40, np.nan)
    history = {"step": np.arange(40), "loss": nothing, "grad/norm": nothing}
    return "nonfinite", 0, None, history


FAULTS = (
    loss_stuck,
    guard_loss_constant,
    guard_loss_constant_and_nothing_else,
    learning_rate_zero,
    overfitting,
    skip_budget_spent,
    clustered_skips,
    clustered_skips_by_epoch,
    misplaced_clip,
    dominant_layer,
    several_runs,
    several_runs_from_step_0,
    blow_up_in_the_third_row,
    divergence_that_ends_by_itself,
    norm_that_grows_by_and_by,
    shuffled_labels,
    nan_of_the_loss_alone,
    nan_of_the_norm_alone,
    nan_throughout,
    loss_spike,
    divergence,
    divergence_to_the_death,
    nonfinite_once,
    nonfinite_for_good,
    nonfinite_by_a_counter,
    infinite_loss,
    underflow,
    underflow_without_layers,
    underflow_of_everything,
    vanishing_then_surge,
    exploding_gradient,
    exploding_with_the_loss,
    learning_rate_too_high,
    update_too_large,
    update_too_large_as_a_whole,
    growing_spectral_norm,
    attention_saturates,
    attention_saturates_as_measured,
    attention_saturates_as_a_whole,
    vanishing_gradient,
    vanishing_slowly,
    eps_dominated,
    frequent_skips,
    frequent_skips_by_total,
    clipping_too_often,
    clipping_too_often_by_fraction,
    bimodal_updates,
    correlated_updates,
    correlated_updates_without_adam,
    noise_too_high,
    update_too_small,
    plateau,
    plateau_half_way,
)

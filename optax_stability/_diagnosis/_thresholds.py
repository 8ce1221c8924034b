"""Every number the diagnosis compares with, and where it comes from.

Three sorts: *theory* (follows from an equation), *source* (published, or measured in a
benchmark of this library), *choice* (a round number of ours, on the far side of what
the healthy runs of ``benchmarks/diagnosis.py`` show; the margin is in its JSON).
"""

# --- What is normal: the trend of the recent past -------------------------------------
# Centre = median of 8, scale = 1.4826 × median of 32 residuals, armed after 24 values.
# Source: ``thresholds.detrended_mad``, whose defaults these are.
CENTRE, WINDOW, ARM = 8, 32, 24
# σ of a normal distribution over its median absolute deviation. Theory.
SIGMA_PER_MAD = 1.4826

# Loss, in its own unit: 7 scales and at least half a nat. Source: ``spike_guard``;
# ``benchmarks/spike_detection.py`` has no false alarm in 26 clean runs.
LOSS_SCALES, LOSS_FLOOR = 7.0, 0.5
# A jump of the gradient is confirmed by this much of the loss. Source: likewise.
CONFIRM_SCALES, CONFIRM_FLOOR = 4.0, 0.3
# A divergence has lasted for this many measurements; less is a spike. Choice: twice the
# window of the centre, so that the median itself has moved.
DIVERGED_FOR = 16

# Logarithm of the gradient norm: 5 scales (source: ``spike_guard``) and at least ×10.
# The guard acts at ×5, and alone did so in 6 of 26 clean runs: too many for a finding
# (healthy runs: up to ×6.3).
NORM_SCALES, NORM_FACTOR = 5.0, 10.0
# Without a loss to confirm it, a jump counts if it lasts, or if it is enormous. Choice.
NORM_LASTS, NORM_ENORMOUS = 3, 100.0
# To say which layer was first, not whether something happened. Choice.
LOCATE_FACTOR = 3.0
# Vanishing "by orders of magnitude" (Molybog et al. 2023, arXiv:2304.09871): two of
# them, for as long as the median looks back, and a surge of one. Choice (healthy runs:
# up to ÷27 since the early descent, and much less relative to the loss).
VANISHED_FACTOR, VANISHED_FOR, SURGE_FACTOR, SURGE_WITHIN = 100.0, 8, 10.0, 16

# --- Adam -----------------------------------------------------------------------------
# The share ε/(√v̂ + ε) at which ε equals √v̂. Theory.
EPS_SHARE = 0.5
# (Σx²)²/(nΣx⁴) of one normal mode is 1/3, of an even spread 5/9, of two normal modes
# 2.8σ from the middle 0.7. Theory; the level is a choice (healthy runs: up to 0.56). It
# must have been low before, because updates of sign methods, and Adam's first ones, are
# ±1 by design. Choice.
BIMODAL, UNIMODAL = 0.7, 0.45
# ρ̂ at which RMS(u) = 0.7 with β₁ = 0.9, near its greatest value, 1. Theory: equation
# in ``scale_by_safe_adam``; the level is a choice (healthy runs: up to 0.77).
CORRELATED = 0.9
# The cosine of successive updates m_t, m_{t−1} for gradients that correlate with ρ is
# (β₁ + ρ)/(1 + β₁ρ), already 0.9 for independent ones. Theory: AR(2). At β₁ = ρ = 0.9:
CORRELATED_COSINE = (0.9 + CORRELATED) / (1 + 0.9 * CORRELATED)
# Median ρ̂ of the first ten measurements after the warm-up. Source:
# ``benchmarks/early_warning``, 17 settings of model, data, batch, warm-up and β.
# Below 0 right after the warm-up, the rule that was found on another one, 85 of 96 bad
# runs and 4 of 96 good ones are flagged; below −0.2 and not before step 30, chosen from
# all of them for few false alarms, 81 and 2.
RATE_CORRELATION, RATE_MEASUREMENTS, RATE_FROM_STEP = -0.2, 10, 30

# --- Updates and weights --------------------------------------------------------------
# ‖update‖/‖parameters‖: the rule of thumb is 1e-3 (Karpathy, CS231n lecture notes).
# A tenth of the weights per step forgets them in ten steps; a matrix that starts at
# zero passes 1/√t, below 0.3 after eleven steps. Choice (healthy tiny models: up to
# 0.06 for a layer, 0.01 for the whole).
RATIO_LARGE, LAYER_RATIO_LARGE = 0.1, 0.3
# Three orders below the rule: a thousandth of the weights in a thousand steps. Choice.
RATIO_SMALL = 1e-6
RATIO_LASTS = 16
# Bounded updates let a singular value grow at most linearly. Faster growth after the
# warm-up, each third of the time this much more than the one before, and this factor in
# all. Theory for linear; the numbers are a choice (healthy runs: up to ×3.9, slowing).
GROWTH_PER_THIRD, GROWTH_TOTAL, GROWTH_MEASUREMENTS = 1.5, 10.0, 12

# --- Precision, noise, decisions ------------------------------------------------------
# Exact zeros in half of the layers. Float32 gradients have next to none outside of
# embeddings and dead units (healthy runs: 0.00). Choice. Where only the whole is known,
# absent embedding rows hide in it, and only a rise counts.
ZERO_FRACTION, ZERO_RISE = 0.2, 0.3
# B_simple/B. A step makes 1/(1 + B_simple/B) of the progress of one without noise
# (McCandlish et al. 2018, arXiv:1812.06162, equation 2.7): less than 5 %. Small batches
# are efficient, so that only an extreme is a finding. The lower end of the interval is
# bounded by how long is averaged: 29 for a gradient that is noise and nothing else
# (benchmarks/diagnosis.py; a limit of 100 was never reached), 6 in health. Choice.
NOISE_RATIO, NOISE_LASTS = 20.0, 32
# "At nearly every step". ZClip clips some 4 %, AutoClip at its 10th percentile 90 %, by
# design. Choice.
CLIPPED_SHARE, CLIPPED_WINDOW = 0.95, 100
# The bucket of ``skip_spikes`` earns one skip in 16 steps; more than that in the long
# run means it is empty. Source: its default ``budget``. A single burst has at most 5.
SKIPPED_SHARE, SKIPPED_WINDOW, SKIPPED_LEAST = 1 / 16, 100, 8

# --- Standing still -------------------------------------------------------------------
# Measurements after the warm-up; a fall within this many standard errors is none.
PLATEAU_WINDOW, PLATEAU_ERRORS = 200, 2.0
# Of the loss; a fall by less is none, however certain. Choice: a thousand such windows
# to halve it.
PLATEAU_FALL = 1e-3
# Flat after convergence is health. It is not, if the loss fell by less than this share
# of where it started, or if successive gradients still agree this much. Choice.
PLATEAU_FALLEN, PLATEAU_CORRELATION = 0.1, 0.5
# A learning rate below this part of its peak says little about standing still. Choice.
RATE_DECAYED = 0.5

# --- When to begin to judge -----------------------------------------------------------
# Steps left alone where the end of the warm-up is not known. Source: efficacy.md, where
# the early descent ended at steps 40–60.
EARLY_STEPS = 50
# Measurements in a row, without which a level is not one. Choice.
LASTS = 3
# Measurements apart at which two abnormal stretches are two events: the window.
APART = WINDOW

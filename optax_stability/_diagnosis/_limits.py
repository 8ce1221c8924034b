"""Every number the diagnosis compares with, and where it comes from.

Three kinds of origin: *theory* (follows from an equation), *source* (published, or
measured in a benchmark of this library), *choice* (a round number of ours that the
healthy runs of ``benchmarks/diagnosis.py`` do not reach; its JSON holds the margin).
"""

# --- Normal values: what is normal so far ---------------------------------------------
# Level = median of 8, noise from 32 values, both known well from 24 values on. Source:
# ``thresholds.detrended_mad``, whose defaults these are.
CENTRE, WINDOW, WARMUP_VALUES = 8, 32, 24
# σ of a normal distribution over its median absolute deviation, and its upper quartile
# over σ. Theory.
SIGMA_PER_MAD, SIGMA_PER_QUARTILE = 1.4826, 0.6745
# With three values, limits are this much wider than with 24. Theory: the quantile of a
# t distribution with two degrees of freedom that a normal one reaches at 3.5 σ is four
# times as far out; in early rows the loss also falls most unevenly.
EARLY_WIDENING = 3.0

# Loss, in its own unit: 7 scales and at least half a nat. Source: ``spike_guard``;
# ``benchmarks/spike_detection.py`` has no false alarm in 26 clean runs.
LOSS_SCALES, LOSS_FLOOR = 7.0, 0.5
# Of a high loss also a tenth. A guess among 256,000 tokens costs 12.5 nats: a higher
# loss is no mean over tokens, or is confidently wrong, and then a quarter. Theory for
# 12.5, choice for the shares (healthy public logs in such a unit: up to a fifth).
LOSS_SHARE, UNIT_SHARE, HIGHEST_LOSS = 0.1, 0.25, 12.5
# Excess of the loss that confirms a jump of the gradient. Source: likewise.
CONFIRM_SCALES, CONFIRM_FLOOR = 4.0, 0.3
# A divergence has lasted for this many measurements; a shorter one is a spike. Choice:
# twice the window of the centre, so that the median itself has moved.
DIVERGED_MEASUREMENTS = 16
# In a log of few rows, a rise at its end counts from a share of them on. Choice.
DIVERGED_SHARE = 8
# The least lasting rise of a loss that is too small for nats: three times the level, or
# a fiftieth of the fall so far. Choice: the displayed loss of a healthy speech model
# ends at 1.9 times its lowest level (0.03).
RISE_FACTOR, RISE_OF_FALL = 3.0, 0.02
# Of a level known from a few rows, half more. Choice.
EARLY_SHARE = 0.5

# Logarithm of the gradient norm: 5 scales (source: ``spike_guard``) and at least ×10.
# The guard acts at ×5. Without confirmation by the loss, this limit gives false alarms
# in 6 of 26 clean runs: too many for a finding (healthy runs: up to ×6.3).
NORM_SCALES, NORM_FACTOR = 5.0, 10.0
# Without confirmation by the loss, a jump counts if it lasts for this many rows, or if
# it is enormous. Choice.
NORM_ROWS, NORM_ENORMOUS = 3, 100.0
# What lasts must also be so far above the median of all rows before, so that a norm
# that comes back from a low is none. Choice.
USUAL_FACTOR = 3.0
# Used only to find the layer that was affected first, not to detect a jump. Choice.
LOCATE_FACTOR = 3.0
# Vanishing "by orders of magnitude" (Molybog et al. 2023, arXiv:2304.09871): by two
# orders, for as many rows as the median covers; the surge is one order. Choice (healthy
# runs: up to ÷27 since the early descent, and much less relative to the loss).
VANISHED_FACTOR, VANISHED_ROWS, SURGE_FACTOR, SURGE_ROWS = 100.0, 8, 10.0, 16

# --- Adam -----------------------------------------------------------------------------
# The share ε/(√v̂ + ε) at which ε equals √v̂. Theory.
EPS_SHARE = 0.5
# (Σx²)²/(nΣx⁴) is 1/3 for a normal distribution, 5/9 for a uniform one, and 0.7 for two
# normal modes at ±2.8σ. Theory; the level is a choice (healthy runs: up to 0.56). The
# value must have been low before, because sign methods, and Adam in its first steps,
# make updates of ±1 by design. Choice.
BIMODAL, UNIMODAL = 0.7, 0.45
# ρ̂ at which RMS(u) = 0.7 with β₁ = 0.9, near its maximum, 1. Theory: equation
# in ``scale_by_safe_adam``; the level is a choice (healthy runs: up to 0.77).
CORRELATED = 0.9
# The cosine of successive updates m_t, m_{t−1} for gradients that correlate with ρ is
# (β₁ + ρ)/(1 + β₁ρ), already 0.9 for independent gradients. Theory: AR(2). At
# β₁ = ρ = 0.9:
CORRELATED_COSINE = (0.9 + CORRELATED) / (1 + 0.9 * CORRELATED)
# Median ρ̂ of the first ten measurements after the warm-up. Source:
# ``benchmarks/early_warning``, 17 settings of model, data, batch, warm-up and β. The
# rule found on another setting, below 0 right after the warm-up, flags 85 of 96 bad
# runs and 4 of 96 good ones. The rule used here, below −0.2 and not before step 30, was
# chosen from all of them for few false alarms: it flags 81 and 2.
RATE_CORRELATION, RATE_MEASUREMENTS, RATE_FROM_STEP = -0.2, 10, 30

# --- Updates and weights --------------------------------------------------------------
# ‖update‖/‖parameters‖: the rule of thumb is 1e-3 (Karpathy, CS231n lecture notes). At
# a tenth of the weights per step, the weights are replaced in ten steps. A matrix that
# starts at zero has the ratio 1/√t, below 0.3 after eleven steps. Choice (healthy tiny
# models: up to 0.06 for a layer, 0.01 for all parameters).
RATIO_LARGE, LAYER_RATIO_LARGE = 0.1, 0.3
# Three orders below the rule of thumb: a thousandth of the weights in a thousand steps.
# Choice.
RATIO_SMALL = 1e-6
RATIO_ROWS = 16
# Bounded updates let a singular value grow at most linearly. The limits: after the
# warm-up, the growth in each third of the time relative to the third before, and the
# factor in total. Theory for "linear"; the numbers are a choice (healthy runs: up to
# ×3.9, slowing down).
GROWTH_PER_THIRD, GROWTH_TOTAL, GROWTH_MEASUREMENTS = 1.5, 10.0, 12

# --- Attention ------------------------------------------------------------------------
# The largest logit of a head. At 50 a token that is one part in ten behind has e⁻⁵ of
# the weight. Source: 36 runs of a GPT with 2 layers and width 64, rates 1e-3 to 0.3: it
# was above in all 18 that ended .1 nat or more behind the best, and in none of the
# other 18. The bound has a correlation of .98 with the logit, about .116·bound^1.07;
# the level is that fit's. ``benchmarks/attention_saturation.py``, with another size
# and other text: the logit finds 15 of 15 bad runs and 1 of 21 others, the bound 15, 0.
ATTENTION_LOGIT, LOGIT_BOUND = 50.0, 250.0

# --- Precision, noise, decisions ------------------------------------------------------
# Exact zeros in half of the layers. Float32 gradients have almost none outside of
# embeddings and dead units (healthy runs: 0.00). Choice. If only the global share is
# recorded, unused embedding rows are part of it, so that only a rise counts.
ZERO_FRACTION, ZERO_RISE = 0.2, 0.3
# B_simple/B. A step makes 1/(1 + B_simple/B) of the progress of a step without noise
# (McCandlish et al. 2018, arXiv:1812.06162, equation 2.7): here less than 5 %. Small
# batches are efficient, so that only an extreme value is a finding. The lower end of
# the interval of now: from 29 on for a gradient of pure noise (benchmarks/diagnosis.py;
# a limit of 100 was never reached), at most 12 in healthy runs (noise_truth.py).
# Choice.
NOISE_RATIO, NOISE_ROWS = 20.0, 32
# Share of clipped steps. By design, ZClip clips about 4 %, and AutoClip at its 10th
# percentile 90 %. Choice.
CLIPPED_SHARE, CLIPPED_WINDOW = 0.95, 100
# What a step must be shortened by to count. Choice: the median of the last sixteen
# norms (``at_most_median``) is that far below a norm that rises by 5 % a step.
CLIPPED_FACTOR = 1.5
# The token bucket of ``skip_spikes`` refills one skip in 16 steps; a higher rate over a
# long time means that the bucket is empty. Source: its default ``budget``. A single
# burst has at most 5 skips.
SKIPPED_SHARE, SKIPPED_WINDOW, SKIPPED_MIN = 1 / 16, 100, 8
# Without a loss, a guard scales a large norm where it has no skip: on logs of healthy
# runs up to 0.5 % of the steps (benchmarks/real_logs.py).
SCALED_SHARE = 0.01

# A guard's loss that never changes is no loss if the gradient norm changes by so much
# from row to row. Choice: other batches, and so another loss (of one batch again and
# again, both follow the slow change of the weights).
NORM_VARIES = 0.01
# A loss of 0 has no such gradient. Theory: in float32 the cross-entropy is exactly 0
# when all other tokens together have less than 2⁻²⁴, which is the size of the gradient
# of the logits; the level is a choice.
NORM_AT_ZERO_LOSS = 1e-4

# --- Plateau --------------------------------------------------------------------------
# Measurements after the warm-up; a fall within so many standard errors does not count.
PLATEAU_WINDOW, PLATEAU_ERRORS = 200, 2.0
# A smaller relative fall of the loss does not count, however significant. Choice: at
# this rate it takes about a thousand windows to halve the loss.
PLATEAU_NEGLIGIBLE = 1e-3
# A converged run is flat as well. A flat loss has not converged if it fell by less than
# this share of its initial value, or if successive gradients still correlate this much.
# Choice.
PLATEAU_MIN_FALL, PLATEAU_CORRELATION = 0.1, 0.5
# A loss that began above any guess, and is flat to this share from a level on that no
# usual language model stays at. Choice.
FAR_FLAT, FAR_LEVEL = 0.06, 3.5
# Steps with a learning rate below this share of its peak are ignored. Choice.
RATE_DECAYED = 0.5

# A gap of what is measured now and then is a loss if it is this many times as long as
# any other gap. Choice.
LOST_GAPS = 3

# Inf in the gradient norm of so many first rows, with a finite loss, is a dynamic loss
# scale that looks for its level. Choice.
LOSS_SCALE_ROWS = 2

# --- First steps ----------------------------------------------------------------------
# Steps that are ignored if the end of the warm-up is unknown. Choice: in
# ``benchmarks/spike_detection.py`` the loss falls fast at steps 24–59.
EARLY_STEPS = 50
# Consecutive measurements that a level needs. Choice.
MIN_MEASUREMENTS = 3
# Abnormal stretches at most this many rows apart are one event: the window.
EVENT_GAP = WINDOW

# --- Learning rate, held-out loss, layers, several trainings --------------------------
# Rows of a log at learning rate 0, and their share: the first and the last row of a
# schedule are often 0. Choice.
ZERO_RATE_ROWS, ZERO_RATE_SHARE = 8, 0.25
# Rows with exactly the same loss, and their share of all rows. Choice.
STUCK_ROWS, STUCK_SHARE, STUCK_ALWAYS = 16, 0.4, 100
# A repeated value is no accident of rounding if the log resolves much less. Choice.
STUCK_RESOLUTION = 200
# A rise of the held-out loss: in its own noise, and as a share of its lowest value.
# Of fewer than eight evaluations the noise is not known. Choice (held-out losses of
# healthy runs repeat within a hundredth).
OVERFIT_SCALES, OVERFIT_SHARE, OVERFIT_SHARE_OF_FEW = 4.0, 0.02, 0.05
# The share of the squared gradient norm that is nearly all of it; of two layers one has
# to be larger. Choice (healthy runs: up to 0.6).
DOMINANT_SHARE, DOMINATED_LAYERS = 0.95, 3
# A step is back at the beginning within this share of the steps before; a learning rate
# has decayed below this share of its peak. Choice.
BEGINNING_SHARE, DECAYED_SHARE = 0.05, 0.1
# A clip behind an optimizer that normalises sees a norm whose logarithm scatters less
# than this, while that of the gradient scatters more. Choice (Muon: 0.001 to 0.01).
SAME_NORM, VARYING_NORM, SAME_NORM_ROWS = 0.02, 0.08, 32
# Skips at the same position of the data: events, in so many passes, within this share
# of a pass. Choice: by chance, four of four events lie within 1/20 in 0.05 % of runs.
CLUSTER_EVENTS, CLUSTER_WIDTH, CLUSTER_SHARE, CLUSTER_PERIOD = 4, 0.05, 0.8, 20
# A training loss this close to zero, relative to its start, may have been learned by
# heart. Choice.
NEAR_ZERO = 0.05

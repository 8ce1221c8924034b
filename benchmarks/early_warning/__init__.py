"""Does anything say early that the learning rate is too high, or that a spike comes?

Trains small byte-level GPTs and asks two questions.

**Learning rate.** ρ̂ = (R − c)/(β₁(R + c)), with R the mean square of Adam's update and
c = (1 − β₁)/(1 + β₁), is the metric ``adam/correlation``. The rule *median over the ten
steps after the warm-up below 0* was found on other runs of the first setting here. It
meets seventeen others, unchanged.

* **best**: the rate with the lowest held-out loss, in the mean of the seeds.
* **bad**: runs at a higher rate whose held-out loss is above that of the best rate with
  the same seed by more than 0.1 nat. **good**: runs at the best rate or below, or above
  it and worse by less than 0.03. **between**: the rest.
* **flagged**: runs that the rule calls too high.
* **lead**: steps from the alarm (the tenth step after the warm-up) to the first of ten
  steps in a row at which the mean of the last ten losses is above that of the best rate
  on the same batches by 0.1 nat. **In time**: flagged bad runs with a lead above 0.

Other statistics are compared on the same runs. Their limits are chosen on every other
setting (largest recall minus share of false alarms) and tested on the rest. *The rate
itself* is the control: a limit on it knows nothing of the run.

**Spikes.** Models without normalisation, no clip, rates that do not fall: some runs
spike, some diverge. A spike is an abnormal loss, ``detrended_mad(6.0, floor=0.5,
log=False)``, with another one within four steps, and 40 steps without such before it.
*Controls* are the same steps of the other seeds of the same setting, while no spike is
40 steps behind or 30 ahead of them. Eight seeds were looked at while this was written;
they set the levels of the alarms, and the other eight are what is reported.

* **AUC**: how often the highest value in the 30 steps before a spike is above that of a
  control; 0.5 is chance. In brackets: 95 % by bootstrap over runs. **5–30**: without
  the four steps before the spike, in which it may have begun. **clean**: of those, only
  spikes without a single abnormal loss in the 40 steps before. **minus loss**: 5–30
  minus the same of the loss, which is the control: it costs nothing to look at.
* **recall**: spikes with an alarm in the 30 steps before, at a level that 0.5 % of the
  quiet steps of the first eight seeds pass; **controls**: share of the controls with
  one; **false**: alarms per 1,000 quiet steps; **lead**: median of the steps from the
  first alarm to the spike. **health**: alarms per 1,000 steps from step 64 on in the
  good runs of the first question.

    python benchmarks/early_warning            # 18 minutes on one CPU core
    python benchmarks/early_warning --quick    # one small setting each, no JSON
"""

from early_warning.suite import make_report, tables

__all__ = ["make_report", "tables"]

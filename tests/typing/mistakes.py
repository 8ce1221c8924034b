"""Slips in the code of a user. Pyright rejects every line that is marked, and no other.

A mark is a comment with the name of pyright's rule. A wrong call of an overloaded
function breaks two. ``test_typing.py`` compares the marks with what pyright
says. Nothing here is run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_stability as ost
from optax_stability import flax as ost_flax
from optax_stability import orbax as ost_orbax
from optax_stability import thresholds

Params = dict[str, jax.Array]
Tx = optax.GradientTransformation


def loss_fn(params: Params, x: jax.Array) -> jax.Array:
    """A loss of arrays."""
    return jnp.mean((x @ params["w"]) ** 2)


def loss_of_model(model: nnx.Linear, x: jax.Array) -> jax.Array:
    """A loss of a module."""
    return jnp.mean(model(x) ** 2)


def misspelt_arguments(tx: Tx) -> None:
    """A keyword that does not exist is not swallowed."""
    ost.spike_guard(tx, max_consecutve=25)  # reportCallIssue
    ost.branch_on_spike(tx, rollback_buget=2)  # reportCallIssue
    ost.skip_spikes(tx, gradnorm=None)  # reportCallIssue
    ost.clip_by_zscore(warm_up=25)  # reportCallIssue
    ost.safe_adamw(1e-3, weight_deacy=0.1)  # reportCallIssue
    ost.record("grad", per_leave=False)  # reportCallIssue
    ost.microbatch_gradients(loss_fn, 8, vmapsize=2)  # reportCallIssue
    ost_flax.microbatch_gradients(loss_of_model, 8, vmapsize=2)  # reportCallIssue
    ost_flax.per_example_gradients(loss_of_model, hasaux=True)  # reportCallIssue
    thresholds.detrended_mad(5.0, flor=5.0)  # reportCallIssue
    thresholds.relearn(thresholds.zscore(), aftre=25)  # reportCallIssue
    ost.RewindPolicy(step_back=100)  # reportCallIssue
    ost.RunLog("log.jsonl", resume_step=100)  # reportCallIssue


def unknown_choices(tx: Tx) -> None:
    """A word is one of those that exist."""
    ost.record("params", of="parms")  # reportArgumentType
    ost.scale_by_safe_adam(eps_mode="ad")  # reportArgumentType
    ost.safe_adamw(1e-3, eps_mode="atan")  # reportArgumentType
    ost.scale_by_safe_adam(second_moment="micro")  # reportArgumentType
    ost.when_noisy(tx, above=1.0, measure="b_smple")  # reportArgumentType
    ost.scale_learning_rate(1e-3, 4, "sqr")  # reportArgumentType reportCallIssue
    ost.clip_by_zscore(mode="median")  # reportArgumentType
    thresholds.zscore(mode="median")  # reportArgumentType
    ost.branch_on_spike(tx, keep="param")  # reportArgumentType
    ost.branch_on_spike(tx, keep_in="cpu")  # reportArgumentType
    ost.clip_by_threshold(thresholds.constant(1.0), scope="leafs")  # reportArgumentType
    ost.estimate_noise_scale(scope="leaves")  # reportArgumentType
    ost.estimate_noise_scale(norm="L1")  # reportArgumentType


def numbers_for_thresholds(tx: Tx) -> None:
    """A limit is a threshold."""
    ost.spike_guard(tx, grad_norm=5.0)  # reportArgumentType
    ost.skip_spikes(tx, value=0.5)  # reportArgumentType
    ost.branch_on_spike(tx, value=None)  # reportArgumentType
    ost.clip_by_threshold(1.0)  # reportArgumentType
    ost.clip_by_threshold(thresholds.zscore)  # reportArgumentType
    ost.restart_moments(tx, on_spike=5.0)  # reportArgumentType
    thresholds.relearn(2.5, after=25)  # reportArgumentType


def positional_arguments(tx: Tx, state: optax.OptState, params: Params) -> None:
    """What has to be named is named."""
    ost.spike_guard(tx, thresholds.constant(5.0))  # reportCallIssue
    ost.record("grad", "params")  # reportCallIssue
    ost.when_noisy(tx, 1000.0)  # reportCallIssue
    ost.metrics(state, params)  # reportCallIssue
    thresholds.zscore(2.5, 0.97)  # reportCallIssue
    thresholds.relearn(thresholds.zscore(), 25)  # reportCallIssue


def missing_arguments(tx: Tx, history: dict[str, np.ndarray]) -> None:
    """What has no default is given."""
    thresholds.detrended_mad(5.0)  # reportCallIssue
    ost.clip_by_quantile()  # reportCallIssue
    ost.accumulate_moments(tx)  # reportCallIssue
    ost.write_report(history)  # reportCallIssue
    ost.RewindPolicy().update({"loss": 2.5})  # reportCallIssue
    ost.find_damage()  # reportCallIssue
    ost_orbax.Checkpoints()  # reportCallIssue
    ost_flax.TrainState.create(apply_fn=None, params={})  # reportCallIssue


def other_types(tx: Tx, state: optax.OptState, history: dict[str, np.ndarray]) -> None:
    """One thing in the place of another."""
    ost.spike_guard(ost.safe_adamw)  # reportArgumentType
    ost.accumulate_moments(tx, "8")  # reportArgumentType
    ost.scale_gradients(["embed"])  # reportArgumentType
    ost.critical_batch_range(state)  # reportArgumentType
    ost.diagnose(ost.metrics(state))  # reportArgumentType
    ost.plot_history("run.png", history)  # reportArgumentType
    ost.penalize_gradient_norm(loss_fn, "0.1")  # reportArgumentType
    ost_flax.TrainState.create(apply_fn=None, params={}, tx=1e-3)  # reportArgumentType


def calls_of_gradients(params: Params, model: nnx.Linear, x: jax.Array) -> None:
    """The functions that are returned know what they take."""
    gradients = ost.microbatch_gradients(loss_fn, 8)
    gradients(params)  # reportCallIssue
    gradients(x, x)  # reportArgumentType
    gradients(params, params)  # reportArgumentType
    gradients(params, x, 2.0**15)  # reportCallIssue
    gradients(params, x, lossscale=2.0**15)  # reportCallIssue
    gradients(params, x, loss_scale="dynamic")  # reportArgumentType
    of_model = ost_flax.microbatch_gradients(loss_of_model, 8)
    of_model(model)  # reportCallIssue
    of_model(params, x)  # reportArgumentType
    of_model(model, {"x": x})  # reportArgumentType
    ost_flax.microbatch_gradients(loss_fn, 8)  # reportArgumentType
    of_examples = ost_flax.per_example_gradients(loss_of_model)
    of_examples(model)  # reportCallIssue
    of_examples(params, x)  # reportArgumentType
    penalized = ost.penalize_gradient_norm(loss_fn, 0.1)
    penalized(params)  # reportCallIssue
    penalized(params, params)  # reportArgumentType
    of_penalized = ost_flax.penalize_gradient_norm(loss_of_model, 0.1)
    of_penalized(params, x)  # reportArgumentType


def comparisons(finding: ost.Finding, decision: ost.Decision) -> list[bool]:
    """What can never be true."""
    return [
        finding.kind == "loss_spikes",  # reportUnnecessaryComparison
        decision.action == "restart",  # reportUnnecessaryComparison
        decision.restore_step == "newest",  # reportUnnecessaryComparison
    ]


def readings(tx: Tx, params: Params, state: optax.OptState, x: jax.Array) -> list[Any]:
    """What comes back has a type of its own, and no other attributes."""
    loss, grads, moments = ost.microbatch_gradients(loss_fn, 8)(params, x)
    return [
        loss.value,  # reportAttributeAccessIssue
        grads.w,  # reportAttributeAccessIssue
        moments.variance,  # reportAttributeAccessIssue
        ost.metrics(state).total,  # reportAttributeAccessIssue
        ost.metrics(state)["skip/total"].value,  # reportAttributeAccessIssue
        ost.history(state)["loss"].grad,  # reportAttributeAccessIssue
        ost.diagnose(ost.history(state)).kind,  # reportAttributeAccessIssue
        ost.diagnose(ost.history(state))[0].sort,  # reportAttributeAccessIssue
        ost.noise_scale(state).bsimple,  # reportAttributeAccessIssue
        ost.batch_efficiency(400.0, 64).item,  # reportAttributeAccessIssue
        ost.scale_learning_rate(1e-3, 4).item,  # reportAttributeAccessIssue
        ost.batch_size_schedule(64).k,  # reportAttributeAccessIssue
        ost.eval_params(params, state).w,  # reportAttributeAccessIssue
        ost.has_updated(state).updated,  # reportAttributeAccessIssue
        ost.flush(tx, state)[1].step,  # reportAttributeAccessIssue
        ost.adopt_state(tx, params, state).params,  # reportAttributeAccessIssue
        ost.leaf_names(params).w,  # reportAttributeAccessIssue
        ost.histogram_edges().bins,  # reportAttributeAccessIssue
        ost.RewindPolicy().update(1, {}).restore,  # reportAttributeAccessIssue
        thresholds.zscore().limit,  # reportAttributeAccessIssue
        ost.spike_guard(tx).step,  # reportAttributeAccessIssue
    ]


def fields(state: ost.SkipSpikesState, train_state: ost_flax.TrainState) -> list[Any]:
    """States and train states have the fields that they have."""
    return [
        state.skipped_total,  # reportAttributeAccessIssue
        state.total.value,  # reportAttributeAccessIssue
        train_state.apply_gradients(grads={}).stats,  # reportAttributeAccessIssue
    ]

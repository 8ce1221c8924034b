"""Trainers too heavy for CI: their call of ``update``, argument by argument.

Each test names the release whose source was read. What is run are the lines of the
trainer's page.
"""

import dataclasses
import importlib.util
import sys
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import optax_stability as ost

PARAMS = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
NAN, SPIKE, STEPS = 6, 35, 40


def loss_fn(params, x, factor):
    return factor * jnp.mean((x @ params["w"] + params["b"] - 1) ** 2)


def batches():
    for step in range(STEPS):
        x = np.random.default_rng(step).standard_normal((16, 4)).astype(np.float32)
        yield x, np.float32({NAN: np.nan, SPIKE: 100.0}.get(step, 1.0))


def train(step, state):
    """Steps that are skipped, counted from 0; and the last state."""
    step, skipped = jax.jit(step), []
    for x, factor in batches():
        state = step(state, x, factor)
        skipped.append(bool(ost.metrics(state)["skip/skipped"]))
    leaves = jax.tree.leaves(state)
    assert all(np.isfinite(leaf).all() for leaf in leaves[: len(PARAMS)])
    return np.flatnonzero(skipped).tolist(), state


# --- Levanter 1.2.dev1644 --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AdamConfig:
    """The fields and the method of the release that the page uses."""

    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95

    def lr_scheduler(self, num_train_steps):
        return optax.cosine_decay_schedule(self.learning_rate, num_train_steps)


class OptimizerConfig:
    """A registry of classes by name."""

    registered: ClassVar[dict] = {}

    @classmethod
    def register_subclass(cls, name):
        return lambda subclass: cls.registered.setdefault(name, subclass)


@pytest.fixture
def levanter_lines(monkeypatch):
    if importlib.util.find_spec("levanter") is None:
        optim = types.ModuleType("levanter.optim")
        optim.AdamConfig, optim.OptimizerConfig = AdamConfig, OptimizerConfig
        tracker = types.ModuleType("levanter.tracker")
        package = types.ModuleType("levanter")
        package.optim, package.tracker = optim, tracker
        names = {"levanter.optim": optim, "levanter.tracker": tracker}
        for name, module in ({"levanter": package} | names).items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "levanter_lines", raising=False)
    return importlib.import_module("levanter_lines")


def test_levanter_passes_the_loss(levanter_lines):
    """1.2: ``update(grads, state, params=…, obj_fn=f, loss=l)`` in take_train_step."""
    tx = levanter_lines.GuardedAdamConfig(learning_rate=1e-2).build(100)

    def step(state, x, factor):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, x, factor)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params=params,
            obj_fn=lambda params: loss_fn(params, x, factor),
            loss=loss,
        )
        return optax.apply_updates(params, updates), opt_state

    skipped, (_, opt_state) = train(step, (PARAMS, tx.init(PARAMS)))
    assert skipped == [NAN, SPIKE]
    # What log_optimizer_hyperparams of the release looks for.
    assert opt_state.hyperparams["learning_rate"] < 1e-2
    logged = []
    module = sys.modules["levanter.tracker"]
    module.log = lambda values, step: logged.append((step, values))
    info = types.SimpleNamespace(
        state=types.SimpleNamespace(opt_state=opt_state), step=STEPS
    )
    levanter_lines.log_guard(info)
    assert logged[0][1]["skip/total"] == 2.0
    # After one step the limit is ∞, of which tensorboardX would warn.
    _, opt_state = tx.update(PARAMS, tx.init(PARAMS), params=PARAMS, loss=1.0)
    assert ost.metrics(opt_state)["skip/value_limit"] == np.inf
    info.state.opt_state = opt_state
    levanter_lines.log_guard(info)
    assert "skip/value_limit" in logged[0][1]
    assert "skip/value" in logged[1][1]
    assert "skip/value_limit" not in logged[1][1]


# --- MaxText, main of 2026-11 ----------------------------------------------------


def test_maxtext_passes_loss_and_norm_where_its_flag_is_on():
    """``state.apply_gradients(grads, loss=loss, grad_norm=grad_norm)``."""
    import maxtext_lines

    config = types.SimpleNamespace(skip_step_on_spikes=True)
    tx = maxtext_lines.guard_of_config(config, optax.adamw(1e-2))

    def step(state, x, factor):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, x, factor)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(
            grads, opt_state, params, loss=loss, grad_norm=norm
        )
        return optax.apply_updates(params, updates), opt_state

    skipped, state = train(step, (PARAMS, tx.init(PARAMS)))
    assert skipped == [NAN, SPIKE]
    metrics = {"scalar": {}}
    maxtext_lines.add_guard_metrics(metrics, state)
    assert metrics["scalar"]["skip/total"] == 2


def test_maxtext_freezes_by_a_partition_around_the_guard():
    """``multi_transform`` with trainable_parameters_mask passes the loss on."""
    import maxtext_lines

    config = types.SimpleNamespace(skip_step_on_spikes=True)
    guard = maxtext_lines.guard_of_config(config, optax.adamw(1e-2))
    tx = optax.partition(
        {"trainable": guard, "frozen": optax.set_to_zero()},
        {"w": "trainable", "b": "frozen"},
    )
    state = tx.init(PARAMS)
    grads = optax.tree.ones_like(PARAMS)
    _, state = tx.update(grads, state, PARAMS, loss=2.5, grad_norm=1.0)
    assert ost.metrics(state)["skip/value"] == 2.5


def test_maxtext_off_the_flag_is_unchanged():
    import maxtext_lines

    base = optax.adamw(1e-2)
    config = types.SimpleNamespace(skip_step_on_spikes=False)
    assert maxtext_lines.guard_of_config(config, base) is base


# --- Kauldron 1.4.2 --------------------------------------------------------------


class Metric:
    """Fields are keys of the context, and arguments of ``get_state``."""

    def get_state_from_context(self, context):
        keys = dataclasses.asdict(self).items()
        return self.get_state(**{name: getattr(context, key) for name, key in keys})


@pytest.fixture
def kauldron_lines(monkeypatch):
    if importlib.util.find_spec("kauldron") is None:
        metrics = types.SimpleNamespace(Metric=Metric, State=object)
        kontext = types.SimpleNamespace(Key=Any)
        package = types.ModuleType("kauldron")
        package.kd = types.SimpleNamespace(metrics=metrics, kontext=kontext)
        monkeypatch.setitem(sys.modules, "kauldron", package)
    monkeypatch.delitem(sys.modules, "kauldron_lines", raising=False)
    return importlib.import_module("kauldron_lines")


def kauldron_step(tx, metric):
    """As ``TrainStep._step``: the metrics see the optimizer's state before the step."""

    def step(state, x, factor):
        grads = jax.grad(loss_fn)(state.params, x, factor)
        # optimizer.update(params_grads, state.opt_state, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        context = types.SimpleNamespace(opt_state=state.opt_state)
        seen = metric.get_state_from_context(context)
        return state.replace(params=params, opt_state=opt_state), seen

    return step


def kauldron_state(tx):
    """Its TrainState is a struct of params and opt_state, as Flax's."""
    return train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)


def test_kauldron_gives_three_arguments(kauldron_lines, tmp_path):
    tx = kauldron_lines.make_optimizer(1e-2)
    step = kauldron_step(tx, kauldron_lines.GuardMetrics())
    skipped, state = train(lambda *each: step(*each)[0], kauldron_state(tx))
    # The spike is scaled to its limit: norms alone skip one step in a thousand.
    assert skipped == [NAN]
    assert ost.metrics(state)["skip/declined_total"] == 1
    kauldron_lines.write_report(state, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_kauldron_logs_the_metrics_of_the_step_before(kauldron_lines):
    tx = kauldron_lines.make_optimizer(1e-2)
    step = jax.jit(kauldron_step(tx, kauldron_lines.GuardMetrics()))
    state, rows = kauldron_state(tx), []
    for x, factor in batches():
        state, seen = step(state, x, factor)
        # An evaluation merges the states of its batches; AuxiliariesState.compute.
        assert seen.empty().merge(seen) == seen
        rows.append(seen.merge(seen).compute())
    assert np.flatnonzero([row["skip/skipped"] for row in rows]).tolist() == [NAN + 1]
    assert rows[-1]["skip/total"] == 1
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert "skip/norm_limit" in rows[-1]


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    importlib.util.find_spec("kauldron") is None, reason="needs kauldron"
)
def test_kauldron_itself(kauldron_lines, tmp_path):
    """Its trainer, with its checkpoints, evaluations and what its writer gets."""
    from flax import linen as nn
    from kauldron import kd

    class Model(nn.Module):
        x: kd.kontext.Key = "batch.x"

        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(x)

    written = {}

    class Writer(kd.train.KDMetricWriter):
        def write_scalars(self, step, scalars):
            written.setdefault(self.collection, {})[int(step)] = scalars

    def data(epochs):
        x = np.random.default_rng(0).standard_normal((STEPS * 16, 4), np.float32)
        y = x.sum(1, keepdims=True)
        y[NAN * 16] = np.nan
        return kd.data.InMemoryPipeline(
            loader=lambda: {"x": x, "y": y}, batch_size=16, num_epochs=epochs
        )

    state, _ = kd.train.Trainer(
        workdir=str(tmp_path),
        seed=0,
        num_train_steps=STEPS - 1,
        model=Model(),
        train_ds=data(None),
        train_losses={"mse": kd.losses.L2(preds="preds", targets="batch.y")},
        train_metrics={"guard": kauldron_lines.GuardMetrics()},
        optimizer=kauldron_lines.make_optimizer(1e-2),
        schedules={},
        writer=Writer(),
        log_metrics_every=1,
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=20),
        evals={
            "eval": kd.evals.Evaluator(
                run=kd.evals.EveryNSteps(20), ds=data(1), num_batches=2
            )
        },
    ).train()
    rows, name = written["train"], "metrics/guard/skip/skipped"
    assert [step for step, row in rows.items() if row[name]] == [NAN + 1]
    assert written["eval"][20]["metrics/guard/skip/total"] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert np.flatnonzero(ost.history(state)["skip/skipped"]).tolist() == [NAN]


# --- brax 0.14.2 -----------------------------------------------------------------


def test_brax_gives_neither_loss_nor_params():
    """``optimizer.update(grads, optimizer_state)`` in gradient_update_fn and PPO."""
    import brax_lines

    tx = brax_lines.make_optimizer(1e-2)

    def step(state, x, factor):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, x, factor)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    skipped, _ = train(step, (PARAMS, tx.init(PARAMS)))
    assert skipped == [NAN]


def test_brax_finds_the_rate_that_it_adapts():
    """PPO with ADAPTIVE_KL reads ``hyperparams`` of the outermost state."""
    import brax_lines

    tx = optax.inject_hyperparams(brax_lines.make_optimizer)(learning_rate=1e-2)
    assert tx.init(PARAMS).hyperparams["learning_rate"] == np.float32(1e-2)


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("brax") is None, reason="needs brax")
def test_brax_itself():
    """Its own function of one update, with its own arguments."""
    import brax_lines
    from brax.training import gradients

    tx = brax_lines.make_optimizer(1e-2)
    update = gradients.gradient_update_fn(loss_fn, tx, pmap_axis_name=None)

    def step(state, x, factor):
        params, opt_state = state
        _, params, opt_state = update(params, x, factor, optimizer_state=opt_state)
        return params, opt_state

    skipped, _ = train(step, (PARAMS, tx.init(PARAMS)))
    assert skipped == [NAN]

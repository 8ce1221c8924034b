"""Trains a GPT with a stability chain, on the devices of this computer.

    python examples/gpt/train.py                       # tiny, two CPU cores, 2 minutes
    python examples/gpt/train.py --data my_book.txt    # your own text
    python examples/gpt/train.py --size gpt2 --dtype bfloat16 --data train.bin
    python examples/gpt/train.py --mesh data=4,model=2 # on eight devices

A small GPT learns to write, byte by byte, from the sources of Python's standard
library. ``training.py`` uses optax_stability; this file is the run around it. The same
command, given again, resumes the run, whatever interrupted it.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import optax_stability as ost
from optax_stability.faults import FaultInjector, parse_faults
from optax_stability.loop import Drawn, Schedule, TrainingLoop, Window

sys.path.append(str(Path(__file__).parents[1]))  # for modules that the examples share
import console
import data
import devices
import pace
import resuming
import training
from command import end_at_once, run_command
from config import FIXED, FREE, Config, check, default_values
from model import GPT, SIZES, SPLIT, window_losses
from sampling import generate
from training import Metrics, TrainState
from verifying import verified

Create = Callable[..., tuple[GPT, nnx.Optimizer]]
Row = dict[str, Any]


class Run:
    """The state of a run, and the compiled functions that use it."""

    def __init__(
        self,
        config: Config,
        corpus: data.Corpus,
        create: Create,
        arguments: tuple,
        say: Callable[[str], object],
    ):
        """Creates the model and its optimizer; each device creates its own part.

        ``create(*arguments)`` returns a new model and its optimizer.
        """
        self._config, self._say, size = config, say, SIZES[config.size]
        self._mesh = mesh = devices.make_mesh(config.mesh)
        self._by_rows = devices.batch_sharding(mesh)
        replicated = devices.replicated(mesh)

        def create_state(*arguments):
            arrays = nnx.split(create(*arguments))[1]
            return TrainState(arrays, training.start_loss_scale(config))

        model, optimizer = nnx.eval_shape(create, *arguments)
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        self._flops_per_token = size.flops_per_token(self.parameters)
        self._graphdef = nnx.graphdef((model, optimizer))
        made = devices.create_sharded(create_state, arguments, mesh, SPLIT)
        self.state, places = made

        def step(leaves, windows, factors, look):
            state = jax.tree.unflatten(self._structure, leaves)
            state, metrics = training.train_step(
                self._graphdef, config, state, windows, factors, look
            )
            return jax.tree.leaves(state), metrics

        out_shardings = jax.tree.leaves(places), replicated
        self._train_step = jax.jit(
            step, donate_argnums=0, static_argnames="look", out_shardings=out_shardings
        )

        def losses(state, windows):
            """By window; NaN if anything in the parameters is not finite."""
            model = self._to_evaluate(state)
            size = optax.tree.norm(nnx.state(model, nnx.Param))
            return jnp.where(jnp.isfinite(size), window_losses(model, windows), jnp.nan)

        self._losses = jax.jit(losses, out_shardings=replicated)
        length = config.sample_tokens
        self._generate = jax.jit(
            lambda state, prompt: generate(
                self._to_evaluate(state), prompt, jax.random.key(config.seed), length
            ),
            out_shardings=replicated,
        )
        shape = size.context, config.batch_size
        self.tokens_per_step = math.prod(shape)
        self._corpus = corpus
        self._batches = data.Windows(corpus.train, *shape, config.seed)
        held_out = data.Windows(corpus.held_out, *shape, seed=0)
        self._held_out = [held_out(i) for i in range(config.eval_batches)]
        self._prompt = corpus.held_out[: size.context].astype(np.int32)
        faults = parse_faults(config.inject)
        self._injector = FaultInjector(faults, corpus.vocabulary)

    @property
    def state(self) -> TrainState:
        """Model and optimizer, with everything that is kept between steps."""
        return jax.tree.unflatten(self._structure, self._leaves)

    @state.setter
    def state(self, state: TrainState) -> None:
        # Passing a list to a compiled step is much faster than passing an NNX state.
        self._leaves, self._structure = jax.tree.flatten(state)

    def _merge(self, state: TrainState) -> tuple[GPT, nnx.Optimizer]:
        return nnx.merge(self._graphdef, state.arrays)

    def _to_evaluate(self, state: TrainState) -> GPT:
        return training.to_evaluate(self._config, *self._merge(state))

    def _windows(self, drawn: Drawn) -> np.ndarray:
        return self._injector.corrupt(self._batches(drawn.position), drawn.batch)

    def advance(self, drawn: Drawn) -> Metrics:
        """Trains on a batch; the metrics may not be ready yet."""
        factors = self._injector.factors(drawn.batch) if self._config.inject else {}
        look = devices.look(drawn.step, training.MEASURE_EVERY)
        step = functools.partial(self._train_step, look=look)
        step = self._injector.flipping(step, drawn.batch)
        every = self._config.verify_every
        if every and drawn.batch % every == 0:
            step = verified(step, self._structure, self._say)
        with jax.set_mesh(self._mesh):
            windows = devices.place(self._windows(drawn), self._by_rows)
            self._leaves, metrics = step(self._leaves, windows, factors)
        return metrics

    def speed(self, seconds: float) -> Row:
        """Tokens per second, and the share of the devices in use."""
        return pace.speed(self.tokens_per_step / seconds, self._flops_per_token)

    def _losses_of(self, windows: np.ndarray) -> np.ndarray:
        placed = devices.place(windows, self._by_rows)
        with jax.set_mesh(self._mesh):
            return jax.device_get(self._losses(self.state, placed))

    def examine(self, drawn: Drawn) -> list[Window]:
        """The windows of a batch, with their losses under the current parameters."""
        windows = self._windows(drawn)
        texts = map(self._corpus.decode, windows.tolist())
        origins = map(self._corpus.origin, self._batches.starts(drawn.position))
        losses = self._losses_of(windows).tolist()
        return list(map(Window, losses, map(console.printable, texts), origins))

    def evaluate(self) -> Row:
        """Evaluates the model on the held-out part."""
        loss = float(np.mean(list(map(self._losses_of, self._held_out))))
        bits = loss / math.log(2)
        measured = {"eval/loss": loss, "eval/bits": bits}
        if self._corpus.bytes_per_token is not None:
            measured["eval/bits_per_byte"] = bits / self._corpus.bytes_per_token
        return measured

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """The first held-out window, and the model's continuation of it."""
        return self._prompt, np.asarray(self._generate(self.state, self._prompt))

    def model(self) -> GPT:
        """The current model, with the parameters to evaluate."""
        return self._to_evaluate(self.state)

    def optimizer(self) -> nnx.Optimizer:
        """The current optimizer, with the metrics of its chain."""
        return self._merge(self.state)[1]

    def history(self) -> dict[str, np.ndarray]:
        """The history of the flight recorder, with the learning rate of each step."""
        if self._config.baseline:
            return {}
        kept = ost.history(self.optimizer())
        rates = jax.jit(training.make_schedule(self._config))(kept["step"])
        # The recorder counts from 0.
        return kept | {"learning_rate": np.asarray(rates), "step": kept["step"] + 1}


def run_training(
    config: Config,
    corpus: data.Corpus,
    create: Create,
    settings: dict[str, Any],
    fixed: Set[str] = FIXED,
    arguments: tuple = (),
) -> tuple[Run, Row]:
    """Trains a new run to its end, or resumes the one in ``--out``.

    All processes call it; only the first one writes and prints.

    Args:
      config: a checked configuration.
      corpus: the data to train on.
      create: returns a new model and its optimizer.
      settings: the settings, by flag; a run resumes only if they agree.
      fixed: the flags that can never differ.
      arguments: arrays, the arguments of ``create``.

    Returns:
      The run, and the measurements of the last step and the last evaluation, by name.

    Raises:
      InputError: the output folder cannot be used.
      FailedError: the run diverged for good, or could not be saved.
      KeyboardInterrupt: a stop was requested; the run has saved a checkpoint.
    """
    vocabulary = max(SIZES[config.size].vocabulary, corpus.vocabulary)
    about = {"settings": settings, "corpus": [corpus.name, len(corpus.train)]}
    about["vocabulary"] = vocabulary
    rules = {"free": FREE, "fixed": fixed, "defaults": default_values}
    same = functools.partial(resuming.check_resume, config.resume, **rules)
    with contextlib.ExitStack() as stack:
        keep, on_finding = config.keep_checkpoints, config.on_finding
        folder = resuming.open_folder(config.out, about, same, keep, on_finding)
        saved, newest, files = stack.enter_context(folder)
        shown = config.steps, config.log_every, corpus.unit, newest
        screen = console.Screen(*shown, quiet=not devices.is_first())
        stack.callback(screen.close)
        stop = stack.enter_context(ost.StopRequest(at_once=end_at_once))
        run = Run(config, corpus, create, arguments, screen.say)
        policy = None
        if config.rewind and not config.baseline:
            back, ahead = config.rewind_steps, config.skip_batches
            policy = ost.RewindPolicy(back, ahead, config.max_rewinds)
        every = config.eval_every, config.checkpoint_every, config.histogram_every
        schedule = Schedule(config.steps, *every)
        kept = config.out / "flagged" if devices.is_first() else None
        more = {"about": about, "policy": policy, "keep_flagged": kept}
        loop = TrainingLoop(run, saved, schedule, [*files, screen], **more)
        model = f"GPT {config.size}, {console.count(run.parameters)} parameters"
        title = f"{model} · {corpus} · {devices.describe(config.mesh)}"
        screen.say("\n".join([title, *corpus.left_out]), "bold")
        for fault in ost.check(run.optimizer()):
            screen.say(f"order of the chain: {fault}", "bold red")
        if newest:
            loop.resume(newest)
            left = loop.step < config.steps
            does = "resuming from there" if left else "nothing is left to do"
            screen.say(f"{config.out} is at step {loop.step}: {does}", "bold")
        with console.explaining(config.out, title, run.history, screen):
            loop.train(stop)
    if stop.requested:
        saved_at = f"{stop.requested}: saved at step {loop.step}"
        screen.say(f"{saved_at}; the same command resumes the run", "bold")
        raise KeyboardInterrupt
    if not config.baseline:
        screen.say(str(ost.noise_scale(run.optimizer())))
    if config.sample_tokens:
        screen.sample(*(corpus.decode(part.tolist()) for part in run.sample()))
    return run, loop.row


def train(config: Config) -> Row:
    """Trains a GPT with these settings; returns the last row of ``run_training``."""
    devices.join(config.processes)
    check(config)
    size = SIZES[config.size]
    corpus = data.load(config.data, size.context, config.tokenizer)
    vocabulary = max(size.vocabulary, corpus.vocabulary)
    create = functools.partial(training.create, config, vocabulary)
    return run_training(config, corpus, create, resuming.as_json(config))[1]


def main() -> None:
    """Runs the command line."""
    run_command(lambda: train(tyro.cli(Config)))


if __name__ == "__main__":
    main()

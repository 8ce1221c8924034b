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
import numpy as np
import tyro
from flax import nnx

import optax_stability as ost

sys.path.append(str(Path(__file__).parents[1]))  # for modules that the examples share
import alerts
import console
import data
import devices
import faults
import training
import writers
from checkpoints import Checkpoints
from config import FIXED, FREE, Config, check
from input_error import InputError
from model import GPT, SIZES, SPLIT, generate, next_token_loss
from resuming import as_json, check_resume
from stopping import StopRequest
from trainer import DivergedError, Metrics, Row, Schedule, Trainer
from training import TrainState

Create = Callable[..., tuple[GPT, nnx.Optimizer]]


class Run:
    """The state of a run, and the compiled functions that use it."""

    def __init__(
        self, config: Config, corpus: data.Corpus, create: Create, arguments: tuple = ()
    ):
        """Creates the model and its optimizer; each device creates its own part.

        ``create(*arguments)`` returns a new model and its optimizer.
        """
        self._config, size = config, SIZES[config.size]
        self.step = self.batch = 0
        self._mesh = mesh = devices.make_mesh(config.mesh)
        self._by_rows = devices.batch_sharding(mesh)
        replicated = devices.replicated(mesh)

        def create_state(*arguments):
            arrays = nnx.split(create(*arguments))[1]
            return TrainState(arrays, training.start_loss_scale(config))

        model, optimizer = nnx.eval_shape(create, *arguments)
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        self.flops_per_token = size.flops_per_token(self.parameters)
        self._graphdef = nnx.graphdef((model, optimizer))
        made = devices.create_sharded(create_state, arguments, mesh, SPLIT)
        self.state, places = made

        def step(leaves, windows, factors):
            state = jax.tree.unflatten(self._structure, leaves)
            state, metrics = training.train_step(
                self._graphdef, config, state, windows, factors
            )
            return jax.tree.leaves(state), metrics

        self._train_step = jax.jit(
            step, donate_argnums=0, out_shardings=(jax.tree.leaves(places), replicated)
        )
        self._loss = jax.jit(
            lambda state, x: next_token_loss(self._to_evaluate(state), x),
            out_shardings=replicated,
        )
        length = config.sample_tokens
        self._generate = jax.jit(
            lambda state, prompt: generate(
                self._to_evaluate(state), prompt, jax.random.key(config.seed), length
            ),
            out_shardings=replicated,
        )
        shape = size.context, config.batch_size
        self.tokens_per_step = math.prod(shape)
        self._bytes_per_token = corpus.bytes_per_token
        self._batches = data.batches(corpus.train, *shape, config.seed)
        held_out = data.batches(corpus.held_out, *shape, seed=0)
        self._held_out = [held_out(i) for i in range(config.eval_batches)]
        self._prompt = corpus.held_out[: size.context].astype(np.int32)
        self._injector = faults.Injector(faults.parse(config.inject), corpus.vocabulary)

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

    def advance(self) -> Metrics:
        """Trains on the next batch; the metrics may not be ready yet."""
        windows = self._injector.corrupt(self._batches(self.batch), self.batch + 1)
        factors = self._injector.factors(self.batch + 1) if self._config.inject else {}
        windows = devices.place(windows, self._by_rows)
        with jax.set_mesh(self._mesh):
            self._leaves, metrics = self._train_step(self._leaves, windows, factors)
        self.step, self.batch = self.step + 1, self.batch + 1
        return metrics

    def evaluate(self) -> Row:
        """Evaluates the model on the held-out part."""
        windows = [devices.place(each, self._by_rows) for each in self._held_out]
        with jax.set_mesh(self._mesh):
            losses = jax.device_get([self._loss(self.state, each) for each in windows])
        loss = float(np.mean(losses))
        bits = loss / math.log(2)
        measured = {"eval/loss": loss, "eval/bits": bits}
        if self._bytes_per_token is not None:
            measured["eval/bits_per_byte"] = bits / self._bytes_per_token
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
        kept = ost.history(self.optimizer())
        rates = np.asarray(training.make_schedule(self._config)(kept["step"]))
        # The recorder counts from 0.
        return kept | {"learning_rate": rates, "step": kept["step"] + 1}


def _show(config: Config, run: Run, corpus: data.Corpus, screen: console.Screen):
    """Prints the results of the run: the noise scale, and a sample of text."""
    if not config.baseline:
        screen.say(str(ost.noise_scale(run.optimizer())))
    if config.sample_tokens:
        prompt, written = (corpus.decode(part.tolist()) for part in run.sample())
        screen.sample(prompt, written)


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
      DivergedError: the loss diverged more often than ``max_rewinds`` allows.
      KeyboardInterrupt: a stop was requested; the run has saved a checkpoint.
    """
    vocabulary = max(SIZES[config.size].vocabulary, corpus.vocabulary)
    about = {"settings": settings, "corpus": [corpus.name, len(corpus.train)]}
    about["vocabulary"] = vocabulary
    names = "log.jsonl", "training.png", "report.html"
    log, picture, report = (config.out / name for name in names)
    with contextlib.ExitStack() as stack:
        try:
            folder = config.out / "checkpoints"
            saved = stack.enter_context(Checkpoints(folder, config.keep_checkpoints))
            newest = next(iter(saved.available()), None)
            check_resume(
                config.resume, config.out, about, newest, free=FREE, fixed=fixed
            )
            step, batch = (newest[key] if newest else None for key in ("step", "batch"))
            files = []
            if devices.is_first():
                board = config.out / "tensorboard"
                files.append(writers.JsonLines(log, resume_after=batch))
                files.append(writers.TensorBoard(board, resume_after_step=step))
                files += alerts.on_finding(config.on_finding)
        except OSError as error:
            reason = f"cannot write to {config.out} ({error.strerror})"
            raise InputError(f"--out: {reason}; give another folder") from error
        shown = config.steps, config.log_every, corpus.unit, newest
        screen = console.Screen(*shown, quiet=not devices.is_first())
        writer = stack.enter_context(writers.Several(*files, screen))
        stop = stack.enter_context(StopRequest())
        run = Run(config, corpus, create, arguments)
        back, ahead = config.rewind_steps, config.skip_batches
        policy = ost.RewindPolicy(back, ahead, config.max_rewinds)
        policy = policy if config.rewind and not config.baseline else None
        every = config.eval_every, config.checkpoint_every, config.histogram_every
        schedule = Schedule(config.steps, *every)
        trainer = Trainer(schedule, run, saved, writer, about, policy)
        title = (
            f"GPT {config.size}, {console.count(run.parameters)} parameters · "
            f"{corpus.name}, {console.count(len(corpus.train))} {corpus.unit}s · "
            f"{jax.device_count()} {jax.default_backend()}"
            + (f" as {config.mesh}" if config.mesh else "")
        )
        screen.say(title, "bold")
        if newest:
            trainer.resume(newest)
            screen.say(f"{config.out} is at step {step}: resuming from there", "bold")
        try:
            trainer.train(stop)
        finally:  # A report is needed most after a crash.
            kept = {} if config.baseline else run.history()
            if devices.is_first():
                kept = kept or writers.read_json_lines(log)
                ost.write_report(kept, report, title=title)
    if stop.requested:
        saved_at = f"{stop.requested}: saved at step {run.step}"
        screen.say(f"{saved_at}; the same command resumes the run", "bold")
        raise KeyboardInterrupt
    _show(config, run, corpus, screen)
    if devices.is_first():
        ost.plot_history(writers.read_json_lines(log), picture)
    for finding in ost.diagnose(kept):
        screen.say(str(finding), "bold")
    screen.say(f"log {log}   picture {picture}   report {report}")
    return run, trainer.row


def train(config: Config) -> Row:
    """Trains a GPT with these settings; returns the last row of ``run_training``."""
    devices.join(config.processes)
    check(config)
    size = SIZES[config.size]
    corpus = data.load(config.data, size.context, config.tokenizer)
    vocabulary = max(size.vocabulary, corpus.vocabulary)
    create = functools.partial(training.create, config, vocabulary)
    return run_training(config, corpus, create, as_json(config))[1]


def run_command(work: Callable[[], object]) -> None:
    """Runs a command; an error that the user can correct is printed as one line."""
    try:
        work()
    except (InputError, DivergedError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Runs the command line."""
    run_command(lambda: train(tyro.cli(Config)))


if __name__ == "__main__":
    main()

"""Trains a GPT through a stability chain, on whatever this computer has.

    python examples/gpt/train.py                       # tiny, two CPU cores, 2 minutes
    python examples/gpt/train.py --data my_book.txt    # your own text
    python examples/gpt/train.py --size gpt2 --dtype bfloat16 --data train.bin
    python examples/gpt/train.py --mesh data=4,model=2 # on eight devices

A small GPT learns to write, byte by byte, from the sources of Python's standard
library. The library is in ``training.py``; here is the run around it. The same command
again goes on where the run was interrupted, whatever interrupted it.
"""

import contextlib
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

sys.path.append(str(Path(__file__).parents[1]))  # for what the examples share
import console
import data
import devices
import faults
import training
import writers
from checkpoints import Checkpoints
from config import FIXED, FREE, Config, check
from input_error import InputError
from model import GPT, SIZES, SPLIT, next_token_loss, write_on
from resuming import as_json, check_resume
from stopping import StopRequest
from trainer import DivergedError, Metrics, Row, Schedule, Trainer
from training import TrainState

Create = Callable[..., tuple[GPT, nnx.Optimizer]]


class Run:
    """The state of a run, and the compiled functions that use it."""

    def __init__(
        self, config: Config, corpus: data.Corpus, create: Create, given: tuple = ()
    ):
        """Makes the model and its optimizer, each device its part of them.

        Args:
          config: checked.
          corpus: what to train on.
          create: makes them, of what is given.
          given: arrays.
        """
        self._config, size = config, SIZES[config.size]
        self.step = self.batch = 0
        self._mesh = mesh = devices.make_mesh(config.mesh)
        everywhere, self._by_rows = devices.everywhere(mesh), devices.by_rows(mesh)

        def begin(*given):
            arrays = nnx.split(create(*given))[1]
            return TrainState(arrays, training.start_loss_scale(config))

        model, optimizer = nnx.eval_shape(create, *given)
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        self.flops_per_token = size.flops_per_token(self.parameters)
        self._graphdef = nnx.graphdef((model, optimizer))
        self.state, lie = devices.make_split(begin, given, mesh, SPLIT)

        def step(leaves, windows, factors):
            state = jax.tree.unflatten(self._structure, leaves)
            state, metrics = training.train_step(
                self._graphdef, config, state, windows, factors
            )
            return jax.tree.leaves(state), metrics

        self._train_step = jax.jit(
            step, donate_argnums=0, out_shardings=(jax.tree.leaves(lie), everywhere)
        )
        self._loss = jax.jit(
            lambda state, x: next_token_loss(self._to_evaluate(state), x),
            out_shardings=everywhere,
        )
        length = config.sample_tokens
        self._write_on = jax.jit(
            lambda state, prompt: write_on(
                self._to_evaluate(state), prompt, jax.random.key(config.seed), length
            ),
            out_shardings=everywhere,
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
        """All that is trained and kept between steps."""
        return jax.tree.unflatten(self._structure, self._leaves)

    @state.setter
    def state(self, state: TrainState) -> None:
        # A list is handed to a compiled step much faster than a state of NNX.
        self._leaves, self._structure = jax.tree.flatten(state)

    def _merge(self, state: TrainState) -> tuple[GPT, nnx.Optimizer]:
        return nnx.merge(self._graphdef, state.arrays)

    def _to_evaluate(self, state: TrainState) -> GPT:
        return training.to_evaluate(self._config, *self._merge(state))

    def advance(self) -> Metrics:
        """Trains on the next batch; the metrics may still be on their way."""
        windows = self._injector.corrupt(self._batches(self.batch), self.batch + 1)
        factors = self._injector.factors(self.batch + 1) if self._config.inject else {}
        windows = devices.place(windows, self._by_rows)
        with jax.set_mesh(self._mesh):
            self._leaves, metrics = self._train_step(self._leaves, windows, factors)
        self.step, self.batch = self.step + 1, self.batch + 1
        return metrics

    def evaluate(self) -> Row:
        """Measures the model as it is now."""
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
        """The first held-out window, and how the model goes on from it."""
        return self._prompt, np.asarray(self._write_on(self.state, self._prompt))

    def model(self) -> GPT:
        """The one to evaluate, as it is now."""
        return self._to_evaluate(self.state)

    def optimizer(self) -> nnx.Optimizer:
        """With the numbers that the chain has kept."""
        return self._merge(self.state)[1]

    def history(self) -> dict[str, np.ndarray]:
        """What the flight recorder has kept, with the learning rate of each step."""
        kept = ost.history(self.optimizer())
        rates = np.asarray(training.make_schedule(self._config)(kept["step"]))
        # The recorder counts from 0.
        return kept | {"learning_rate": rates, "step": kept["step"] + 1}


def _show(config: Config, run: Run, corpus: data.Corpus, screen: console.Screen):
    """What came of the run: its noise, and what it writes."""
    if not config.baseline:
        screen.say(str(ost.noise_scale(run.optimizer())))
    if config.sample_tokens:
        prompt, written = (corpus.decode(part.tolist()) for part in run.sample())
        screen.sample(prompt, written)


def drive(
    config: Config,
    corpus: data.Corpus,
    create: Create,
    settings: dict[str, Any],
    fixed: Set[str] = FIXED,
    given: tuple = (),
) -> tuple[Run, Row]:
    """Trains what ``create`` makes, or what ``--out`` holds of it, to the end.

    All processes do the same; the first one writes and prints.

    Args:
      config: a checked configuration.
      corpus: what to train on.
      create: makes a new model and its optimizer, of what is given.
      settings: what a run must agree in to be gone on with, by flag.
      fixed: the flags of those that can never differ.
      given: arrays for ``create``.

    Returns:
      The run, and what the last step and the last evaluation measured, by name.

    Raises:
      InputError: the output folder cannot be used.
      DivergedError: the loss ran away once too often.
      KeyboardInterrupt: it was asked to stop, and did, after it had saved.
    """
    vocabulary = max(SIZES[config.size].vocabulary, corpus.vocabulary)
    about = {"settings": settings, "corpus": [corpus.name, len(corpus.train)]}
    about["vocabulary"] = vocabulary
    log, picture, report = (
        config.out / name for name in ("log.jsonl", "training.png", "report.html")
    )
    with contextlib.ExitStack() as stack:
        try:
            folder = config.out / "checkpoints"
            saved = stack.enter_context(Checkpoints(folder, config.keep_checkpoints))
            newest = next(iter(saved.line()), None)
            check_resume(
                config.resume, config.out, about, newest, free=FREE, fixed=fixed
            )
            step, batch = (newest[key] if newest else None for key in ("step", "batch"))
            files = []
            if devices.is_first():
                board = config.out / "tensorboard"
                files.append(writers.JsonLines(log, resume_after=batch))
                files.append(writers.TensorBoard(board, resume_after_step=step))
        except OSError as error:
            reason = f"cannot write to {config.out} ({error.strerror})"
            raise InputError(f"--out: {reason}; give another folder") from error
        shown = config.steps, config.log_every, corpus.unit, newest
        screen = console.Screen(*shown, quiet=not devices.is_first())
        writer = stack.enter_context(writers.Several(*files, screen))
        stop = stack.enter_context(StopRequest())
        run = Run(config, corpus, create, given)
        policy = None
        if config.rewind and not config.baseline:
            back, ahead = config.rewind_steps, config.skip_batches
            policy = ost.RewindPolicy(back, ahead, config.max_rewinds)
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
            screen.say(f"{config.out} is at step {step}: going on from there", "bold")
        try:
            trainer.train(stop)
        finally:  # Also on a crash: then it is needed most.
            kept = {} if config.baseline else run.history()
            if devices.is_first():
                kept = kept or writers.read_json_lines(log)
                ost.write_report(kept, report, title=title)
    if stop.requested:
        say = f"{stop.requested}: saved at step {run.step}; the same command goes on"
        screen.say(say, "bold")
        raise KeyboardInterrupt
    _show(config, run, corpus, screen)
    if devices.is_first():
        ost.plot_history(writers.read_json_lines(log), picture)
    for finding in ost.diagnose(kept):
        screen.say(str(finding), "bold")
    screen.say(f"log {log}   picture {picture}   report {report}")
    return run, trainer.row


def train(config: Config) -> Row:
    """Trains a new GPT as the settings say; what it raises and returns: see drive."""
    devices.join(config.processes)
    check(config)
    size = SIZES[config.size]
    corpus = data.load(config.data, size.context, config.tokenizer)
    vocabulary = max(size.vocabulary, corpus.vocabulary)

    def create() -> tuple[GPT, nnx.Optimizer]:
        return training.create(config, vocabulary)

    return drive(config, corpus, create, as_json(config))[1]


def run_command(work: Callable[[], object]) -> None:
    """Does the work of a command line; what the user can mend is said in one line."""
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

"""Trains a GPT through a stability chain, on whatever this computer has.

    python examples/gpt/train.py                       # tiny, two CPU cores, 2 minutes
    python examples/gpt/train.py --data my_book.txt    # your own text
    python examples/gpt/train.py --size gpt2 --bf16 --data train.bin   # nanoGPT's data

A small GPT learns to write, byte by byte, from the sources of Python's standard
library. The library is in one place, ``make_optimizer``; the rest is a trainer.
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_stability as ost
from optax_stability.flax import microbatch_gradients

sys.path.append(str(Path(__file__).parents[1]))  # for writers.py
import data
import display
import writers
from data import InputError
from model import GPT, SIZES, next_token_loss

Metrics = dict[str, jax.Array]
Row = dict[str, float]

TEMPERATURE = 0.8
# Steps that the flight recorder keeps, and between measurements that cost passes.
HISTORY, SELDOM = 1000, 10
# What is shown of the optimizer, as far as the chain has it.
SHOWN = """grad/norm clip/fraction skip/skipped skip/total when_noisy/active
noise_scale/b_simple noise_scale/low noise_scale/high noise_scale/noise_to_weight"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a GPT on text, through a chain that keeps it stable."""

    size: Annotated[str, tyro.conf.arg(metavar="{tiny,small,gpt2}")] = "tiny"
    """Shape of the model: about 1, 11 or 124 million parameters."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Text file, folder of text, or nanoGPT's .bin; by default Python's own library."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 8
    """Windows of text per step; a multiple of the number of devices."""
    microbatches: int = 4
    """Parts of a batch that are evaluated one by one; a bad one is left out."""
    learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Peak of the schedule. By default what suits the size: 3e-3, 1e-3 or 6e-4."""
    min_learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Where the cosine ends. By default a tenth of the peak."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.1
    """Decay of the matrices; vectors do not decay."""
    guard: bool = True
    """Skip steps whose loss or gradient is not finite or far above the recent past."""
    clip_after_warmup: bool = False
    """Clip gradients only once the warm-up is over."""
    clip_when_noisy: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Clip only while the noise scale is above this, in examples: windows of text."""
    bf16: bool = False
    """Compute in bfloat16; parameters and their statistics stay float32."""
    eval_every: int = 100
    """Steps from one evaluation on held-out text to the next."""
    eval_batches: int = 16
    """Batches per evaluation, the same ones every time."""
    log_every: int = 10
    """Steps between log lines, where the output is not a terminal."""
    histogram_every: int = 0
    """Steps between histograms of the gradient in TensorBoard, by layer; 0 for none."""
    sample_tokens: int = 300
    """Length of the text that the model writes at the end; 0 for none."""
    seed: int = 0
    """Decides the initial parameters, the order of the data and the sample."""
    out: Path = Path("runs/gpt")
    """Folder for log.jsonl, training.png, report.html and TensorBoard."""


def check(config: Config) -> None:
    """Raises InputError for a setting that cannot work, before any work is done."""

    def require(holds: bool, field: str, remedy: str) -> None:
        if not holds:
            flag, value = field.replace("_", "-"), getattr(config, field)
            raise InputError(f"--{flag}: {value} {remedy}")

    require(config.size in SIZES, "size", f"is no size; choose from {', '.join(SIZES)}")
    counts = "steps batch_size microbatches eval_every eval_batches log_every"
    for field in counts.split():
        require(getattr(config, field) > 0, field, "is too small; give 1 or more")
    sizes = "warmup_steps weight_decay sample_tokens seed histogram_every"
    for field in f"{sizes} clip_when_noisy".split():
        holds = 0 <= (getattr(config, field) or 0) < math.inf
        require(holds, field, "is out of range; give a number from 0 up")
    steps, devices, peak = config.steps, jax.device_count(), config.learning_rate
    remedy = f"leaves no step to train; give fewer than the {steps} of --steps"
    require(config.warmup_steps < steps, "warmup_steps", remedy)
    remedy = f"cannot be shared by {devices} devices; give a multiple of {devices}"
    require(config.batch_size % devices == 0, "batch_size", remedy)
    remedy = f"does not divide the {config.batch_size} windows of --batch-size"
    require(config.batch_size % config.microbatches == 0, "microbatches", remedy)
    require(peak is None or peak > 0, "learning_rate", "is no rate; give one above 0")


def make_schedule(config: Config) -> optax.Schedule:
    """A linear rise to the peak, then a cosine down to the floor."""
    peak = config.learning_rate or SIZES[config.size].learning_rate
    floor = config.min_learning_rate
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / max(1, config.warmup_steps),  # 0 would waste the first step
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=peak / 10 if floor is None else floor,
    )


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """The stability chain: look at the gradient; leave it out, or clip it and step.

    The noise scale is learned inside the guard, from the steps that are taken. Around
    all a flight recorder, for the report. The parts have names, so that ``adopt_state``
    finds them when one is added.
    """
    clip = ost.clip_by_zscore()
    if config.clip_after_warmup:
        clip = optax.conditionally_transform(
            clip, lambda step, **_: jnp.asarray(step) >= config.warmup_steps
        )
    noise, level = ost.estimate_noise_scale(scope="global"), config.clip_when_noisy
    parts = [("noise", noise), ("clip", clip)]
    if level is not None:
        parts = [("clip", ost.when_noisy(clip, above=level, estimator=noise))]
    adamw = ost.safe_adamw(
        make_schedule(config),
        b1=0.9,
        b2=0.95,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    update = ost.record("update", ratio_to_params=True, every=SELDOM)
    step = optax.named_chain(*parts, ("adamw", adamw), ("update", update))
    if config.guard:
        step = ost.spike_guard(step)
    histograms = config.histogram_every
    looks = {
        "record": ost.record(
            "grad", every=histograms or SELDOM, histogram=histograms > 0
        ),
        "params": ost.record("params", of="params", spectral=True, every=SELDOM),
    }
    chain = optax.named_chain(*looks.items(), ("step", step))
    return ost.record_history(chain, length=HISTORY, slow_every=SELDOM)


def create(config: Config, vocabulary: int) -> tuple[GPT, nnx.Optimizer]:
    """A new model and its optimizer."""
    dtype = jnp.bfloat16 if config.bf16 else jnp.float32
    model = GPT(SIZES[config.size], vocabulary, dtype, nnx.Rngs(config.seed))
    optimizer = nnx.Optimizer(model, make_optimizer(config), wrt=nnx.Param)
    return model, optimizer


def train_step(
    graphdef: Any, config: Config, state: Any, windows: jax.Array
) -> tuple[Any, Metrics]:
    """One step of training, as a pure function of the state."""
    model, optimizer = nnx.merge(graphdef, state)
    learning_rate = make_schedule(config)(optimizer.step[...])
    parts = config.microbatches
    gradients = microbatch_gradients(next_token_loss, parts, vmap_size=1)
    loss, grads, moments = gradients(model, windows)
    optimizer.update(model, grads, value=loss, moments=moments)
    params = nnx.state(model, nnx.Param)
    measured = ost.metrics(optimizer.opt_state, params=params)
    limit = measured["clip/limit"]  # 0 before a clip is switched on
    clips = (limit > 0) & measured.get("when_noisy/active", True)
    metrics = {
        "loss": loss,
        "learning_rate": learning_rate,
        "clip/limit": jnp.where(clips, limit, jnp.inf),
        "microbatches/rejected": parts - moments.num_microbatches,
    }
    metrics |= {
        key: x
        for key, x in measured.items()
        if key in SHOWN.split() or key.startswith("grad/histogram")
    }
    # The donated state comes first and in the order it came in: XLA hands buffers on
    # in order of appearance, and would have to copy if they were out of order.
    return nnx.state((model, optimizer)), metrics


def write_on(graphdef: Any, length: int, state: Any, prompt: jax.Array, key: jax.Array):
    """Continues a prompt that fills the context by ``length`` tokens.

    The window slides and is read anew for every token: slow, but short.
    """
    model, _ = nnx.merge(graphdef, state)

    def append(i, carry):
        window, written = carry
        logits = model(window[None])[0, -1] / TEMPERATURE
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return jnp.append(window[1:], token), written.at[i].set(token)

    nothing = jnp.zeros(length, prompt.dtype)
    return jax.lax.fori_loop(0, length, append, (prompt, nothing))[1]


class Run:
    """The state of a run, and the compiled functions that use it.

    Every device holds the whole state and computes its share of each batch.
    """

    def __init__(self, config: Config, corpus: data.Corpus):
        """Initialises the model for a checked configuration."""
        self._config, size = config, SIZES[config.size]
        vocabulary = max(size.vocabulary, corpus.vocabulary)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._shared_out = NamedSharding(mesh, PartitionSpec("data"))

        # Compiled: much faster than op by op.
        model, optimizer = nnx.jit(lambda: create(config, vocabulary))()
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        self._graphdef, state = nnx.split((model, optimizer))
        self.state = jax.device_put(state, everywhere)

        step = functools.partial(train_step, self._graphdef, config)
        self._train_step = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
        self._eval_step = jax.jit(
            lambda state, x: next_token_loss(nnx.merge(self._graphdef, state)[0], x)
        )
        write = functools.partial(write_on, self._graphdef, config.sample_tokens)
        self._write_on = jax.jit(write)

        shape = size.context, config.batch_size
        self.tokens_per_step = math.prod(shape)
        self._batch = data.batches(corpus.train, *shape, config.seed)
        held_out = data.batches(corpus.held_out, *shape, seed=0)
        self._held_out = [held_out(i) for i in range(config.eval_batches)]
        self._prompt = corpus.held_out[: size.context].astype(np.int32)
        self._sample_key = jax.random.key(config.seed)

    def step(self, step: int) -> Metrics:
        """Trains on batch ``step``; the metrics may still be on their way."""
        windows = jax.device_put(self._batch(step), self._shared_out)
        self.state, metrics = self._train_step(self.state, windows)
        return metrics

    def evaluate(self) -> Row:
        """Measures the model as it is now."""
        windows = jax.device_put(self._held_out, self._shared_out)
        losses = [self._eval_step(self.state, each) for each in windows]
        loss = float(np.mean(jax.device_get(losses)))
        return {"eval/loss": loss, "eval/bits": loss / math.log(2)}

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """The first held-out window, and how the model goes on from it."""
        written = self._write_on(self.state, self._prompt, self._sample_key)
        return self._prompt, np.asarray(written)

    def noise_scale(self) -> ost.NoiseScale:
        """What the microbatches told about the noise of the gradient."""
        return ost.noise_scale(nnx.merge(self._graphdef, self.state)[1])

    def history(self) -> dict[str, np.ndarray]:
        """What the flight recorder has kept, with the learning rate of each step."""
        kept = ost.history(nnx.merge(self._graphdef, self.state)[1])
        rates = np.asarray(make_schedule(self._config)(kept["step"]))
        return kept | {"learning_rate": rates}


def _loop(config: Config, run: Run, writer: writers.Writer) -> Row:
    """Trains to the last step; returns what it and the last evaluation said."""

    def report(step: int, metrics: Metrics) -> Row:
        found = jax.device_get(metrics)
        numbers = {key: float(x) for key, x in found.items() if x.ndim == 0}
        row = {"tokens": step * run.tokens_per_step} | numbers
        writer.write(step, row)
        # The first step is the recorder's step 0, at which it measures.
        if config.histogram_every and (step - 1) % config.histogram_every == 0:
            histograms = {key: x for key, x in found.items() if x.ndim}
            writer.write_histograms(step, histograms)
        return row

    row: Row = {}
    pending: tuple[int, Metrics] | None = None
    for step in range(1, config.steps + 1):
        metrics = run.step(step - 1)
        # One step late: the device has its next step before the host waits for it.
        if pending is not None:
            report(*pending)
        pending = step, metrics
        if step % config.eval_every == 0 or step == config.steps:
            row, pending = report(*pending), None
            evaluation = {"tokens": row["tokens"]} | run.evaluate()
            writer.write(step, evaluation)
            row |= evaluation
    return row


def train(config: Config) -> Row:
    """Trains as the settings say, showing and logging what happens.

    Returns:
      What the last step and the last evaluation measured, by name.

    Raises:
      InputError: a setting, the data or the output folder cannot be used.
    """
    check(config)
    corpus = data.load(config.data, SIZES[config.size].context)
    log, picture, report = (
        config.out / name for name in ("log.jsonl", "training.png", "report.html")
    )
    try:
        files = writers.JsonLines(log), writers.TensorBoard(config.out / "tensorboard")
    except OSError as error:
        reason = f"cannot write to {config.out} ({error.strerror})"
        raise InputError(f"--out: {reason}; give another folder") from error
    screen = display.Screen(config.steps, config.log_every, corpus.unit)
    with writers.Several(*files, screen) as writer:
        run = Run(config, corpus)
        title = (
            f"GPT {config.size}, {display.count(run.parameters)} parameters · "
            f"{corpus.name}, {display.count(len(corpus.train))} {corpus.unit}s · "
            f"{jax.device_count()} {jax.default_backend()}"
        )
        screen.say(title, "bold")
        try:
            row = _loop(config, run, writer)
        finally:  # Also on a crash, or Ctrl-C: then it is needed most.
            ost.write_report(run.history(), report, title=title)
    screen.say(str(run.noise_scale()))
    if config.sample_tokens:
        prompt, written = (corpus.decode(part.tolist()) for part in run.sample())
        screen.sample(prompt, written)
    ost.plot_history(writers.read_json_lines(log), picture)
    for finding in ost.diagnose(run.history()):
        screen.say(str(finding), "bold")
    screen.say(f"log {log}   picture {picture}   report {report}")
    return row


def main() -> None:
    """Runs the command line."""
    try:
        train(tyro.cli(Config))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()

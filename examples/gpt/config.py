"""The settings of a run, which are also its command-line flags."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import devices
from inputs import InputError, Resume, flag
from model import SIZES

from optax_stability.faults import parse_faults

# Settings that may differ when a run resumes. They do not affect its training, except
# for the checkpoint that a rewind returns to.
FREE = {"resume", "out", "eval_every", "eval_batches", "log_every", "sample_tokens"}
FREE |= {"checkpoint_every", "keep_checkpoints", "mesh", "processes"}
FREE |= {"verify_every", "on_finding"}
# Settings that may never differ: they determine the structure of the state.
FIXED = {"size", "tokenizer", "on_spike", "baseline", "clip_after_warmup", "inject"}
FIXED |= {"clip_when_noisy", "histogram_every", "dtype", "optimizer", "qk_norm"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a GPT on text, with a chain that keeps it stable.

    The same command, given again, resumes a run that was interrupted.
    """

    size: Literal["tiny", "small", "gpt2"] = "tiny"
    """Shape of the model: about 1, 11 or 124 million parameters."""
    data: Path | None = None
    """Text file, folder of text, or nanoGPT's .bin; by default Python's own library."""
    tokenizer: Path | None = None
    """Tokenizer file, tokenizer.json or *.tiktoken; by default each byte is a token."""
    qk_norm: bool = False
    """Normalise queries and keys: their size then does not affect attention."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 8
    """Windows of text per step; a multiple of the parts that --mesh splits it into."""
    microbatches: int = 4
    """Parts of a batch that are evaluated one by one; a non-finite part is left out."""
    learning_rate: float | None = None
    """Peak of the schedule. The default depends on the size: 3e-3, 1e-3 or 6e-4."""
    min_learning_rate: float | None = None
    """Where the cosine ends. By default a tenth of the peak."""
    warmup_steps: int | None = None
    """Steps in which the rate rises to its peak; by default a tenth, at most 50."""
    weight_decay: float = 0.1
    """Decay of the matrices; vectors do not decay."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon trains the matrices inside the blocks; everything else is Adam's."""
    gradient_penalty: float = 0.0
    """Weight of the gradient's norm in the loss; makes a step over 3 times as long."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation; parameters and their statistics stay float32."""
    on_spike: Literal["skip", "branch", "rewind"] = "skip"
    """Skip the step; or continue in a branch that can be undone; or only rewind."""
    clip_after_warmup: bool = False
    """Clip gradients only once the warm-up is over."""
    clip_when_noisy: float | None = None
    """Clip only while the noise scale is above this number of examples (windows)."""
    rewind: bool = True
    """Return to a checkpoint when the loss diverges; continue with other batches."""
    max_rewinds: int = 3
    """Number of rewinds before the run gives up."""
    rewind_steps: int = 100
    """Steps to go back before the divergence."""
    skip_batches: int = 200
    """Batches to skip after a rewind."""
    baseline: bool = False
    """Plain optax instead: global-norm clipping and AdamW, no reaction to a spike."""
    verify_every: int = 0
    """Steps between those that are run twice and compared bit by bit; 0 for none."""
    inject: tuple[str, ...] = ()
    """Faults to inject, nan@300 or bytes@200x5; see optax_stability.faults."""
    mesh: str | None = None
    """How the devices share the work, as data=4,model=2; by default all as data."""
    processes: str | None = None
    """For several processes: auto, or HOST:PORT,INDEX/COUNT; see devices.py."""
    resume: Resume = "auto"
    """Resume the run in --out, if there is one; changed: also with other settings."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next."""
    keep_checkpoints: int = 5
    """Number of checkpoints to keep, in addition to the best one."""
    eval_every: int = 100
    """Steps from one evaluation on held-out text to the next."""
    eval_batches: int = 16
    """Batches per evaluation, the same ones every time."""
    log_every: int = 10
    """Steps between log lines, if the output is not a terminal."""
    histogram_every: int = 0
    """Steps between histograms of the gradient in TensorBoard, by layer; 0 for none."""
    sample_tokens: int = 300
    """Length of the text that the model writes at the end; 0 for none."""
    seed: int = 0
    """Decides the initial parameters, the order of the data and the sample."""
    on_finding: str | None = None
    """A command to run for each new finding, with it as JSON on its input."""
    out: Path = Path("runs/gpt")
    """Folder for log.jsonl, checkpoints, training.png, report.html and TensorBoard."""

    def value(self, field: str) -> float:
        """A setting, or what it stands for if it is None."""
        given = getattr(self, field)
        return default_values(vars(self))[field] if given is None else given


def default_values(settings: Mapping[str, Any]) -> dict[str, float]:
    """What the settings that are None stand for."""
    usual = SIZES[settings["size"]].learning_rate
    floor = (settings["learning_rate"] or usual) / 10
    warmup = min(50, settings["steps"] // 10)
    names = "learning_rate", "min_learning_rate", "warmup_steps"
    return dict(zip(names, (usual, floor, warmup), strict=True))


def check(config: Config) -> None:
    """Raises InputError for an invalid setting."""

    def require(holds: bool, field: str, remedy: str) -> None:
        if not holds:
            raise InputError(f"{flag(field)}: {getattr(config, field)} {remedy}")

    counts = "steps batch_size microbatches eval_every eval_batches log_every"
    counts += " checkpoint_every keep_checkpoints rewind_steps skip_batches"
    for field in counts.split():
        require(getattr(config, field) > 0, field, "is too small; give 1 or more")
    sizes = "warmup_steps weight_decay sample_tokens seed histogram_every verify_every"
    sizes += " gradient_penalty clip_when_noisy max_rewinds min_learning_rate"
    for field in sizes.split():
        holds = 0 <= (getattr(config, field) or 0) < math.inf
        require(holds, field, "is out of range; give a finite number, 0 or more")
    require(config.seed < 2**32, "seed", f"is too large; give less than {2**32}")
    remedy = f"leaves no step to train; give fewer than the {config.steps} of --steps"
    require(config.value("warmup_steps") < config.steps, "warmup_steps", remedy)
    mesh = devices.parse_mesh(config.mesh)
    shards, heads = devices.batch_shards(mesh), SIZES[config.size].heads
    remedy = f"cannot be split into {shards} parts; give a multiple of {shards}"
    require(config.batch_size % shards == 0, "batch_size", remedy)
    remedy = f"cannot split {heads} heads of attention; give a divisor for model"
    require(heads % mesh.get("model", 1) == 0, "mesh", remedy)
    remedy = f"does not divide the {config.batch_size} windows of --batch-size"
    require(config.batch_size % config.microbatches == 0, "microbatches", remedy)
    remedy = "is out of range; give a finite number above 0"
    require(0 < config.value("learning_rate") < math.inf, "learning_rate", remedy)
    try:
        parse_faults(config.inject)
    except ValueError as error:
        raise InputError(f"--inject: {error}") from error

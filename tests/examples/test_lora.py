"""A trained GPT taught other text, by adapters that are merged in the end."""

import dataclasses
import math
import re
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import lora_finetune as lora
import model
import numpy as np
import pytest
import train
from data import Windows, load
from flax import nnx
from inputs import InputError
from tiers import full

import optax_stability as ost
from optax_stability.loop import DivergedError
from optax_stability.orbax import Checkpoints

# What costs much to make is made in one worker.
pytestmark = pytest.mark.xdist_group("lora")

SMALL = model.Size(1, 16, 2, 16, 256, 1e-2)
RANK, ALPHA, BATCH_SIZE, EVAL_BATCHES = 2, 16.0, 8, 2
# The same sums, over eight devices or one, and in another order.
TOLERANCE = 1e-5
loss_of = nnx.jit(model.next_token_loss)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A model that compiles in a moment, under the name of the default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "tiny", SMALL)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two texts, and a GPT that has read the first."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "first.txt").write_text("To be, or not to be, that is it:\n" * 400)
    sums = (f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(800))
    (folder / "second.txt").write_text("".join(sums))
    # Plain optax compiles fastest, and is a base like any other; what is taught to it
    # goes without the guard, for the same reason.
    config = train.Config(
        data=folder / "first.txt",
        out=folder / "base",
        baseline=True,
        on_spike="rewind",
        steps=30,
        warmup_steps=2,
        batch_size=BATCH_SIZE,
        checkpoint_every=10,
        eval_every=10,
        eval_batches=EVAL_BATCHES,
        sample_tokens=0,
    )
    train.train(config)
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    return lora.Flags(
        base=folder / "base",
        data=folder / "second.txt",
        rank=RANK,
        alpha=ALPHA,
        steps=20,
        learning_rate=1e-2,
        warmup_steps=2,
        sample_tokens=0,
        out=folder / "lora",
    )


@pytest.fixture(scope="module")
def tuned(flags):
    """The merged model and its last row; the base was there to be read alone."""
    half_written = flags.base / "checkpoints" / "99.orbax-checkpoint-tmp"
    half_written.mkdir()
    before = contents(flags.base)
    found = lora.finetune(flags)
    assert contents(flags.base) == before
    assert half_written.is_dir()
    half_written.rmdir()
    return found


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrays_of(folder):
    """Of the model and of the optimizer in the newest checkpoint, by path."""
    with Checkpoints(folder / "checkpoints", read_only=True) as saved:
        arrays = saved.load(saved.available()[0])["arrays"]
    return [
        {jax.tree_util.keystr(path): x for path, x in leaves}
        for leaves in map(
            jax.tree_util.tree_leaves_with_path, (arrays["0"], arrays["1"])
        )
    ]


def held_out_loss(gpt, text):
    """As a run of this batch size evaluates."""
    held_out = Windows(load(text, SMALL.context).held_out, SMALL.context, BATCH_SIZE, 0)
    return np.mean(
        [loss_of(gpt, jnp.asarray(held_out(i))) for i in range(EVAL_BATCHES)]
    )


def losses_of(folder):
    return ost.read_log(folder / "log.jsonl")["loss"]


def evaluations(folder):
    losses = ost.read_log(folder / "log.jsonl")["eval/loss"]
    return losses[np.isfinite(losses)]


def parameters(gpt):
    return nnx.to_pure_dict(nnx.state(gpt))


@full
def test_the_newest_checkpoint_is_the_base(folder):
    config, gpt = lora.load(folder / "base")
    assert (config.steps, config.baseline) == (30, True)
    *_, last = evaluations(folder / "base")
    assert last < math.log(256) - 0.5
    found = held_out_loss(gpt, folder / "first.txt")
    assert found == pytest.approx(last, abs=TOLERANCE)


@full
def test_it_starts_as_the_base_and_learns(flags, tuned):
    first, *_, last = evaluations(flags.out)
    base = held_out_loss(lora.load(flags.base)[1], flags.data)
    assert first == pytest.approx(base, abs=TOLERANCE)
    assert last == tuned[1]["eval/loss"] < first - 0.1


@full
def test_only_the_adapters_are_trained(flags, tuned):
    del tuned
    before, _ = arrays_of(flags.base)
    after, optimizer = arrays_of(flags.out)
    changes = {path: x for path, x in after.items() if "['change']" in path}
    kept = {
        path.replace("['base']", ""): x
        for path, x in after.items()
        if path not in changes
    }
    chex.assert_trees_all_equal(kept, before)
    assert len(changes) == 2 * len(lora.MATRICES) * SMALL.layers
    assert all(np.any(x) for x in changes.values())  # Each B was 0.
    assert {min(x.shape) for x in changes.values()} == {RANK}
    # Two moments of each, and nothing of the size of what is left as it is.
    shapes = [x.shape for x in optimizer.values()]
    for shape in {x.shape for x in changes.values()}:
        count = sum(x.shape == shape for x in changes.values())
        assert shapes.count(shape) == 2 * count
    matrices = {x.shape for x in before.values() if x.ndim == 2}
    assert matrices.isdisjoint(shapes)


@full
def test_the_merged_model_does_what_the_adapted_one_did(flags, tuned):
    merged, row = tuned
    found = held_out_loss(merged, flags.data)
    assert found == pytest.approx(row["eval/loss"], abs=TOLERANCE)
    # As a matrix: W + (α/rank)·A·B.
    adapted, _ = arrays_of(flags.out)
    block = "['blocks']['0']"
    for name in lora.MATRICES:
        w, a, b = (
            np.asarray(adapted[f"{block}['{name}']{part}['value']"], np.float64)
            for part in (
                "['base']['kernel']",
                "['change']['lora_a']",
                "['change']['lora_b']",
            )
        )
        kernel = getattr(merged.blocks[0], name).kernel[...]
        expected = w + ALPHA / RANK * a @ b
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=TOLERANCE)
        assert np.abs(expected - w).max() > 1e-2


@full
def test_what_is_saved_is_a_gpt_as_before(flags, tuned):
    config, gpt = lora.load(flags.out / "merged")
    chex.assert_trees_all_equal(parameters(gpt), parameters(tuned[0]))
    found = held_out_loss(gpt, flags.data)
    assert found == pytest.approx(tuned[1]["eval/loss"], abs=TOLERANCE)
    assert (config.data, config.steps) == (str(flags.data), flags.steps)
    base = lora.load(flags.base)[1]
    chex.assert_trees_all_equal_shapes(parameters(gpt), parameters(base))


@full
def test_a_run_that_was_killed_takes_the_same_course(flags, tuned, tmp_path):
    out = shutil.copytree(flags.out, tmp_path / "killed")
    shutil.rmtree(out / "merged")
    shutil.rmtree(out / "checkpoints" / "20")  # As if it had come to step 19.
    merged, _ = lora.finetune(dataclasses.replace(flags, out=out))
    np.testing.assert_array_equal(losses_of(out), losses_of(flags.out))
    chex.assert_trees_all_equal(parameters(merged), parameters(tuned[0]))


@full
def test_the_same_command_again_trains_nothing(flags, tuned, monkeypatch):
    monkeypatch.delattr(train.Run, "advance")
    merged, row = lora.finetune(flags)
    assert row["eval/loss"] == tuned[1]["eval/loss"]
    chex.assert_trees_all_equal(parameters(merged), parameters(tuned[0]))


@full
def test_an_adapter_is_its_matrix_and_a_product():
    base = nnx.Linear(5, 7, use_bias=False, rngs=nnx.Rngs(0))
    adapted = lora.Adapted(base, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (4, 5))
    np.testing.assert_array_equal(adapted(x), base(x))
    b = jax.random.normal(jax.random.key(1), (3, 7))
    adapted.change.lora_b[...] = b
    w, a = (
        np.asarray(part[...], np.float64)
        for part in (base.kernel, adapted.change.lora_a)
    )
    expected = np.asarray(x) @ (w + 6.0 / 3 * a @ np.asarray(b))
    np.testing.assert_allclose(adapted(x), expected, atol=TOLERANCE)
    np.testing.assert_allclose(adapted.merged()(x), expected, atol=TOLERANCE)


@full
def test_a_base_that_was_never_trained_is_refused(flags, tmp_path):
    with pytest.raises(InputError, match=r"^--base: no checkpoints in .*; train one"):
        lora.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        InputError, match=r"^--base: no complete checkpoint in .*; train"
    ):
        lora.finetune(dataclasses.replace(flags, base=tmp_path))


@full
def test_text_of_more_tokens_than_the_base_knows_is_refused(flags, tmp_path):
    np.full(500, 999, np.uint16).tofile(tmp_path / "ids.bin")
    says = "has 1000 token ids, but the model of .* has 256; "
    says += "give data of the same tokenizer"
    with pytest.raises(InputError, match=f"^--data: .*ids.bin {says}$"):
        lora.finetune(dataclasses.replace(flags, data=tmp_path / "ids.bin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "--rank: 0 is too small; give 1 or more"),
        (
            {"alpha": math.nan},
            "--alpha: nan is out of range; give a finite number above 0",
        ),
        ({"alpha": 0.0}, "--alpha: 0.0 is out of range; give a finite number above 0"),
        ({"steps": 0}, "--steps: 0 is too small; give 1 or more"),
    ],
)
@full
def test_settings_that_cannot_work_are_refused(flags, tmp_path, change, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        lora.finetune(dataclasses.replace(flags, out=tmp_path / "new", **change))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"rank": 3}, {"alpha": 1.0}])
@full
def test_a_run_goes_on_with_its_own_adapters_alone(flags, tuned, change):
    del tuned
    (name,) = change
    with pytest.raises(
        InputError, match=f"^--{name}: .*; give that value, or another --out"
    ):
        lora.finetune(dataclasses.replace(flags, resume="changed", **change))


def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora_finetune.py", "--base", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        lora.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: --base: no checkpoints in {tmp_path}; ")
    assert (printed.err.count("\n"), printed.out) == (1, "")


@full
def test_a_run_that_ends_in_nan_is_not_merged(folder, monkeypatch):
    monkeypatch.setattr(train.Run, "evaluate", lambda run: {"eval/loss": math.nan})
    flags = lora.Flags(
        base=folder / "base",
        data=folder / "second.txt",
        steps=3,
        sample_tokens=0,
        out=folder / "nan",
    )
    with pytest.raises(DivergedError, match="not finite"):
        lora.finetune(flags)
    assert not (folder / "nan" / "merged").exists()

"""The GPT trainer, as its users run it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import chex
import data
import display
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest
import train
from flax import nnx

import optax_stability as ost

SCRIPT = Path(__file__).parents[1] / "examples" / "gpt" / "train.py"
# Eight devices share a batch of eight; few steps, for only the wiring is tested here.
QUICK = {
    "steps": 4,
    "warmup_steps": 2,
    "batch_size": 8,
    "eval_every": 4,
    "eval_batches": 1,
    "sample_tokens": 0,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question:\n" * 400)
    return path


def read_log(folder):
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "eval/loss" in x]


def test_one_command_trains_and_leaves_a_log_and_a_picture(tmp_path, text):
    flags = (
        "--steps 12 --warmup-steps 2 --eval-batches 1 --sample-tokens 8 --log-every 4"
    )
    command = [
        sys.executable,
        SCRIPT,
        *flags.split(),
        "--data",
        text,
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout  # Not a terminal: no control characters.
    for shown in ("step     8", "grad", "limit", "tok/s", "bits/byte", "To be"):
        assert shown in done.stdout
    rows, evaluations = read_log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == pytest.approx(math.log(256), abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[0]["clip/limit"] is None  # Infinite until the clip is armed.
    assert evaluations[-1]["eval/bits"] < 8
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_can_be_repeated_exactly(tmp_path, text):
    for name in ("first", "second"):
        train.train(train.Config(data=text, out=tmp_path / name, **QUICK))
    assert read_log(tmp_path / "first") == read_log(tmp_path / "second")


def test_clipping_can_wait_for_the_end_of_the_warm_up():
    config = train.Config(steps=40, warmup_steps=8, clip_after_warmup=True)
    tx = train.make_optimizer(config)
    params = {"w": jnp.ones((2, 2))}
    step = jax.jit(lambda state: tx.update(params, state, params, value=1.0)[1])
    state, limits = tx.init(params), []
    for _ in range(34):
        state = step(state)
        limits.append(float(ost.metrics(state)["clip/limit"]))
    # The threshold itself needs 25 norms, and sees none before step 8.
    armed = [0 < limit < math.inf for limit in limits]
    assert armed.index(True) == 8 + 25


@pytest.mark.parametrize("guard", [True, False])
def test_the_guard_leaves_out_a_step_whose_loss_is_not_finite(guard):
    config = train.Config(guard=guard)
    tx = train.make_optimizer(config)
    params = {"w": jnp.ones((2, 2))}
    updates, state = tx.update(params, tx.init(params), params, value=jnp.nan)
    assert bool((updates["w"] == 0).all()) == guard
    assert ("skip/total" in ost.metrics(state)) == guard
    assert float(ost.metrics(state)["grad/norm"]) == 2.0


def test_the_picture_shows_skipped_steps(tmp_path):
    rows = [
        {"step": step, "loss": 3.0, "grad/norm": None if step == 4 else 1.0}
        | {"clip/limit": 2.0, "learning_rate": 1e-3, "skip/skipped": float(step == 4)}
        for step in range(1, 9)
    ]
    log = tmp_path / "log.jsonl"
    rows.append({"step": 8, "eval/loss": 3.0})
    log.write_text("\n".join(json.dumps(row) for row in rows))
    display.draw(log, tmp_path / "training.png", "title")
    assert (tmp_path / "training.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data nowhere.txt", "error: --data: no such file or folder: nowhere.txt"),
        ("--data tiny.txt", "error: --data: tiny.txt is too small"),
        ("--data odd.bin", "error: --data: odd.bin has 5 bytes"),
        ("--data empty", "error: --data: no UTF-8 text in empty"),
        ("--size medium", "error: --size: medium is no size; choose from tiny, small"),
        ("--batch-size 12", "error: --batch-size: 12 cannot be shared by 8 devices"),
        ("--steps 0", "error: --steps: 0 is too small"),
        ("--steps 5 --warmup-steps 5", "error: --warmup-steps: 5 leaves no step"),
        ("--data text.txt --out tiny.txt", "error: --out: cannot write to tiny.txt"),
    ],
)
def test_bad_input_gets_one_clear_line(
    tmp_path, text, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.txt").write_text("too short")
    Path("odd.bin").write_bytes(b"12345")
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_first_loss_is_that_of_no_opinion(size):
    shape = model.SIZES[size]
    gpt = model.GPT(shape, shape.vocabulary, jnp.float32, nnx.Rngs(0))
    windows = jax.random.randint(jax.random.key(0), (2, 33), 0, shape.vocabulary)
    loss = float(model.next_token_loss(gpt, windows))
    assert loss == pytest.approx(math.log(shape.vocabulary), abs=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 0.84), ("small", 10.8), ("gpt2", 124.4)]
)
def test_the_sizes_are_what_the_help_says(size, millions):
    shape = model.SIZES[size]
    gpt = nnx.eval_shape(
        lambda: model.GPT(shape, shape.vocabulary, jnp.float32, nnx.Rngs(0))
    )
    count = sum(x.size for x in jax.tree.leaves(nnx.state(gpt, nnx.Param)))
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_held_out_text_is_never_trained_on(tmp_path):
    stream = np.arange(5000, dtype=np.uint16)
    stream.tofile(tmp_path / "tokens.bin")
    corpus = data.load(tmp_path / "tokens.bin", context=16)
    assert corpus.vocabulary == 5000
    train_batch = data.batches(corpus.train, 16, 4, seed=0)
    seen = {int(token) for step in range(200) for token in train_batch(step).flat}
    assert seen < set(range(4500))
    assert len(seen) > 4400
    assert set(corpus.held_out.tolist()) == set(range(4500, 5000))


def test_batches_depend_on_the_step_alone(tmp_path):
    stream = np.arange(2000)
    one, other = (data.batches(stream, 16, 4, seed=3) for _ in range(2))
    expected = [one(step) for step in range(50)]
    for step in (49, 7, 30):  # A resumed run asks for any step first.
        np.testing.assert_array_equal(other(step), expected[step])
    assert not np.array_equal(data.batches(stream, 16, 4, seed=4)(0), expected[0])


def test_a_folder_is_all_its_text_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("é" * 300)
    (tmp_path / "two.md").write_text("b" * 500)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0" * 100)
    (tmp_path / ".hidden").write_text("secret" * 100)
    corpus = data.load(tmp_path, context=16)
    everything = bytes(np.concatenate([corpus.train, corpus.held_out]))
    assert sorted(everything) == sorted(("é" * 300 + "\n" + "b" * 500).encode())


def train_scaled(scale):
    """Six steps of a small GPT on ``scale``·loss, clipped, with ε = 0."""
    shape = model.Size(2, 32, 2, 16, 64, 1e-2)
    windows = jax.random.randint(jax.random.key(1), (6, 4, 17), 0, 64)
    tx = optax.chain(ost.clip_by_zscore(0.5, warmup=2), ost.safe_adamw(1e-2, b2=0.95))
    gpt = model.GPT(shape, 64, jnp.float32, nnx.Rngs(0))
    optimizer = nnx.Optimizer(gpt, tx, wrt=nnx.Param)

    @nnx.jit
    def step(gpt, optimizer, batch, scale):
        grads = nnx.grad(lambda gpt: scale * model.next_token_loss(gpt, batch))(gpt)
        optimizer.update(gpt, grads)

    for batch in windows:
        step(gpt, optimizer, batch, scale)
    assert float(ost.metrics(optimizer)["clip/fraction"]) > 0
    return nnx.to_pure_dict(nnx.state(gpt))


def test_loss_scale_changes_no_bit_of_a_run():
    expected = train_scaled(1.0)
    for exponent in (-60, 60):
        chex.assert_trees_all_equal(train_scaled(2.0**exponent), expected)


def test_microbatches_do_not_change_the_course_of_training(tmp_path, text):
    settings = QUICK | {"batch_size": 32, "steps": 8, "eval_every": 8}
    curves = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        config = train.Config(data=text, out=folder, microbatches=parts, **settings)
        train.train(config)
        curves.append([row["loss"] for row in read_log(folder)[0]])
    np.testing.assert_allclose(*curves, rtol=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.5


def test_microbatches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(train.InputError, match="--microbatches: 3 does not divide"):
        train.check(train.Config(batch_size=8, microbatches=3))

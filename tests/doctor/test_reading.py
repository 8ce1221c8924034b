"""Every form of log gives the same history, and what is none says why."""

import json

import log_samples as samples
import numpy as np
import pytest

import optax_stability as ost
from optax_stability._doctor import _columns, _reading, _text
from optax_stability._doctor._log import UnreadableError


def read(path, **chosen):
    return _reading.read(str(path), chosen)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("form", samples.ALL)
def test_each_form_gives_the_same_history(form, write):
    name, text, trainer, has = samples.ALL[form]
    (log,) = read(write(name, text()))
    assert log.trainer == trainer
    history = log.history
    np.testing.assert_allclose(history["loss"], samples.LOSS, rtol=1e-3)
    steps = samples.STEPS if "s" in has else history["step"]
    np.testing.assert_array_equal(history["step"], steps)
    wanted = {"n": ("grad/norm", samples.NORM), "r": ("learning_rate", samples.RATE)}
    for letter, (key, values) in wanted.items():
        if letter in has:
            np.testing.assert_allclose(history[key], values, rtol=5e-2)
        else:
            assert key not in history
    if "h" in has:
        held_out = history["eval/loss"]
        assert held_out[~np.isnan(held_out)].tolist() == [2.9, 2.4]
        assert np.flatnonzero(~np.isnan(held_out)).tolist() == [4, 9]


def test_each_run_of_an_export_is_a_log(write):
    first, second = read(write("export.csv", samples.wandb_export_of_two_runs()))
    assert first.name.endswith("· first")
    assert second.name.endswith("· second")
    np.testing.assert_allclose(second.history["loss"] - first.history["loss"], 1.0)


def test_event_files(tmp_path):
    boards = pytest.importorskip("tensorboardX")
    with boards.SummaryWriter(str(tmp_path / "board")) as board:
        for step, loss, norm, rate in samples.ROWS:
            board.add_scalar("train/loss", loss, step)
            board.add_scalar("train/grad_norm", norm, step)
            board.add_scalar("train/lr", rate, step)
            board.add_text("note", "no number", step)
            if step in samples.HELD_OUT:
                board.add_scalar("eval/loss", samples.HELD_OUT[step], step)
    (log,) = read(tmp_path / "board")
    assert log.trainer == "TensorBoard"
    np.testing.assert_allclose(log.history["loss"], samples.LOSS, rtol=1e-6)
    np.testing.assert_allclose(log.history["grad/norm"], samples.NORM, rtol=1e-6)
    np.testing.assert_array_equal(log.history["step"], samples.STEPS)
    assert np.isfinite(log.history["eval/loss"]).sum() == 2
    (file,) = (tmp_path / "board").iterdir()
    cut = tmp_path / "cut" / file.name
    cut.parent.mkdir()
    cut.write_bytes(file.read_bytes()[:-7])
    (again,) = read(cut)
    assert len(again.history["loss"]) >= len(samples.LOSS) - 1


def test_a_folder_is_read_by_its_best_log(write, tmp_path):
    write("run/log.jsonl", samples.json_lines())
    write("run/out.log", samples.llm_c())
    (log,) = read(tmp_path / "run")
    assert log.name.endswith("log.jsonl")


def test_of_the_checkpoints_of_a_run_the_last_is_read(write, tmp_path):
    write("run/checkpoint-50/trainer_state.json", '{"log_history": []}')
    write("run/checkpoint-100/trainer_state.json", samples.trainer_state())
    (log,) = read(tmp_path / "run")
    assert "checkpoint-100" in log.name


def test_columns_can_be_named(write):
    path = write("run.csv", "t,objective,other_loss\n1,3.0,9\n2,2.5,9\n3,2.0,9\n")
    (log,) = read(path, loss="objective", step="t")
    assert log.history["loss"].tolist() == [3.0, 2.5, 2.0]
    assert log.columns["loss"] == "objective"
    with pytest.raises(UnreadableError, match=r"no column 'missing'.*'objective'"):
        read(path, loss="missing")


def test_one_loss_of_any_name_is_taken(write):
    (log,) = read(write("run.csv", "step,my_policy_loss,val_acc\n1,3,0\n2,2,0\n"))
    assert log.columns["loss"] == "my_policy_loss"


def test_what_was_not_written_is_not_nan(write):
    """A norm in every second row, and an evaluation of its own before the first."""
    rows = ['{"step": 0, "eval_loss": 4.0}']
    rows += [
        f'{{"step": {i}, "loss": {5 - 0.1 * i:.1f}'
        + (f', "grad_norm": {i}.5' if i % 2 else "")
        + "}"
        for i in range(1, 9)
    ]
    (log,) = read(write("log.jsonl", "\n".join(rows)))
    assert log.history["step"].tolist() == list(range(1, 9))
    assert log.history["eval/loss"][0] == 4.0
    assert np.isfinite(log.history["grad/norm"]).tolist() == [True, False] * 4


def test_nan_and_infinity_are_read_as_what_they_are(write):
    text = "step,loss,grad_norm\n1,2.0,1.0\n2,nan,inf\n3,NaN,-Infinity\n"
    (log,) = read(write("run.csv", text))
    assert np.isnan(log.history["loss"]).tolist() == [False, True, True]
    assert log.history["grad/norm"].tolist()[1:] == [np.inf, -np.inf]
    (log,) = read(
        write("out.log", "step 1 loss 2.0\nstep 2 loss nan\nstep 3 loss NaN\n")
    )
    assert np.isnan(log.history["loss"]).tolist() == [False, True, True]


def test_a_decimal_comma_is_a_decimal_point(write):
    (log,) = read(write("run.csv", "step;loss\r\n1;2,5\r\n2;2,25\r\n"))
    assert log.history["loss"].tolist() == [2.5, 2.25]


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ('{{"current_steps": {0}, "total_steps": 99, "loss": 1.5, "lr": 0.1}}', True),
        ('{{"loss": 1.5, "global_step/max_steps": "{0}/99"}}', True),
        ('12:00:00 | INFO | {{"epoch": 1, "loss": "1.5", "num_updates": "{0}"}}', True),
        ("Epoch 1 | iter 9 step {0} | loss train: 1.5, val: n/a | 300.1 ms", True),
        ("Step {0} | loss:1.5 lr:2e-05 tokens_per_second_per_gpu:500.1", True),
        ("  1%|      | {0}/100 [00:01<01:00, 1.2it/s, loss=1.5, lr=0.001]", False),
    ],
)
def test_lines_of_other_trainers_are_read(write, line, step):
    (log,) = read(write("out.log", "".join(line.format(i) + "\n" for i in (5, 6, 7))))
    assert log.history["loss"].tolist() == [1.5] * 3
    assert log.history["step"].tolist() == ([5, 6, 7] if step else [1, 2, 3])


def test_a_line_of_another_form_does_not_change_how_the_next_are_read(write):
    """Its names are in the next lines too, but not all of those of the next lines."""
    lines = [f"step {i} loss {3 - i / 10:.1f} lr 1.0e-{3 + i} ok" for i in range(1, 9)]
    lines[3:3] = ["step 3 lr 1e-4 ok: not measured", "step 3 lr nan ok", "step 3"]
    (log,) = read(write("out.txt", "\n".join(lines)))
    np.testing.assert_array_equal(log.history["step"], range(1, 9))
    np.testing.assert_allclose(log.history["loss"], 3 - np.arange(1, 9) / 10)


def test_digits_of_a_name_are_no_number_of_a_form():
    """``lr_group0`` is known and ``lr_group1`` is not; two heads are two names."""
    lines = []
    for i in range(1, 9):
        lines += [f"step {i} loss {i} lr_group1: 7.0", f"step {i} lr_group1: 7.0"]
        lines += [f"step {i} lr_group0: {i}e-4"]
        lines += [f"head-1/loss: {i}", f"head-2/loss: {2 * i}"]
    rows = _text.rows("\n".join(lines))
    count = np.arange(1, 9)
    for name, first, expected in (
        ("lr_group0", 2, count * 1e-4),
        ("head-1/loss", 3, count),
        ("head-2/loss", 4, 2 * count),
    ):
        assert np.flatnonzero(rows.given[name]).tolist() == list(range(first, 40, 5))
        np.testing.assert_allclose(rows.columns[name][first::5], expected)


def test_null_is_nan_and_a_missing_key_is_nothing(write):
    rows = [f'{{"step": {i}, "loss": {i}.0}}' for i in range(5)]
    rows += ['{"step": 5, "loss": null}', '{"step": 6, "eval_loss": 2.0}']
    (log,) = read(write("log.jsonl", "\n".join(rows)))
    assert log.history["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(log.history["loss"][5])
    assert [each.kind for each in ost.diagnose(log.history)] == ["nonfinite"]


def test_a_line_that_is_still_being_written_is_left_out(write):
    (log,) = read(write("log.jsonl", samples.json_lines() + '{"step": 110, "lo'))
    assert len(log.history["step"]) == 10


def test_rows_with_the_newest_first_are_turned_around(write):
    text = "step,loss\n3,1.0\n2,2.0\n1,3.0\n"
    (log,) = read(write("run.csv", text))
    assert log.history["loss"].tolist() == [3.0, 2.0, 1.0]


def test_metrics_of_this_library_keep_their_names(write):
    names = {"grad/norm/wte", "attention/logit_bound", "extra/attention_logits/0/3"}
    row = {"loss": 2.0, "skip/skipped": False} | dict.fromkeys(names, 0.1)
    rows = "\n".join(json.dumps({"step": i} | row) for i in range(5))
    (log,) = read(write("log.jsonl", rows))
    assert log.trainer == "optax_stability"
    assert {"skip/skipped"} | names <= set(log.history)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.csv", "", "the file is empty"),
        ("head.csv", "step,loss\n", "no row below the names"),
        ("numbers.csv", "1,2\n3,4\n", "the first line, 1, 2, holds numbers"),
        ("other.csv", "step,accuracy\n1,0.5\n", "neither loss nor gradient norm"),
        ("log.jsonl", '{"step": 1}\nbroken\n{"step": 2}\n', "line 2 is no JSON"),
        ("log.jsonl", '{"step": 1}\n[1]\n{"step": 2}\n', "line 2 is list, not an obj"),
        ("notes.txt", "nothing of interest\nat all\n", "no loss and no gradient norm"),
        ("binary.bin", "\x00\x01\x02", "no loss and no gradient norm"),
    ],
)
def test_what_is_no_log_says_why(name, text, message, write):
    with pytest.raises(UnreadableError, match=message) as caught:
        read(write(name, text))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(UnreadableError, match="there is no such file"):
        read(tmp_path / "nothing")
    with pytest.raises(UnreadableError, match="there is no log in this folder"):
        read(tmp_path)


def test_names_are_in_one_list_only():
    names = [name for each in _columns._NAMES.values() for name in each.split()]
    assert len(names) == len(set(names))
    assert all(_columns.normalised(name) == name for name in names)

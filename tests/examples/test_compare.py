"""The same GPT, broken on purpose, with the stability chain and with plain optax."""

import math
import pathlib
import sys

import compare
import drawing
import matplotlib.pyplot as plt
import model
import numpy as np
import pytest
import train
from tiers import full

from optax_stability.faults import parse_faults
from optax_stability.loop import DivergedError

# What costs much to make is made in one worker.
pytestmark = pytest.mark.xdist_group("compare")

INJECT = ("bytes@20x3", "nan@30")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run of both; the model under the default's name compiles in a moment."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text("To be, or not to be, that is it:\n" * 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "tiny", model.Size(1, 16, 2, 16, 256, 1e-2))
        yield compare.Comparison(
            data=folder / "text.txt",
            out=folder / "out",
            steps=40,
            warmup_steps=2,
            batch_size=8,
            eval_every=20,
            eval_batches=1,
            sample_tokens=0,
            # The bad microbatches are left out anyway, and it compiles much faster.
            sides=("rewind", "plain"),
            inject=INJECT,
        )


@pytest.fixture(scope="module")
def runs(config):
    return compare.compare(config)


def losses(rows):
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(found) == list(range(1, 41))
    return np.array(list(found.values()), float)


@full
def test_the_chain_survives_what_kills_plain_optax(runs):
    assert list(runs) == ["rewind", "plain"]
    ours, plain = runs.values()
    # Step 30 itself has no loss; the chain leaves it out.
    assert np.flatnonzero(np.isnan(losses(ours))).tolist() == [29]
    assert losses(ours)[-1] < losses(ours)[0] - 0.5
    assert np.flatnonzero(np.isnan(losses(plain))).tolist() == list(range(29, 40))
    # Until the first fault both had the same model and saw the same batches.
    assert ours[0]["eval/loss"] == plain[0]["eval/loss"]
    assert losses(ours)[0] == pytest.approx(losses(plain)[0], abs=1e-5)
    table = [compare.summarise(rows) for rows in (ours, plain)]
    ends = [each["held-out loss at the end"] for each in table]
    assert float(ends[0]) < math.log(256) - 0.5
    assert ends[1] == "not finite"
    assert table[1]["losses that are not finite"] == "11"


@full
def test_the_same_command_again_only_shows_it_once_more(
    config, runs, monkeypatch, capsys
):
    picture = config.out / "compare.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    monkeypatch.delattr(train.Run, "advance")
    assert compare.compare(config) == runs
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    names = [compare.SIDES[side].name for side in runs]
    for shown in (*names, *compare.summarise([]), "not finite"):
        assert shown in printed


def step_of(batch, loss, **more):
    row = {"step": batch, "batch": batch, "loss": loss}
    return row | {"grad/norm": 1.0, "clip/limit": 2.0, "skip/skipped": 0.0} | more


ROWS = [
    {"step": 0, "batch": 0, "eval/loss": 5.0},
    step_of(1, 5.0, **{"clip/limit": None}),  # Not armed yet: infinite.
    step_of(2, 4.0, **{"grad/norm": 3.0}),
    {"step": 2, "batch": 2, "eval/loss": 3.25},
    step_of(3, None, **{"grad/norm": None, "skip/skipped": 1.0}),
    step_of(4, 9.0, **{"grad/norm": 2.0}),  # At the limit, not above it.
    {"step": 4, "batch": 4, "eval/loss": None},
    {"step": 4, "batch": 8, "rewind/from": 4, "rewind/to": 2},
    step_of(9, 3.5, step=3, **{"grad/norm": 2.5}),
    {"step": 3, "batch": 9, "eval/loss": 3.5},
]


def test_the_table_counts_all_that_happened():
    assert compare.summarise(ROWS) == {
        "held-out loss at the end": "3.500",
        "best held-out loss": "3.250",
        "losses that are not finite": "1",
        "steps skipped": "1",
        "steps clipped": "2",
        "branches taken back": "0",
        "rewinds": "1",
    }
    dead = [step_of(1, 5.0), step_of(2, None), {"batch": 2, "eval/loss": None}]
    summary = compare.summarise(dead)
    assert summary["held-out loss at the end"] == "not finite"
    assert summary["best held-out loss"] == "not finite"
    assert summary["losses that are not finite"] == "1"


def test_what_was_never_evaluated_has_no_held_out_loss():
    for rows in ([], [step_of(1, 5.0)]):
        assert list(compare.summarise(rows).values()) == ["not finite"] * 2 + ["0"] * 5


def test_a_curve_is_broken_by_a_rewind_and_ends_where_it_dies(tmp_path, monkeypatch):
    dead = [step_of(1, 5.0), step_of(2, 4.0), step_of(3, None), step_of(4, None)]
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    happened = parse_faults(("bytes@2x3", "nan@8"))
    sides = {"skip": ROWS, "plain": dead}
    drawing.draw(sides, happened, tmp_path / "compare.png")
    monkeypatch.undo()
    (figure,) = drawn
    ours, plain, held_out = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["optax_stability", "plain optax", "Held-out loss"]
    batches, values = ours.lines[0].get_data()
    np.testing.assert_array_equal(batches, [1, 2, 3, 4, 8, 9])
    np.testing.assert_array_equal(values, [5, 4, math.nan, 9, math.nan, 3.5])
    curve, cross = plain.lines
    np.testing.assert_array_equal(curve.get_ydata()[2:], [math.nan] * 2)
    assert (*cross.get_xdata(), *cross.get_ydata()) == (2, 4)
    assert (cross.get_marker(), cross.get_color()) == ("X", curve.get_color())
    assert curve.get_color() != ours.lines[0].get_color()
    written = [text.get_text() for text in ours.texts]
    assert sorted(written) == [" back to step 2", "bytes × 3", "nan"]
    assert [text.get_text() for text in plain.texts] == ["not a number from here"]
    for axes in (ours, plain):
        spans = [(each.get_x(), each.get_width()) for each in axes.patches]
        assert spans == [(2, 3), (8, 1)]
    assert ours.get_ylim() == plain.get_ylim()
    *_, points = held_out.lines
    # All but the evaluation before the first step, which would set the range.
    np.testing.assert_array_equal(points.get_xdata(), [2, 4, 9])
    np.testing.assert_array_equal(points.get_ydata(), [3.25, math.nan, 3.5])
    plt.close(figure)


def branching(batch, loss, mode, rollbacks=0.0, probed=0.0):
    more = {"branch/mode": mode, "branch/rollbacks": rollbacks}
    return step_of(batch, loss, **more | {"branch/probed": probed})


def test_a_branch_is_marked_and_its_probes_are_no_part_of_the_curve(
    tmp_path, monkeypatch
):
    rows = [
        branching(1, 3.0, 0),
        branching(2, 8.0, 1),
        branching(3, 7.0, 2),
        branching(4, 9.0, 1, probed=1.0),
        branching(5, 4.0, 2),
        branching(6, 3.1, 0, rollbacks=1.0, probed=1.0),
        branching(7, 3.2, 0, rollbacks=1.0),
    ]
    assert compare.summarise(rows)["branches taken back"] == "1"
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    drawing.draw({"branch": rows}, (), tmp_path / "compare.png")
    monkeypatch.undo()
    (top, _), (curve, *_) = drawn[0].axes, drawn[0].axes[0].lines
    np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3, 5, 7])
    (bar,) = top.collections
    ends = bar.get_paths()[0].get_extents()
    assert (ends.xmin, ends.xmax) == (2, 5)
    (said,) = top.texts
    assert (said.get_position()[0], said.get_text()) == (7, " branch taken back")
    plt.close(drawn[0])


def test_each_side_has_its_settings_and_a_folder():
    for baseline in (False, True):  # Which it is, is for the side to say.
        config = compare.Comparison(out=pathlib.Path("x"), baseline=baseline, steps=77)
        for side in compare.SIDES:
            one = config.of(side)
            assert type(one) is train.Config
            assert (one.steps, one.out) == (77, pathlib.Path("x") / side)
            assert one.baseline == (side == "plain")
            assert one.baseline or one.on_spike == side


@full
def test_a_run_that_gives_up_is_shown_as_far_as_it_came(
    config, tmp_path, monkeypatch, capsys
):
    def give_up(config):
        config.out.mkdir(parents=True)
        (config.out / "log.jsonl").write_text('{"step": 1, "batch": 1, "loss": 5.0}\n')
        raise DivergedError("the loss ran away")

    monkeypatch.setattr(train, "train", give_up)
    again = compare.Comparison(data=config.data, out=tmp_path)
    row = {"step": 1, "batch": 1, "loss": 5.0}
    assert compare.compare(again) == {"skip": [row], "plain": [row]}
    assert capsys.readouterr().err == "the loss ran away\n" * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inject", "nan@0"], "error: --inject: nan@0 is not a fault; write "),
        (["--sides"], "error: --sides: no side is given; give some of skip, branch"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert not list(tmp_path.iterdir())

"""The grid of faults is what it says, and so are its measures."""

import base64
import math

import chex
import contenders
import corpus
import faulty_streams
import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reporting
import stability
from contenders import CLIP, OURS
from faulty_streams import Setting
from grids import Fault, Grid
from stability import Outcome
from tiers import full

# What costs much to make is made in one worker.
pytestmark = pytest.mark.xdist_group("stability")

TINY = Setting(layers=1, width=32, batch=2, calls=40)
ALL_FAULTS = {
    name: fault for grid in grids.GRIDS.values() for name, fault in grid.faults.items()
}


@pytest.fixture(scope="module")
def clean():
    return faulty_streams.clean_stream(Setting(batch=2), seed=0)


def changed(fault, stream):
    return fault.change(stream, np.random.default_rng(0))


def single(stream):
    """With a leading axis of one seed."""
    return jax.tree.map(lambda x: x[None], stream)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("clean", []),
        ("NaN at 12", [12]),
        ("7 NaN at 120", range(120, 127)),
        ("one entry 1e20 at 120", [120]),
        ("20 random batches at 45", range(45, 65)),
        ("another batch at 120", [120]),
        ("gradients × 10 from 120 on", range(120, 240)),
        ("new domain from 120 on", range(120, 240)),
        ("30 % of the bytes random, 20 at 120", range(120, 140)),
        ("half of the rows random, 20 at 120", range(120, 140)),
        ("one byte repeated, 5 at 120", range(120, 125)),
        ("bytes shuffled, 20 at 120", range(120, 140)),
        ("labels shifted by one, 20 at 120", range(120, 140)),
        ("20 random batches at 80 and 180", [*range(80, 100), *range(180, 200)]),
        ("200 random batches at 35", range(35, 235)),
        ("UTF-16 from 120 on", range(120, 240)),
    ],
)
def test_a_fault_is_where_it_says(clean, name, calls):
    stream = changed(ALL_FAULTS[name], clean)
    (faulty,) = stability.faulty_calls(single(stream), single(clean))
    assert np.flatnonzero(faulty).tolist() == list(calls)


def test_a_fault_against_another_row_is_what_that_row_has_not(clean):
    name = "gradients × 0.02, one of them × 30"
    fault = ALL_FAULTS[name]
    streams = [changed(x, clean) for x in (fault, ALL_FAULTS[fault.against])]
    (faulty,) = stability.faulty_calls(*map(single, streams))
    assert np.flatnonzero(faulty).tolist() == [120]
    assert streams[0].factor[120] == pytest.approx(0.6)


def test_every_row_has_the_row_that_it_is_held_against():
    for name, grid in grids.GRIDS.items():
        assert CLIP in grid.optimizers
        assert (OURS in grid.optimizers) != name.startswith("branch")
        assert grid.seeds >= (8 if name == "branch" else 4)
        for fault in grid.faults.values():
            assert fault.against is None or fault.against in grid.faults


def test_the_new_domain_is_judged_by_its_own_held_out_text(clean):
    other = changed(ALL_FAULTS["new domain from 120 on"], clean)
    assert (other.held_out != clean.held_out).mean() > 0.5
    letters = np.frombuffer(b"+/=\n", np.uint8)
    symbols = [b for b in np.unique(other.held_out) if not chr(b).isalnum()]
    assert set(symbols) <= set(letters)


def some(stream, calls=5):
    """A few calls of a stream and the same of a changed one, for a look."""
    return stream.batch[120 : 120 + calls], stream.labels[120 : 120 + calls]


def test_corrupted_batches_are_corrupted_as_they_say(clean):
    batch, labels = some(clean)
    np.testing.assert_array_equal(labels, batch[..., 1:])
    found = {
        name: some(changed(ALL_FAULTS[f"{name}, 20 at 120"], clean))
        for name in grids.KINDS
    }
    for name, (bytes_, told) in found.items():
        if name != "labels shifted by one":
            np.testing.assert_array_equal(told, bytes_[..., 1:])
    random = found["30 % of the bytes random"][0] != batch
    assert random.mean() == pytest.approx(0.3, abs=0.06)
    half = found["half of the rows random"][0]
    np.testing.assert_array_equal(half[:, 1], batch[:, 1])
    assert (half[:, 0] != batch[:, 0]).mean() > 0.9
    repeated = found["one byte repeated"][0]
    assert (repeated == repeated[:, :1, :1]).all()
    assert len(np.unique(repeated)) > 1
    shuffled = found["bytes shuffled"][0]
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(batch))
    assert (shuffled != batch).mean() > 0.5
    same, told = found["labels shifted by one"]
    np.testing.assert_array_equal(same, batch)
    np.testing.assert_array_equal(told[..., :-1], batch[..., 2:])


def test_other_data_come_at_once_or_by_and_by_or_in_turns_or_now_and_then(clean):
    def share(name):
        """Of the rows that are others, call by call."""
        differs = changed(ALL_FAULTS[name], clean).batch != clean.batch
        return differs.any(2).mean(1)

    np.testing.assert_array_equal(share("UTF-16 from 120 on")[119:122], [0, 1, 1])
    slow = share("UTF-16, within 60 calls")
    assert slow[:120].max() == 0
    assert 0.3 < slow[140:160].mean() < 0.7
    assert slow[180:].min() == 1
    turns = share("10 of base64, 10 of text")
    np.testing.assert_array_equal(turns[100:140], np.repeat([1, 0, 1, 0], 10))
    tenth = share("10 % of base64")
    assert set(tenth) == {0, 1}
    assert 0.03 < tenth[60:].mean() < 0.2
    # What comes again is evaluated too: half of the windows.
    for name, least in (("10 % of base64", 256), ("UTF-16 from 120 on", 500)):
        held_out = changed(ALL_FAULTS[name], clean).held_out
        assert least <= (held_out != clean.held_out).any(1).sum() <= 2 * least


def test_the_kinds_of_other_data_are_what_they_are_called():
    for text, wide, back in zip(
        corpus.corpus(),
        faulty_streams.wide_characters(),
        faulty_streams.backwards(),
        strict=True,
    ):
        known = text.tobytes()
        assert wide.tobytes().decode("utf-16-le").encode("latin-1") == known
        assert back.tobytes()[::-1] == known
    for text in faulty_streams.base64():
        base64.decodebytes(text.tobytes())
    train, held_out = (
        text.tobytes().decode("ascii") for text in faulty_streams.prose()
    )
    assert len(train) > 300_000
    assert "The standard type hierarchy" in held_out + train


def test_the_gradient_is_spoiled_as_the_stream_says():
    grads = {"a": jnp.ones((2, 3)), "b": jnp.full(4, 2.0)}
    as_it_was = stability.spoil(grads, 1.0, 0.0)
    longer = stability.spoil(grads, 10.0, 0.0)
    entry = stability.spoil(grads, 1.0, 1e20)
    jax.tree.map(np.testing.assert_array_equal, as_it_was, grads)
    assert float(longer["a"].sum() + longer["b"].sum()) == 140
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(entry)])
    assert (flat == np.float32(1e20)).sum() == 1
    assert np.isnan(stability.spoil(grads, math.nan, 0.0)["a"]).all()


def outcome(held_out, losses, skipped=None, finite=True):
    losses = np.asarray(losses, np.float32)
    skipped = np.zeros(losses.shape, bool) if skipped is None else skipped
    count, probed = len(losses), np.zeros(losses.shape, bool)
    held_out, finite = np.full(count, held_out), np.full(count, finite)
    return Outcome(held_out, held_out + 1, losses, skipped, probed, finite)


BAD, GOOD = Fault(faulty_streams.nothing), Fault(faulty_streams.nothing, good=True)


def test_after_a_change_the_parameters_in_use_count_and_how_long_they_take():
    usual = np.full((1, 60), 2.0)
    losses = usual.copy()
    losses[0, 20:30] += 1  # As the mean of five: from the second to three behind.
    base, found = outcome(2.0, usual), outcome(2.5, losses)
    found.probed[0, 40] = True
    found.losses[0, 40] = 50.0  # Not of the parameters in use.
    shift = Fault(faulty_streams.nothing, against=None, good=True, since=20)
    cell = stability.summarise(found, base, np.ones((1, 60), bool), shift)
    assert cell["lost"] == [1.5]
    assert cell["delay"] == [12]
    assert stability.summarise(found, base, usual > 3, BAD)["delay"] == []


def test_what_a_fault_costs_is_the_difference_to_the_base():
    usual, faulty = np.full((2, 100), 2.0), np.zeros((2, 100), bool)
    faulty[:, 50] = True
    losses, skipped = usual.copy(), faulty.copy()
    losses[:, 50] += 5  # The loss of the fault itself does not count.
    losses[:, 51:71] += 0.4
    skipped[1, [3, 60]] = True
    base, found = outcome(2.0, usual), outcome(2.1, losses, skipped)
    cell = stability.summarise(found, base, faulty, BAD)
    assert cell["lost"] == pytest.approx([0.1, 0.1])
    assert cell["excess"] == pytest.approx([0.2, 0.2])
    assert cell["true_skips"] == [1, 1]
    assert cell["false_skips"] == [0, 2]
    assert stability.summarise(found, base, faulty, GOOD)["false_skips"] == [1, 3]


def test_a_dead_run_has_no_loss_and_a_fault_without_an_end_no_excess():
    losses, faulty = np.full((1, 10), 2.0), np.ones((1, 10), bool)
    dead = outcome(math.nan, losses, finite=False)
    cell = stability.summarise(dead, outcome(2.0, losses), faulty, BAD)
    assert cell["lost"] == [None]
    assert cell["excess"] == []
    assert cell["finite"] == [False]
    assert stability.cell(cell["lost"]) == "**NaN**"


def test_a_cell_says_how_many_died_and_a_noise_row_how_far_runs_move():
    assert stability.cell([0.1, None, 0.3]) == "+0.200, **1 NaN**"
    assert stability.cell([0.1, -0.1], noise=True) == "±0.100"


@full
def test_a_grid_is_trained_and_the_fault_is_found():
    """A NaN kills adamw and not ours; the clean runs are where they would be."""
    faults = grids.CLEAN | {
        "NaN": Fault(faulty_streams.multiplied(math.nan, faulty_streams.at(20)))
    }
    optimizers = {CLIP: contenders.clipped, OURS: contenders.guarded}
    cells = stability.measure("tiny", Grid(TINY, faults, optimizers, seeds=2))
    assert cells[CLIP]["NaN"]["lost"] == [None, None]
    assert cells[OURS]["NaN"]["true_skips"] == [1, 1]
    assert cells[OURS]["NaN"]["finite"] == [True, True]
    assert max(map(abs, cells[OURS]["NaN"]["lost"])) < 0.1
    for each in cells.values():
        assert each["clean"]["false_skips"] == [0, 0]
        assert all(3 < x < 5.4 for x in each["clean"]["held_out"])
    table = stability.loss_table(
        "small", {CLIP: {"clean": cells[CLIP]["clean"]}}, [CLIP]
    )
    assert table.splitlines()[-1] == "| clean | +0.000 |"


@full
def test_all_at_once_is_row_by_row():
    faults = grids.CLEAN | {
        "random": Fault(faulty_streams.random_bytes(faulty_streams.at(5)))
    }
    grid = Grid(TINY._replace(calls=10), faults, {}, seeds=2)
    streams = stability.make_streams(grid)
    rows, whole = (
        stability.run_all(grid, contenders.clipped, streams, at_once=at_once)
        for at_once in (False, True)
    )
    assert list(rows) == list(whole) == ["clean", "random"]
    chex.assert_trees_all_close(rows, whole, rtol=1e-4)
    assert (rows["clean"].losses[:, 5] != rows["random"].losses[:, 5]).all()


# --- what is claimed of the last full run ---------------------------------------------

# By how much a clean run moves when one early batch is another.
NOISE = "another batch at 12"


def mean_lost(cells, optimizer, row):
    return np.mean(cells[optimizer][row]["lost"])


@pytest.fixture(scope="module")
def cells():
    return reporting.read("stability_small")["cells"]


def test_ours_is_finite_whatever_happens():
    for grid in grids.GRIDS:
        cells = reporting.read(f"stability_{grid}")["cells"]
        ours = cells.keys() & {OURS, *grids.BRANCHES} - {CLIP}
        for row, cell in (item for name in ours for item in cells[name].items()):
            assert all(cell["finite"]), row
            assert None not in cell["held_out"], row


@pytest.mark.parametrize(
    "row",
    ["NaN at 120", "Inf at 120", "one entry 1e20 at 120", "5 random batches at 120"],
)
def test_one_fault_costs_ours_a_hundredth_of_a_nat_at_most(cells, row):
    assert mean_lost(cells, OURS, row) <= 0.01


def test_five_corrupted_batches_early_cost_no_more_than_the_steps_lost(cells):
    """All five are left out, and nothing else: no rule that skips could do better."""
    corrupted, missing = (
        cells[OURS][row] for row in ("5 random batches at 45", "5 NaN at 45")
    )
    assert corrupted["true_skips"] == missing["true_skips"] == [5] * 4
    assert corrupted["false_skips"] == missing["false_skips"] == [0] * 4
    assert corrupted["held_out"] == pytest.approx(missing["held_out"], abs=1e-3)


def test_ours_skips_nothing_that_is_good_but_after_a_change_of_the_data(cells):
    for row, cell in cells[OURS].items():
        late = row == "new domain from 120 on"
        assert max(cell["false_skips"]) <= (5 if late else 0), row


def test_a_clean_run_of_ours_ends_within_the_noise_of_a_clip(cells):
    noise = np.mean(np.abs(cells[OURS][NOISE]["lost"]))
    assert abs(mean_lost(cells, OURS, "clean")) <= noise


def test_the_loss_scale_does_not_matter_to_ours(cells):
    for row in ("loss scale 1e-4", "loss scale 1e-12", "loss scale 1e-20"):
        assert np.max(np.abs(cells[OURS][row]["lost"])) < 1e-3
        assert mean_lost(cells, "adamw", row) > 0.03


@pytest.fixture(scope="module")
def branches():
    return reporting.read("stability_branch")["cells"]


@pytest.mark.parametrize(
    "row", [f"{length} random batches at 120" for length in (20, 50)]
)
def test_long_corruption_costs_a_branch_less_than_skipping(branches, row):
    for skips in ("skip ≤ 5", "skip ≤ 25"):
        for branch in ("branch", "branch, all kept"):
            gained = np.subtract(
                branches[skips][row]["lost"], branches[branch][row]["lost"]
            )
            assert gained.mean() > 2 * gained.std() / np.sqrt(len(gained))


@pytest.mark.parametrize("row", ["base64 from 120 on", "UTF-16 from 120 on"])
def test_a_branch_follows_new_data_at_once(branches, row):
    found = {name: np.mean(cells[row]["delay"]) for name, cells in branches.items()}
    assert found["branch"] <= 10 < 20 < found["skip ≤ 5"] < found["skip ≤ 25"]


def test_with_all_kept_short_corruption_costs_what_skipping_it_costs(branches):
    for row in ("2 random batches at 120", "5 random batches at 120"):
        skip, whole = (
            mean_lost(branches, name, row) for name in ("skip ≤ 5", "branch, all kept")
        )
        assert whole < skip + 0.005


def test_a_branch_changes_nothing_while_nothing_is_noticed(branches):
    for row in ("clean", "bytes shuffled, 20 at 120", "prose from 120 on"):
        skip, branch = (
            branches[name][row]["held_out"] for name in ("skip ≤ 5", "branch")
        )
        assert branch == pytest.approx(skip, abs=1e-4)

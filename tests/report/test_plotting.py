"""A picture of a run: of any numbers, with what matters in it, and whole."""

import importlib.util
import re

import matplotlib
import numpy as np
import pytest
from tiers import full, quick_only

from optax_stability._core import _atomic_file
from optax_stability._diagnosis._finding import Finding
from optax_stability._report import _plotting
from optax_stability._report._drawing import (
    _axes,
    _curves,
    _figures,
    _heat_map,
    _panels,
)
from optax_stability._report._plotting import plot_history

SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-310, 1e-30, 1e30, 1e300)
PANELS = ["loss", "gradient", "layers", "noise", "adam"]
PANELS += ["attention", "update", "rate", "extra/accuracy", "extra/load"]
LAYERS = ("tokens/embedding", "blocks/0/qkv/kernel", "blocks/1/mlp/kernel")
LAYER_KEYS = [f"grad/norm/{layer}" for layer in LAYERS]


def run_of(rows=200, **changed):
    """A small run with all that is drawn: a spike, a clip, skips, a NaN, gaps."""
    rng = np.random.default_rng(0)
    step = np.arange(rows)
    wave = np.exp(0.2 * rng.standard_normal((rows, 8)))
    norm = (0.5 + 3 * np.exp(-step / 20)) * wave[:, 0]
    norm[rows // 2 : rows // 2 + 2] *= 30
    norm[rows * 3 // 4 : rows * 3 // 4 + 1] = np.nan
    held_out = np.full(rows, np.nan)
    held_out[9::20] = 2.5
    scale = np.where(step < 20, np.nan, 50 * wave[:, 1])
    history = {
        "step": step,
        "loss": 2 + 3 * np.exp(-step / 30) + 0.05 * wave[:, 2],
        "eval/loss": held_out,
        "learning_rate": np.full(rows, 1e-3),
        "grad/norm": norm,
        "clip/limit": np.where(step < 25, np.inf, 1.0),
        "skip/norm_limit": np.where(step < 25, np.inf, 5.0),
        "skip/skipped": (norm > 5) & (step > 25),
        "noise_scale/b_simple": scale,
        "noise_scale/low": np.where(step < 10, 0, 30 * wave[:, 1]),
        "noise_scale/high": np.where(step < 20, np.inf, 90 * wave[:, 1]),
        "noise_scale/batch_size": np.full(rows, 64.0),
        "update/rms": 1e-4 * wave[:, 3],
        "adam/update_rms": 0.25 * wave[:, 4],
        "attention/logit_bound": 100 * wave[:, 5],
        "extra/accuracy": 0.5 * wave[:, 6],
    }
    for head in range(2):
        history[f"attention/logit_bound/blocks/0/{head}"] = 100 * wave[:, 5 + head]
        history[f"extra/load/{head}"] = wave[:, 7 - head]
    for i, layer in enumerate(LAYERS):
        history[f"grad/norm/{layer}"] = norm * wave[:, 5 + i]
    return history | changed


def branching_run():
    """A branch of ten steps with a failed probe, that is rolled back."""
    history = run_of()
    mode, probed, back = np.zeros((3, 200))
    mode[120:130], mode[[124, 129]], probed[[125, 130]], back[130:] = 1, 2, 1, 1
    history["loss"][[125, 130]] = 40.0
    return history | {
        "branch/mode": mode,
        "branch/probed": probed,
        "branch/rollbacks": back,
        "branch/accepted": np.zeros(200),
    }


def only(*keys):
    history = run_of()
    return {key: history[key] for key in ("step", *keys)}


def titles(history):
    return [panel.name for panel in _panels.shown(_curves.read(history))]


def picture(history, findings=()):
    """The SVG of a history, whose texts can be read."""
    run = _curves.read(history)
    drawn = _figures.render(run, _panels.shown(run), list(findings), "svg")
    return drawn.content.decode()


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def numbers(svg):
    """The numbers of findings, which are bold and white, from the left."""
    return re.findall(r"<text[^>]*700; font-size: 7px[^>]*>([\d ]+)</text>", svg)


def finding(step, kind="loss_spike"):
    return Finding(kind, "loss", step, None, "evidence", ("cause",), ("remedy",))


# --- Whatever the numbers are, a picture is written. ----------------------------------


@pytest.mark.parametrize("value", SPECIAL)
def test_any_number_everywhere_is_drawn(value):
    history = {key: np.full(12, value) for key in run_of(12)} | {"step": np.arange(12)}
    assert titles(history) == ([] if np.isnan(value) else PANELS)
    assert picture(history).endswith("</svg>\n")


def test_of_many_heads_the_highest_and_the_lowest_are_drawn():
    history = only("attention/logit_bound/blocks/0/0")
    history["attention/logit_bound/blocks/0/1"] = np.full(200, 3.0)
    shown = texts(picture(history))
    assert "highest, last 93.0" in shown
    assert "lowest, last 3" in shown
    assert "level 250" in shown


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_short_histories_are_drawn(tmp_path, rows):
    history = {key: values[:rows] for key, values in run_of().items()}
    plot_history(history, tmp_path / "run.svg")
    assert (tmp_path / "run.svg").stat().st_size > 1000


@full
def test_mixtures_of_numbers_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    values = np.array([*SPECIAL, 1.0, 2.0, 3.0])
    history = {key: rng.choice(values, 40) for key in run_of()}
    plot_history(history | {"step": np.arange(40)}, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize("key", list(run_of())[1:])
def test_any_metric_may_be_alone(key):
    assert "</svg>" in picture(only(key))


@pytest.mark.parametrize("key", ["grad/norm", "clip/limit", "noise_scale/b_simple"])
def test_any_metric_may_be_missing(key):
    history = run_of(60)
    del history[key]
    assert "</svg>" in picture(history)


@pytest.mark.parametrize(
    "steps",
    [[5, 5, 5, 5], [0, 7, 1000, 100_000], [0, 5, 2, 3], 10**12 + np.arange(4)],
    ids=["same", "gaps", "backwards", "large"],
)
def test_any_steps_are_drawn(steps):
    history = {key: values[:4] for key, values in only("loss", *LAYER_KEYS).items()}
    assert "</svg>" in picture(history | {"step": np.asarray(steps)})


def test_a_list_and_none_are_numbers_too(tmp_path):
    plot_history({"step": [0, 1], "loss": [1.0, None]}, tmp_path / "run.png")


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")]
)
def test_the_suffix_sets_the_format(tmp_path, suffix, start):
    path = tmp_path / "new" / "folder" / f"run{suffix}"
    plot_history(only("loss"), str(path))
    assert path.read_bytes().startswith(start)


def test_nothing_recorded_says_so():
    assert titles({"step": np.arange(4), "loss": np.full(4, np.nan)}) == []
    assert "None of the metrics that can be plotted was recorded." in texts(
        picture({"step": np.zeros(0)})
    )


# --- Panels are there if and only if their metrics are. -------------------------------


@pytest.mark.parametrize(
    ("key", "panel"),
    [
        ("loss", "loss"),
        ("eval/loss", "loss"),
        ("grad/norm", "gradient"),
        ("grad/norm/tokens/embedding", "layers"),
        ("noise_scale/low", "noise"),
        ("adam/update_rms", "adam"),
        ("update/rms", "update"),
        ("learning_rate", "rate"),
    ],
)
def test_a_panel_for_each_metric(key, panel):
    assert titles(only(key)) == [panel]


def test_all_panels_and_none_without_numbers():
    assert titles(run_of()) == PANELS
    assert titles(only("clip/limit", "skip/skipped")) == []


def test_fallbacks_of_loss_and_norm():
    steps = {"step": np.arange(5)}
    assert titles(steps | {"skip/value": np.ones(5)}) == ["loss"]
    assert titles(steps | {"skip/value": np.zeros(5)}) == []
    assert titles(steps | {"skip/norm": np.ones(5)}) == ["gradient"]
    assert titles(steps | {"clip/norm": np.ones(5)}) == ["gradient"]


@full
def test_the_legend_counts_and_tells_the_last_values():
    shown = texts(picture(run_of()))
    for text in ("held out, last 2.50", "skipped, 2 steps", "not finite, 1 step"):
        assert text in shown
    assert "clip limit" in shown
    without = only("grad/norm") | {"clip/limit": np.zeros(200)}
    assert "clip limit" not in texts(picture(without))
    assert any(text.startswith("not finite (") for text in shown)


@full
def test_a_branch_is_shaded_and_its_probes_are_marked_and_no_loss():
    history = branching_run()
    svg = picture(history)
    shown = texts(svg)
    for text in ("branch, 10 steps", "1 failed probe", "1 rollback"):
        assert text in shown
    assert not any("above the axis" in text for text in shown)
    assert 40.0 not in _curves.loss_of(_curves.read(history).train)
    quiet = history | {"branch/mode": np.zeros(200), "branch/rollbacks": np.zeros(200)}
    assert not any("branch" in text for text in texts(picture(quiet)))
    assert _curves.read(run_of()).branches is None


def test_what_is_off_the_scale_is_told():
    history = only("loss")
    history["loss"][50] = 1e20
    assert "above the axis, at most 10²⁰" in texts(picture(history))


def test_names_are_not_taken_for_mathematics():
    name = "a$b_{c}$<&>\"'"
    svg = picture({"step": np.arange(3), f"grad/norm/{name}": np.ones(3)})
    assert "a$b_{c}$&lt;&amp;&gt;\"'" in svg


# --- Findings. ------------------------------------------------------------------------


def test_findings_are_numbered_in_their_order():
    svg = picture(only("loss"), [finding(180), finding(20), finding(100)])
    # From the left: step 20 is the second finding, 100 the third, 180 the first.
    assert numbers(svg) == ["2", "3", "1"]


def test_findings_too_near_to_tell_apart_share_a_number():
    svg = picture(only("loss"), [finding(51), finding(50), finding(150)])
    assert "1 2" in texts(svg)


def test_plot_history_asks_the_diagnosis(tmp_path, monkeypatch):
    monkeypatch.setattr(_plotting, "diagnose", lambda history: [finding(70)] * 9)
    plot_history(only("loss"), tmp_path / "run.svg")
    assert "1 2 3 4 5 6 7 8 9" in texts((tmp_path / "run.svg").read_text())


# --- No event is lost to thinning. ----------------------------------------------------


def test_extremes_and_marks_survive_thinning():
    values = np.zeros(100_000)
    values[[123, 45_678, 99_999]] = 5.0, -5.0, np.nan
    rows = _curves.extreme_rows(values)
    assert {123, 45_678} <= set(rows)
    assert len(rows) <= 2 * _curves.PIXELS
    flags = values != 0
    assert set(_curves.marker_rows(flags, values)) == {123, 45_678, 99_999}
    many = _curves.marker_rows(np.ones(100_000, bool), values)
    assert 123 in many
    assert len(many) == _curves.PIXELS


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@quick_only("nan")
def test_one_bad_cell_of_many_is_seen_in_the_heat_map(bad):
    rows, layers = 5000, 900
    norms = np.ones((rows, layers))
    norms[1234, 567], norms[3000:3004, 100], norms[4000, 5] = bad, 1e-3, 20.0
    history = {f"grad/norm/l{i}": norms[:, i] for i in range(layers)}
    found = _heat_map.cells(_curves.read({"step": np.arange(rows)} | history).train)
    assert found is not None
    assert found.level.shape == found.nonfinite.shape == (360, 720)
    assert found.nonfinite.sum() == 1
    row, column = np.argwhere(found.nonfinite)[0]
    assert (row, column) == (227, 177)  # row 227 begins with layer 2.5 × 227 = 567.5
    level = np.where(found.nonfinite, 0.0, found.level)
    assert level.min() == -2.0
    assert level.max() == pytest.approx(np.log10(20))
    assert found.names[0] == "l0"


def test_layers_that_were_not_looked_at_are_no_broken_ones():
    norm, layer = np.ones(30), np.where(np.arange(30) % 3 == 0, 1.0, np.nan)
    history = {"step": np.arange(30), "grad/norm": norm, "grad/norm/a": layer}
    found = _heat_map.cells(_curves.read(history).train)
    assert found is not None
    assert found.level.shape == (1, 10)
    assert not found.nonfinite.any()
    assert not np.isnan(found.level).any()


def test_what_is_broken_and_what_is_missing():
    nan, inf = np.nan, np.inf
    values = np.array([nan, 1, 1, nan, 1, 1, 1, nan, nan, 1, inf, nan, 1])
    assert np.flatnonzero(_curves.is_nonfinite(values)).tolist() == [7, 8, 10]


def test_rows_of_an_evaluation_are_no_steps_of_training():
    history = {"step": np.array([0, 1, 2, 3, 3, 4]), "loss": np.ones(6)}
    history["eval/loss"] = np.full(6, np.nan)
    history["loss"][4], history["eval/loss"][4] = np.nan, 2.0
    run = _curves.read(history)
    assert run.train.columns["step"].tolist() == [0, 1, 2, 3, 4]
    assert run.held_out_steps.tolist() == [3]
    assert run.held_out.tolist() == [2.0]


def test_the_trend_is_the_median_of_the_neighbours():
    values = np.random.default_rng(0).standard_normal(400)
    values[17] = np.nan
    rows, level = _curves.running_median(values)
    assert rows.tolist() == list(range(400))
    # A fortieth of 400 rows: five on either side.
    expected = [np.nanmedian(values[max(0, i - 5) : i + 6]) for i in range(400)]
    np.testing.assert_allclose(level, expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0042, "2.00"),
        (64, "64"),
        (0, "0"),
        (1234567, "1.23·10⁶"),
        (1e-30, "10⁻³⁰"),
        (-2.5e-7, "−2.5·10⁻⁷"),
        (41300, "41,300"),
        (np.inf, "∞"),
        (np.nan, "NaN"),
    ],
)
def test_numbers_are_short(value, text):
    assert _axes.short(value) == text


# --- The file, settings, arguments. ---------------------------------------------------


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "run.png"
    path.write_bytes(b"before")

    def fails(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(_atomic_file.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        plot_history(only("loss"), path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


def test_settings_of_matplotlib_are_neither_used_nor_changed():
    history = only("loss", "update/rms")
    plain = picture(history)
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert picture(history) == plain
        assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "optax_stability\[plot\]"'):
        plot_history(only("loss"), tmp_path / "run.png")


@pytest.mark.parametrize(
    ("history", "path", "error", "message"),
    [
        ([1], "a.png", TypeError, r"history must be a dict .* got list; pass what"),
        ({"loss": [1.0]}, "a.png", ValueError, r"history has no 'step'.*; add"),
        (
            {"step": [0, 1], "loss": [1.0]},
            "a.png",
            ValueError,
            r"history\['loss'\] has shape \(1,\).*\(2,\)",
        ),
        ({"step": [0], "loss": ["x"]}, "a.png", TypeError, r"history\['loss'\].*'x'"),
        ({"step": []}, "a.jpg", ValueError, r"path='a.jpg' must end with .*\.png"),
        ({"step": []}, "a", ValueError, r"path='a' must end with one of \.png"),
        ({"step": []}, 3, TypeError, r"path must be a str .* got 3; pass"),
    ],
)
def test_bad_arguments_are_named(history, path, error, message):
    with pytest.raises(error, match=message):
        plot_history(history, path)


# --- What a reader sees. --------------------------------------------------------------


def ticks(svg):
    """The numbers along the axes, as text."""
    return [text for text in texts(svg) if re.fullmatch(r"−?[\d.,]+", text)]


def test_ticks_are_round_and_have_the_same_decimal_places():
    history = {"step": np.arange(300), "loss": np.linspace(5.555, 5.475, 300)}
    found = ticks(picture(history))
    assert {"0", "50", "100", "150", "200", "250", "300"} <= set(found)
    levels = [text for text in found if "." in text]
    assert levels == ["5.48", "5.50", "5.52", "5.54"]


def test_a_short_run_shows_what_its_legend_names():
    shown = texts(picture({"step": np.arange(12), "loss": np.linspace(3, 2, 12)}))
    assert any(text.startswith("training, each step, last 2") for text in shown)
    assert not any("median" in text for text in shown)
    shown = texts(picture({"step": np.arange(90), "loss": np.linspace(3, 2, 90)}))
    assert any(text.startswith("running median, last 2.0") for text in shown)


def test_an_evaluation_is_inside_the_axis():
    """A held-out loss that is higher than the training loss ever is later."""
    history = {"step": np.arange(1000), "loss": np.full(1000, 1.0)}
    history["eval/loss"] = np.full(1000, np.nan)
    history["eval/loss"][99::100] = np.linspace(2, 9, 10)
    assert "8" in ticks(picture(history))


def test_of_too_many_layers_kernels_are_named():
    layers = [f"blocks/{i}/{kind}" for i in range(30) for kind in ("kernel", "bias")]
    history = {f"grad/norm/{layer}": np.ones(9) for layer in layers}
    shown = texts(picture({"step": np.arange(9)} | history))
    assert "blocks/7/kernel" in shown
    assert not any("bias" in text for text in shown)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("blocks/1/mlp/kernel", "blocks/1/mlp/kernel"),
        (
            "model/layers/11/self_attention/query_key_value/kernel",
            "model/…/query_key_value/kernel",
        ),
        ("a" * 50, "a" * 16 + "…" + "a" * 16),
    ],
)
def test_long_names_keep_what_they_name(name, short):
    assert _heat_map._shorten(name) == short

"""A report: one page that needs nothing else, with everything in it and escaped."""

import functools
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_plotting import (
    LAYER_KEYS,
    SPECIAL,
    branching_run,
    finding,
    numbers,
    only,
    run_of,
    titles,
)
from tiers import full, quick_only

from optax_stability._core import _atomic_file
from optax_stability._diagnosis._finding import KINDS, Finding
from optax_stability._report import _page, _plotting, _report
from optax_stability._report._drawing import _curves
from optax_stability._report._plotting import plot_history
from optax_stability._report._report import write_report

CHROMIUM = shutil.which("chromium")
NASTY = "</style><script>alert('x')</script>&\"'"
VOID = {"meta", "br", "img", "link", "use", "path", "image"}
SVG_NAMESPACES = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


class Outline(HTMLParser):
    """Reads a page as a browser would, and holds what matters."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.ids, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path):
    def write(history, **options):
        path = tmp_path / "report.html"
        write_report(history, path, **options)
        return path.read_text(encoding="utf-8")

    return write


@functools.cache
def full_report():
    """The report on a run with all panels, made once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_report(run_of(), path)
        return path.read_text(encoding="utf-8")


def nasty():
    """A history and a finding with all that could break out of a page."""
    history = run_of() | {
        f"grad/norm/{NASTY}": np.ones(200),
        f"x/{NASTY}": np.ones(200),
    }
    found = Finding(NASTY, NASTY, 7, NASTY, NASTY, (NASTY,), (f"`{NASTY}`",))
    return history, found


# --- Whatever the numbers are, a report is written. -----------------------------------


@pytest.mark.parametrize("value", SPECIAL)
def test_any_number_is_reported(report, value):
    keys = "step", "loss", "eval/loss", "grad/norm", "clip/limit", "skip/skipped"
    history = {key: np.full(12, value) for key in keys} | {"step": np.arange(12)}
    assert report(history).endswith("</html>\n")


@pytest.mark.parametrize("rows", [0, 1, 3])
@quick_only("0", "1")
def test_short_histories_are_reported(report, rows):
    page = report({key: values[:rows] for key, values in run_of().items()})
    assert "Findings" in page
    assert ("no steps" in page) == (rows == 0)


# --- The page. ------------------------------------------------------------------------


@full
def test_the_page_loads_nothing_and_is_well_formed():
    page = full_report()
    outline = Outline(page)
    assert not outline.open
    assert not {"link", "script", "iframe", "object", "base"} & set(outline.tags)
    assert all(link.startswith(("#", "data:image/png;")) for link in outline.links)
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(re.findall(r"https?://[^\"' )]*", page)) == set(SVG_NAMESPACES)
    assert "@import" not in page
    assert "default-src 'none'" in page


@full
def test_links_inside_the_page_lead_somewhere():
    outline = Outline(full_report())
    inside = [link[1:] for link in outline.links if link.startswith("#")]
    assert inside
    assert set(inside) <= set(outline.ids)


def test_everything_is_escaped(report, monkeypatch):
    history, found = nasty()
    monkeypatch.setattr(_report, "diagnose", lambda history: [found])
    page = report(history, title=NASTY)
    outline = Outline(page)
    assert "script" not in outline.tags
    assert outline.tags.count("style") == 1
    assert not outline.open
    assert page.count("&lt;script&gt;") >= 8
    assert "<code>&lt;/style&gt;" in page


def test_names_that_are_no_unicode_are_written(report):
    assert "x/?" in report({"step": np.arange(3), "x/\udcff": np.ones(3)})
    layer = {"step": np.arange(3), "grad/norm/\udc80": np.ones(3)}
    assert "grad/norm/?" in report(layer)


def test_panels_are_those_of_the_picture(report):
    assert full_report().count("<figure>") == len(titles(run_of()))
    for history in (only("loss"), only("learning_rate", "update/rms")):
        assert report(history).count("<figure>") == len(titles(history))
    assert "None of the metrics that can be plotted" in report(only())


def test_a_chart_is_described_for_those_who_do_not_see_it():
    labels = re.findall(r'role="img" aria-label="([^"]*)"', full_report())
    assert len(labels) == 10
    assert labels[0].startswith("Loss. Over steps 0–199: training, each step; ")
    assert "held out, last 2.50" in labels[0]


def test_every_kind_has_a_title_for_people():
    assert set(_page.TITLES) == set(KINDS)
    assert _page.title_of("of_tomorrow") == "Of tomorrow"


def test_a_finding_tells_all_it_knows(report, monkeypatch):
    found = Finding(
        "loss_spike", "loss", 1234, "blocks/1", "loss 5", ("bad data",), ("`clip()`",)
    )
    monkeypatch.setattr(_report, "diagnose", lambda history: [found])
    page = report(only("loss"))
    for part in (
        "The loss spiked",
        "from step 1,234",
        "<code>blocks/1</code>",
        "seen in <code>loss</code>",
        "loss 5",
        "<li>bad data</li>",
        "<li><code>clip()</code></li>",
    ):
        assert part in page
    assert "No finding" not in page


def test_without_a_finding_it_says_what_was_looked_at(report):
    calm = {"step": np.arange(10, 40), "loss": np.linspace(3, 2, 30)}
    assert "No finding:</strong> in steps 10–39, over 1 metric, no" in report(calm)


def test_findings_have_the_same_numbers_in_page_and_picture(
    report, monkeypatch, tmp_path
):
    found = [finding(180, "nonfinite"), finding(20, "plateau")]
    for module in (_report, _plotting):
        monkeypatch.setattr(module, "diagnose", lambda history: found)
    page = report(only("loss"))
    cards = re.findall(r'id="finding-(\d)-title">([^<]*)<', page)
    assert cards == [
        ("1", "NaN or Inf"),
        ("2", "The loss does not fall"),
    ]
    plot_history(only("loss"), tmp_path / "run.svg")
    for drawn in (page[page.index("<svg") :], (tmp_path / "run.svg").read_text()):
        assert numbers(drawn) == ["2", "1"]


def test_a_skipped_step_does_not_count_as_clipped():
    history = {
        "step": np.arange(4),
        "clip/norm": np.array([1.0, 3.0, 3.0, 3.0]),
        "clip/limit": np.full(4, 2.0),
        "skip/skipped": np.array([0.0, 0.0, 1.0, 0.0]),
    }
    tiles = _report._tiles(_curves.read(history), [])
    assert "Clipped</dt><dd>2<small>50.0% of 4 steps" in tiles
    assert "Skipped</dt><dd>1<small>25.0% of 4 steps" in tiles


def test_the_table_has_last_smallest_and_largest(report):
    history = only("loss") | {"noise_scale/high": np.full(200, np.inf)}
    history["loss"] = np.concatenate([[np.nan, np.inf], np.linspace(5, 2, 198)])
    page = report(history)
    row = re.search(r"<code>loss</code></th>.*", page)
    assert row is not None
    cells = re.findall(r"<td>([^<]*)</td>", row[0])
    assert cells == ["2", "2", "5", "199", "1"]
    assert "<td>∞</td><td>NaN</td><td>NaN</td><td>200</td><td>200</td>" in page


def test_all_names_are_listed():
    page = full_report()
    assert f"{len(run_of())} names" in page
    assert all(f"<li><code>{key}</code></li>" in page for key in run_of())


@full
def test_a_large_history_makes_a_moderate_file(report):
    rng = np.random.default_rng(0)
    history = {
        f"grad/norm/blocks/{i}/kernel": rng.lognormal(size=1024) for i in range(1000)
    }
    history = {"step": np.arange(1024), "loss": np.ones(1024)} | history
    assert len(report(history)) < 3_000_000


def test_a_report_is_whole_or_that_of_before(report, tmp_path, monkeypatch):
    report(only("loss"))
    before = (tmp_path / "report.html").read_bytes()

    def fails(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(_atomic_file.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report(only("learning_rate"))
    assert (tmp_path / "report.html").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("history", "path", "error", "message"),
    [
        ([1], "a.html", TypeError, r"history must be a dict .* got list; pass what"),
        ({"loss": [1.0]}, "a.html", ValueError, r"history has no 'step'.*; add"),
        ({"step": []}, "a.pdf", ValueError, r"path='a.pdf' must end with .*\.html"),
    ],
)
def test_bad_arguments_are_named(history, path, error, message):
    with pytest.raises(error, match=message):
        write_report(history, path)


# --- A real browser. ------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_opens_it_without_a_complaint_or_a_request(tmp_path):
    assert CHROMIUM
    path = tmp_path / "report.html"
    write_report(nasty()[0], path, title="A run & its <report>")
    log = tmp_path / "net.json"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "<h1>A run &amp; its &lt;report&gt;</h1>" in done.stdout
    assert done.stdout.count("<figure>") == 10
    assert "CONSOLE" not in done.stderr
    assert set(re.findall(r"https?://[^\"' )]*", done.stdout)) == set(SVG_NAMESPACES)
    # What the browser asks for of its own has no page as its initiator.
    assert '"initiator":"null"' not in log.read_text()


@full
def test_what_was_taken_back_is_on_the_page(report):
    page = report(branching_run())
    assert "Rolled back" in page
    assert "1 failed probe<" in page
    assert "branches rolled back so far" in page
    assert "Rolled back" not in report(run_of())


def test_the_loss_on_top_is_the_running_median(report):
    """One noisy batch at the end says nothing of the run."""
    history = only("loss", "eval/loss")
    history["loss"][-1] = 9.0
    page = report(history)
    tile = re.search(r"<dt>Loss</dt><dd>([^<]*)<small>([^<]*)", page)
    assert tile is not None
    assert 2 < float(tile[1]) < 2.2
    assert tile[2].startswith("running median; lowest 2.")
    assert "<dt>Held-out loss</dt><dd>2.50<small>" in page


def test_the_legend_is_text_that_wraps(report):
    page = report(run_of())
    (legend, *_) = re.findall(r'<ul class="legend">(.*?)</ul>', page)
    first, second, third = re.findall(r"</svg>([^<]*)</li>", legend)
    assert first == "training, each step"
    assert re.fullmatch(r"running median, last 2\.\d\d", second)
    assert third == "held out, last 2.50"
    assert "flex-wrap: wrap" in page


def test_a_metric_of_many_layers_counts_once(report):
    page = report(only("loss", "grad/norm", *LAYER_KEYS))
    assert "200 rows · 2 metrics, 3 layers" in page
    assert "1 row · 1 metric" in report({"step": [0], "loss": [1.0]})


def test_a_row_of_the_heat_map_tells_more_on_hover(report):
    history = only(*LAYER_KEYS)
    history[LAYER_KEYS[1]][150:] = np.nan
    page = report(history)
    titles = re.findall(r"<title>(blocks[^<]*)</title>", page)
    assert len(titles) == 2
    assert "blocks/0/qkv/kernel: median " in titles[0]
    assert "largest" in titles[0]
    assert "not finite in 50 rows from step 150" in titles[0]

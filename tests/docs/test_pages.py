"""The site is complete: every name, every metric, every link, and code that runs."""

import importlib.util
import re
from pathlib import Path

import pytest
from test_contract import CASES, make_params
from test_public_api import NAMES

import optax_stability as ost
from optax_stability import thresholds

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages that people read on the web, in the repository and on the package index.
PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *DOCS.rglob("*.md")]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


home, check_site = load(DOCS / "home.py"), load(DOCS / "check_site.py")


def name_of(page):
    return str(page.relative_to(ROOT))


# --- the reference ---------------------------------------------------------------


def referenced():
    """Names as users import them, by the page of the reference that documents them."""
    names = {}
    for page in sorted((DOCS / "reference").glob("*.md")):
        prefix = ""
        for kind, name in re.findall(
            r"^\.\. (currentmodule|auto\w+):: (\S+)", page.read_text(), re.MULTILINE
        ):
            if kind == "currentmodule":
                prefix = name.removeprefix("optax_stability").removeprefix(".")
                prefix += "." if prefix else ""
            else:
                names.setdefault(prefix + name, []).append(page.name)
    return names


def test_every_public_name_is_in_the_reference_once():
    found = referenced()
    missing, unknown = sorted(NAMES.keys() - found), sorted(found.keys() - NAMES)
    remedy = "add `.. autofunction:: NAME` to the page of its theme in docs/reference"
    assert not missing, f"{', '.join(missing)}: {remedy}"
    assert not unknown, f"{', '.join(unknown)}: no public name"
    assert {name: pages for name, pages in found.items() if len(pages) > 1} == {}


def test_every_page_of_the_reference_is_in_its_list():
    index = (DOCS / "reference" / "index.md").read_text()
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")} - {"index"}
    assert pages == set(re.findall(r"^(\w+)$", index, re.MULTILINE))


# --- metrics ---------------------------------------------------------------------


def documented_metrics():
    text = (DOCS / "metrics.md").read_text()
    keys = " ".join(line.split("|")[1] for line in text.splitlines() if line[:1] == "|")
    return set(re.findall(r"`([^`]+)`", keys))


def emitted_metrics():
    """The keys of every transformation, as the page spells them."""
    transformations = {name: case.make() for name, case in CASES.items()}
    every = {"correlation": True, "ratio_to_params": True, "spectral": True}
    transformations["record, everything"] = ost.record("grad", histogram=True, **every)
    keys = set()
    for tx in transformations.values():
        keys |= ost.metrics(tx.init(make_params())).keys()
    keys = {re.sub(r"/per_(leaf|entry)$", "", key) for key in keys}
    keys = {re.sub(r"^extra/.*", "extra/<name>", key) for key in keys}
    names = r"^(grad|update|params|clipped|norms|everything)/"
    return {re.sub(names, "<name>/", key) for key in keys}


def test_every_metric_is_explained():
    missing = emitted_metrics() - documented_metrics()
    assert not missing, f"{sorted(missing)}: add a row to docs/metrics.md"


# --- links -----------------------------------------------------------------------


def anchors(path):
    """The headings of a page, as links spell them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower())
        yield words.strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if ":" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        notebook = ROOT / "examples" / target.name  # Copied when the site is built.
        assert target.exists() or notebook.is_file(), link
        if anchor:
            assert anchor in set(anchors(target)), link


PAGE = DOCS / "guides" / "page.md"
TEXT = "[a](../../README.md#x) [b](spikes.md) ![c](../../examples/docs/c.png)"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (
            "https://example.com/o/r",
            "[a](https://example.com/o/r/blob/HEAD/README.md#x) [b](spikes.md) "
            "![c](https://example.com/o/r/raw/HEAD/examples/docs/c.png)",
        ),
        (None, "a [b](spikes.md) "),
    ],
)
def test_links_to_files_lead_to_the_repository_or_are_words(address, expected):
    def leaves(path):
        return not path.is_relative_to(DOCS)

    assert home.link_files(TEXT, PAGE, address, leaves=leaves) == expected


def test_the_address_is_what_the_workflow_says():
    known = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "o/r"}
    assert home.address(known) == "https://github.com/o/r"
    assert home.address({}) is None


@pytest.mark.parametrize("address", ["https://example.com/o/r", None])
def test_the_description_on_the_package_index_has_whole_links_alone(address):
    readme = ROOT / "README.md"
    text = home.link_files(readme.read_text(), readme, address, leaves=lambda _: True)
    assert "https://github.com/google-deepmind/optax" in LINK.findall(text)
    assert all(link.startswith("https://") for link in LINK.findall(text))


@pytest.mark.parametrize(
    ("page", "loaded"),
    [
        ('<script src="_static/a.js"></script><a href="https://x.org">x</a>', 0),
        ('<script async src="https://cdn.org/a.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.org/a.css">', 1),
        ('<link href="https://fonts.org/a.css" rel="stylesheet">', 1),
        ('<link rel="canonical" href="https://x.org/page.html">', 0),
        ('<img alt="a" src="https://x.org/a.png">', 1),
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_seen(page, loaded, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page)
    assert len(check_site.loads(path)) == loaded


# --- code ------------------------------------------------------------------------


def test_the_threshold_of_the_developing_page_passes_its_tests(monkeypatch):
    text = (DOCS / "developing" / "threshold.md").read_text()
    source, test = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    given, tests = {"__name__": "decaying_max"}, {"__name__": "test_decaying_max"}
    exec(source, given)
    factory = given["decaying_max"]
    monkeypatch.setattr(thresholds, "decaying_max", factory, raising=False)
    exec(test, tests)
    tests["test_decaying_max_worked_by_hand"]()
    tests["test_a_power_of_two_scales_every_limit_bit_for_bit"]()
    tests["test_a_ratio_of_one_is_refused"]()
    for size in (1e3, 1e30):
        tests["test_one_value_of_any_size_raises_the_level_by_the_ratio_at_most"](size)
    for bad in (float("nan"), float("inf"), 0.0):
        tests["test_what_is_no_level_is_not_learned"](bad)


# Blocks that are no doctests: what other frameworks do, and the developing pages.
NOT_RUN = {"docs/coming_from/pytorch.md", "docs/developing/threshold.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_a_page_is_run(page):
    if name_of(page) in {*NOT_RUN, "README.md"} or "trainers" in page.parts:
        return
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(), re.S | re.M)
    assert all(block.lstrip().startswith(">>>") for block in blocks)

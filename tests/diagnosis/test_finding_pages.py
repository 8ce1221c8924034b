"""Each finding has a page, made from the present code, with a picture as new as it."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from optax_stability._diagnosis._finding import KINDS

SCRIPT = Path(__file__).parents[2] / "docs" / "make_findings.py"


@functools.cache
def maker():
    spec = importlib.util.spec_from_file_location("make_findings", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rates():
    return json.loads(maker().RATES.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_a_kind_is_that_of_the_present_code(kind):
    text = (maker().PAGES / f"{kind}.md").read_text()
    assert text == maker().page(kind, rates()), "run: python docs/make_findings.py"
    assert (maker().PAGES / f"{kind}.svg").stat().st_size > 1000


def test_the_list_of_pages_is_that_of_the_kinds():
    assert (maker().PAGES / "README.md").read_text() == maker().index()
    pages = {path.stem for path in maker().PAGES.glob("*.md")} - {"README"}
    assert pages == set(KINDS) == set(maker().TEXTS)


def test_no_picture_is_older_than_what_draws_it():
    stored = (maker().PAGES / "fingerprint").read_text().strip()
    assert stored == maker().fingerprint(), "run: python docs/make_findings.py"

"""Every picture of the examples is made by one command, and as new as what draws it."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@functools.cache
def maker():
    path = ROOT / "docs" / "make_pictures.py"
    spec = importlib.util.spec_from_file_location("make_pictures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_made_by_the_command_and_stands_on_a_page():
    pictures = {path.stem for path in maker().FOLDER.glob("*.png")}
    assert pictures == set(maker().PICTURES) == set(maker().stored())
    pages = [ROOT / "README.md", ROOT / "examples" / "README.md"]
    pages += (ROOT / "docs").rglob("*.md")
    text = "".join(page.read_text() for page in pages)
    shown = set(re.findall(r"\]\([\w./]*docs/(\w+)\.png\)", text))
    assert shown == pictures


@pytest.mark.parametrize("name", maker().PICTURES)
def test_no_picture_is_older_than_what_draws_it(name):
    assert maker().stored()[name] == maker().fingerprint(name), (
        f"{name}.png is older than what draws it; run: "
        f"python docs/make_pictures.py {name}"
    )


def test_a_change_of_what_draws_a_picture_makes_it_old(tmp_path, monkeypatch):
    script, notebook = tmp_path / "draw.py", tmp_path / "book.ipynb"
    script.write_text("color = 1")
    cell = {"cell_type": "code", "source": ["x = ", "1"], "outputs": []}
    words = {"cell_type": "markdown", "source": ["words"]}
    notebook.write_text(json.dumps({"cells": [cell, words]}))
    picture = maker().Picture(maker().PICTURES["linen"].make, (script, notebook))
    monkeypatch.setitem(maker().PICTURES, "linen", picture)
    first = maker().fingerprint("linen")
    run = cell | {"outputs": [{"output_type": "stream", "text": "1"}]}
    notebook.write_text(json.dumps({"cells": [run, words | {"source": ["other"]}]}))
    assert maker().fingerprint("linen") == first
    notebook.write_text(json.dumps({"cells": [cell | {"source": ["x = 2"]}, words]}))
    second = maker().fingerprint("linen")
    script.write_text("color = 2")
    assert len({first, second, maker().fingerprint("linen")}) == 3


def test_the_commands_are_those_of_the_gallery(tmp_path, monkeypatch):
    """The pages that show a picture give the command that makes it."""
    ran = []

    def note(folder, script, *flags):
        ran.append(" ".join(["python", f"examples/{script}", *flags]))

    monkeypatch.setattr(maker(), "_run", note)
    for name in ("compare", "branch", "training", "lora", "linen"):
        with pytest.raises(FileNotFoundError):
            maker().PICTURES[name].make(tmp_path)
    gallery = (ROOT / "docs" / "gallery" / "index.md").read_text()
    assert len(ran) == 5
    for command in ran:
        assert f"```sh\n{command}\n```" in gallery

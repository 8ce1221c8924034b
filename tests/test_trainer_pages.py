"""The code in docs/trainers is what tests/interop runs, line by line."""

import builtins
import re
import symtable
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "trainers"
LINES = ROOT / "tests" / "interop"
BLOCK = re.compile(r"<!-- code: (\S+) (\S+) -->\n```python\n(.*?)```", re.DOTALL)
ANY_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TRAINERS = [
    "brax",
    "equinox",
    "flax",
    "kauldron",
    "levanter",
    "maxtext",
    "numpyro",
    "tunix",
]


def regions(file):
    """The lines below each mark ``# [name]``, up to the next mark."""
    _, *parts = re.split(r"^# \[(\S+)\]\n", (LINES / file).read_text(), flags=re.M)
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


def blocks(trainer):
    return BLOCK.findall((PAGES / f"{trainer}.md").read_text())


def filled(trainer):
    """The page with the code of today."""

    def replace(found):
        file, name, _ = found.groups()
        code = textwrap.dedent(regions(file)[name])
        return f"<!-- code: {file} {name} -->\n```python\n{code}\n```"

    return BLOCK.sub(replace, (PAGES / f"{trainer}.md").read_text())


def test_every_trainer_has_a_page_and_no_other():
    names = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert names == set(TRAINERS)
    index = (PAGES / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == names


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_page_shows_the_lines_that_are_tested(trainer):
    page = PAGES / f"{trainer}.md"
    assert blocks(trainer)
    assert page.read_text() == filled(trainer), (
        f"copy the lines of {LINES} into {page}: python {__file__}"
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_block_is_longer_than_a_glance(trainer):
    for file, name, code in blocks(trainer):
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 16, (file, name)


def tables(table):
    """The scopes of a program, the outermost first."""
    yield table
    for inner in table.get_children():
        yield from tables(inner)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_page_imports_what_its_code_uses_and_nothing_else(trainer):
    page = (PAGES / f"{trainer}.md").read_text()
    code = "\n".join(ANY_BLOCK.findall(page))
    module, *inner = tables(symtable.symtable(code, trainer, "exec"))
    imported = {each.get_name() for each in module.get_symbols() if each.is_imported()}
    used = {each.get_name() for each in module.get_symbols() if each.is_referenced()}
    for table in inner:
        names = table.get_symbols()
        used |= {each.get_name() for each in names if each.is_global()}
        assert all(each.is_referenced() for each in names if each.is_imported()), table
    assert imported <= used
    defined = {each.get_name() for each in module.get_symbols() if each.is_assigned()}
    assert used - imported - defined <= set(dir(builtins))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_page_answers_what_a_user_asks(trainer):
    headings = " ".join(
        re.findall("^## (.*)$", (PAGES / f"{trainer}.md").read_text(), re.M)
    )
    for asked in ("What you write", "Metrics", "resume", "What to expect"):
        assert asked in headings
    assert "earning rate" in (PAGES / f"{trainer}.md").read_text()


if __name__ == "__main__":
    for each in TRAINERS:
        (PAGES / f"{each}.md").write_text(filled(each))

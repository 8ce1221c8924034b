"""The list of deliberate breaks fits the code, and what is noticed is counted."""

import collections

import mutations
import pytest
from test_architecture import ALLOWED
from tiers import full

BREAKS = mutations.read()


@pytest.mark.parametrize("mutation", BREAKS, ids=lambda each: each.what)
def test_every_break_can_be_applied_and_compiles(mutation):
    path = mutations.ROOT / mutation.path
    broken = mutation.apply(path.read_text())
    assert broken != path.read_text()
    compile(broken, path, "exec")


def test_there_are_enough_breaks_in_every_package():
    by_package = collections.Counter(each.package for each in BREAKS)
    assert len(BREAKS) >= 60
    assert by_package.keys() == ALLOWED.keys()
    assert min(by_package.values()) >= 3


def test_a_break_that_does_not_fit_says_where():
    stale = BREAKS[0]._replace(old="no such code")
    with pytest.raises(ValueError, match=r"'no such code' occurs 0 times; give"):
        stale.apply("code")


def test_the_table_counts_what_is_noticed_by_which_tier():
    rows = [("a", "quick"), ("a", "full"), ("a", ""), ("b", "quick")]
    report = [
        {"file": f"optax_stability/{package}/x.py", "what": "", "noticed": tier}
        for package, tier in rows
    ]
    (table,) = mutations.tables({"mutations": report}).values()
    assert "| `a` | 3 | 1 | 2 |\n" in table
    assert table.endswith("| all | 4 | 2 | 3 |")


@pytest.mark.parametrize(("code", "fails"), [("1", False), ("1 / 0", True)])
@full
def test_a_break_is_noticed_if_a_test_fails(tmp_path, code, fails):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {code}\n")
    assert mutations.fails(tmp_path, (), ("test_it.py",)) is fails


@full
def test_tests_that_cannot_be_imported_notice_nothing(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text("import there_is_no_such_module\n")
    with pytest.raises(RuntimeError, match="there_is_no_such_module"):
        mutations.fails(tmp_path, (), ("test_it.py",))

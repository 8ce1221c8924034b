"""Which package may import which, so that the architecture stays as it is drawn.

The picture is in docs/architecture.md, the sentence in each package's ``__init__.py``.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import optax_stability

ROOT = Path(__file__).parents[1]
LIBRARY = Path(optax_stability.__file__).parent

# Package → the others that it may import.
ALLOWED = {
    "_core": set(),
    "thresholds": {"_core"},
    "_clipping": {"_core", "thresholds"},
    "_spikes": {"_core", "thresholds"},
    "_moments": {"_core"},
    "_adam": {"_core", "thresholds", "_moments"},
    "_accumulation": {"_core", "_moments"},
    "_noise": {"_core", "_moments"},
    "_recording": {"_core"},
    "_attention": {"_core"},
    "_gradients": {"_core"},
    "_recovery": {"_core"},
    "_checking": set(),
    "_diagnosis": set(),
    "_report": {"_core", "_diagnosis"},
    "_doctor": {"_core", "_diagnosis", "_report"},
    "flax": {"_core", "_moments", "_gradients"},
    "orbax": {"_core", "_recovery"},
    "loop": {"_core", "_recovery", "orbax"},
    "faults": set(),
    "tensorboard": {"_recording"},
}


def imported(path):
    """The modules of this library that a file imports, by their dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_imported_by(package):
    """The other packages that a package imports, and in which of its files."""
    found = {}
    for path in sorted((LIBRARY / package).rglob("*.py")):
        for name in imported(path):
            library, other, *_ = f"{name}.".split(".")
            if library == "optax_stability" and other != package:
                found.setdefault(other, []).append(path.name)
    return found


def docstring_of(package):
    return ast.get_docstring(ast.parse((LIBRARY / package / "__init__.py").read_text()))


def test_every_file_is_in_a_package():
    names = {path.name for path in LIBRARY.glob("*.py")}
    assert names == {"__init__.py", "__main__.py"}
    packages = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_what_it_may_and_uses_what_it_is_allowed(package):
    assert set(packages_imported_by(package)) == ALLOWED[package], packages_imported_by(
        package
    )


def test_there_is_no_circle_between_packages():
    tuple(graphlib.TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_says_what_it_may_import(package):
    says = re.search(
        r"^(May import|Imports no other package).*$", docstring_of(package), re.M
    )
    assert says, f"{package}/__init__.py does not say what it may import"
    assert set(re.findall(r"``(\w+)``", says[0])) == ALLOWED[package]


@pytest.mark.parametrize(
    "package", [package for package in ALLOWED if package[0] == "_"]
)
def test_a_private_package_holds_its_docstring_alone(package):
    """Modules are imported where they are: one way to a function."""
    (only,) = ast.parse((LIBRARY / package / "__init__.py").read_text()).body
    assert ast.get_docstring(ast.Module([only], []))
    assert len(docstring_of(package).splitlines()) <= 5


@pytest.mark.parametrize("package", ALLOWED)
def test_the_tests_have_the_same_packages(package):
    assert list((ROOT / "tests" / package.strip("_")).glob("test_*.py"))


def test_the_diagnosis_needs_numpy_alone():
    modules = {
        name.split(".")[0]
        for path in (LIBRARY / "_diagnosis").glob("*.py")
        for name in imported(path)
    }
    assert not modules & {"jax", "optax", "flax", "matplotlib"}


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("flax", "flax"),
        ("orbax", "orbax"),
        ("matplotlib", "_report"),
        ("tensorboard", "_doctor"),
        ("tensorboardX", "tensorboard"),
        ("filelock", "orbax"),
    ],
)
def test_what_is_optional_is_imported_where_it_is_needed_alone(library, only):
    for package in ALLOWED:
        for path in (LIBRARY / package).rglob("*.py"):
            names = {name.split(".")[0] for name in imported(path)}
            assert package == only or library not in names, path


@pytest.mark.parametrize("package", ALLOWED)
def test_the_page_has_a_paragraph_for_every_package(package):
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert re.search(rf"^\*\*\[`{package}/`\]", page, re.MULTILINE)


def test_the_page_names_and_links_only_what_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in re.findall(r"`([\w/]+\.(?:py|md))`", page):
        places = [ROOT, LIBRARY, ROOT / "tests"]
        assert any((place / path).is_file() for place in places), path
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_the_page_of_the_architecture_is_one_link_away():
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "(docs/architecture.md)" in (ROOT / name).read_text()

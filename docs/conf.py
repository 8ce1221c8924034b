"""The site: Sphinx, because the docstrings are written for it.

    sphinx-build -W --keep-going -b html docs build/site

Pages are Markdown (MyST); the reference is made from the docstrings (autodoc and
napoleon); notebooks are shown with the output they are stored with, and not run.
"""

import importlib
import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

import optax_stability
import optax_stability.faults
import optax_stability.flax
import optax_stability.loop
import optax_stability.orbax
import optax_stability.tensorboard

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
home = importlib.import_module("home")

project = "optax_stability"
version = release = optax_stability.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"  # Prompts and output are not copied.

# Reference
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
maximum_signature_line_length = 70
# A name in a docstring that leads nowhere is a warning, but for types of others.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(jax|jaxlib|numpy|optax|flax|collections|os|pathlib)\..*"),
    ("py:class", r"optax_stability\.(\w+\.)?_.*"),
    ("py:class", r"ArrayTree|_?P|dict\[str"),
]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Appearance: nothing is loaded from another server.
html_theme = "furo"
html_title = f"optax_stability {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def public_names() -> dict[str, str]:
    """What pages call a public name, to where it is."""
    names = {}
    public = ("thresholds", "flax", "orbax", "loop", "faults", "tensorboard")
    for module in ("", *(f".{name}" for name in public)):
        path = f"optax_stability{module}"
        prefix = f"{module[1:]}." if module else ""
        for name in sys.modules[path].__all__:
            names[prefix + name] = f"{path}.{name}"
    return names


NAMES = public_names()
_CODE_BLOCK = re.compile(r"^( *)(```|:::).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<![`\[\w}])`(([\w.]+)(?:\([^`<>]*\))?)`(?![`\w])")
_THRESHOLD = re.compile(r"\(<function [^']*'([^']*)'\)")
_ABSOLUTE_VALUE = re.compile(r"\|([^|\s`]{1,16})\|")


def leaves_the_site(path: Path) -> bool:
    """Whether a link leads to something that is neither a page nor a picture."""
    if path.suffix in (".png", ".svg"):
        return False
    return not (path.is_relative_to(DOCS) and path.suffix in (".md", ".ipynb"))


def link_names(text: str) -> str:
    """Public names between backticks, outside code blocks, link to the reference."""

    def link(found: re.Match[str]) -> str:
        if (path := NAMES.get(found[2].removeprefix("ost."))) is None:
            return found[0]
        return f"{{py:obj}}`{found[1]} <{path}>`"

    parts, end = [], 0
    for block in _CODE_BLOCK.finditer(text):
        parts += [_INLINE.sub(link, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, _INLINE.sub(link, text[end:])])


# The README of a folder of pages stands above them all.
_ALL_PAGES = "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


def prepare_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Links names to the reference, files to the repository, and pages of a folder."""
    page = Path(app.env.doc2path(name))
    if page.suffix != ".md":
        return
    text = home.link_files(source[0], page, home.address(), leaves=leaves_the_site)
    # A doctest ends with a blank line, which a reader need not see.
    text = link_names(text.replace("\n\n```\n", "\n```\n"))
    source[0] = text + _ALL_PAGES if page.stem == "README" else text


def prepare_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """|x| is an absolute value here, not the name of a substitution."""
    del app, what, name, obj, options
    lines[:] = [
        _ABSOLUTE_VALUE.sub("\N{DIVIDES}\\1\N{DIVIDES}", line) for line in lines
    ]


def prepare_signature(app, what, name, obj, options, signature, returns):
    """A threshold among the defaults is shown as the call that made it."""
    del app, what, name, obj, options
    return signature and _THRESHOLD.sub(r"\1", signature), returns


# What lies elsewhere and becomes pages, and where.
COPIED = {
    "examples/*.ipynb": DOCS / "gallery",
    "benchmarks/results/*.md": DOCS / "evidence" / "results",
}


def copy_pages(app: Sphinx) -> None:
    """Notebooks and results of benchmarks become pages."""
    del app
    for pattern, folder in COPIED.items():
        folder.mkdir(exist_ok=True)
        for page in home.ROOT.glob(pattern):
            shutil.copy(page, folder / page.name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", prepare_docstring)
    app.connect("autodoc-process-signature", prepare_signature)

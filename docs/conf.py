"""The site: Sphinx, because the docstrings are written for it.

    sphinx-build -W --keep-going -b html docs build/site

Pages are Markdown (MyST); the reference is made from the docstrings (autodoc and
napoleon); notebooks are shown with the output they are stored with, and not run.
"""

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
import home  # noqa: E402  The folder has to be on the path first.

from optax_stability import __version__  # noqa: E402

project = "optax_stability"
author = "the authors of optax_stability"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.empty_glob"]

# Pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"  # Prompts and output are not copied.

# Reference
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
maximum_signature_line_length = 70
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Appearance: nothing is loaded from another server.
html_theme = "furo"
html_title = f"optax_stability {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def leaves_the_site(path: Path) -> bool:
    """Whether a link leads to something that is neither a page nor a picture."""
    if path.suffix in (".png", ".svg"):
        return False
    return not (path.is_relative_to(DOCS) and path.suffix in (".md", ".ipynb"))


def link_to_the_repository(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to files lead to the repository, or are words alone."""
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md":
        source[0] = home.link_files(
            source[0], page, home.address(), leaves=leaves_the_site
        )


def copy_notebooks(app: Sphinx) -> None:
    """The notebooks of the examples become pages of the gallery."""
    for notebook in (home.ROOT / "examples").glob("*.ipynb"):
        shutil.copy(notebook, DOCS / "gallery" / notebook.name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", link_to_the_repository)

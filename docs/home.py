"""Where the project lives on the web, and links to what is not a page of the site.

Nothing in this repository knows its address. In a workflow of GitHub it is known from
the environment; there links to files lead to that repository. Elsewhere such links
become plain text, so that no page and no package has a link that leads nowhere.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)\)")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def address(environ: Mapping[str, str] = os.environ) -> str | None:
    """The address of the repository, or None where it is not known."""
    if repository := environ.get("GITHUB_REPOSITORY"):
        return f"{environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}"
    return None


def link_files(
    text: str, page: Path, home: str | None, *, leaves: Callable[[Path], bool]
) -> str:
    """The Markdown of a page, with links to files that lead to the repository.

    Args:
      text: Markdown.
      page: where it is from.
      home: address of the repository; None takes the links away and keeps their words.
      leaves: whether a file has to be looked for in the repository.
    """

    def target(found: re.Match[str]) -> Path | None:
        if ":" in found["target"]:
            return None
        name = found["target"].split("#")[0]
        path = (page.parent / name).resolve() if name else page
        return path if leaves(path) else None

    def picture(found: re.Match[str]) -> str:
        if (path := target(found)) is None:
            return found[0]
        if home is None:
            return ""
        return f"![{found['text']}]({home}/raw/HEAD/{path.relative_to(ROOT)})"

    def link(found: re.Match[str]) -> str:
        if (path := target(found)) is None:
            return found[0]
        if home is None:
            return found["text"]
        kind = "tree" if path.is_dir() else "blob"
        _, mark, anchor = found["target"].partition("#")
        file = f"{path.relative_to(ROOT)}{mark}{anchor}"
        return f"[{found['text']}]({home}/{kind}/HEAD/{file})"

    return _LINK.sub(link, _PICTURE.sub(picture, text))

"""What the package says of itself on PyPI: addresses, and the README with whole links.

The address of the repository is known in a workflow of GitHub, and written nowhere else
(``docs/home.py``): a package that is built elsewhere has no links that lead nowhere.
"""

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parent


def _load_home() -> Any:
    path = ROOT / "docs" / "home.py"
    spec = importlib.util.spec_from_file_location("home", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PackageDescription(MetadataHookInterface):
    """Fills in ``readme`` and ``urls`` of the project."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the metadata of ``pyproject.toml``."""
        home = _load_home()
        address = home.address()
        readme = ROOT / "README.md"
        text = home.link_files(
            readme.read_text(), readme, address, leaves=lambda path: True
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {}
        if address:
            metadata["urls"] = {
                "Source": address,
                "Documentation": f"{address}/tree/HEAD/docs",
                "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }

"""Says which built pages would load something from another server.

python docs/check_site.py build/site
"""

import re
import sys
from pathlib import Path

# Links that a reader clicks are no loads.
_LOADS = re.compile(
    r"<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc=[\"'](https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"'](?:stylesheet|preload|icon|preconnect))"
    r"[^>]*\bhref=[\"'](https?:)?//[^>]*>"
)
_IMPORTS = re.compile(r"@import\s+[^;]*//[^;]*;|url\([\"']?(https?:)?//[^)]*\)")


def loads(page: Path) -> list[str]:
    """What a file of the site loads from elsewhere."""
    rule = _IMPORTS if page.suffix == ".css" else _LOADS
    return [found[0] for found in rule.finditer(page.read_text(errors="replace"))]


def main(site: Path) -> None:
    """Ends with an error if anything is loaded from elsewhere."""
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    if not pages:
        sys.exit(f"{site} has no pages; build the site first.")
    found = [f"{page}: {each}" for page in pages for each in loads(page)]
    if found:
        sys.exit("\n".join(found))
    sys.stdout.write(f"{len(pages)} files load nothing from elsewhere.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

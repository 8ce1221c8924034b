"""Writes files atomically."""

import os
from pathlib import Path


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes ``content`` to ``path`` atomically; creates missing folders.

    A reader finds the old file or the new one, never a part: the content is written to
    a temporary file in the same folder, which then replaces the old file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)

"""Writes a file whole or not at all."""

import os
from pathlib import Path


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Puts ``content`` at ``path``, whose folders are made where they are missing.

    A reader finds the old file or the new one, never a part: it is written beside its
    place and then moved there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)

"""Tells whether a checkpoint on disk is what was written.

*Problem*: a full disk, a bad block or an interrupted copy damages a checkpoint, and the
run notices when half of it is loaded, or never: most formats store no checksums.

*Where*: on the host, in a background thread after a checkpoint is complete, and once
before it is loaded. *Cost*: reading every file once, at the speed of SHA-256.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from optax_stability._core import _atomic_file

CHECKSUMS = "SHA256SUMS"


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder but the checksums and hidden ones, in order."""
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        hidden = any(name.startswith(".") for name in names)
        if path.is_file() and not hidden and names != (CHECKSUMS,):
            yield path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Writes the SHA-256 of every file in a folder to ``SHA256SUMS`` in it.

    Call it when a checkpoint of any format is complete; :func:`find_damage` then tells
    whether it still is. ``sha256sum --check SHA256SUMS`` reads the file as well.

    **Guarantees**: the file is written atomically. **Edge cases**: hidden files, whose
    names start with a dot, are left out; an older ``SHA256SUMS`` is replaced.

    Args:
      folder: the folder of one checkpoint.

    Raises:
      OSError: a file cannot be read, or the checksums cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "weights").write_bytes(b"0123456789")
      >>> write_checksums(folder)
      >>> find_damage(folder)
      >>> _ = (folder / "weights").write_bytes(b"01234")
      >>> find_damage(folder)
      'weights has changed since it was written'
    """
    root = Path(folder)
    lines = (f"{_digest(path)}  {path.relative_to(root)}\n" for path in _files(root))
    _atomic_file.write(root / CHECKSUMS, "".join(lines).encode())


def find_damage(folder: str | os.PathLike[str]) -> str | None:
    """Compares a folder with the checksums that :func:`write_checksums` wrote in it.

    **Guarantees**: any file that was changed, cut short, removed or added is found,
    ``SHA256SUMS`` included. Nothing is loaded, and nothing is raised for damage.

    Args:
      folder: the folder of one checkpoint.

    Returns:
      What is wrong with the first damaged file, as one sentence; None if every file is
      as it was when the checksums were written.

    Raises:
      FileNotFoundError: the folder has no ``SHA256SUMS``.
    """
    root = Path(folder)
    content = (root / CHECKSUMS).read_bytes().decode(errors="replace")
    expected = {}
    for line in content.splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    for path in _files(root):
        name = str(path.relative_to(root))
        if name not in expected:
            return f"{name} is not in {CHECKSUMS}"
        try:
            found = _digest(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected.pop(name):
            return f"{name} has changed since it was written"
    for name in expected:
        return f"{name} is missing"
    return None

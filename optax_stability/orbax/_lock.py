"""A folder is for one process; the operating system frees it when that process dies."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder, which need not exist yet, until the end of the block.

    Where the file system has no locks, filelock compares host and process in a file.

    Raises:
      BlockingIOError: another process holds it.
      OSError: the folder around it cannot be written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    owner = folder.with_name(f".{folder.name}.owner")
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        who = owner.read_text() if owner.exists() else "another process"
        raise BlockingIOError(
            errno.EAGAIN, f"{who} writes there", str(folder)
        ) from error
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(
            f"process {os.getpid()} on {socket.gethostname()} since {since}"
        )
        yield
    finally:
        lock.release(force=True)

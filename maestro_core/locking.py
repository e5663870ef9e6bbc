"""A lock between processes that would make the same files: one makes them, the others wait."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of what is in a directory, by a file beside it.

    The kernel lets it go when its holder dies. It is between processes only, and where a file
    system has no locks there is none: writers rename what is whole into its place, so that
    without it work is done twice, and nothing is lost.

    Raises:
        OSError: the file beside the directory can't be written.
    """
    path = directory.with_name(f"{directory.name}.lock")
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

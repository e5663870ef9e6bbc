"""A lock between processes that would make the same files: one does, others wait or are told."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of what is in a directory, by a file beside it.

    The kernel lets it go when its holder dies. It is between processes only, and where a file
    system has no locks there is none: writers rename what is whole into its place, so that
    without it work is done twice, and nothing is lost.

    Raises:
        BlockingIOError: another process holds it, and this one was not to wait.
        OSError: the file beside the directory can't be written.
    """
    path = directory.with_name(f"{directory.name}.lock")
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(*error.args, str(path)) from None
        yield
    finally:
        os.close(handle)

"""A lock between processes that would make the same files: one does, others wait or are told."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Those taken without waiting: the kernel lets a process take its own again, and lets go of both
# with the first that is closed.
_taken: set[Path] = set()


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of what is in a directory, by a file beside where that really is.

    The kernel lets it go when its holder dies. Who waits does so for other processes only, and
    where a file system has no locks there is none: writers rename what is whole into its place, so
    that without it work is done twice, and nothing is lost.

    Raises:
        BlockingIOError: another holds it, in this process or not, and this one was not to wait.
        OSError: the file beside the directory can't be written.
    """
    directory = directory.resolve()
    path = directory.with_name(f"{directory.name}.lock")
    if not wait and path in _taken:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(*error.args, str(path)) from None
        if not wait:
            _taken.add(path)
        yield
    finally:
        os.close(handle)
        if not wait:
            _taken.discard(path)

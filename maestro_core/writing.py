"""Files and directories that are seen whole or not at all, even after a power cut.

Knows how to flush and to rename. Does not know what is in them.
"""

import ctypes
import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

# Of renameat2(2), which Python does not have.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_atomically(path: Path, data: bytes) -> None:
    """Put a file at `path`, in one step, in the place of what was there.

    Raises:
        OSError: the disk does not take it; what was there is untouched, and nothing lies beside it.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(beside, data)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    _flush_directory(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a new file and flush it, for a directory that nobody reads yet."""
    with path.open("xb") as file:
        file.write(data)
        flush(file)


def copy(source: Path, path: Path) -> None:
    """Copy what is in a file, and flush the copy."""
    shutil.copyfile(source, path)
    with path.open("r+b") as file:
        flush(file)


def flush(file: BinaryIO) -> None:
    """Return once what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def replace_directory(new: Path, path: Path) -> None:
    """Put `new`, whose files are flushed, where `path` is; their names are flushed first.

    In one step where the system can exchange two directories. Elsewhere the old one moves first, as
    no rename covers a full directory: between the two steps there is none.

    Raises:
        OSError: it can't be; what was there is untouched.
    """
    for folder, _, _ in os.walk(new):
        _flush_directory(Path(folder))
    old = new.with_name(f"{new.name}.old")
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        new.rename(old)
    else:
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    shutil.rmtree(old, ignore_errors=True)
    _flush_directory(path.parent)


def _flush_directory(path: Path) -> None:
    """Return once the names in a directory are on the disk."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that flush no directories
            raise
    finally:
        os.close(directory)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories at once; return whether the system could."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2  # Linux, with glibc 2.28 or musl 1.2.5
    except (AttributeError, OSError, TypeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    status: int = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return status == 0

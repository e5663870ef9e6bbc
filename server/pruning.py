"""Keeps what a host makes from filling its disk: the directories last used stay, others go."""

import os
import shutil
from contextlib import suppress
from pathlib import Path


def mark_used(directory: Path) -> None:
    """Make a directory the one last used; where that can't be written it stays as it was."""
    with suppress(OSError):
        os.utime(directory)


def prune(parent: Path, keep: int) -> None:
    """Remove all directories in `parent` but the `keep` last used, and what a crash left there.

    A directory that a process maps can go: what is mapped stays readable until it is let go.
    """
    with suppress(OSError):
        entries = [entry for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]
        entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in entries[keep:]:
            shutil.rmtree(entry.path, ignore_errors=True)

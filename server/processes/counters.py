"""Where the workers count: files that all of them map; each adds to its own, anyone adds up.

What was counted outlives a worker that is killed, but for its last moments
(`server.counting.LATER_S`), and the one that takes its place counts on from there: totals never go
back. Gauges go with their worker.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from server.statistics import WIDTH, Row

# On a disk, the kernel holds up those who count while it writes the pages back.
_MEMORY = Path("/dev/shm")  # noqa: S108  the directory made in it is ours alone
_BOARD = "board"
_PROMETHEUS = "PROMETHEUS_MULTIPROC_DIR"  # where its library looks for the directory
ACCEPTS_NONE = -1


class Board:
    """Integers of all workers: open connections, ACCEPTS_NONE before and after; statistics."""

    def __init__(self, directory: Path, workers: int) -> None:
        with (directory / _BOARD).open("r+b") as file:
            numbers = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self.connections: Row = numbers[:workers]
        rows = [workers + i * WIDTH for i in range(workers)]
        self.statistics: list[Row] = [numbers[at : at + WIDTH] for at in rows]


@contextmanager
def made(workers: int) -> Iterator[Path]:
    """Make the directory for so many workers; remove it at the end, when they have ended."""
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="maestro-", dir=memory))
    try:
        (directory / _BOARD).write_bytes(bytes(8 * workers * (1 + WIDTH)))
        board = Board(directory, workers)
        for i in range(workers):
            board.connections[i] = ACCEPTS_NONE
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def count_as(worker: int, directory: Path) -> None:
    """Have the metrics that this process makes from now on count in this worker's files."""
    os.environ[_PROMETHEUS] = str(directory)
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


def totals(directory: Path) -> bytes:
    """Return the metrics of all workers together in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_gauges(worker: int, directory: Path) -> None:
    """Take the gauges of a worker that has ended out of the totals."""
    mark_process_dead(worker, str(directory))  # type: ignore[no-untyped-call]

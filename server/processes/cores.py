"""Which cores each worker has."""

import os
from pathlib import Path

from maestro_core.host import affinity, usable_cores

_CPUS = Path("/sys/devices/system/cpu")


def groups(workers: int) -> list[list[int]]:
    """Return the cores of each worker, by number; none where processes can't be held to cores.

    Raises:
        ValueError: there are more workers than cores.
    """
    usable = usable_cores()
    if workers > usable:
        raise ValueError(
            f"MAESTRO_WORKERS: {workers} workers need a core each; this process may use {usable}"
        )
    if not hasattr(os, "sched_setaffinity"):
        return [[] for _ in range(workers)]
    return split(sorted(affinity(), key=_place), workers)


def split(cores: list[int], workers: int) -> list[list[int]]:
    """Return disjoint groups of neighbours, alike in number.

    Alike, because one profile holds for all: cores that are left over are nobody's. Of all cores
    the process may run on, also where a quota allows fewer: several containers that each took the
    first ones would share these.
    """
    size = len(cores) // workers
    return [cores[i * size : (i + 1) * size] for i in range(workers)]


def _place(core: int) -> tuple[int, int, int]:
    """Return what makes neighbours of one package's cores, and of one core's threads."""
    topology = _CPUS / f"cpu{core}" / "topology"
    return _number(topology / "physical_package_id"), _number(topology / "core_id"), core


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0

"""The machine that measures: what its latencies depend on, read without any privilege."""

import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The instruction sets that kernels are chosen by, by their names in /proc/cpuinfo.
_VECTOR_SETS = ("avx", "avx2", "fma", "avx512", "avx_vnni", "amx", "asimd", "sve", "sme", "i8mm")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine as the process sees it: `cores` are those that it may use."""

    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    memory_gib: int
    accelerator: str | None

    @classmethod
    def here(cls) -> "Host":
        """Return the machine that this process runs on."""
        info = _cpuinfo()
        flags = info.get("flags", info.get("Features", "")).split()
        return cls(
            cpu=info.get("model name") or platform.processor() or platform.machine(),
            instruction_sets=tuple(sorted(f for f in flags if f.startswith(_VECTOR_SETS))),
            cores=usable_cores(),
            memory_gib=_memory_gib(),
            accelerator=_accelerator(),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Host":
        """Return the host that `dataclasses.asdict` wrote."""
        accelerator = data["accelerator"]
        return cls(
            cpu=str(data["cpu"]),
            instruction_sets=tuple(str(name) for name in data["instruction_sets"]),
            cores=int(data["cores"]),
            memory_gib=int(data["memory_gib"]),
            accelerator=None if accelerator is None else str(accelerator),
        )


class Elsewhere:
    """What share of some cores others use, from its making until asked; else of this process's."""

    def __init__(self, cores: Iterable[int] | None = None) -> None:
        self._cores = {f"cpu{core}" for core in (affinity() if cores is None else cores)}
        self._began = self._seconds()

    def share(self) -> float:
        """Return 0 on quiet cores, 1 on those that others fill; 0 where there is no /proc/stat."""
        total_s, others_s = (
            now - then for now, then in zip(self._seconds(), self._began, strict=True)
        )
        return round(min(1.0, max(0.0, others_s / total_s)), 3) if total_s > 0 else 0.0

    def _seconds(self) -> tuple[float, float]:
        """Return core-seconds since boot, and those that this process did not compute."""
        rows = [line.split() for line in _text("/proc/stat").splitlines()]
        ours = [list(map(int, row[1:9])) for row in rows if row and row[0] in self._cores]
        if not ours:
            return 0.0, 0.0
        total, idle = sum(map(sum, ours)), sum(row[3] + row[4] for row in ours)
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        return total * tick_s, (total - idle) * tick_s - time.process_time()


@cache
def computes_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 itself; one that does not is faster in float32."""
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def affinity() -> list[int]:
    """Return the cores that this process may run on, by number."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def usable_cores(workers: int = 1, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use.

    They are those of its affinity, and no more than a container's quota, shared by the workers.
    """
    cores = len(affinity())
    quota, _, period = _quota(cgroup).partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period) // workers))
    return cores


def _quota(cgroup: Path) -> str:
    """Return the microseconds of computing in each period, and the period; "max" or -1: no limit.

    Version 2 of control groups has both in one file, version 1 in two.
    """
    each = (cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    return (_text(cgroup / "cpu.max") or " ".join(_text(path).strip() for path in each)).strip()


def _cpuinfo() -> dict[str, str]:
    first = _text("/proc/cpuinfo").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gib() -> int:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return 0


def _accelerator() -> str | None:
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in _text(card).splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""Memory that is kept: a large block that was freed costs no page faults when asked for again.

It lies in huge pages, where the system has them, and the block may be as large as it likes.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
import numpy as np
from maestro_core.allocator import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(int(sys.argv[1]) * 2**17)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
HUGE = """
import numpy as np
from maestro_core.allocator import keep_freed_memory

assert keep_freed_memory()
block = np.ones(16 * 2**20)  # 128 MiB
with open("/proc/self/smaps_rollup") as rollup:
    print(next(line.split()[1] for line in rollup if line.startswith("AnonHugePages")))
"""
LIMITED = """
import mmap, os, resource
from pathlib import Path
from maestro_core.allocator import keep_freed_memory

half = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2
used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + half + 2**26, most))
assert keep_freed_memory()
print(len(mmap.mmap(-1, half)))
"""
IN_A_THREAD = """
from concurrent.futures import ThreadPoolExecutor
from maestro_core.allocator import keep_freed_memory

with ThreadPoolExecutor(1) as pool:
    print(int(pool.submit(keep_freed_memory).result()))
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def said(program: str, *words: str) -> int:
    """Return the number that a program says, in a process of its own."""
    command = [sys.executable, "-c", program, *words]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("mib", [128, pytest.param(2560, marks=pytest.mark.slow, id="over 2 GiB")])
def test_a_block_asked_for_again_is_there_already(mib: int) -> None:
    again, anew = said(FAULTS, str(mib), "keep"), said(FAULTS, "128")

    assert 10 * again < anew


def test_a_limited_address_space_is_left_to_others() -> None:
    assert said(LIMITED) > 0


def test_other_threads_than_the_main_one_are_told_that_nothing_is_kept() -> None:
    assert said(IN_A_THREAD) == 0


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(encoding="ascii"), reason="no huge pages here"
)
def test_what_is_kept_lies_in_huge_pages() -> None:
    assert said(HUGE) > 100 * 1024  # KiB, of 128 MiB

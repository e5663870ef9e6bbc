"""Memory that is kept: a large block that was freed costs no page faults when asked for again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from maestro_core.allocator import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16 * 2**20)  # 128 MiB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults(*words: str) -> int:
    """Return the page faults of a block asked for a second time, in a process of its own."""
    command = [sys.executable, "-c", FAULTS, *words]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_block_asked_for_again_is_there_already() -> None:
    assert 10 * faults("keep") < faults()

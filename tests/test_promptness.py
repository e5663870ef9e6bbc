"""What keeps the event loop prompt, asked of this kernel and this interpreter."""

import ctypes
import platform
import subprocess
import sys
import threading

import pytest

from server import promptness

GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine())


def slice_ns() -> int:
    """Return the slice of the thread that calls; 0 where the kernel does not say."""
    found = promptness._Attributes()
    size = ctypes.sizeof(found)
    assert ctypes.CDLL(None).syscall(GETATTR, 0, ctypes.byref(found), size, 0) == 0
    return int(found.runtime_ns)


@pytest.mark.skipif(
    platform.system() != "Linux" or GETATTR is None, reason="no sched_getattr(2) known here"
)
def test_only_the_thread_that_asks_has_short_slices() -> None:
    seen: dict[str, object] = {}

    def child() -> None:
        seen["child"] = slice_ns()

    def ask() -> None:
        seen["before"] = slice_ns()
        seen["taken"] = promptness.wake_promptly()
        seen["after"] = slice_ns()
        started = threading.Thread(target=child)
        started.start()
        started.join()

    thread = threading.Thread(target=ask)  # the change is this thread's alone
    thread.start()
    thread.join()

    if not seen["before"]:
        pytest.skip("this kernel has no slices of a thread's own (Linux before 6.12)")
    assert seen["taken"]
    assert seen["after"] == 100_000
    assert seen["child"] == seen["before"]


def test_what_a_start_made_is_not_looked_at_again() -> None:
    program = (
        "import gc; from server.promptness import forget_the_start; forget_the_start();"
        "print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000)"
    )

    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

    assert found.stdout.split() == [b"True", b"True"]

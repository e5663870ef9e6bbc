"""Keep out of the event loop's way: what else may hold it up for as long as a batch takes.

Linux lets a thread that computes use its slice up, some milliseconds, before one that wakes gets
the core (EEVDF, since 6.6), so a request that comes meanwhile is not even read. A thread that asks
for short slices goes first (since 6.12), and gets no larger share of the core for it.

Python looks for cycles of garbage among all objects that are old; those that a start made are most
of them, and it took 41 ms to look at them again every few thousand requests.
"""

import ctypes
import gc
import os
import platform

_SLICE_NS = 100_000  # the shortest that the kernel takes
_SYSCALLS = {"x86_64": 314, "aarch64": 274}
_RESET_ON_FORK = 1  # threads that this one starts compute, and have slices as usual


class _Attributes(ctypes.Structure):
    """`struct sched_attr` of sched_setattr(2) in its first version; all else is 0."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def wake_promptly() -> bool:
    """Ask for short slices for the thread that calls; return whether the kernel took it.

    Older ones take it and do as before.
    """
    number = _SYSCALLS.get(platform.machine())
    if platform.system() != "Linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    wanted = _Attributes(
        size=ctypes.sizeof(_Attributes),
        flags=_RESET_ON_FORK,
        nice=os.getpriority(os.PRIO_PROCESS, 0),
        runtime_ns=_SLICE_NS,
    )
    return bool(ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wanted), 0) == 0)


def forget_the_start() -> None:
    """Let no later collection look at the objects that there are now."""
    gc.collect()
    gc.freeze()

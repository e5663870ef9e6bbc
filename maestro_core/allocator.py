"""Memory that is freed is kept for the next step of training; glibc's `mallopt(3)`.

glibc maps each large block anew and gives it back when it is freed. A step of training frees every
activation and asks for all of them again, and the kernel clears the pages each time.
"""

import ctypes
import platform

_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep what it frees; return whether its C library can be told to.

    The process then stays as large as it once was. For training, not for serving.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))

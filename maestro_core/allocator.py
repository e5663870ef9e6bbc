"""Memory that training keeps for its next step, in huge pages; glibc's `mallopt(3)`, `madvise(2)`.

glibc maps each large block anew and gives it back when it is freed. A step of training frees every
activation and asks for all of them again, and the kernel clears the pages each time. In huge pages
what is kept is found faster: steps wait less for page tables.
"""

import ctypes
import mmap
import os
import platform
import resource
import threading

_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_MMAP_MAX = -4
_NEVER = -1
_HUGE_BYTES = 2 * 2**20


def keep_freed_memory() -> bool:
    """Have this process keep what it frees; return whether its C library can be told to.

    The process then stays as large as it once was. For training, not for serving. The main thread
    alone can tell it: others have heaps of their own, which large blocks don't fit in.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _NEVER)):
        return False
    _use_huge_pages(libc)
    return True


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Have what the heap grows by, up to half of the host's memory, lie in huge pages.

    It is asked for and freed, so it is the heap's from now on, and no page of it is there yet.
    Where there is not so much, or no such pages, nothing changes; nor where the address space is
    limited, which threads and libraries need a part of.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2
    block = libc.malloc(size)
    if block is None:
        return
    begin = block + -block % _HUGE_BYTES
    libc.madvise(begin, block + size - begin, mmap.MADV_HUGEPAGE)
    libc.free(block)

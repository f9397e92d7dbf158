"""Large pages for KV memory on a CPU: the kernel looks up and pins every page that another process reads, so larger
ones make reads faster. Best effort; where the kernel will not, memory stays as it was.
"""

from __future__ import annotations

import ctypes
import mmap

MADV_COLLAPSE = 25
"""Linux 6.1 and later: now, and not when the kernel comes by. Python's ``mmap`` does not name it."""
HUGE_PAGE_BYTES = 2 << 20


def use_huge_pages(address: int, byte_count: int) -> bool:
    """Puts large pages under the memory, whose content stays. False: the kernel refused, or there is less than one.

    Takes as long as copying the memory: once, when an engine starts.
    """
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + byte_count) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end <= start:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(start, end - start, mmap.MADV_HUGEPAGE) != 0:
        return False
    return bool(madvise(start, end - start, MADV_COLLAPSE) == 0)

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

    Reaches out to the large pages that the memory shares with its neighbours: tensors of KV lie next to one another
    and begin anywhere, so the first megabytes of each, which a fresh pool gives out first, would stay in small pages.
    What lies there keeps its content as well; a large page that is not wholly of one mapping stays as it was.

    Takes as long as copying the memory: once, when an engine starts.
    """
    if (address + byte_count) // HUGE_PAGE_BYTES <= -(-address // HUGE_PAGE_BYTES):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = address // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    size = -(-(address + byte_count) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES - start
    inner = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    inner_size = (address + byte_count) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES - inner
    # Outwards first and best effort: it says no for a neighbour that cannot have any, or a gap beside the memory.
    for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE):
        madvise(start, size, advice)
    if madvise(inner, inner_size, mmap.MADV_HUGEPAGE) != 0:
        return False
    return bool(madvise(inner, inner_size, MADV_COLLAPSE) == 0)

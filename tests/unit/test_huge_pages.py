"""Large pages under KV memory: whatever the kernel says to them, the content stays."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from kvtransfer.huge_pages import HUGE_PAGE_BYTES, use_huge_pages


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_memory_keeps_its_content_whether_or_not_the_kernel_gives_large_pages() -> None:
    with mmap.mmap(-1, 3 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pattern = bytes(range(256)) * (len(memory) // 256)
        memory[:] = pattern
        use_huge_pages(address_of(memory) + 100, len(memory) - 200)
        assert memory[:] == pattern


@pytest.mark.parametrize("byte_count", [0, 1, HUGE_PAGE_BYTES - 1])
def test_less_than_one_large_page_is_left_alone(byte_count: int) -> None:
    assert not use_huge_pages(HUGE_PAGE_BYTES, byte_count)

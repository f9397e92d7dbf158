"""A block's digest: what its holder says the bytes are, and what their reader checks. Pure, over buffers.

The digest is xxh3-64 of the block's bytes in every layer region, in the regions' order, seeded with the hold's nonce
and the block's position in the prompt: so a block of another hold or of another place has another digest, though its
bytes be the same. It finds accidents (a flipped bit, a swapped, short or foreign block), not forgers.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

__all__ = ["BlockMemory", "block_seed"]

_WORD_MASK = (1 << 64) - 1
_SPREAD = 0x9E37_79B9_7F4A_7C15
"""Odd and without a pattern (the golden ratio's bits): seeds of neighbouring positions share none."""


def block_seed(nonce: int, position: int) -> int:
    return (nonce + (position + 1) * _SPREAD) & _WORD_MASK


class BlockMemory:
    """Where KV blocks lie: regions (one or two per layer), each an array of blocks ``stride`` bytes apart.

    Reads only. Hashing lets go of the interpreter lock where a region's block is larger than 64 KiB.
    """

    def __init__(self, regions: Sequence[memoryview], block_bytes: Sequence[int], strides: Sequence[int]) -> None:
        if not len(regions) == len(block_bytes) == len(strides) or not regions:
            raise ValueError("give each region its block size and stride")
        for region, size, stride in zip(regions, block_bytes, strides, strict=True):
            if not 0 < size <= stride:
                raise ValueError(f"blocks of {size} bytes cannot lie {stride} bytes apart")
            if region.format != "B" or region.ndim != 1 or not region.contiguous:
                raise ValueError("a region is a flat buffer of bytes")
        self.block_count = min(
            (len(region) - size) // stride + 1
            for region, size, stride in zip(regions, block_bytes, strides, strict=True)
        )
        self._regions = tuple(zip(regions, block_bytes, strides, strict=True))

    def digest(self, block_id: int, *, nonce: int, position: int) -> int:
        """Never 0, which in a hold record means: not computed yet."""
        if not 0 <= block_id < self.block_count:
            raise ValueError(f"block {block_id} is not one of {self.block_count}")
        hasher = xxhash.xxh3_64(seed=block_seed(nonce, position))
        for region, size, stride in self._regions:
            start = block_id * stride
            hasher.update(region[start : start + size])
        return hasher.intdigest() or 1

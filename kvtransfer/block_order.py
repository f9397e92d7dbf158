"""The order in which the descriptors of a transfer are named. Pure.

NIXL merges descriptors that follow one another in memory on both sides, where they are named one after the other: a
read of many small pieces becomes one of a few large ones. A pool gives blocks out as it got them back, often from the
last to the first, so a request's own order hides most of what could be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["DescriptorIds", "in_memory_order"]

Indices = np.ndarray[Any, np.dtype[np.int32]]


class DescriptorIds:
    """The numbers of blocks' descriptors where every region has one for each of its blocks, region after region.

    Where a region's begin is the same for every pull, and adding it up anew took a tenth of a small one.
    """

    MAX_KNOWN_COUNT = 64
    """Sets of regions remembered: our own, and those of peers whose pools have other sizes."""

    def __init__(self) -> None:
        self._firsts: dict[tuple[int, ...], np.ndarray[Any, np.dtype[np.int64]]] = {}

    def of(self, region_block_counts: Sequence[int], block_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        key = tuple(region_block_counts)
        firsts = self._firsts.get(key)
        if firsts is None:
            if len(self._firsts) >= self.MAX_KNOWN_COUNT:
                self._firsts.clear()
            firsts = self._firsts[key] = np.cumsum((0, *key[:-1]), dtype=np.int64)
        return np.add.outer(firsts, np.asarray(block_ids, dtype=np.int64)).ravel()


def in_memory_order(here: Sequence[int] | Indices, there: Sequence[int] | Indices) -> tuple[Indices, Indices]:
    """The same pairs of descriptors, ordered by where they lie here."""
    mine, theirs = np.asarray(here, dtype=np.int32), np.asarray(there, dtype=np.int32)
    order = np.argsort(mine, kind="stable")
    return mine[order], theirs[order]

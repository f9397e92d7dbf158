"""The order in which the descriptors of a transfer are named. Pure.

NIXL merges descriptors that follow one another in memory on both sides, where they are named one after the other: a
read of many small pieces becomes one of a few large ones. A pool gives blocks out as it got them back, often from the
last to the first, so a request's own order hides most of what could be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["in_memory_order"]

Indices = np.ndarray[Any, np.dtype[np.int32]]


def in_memory_order(here: Sequence[int] | Indices, there: Sequence[int] | Indices) -> tuple[Indices, Indices]:
    """The same pairs of descriptors, ordered by where they lie here."""
    mine, theirs = np.asarray(here, dtype=np.int32), np.asarray(there, dtype=np.int32)
    order = np.argsort(mine, kind="stable")
    return mine[order], theirs[order]

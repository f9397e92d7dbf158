"""Which waiting requests may begin their pulls before anything else of a step is decided. Pure.

A step hands out blocks to the requests it has first, then to those that wait, in their order. A pull that begins
ahead of all that must not change what any of them gets: it may begin only if blocks and places would be left for
it. Counted generously: what is kept back here loses nothing, the step itself decides about it a moment later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    request_id: str
    is_pull: bool
    """Its KV is a peer's, and the read has not been asked for yet."""
    block_count: int
    """What it takes at most, with nothing cached."""


@dataclass(frozen=True, slots=True)
class EarlyPulls:
    request_ids: tuple[str, ...] = ()
    """In the order of the queue."""
    reserved_block_count: int = 0
    """Free blocks that they must leave, for requests that run and requests ahead of them."""


def early_pulls(
    waiting: Iterable[Waiting], *, place_count: int, free_block_count: int, running_block_count: int
) -> EarlyPulls:
    """``waiting`` in the order in which the step would take them. ``place_count``: requests that may still join those
    that run. ``running_block_count``: blocks that these may need in this step."""
    chosen: list[str] = []
    ahead_block_count = reserved_block_count = running_block_count
    taken_block_count = 0
    for each in waiting:
        if place_count <= 0 or taken_block_count + ahead_block_count >= free_block_count:
            break  # nobody behind this one would have its turn, either
        place_count -= 1
        if each.is_pull:
            chosen.append(each.request_id)
            taken_block_count += each.block_count
            reserved_block_count = ahead_block_count
        else:
            ahead_block_count += each.block_count
    return EarlyPulls(tuple(chosen), reserved_block_count)

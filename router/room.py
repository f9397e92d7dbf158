"""Where a decode that was refused for want of KV blocks finds room: a function from a snapshot of the cluster.

Its KV is held by a prefill worker meanwhile, so it goes before whatever has no KV yet. Pure: no I/O, no clock. Never
waits and never remembers: waiting is admission's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.request import Role
from router.cluster_view import ClusterView, Health, WorkerIdentity, WorkerView


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker's report says of its room. Equal rooms are no news: who was refused once is refused again."""

    free_block_count: int
    is_idle: bool
    """No leg in hand: it takes whatever could ever fit, so that a count that nobody corrects refuses nobody."""


@dataclass(frozen=True, slots=True)
class RoomAsk:
    """A decode that looks for room."""

    wanted_block_count: int
    """Engines that exchange KV have blocks of one size, so it is the same on all."""
    barred: frozenset[WorkerIdentity] = frozenset()
    """Where it cannot go whatever the room: who holds its KV, and who is too small for it."""
    refused: Mapping[WorkerIdentity, Room | None] = field(default_factory=dict)
    """Who refused it, and what was known of their room then: not asked again before they report another."""


def room_of(worker: WorkerView) -> Room | None:
    """None before its first report."""
    load = worker.load
    if load is None:
        return None
    free_block_count = load.block_count - load.used_block_count - load.reserved_block_count
    return Room(max(0, free_block_count), load.running_count + load.waiting_count == 0)


def find_room(
    view: ClusterView, ask: RoomAsk, promised: Mapping[WorkerIdentity, int], *, forgives: bool = False
) -> WorkerIdentity | None:
    """The decode worker with the most room, if it is enough. ``promised``: blocks given away since each worker's
    report. ``forgives``: those that refused it are asked again."""
    best: tuple[int, WorkerIdentity] | None = None
    for worker in candidates(view, ask):
        room = room_of(worker)
        if not worker.is_ready or room is None:
            continue
        if not forgives and worker.identity in ask.refused and ask.refused[worker.identity] == room:
            continue
        taken = promised.get(worker.identity, 0)
        free_block_count = room.free_block_count - taken
        fits = ask.wanted_block_count <= free_block_count or (room.is_idle and not taken)
        if fits and (best is None or free_block_count > best[0]):
            best = free_block_count, worker.identity
    return None if best is None else best[1]


def candidates(view: ClusterView, ask: RoomAsk) -> list[WorkerView]:
    """Decode workers that are large enough and not believed dead, ready or not."""
    return [
        worker
        for worker in view.workers
        if worker.role is Role.DECODE
        and worker.health is not Health.LOST
        and worker.identity not in ask.barred
        and (worker.info is None or ask.wanted_block_count <= worker.info.block_count)
    ]

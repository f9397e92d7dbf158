"""What a worker process says of its load: one board per process, read by WatchLoad and by /metrics.

Owns the version that readers wait on. The counts stay with those who count: the legs with the workers, the
blocks with the engine. Never decides anything from them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from baton.leg import WorkerLoad
from baton.metrics import WorkerMetrics
from engine.protocol import Engine, EngineLoad


class WorkerPart(Protocol):
    """One phase of a worker process, as the board and the host see it."""

    on_change: Callable[[], None]

    @property
    def running_count(self) -> int: ...

    @property
    def held_lease_count(self) -> int: ...

    @property
    def reserved_block_count(self) -> int: ...

    @property
    def no_room_count(self) -> int: ...

    @property
    def is_draining(self) -> bool: ...

    async def run(self) -> None: ...

    async def drain(self, timeout_s: float) -> int: ...

    async def close(self) -> None: ...


class LoadBoard:
    """Takes over ``on_change`` of its parts."""

    def __init__(self, engine: Engine, parts: Sequence[WorkerPart], *, epoch: str, metrics: WorkerMetrics) -> None:
        self.epoch = epoch
        self._engine = engine
        self._parts = tuple(parts)
        self._metrics = metrics
        self._version = 0
        self._waiters: set[asyncio.Future[None]] = set()
        for part in self._parts:
            part.on_change = self.changed

    def __repr__(self) -> str:
        return f"<LoadBoard {' '.join(map(repr, self._parts))}>"

    @property
    def version(self) -> int:
        """Rises with each change worth telling."""
        return self._version

    @property
    def is_draining(self) -> bool:
        """A worker that drains one of its phases takes no new work."""
        return any(part.is_draining for part in self._parts)

    def current(self) -> WorkerLoad:
        """The load now.

        Running and waiting add up to the legs in hand, which this process counts itself; how many of them wait
        is the engine's last report, which may be a step old.
        """
        return self._report(self._engine.load())

    async def audited(self) -> WorkerLoad:
        """Like ``current``, but the engine counts its blocks for this answer. Raises what ``load_now`` raises."""
        return self._report(await self._engine.load_now())

    def _report(self, load: EngineLoad) -> WorkerLoad:
        leg_count = sum(part.running_count for part in self._parts)
        waiting_count = min(load.waiting_count, leg_count)
        report = WorkerLoad(
            epoch=self.epoch,
            running_count=leg_count - waiting_count,
            waiting_count=waiting_count,
            used_block_count=load.used_block_count,
            block_count=load.block_count,
            held_lease_count=sum(part.held_lease_count for part in self._parts),
            is_draining=self.is_draining,
            quarantined_pull_count=load.quarantined_pull_count,
            reserved_block_count=sum(part.reserved_block_count for part in self._parts),
            no_room_count=sum(part.no_room_count for part in self._parts),
        )
        self._metrics.set_load(report)
        return report

    def changed(self) -> None:
        self._version += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_past(self, version: int, timeout_s: float) -> None:
        """Returns once the version is past ``version``, or after ``timeout_s``."""
        if self._version > version:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await waiter
        finally:
            self._waiters.discard(waiter)

    async def drain(self, timeout_s: float) -> int:
        """Every part takes no more work. Returns how many legs and leases are left when the time is up."""
        counts = await asyncio.gather(*(part.drain(timeout_s) for part in self._parts))
        return sum(counts)

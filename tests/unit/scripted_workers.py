"""Workers that do nothing but report, on command: for tests of roster and admission in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from baton.errors import engine_failed
from baton.leg import WorkerInfo, WorkerLoad
from baton.request import Role
from router.cluster_view import WorkerIdentity, WorkerSpec
from router.roster import Roster, RosterLimits


class ScriptedWorker:
    """Satisfies what a roster uses of a ``WorkerClient``."""

    def __init__(self, worker_id: str, role: Role, epoch: str = "e1", max_running_count: int = 2) -> None:
        self.worker_id, self.role, self.epoch = worker_id, role, epoch
        self.max_running_count = max_running_count
        self.is_up = True
        self.is_draining = False
        self.answers_to = worker_id
        self.is_talking = asyncio.Event()
        self.is_talking.set()
        self.broken = asyncio.Event()
        self.dial_count = 0
        self.close_count = 0

    @property
    def spec(self) -> WorkerSpec:
        return WorkerSpec(self.worker_id, f"{self.worker_id}:1", self.role, self.epoch)

    @property
    def identity(self) -> WorkerIdentity:
        return WorkerIdentity(self.worker_id, self.epoch)

    def break_stream(self) -> None:
        self.broken.set()

    async def info(self, *, timeout_s: float) -> WorkerInfo:
        self.dial_count += 1
        if not self.is_up:
            raise engine_failed(self.worker_id, "connection refused")
        return WorkerInfo(
            self.answers_to, self.epoch, self.role, "m", 1024, 16, 1000, self.max_running_count, 10, "scripted", 500
        )

    async def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        self.broken.clear()
        while True:
            await self.is_talking.wait()
            if self.broken.is_set() or not self.is_up:
                raise engine_failed(self.worker_id, "stream broken")
            yield WorkerLoad(self.epoch, 0, 0, 0, 1000, 0, self.is_draining)
            try:
                async with asyncio.timeout(interval_s):
                    await self.broken.wait()
            except TimeoutError:
                pass

    async def close(self) -> None:
        self.close_count += 1

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a roster does not call {name}")


async def a_roster(*workers: ScriptedWorker, limits: RosterLimits | None = None) -> Roster:
    """Knows the workers, and has heard of those that are up."""
    by_id = {worker.worker_id: worker for worker in workers}
    roster = Roster(lambda spec: by_id[spec.worker_id], limits or RosterLimits())
    roster.set_workers([worker.spec for worker in workers])
    await asyncio.sleep(0.01)
    return roster

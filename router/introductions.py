"""Introduces the engines of workers to one another, so that no request pays for the first contact of a pair.

In the background only: nothing waits for an introduction, and a pair that was never introduced meets in its first
request. Owns one task for each worker whose engine wants introductions, and what is still to be told to it.

    connected ---> told of all who are here, and they of it ---> what failed: again, with backoff, until it succeeds
    forgotten ---> its task ends, and nobody is told of it any more        or one of the two is gone
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from baton.errors import BatonError
from baton.leg import WorkerInfo
from router.cluster_view import WorkerIdentity
from router.roster import Roster

__all__ = ["IntroductionLimits", "Introductions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IntroductionLimits:
    batch_count: int = 16
    """Peers told in one call."""
    call_count: int = 8
    """Calls at a time, over all workers."""
    timeout_s: float = 20.0
    """Of one call: an engine may be in a long step, and a peer that does not answer takes its time."""
    backoff_min_s: float = 0.5
    backoff_max_s: float = 30.0


@dataclass(eq=False, slots=True)
class _Worker:
    transfer_peer: bytes
    pending: dict[WorkerIdentity, bytes]
    """Whom it has not met yet. Those that failed are at the end."""
    problems: dict[WorkerIdentity, str] = field(default_factory=dict)
    """What was logged last."""
    is_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Introductions:
    """``close`` ends every task."""

    def __init__(
        self,
        roster: Roster,
        *,
        limits: IntroductionLimits = IntroductionLimits(),
        on_result: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """``on_result``: told of each introduction that was tried, whether the two have met."""
        self._roster = roster
        self._limits = limits
        self._on_result = on_result
        self._turns = asyncio.Semaphore(limits.call_count)
        self._workers: dict[WorkerIdentity, _Worker] = {}
        self._ending: set[asyncio.Task[None]] = set()
        roster.on_connected(self._connected)
        roster.on_forgotten(self._forgotten)

    def __repr__(self) -> str:
        pending_count = sum(len(worker.pending) for worker in self._workers.values())
        return f"<Introductions of {len(self._workers)} [{pending_count} pending]>"

    async def close(self) -> None:
        """Idempotent."""
        for identity in list(self._workers):
            self._forgotten(identity)
        while self._ending:
            await asyncio.wait(self._ending)

    def _connected(self, identity: WorkerIdentity, info: WorkerInfo) -> None:
        if not info.transfer_peer or identity in self._workers:
            return
        others = dict(self._workers)
        worker = _Worker(info.transfer_peer, {other_id: other.transfer_peer for other_id, other in others.items()})
        for other in others.values():
            other.pending[identity] = info.transfer_peer
            other.is_wanted.set()
        self._workers[identity] = worker
        worker.is_wanted.set()
        worker.task = asyncio.create_task(self._run(identity, worker), name=f"introduce {identity.worker_id}")

    def _forgotten(self, identity: WorkerIdentity) -> None:
        worker = self._workers.pop(identity, None)
        if worker is None:
            return
        for other in self._workers.values():
            other.pending.pop(identity, None)
            other.problems.pop(identity, None)
        if worker.task is not None:
            self._ending.add(worker.task)
            worker.task.add_done_callback(self._ending.discard)
            worker.task.cancel()

    async def _run(self, identity: WorkerIdentity, worker: _Worker) -> None:
        backoff_s = self._limits.backoff_min_s
        while True:
            worker.is_wanted.clear()  # BEFORE the look at what is pending: who joins meanwhile sets it again
            if worker.pending and await self._introduce(identity, worker):
                backoff_s = self._limits.backoff_min_s
                continue
            # Nobody is left, or somebody failed: then again after a while, or as soon as there is somebody new.
            try:
                async with asyncio.timeout(backoff_s if worker.pending else None):
                    await worker.is_wanted.wait()
            except TimeoutError:
                backoff_s = min(2 * backoff_s, self._limits.backoff_max_s)

    async def _introduce(self, identity: WorkerIdentity, worker: _Worker) -> bool:
        """One call. Whether all it named have been met."""
        batch = dict(islice(worker.pending.items(), self._limits.batch_count))
        problems: dict[WorkerIdentity, str] = dict.fromkeys(batch, "was not mentioned")
        async with self._turns:
            try:
                client = self._roster.client(identity)
                for each in await client.introduce(list(batch.values()), timeout_s=self._limits.timeout_s):
                    problems[WorkerIdentity(each.worker_id, each.epoch)] = each.problem
            except BatonError as error:
                problems = dict.fromkeys(batch, error.message)
            except Exception as error:
                logger.exception("introducing others to worker %s failed", identity.worker_id)
                problems = dict.fromkeys(batch, type(error).__name__)
        for peer_id in batch:
            problem = problems[peer_id]
            self._on_result(not problem)
            if peer_id not in worker.pending:
                continue  # forgotten meanwhile
            sealed = worker.pending.pop(peer_id)
            if problem:
                worker.pending[peer_id] = sealed
            self._log(identity, worker, peer_id, problem)
        return not any(problems[peer_id] for peer_id in batch)

    def _log(self, identity: WorkerIdentity, worker: _Worker, peer_id: WorkerIdentity, problem: str) -> None:
        if worker.problems.get(peer_id, "") == problem:
            return  # said before
        if problem:
            worker.problems[peer_id] = problem
            logger.warning("worker %s has not met %s: %s", identity.worker_id, peer_id.worker_id, problem)
        else:
            del worker.problems[peer_id]
            logger.info("worker %s has met %s at last", identity.worker_id, peer_id.worker_id)

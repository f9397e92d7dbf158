"""Workers are introduced to one another in the background: each to each, again after a failure, never to the dead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from scripted_workers import ScriptedWorker

from baton.errors import engine_failed
from baton.leg import Introduced, WorkerInfo
from baton.request import Role
from baton.testing import in_virtual_time
from router.introductions import IntroductionLimits, Introductions
from router.roster import Roster


class MeetingWorker(ScriptedWorker):
    """Takes introductions, and fails those it is told to."""

    def __init__(self, worker_id: str, epoch: str = "e1") -> None:
        super().__init__(worker_id, Role.DECODE, epoch)
        self.calls: list[list[str]] = []
        self.problems: dict[str, str] = {}
        self.is_broken = False
        self.delay_s = 0.0
        self.has_transfer = True

    @property
    def transfer_peer(self) -> bytes:
        return f"{self.worker_id}/{self.epoch}".encode() if self.has_transfer else b""

    async def info(self, *, timeout_s: float) -> WorkerInfo:
        return replace(await super().info(timeout_s=timeout_s), transfer_peer=self.transfer_peer)

    async def introduce(self, transfer_peers: Sequence[bytes], *, timeout_s: float) -> list[Introduced]:
        names = [peer.decode() for peer in transfer_peers]
        self.calls.append(names)
        await asyncio.sleep(self.delay_s)
        if self.is_broken:
            raise engine_failed(self.worker_id, "connection refused")
        return [
            Introduced(worker_id, epoch, self.problems.get(f"{worker_id}/{epoch}", ""), 0.1)
            for worker_id, _, epoch in (name.partition("/") for name in names)
        ]

    @property
    def told(self) -> set[str]:
        return {name for call in self.calls for name in call}


def meeting(
    *workers: MeetingWorker, limits: IntroductionLimits | None = None
) -> tuple[Roster, Introductions, list[bool]]:
    by_address = {worker.spec.address: worker for worker in workers}
    roster = Roster(lambda spec: by_address[spec.address])
    results: list[bool] = []
    introductions = Introductions(roster, limits=limits or IntroductionLimits(), on_result=results.append)
    return roster, introductions, results


@in_virtual_time
async def test_each_meets_each_once() -> None:
    a, b, c = MeetingWorker("a"), MeetingWorker("b"), MeetingWorker("c")
    roster, introductions, results = meeting(a, b, c)
    roster.set_workers([a.spec, b.spec, c.spec])
    await asyncio.sleep(100)
    assert a.told == {"b/e1", "c/e1"}
    assert b.told == {"a/e1", "c/e1"}
    assert c.told == {"a/e1", "b/e1"}
    assert results == [True] * 6
    assert repr(introductions) == "<Introductions of 3 [0 pending]>"
    a.break_stream()  # the same process again: nobody has forgotten it
    await asyncio.sleep(10)
    assert len(results) == 6
    await introductions.close()
    await roster.close()


@in_virtual_time
async def test_who_joins_or_restarts_meets_the_others_and_the_dead_are_not_spoken_of() -> None:
    a, b = MeetingWorker("a"), MeetingWorker("b")
    roster, introductions, _ = meeting(a, b)
    roster.set_workers([a.spec])
    await asyncio.sleep(1)
    assert a.calls == []
    roster.set_workers([a.spec, b.spec])
    await asyncio.sleep(1)
    assert (a.calls, b.calls) == ([["b/e1"]], [["a/e1"]])
    b.epoch = "e2"
    b.break_stream()
    await asyncio.sleep(1)
    assert (a.calls, b.calls) == ([["b/e1"], ["b/e2"]], [["a/e1"], ["a/e1"]])
    roster.set_workers([b.spec])
    a.epoch = "e9"
    await asyncio.sleep(100)
    assert len(b.calls) == 2
    await introductions.close()
    await roster.close()


@in_virtual_time
async def test_a_failure_is_repeated_with_backoff_and_does_not_keep_others_waiting() -> None:
    a, b, c = MeetingWorker("a"), MeetingWorker("b"), MeetingWorker("c")
    a.problems["b/e1"] = "dtype: bfloat16 here, float32 there"
    roster, introductions, results = meeting(a, b, c)
    roster.set_workers([a.spec, b.spec])
    await asyncio.sleep(60)
    assert 5 <= len(a.calls) <= 9
    roster.set_workers([a.spec, b.spec, c.spec])
    await asyncio.sleep(0.5)
    assert "c/e1" in a.told
    a.problems.clear()
    await asyncio.sleep(31)
    count = len(a.calls)
    await asyncio.sleep(100)
    assert len(a.calls) == count
    assert results[-1] is True
    assert results.count(False) >= 5
    await introductions.close()
    await roster.close()


@in_virtual_time
async def test_a_worker_that_cannot_be_called_is_tried_again_and_one_without_transfer_is_left_alone() -> None:
    a, b, simulated = MeetingWorker("a"), MeetingWorker("b"), MeetingWorker("s")
    simulated.has_transfer = False
    a.is_broken = True
    roster, introductions, _ = meeting(a, b, simulated)
    roster.set_workers([a.spec, b.spec, simulated.spec])
    await asyncio.sleep(5)
    assert len(a.calls) > 2
    a.is_broken = False
    await asyncio.sleep(30)
    assert repr(introductions) == "<Introductions of 2 [0 pending]>"
    assert simulated.calls == []
    assert a.told == {"b/e1"}
    await introductions.close()
    await roster.close()


@in_virtual_time
async def test_calls_are_bounded_in_size_and_number_and_end_with_the_router() -> None:
    workers = [MeetingWorker(f"w{index:02}") for index in range(40)]
    for worker in workers:
        worker.delay_s = 1.0
    roster, introductions, _ = meeting(*workers, limits=IntroductionLimits(batch_count=16, call_count=4))
    roster.set_workers([worker.spec for worker in workers])
    await asyncio.sleep(0.5)
    assert sum(len(worker.calls) for worker in workers) == 4
    await asyncio.sleep(200)
    assert all(len(worker.told) == 39 for worker in workers)
    assert max(len(call) for worker in workers for call in worker.calls) <= 16
    workers[0].delay_s = 1000.0
    workers[1].epoch = "e2"
    workers[1].break_stream()
    await asyncio.sleep(5)
    await introductions.close()
    assert repr(introductions) == "<Introductions of 0 [0 pending]>"
    await roster.close()

"""What a roster tells to whom: readiness is rare, room is news with every request; a view never shows old books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from scripted_workers import ScriptedWorker, a_roster

from baton.leg import WorkerLoad
from baton.request import Role
from baton.testing import in_virtual_time
from router.cluster_view import Assigned
from router.roster import Roster

ONE = Assigned(decode_count=1, decode_token_count=10)


class BusyWorker(ScriptedWorker):
    """Reports another load each time."""

    async def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        running_count = 0
        async for load in super().watch_load(interval_s):
            running_count += 1
            yield WorkerLoad(load.epoch, running_count, 0, 0, 1000, 0, load.is_draining)


def told(roster: Roster) -> Callable[[], tuple[int, int]]:
    """How often anything, and how often readiness, was told of since the last time."""
    counts = [0, 0]

    def count(which: int) -> None:
        counts[which] += 1

    roster.on_change(lambda: count(0))
    roster.on_readiness(lambda: count(1))

    def since() -> tuple[int, int]:
        result = (counts[0], counts[1])
        counts[:] = [0, 0]
        return result

    return since


@in_virtual_time
async def test_room_that_a_request_gives_back_is_news_for_placement_and_says_nothing_of_who_is_ready() -> None:
    worker = ScriptedWorker("a", Role.DECODE)
    roster = await a_roster(worker)
    since = told(roster)
    roster.assign(worker.identity, ONE)
    assert since() == (0, 0)
    roster.assign(worker.identity, ONE, sign=-1)
    assert since() == (1, 0)
    await roster.close()


@in_virtual_time
async def test_a_report_of_another_load_is_news_for_placement_alone_and_the_same_report_none() -> None:
    same, busy = ScriptedWorker("a", Role.DECODE), BusyWorker("b", Role.DECODE)
    roster = await a_roster(same, busy)
    since = told(roster)
    await asyncio.sleep(1.0)  # five reports of each
    assert since() == (5, 0)
    assert [view.load.running_count for view in roster.view().workers if view.load is not None] == [0, 6]
    await roster.close()


@in_virtual_time
async def test_whatever_changes_who_is_ready_is_told_to_both() -> None:
    worker, other = ScriptedWorker("a", Role.DECODE), ScriptedWorker("b", Role.PREFILL)
    roster = await a_roster(worker, other)
    since = told(roster)
    roster.doubt(worker.identity)
    assert since() == (1, 1)
    await asyncio.sleep(0.3)  # heard of again
    assert since() == (1, 1)
    roster.set_role("a", Role.PREFILL)
    assert since() == (1, 1)
    roster.drain("a")
    assert since() == (1, 1)
    roster.set_workers([other.spec])
    assert since() == (1, 1)
    other.is_up = False
    other.break_stream()
    await asyncio.sleep(0.01)
    assert since() == (1, 1)
    await roster.close()


@in_virtual_time
async def test_a_view_shows_what_is_placed_now_and_the_one_before_stays_as_it_was() -> None:
    worker = ScriptedWorker("a", Role.DECODE)
    roster = await a_roster(worker)

    def placed() -> int:
        return roster.view().workers[0].assigned.decode_count

    before = roster.view()
    assert roster.view().workers[0] is before.workers[0]  # nothing changed: nothing is made
    for count in (1, 2, 3):
        roster.assign(worker.identity, ONE)
        assert placed() == count
    for count in (2, 1, 0):
        roster.assign(worker.identity, ONE, sign=-1)
        assert placed() == count
    assert before.workers[0].assigned == Assigned()
    roster.set_role("a", Role.PREFILL)
    assert roster.view().workers[0].role is Role.PREFILL
    await roster.close()

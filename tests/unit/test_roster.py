"""The roster knows who is there, and what became of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_workers import ScriptedWorker, a_roster

from baton.errors import BatonError
from baton.request import Role
from baton.testing import in_virtual_time
from router.cluster_view import Assigned, Health, WorkerIdentity, WorkerSpec
from router.roster import Roster, RosterLimits

D, P = Role.DECODE, Role.PREFILL
ONE = Assigned(decode_count=1, decode_token_count=10)


def healths(roster: Roster) -> dict[str, Health]:
    return {view.worker_id: view.health for view in roster.view().workers}


@in_virtual_time
async def test_a_worker_is_ready_once_it_said_who_it_is_and_how_loaded() -> None:
    up, down = ScriptedWorker("a", D), ScriptedWorker("b", P)
    down.is_up = False
    roster = await a_roster(up, down)
    assert healths(roster) == {"a": Health.READY, "b": Health.CONNECTING}
    assert [view.worker_id for view in roster.view().ready(D)] == ["a"]
    down.is_up = True
    await asyncio.sleep(1.1)
    assert healths(roster)["b"] is Health.READY
    assert repr(roster) == "<Roster [1 ready decode, 1 ready prefill | 0 leaving]>"
    await roster.close()
    assert up.close_count == down.close_count == 1


@in_virtual_time
async def test_silence_makes_a_worker_suspect_and_then_lost_and_a_word_makes_it_ready_again() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    lost: list[WorkerIdentity] = []
    roster.on_lost(lost.append)
    worker.is_talking.clear()
    await asyncio.sleep(0.7)
    assert healths(roster)["a"] is Health.READY
    await asyncio.sleep(0.5)
    assert healths(roster)["a"] is Health.SUSPECT
    assert lost == []
    await asyncio.sleep(1.0)
    assert healths(roster)["a"] is Health.LOST
    assert lost == [worker.identity]
    worker.is_talking.set()
    await asyncio.sleep(0.01)
    assert healths(roster)["a"] is Health.READY
    await asyncio.sleep(10)
    assert lost == [worker.identity]
    await roster.close()


@in_virtual_time
async def test_a_broken_stream_takes_it_out_of_placement_and_tells_its_legs_only_if_it_stays_away() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    lost: list[WorkerIdentity] = []
    roster.on_lost(lost.append)
    worker.break_stream()
    await asyncio.sleep(0.001)
    assert healths(roster)["a"] is Health.LOST
    await asyncio.sleep(0.3)
    assert healths(roster)["a"] is Health.READY
    worker.is_up = False
    worker.break_stream()
    await asyncio.sleep(1.9)
    assert lost == []
    await asyncio.sleep(0.3)
    assert lost == [worker.identity]
    await roster.close()


@in_virtual_time
async def test_reconnecting_backs_off_and_never_stops() -> None:
    worker = ScriptedWorker("a", D)
    worker.is_up = False
    roster = await a_roster(worker)
    await asyncio.sleep(10)
    assert 10 <= worker.dial_count <= 20
    await roster.close()


@in_virtual_time
async def test_a_new_epoch_is_a_new_process_and_the_old_one_is_forgotten() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    lost: list[WorkerIdentity] = []
    forgotten: list[WorkerIdentity] = []
    roster.on_lost(lost.append)
    roster.on_forgotten(forgotten.append)
    before = worker.identity
    roster.assign(before, ONE)
    worker.epoch = "e2"
    await asyncio.sleep(0.5)
    assert lost == forgotten == [before]
    (view,) = roster.view().workers
    assert (view.identity, view.assigned, view.health) == (worker.identity, Assigned(), Health.READY)
    roster.assign(before, ONE, sign=-1)
    assert roster.view().workers[0].assigned == Assigned()
    await roster.close()


@in_virtual_time
async def test_somebody_else_at_its_address_is_not_taken_for_it() -> None:
    worker = ScriptedWorker("a", D)
    worker.answers_to = "b"
    roster = await a_roster(worker)
    assert healths(roster)["a"] is Health.CONNECTING
    await roster.close()


@in_virtual_time
async def test_the_same_set_again_changes_nothing_and_a_smaller_one_forgets() -> None:
    one, two = ScriptedWorker("a", D), ScriptedWorker("b", D)
    roster = await a_roster(one, two)
    for _ in range(5):
        roster.set_workers([one.spec, two.spec])
    assert one.dial_count == 1
    assert set(healths(roster).values()) == {Health.READY}
    roster.set_workers([two.spec])
    await asyncio.sleep(0)
    assert list(healths(roster)) == ["b"]
    await asyncio.sleep(0.01)
    assert one.close_count == 1
    await roster.close()


@in_virtual_time
async def test_a_worker_that_left_the_set_stays_connected_until_nothing_is_on_it() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    roster.assign(worker.identity, ONE)
    roster.set_workers([])
    await asyncio.sleep(1)
    assert worker.close_count == 0
    assert roster.client(worker.identity) is not None
    roster.assign(worker.identity, ONE, sign=-1)
    await asyncio.sleep(0.01)
    assert worker.close_count == 1
    with pytest.raises(BatonError, match="not known"):
        roster.client(worker.identity)
    await roster.close()


@in_virtual_time
async def test_a_fleet_that_lags_behind_what_a_worker_said_changes_nothing() -> None:
    worker = ScriptedWorker("a", D)
    old = worker.spec
    roster = await a_roster(worker)
    worker.epoch = "e2"
    await asyncio.sleep(0.5)
    for spec in (old, worker.spec, worker.spec):
        roster.set_workers([spec])
        await asyncio.sleep(0.1)
        assert roster.view().workers[0].identity == WorkerIdentity("a", "e2")
    assert worker.close_count == 0
    await roster.close()


@in_virtual_time
async def test_another_address_is_another_process() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    roster.set_workers([WorkerSpec("a", "elsewhere:2", D, "e1")])
    await asyncio.sleep(0.01)
    assert worker.close_count == 1
    assert worker.dial_count == 2
    await roster.close()


@in_virtual_time
async def test_a_role_set_by_hand_stays_until_the_fleet_wants_another() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    roster.set_role("a", P)
    roster.set_workers([worker.spec])
    assert roster.view().workers[0].role is P
    roster.set_workers([WorkerSpec("a", "a:1", P, "e1")])
    roster.set_workers([worker.spec])
    assert roster.view().workers[0].role is D
    with pytest.raises(KeyError):
        roster.set_role("nobody", P)
    await roster.close()


@in_virtual_time
async def test_draining_by_hand_or_by_its_own_word_takes_a_worker_out() -> None:
    one, two = ScriptedWorker("a", D), ScriptedWorker("b", D)
    roster = await a_roster(one, two)
    roster.assign(one.identity, ONE)
    assert roster.drain("a") == 1
    two.is_draining = True
    await asyncio.sleep(0.5)
    assert set(healths(roster).values()) == {Health.DRAINING}
    two.is_draining = False
    await asyncio.sleep(0.5)
    assert healths(roster) == {"a": Health.DRAINING, "b": Health.READY}
    await roster.close()


@in_virtual_time
async def test_a_doubted_worker_gets_nothing_until_it_is_heard_of() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker)
    roster.doubt(worker.identity)
    assert healths(roster)["a"] is Health.SUSPECT
    await asyncio.sleep(0.25)
    assert healths(roster)["a"] is Health.READY
    roster.doubt(WorkerIdentity("a", "older"))
    assert healths(roster)["a"] is Health.READY
    await roster.close()


@in_virtual_time
async def test_a_set_that_makes_no_sense_is_refused_whole() -> None:
    worker = ScriptedWorker("a", D)
    roster = await a_roster(worker, limits=RosterLimits(max_worker_count=2))
    with pytest.raises(ValueError, match="twice"):
        roster.set_workers([worker.spec, worker.spec])
    with pytest.raises(ValueError, match="at most 2"):
        roster.set_workers([WorkerSpec(name, "x:1", D) for name in "bcd"])
    assert healths(roster) == {"a": Health.READY}
    await roster.close()


@pytest.mark.parametrize("bad", [{"silence_s": 0.1}, {"lost_s": 0.5}, {"backoff_min_s": 0}, {"max_worker_count": 0}])
def test_limits_that_make_no_sense_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RosterLimits(**bad)


@in_virtual_time
async def test_a_worker_that_left_the_set_and_came_back_with_work_on_it_keeps_its_books() -> None:
    worker = ScriptedWorker("d0", Role.DECODE)
    roster = await a_roster(worker)
    kept = Assigned(decode_count=1, decode_token_count=50)
    roster.assign(worker.identity, kept)
    roster.set_workers([])
    await asyncio.sleep(0.1)
    roster.set_workers([worker.spec])
    await asyncio.sleep(0.1)
    (view,) = roster.view().workers
    assert view.is_ready
    assert view.assigned == kept, "what it has is not forgotten"
    roster.assign(worker.identity, kept, sign=-1)
    (view,) = roster.view().workers
    assert view.assigned == Assigned()
    assert "0 leaving" in repr(roster)
    await roster.close()
    assert worker.close_count == 1


@in_virtual_time
async def test_two_entries_of_one_id_do_not_mix_their_books_when_their_worker_comes_and_goes() -> None:
    """Work of the process before is still on the first entry, which has met its successor at the same address."""
    worker = ScriptedWorker("d0", D, epoch="e1")
    roster = await a_roster(worker)
    before = worker.identity
    roster.assign(before, ONE)
    worker.epoch = "e2"
    worker.break_stream()
    roster.set_workers([worker.spec])
    await asyncio.sleep(1.0)
    roster.assign(worker.identity, ONE)
    for _ in range(3):
        roster.set_workers([])
        await asyncio.sleep(0.2)
        roster.set_workers([worker.spec])
        await asyncio.sleep(0.2)
    (view,) = roster.view().workers
    assert (view.identity, view.assigned, view.health) == (worker.identity, ONE, Health.READY)
    roster.assign(worker.identity, ONE, sign=-1)
    roster.assign(before, ONE, sign=-1)
    (view,) = roster.view().workers
    assert view.assigned == Assigned()
    assert "0 leaving" in repr(roster)
    await roster.close()

"""Admission lets in what can run, in order, and never strands a place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from scripted_workers import ScriptedWorker, a_roster

from baton.errors import BatonError, Reason
from baton.request import PlacementMode, Role
from baton.testing import in_virtual_time
from router.admission import (
    Admission,
    AdmissionLimits,
    AdmitNow,
    Entry,
    Place,
    RoomView,
    Shed,
    WaitInLine,
    admit,
    retry_after_s,
)
from router.cluster_view import Assigned, WorkerIdentity
from router.placement import Placement, PlacementPolicy, place
from router.samples.sample_group import SampleGroup, Seat

PLACEMENT = Placement(None, WorkerIdentity("d", "e"), PlacementMode.LOCAL, "policy")
LIMITS = AdmissionLimits(queue_limit=2, max_in_flight_count=10)


def room(**changes: Any) -> RoomView:
    return RoomView(
        **{"waiting_count": 0, "ahead_count": 0, "in_flight_count": 0, "departures_per_s": 0.0, **changes}
    )


def test_admit_is_a_decision_on_numbers() -> None:
    assert admit(room(), LIMITS, lambda: PLACEMENT) == AdmitNow(PLACEMENT)
    assert admit(room(), LIMITS, lambda: None) == WaitInLine()
    assert admit(room(waiting_count=1, ahead_count=1), LIMITS, lambda: PLACEMENT) == WaitInLine()
    assert admit(room(in_flight_count=10), LIMITS, lambda: PLACEMENT) == WaitInLine()
    assert admit(room(in_flight_count=10), LIMITS, lambda: PLACEMENT, is_retry=True) == AdmitNow(PLACEMENT)
    full = room(waiting_count=2, ahead_count=2, departures_per_s=6.0)
    shed = admit(full, LIMITS, lambda: PLACEMENT)
    assert isinstance(shed, Shed)
    assert shed.error.reason is Reason.QUEUE_FULL
    assert shed.error.retry_after_s == pytest.approx(0.5)
    assert admit(full, LIMITS, lambda: None, is_retry=True) == WaitInLine()
    drained = admit(room(is_draining=True), LIMITS, lambda: PLACEMENT)
    assert isinstance(drained, Shed)
    assert drained.error.reason is Reason.DRAINING
    assert admit(room(is_draining=True), LIMITS, lambda: PLACEMENT, is_retry=True) == AdmitNow(PLACEMENT)


def test_every_sample_counts_against_the_limits() -> None:
    assert admit(room(in_flight_count=7), LIMITS, lambda: PLACEMENT, sample_count=3) == AdmitNow(PLACEMENT)
    assert admit(room(in_flight_count=8), LIMITS, lambda: PLACEMENT, sample_count=2) == AdmitNow(PLACEMENT)
    assert admit(room(in_flight_count=9), LIMITS, lambda: PLACEMENT, sample_count=2) == WaitInLine()
    assert isinstance(admit(room(waiting_count=1), LIMITS, lambda: None, sample_count=2), Shed)
    # Alone, more than may be in flight run: they would wait for ever otherwise.
    assert admit(room(), LIMITS, lambda: PLACEMENT, sample_count=16) == AdmitNow(PLACEMENT)
    assert admit(room(in_flight_count=1), LIMITS, lambda: PLACEMENT, sample_count=16) == WaitInLine()
    none_waits = AdmissionLimits(queue_limit=0, max_in_flight_count=10)
    assert isinstance(admit(room(in_flight_count=9), none_waits, lambda: PLACEMENT, sample_count=2), Shed)


def test_retry_after_is_bounded_and_has_a_guess_for_the_beginning() -> None:
    assert retry_after_s(room()) == 1.0
    assert retry_after_s(room(waiting_count=10_000, departures_per_s=0.1)) == 30.0
    assert retry_after_s(room(departures_per_s=1e6)) == 0.1


class House:
    """One decode worker with room for one, and whoever wants in."""

    def __init__(self, admission: Admission, workers: list[ScriptedWorker]) -> None:
        self.admission = admission
        self.workers = workers
        self.served: list[str] = []

    def entry(self, **changes: Any) -> Entry:
        now = asyncio.get_running_loop().time()
        values = {
            "prompt_token_ids": (1, 2, 3),
            "max_output_token_count": 4,
            "priority": 0,
            "session_id": "",
            "deadline_at": now + 300,
            **changes,
        }
        return Entry(**values)

    async def enter(self, entry: Entry) -> Place:
        return self.admission.try_enter(entry) or await self.wait(entry)

    async def wait(self, entry: Entry) -> Place:
        turn = self.admission.join(entry)
        try:
            return await turn.place()
        finally:
            turn.leave()

    def visitor(self, name: str, *, stay_s: float = 1.0, **changes: Any) -> asyncio.Task[None]:
        return asyncio.create_task(self._visit(name, stay_s, self.entry(**changes)), name=name)

    async def _visit(self, name: str, stay_s: float, entry: Entry) -> None:
        place = await self.enter(entry)
        self.served.append(name)
        try:
            await asyncio.sleep(stay_s)
        finally:
            place.close()
            place.close()

    def assert_empty(self) -> None:
        assert (self.admission.in_flight_count, self.admission.waiting_count) == (0, 0)
        assert all(view.assigned == Assigned() for view in self.admission.roster.view().workers)


@asynccontextmanager
async def house(
    *roles: Role, limits: AdmissionLimits | None = None, room_count: int = 1, **policy: Any
) -> AsyncIterator[House]:
    workers = [
        ScriptedWorker(f"{role.value}-{index}", role, max_running_count=room_count)
        for index, role in enumerate(roles or (Role.DECODE,))
    ]
    roster = await a_roster(*workers)
    admission = Admission(
        roster,
        rng=random.Random(1),
        limits=limits or AdmissionLimits(),
        policy=PlacementPolicy(**{"decode_ahead_count": 0, **policy}),
    )
    yield House(admission, workers)
    await roster.close()


@in_virtual_time
async def test_first_come_first_served_and_priority_before_that() -> None:
    async with house() as it:
        visitors = [it.visitor("running")]
        await asyncio.sleep(0.1)
        for name, priority in (("a", 0), ("b", 0), ("urgent", 5), ("c", 0), ("later", -5)):
            visitors.append(it.visitor(name, priority=priority))
            await asyncio.sleep(0.01)
        await asyncio.gather(*visitors)
        assert it.served == ["running", "urgent", "a", "b", "c", "later"]
        it.assert_empty()


@in_virtual_time
async def test_a_retry_goes_before_everyone_and_is_never_turned_away() -> None:
    async with house(limits=AdmissionLimits(queue_limit=1)) as it:
        visitors = [it.visitor("running")]
        await asyncio.sleep(0.01)
        visitors.append(it.visitor("waiting", priority=100))
        await asyncio.sleep(0.01)
        visitors.append(it.visitor("retry", is_retry=True))
        await asyncio.sleep(0.01)
        with pytest.raises(BatonError) as caught:
            it.admission.try_enter(it.entry())
        assert caught.value.reason is Reason.QUEUE_FULL
        assert caught.value.metadata == {"queued_count": "1", "queue_limit": "1"}
        await asyncio.gather(*visitors)
        assert it.served == ["running", "retry", "waiting"]


@in_virtual_time
async def test_requests_of_one_moment_count_each_other() -> None:
    async with house(limits=AdmissionLimits(queue_limit=2)) as it:
        place = it.admission.try_enter(it.entry())
        assert place is not None
        turns = []
        for _ in range(2):
            assert it.admission.try_enter(it.entry()) is None
            turns.append(it.admission.join(it.entry()))
        with pytest.raises(BatonError) as caught:
            it.admission.try_enter(it.entry())
        assert caught.value.reason is Reason.QUEUE_FULL
        for turn in turns:
            turn.leave()
            turn.leave()
        place.close()
        it.assert_empty()


@in_virtual_time
async def test_a_turn_left_before_its_place_was_taken_gives_the_place_back() -> None:
    async with house() as it:
        place = it.admission.try_enter(it.entry())
        assert place is not None
        turn = it.admission.join(it.entry())
        place.close()
        assert it.admission.in_flight_count == 1, "given to who is in line"
        turn.leave()
        it.assert_empty()


@in_virtual_time
async def test_no_new_request_overtakes_those_that_wait() -> None:
    async with house() as it:
        first = it.visitor("first")
        await asyncio.sleep(0.01)
        second = it.visitor("second")
        await first
        assert it.admission.try_enter(it.entry()) is None, "the place is the second one's"
        await second
        it.assert_empty()


@in_virtual_time
async def test_a_waiter_that_is_cancelled_strands_no_place_at_whatever_moment() -> None:
    for step in range(12):
        async with house() as it:
            running = it.visitor("running", stay_s=0.1)
            await asyncio.sleep(0.01)
            leaver = it.visitor("leaver")
            patient = it.visitor("patient")
            await asyncio.sleep(0.089)
            await running
            for _ in range(step):
                await asyncio.sleep(0)
            leaver.cancel()
            await asyncio.wait((leaver, patient))
            assert leaver.cancelled()
            assert it.served[-1] == "patient"
            it.assert_empty()


@in_virtual_time
async def test_a_waiter_cancelled_in_the_moment_its_turn_comes_passes_the_place_on() -> None:
    async with house() as it:
        place = it.admission.try_enter(it.entry())
        assert place is not None
        leaver = asyncio.create_task(it.wait(it.entry()))
        patient = it.visitor("patient")
        await asyncio.sleep(0.01)
        place.close()  # gives the leaver its place, which it has not seen yet
        assert it.admission.in_flight_count == 1
        leaver.cancel()
        await asyncio.wait((leaver,))
        assert leaver.cancelled()
        await patient
        it.assert_empty()


@in_virtual_time
async def test_the_first_in_line_leaving_lets_a_smaller_one_behind_it_in() -> None:
    async with house(room_count=4) as it:
        large = tuple(range(15_990))
        place, short = it.admission.try_enter(it.entry()), it.admission.try_enter(it.entry())
        assert place is not None
        assert short is not None
        blocked = it.visitor("large", prompt_token_ids=large)
        await asyncio.sleep(0.01)
        small = it.visitor("small")
        await asyncio.sleep(0.1)
        short.close()
        await asyncio.sleep(0.1)
        assert it.served == [], "nobody overtakes"
        blocked.cancel()
        await small
        place.close()
        it.assert_empty()


@in_virtual_time
async def test_many_in_flight_are_bounded_whatever_the_workers_could_take() -> None:
    async with house(room_count=100, limits=AdmissionLimits(max_in_flight_count=3)) as it:
        visitors = [it.visitor(str(number)) for number in range(9)]
        await asyncio.sleep(0.5)
        assert it.admission.in_flight_count == 3
        await asyncio.gather(*visitors)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0, abs=0.1)


@in_virtual_time
async def test_without_a_worker_the_reason_comes_in_time() -> None:
    limits = AdmissionLimits(no_worker_s=10.0, max_wait_s=60.0, reply_margin_s=0.25)
    async with house(limits=limits) as it:
        it.workers[0].is_up = False
        it.workers[0].break_stream()
        await asyncio.sleep(0.01)
        assert not it.admission.could_serve
        for deadline_s, expected_s in ((300.0, 10.0), (4.0, 3.75), (0.4, 0.3)):
            now = asyncio.get_running_loop().time()
            with pytest.raises(BatonError) as caught:
                await it.enter(it.entry(deadline_at=now + deadline_s))
            assert caught.value.reason is Reason.NO_WORKER
            assert asyncio.get_running_loop().time() - now == pytest.approx(expected_s)
        it.assert_empty()


@in_virtual_time
async def test_a_worker_that_comes_in_time_serves_those_that_waited_for_it() -> None:
    async with house() as it:
        it.workers[0].is_up = False
        it.workers[0].break_stream()
        await asyncio.sleep(0.01)
        visitor = it.visitor("patient")
        await asyncio.sleep(5)
        it.workers[0].is_up = True
        await visitor
        assert it.admission.could_serve


@in_virtual_time
async def test_a_wait_that_is_too_long_ends_with_queue_full() -> None:
    async with house(limits=AdmissionLimits(max_wait_s=5.0, no_worker_s=1.0)) as it:
        running = it.visitor("running", stay_s=20)
        await asyncio.sleep(0.01)
        with pytest.raises(BatonError) as caught:
            await it.enter(it.entry())
        assert caught.value.reason is Reason.QUEUE_FULL
        assert asyncio.get_running_loop().time() == pytest.approx(5.02, abs=0.01)
        await running


@in_virtual_time
async def test_a_process_that_failed_a_request_gets_it_again_only_when_no_other_came() -> None:
    async with house() as it:
        excluded = frozenset({it.workers[0].identity})
        now = asyncio.get_running_loop().time()
        place = await it.enter(it.entry(is_retry=True, excluded=excluded))
        assert asyncio.get_running_loop().time() - now == pytest.approx(it.admission.limits.exclusion_s)
        place.close()
        waiting = it.visitor("retry", is_retry=True, excluded=excluded)
        await asyncio.sleep(0.01)
        other = it.admission.try_enter(it.entry())
        assert other is not None, "one that waits for another worker holds nobody up"
        other.close()
        await waiting
        it.assert_empty()


@in_virtual_time
async def test_a_storm_of_retries_with_room_nowhere_is_not_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with house(Role.DECODE, Role.DECODE) as it:
        failed = frozenset({it.workers[0].identity})
        visitors = [it.visitor(name, stay_s=5.0) for name in ("one", "two")]
        visitors += [it.visitor(f"retry {n}", stay_s=0.0, is_retry=True, excluded=failed) for n in range(300)]
        await asyncio.sleep(0.01)
        looked = 0

        def counting(*arguments: Any) -> Placement | None:
            nonlocal looked
            looked += 1
            return place(*arguments)

        monkeypatch.setattr("router.admission.place", counting)
        it.admission.pump()
        assert looked <= 3, "both workers are full: the first in line is told so, and nobody else is asked"
        await asyncio.wait(visitors)
        it.assert_empty()
        assert len(it.served) == 302


@in_virtual_time
async def test_a_prefill_weighs_until_it_is_answered_and_a_decode_until_the_end() -> None:
    async with house(Role.PREFILL, Role.DECODE) as it:
        place = it.admission.try_enter(it.entry())
        assert place is not None

        def assigned() -> tuple[Assigned, Assigned]:
            decode, prefill = it.admission.roster.view().workers
            return prefill.assigned, decode.assigned

        assert assigned()[0] == Assigned(prefill_count=1, prefill_token_count=3)
        assert assigned()[1] == Assigned(decode_count=1, decode_token_count=7)
        place.prefill_answered()
        place.prefill_answered()
        assert assigned()[0] == Assigned(held_count=1), "it may hold the KV"
        assert assigned()[1].decode_count == 1
        place.close()
        it.assert_empty()


@in_virtual_time
async def test_draining_turns_new_ones_away_and_closing_everyone() -> None:
    async with house() as it:
        running = it.visitor("running")
        await asyncio.sleep(0.01)
        waiting = it.visitor("waiting")
        await asyncio.sleep(0.01)
        it.admission.drain()
        with pytest.raises(BatonError) as caught:
            it.admission.try_enter(it.entry())
        assert caught.value.reason is Reason.DRAINING
        it.admission.close()
        with pytest.raises(BatonError) as caught:
            await waiting
        assert caught.value.reason is Reason.DRAINING
        await running
        it.assert_empty()


@in_virtual_time
async def test_sessions_and_prefixes_return_to_their_worker() -> None:
    async with house(Role.DECODE, Role.DECODE, Role.DECODE, room_count=50) as it:
        prompt = tuple(range(400))
        place = it.admission.try_enter(it.entry(prompt_token_ids=prompt, session_id="s"))
        assert place is not None
        home = place.placement.decode
        place.close()
        for changes in ({"prompt_token_ids": (*prompt, 9, 9)}, {"session_id": "s"}):
            for _ in range(5):
                again = it.admission.try_enter(it.entry(**changes))
                assert again is not None
                assert again.placement.decode == home
                again.close()


@pytest.mark.parametrize("bad", [{"queue_limit": -1}, {"max_in_flight_count": 0}, {"max_wait_s": 0.0}])
def test_limits_that_make_no_sense_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdmissionLimits(**bad)


@in_virtual_time
async def test_a_session_of_one_tenant_is_not_another_tenants_of_the_same_id() -> None:
    async with house() as it:
        keys = [
            it.entry(session_id=session_id, tenant=tenant).session_key
            for tenant, session_id in (("", "s"), ("blue", "s"), ("red", "s"), ("", "blue/s"), ("blue", ""))
        ]
        assert len(set(keys)) == 5
        assert keys[-1] == ""  # no session


async def samples_in(it: House, group: SampleGroup, indices: range, entered: list[int], **changes: Any) -> None:
    """Samples of one call that start together, and stay until the call's end."""

    async def one(index: int) -> Place:
        place = await it.enter(it.entry(seat=Seat(group, index), **changes))
        entered.append(it.admission.in_flight_count)
        return place

    tasks = [asyncio.create_task(one(index)) for index in indices]
    try:
        places = await asyncio.gather(*tasks)
        await asyncio.sleep(1.0)
        for place in places:
            place.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        group.close()


@in_virtual_time
async def test_samples_whose_first_had_ended_already_ask_for_all_places_as_any_request() -> None:
    limits = AdmissionLimits(queue_limit=5, max_in_flight_count=4)
    async with house(limits=limits, room_count=16) as it:
        running = [it.visitor(f"running-{number}") for number in range(2)]
        await asyncio.sleep(0.1)
        entered: list[int] = []
        others = asyncio.create_task(samples_in(it, it.admission.samples(4), range(1, 4), entered))
        await asyncio.sleep(0.1)
        assert (it.admission.in_flight_count, entered) == (2, []), "no room for four"
        late = it.visitor("late")
        await asyncio.sleep(0.1)
        too_many = samples_in(it, it.admission.samples(4), range(1, 4), [])
        with pytest.raises(BatonError) as caught:  # four places are waited for already, and one
            await too_many
        assert caught.value.reason is Reason.QUEUE_FULL
        await asyncio.gather(*running, others, late)
        assert entered == [4, 4, 4]
        assert it.served[-1] == "late", "nobody overtook them"
        it.assert_empty()


@in_virtual_time
async def test_samples_whose_first_had_ended_are_turned_away_while_draining_and_follow_once_counted() -> None:
    async with house(limits=AdmissionLimits(queue_limit=0, max_in_flight_count=8), room_count=16) as it:
        group = it.admission.samples(4)
        first = await it.enter(it.entry(seat=Seat(group, 2)))
        assert it.admission.in_flight_count == 4
        it.admission.drain()
        second = await it.enter(it.entry(seat=Seat(group, 1)))  # counted with the first
        for place in (first, second):
            place.close()
        group.close()
        turned_away = it.admission.samples(4)
        with pytest.raises(BatonError) as caught:
            await it.enter(it.entry(seat=Seat(turned_away, 1)))
        assert caught.value.reason is Reason.DRAINING
        it.assert_empty()

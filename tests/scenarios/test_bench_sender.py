"""The sender in virtual time: the schedule is kept, whatever the target does, and everything sent has its record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest

from baton.testing import in_virtual_time, run_virtual
from bench.generator.sender import (
    INTERRUPTED,
    LEAD_S,
    LEFT,
    TIMED_OUT,
    RunState,
    _Places,
    send_plan,
)
from bench.generator.target import ServerFacts, TargetError, TargetEvent, Tokens
from bench.results.records import NOT_SENT, NOT_SENT_LEFT, Outcome, RequestRecord, was_sent
from bench.traffic.plan import Plan, PlannedRequest


class ScriptedTarget:
    """Answers after ``ttft_s``, then a token every ``gap_s``; ``scripts`` by index do something else instead."""

    def __init__(self, *, ttft_s: float = 0.5, gap_s: float = 0.1) -> None:
        self.ttft_s, self.gap_s = ttft_s, gap_s
        self.scripts: dict[int, Callable[[PlannedRequest], AsyncGenerator[TargetEvent, None]]] = {}
        self.sent: list[tuple[int, float, float]] = []
        """(index, loop time, timeout)."""
        self.open_count = self.most_open_count = 0

    async def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        loop = asyncio.get_running_loop()
        self.sent.append((request.index, loop.time(), timeout_s))
        self.open_count += 1
        self.most_open_count = max(self.most_open_count, self.open_count)
        try:
            if request.index in self.scripts:
                async with aclosing(self.scripts[request.index](request)) as events:
                    async for event in events:
                        yield event
                return
            await asyncio.sleep(self.ttft_s)
            for place in range(request.output_token_count):
                if place:
                    await asyncio.sleep(self.gap_s)
                yield Tokens(loop.time(), 1)
        finally:
            self.open_count -= 1

    async def close(self) -> None:
        pass


def request(index: int, at_s: float, **changes: object) -> PlannedRequest:
    values: dict[str, object] = {"prompt_token_ids": (1, 2, 3), "output_token_count": 3, **changes}
    return PlannedRequest(index=index, at_s=at_s, **values)  # type: ignore[arg-type]


def plan(*requests: PlannedRequest) -> Plan:
    return Plan(name="scripted", requests=requests, duration_s=10.0, facts={})


async def fails(_: PlannedRequest) -> AsyncGenerator[TargetEvent, None]:
    await asyncio.sleep(0.2)
    raise TargetError(Outcome.REFUSED, "RESOURCE_EXHAUSTED/QUEUE_FULL")
    yield Tokens(0.0, 1)


@in_virtual_time
async def test_every_request_is_sent_at_its_time_however_slow_the_target_is() -> None:
    target = ScriptedTarget(ttft_s=100.0)
    records = await send_plan(plan(*(request(i, i * 0.01) for i in range(500))), target, timeout_s=300)
    assert [record.index for record in records] == list(range(500))
    assert [record.intended_at_s for record in records] == pytest.approx([i * 0.01 for i in range(500)])
    assert max(record.lag_s for record in records) == pytest.approx(0.0, abs=1e-9)
    assert target.most_open_count == 500


@in_virtual_time
async def test_latencies_count_from_the_intended_time_and_messages_are_kept() -> None:
    records = await send_plan(plan(request(0, 2.0)), ScriptedTarget(), timeout_s=60)
    record = records[0]
    assert record.outcome is Outcome.OK
    assert record.error is None
    assert record.intended_at_s == pytest.approx(2.0)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.message_gaps_s == pytest.approx([0.1, 0.1])
    assert record.message_token_counts == [1, 1, 1]
    assert record.ended_at_s == pytest.approx(2.7)
    assert (record.prompt_token_count, record.output_token_limit) == (3, 3)


@in_virtual_time
async def test_what_the_server_says_of_a_request_is_in_its_record() -> None:
    async def tells(_: PlannedRequest) -> AsyncGenerator[TargetEvent, None]:
        yield Tokens(asyncio.get_running_loop().time(), 3)
        yield ServerFacts({"prefill": 0.2}, 4096, "split/auto", 2, "p0", "d0", 7, 4)

    target = ScriptedTarget()
    target.scripts[0] = tells
    (record,) = await send_plan(plan(request(0, 0.0)), target, timeout_s=60)
    assert record.phases_s == {"prefill": 0.2}
    assert (record.kv_transfer_bytes, record.placement, record.attempt_count) == (4096, "split/auto", 2)
    assert (record.prefill_worker_id, record.decode_worker_id) == ("p0", "d0")
    assert (record.prompt_token_count, record.cached_prompt_token_count) == (7, 4), "as the server counted"


@in_virtual_time
async def test_a_turn_is_due_its_pause_after_the_former_turn_ended() -> None:
    target = ScriptedTarget(ttft_s=1.0, gap_s=0.0)
    records = await send_plan(
        plan(
            request(0, 1.0, session_id="s"),
            request(1, 5.0, session_id="s", after=0),
            request(2, 0.5, session_id="s", after=1),
        ),
        target,
        timeout_s=60,
    )
    assert [record.intended_at_s for record in records] == pytest.approx([1.0, 7.0, 8.5])
    assert [record.ended_at_s for record in records] == pytest.approx([2.0, 8.0, 9.5])
    assert max(record.lag_s for record in records) == pytest.approx(0.0, abs=1e-9)


@in_virtual_time
async def test_turns_after_a_failed_one_are_errors_that_were_not_sent() -> None:
    target = ScriptedTarget()
    target.scripts[0] = fails
    first = request(0, 0.0, session_id="s")
    turns = [request(i, 1.0, session_id="s", after=i - 1) for i in (1, 2)]
    records = await send_plan(plan(first, *turns, request(3, 9.0)), target, timeout_s=60)
    assert [record.outcome for record in records] == [Outcome.REFUSED, Outcome.ERROR, Outcome.ERROR, Outcome.OK]
    assert [record.error for record in records[1:3]] == [NOT_SENT, NOT_SENT]
    assert [was_sent(record) for record in records] == [True, False, False, True]
    assert [index for index, _, _ in target.sent] == [0, 3]
    assert [record.intended_at_s for record in records[1:3]] == pytest.approx([1.2, 2.2])


@in_virtual_time
async def test_a_caller_leaves_when_the_plan_says_and_so_do_its_turns() -> None:
    target = ScriptedTarget(ttft_s=0.5, gap_s=0.1)
    records = await send_plan(
        plan(
            request(0, 0.0, output_token_count=100, cancel_after_s=0.75),
            request(1, 0.0, after=0),
            request(2, 0.0, output_token_count=3, cancel_after_s=9.0),
        ),
        target,
        timeout_s=60,
    )
    left, not_sent, answered = records
    assert (left.outcome, left.error) == (Outcome.CANCELLED, LEFT)
    assert left.output_token_count == 3, "what came before stays in the record"
    assert left.ended_at_s == pytest.approx(0.75)
    assert (not_sent.outcome, not_sent.error) == (Outcome.CANCELLED, NOT_SENT_LEFT)
    assert answered.outcome is Outcome.OK, "the answer was there before the caller left"
    assert target.open_count == 0


@in_virtual_time
async def test_the_deadline_counts_from_the_intended_time() -> None:
    target = ScriptedTarget(ttft_s=1.0, gap_s=1.0)
    (record,) = await send_plan(plan(request(0, 3.0, output_token_count=50)), target, timeout_s=5.5)
    assert (record.outcome, record.error) == (Outcome.TIMEOUT, TIMED_OUT)
    assert record.ended_at_s == pytest.approx(8.5)
    assert record.output_token_count == 5
    assert target.sent[0][2] == pytest.approx(5.5), "and the target is told what is left of it"
    assert target.open_count == 0


@in_virtual_time
async def test_what_a_target_says_of_a_failure_is_the_outcome() -> None:
    async def breaks(_: PlannedRequest) -> AsyncGenerator[TargetEvent, None]:
        yield Tokens(asyncio.get_running_loop().time(), 1)
        raise TargetError(Outcome.INCOMPLETE, "1 tokens came for 3")

    async def is_wrong(_: PlannedRequest) -> AsyncGenerator[TargetEvent, None]:
        raise KeyError("secret prompt text")
        yield Tokens(0.0, 1)

    target = ScriptedTarget()
    target.scripts |= {0: fails, 1: breaks, 2: is_wrong}
    records = await send_plan(plan(*(request(i, 0.0) for i in range(4))), target, timeout_s=60)
    assert [r.outcome for r in records] == [Outcome.REFUSED, Outcome.INCOMPLETE, Outcome.ERROR, Outcome.OK]
    assert records[1].output_token_count == 1
    assert records[2].error == "the target failed: KeyError", "no text of an exception that may hold a prompt"


@in_virtual_time
async def test_a_closed_loop_shows_as_lag() -> None:
    target = ScriptedTarget(ttft_s=1.0, gap_s=0.0)
    records = await send_plan(plan(*(request(i, 0.0) for i in range(5))), target, timeout_s=60, max_in_flight=2)
    assert target.most_open_count == 2
    assert [record.lag_s for record in records] == pytest.approx([0, 0, 1, 1, 2])
    assert [record.ttft_s for record in records] == pytest.approx([1, 1, 2, 2, 3])
    assert [record.service_ttft_s for record in records] == pytest.approx([1, 1, 1, 1, 1])


@in_virtual_time
async def test_a_place_that_is_given_to_who_leaves_just_then_is_not_lost() -> None:
    places = _Places(1)
    await places.take()
    leaver, next_one = asyncio.create_task(places.take()), asyncio.create_task(places.take())
    await asyncio.sleep(0)
    places.give_back()
    leaver.cancel()  # before it could run again
    await asyncio.wait([leaver])
    assert leaver.cancelled()
    await asyncio.wait_for(next_one, 1.0)


@in_virtual_time
async def test_who_waits_for_a_place_too_long_times_out_and_gives_none_away() -> None:
    target = ScriptedTarget(ttft_s=4.0, gap_s=0.0)
    # 1 and 2 give up at the same moment, 2 without ever having had a place: 3 must get it.
    requests = [request(0, 0.0), request(1, 0.0), request(2, 0.0), request(3, 5.5)]
    records = await send_plan(plan(*requests), target, timeout_s=5.0, max_in_flight=1)
    outcomes = [Outcome.OK, Outcome.TIMEOUT, Outcome.TIMEOUT, Outcome.OK]
    assert [record.outcome for record in records] == outcomes
    assert [index for index, _, _ in target.sent] == [0, 1, 3]
    assert [record.ended_at_s for record in records] == pytest.approx([4.0, 5.0, 5.0, 9.5])
    assert records[3].lag_s == pytest.approx(0.0, abs=1e-9)
    assert records[2].sent_at_s == records[2].ended_at_s, "never sent: its whole wait is lag"
    assert [record.lag_s for record in records[:3]] == pytest.approx([0.0, 4.0, 5.0], abs=1e-9)


@in_virtual_time
async def test_who_leaves_before_it_got_a_place_has_waited_all_the_time() -> None:
    target = ScriptedTarget(ttft_s=4.0, gap_s=0.0)
    requests = [request(0, 0.0), request(1, 0.0, cancel_after_s=1.5)]
    records = await send_plan(plan(*requests), target, timeout_s=5.0, max_in_flight=1)
    assert records[1].outcome is Outcome.CANCELLED
    assert records[1].sent_at_s == records[1].ended_at_s
    assert records[1].lag_s == pytest.approx(1.5)


def test_interrupted_it_leaves_nothing_open_and_hands_over_what_it_sent() -> None:
    target = ScriptedTarget(ttft_s=100.0)
    seen: list[RequestRecord] = []

    async def interrupted() -> None:
        sending = asyncio.create_task(
            send_plan(
                plan(request(0, 0.0), request(1, 1.0), request(2, 50.0), request(3, 0.0, after=0)),
                target,
                timeout_s=300,
                on_record=seen.append,
            )
        )
        await asyncio.sleep(2.0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    run_virtual(interrupted())  # fails if a task is left behind
    assert target.open_count == 0
    assert sorted(record.index for record in seen) == [0, 1]
    assert {(record.outcome, record.error) for record in seen} == {(Outcome.ERROR, INTERRUPTED)}
    assert [record.ended_at_s for record in seen] == pytest.approx([2.0 - LEAD_S] * 2)


@in_virtual_time
async def test_an_observer_sees_the_run_as_it_goes() -> None:
    states: list[RunState] = []

    async def look() -> tuple[int, int, int]:
        await asyncio.sleep(LEAD_S + 0.65)
        return len(states[0].in_flight), len(states[0].ended), states[0].in_flight[1].output_token_count

    looking = asyncio.create_task(look())
    target = ScriptedTarget(ttft_s=0.1, gap_s=0.2)
    await send_plan(plan(request(0, 0.0), request(1, 0.3)), target, timeout_s=60, observer=states.append)
    assert await looking == (1, 1, 2)
    assert states[0].started_at_s == pytest.approx(LEAD_S)


@in_virtual_time
async def test_a_failing_recorder_ends_the_run_instead_of_losing_records() -> None:
    def full(_: RequestRecord) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        await send_plan(plan(request(0, 0.0), request(1, 30.0)), ScriptedTarget(), timeout_s=60, on_record=full)


@in_virtual_time
async def test_an_empty_plan_ends_at_once() -> None:
    assert await send_plan(plan(), ScriptedTarget(), timeout_s=60) == []


@in_virtual_time
async def test_a_target_prepares_all_requests_before_the_clock_starts() -> None:
    class Preparing(ScriptedTarget):
        def prepare(self, requests: tuple[PlannedRequest, ...]) -> None:
            assert not self.sent
            self.prepared = [request.index for request in requests]

    target = Preparing()
    await send_plan(plan(request(0, 0.0), request(1, 0.0, after=0)), target, timeout_s=60)
    assert target.prepared == [0, 1]

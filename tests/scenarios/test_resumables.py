"""Generations that outlive their readers, in virtual time: graces, take-overs, abandonment, going on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import pytest

from baton.errors import BatonError, Reason, StatusName, deadline_exceeded, engine_failed
from baton.request import OutputOptions, Role, Sampling
from baton.testing import in_virtual_time
from baton.timeline import Phase
from bench.virtual_cluster import TokenAnswer, VirtualCluster, virtual_cluster
from router.answering import Admitted, Completed, Piece, RelayEvent, RoutedRequest
from router.resuming.replay_window import WindowLimits
from router.resuming.resumables import About, Resumable, Resumables, ResumeLimits

GRACE_S = 5.0
STEP_S = 0.1
END = object.__new__(Completed)


@dataclass
class Scripted:
    """A pipeline that makes one token every ``STEP_S``."""

    token_count: int = 20
    failure: BatonError | None = None
    admitted_after_s: float = 0.0
    made_count: int = 0
    is_closed: bool = False

    async def events(self) -> AsyncGenerator[RelayEvent, None]:
        try:
            await asyncio.sleep(self.admitted_after_s)
            if self.token_count == 0 and self.failure is not None:
                raise self.failure
            yield Admitted("g")
            for index in range(self.token_count):
                await asyncio.sleep(STEP_S)
                self.made_count += 1
                yield Piece(index, (index,), f"{index} ", None)
            if self.failure is not None:
                raise self.failure
            yield END
        finally:
            self.is_closed = True


def about(generation_id: str = "g", **more: Any) -> About:
    values: dict[str, Any] = {
        "generation_id": generation_id,
        "identity": "tenant:",
        "output": OutputOptions(),
        "model": "m",
        "prompt_token_count": 3,
        "deadline_at": 1e9,
        "grace_s": GRACE_S,
        "resume_token": "t",
    }
    return About(**{**values, **more})


async def read(
    resumable: Resumable, index: int = 0, *, until_count: int | None = None, until: float | None = None
) -> tuple[list[int], Completed | None]:
    tokens: list[int] = []
    completed = None
    async with aclosing(resumable.read([index], until=until)) as events:
        async for event in events:
            match event:
                case Piece():
                    tokens += event.token_ids
                    if until_count is not None and len(tokens) >= until_count:
                        break
                case Completed():
                    completed = event
    return tokens, completed


def opened(resumables: Resumables, script: Scripted, **more: Any) -> Resumable:
    return resumables.open(about(**more), script.events)


async def failed(call: Any) -> BatonError:
    with pytest.raises(BatonError) as caught:
        await call
    return caught.value


@in_virtual_time
async def test_a_detached_generation_computes_on_and_is_read_to_its_end() -> None:
    resumables, script = Resumables(), Scripted()
    resumable = opened(resumables, script)
    assert (await read(resumable, until_count=3))[0] == [0, 1, 2]
    assert resumables.detached_count == 1
    await asyncio.sleep(1.0)
    assert script.made_count >= 12, "nobody reads, and it goes on"
    assert await read(resumable, 3) == (list(range(3, 20)), END)
    await asyncio.sleep(GRACE_S + 0.01)
    assert (resumables.kept_count, resumables.used_bytes) == (0, 0)


@in_virtual_time
async def test_without_a_reader_it_is_cancelled_when_the_grace_is_over_and_not_before() -> None:
    told: list[int] = []
    resumables, script = Resumables(on_abandoned=lambda: told.append(1)), Scripted(token_count=1000)
    await read(opened(resumables, script), until_count=1)
    await asyncio.sleep(GRACE_S - 0.01)
    assert (resumables.running_count, script.is_closed) == (1, False)
    await asyncio.sleep(0.02)
    assert (resumables.running_count, script.is_closed, told) == (0, True, [1])
    assert resumables.find("g") is None


@in_virtual_time
async def test_a_reader_who_comes_back_stops_the_clock() -> None:
    resumables, script = Resumables(), Scripted(token_count=400)
    resumable = opened(resumables, script)
    await read(resumable, until_count=1)
    for _ in range(5):
        await asyncio.sleep(GRACE_S - 1)
        await read(resumable, until_count=1)
    assert resumables.running_count == 1
    await resumables.close()


@in_virtual_time
async def test_an_answer_that_ended_is_kept_for_the_grace_from_its_last_token() -> None:
    resumables = Resumables()
    resumable = opened(resumables, Scripted(token_count=40))
    await read(resumable, until_count=1)  # cut at 0.1 s; the answer ends at 4 s
    await asyncio.sleep(3.9 + GRACE_S - 0.1)
    assert resumables.find("g") is resumable
    assert (await read(resumable, 1))[1] is END
    await asyncio.sleep(GRACE_S - 0.1)
    assert resumables.find("g") is resumable, "and after its reader left for another grace"
    await asyncio.sleep(0.2)
    assert resumables.find("g") is None


@in_virtual_time
async def test_a_caller_who_never_got_its_token_cannot_come_back_so_it_ends_with_the_call() -> None:
    resumables, script = Resumables(), Scripted(admitted_after_s=10.0)
    waiting = asyncio.create_task(read(opened(resumables, script)))
    await asyncio.sleep(1.0)
    waiting.cancel()
    await asyncio.sleep(0.01)
    assert (resumables.kept_count, script.is_closed) == (0, True)


@in_virtual_time
async def test_a_refused_request_is_refused_as_any_other_and_forgotten() -> None:
    resumables = Resumables()
    error = await failed(read(opened(resumables, Scripted(0, deadline_exceeded("queue", 0)))))
    assert error.reason is Reason.DEADLINE_EXCEEDED
    assert resumables.kept_count == 0


@in_virtual_time
async def test_the_newest_reader_takes_over_and_the_grace_does_not_run_meanwhile() -> None:
    resumables = Resumables()
    resumable = opened(resumables, Scripted(token_count=200))
    older = asyncio.create_task(failed(read(resumable)))
    await asyncio.sleep(1.0)
    newer = asyncio.create_task(read(resumable))
    assert (await older).reason is Reason.ATTACHED_ELSEWHERE
    await asyncio.sleep(GRACE_S + 1)
    assert resumable.is_read
    assert await newer == (list(range(200)), END)
    await resumables.close()


@in_virtual_time
async def test_whoever_asks_wrongly_disturbs_nobody() -> None:
    resumables = Resumables()
    resumable = opened(resumables, Scripted())
    reader = asyncio.create_task(read(resumable))
    await asyncio.sleep(0.5)
    assert (await failed(read(resumable, 17))).reason is Reason.INVALID_REQUEST
    assert await reader == (list(range(20)), END)
    await resumables.close()


@in_virtual_time
async def test_the_deadline_of_an_attachment_is_not_that_of_the_generation() -> None:
    resumables, script = Resumables(), Scripted()
    resumable = opened(resumables, script)
    error = await failed(read(resumable, until=asyncio.get_running_loop().time() + 0.55))
    assert error.reason is Reason.DEADLINE_EXCEEDED
    assert not script.is_closed
    assert (await read(resumable, 5))[0] == list(range(5, 20))
    await resumables.close()


@in_virtual_time
async def test_a_reader_who_does_not_read_holds_nothing_up_and_gets_fewer_pieces() -> None:
    resumables, script = Resumables(), Scripted(token_count=30)
    resumable = opened(resumables, script)
    sizes = []
    async with aclosing(resumable.read([0])) as events:
        async for event in events:
            if isinstance(event, Piece):
                sizes.append(event.token_count)
                await asyncio.sleep(1.05)
    assert script.is_closed
    assert sizes == [1, 10, 10, 9]
    await resumables.close()


@in_virtual_time
async def test_what_ended_badly_says_so_to_whoever_comes_back_until_it_is_forgotten() -> None:
    resumables = Resumables()
    resumable = opened(resumables, Scripted(5, engine_failed("d", "died")))
    await read(resumable, until_count=1)
    await asyncio.sleep(1.0)
    assert resumable.could_continue
    assert (await failed(read(resumable, 1))).reason is Reason.ENGINE_FAILED
    await asyncio.sleep(GRACE_S + 0.01)
    assert resumables.kept_count == 0


@in_virtual_time
async def test_at_the_limit_the_oldest_that_was_read_to_its_end_makes_place_and_nothing_else_does() -> None:
    resumables = Resumables(ResumeLimits(max_count=2))
    done = opened(resumables, Scripted(1), generation_id="a")
    await read(done)
    running = opened(resumables, Scripted(100), generation_id="b")
    await read(running, until_count=1)
    await read(opened(resumables, Scripted(100), generation_id="c"), until_count=1)
    assert resumables.find("a") is None
    with pytest.raises(BatonError) as caught:
        opened(resumables, Scripted(), generation_id="d")
    assert caught.value.reason is Reason.TOO_MANY_RESUMABLE
    assert caught.value.metadata == {"kept_count": "2", "limit": "2"}
    await resumables.close()


@in_virtual_time
async def test_what_was_delivered_gives_way_then_what_ended_unread_and_a_reader_is_never_too_late() -> None:
    resumables = Resumables(ResumeLimits(total_bytes=400 * 400))
    unread = opened(resumables, Scripted(100), generation_id="unread", grace_s=1000.0)  # the oldest of all
    await read(unread, until_count=1)
    for number in range(2):
        each = opened(resumables, Scripted(100), generation_id=f"delivered-{number}", grace_s=1000.0)
        assert (await read(each))[1] is END
    names = {"unread", "delivered-0", "delivered-1"}
    gone: list[str] = []
    running = opened(resumables, Scripted(500), generation_id="running")
    tokens: list[int] = []
    async with aclosing(running.read([0])) as events:
        async for event in events:
            if isinstance(event, Piece):
                tokens += event.token_ids
                assert resumables.used_bytes <= 400 * 400
                gone += [name for name in sorted(names - set(gone)) if resumables.find(name) is None]
    assert tokens == [*range(500)]
    assert gone == ["delivered-0", "delivered-1", "unread"]
    await resumables.close()
    assert resumables.used_bytes == 0


@in_virtual_time
async def test_what_ended_unread_gives_way_where_nothing_was_delivered_and_what_runs_only_shrinks() -> None:
    resumables = Resumables(ResumeLimits(total_bytes=400 * 400))
    unread = opened(resumables, Scripted(100), generation_id="unread", grace_s=1000.0)
    await read(unread, until_count=1)
    await asyncio.sleep(101 * STEP_S)
    running = [opened(resumables, Scripted(300), generation_id=f"running-{n}", grace_s=1000.0) for n in range(3)]
    got = await asyncio.gather(*(read(each) for each in running))
    assert [tokens for tokens, _ in got] == [[*range(300)]] * 3
    assert resumables.find("unread") is None
    assert all(resumables.find(each.about.generation_id) is each for each in running)
    assert resumables.used_bytes <= 400 * 400
    await resumables.close()


@in_virtual_time
async def test_a_generation_is_left_as_it_is_when_what_was_to_go_on_with_it_is_refused() -> None:
    resumables, script = Resumables(ResumeLimits(max_count=1)), Scripted(100)
    first = opened(resumables, script)

    def refused() -> AsyncGenerator[RelayEvent, None]:
        raise deadline_exceeded("queue", 0)

    with pytest.raises(BatonError):
        resumables.open(about("h", formerly="g"), refused)
    assert (resumables.find("g"), first.is_running, resumables.kept_count) == (first, True, 1)
    second = opened(resumables, Scripted(), generation_id="h", formerly="g")  # it makes place, though it is the last
    assert (resumables.find("g"), first.window.last is None, resumables.kept_count) == (None, False, 1)
    assert (await read(second))[1] is END
    await resumables.close()


@in_virtual_time
async def test_nothing_is_kept_for_longer_than_its_token_is_good_for() -> None:
    """However late its last reader left: to the deadline and the grace, and the token no longer."""
    loop = asyncio.get_running_loop()
    resumables = Resumables()
    resumable = opened(resumables, Scripted(20), deadline_at=loop.time() + 3.0)
    events = resumable.read([0])
    await anext(events)
    await anext(events)
    await asyncio.sleep(3.0 + GRACE_S - 1.0)
    assert resumable.window.last is END
    await events.aclose()
    assert resumables.find("g") is resumable
    await asyncio.sleep(1.0)
    assert (resumables.find("g"), resumables.used_bytes) == (None, 0)


@in_virtual_time
async def test_giving_up_sends_readers_elsewhere_but_lets_an_answer_that_ended_be_read() -> None:
    resumables = Resumables()
    running = opened(resumables, Scripted(100), generation_id="a")
    ended = opened(resumables, Scripted(2), generation_id="b")
    reader = asyncio.create_task(failed(read(running)))
    await read(ended, until_count=1)
    await asyncio.sleep(1.0)
    for tell in resumables.goodbyes():
        tell()
    told = await reader
    assert (told.reason, told.status) == (Reason.DRAINING, StatusName.ABORTED), "tokens were sent"
    assert told.metadata["emitted_token_count"] == "10", "one each 0.1 s"
    assert "resume at another" in told.message
    late = await failed(read(running, 10))
    assert (late.reason, late.status) == (Reason.DRAINING, StatusName.UNAVAILABLE), "this call sent none"
    assert await read(ended, 1) == ([1], END)
    await resumables.close()
    assert resumables.kept_count == 0


@in_virtual_time
async def test_a_thousand_abandoned_generations_leave_nothing() -> None:
    resumables, scripts = Resumables(), [Scripted(1000) for _ in range(1000)]
    for number, script in enumerate(scripts):
        await read(opened(resumables, script, generation_id=f"g{number}"), until_count=1)
        if resumables.kept_count > 500:
            resumables.cancel(f"g{number - 500}")
    await asyncio.sleep(GRACE_S + 0.01)
    assert (resumables.kept_count, resumables.used_bytes, resumables._by_id) == (0, 0, {})
    assert all(script.is_closed for script in scripts)
    assert len(asyncio.all_tasks()) == 1


@in_virtual_time
async def test_a_reader_whose_time_is_over_hears_in_which_phase_it_went_by() -> None:
    flights = {"prefilling": Phase.PREFILL, "ended": Phase.PREFILL}
    resumables = Resumables(phase_of=flights.get)
    scripts = {"waiting": Scripted(admitted_after_s=60.0), "prefilling": Scripted(), "running": Scripted(100)}
    until = asyncio.get_running_loop().time() + 0.55
    for name, script in scripts.items():
        resumable = opened(resumables, script, generation_id=name)
        told = await failed(read(resumable, until=until if name != "running" else until + STEP_S))
        assert told.reason is Reason.DEADLINE_EXCEEDED
        assert told.metadata["phase"] == {"waiting": "queue", "prefilling": "prefill", "running": "decode"}[name]
    await resumables.close()


@in_virtual_time
async def test_the_phase_of_a_reader_whose_time_is_over_is_its_flights() -> None:
    async with virtual_cluster(1, 1) as cluster:
        resumables = Resumables(phase_of=cluster.relay.phase_of)
        request = cluster.request(40, 800)
        resumable = await abandoned(cluster, resumables, request, after=1)
        told = await failed(read(resumable, 1, until=asyncio.get_running_loop().time()))
        assert told.metadata["phase"] == "handoff_wait", "the first token was the prefill's"
        assert await read(resumable, 1, until_count=3)
        told = await failed(read(resumable, 4, until=asyncio.get_running_loop().time()))
        assert told.metadata["phase"] == "decode"
        resumable.forget()
        await cluster.assert_balanced()
        assert cluster.relay.phase_of(request.generation_id) is None


# With the real relay and workers behind it


async def abandoned(cluster: VirtualCluster, resumables: Resumables, request: RoutedRequest, after: int) -> Resumable:
    """Begins ``request``, reads ``after`` tokens of it and leaves."""
    now = asyncio.get_running_loop().time()

    def events() -> AsyncGenerator[RelayEvent, None]:
        return cluster.relay.run(request, TokenAnswer(), now + 300.0, received_at=now)

    resumable = resumables.open(about(request.generation_id), events)
    await read(resumable, until_count=after)
    return resumable


@in_virtual_time
async def test_abandoned_streams_free_their_kv_when_the_grace_is_over() -> None:
    async with virtual_cluster(1, 2) as cluster:
        resumables = Resumables(ResumeLimits(window=WindowLimits(1 << 20, 4096)))
        for number in range(12):
            await abandoned(cluster, resumables, cluster.request(40, 800), after=1 + number % 4)
        assert any(book.get("blocks") for book in cluster.books().values())
        await asyncio.sleep(GRACE_S)
        await cluster.assert_balanced()
        assert resumables.kept_count == 0


@pytest.mark.parametrize("emitted_count", [1, 2, 15, 16, 17, 38, 39])
@in_virtual_time
async def test_an_answer_goes_on_from_any_token_as_if_nothing_had_happened(emitted_count: int) -> None:
    async with virtual_cluster(1, 1) as cluster:
        request = cluster.request(40, 40, sampling=Sampling(temperature=0.8, seed=7))
        whole = cluster.expected(request)
        answer = TokenAnswer()
        answer.push(tuple(whole[:emitted_count]))
        now = asyncio.get_running_loop().time()
        rest = replace(request, generation_id="again", emitted_token_ids=tuple(whole[:emitted_count]))
        heard: list[int] = []
        async with aclosing(cluster.relay.run(rest, answer, now + 60.0, received_at=now)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    assert event.first_token_index == emitted_count + len(heard)
                    heard += event.token_ids
                if isinstance(event, Completed):
                    assert event.usage.output_token_count == len(whole)
        assert whole[:emitted_count] + heard == whole


@in_virtual_time
async def test_a_continuation_that_finds_no_worker_may_be_asked_again() -> None:
    async with virtual_cluster(1, 1) as cluster:
        request = cluster.request(40, 40)
        rest = replace(request, emitted_token_ids=tuple(cluster.expected(request)[:5]))
        for process in [*cluster.processes.values()]:
            process.die()
        now = asyncio.get_running_loop().time()
        answer = TokenAnswer()
        answer.push(rest.emitted_token_ids)

        async def ask() -> None:
            async with aclosing(cluster.relay.run(rest, answer, now + 60.0, received_at=now)) as events:
                async for _ in events:
                    pass

        error = await failed(ask())
        assert error.status.value == "UNAVAILABLE"
        for role in (Role.PREFILL, Role.DECODE):
            await cluster.launch(f"{role.value}-0", role)
        await cluster.until_ready()

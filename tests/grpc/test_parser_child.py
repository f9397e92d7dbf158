"""The process that parses answers, from the router's end: it comes back when it dies, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from router.chats.answer_parsing import AnswerPlan
from router.chats.parser_child import ParserChild, ParserSpec, ParserStartError, ParserStream

STUB = (str(Path(__file__).with_name("parser_stub.py")),)
PLAN = AnswerPlan(uses_tools=True, uses_reasoning=False)


def spec(tool_parser: str = "stub", **changes: Any) -> ParserSpec:
    return ParserSpec("nowhere", tool_parser, command=STUB, **changes)


@asynccontextmanager
async def child(**changes: Any) -> AsyncIterator[ParserChild]:
    one = ParserChild(spec(**changes))
    await one.start()
    try:
        yield one
    finally:
        await one.close()


def stream(of: ParserChild, *, time_s: float = 60.0) -> ParserStream:
    deadline_at = asyncio.get_running_loop().time() + time_s
    return of.open(PLAN, (1, 2), keeps_special_tokens=True, deadline_at=deadline_at)


async def test_streams_beside_each_other_get_their_own_answers() -> None:
    async with child() as one:
        streams = [stream(one) for _ in range(20)]
        told = await asyncio.gather(*(each.push([f"word {n}"], [n]) for n, each in enumerate(streams)))
        assert [each.text for each in told] == [f"WORD {n}" for n in range(20)]
        end = await streams[0].finish("rest")
        assert (end.text, [call.name for call in end.whole]) == ("REST", ["f"])


async def test_a_process_that_dies_fails_its_streams_and_the_next_one_serves() -> None:
    async with child() as one:
        first, second = stream(one), stream(one)
        await second.push(["a"], [1])
        first_pid = one.pid
        with pytest.raises(BatonError) as failed:
            await first.push(["die"], [1])
        assert failed.value.reason is Reason.ATTEMPTS_EXHAUSTED
        with pytest.raises(BatonError):
            await second.push(["b"], [2])
        second.close()
        await one.ready()
        assert one.pid != first_pid
        assert (await stream(one).push(["c"], [1])).text == "C"


async def test_a_process_killed_while_nothing_is_asked_is_replaced() -> None:
    async with child() as one:
        pid = one.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while one.pid in (pid, None):  # noqa: ASYNC110  # the kernel tells nobody else
                await asyncio.sleep(0.01)
        assert one.start_count == 2


async def test_a_process_that_answers_nobody_is_killed_and_replaced() -> None:
    async with child(deadline_s=1.0) as one:
        pid = one.pid
        with pytest.raises(BatonError) as failed:
            await stream(one).push(["hang"], [1])
        assert failed.value.reason is Reason.ATTEMPTS_EXHAUSTED
        async with asyncio.timeout(60):
            while one.pid in (pid, None):  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.01)
        one._spec = spec(deadline_s=60.0)  # this one is to answer, when it can
        assert (await stream(one).push(["c"], [1])).text == "C"


async def test_a_callers_deadline_ends_its_wait_and_leaves_the_process_alone() -> None:
    async with child(deadline_s=60.0) as one:
        pid = one.pid
        with pytest.raises(BatonError) as failed:
            await stream(one, time_s=0.05).push(["hang"], [1])
        assert failed.value.reason is Reason.DEADLINE_EXCEEDED
        assert one.pid == pid


async def test_a_parser_that_fails_is_an_error_of_its_answer_alone() -> None:
    async with child() as one:
        bad, good = stream(one), stream(one)
        with pytest.raises(BatonError, match="IndexError") as failed:
            await bad.push(["fail"], [1])
        assert failed.value.reason is Reason.INTERNAL
        assert (await good.push(["c"], [1])).text == "C"


async def test_what_is_no_frame_ends_the_process() -> None:
    async with child() as one:
        with pytest.raises(BatonError):
            await stream(one).push(["noise"], [1])
        await one.ready()
        assert (await stream(one).push(["c"], [1])).text == "C"


async def test_the_process_gets_no_secret_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CLUSTER_SECRET", "ab" * 32)
    async with child() as one:
        names = (await stream(one).push(["environment"], [1])).text.split(",")
        assert "PATH" in names
        assert not [name for name in names if "SECRET" in name]


@pytest.mark.parametrize(
    ("name", "said"), [("never", "not ready within"), ("broken", "no such parser"), ("mute", "ended before")]
)
async def test_a_process_that_does_not_start_says_why(name: str, said: str) -> None:
    with pytest.raises(ParserStartError, match=said) as failed:
        await ParserChild(spec(name, start_deadline_s=60.0 if name != "never" else 0.5)).start()
    assert f'tool_parser = "{name}"' in str(failed.value)


async def test_without_a_process_a_request_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with child(wait_s=0.05) as one:
        one._spec = spec("broken", wait_s=0.05)  # the next start will fail
        pid = one.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while one.pid is not None:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.01)
        with pytest.raises(BatonError) as refused:
            await one.ready()
        assert refused.value.reason is Reason.NO_WORKER
        with pytest.raises(BatonError):
            stream(one)


async def test_closing_ends_the_process_and_starts_no_other() -> None:
    one = ParserChild(spec())
    await one.start()
    pid = one.pid
    assert pid is not None
    await one.close()
    await one.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert one.start_count == 1

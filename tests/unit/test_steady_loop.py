"""The loop of the tests over sockets: what the machine takes away is not on its clock, what a test waits for is."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from steady_loop import LONGEST_TURN_S, LONGEST_WAIT_S, SteadyLoop

ROUNDING_S = 1e-6


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SteadyLoop) as runner:
        runner.run(scenario)


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_process_that_was_stopped_did_not_live_through_it() -> None:
    async def scenario() -> None:
        began_at = now()
        time.sleep(0.3)  # noqa: ASYNC251  # as if the machine had taken the processor
        assert now() - began_at <= LONGEST_TURN_S + ROUNDING_S
        await asyncio.sleep(0)
        assert now() - began_at <= 2 * LONGEST_TURN_S + ROUNDING_S

    run(scenario())


def test_a_limit_is_not_over_because_the_machine_stopped_what_was_about_to_keep_it() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(0.25):
            time.sleep(0.5)  # noqa: ASYNC251
            await asyncio.sleep(0.01)

    run(scenario())


def test_a_stop_in_the_middle_of_a_long_wait_is_not_lived_through() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        selector: Any = loop._watching._selector  # type: ignore[attr-defined]
        select = selector.select
        here, there = socket.socketpair()
        with here, there:
            there.setblocking(False)

            def stopped(timeout: float) -> Any:
                if timeout > 0:
                    selector.select = select
                    time.sleep(0.5)  # as if the machine had taken the processor
                    here.send(b"x")  # what wakes the wait long before its timer
                return select(timeout)

            began_at = now()
            selector.select = stopped
            async with asyncio.timeout(10):
                assert await loop.sock_recv(there, 1) == b"x"
            assert selector.select == select, "no wait was stopped: the test shows nothing"
            # The turn before the wait, the wait, and the turn behind it.
            assert now() - began_at <= LONGEST_WAIT_S + 3 * LONGEST_TURN_S + ROUNDING_S

    run(scenario())


def test_a_wait_of_several_pieces_is_as_long_as_it_was_asked_for() -> None:
    async def scenario() -> None:
        wait_s = 3.5 * LONGEST_WAIT_S
        began_at, really_began_at = now(), time.monotonic()
        await asyncio.sleep(wait_s)
        resolution_s = asyncio.get_running_loop()._clock_resolution  # type: ignore[attr-defined]
        assert now() - began_at >= wait_s - resolution_s - ROUNDING_S
        assert time.monotonic() - really_began_at >= wait_s - resolution_s - ROUNDING_S

    run(scenario())


def test_the_clock_never_goes_back_and_no_timer_is_early() -> None:
    async def scenario() -> None:
        seen = [now()]
        for _ in range(5):
            due_at = now() + 0.01
            await asyncio.sleep(0.01)
            assert now() >= due_at - asyncio.get_running_loop()._clock_resolution  # type: ignore[attr-defined]
            seen.append(now())
            time.sleep(LONGEST_TURN_S * 1.5)  # noqa: ASYNC251
            seen.append(now())
        assert seen == sorted(seen)

    run(scenario())


def test_a_wait_that_is_really_over_is_over() -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await asyncio.Event().wait()

    run(scenario())


def test_sockets_are_read_and_written() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            there.setblocking(False)
            await loop.sock_sendall(here, b"x")
            assert await loop.sock_recv(there, 1) == b"x"

    run(scenario())

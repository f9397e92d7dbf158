"""The loop of commands and servers: its clock is fine enough for phases, and no timer fires before its time."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest
import uvloop

from baton.event_loop import new_event_loop, runner


def test_the_clock_moves_within_a_millisecond_and_within_a_callback() -> None:
    async def readings() -> set[float]:
        loop = asyncio.get_running_loop()
        return {loop.time() for _ in range(2000)}  # no await: uvloop's own clock would stand still

    with runner() as each:
        assert isinstance(each.get_loop(), uvloop.Loop)
        assert len(each.run(readings())) > 10


def test_no_timer_fires_before_its_time() -> None:
    async def earliest_s() -> float:
        loop = asyncio.get_running_loop()
        found = []
        for index in range(100):
            at = loop.time() + 0.0001 + index * 0.00007
            fired: asyncio.Future[None] = loop.create_future()
            loop.call_at(at, fired.set_result, None)
            await fired
            found.append(loop.time() - at)
            began_at = loop.time()
            await asyncio.sleep(0.0013)
            found.append(loop.time() - began_at - 0.0013)
        return min(found)

    with runner() as each:
        assert each.run(earliest_s()) >= 0


def test_deadlines_without_end_are_understood() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        for delay in (1e12, float("inf")):
            loop.call_later(delay, lambda: None).cancel()
        async with asyncio.timeout_at(loop.time() + 1e12):
            await asyncio.sleep(0)

    with runner() as each:
        each.run(scenario())


def test_the_client_alone_runs_on_asyncios_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvloop" else find(name))
    loop = new_event_loop()
    try:
        assert not isinstance(loop, uvloop.Loop)
    finally:
        loop.close()

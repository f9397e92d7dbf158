"""Who is told that the router stops, how long it waits for them, and whom it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.testing import in_virtual_time
from router.goodbyes import LEAST_S, MOST_S, longest_goodbyes_s, say_goodbyes


class Calls:
    """``count`` of them; each ends so long, and so many turns of the loop, after it was told."""

    def __init__(self, count: int, *, ends_after_s: float | None, turn_count: int = 0) -> None:
        self.open_count = count
        self.told_count = 0
        self._ends_after_s = ends_after_s
        self._turn_count = turn_count
        self.tasks: list[asyncio.Task[None]] = []

    def words(self) -> list[Callable[[], None]]:
        return [self._tell] * self.open_count

    def _tell(self) -> None:
        self.told_count += 1
        self.tasks.append(asyncio.create_task(self._end()))

    async def _end(self) -> None:
        for _ in range(self._turn_count):
            await asyncio.sleep(0)
        if self._ends_after_s is None:
            await asyncio.Event().wait()
            return
        await asyncio.sleep(self._ends_after_s)
        self.open_count -= 1


@in_virtual_time
async def test_the_first_have_ended_before_the_last_are_told() -> None:
    calls = Calls(2000, ends_after_s=0.0, turn_count=8)
    ended_before: list[int] = []
    words = calls.words()

    def last() -> None:
        ended_before.append(2000 - calls.open_count)
        calls._tell()

    words[-1] = last
    await say_goodbyes(words, lambda: calls.open_count)
    assert calls.open_count == 0
    assert ended_before[0] > 1900


@in_virtual_time
async def test_while_calls_still_end_it_waits_and_no_longer_than_the_bound() -> None:
    loop = asyncio.get_running_loop()
    slow = [Calls(1, ends_after_s=0.8 * number) for number in range(1, 6)]
    await say_goodbyes(
        [word for each in slow for word in each.words()], lambda: sum(each.open_count for each in slow)
    )
    assert [each.open_count for each in slow] == [0] * 5
    begun_at = loop.time()
    endless = [Calls(1, ends_after_s=0.8 * number) for number in range(1, 100)]
    words = [word for each in endless for word in each.words()]
    await say_goodbyes(words, lambda: sum(each.open_count for each in endless))
    assert all(each.told_count == 1 for each in endless)
    assert loop.time() - begun_at < longest_goodbyes_s(99) + 0.5
    assert any(each.open_count for each in endless)
    for each in endless:
        for task in each.tasks:
            task.cancel()


@in_virtual_time
async def test_those_who_read_nothing_are_given_up_after_a_moment_without_an_end() -> None:
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    calls = Calls(100, ends_after_s=None)
    await say_goodbyes(calls.words(), lambda: calls.open_count)
    assert calls.told_count == 100
    assert 0.9 < loop.time() - begun_at < 1.5
    for task in calls.tasks:
        task.cancel()


@in_virtual_time
async def test_without_calls_nobody_waits() -> None:
    begun_at = asyncio.get_running_loop().time()
    await say_goodbyes([], lambda: 0)
    assert asyncio.get_running_loop().time() == begun_at


def test_the_bound_grows_with_the_calls_and_has_an_end() -> None:
    assert longest_goodbyes_s(0) == LEAST_S
    assert LEAST_S < longest_goodbyes_s(2048) < longest_goodbyes_s(4096) < MOST_S
    assert longest_goodbyes_s(10**6) == MOST_S

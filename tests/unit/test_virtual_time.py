"""The virtual loop: time jumps, nothing waits, stuck means an error, and the books balance."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator

import pytest

from baton.testing import Deadlock, OutsideWorld, Unbalanced, in_virtual_time, run_virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_long_sleep_takes_no_real_time_and_exactly_its_virtual_time() -> None:
    async def scenario() -> float:
        await asyncio.sleep(3600)
        return now()

    assert run_virtual(scenario()) == 3600.0  # in real time the limit of every test, five minutes, would end it


def test_sleeps_interleave_in_the_order_of_their_ends() -> None:
    async def scenario() -> list[tuple[float, str]]:
        seen: list[tuple[float, str]] = []

        async def wake(name: str, *delays: float) -> None:
            for delay in delays:
                await asyncio.sleep(delay)
                seen.append((now(), name))

        async with asyncio.TaskGroup() as group:
            group.create_task(wake("a", 3, 3))
            group.create_task(wake("b", 2, 2, 2.5))
        return seen

    expected = [(2, "b"), (3, "a"), (4, "b"), (6, "a"), (6.5, "b")]
    assert run_virtual(scenario()) == expected


def test_timeouts_of_both_kinds_fire_when_due() -> None:
    async def scenario() -> tuple[float, float]:
        never = asyncio.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await never.wait()
        first = now()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(never.wait(), 7)
        return first, now()

    assert run_virtual(scenario()) == (5.0, 12.0)


def test_a_bounded_queue_hands_over_between_tasks() -> None:
    async def scenario() -> tuple[list[int], float]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

        async def produce() -> None:
            for item in range(4):
                await queue.put(item)

        async def consume() -> list[int]:
            items = []
            for _ in range(4):
                await asyncio.sleep(1)
                items.append(await queue.get())
            return items

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            consumer = group.create_task(consume())
        return consumer.result(), now()

    assert run_virtual(scenario()) == ([0, 1, 2, 3], 4.0)


def test_a_deadlock_raises_and_names_the_waiting_tasks_and_lines() -> None:
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        await asyncio.create_task(waits_for_ever(), name="stuck one")

    with pytest.raises(Deadlock, match=r"(?s)2 tasks wait.*stuck one: .*waits_for_ever.*Event\.wait"):
        run_virtual(scenario())


def test_a_periodic_task_cannot_hide_a_stuck_one() -> None:
    beats: list[float] = []

    async def beat() -> None:
        while True:
            await asyncio.sleep(1)
            beats.append(now())

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(beat())
            await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="limit of 100 s"):
        run_virtual(scenario(), limit_s=100)
    assert beats[-1] == 100.0


def test_a_task_left_behind_fails_and_is_cancelled() -> None:
    ended: list[str] = []

    async def forgotten() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(1)
            ended.append("cleaned up")

    async def scenario() -> asyncio.Task[None]:
        task = asyncio.create_task(forgotten(), name="forgotten one")
        await asyncio.sleep(0)
        return task

    with pytest.raises(Unbalanced, match="forgotten one"):
        run_virtual(scenario())
    assert ended == ["cleaned up"]


def test_a_cancelled_task_that_only_needs_some_turns_is_not_left_behind() -> None:
    async def ends_in_turns() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(10):
                await asyncio.sleep(0)

    async def scenario() -> asyncio.Task[None]:
        task = asyncio.create_task(ends_in_turns())
        await asyncio.sleep(0)
        task.cancel()
        return task

    assert run_virtual(scenario()).cancelled()


def test_an_error_nobody_retrieves_fails() -> None:
    async def fails() -> None:
        raise ValueError("unseen")

    async def scenario() -> None:
        asyncio.create_task(fails())  # noqa: RUF006  that nobody holds it is the point
        await asyncio.sleep(1)

    with pytest.raises(Unbalanced, match="unseen"):
        run_virtual(scenario())


def test_the_errors_of_the_coroutine_come_through_and_leftovers_are_cancelled() -> None:
    cancelled: list[bool] = []

    async def forgotten() -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def scenario() -> None:
        task = asyncio.create_task(forgotten())
        await asyncio.sleep(1)
        raise LookupError(task.get_name())

    with pytest.raises(LookupError):
        run_virtual(scenario())
    assert cancelled == [True]


def test_an_open_async_generator_is_closed_at_the_end() -> None:
    closed: list[bool] = []

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def scenario() -> AsyncGenerator[int, None]:
        open_one = numbers()
        await anext(open_one)
        return open_one

    run_virtual(scenario())
    assert closed == [True]


def test_threads_sockets_and_processes_are_refused_by_name() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(OutsideWorld, match="run_in_executor"):
            await asyncio.to_thread(len, "x")
        here, there = socket.socketpair()
        with here, there, pytest.raises(OutsideWorld, match="socket"):
            loop.add_reader(here, print)
        with pytest.raises(OutsideWorld, match="subprocess"):
            await asyncio.create_subprocess_exec("true")
        refused: list[Exception] = []

        def from_outside() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except OutsideWorld as error:
                refused.append(error)

        thread = threading.Thread(target=from_outside)
        thread.start()
        thread.join()
        assert "another thread" in str(refused[0])

    run_virtual(scenario())


def test_many_short_timers_do_not_drift_or_spin() -> None:
    async def scenario() -> float:
        for _ in range(10_000):
            await asyncio.sleep(0.001)
        return now()

    assert run_virtual(scenario()) == pytest.approx(10.0)


@pytest.mark.parametrize("delay_s", [0.5])
@in_virtual_time
async def test_the_decorator_keeps_parameters(delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    assert now() == delay_s

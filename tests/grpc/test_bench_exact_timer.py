"""The timer on real loops: never early, once each time, and silent when closed. How late it is, is a benchmark's."""

from __future__ import annotations

import asyncio
import os

from baton import event_loop
from bench.generator.environment import Watch, environment_facts
from bench.generator.exact_timer import ExactTimer


class Bell:
    """Counts rings and remembers when they came."""

    def __init__(self) -> None:
        self.rang_at: list[float] = []
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self.rang_at.append(asyncio.get_running_loop().time())
        self._rung.set()

    async def next(self) -> float:
        async with asyncio.timeout(60):
            await self._rung.wait()
        self._rung.clear()
        return self.rang_at[-1]


async def rings() -> None:
    loop = asyncio.get_running_loop()
    bell = Bell()
    timer = ExactTimer(bell.ring)
    try:
        for wait_s in (0.02, 0.0003, 0.0, -5.0):
            due_at = loop.time() + wait_s
            timer.arm(due_at)
            assert await bell.next() >= due_at
        assert len(bell.rang_at) == 4

        # Armed anew, only the last counts, be it sooner or later.
        timer.arm(loop.time() + 60)
        timer.arm(loop.time() + 0.01)
        await bell.next()
        timer.arm(loop.time() + 0.001)
        timer.arm(due_at := loop.time() + 0.05)
        assert await bell.next() >= due_at
        assert len(bell.rang_at) == 6

        timer.arm(loop.time() + 0.005)
    finally:
        timer.close()
        timer.close()
    await asyncio.sleep(0.03)
    assert len(bell.rang_at) == 6


def test_it_rings_once_at_its_time_on_the_loop_of_commands() -> None:
    with event_loop.runner() as runner:
        runner.run(rings())


def test_it_rings_once_at_its_time_on_asyncios_own_loop() -> None:
    asyncio.run(rings())


def test_it_leaves_no_descriptor_behind() -> None:
    async def many() -> None:
        for _ in range(5):
            timer = ExactTimer(lambda: None)
            timer.arm(asyncio.get_running_loop().time() + 60)
            timer.close()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(many())
    assert len(os.listdir("/proc/self/fd")) <= before


def test_the_environment_names_machine_and_versions_and_no_host() -> None:
    facts = environment_facts()
    for key in ("cpu_model", "core_count", "kernel", "commit", "governor", "cgroup", "generator_packages"):
        assert key in facts
    assert facts["generator_packages"]["grpcio"]
    assert os.uname().nodename not in str(facts)


def test_what_happened_meanwhile_is_measured() -> None:
    watch = Watch.start()
    total = sum(range(2_000_000))
    during = watch.since()
    assert total
    assert during["generator_cpu_s"] > 0
    assert 0 <= during["steal_share"] <= 1
    assert 0 <= during["busy_share"] <= 1.001  # sums of rounded clock ticks
    assert during["context_switch_count"] > 0

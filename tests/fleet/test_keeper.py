"""The keeper in virtual time: what it does with members that live, die and dawdle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from baton.testing import in_virtual_time
from fleet.child_process import Listener
from fleet.keeper import Keeper
from fleet.reconcile import Desired, Policy

POLICY = Policy(
    start_deadline_s=60, stop_deadline_s=10, restart_delay_s=0.5, restart_delay_max_s=8, alarm_after_failure_count=3
)


class FakeMember:
    """A launched member that does what the test says."""

    def __init__(self, listener: Listener, *, obeys: bool = True) -> None:
        self.listener = listener
        self.obeys = obeys
        self.was_asked = False
        self.was_killed = False

    def ask_to_stop(self) -> None:
        self.was_asked = True
        if self.obeys:
            asyncio.get_running_loop().call_later(1.0, self.listener.on_exit, "exit code 0")

    def kill(self) -> None:
        self.was_killed = True
        asyncio.get_running_loop().call_later(0.01, self.listener.on_exit, "signal SIGKILL")


class Stage:
    """A keeper of fake members, and everything that happened to it."""

    def __init__(self, *names: str, obeys: bool = True, settle_s: float = 0.0, publish_fails: int = 0) -> None:
        self.obeys = obeys
        self.launches: list[tuple[float, str]] = []
        self.members: dict[str, FakeMember] = {}
        self.published: list[tuple[float, list[str]]] = []
        self.publish_fails = publish_fails
        self.keeper = Keeper(
            [Desired(name) for name in names], POLICY, self._launch, publish=self._publish, settle_s=settle_s
        )
        self.run = asyncio.create_task(self.keeper.run())

    def _launch(self, name: str, listener: Listener) -> FakeMember:
        self.launches.append((asyncio.get_running_loop().time(), name))
        self.members[name] = FakeMember(listener, obeys=self.obeys)
        return self.members[name]

    async def _publish(self, roster: Sequence[Mapping[str, Any]]) -> None:
        if self.publish_fails > 0:
            self.publish_fails -= 1
            raise OSError("router is not there")
        self.published.append((asyncio.get_running_loop().time(), [each["at"] for each in roster]))

    def ready(self, name: str, at: str) -> None:
        self.members[name].listener.on_ready({"at": at})

    async def end(self) -> None:
        self.keeper.stop()
        await self.run


@in_virtual_time
async def test_a_killed_member_is_started_again_and_the_router_hears_of_both() -> None:
    stage = Stage("w")
    await asyncio.sleep(1.0)
    stage.ready("w", "a")
    await asyncio.sleep(1.0)
    stage.members["w"].listener.on_exit("signal SIGKILL")
    await asyncio.sleep(0.1)
    assert stage.published[-1] == (2.0, [])
    await asyncio.sleep(0.9)
    assert [at for at, _ in stage.launches] == [0.0, 2.5]
    stage.ready("w", "b")
    await asyncio.sleep(0.1)
    assert stage.published[-1] == (3.0, ["b"])
    await stage.end()


@in_virtual_time
async def test_restarts_are_spaced_ever_wider_and_never_end() -> None:
    stage = Stage("w")
    for _ in range(8):
        await asyncio.sleep(10.0 if stage.launches else 0.01)  # longer than any back-off
        stage.members["w"].listener.on_exit("exit code 1")
    ends = [0.01 + 10.0 * n for n in range(8)]
    waits = [round(again - end, 2) for (again, _), end in zip(stage.launches[1:], ends, strict=False)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert [row.name for row in stage.keeper.alarmed] == ["w"]
    await stage.end()


@in_virtual_time
async def test_one_that_is_never_ready_is_killed_at_the_deadline() -> None:
    stage = Stage("w")
    await asyncio.sleep(59.0)
    assert not stage.members["w"].was_killed
    await asyncio.sleep(1.5)
    assert stage.members["w"].was_killed or len(stage.launches) == 2
    await stage.end()


@in_virtual_time
async def test_stopping_asks_first_and_kills_at_the_deadline() -> None:
    stage = Stage("w", obeys=False)
    await asyncio.sleep(0.1)
    stage.ready("w", "a")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await stage.end()
    assert stage.members["w"].was_asked
    assert stage.members["w"].was_killed
    assert 10.0 <= loop.time() - began < 10.5


@in_virtual_time
async def test_a_member_can_be_stopped_ahead_of_the_others() -> None:
    stage = Stage("router", "w")
    await asyncio.sleep(0.1)
    await stage.keeper.stop_member("router", timeout_s=20.0)
    assert [row.name for row in stage.keeper.states()] == ["w"]
    assert not stage.members["w"].was_asked
    await stage.end()


@in_virtual_time
async def test_a_router_that_cannot_be_told_is_told_later_and_the_newest() -> None:
    stage = Stage("w", publish_fails=3)
    await asyncio.sleep(0.1)
    stage.ready("w", "a")
    await asyncio.sleep(5.0)
    assert stage.published
    assert all(roster == ["a"] for _, roster in stage.published)
    await stage.end()


@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_router_that_does_not_answer_is_news_unless_it_was_asked_to_stop_meanwhile(
    is_stopping: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @in_virtual_time
    async def scenario() -> None:
        told, may_fail = asyncio.Event(), asyncio.Event()

        async def publish(roster: Sequence[Mapping[str, Any]]) -> None:
            if not roster:
                return
            told.set()
            await may_fail.wait()
            raise OSError("router is not there")

        stage = Stage("w")
        stage.keeper._publish = publish
        await asyncio.sleep(0.1)
        stage.ready("w", "a")
        await told.wait()
        if is_stopping:
            stage.keeper.stop()
        await asyncio.sleep(0.1)
        may_fail.set()
        await asyncio.sleep(0.1)
        assert bool(caplog.records) is not is_stopping
        await stage.end()

    scenario()


@in_virtual_time
async def test_the_roster_is_repeated_every_two_seconds() -> None:
    stage = Stage("w")
    await asyncio.sleep(0.1)
    stage.ready("w", "a")
    await asyncio.sleep(10.0)
    assert 5 <= len([1 for _, roster in stage.published if roster == ["a"]]) <= 7
    await stage.end()


@in_virtual_time
async def test_a_restarted_supervisor_does_not_take_the_unfound_for_gone() -> None:
    stage = Stage("v", "w", settle_s=20.0)
    await asyncio.sleep(0.1)
    stage.ready("v", "a")
    await asyncio.sleep(10.0)
    assert stage.published == []
    stage.ready("w", "b")
    await asyncio.sleep(0.1)
    assert stage.published[0][1] == ["a", "b"]
    await stage.end()


@in_virtual_time
async def test_late_words_of_an_earlier_launch_change_nothing() -> None:
    stage = Stage("w")
    await asyncio.sleep(0.1)
    old = stage.members["w"]
    old.listener.on_exit("exit code 1")
    await asyncio.sleep(1.0)
    old.listener.on_ready({"at": "ghost"})
    old.listener.on_exit("exit code 1")
    assert [row.state for row in stage.keeper.states()] == ["starting"]
    await stage.end()


@in_virtual_time
async def test_what_cannot_be_started_at_all_counts_as_a_failure() -> None:
    def refuse(name: str, listener: Listener) -> FakeMember:
        raise OSError("no more processes")

    keeper = Keeper([Desired("w")], POLICY, refuse)
    run = asyncio.create_task(keeper.run())
    await asyncio.sleep(0.1)
    assert "no more processes" in keeper.states()[0].detail
    keeper.stop()
    await run


@in_virtual_time
async def test_a_cancelled_keeper_kills_what_it_started() -> None:
    stage = Stage("w")
    await asyncio.sleep(0.1)
    stage.run.cancel()
    await asyncio.gather(stage.run, return_exceptions=True)
    assert stage.members["w"].was_killed

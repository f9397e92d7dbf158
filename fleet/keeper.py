"""Keeps members running: performs what ``reconcile.plan`` decides, and feeds what happens back into it.

Owns the observed state of its members and the objects that run them. Decides nothing itself. Used three times: for
the processes of a local fleet, for the one process inside each Ray actor, and for the actors themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fleet import reconcile
from fleet.child_process import Listener
from fleet.reconcile import Desired, Observed, Policy, Published, State

log = logging.getLogger("baton.fleet")

PUBLISH_RETRY_S = 0.25
PROGRESS_LINE_COUNT = 256


class Launched(Protocol):
    """What runs a member. Its end is told through the listener, once."""

    def ask_to_stop(self) -> None: ...
    def kill(self) -> None: ...


Launch = Callable[[str, Listener], Launched]
"""Starts the named member. An exception counts as a failed start."""

Roster = Sequence[Mapping[str, Any]]
"""Endpoints of the members that are ready, in the order desired."""


@dataclass(frozen=True, slots=True)
class MemberState:
    """One member for people: ``baton status`` and progress lines."""

    name: str
    state: str
    failure_count: int
    detail: str
    endpoint: Mapping[str, Any] | None


class _Facts:
    """The listener of one launch. Facts about a launch that was superseded are dropped."""

    def __init__(self, keeper: Keeper, name: str) -> None:
        self._keeper, self._name = keeper, name

    def on_progress(self, text: str) -> None:
        if self._is_current():
            self._keeper.say(f"{self._name}: {text}")

    def on_ready(self, endpoint: Mapping[str, Any]) -> None:
        if self._is_current():
            self._keeper.fold(self._name, lambda seen, now: reconcile.became_ready(seen, dict(endpoint), now))

    def on_unready(self) -> None:
        if self._is_current():
            self._keeper.fold(self._name, reconcile.became_unready)

    def on_exit(self, detail: str) -> None:
        if self._is_current():
            self._keeper.launched.pop(self._name, None)
            self._keeper.fold(self._name, lambda seen, now: reconcile.exited(seen, detail, now))

    def _is_current(self) -> bool:
        return self._keeper.listeners.get(self._name) is self


class Keeper:
    """``run`` until ``stop`` was called and every member is gone. One loop, one owner.

    For ``settle_s`` after the start only a complete roster is published.
    """

    def __init__(
        self,
        desired: Sequence[Desired],
        policy: Policy,
        launch: Launch,
        *,
        publish: Callable[[Roster], Awaitable[None]] | None = None,
        settle_s: float = 0.0,
    ) -> None:
        self._desired = {each.name: each for each in desired}
        self._policy = policy
        self._launch = launch
        self._publish = publish
        self._settle_s = settle_s
        # All mutable state: what is seen of each member, what runs it, and what was last told to the router.
        self._actual: dict[str, Observed] = {}
        self.launched: dict[str, Launched] = {}
        self.listeners: dict[str, Listener] = {}
        self._published: Published | None = None
        self._roster: Roster = ()
        self._is_roster_due = asyncio.Event()
        self._wake = asyncio.Event()
        self._version = 0
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._said: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        return f"<Keeper {', '.join(f'{name} {seen.state.value}' for name, seen in self._actual.items()) or 'idle'}>"

    @property
    def version(self) -> int:
        """Grows with every change worth telling."""
        return self._version

    def states(self) -> tuple[MemberState, ...]:
        rows = []
        for name in {**self._desired, **self._actual}:
            seen = self._actual.get(name)
            if seen is None:
                rows.append(MemberState(name, "waiting", 0, "", None))
            else:
                rows.append(MemberState(name, seen.state.value, seen.failure_count, seen.detail, seen.endpoint))
        return tuple(rows)

    def lines_after(self, version: int) -> tuple[str, ...]:
        """Progress said since ``version``; the oldest are forgotten first."""
        return tuple(text for at, text in self._said if at > version)

    @property
    def alarmed(self) -> tuple[MemberState, ...]:
        """Members that failed again and again and have not been ready since."""
        names = {name for name, seen in self._actual.items() if seen.has_alarmed}
        return tuple(row for row in self.states() if row.name in names)

    @property
    def is_ready(self) -> bool:
        """Every member is."""
        return all(
            name in self._actual and self._actual[name].state is State.READY for name in self._desired
        ) and not set(self._actual) - set(self._desired)

    async def changed(self, version: int, timeout_s: float) -> int:
        """Waits until ``version`` is past, at most ``timeout_s``. Returns the version now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._version <= version:
                    await self._changed.wait()
        return self._version

    def say(self, text: str) -> None:
        self._touch()
        self._said.append((self._version, text))
        del self._said[:-PROGRESS_LINE_COUNT]
        log.info("%s", text)

    def fold(self, name: str, fact: Callable[[Observed, float], Observed]) -> None:
        """Takes a fact about a member into what is known of it."""
        before = self._actual[name]
        now = asyncio.get_running_loop().time()
        after = fact(before, now)
        if after == before:
            return
        self._actual[name] = after
        match after.state:
            case State.READY:
                self.say(f"{name}: ready")
            case State.EXITED if before.state is not State.STOPPING:
                self.say(f"{name}: ended ({after.detail})")
            case State.STARTING if before.state is State.READY:
                self.say(f"{name}: no longer ready")
            case _:
                self._touch()
        self._wake.set()

    def stop(self) -> None:
        """Nothing is desired any more. ``run`` returns when all is gone. Idempotent."""
        self._is_stopping = True
        self._desired = {}
        self._wake.set()

    async def stop_member(self, name: str, timeout_s: float) -> None:
        """Ends one member ahead of the others, and waits until it is gone or the time is up."""
        self._desired.pop(name, None)
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while name in self._actual:
                    await self.changed(self._version, timeout_s)

    async def run(self) -> None:
        publisher = asyncio.create_task(self._keep_publishing(), name="roster-publisher") if self._publish else None
        loop = asyncio.get_running_loop()
        publish_from = loop.time() + self._settle_s
        try:
            while True:
                self._wake.clear()
                decided = reconcile.plan(
                    self._desired, self._actual, loop.time(), self._policy, self._published, publish_from=publish_from
                )
                for action in decided.actions:
                    self._perform(action, loop.time())
                if self._is_stopping and not self._actual:
                    return
                if decided.actions:
                    continue  # an action is a fact too: decide again before waiting
                delay = None if decided.next_check_at is None else max(0.0, decided.next_check_at - loop.time())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
        finally:
            for each in self.launched.values():  # only if we are being cancelled: nothing may outlive us
                each.kill()
            if publisher is not None:
                publisher.cancel()
                await asyncio.gather(publisher, return_exceptions=True)

    def _perform(self, action: reconcile.Action, now: float) -> None:
        match action:
            case reconcile.Start(name):
                self._start(name, now, "starting")
            case reconcile.Restart(name, failure_count):
                self._start(name, now, f"starting again (failures: {failure_count})")
            case reconcile.Stop(name):
                self._actual[name] = reconcile.was_asked_to_stop(self._actual[name], now)
                self.launched[name].ask_to_stop()
            case reconcile.Kill(name, reason):
                self.say(f"{name}: killed, {reason}")
                self._actual[name] = reconcile.was_killed(self._actual[name])
                self.launched[name].kill()
            case reconcile.Forget(name):
                del self._actual[name]
                self.listeners.pop(name, None)
                self._touch()
            case reconcile.Alarm(name, failure_count, detail):
                self._actual[name] = reconcile.has_alarmed(self._actual[name])
                self.say(f"{name}: failed {failure_count} times in a row, last with {detail}; still trying")
            case reconcile.Publish():
                roster = reconcile.current_roster(self._desired, self._actual)
                self._published = Published(roster, now)
                self._roster = tuple(endpoint for _, endpoint in roster)
                self._is_roster_due.set()

    def _start(self, name: str, now: float, what: str) -> None:
        self._actual[name] = reconcile.started(self._desired[name], self._actual.get(name), now)
        facts = self.listeners[name] = _Facts(self, name)
        self.say(f"{name}: {what}")
        try:
            self.launched[name] = self._launch(name, facts)
        except OSError as error:
            facts.on_exit(f"could not be started: {error}")

    async def _keep_publishing(self) -> None:
        assert self._publish is not None
        is_reachable = True
        while True:
            await self._is_roster_due.wait()
            self._is_roster_due.clear()
            roster = self._roster
            try:
                await self._publish(roster)
            except Exception as error:
                # While it was told, the roster changed: a router that was asked to stop is in it no more, and that it
                # does not answer is no news. What is wrong with the new roster, telling that one will show.
                if is_reachable and roster == self._roster:
                    log.warning("the roster could not be published, trying on: %s", error)
                is_reachable = is_reachable and roster != self._roster
                await asyncio.sleep(PUBLISH_RETRY_S)
                self._is_roster_due.set()
            else:
                if not is_reachable:
                    log.info("the roster is published again")
                is_reachable = True

    def _touch(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

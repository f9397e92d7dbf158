"""What the supervisor should do next, from what is wanted and what is seen. Pure: no I/O, no clock, no processes.

A member is a process (or, under Ray, an actor that keeps one) that the fleet wants to be running. Facts about a
member are folded into its ``Observed`` by the functions below; ``plan`` compares all of them with what is desired
and returns actions. Whoever performs the actions owns the processes.

    (unknown) --Start--> STARTING --became ready--> READY
                             |  \\                      |
                          exited  start deadline: Kill  exited
                             v                          v
                          EXITED <----------------------+     --Restart, after the back-off--> STARTING
    Stop: --> STOPPING --exited--> EXITED --Forget--> (unknown);   stop deadline: Kill
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


class State(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Policy:
    """Times, all in seconds."""

    start_deadline_s: float
    stop_deadline_s: float
    restart_delay_s: float
    restart_delay_max_s: float
    alarm_after_failure_count: int
    publish_interval_s: float = 2.0
    """The roster is published on change, and again after this: the router may have restarted meanwhile."""


@dataclass(frozen=True, slots=True)
class Desired:
    """A member that should run. A changed fingerprint means it must run anew."""

    name: str
    fingerprint: str = ""
    stop_grace_s: float = 0.0
    """What it may take to stop beyond the policy's deadline: a router lets its running requests finish."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A member as seen. ``since`` is when it entered ``state``, on the clock that ``plan`` is given."""

    name: str
    fingerprint: str
    state: State
    since: float
    failure_count: int = 0
    """Ends in a row without having been ready in between; the first end of a ready one counts 1."""
    is_kill_sent: bool = False
    has_alarmed: bool = False
    detail: str = ""
    """How it last ended, for people."""
    stop_grace_s: float = 0.0
    endpoint: Any = None
    """What it said of itself when it became ready; opaque here."""


@dataclass(frozen=True, slots=True)
class Start:
    name: str


@dataclass(frozen=True, slots=True)
class Restart:
    """Like ``Start``, of a member that ran before."""

    name: str
    failure_count: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask it to end."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Make it end: a deadline passed."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    name: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """A member fails again and again. Said once per series; the restarts go on, since a machine that comes to its
    senses must find its workers back."""

    name: str
    failure_count: int
    detail: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the router who is ready: the names, in the order desired."""

    names: tuple[str, ...]


Action = Start | Restart | Stop | Kill | Forget | Alarm | Publish


@dataclass(frozen=True, slots=True)
class Published:
    """The roster as last published: name and endpoint of each, and when."""

    roster: tuple[tuple[str, Any], ...]
    at: float


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]
    next_check_at: float | None
    """When time alone will make another action due; None: only a new fact can."""


def backoff_s(failure_count: int, policy: Policy) -> float:
    """The wait before the restart that follows ``failure_count`` failures in a row (at least 1)."""
    exponent = min(failure_count - 1, 30)  # beyond it the maximum rules anyway, and floats stay finite
    return min(policy.restart_delay_s * 2.0**exponent, policy.restart_delay_max_s)


def plan(
    desired: Mapping[str, Desired],
    actual: Mapping[str, Observed],
    now: float,
    policy: Policy,
    published: Published | None = None,
    *,
    publish_from: float = -math.inf,
) -> Plan:
    """Compares and decides.

    Before ``publish_from`` the roster is published only if it is complete. A supervisor that was itself restarted
    must not tell the router to forget workers just because it has not found them yet.
    """
    actions: list[Action] = []
    wake_ups: list[float] = []

    def due(at: float) -> bool:
        if now >= at:
            return True
        wake_ups.append(at)
        return False

    for name, seen in actual.items():
        wanted = desired.get(name)
        is_current = wanted is not None and wanted.fingerprint == seen.fingerprint
        match seen.state:
            case State.STARTING | State.READY if not is_current:
                actions.append(Stop(name))
            case State.STARTING:
                if not seen.is_kill_sent and due(seen.since + policy.start_deadline_s):
                    actions.append(Kill(name, f"not ready within {policy.start_deadline_s:g} s"))
            case State.STOPPING:
                if not seen.is_kill_sent and due(seen.since + policy.stop_deadline_s + seen.stop_grace_s):
                    actions.append(Kill(name, f"still there {now - seen.since:.1f} s after it was asked to stop"))
            case State.EXITED if wanted is None:
                actions.append(Forget(name))
            case State.EXITED if not is_current or seen.failure_count == 0:
                actions.append(Start(name))
            case State.EXITED:
                if seen.failure_count >= policy.alarm_after_failure_count and not seen.has_alarmed:
                    actions.append(Alarm(name, seen.failure_count, seen.detail))
                if due(seen.since + backoff_s(seen.failure_count, policy)):
                    actions.append(Restart(name, seen.failure_count))
            case State.READY:
                pass
    actions.extend(Start(name) for name in desired if name not in actual)

    roster = current_roster(desired, actual)
    if len(roster) < len(desired) and not due(publish_from):
        pass
    elif published is None or published.roster != roster or due(published.at + policy.publish_interval_s):
        actions.append(Publish(tuple(name for name, _ in roster)))
        wake_ups.append(now + policy.publish_interval_s)
    return Plan(tuple(actions), min(wake_ups, default=None))


def current_roster(desired: Mapping[str, Desired], actual: Mapping[str, Observed]) -> tuple[tuple[str, Any], ...]:
    """Name and endpoint of every desired member that is ready, in the order desired."""
    return tuple(
        (name, actual[name].endpoint) for name in desired if name in actual and actual[name].state is State.READY
    )


def started(wanted: Desired, before: Observed | None, now: float) -> Observed:
    """A start was made."""
    kept = before if before is not None and before.fingerprint == wanted.fingerprint else None
    return Observed(
        name=wanted.name,
        fingerprint=wanted.fingerprint,
        state=State.STARTING,
        since=now,
        failure_count=kept.failure_count if kept else 0,
        has_alarmed=kept.has_alarmed if kept else False,
        detail=kept.detail if kept else "",
        stop_grace_s=wanted.stop_grace_s,
    )


def became_ready(seen: Observed, endpoint: Any, now: float) -> Observed:
    """It said so itself, perhaps again from another endpoint. Ignored once it was asked to stop, or is gone."""
    if seen.state not in (State.STARTING, State.READY) or (seen.state is State.READY and seen.endpoint == endpoint):
        return seen
    return replace(seen, state=State.READY, since=now, endpoint=endpoint, failure_count=0, has_alarmed=False)


def became_unready(seen: Observed, now: float) -> Observed:
    """It is there but cannot serve: an actor whose process died. It has the time of a start to become ready again."""
    if seen.state is not State.READY:
        return seen
    return replace(seen, state=State.STARTING, since=now, endpoint=None)


def was_asked_to_stop(seen: Observed, now: float) -> Observed:
    if seen.state in (State.STOPPING, State.EXITED):
        return seen
    return replace(seen, state=State.STOPPING, since=now, endpoint=None)


def was_killed(seen: Observed) -> Observed:
    """The signal is out; the exit is still to come."""
    return replace(seen, is_kill_sent=True)


def exited(seen: Observed, detail: str, now: float) -> Observed:
    """Its process is gone. Not a failure if it was asked to stop."""
    if seen.state is State.EXITED:
        return seen
    failures = 0 if seen.state is State.STOPPING else seen.failure_count + 1
    return replace(
        seen, state=State.EXITED, since=now, endpoint=None, failure_count=failures, detail=detail, is_kill_sent=False
    )


def has_alarmed(seen: Observed) -> Observed:
    return replace(seen, has_alarmed=True)

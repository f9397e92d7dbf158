"""Which pulls have taken too long, and what may be done about each. Pure: the time is passed in.

Until its read is posted, a pull can be taken back for certain: nothing will ever write to its blocks, so the engine
may compute the prompt into them. Once it is posted it cannot: a transfer library that cancels says what it tried,
not what a device still does. Such a pull is given up instead: its request ends with an error that another attempt
answers, and its blocks stay where they are, quarantined, until the library says that the read is over.

    begin ---> waiting ---posted---> reading ---ended
                  | late                | late
                  v                     v
             taken back            given up, in quarantine ---ended
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PULL_TIMEOUT_KEY = "baton_pull_timeout_s"
"""In the connector's extra configuration."""


@dataclass(frozen=True, slots=True)
class Late:
    """Told once of each late pull. ``taken_back``: compute the prompt. ``given_up``: end the request, keep its
    blocks."""

    taken_back: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()


@dataclass(slots=True)
class _Pull:
    due_at: float
    is_posted: bool = False
    is_given_up: bool = False


class PullDeadlines:
    """The pulls under way in one engine, by request."""

    def __init__(self, timeout_s: float) -> None:
        if not timeout_s > 0 or not math.isfinite(timeout_s):
            raise ValueError(f"pull_timeout_s is {timeout_s}; it must be above 0 seconds")
        self.timeout_s = timeout_s
        self._pulls: dict[str, _Pull] = {}
        self.late_count = 0
        """Pulls that were late, since the start."""

    def __len__(self) -> int:
        return len(self._pulls)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pulls

    def __repr__(self) -> str:
        return (
            f"<PullDeadlines [{len(self)} under way, {self.quarantined_count} in quarantine | {self.timeout_s:g} s]>"
        )

    @property
    def quarantined_count(self) -> int:
        """Pulls given up whose reads are not known to be over."""
        return sum(pull.is_given_up for pull in self._pulls.values())

    def begin(self, request_id: str, now: float) -> None:
        """Handshake included: the deadline starts here. A second call for a pull under way changes nothing."""
        self._pulls.setdefault(request_id, _Pull(now + self.timeout_s))

    def posted(self, request_id: str) -> None:
        """BEFORE the library is asked for the read: from then on it may write at any time."""
        if (pull := self._pulls.get(request_id)) is not None:
            pull.is_posted = True

    def ended(self, request_id: str) -> None:
        """However it ended, nothing writes to its blocks any more. Idempotent."""
        self._pulls.pop(request_id, None)

    def withdraw(self, request_id: str) -> bool:
        """Its caller has left. True: nothing was posted, so it has ended and nothing writes to its blocks. False: it
        is not under way, or its read is and must come to its own end."""
        pull = self._pulls.get(request_id)
        if pull is None or pull.is_posted:
            return False
        del self._pulls[request_id]
        return True

    def late(self, now: float) -> Late:
        """Those whose time is up. Those taken back are forgotten; those given up stay until they have ended."""
        late = [name for name, pull in self._pulls.items() if pull.due_at <= now and not pull.is_given_up]
        taken_back = tuple(name for name in late if not self._pulls[name].is_posted)
        given_up = tuple(name for name in late if self._pulls[name].is_posted)
        for name in taken_back:
            del self._pulls[name]
        for name in given_up:
            self._pulls[name].is_given_up = True
        self.late_count += len(late)
        return Late(taken_back, given_up)

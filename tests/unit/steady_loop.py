"""An event loop whose clock stands still while its process does. What a machine takes away is not lived through.

A test over real sockets has a router and workers with their timers in its own process: leases, silences, deadlines.
When the machine stops that process for five seconds, all of them are over at once, and what fails is the machine.
Here the clock counts what the loop waited for, and work in small pieces; what is beyond that never happened.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Mapping
from typing import Any

LONGEST_TURN_S = 0.05
"""What a turn of the loop, or being late from a wait, counts at most."""
LONGEST_WAIT_S = 0.1
"""A longer wait is one of several such: a stop of the process shows by the one that it makes late, and counts no more
than that one. Of a single wait for a timer 10 s off, a stop of 5 s would be half."""


class _WatchingSelector(selectors.BaseSelector):
    """Says to ``lost_s`` what each turn took beyond its wait and ``LONGEST_TURN_S``."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._back_at = time.monotonic()
        self.lost_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._take_away(0.0)
        if timeout is None:
            ready = self._selector.select(None)
            self._back_at = time.monotonic()  # no timer is set that could be missed
            return ready
        left_s = max(timeout, 0.0)
        while True:
            wait_s = min(left_s, LONGEST_WAIT_S)
            ready = self._selector.select(wait_s)
            left_s -= self._take_away(wait_s)
            if ready or left_s <= 0:
                return ready

    def _take_away(self, waited_s: float) -> float:
        """Returns what is left of the time since the last: what our clock has moved by."""
        now = time.monotonic()
        passed_s = now - self._back_at
        lost_s = max(0.0, passed_s - waited_s - LONGEST_TURN_S)
        self.lost_s += lost_s
        self._back_at = now
        return passed_s - lost_s

    def now(self) -> float:
        """Between two turns, too, no more than ``LONGEST_TURN_S`` pass."""
        now = time.monotonic()
        return now - self.lost_s - max(0.0, now - self._back_at - LONGEST_TURN_S)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        self._selector.close()


class SteadyLoop(asyncio.SelectorEventLoop):
    """Real sockets, threads and processes; a clock that a busy machine cannot move."""

    def __init__(self) -> None:
        self._watching = _WatchingSelector()
        super().__init__(self._watching)

    def time(self) -> float:
        return self._watching.now()

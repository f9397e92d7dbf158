"""Every point at which a request can be cancelled, one after the other.

A task gives way wherever it awaits something that is not there yet. A watched loop counts these moments, of all tasks
of the process, from a request's first step on, and cancels its caller at the k-th: for k = 1, 2, 3 ... until the
request is over before its k-th moment comes. So whatever may be half done when a caller leaves, is, once.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = ("router", "prefill_worker", "decode_worker", "engine", "kvtransfer", "baton")


class Watched(Coroutine[Any, Any, Any]):
    """A task's coroutine that tells whenever it gives way."""

    def __init__(self, inner: Coroutine[Any, Any, Any], gave_way: Callable[[Any], None]) -> None:
        self._inner = inner
        self._gave_way = gave_way
        self.__qualname__ = getattr(inner, "__qualname__", type(inner).__name__)
        self.__name__ = getattr(inner, "__name__", self.__qualname__)

    def send(self, value: Any) -> Any:
        waited_for = self._inner.send(value)
        self._gave_way(self._inner)
        return waited_for

    def throw(self, *error: Any) -> Any:
        waited_for = self._inner.throw(*error)
        self._gave_way(self._inner)
        return waited_for

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()


class AwaitPoints:
    """Installed on a running loop before the tasks to watch are made. ``arm`` before each request."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._caller: asyncio.Task[Any] | None = None
        self._at = 0
        self.count = 0
        """Moments since ``arm``."""
        self.cancelled_at = ""
        """Where what gave way then was: file, line and function of ours; empty while nobody was cancelled."""
        self.cancelled_time = 0.0
        self.sites: Counter[str] = Counter()
        """Every such place, and how often somebody was cancelled there."""
        loop.set_task_factory(self._make)

    def _make(self, loop: asyncio.AbstractEventLoop, coro: Any, context: Any = None) -> asyncio.Task[Any]:
        return asyncio.Task(Watched(coro, self._gave_way), loop=loop, context=context)

    def arm(self, caller: asyncio.Task[Any], at: int) -> None:
        """From now on; the caller is cancelled at moment ``at``, counted from 1."""
        self._caller, self._at, self.count, self.cancelled_at = caller, at, 0, ""

    def disarm(self) -> None:
        self._caller = None

    def _gave_way(self, coro: Any) -> None:
        caller = self._caller
        if caller is None or caller.done():
            return
        self.count += 1
        if self.count == self._at:
            self.cancelled_at = site_of(coro)
            self.cancelled_time = self._loop.time()
            self.sites[self.cancelled_at] += 1
            self._caller = None
            caller.cancel()


def site_of(coro: Any) -> str:
    """The innermost line of ours that waits."""
    found = ""
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None) or getattr(coro, "ag_frame", None)
        if frame is not None:
            path = os.path.relpath(frame.f_code.co_filename, ROOT)
            if path.split(os.sep)[0] in OURS:
                found = f"{path}:{frame.f_lineno} {frame.f_code.co_qualname}"
        coro = (
            getattr(coro, "cr_await", None) or getattr(coro, "ag_await", None) or getattr(coro, "gi_yieldfrom", None)
        )
    return found or "elsewhere"


@dataclass
class Swept:
    """What cancelling at every point came to."""

    point_count: int = 0
    sites: Counter[str] = field(default_factory=Counter)
    slowest_abort_s: float = 0.0
    """From a cancel until no engine had a leg of the request: virtual time."""
    slowest_abort_at: str = ""


async def sweep(
    points: AwaitPoints,
    begin: Callable[[], Coroutine[Any, Any, Any]],
    has_legs: Callable[[], bool],
    check: Callable[[], Awaitable[None]],
    *,
    abort_within_s: float,
    first: int = 1,
    stride: int = 1,
    limit: int = 20_000,
) -> Swept:
    """``begin`` makes a request anew for each point; ``has_legs`` asks the engines, ``check`` the books, after each.

    Raises ``AssertionError`` naming the point at which an engine did not let go in time, or whose books do not
    balance.
    """
    loop = asyncio.get_running_loop()
    swept = Swept(sites=points.sites)
    for at in range(first, limit, stride):
        # At the same moment between two reports of every worker: so that each request has the same moments, and none
        # slips through because the next request has one more before it.
        await asyncio.sleep(math.ceil(loop.time()) + 0.05 - loop.time())
        caller = loop.create_task(begin(), name="caller")
        points.arm(caller, at)
        await asyncio.wait((caller,))
        where = points.cancelled_at
        points.disarm()
        if not where:
            caller.result()
            await check()
            return swept
        swept.point_count += 1
        while has_legs():
            if loop.time() - points.cancelled_time > abort_within_s:
                raise AssertionError(f"cancelled at {where}: an engine still has it after {abort_within_s:g} s")
            await asyncio.sleep(0.001)
        took_s = loop.time() - points.cancelled_time
        if took_s > swept.slowest_abort_s:
            swept.slowest_abort_s, swept.slowest_abort_at = took_s, where
        try:
            await check()
        except AssertionError as error:
            raise AssertionError(f"cancelled at point {at}, {where}: {error}") from error
    raise AssertionError(f"still not over after {limit} points")

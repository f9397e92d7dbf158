"""The event loop that commands and servers run on: uvloop's where it is installed, with a clock that phases can be
measured on.

uvloop's own clock shows whole milliseconds, and those of the moment at which the loop last woke up. A transfer of KV
takes about one: the phases would be rounded to nothing, and compared with the engine's finer clock they would be
wrong by as much. This loop tells CLOCK_MONOTONIC itself. Timers stay libuv's, which count whole milliseconds, so they
are rounded up: they fire up to one late, as before, and never before their time.

Without uvloop (the client alone) it is asyncio's own loop, whose clock is that one anyway.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any, cast

from baton.log_lines import report_loop_error

_LONGEST_ROUNDED_S = 86400.0 * 365
"""uvloop treats infinity and centuries by itself."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The loop to run a process on."""
    make = _precise_uvloop()
    loop = asyncio.new_event_loop() if make is None else make()
    loop.set_exception_handler(report_loop_error)
    return loop


def runner() -> asyncio.Runner:
    """Runs coroutines on one such loop; turns Ctrl-C into a cancellation, then into ``KeyboardInterrupt``."""
    return asyncio.Runner(loop_factory=new_event_loop)


def _precise_uvloop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if importlib.util.find_spec("uvloop") is None:
        return None
    base: Any = importlib.import_module("uvloop").Loop

    class PreciseLoop(base):  # type: ignore[misc]  # a class of Cython
        time = staticmethod(time.monotonic)

        # call_at is made of it.
        def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
            if 0 < delay < _LONGEST_ROUNDED_S:
                now_ms = self.time() * 1e3
                delay = (math.ceil(now_ms + delay * 1e3) - math.floor(now_ms)) / 1e3
            return cast(asyncio.TimerHandle, super().call_later(delay, callback, *args, context=context))

    return PreciseLoop

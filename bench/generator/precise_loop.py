"""An event loop whose timers fire within some ten microseconds: for the golden server, which judges generators.

asyncio waits in epoll, whose timeout counts whole milliseconds, and uvloop's timers do as well: either is up to a
millisecond late before anything was measured. An epoll descriptor can itself be waited for with ``select``, whose
timeout counts microseconds. The kernel adds its timer slack (50 us unless told otherwise), which is set to the
least. Its clock is CLOCK_MONOTONIC, so that stamps of two processes of one machine can be compared.

Never spins: what waits costs nothing, so that a CPU share measured under it is the work's own.
"""

from __future__ import annotations

import asyncio
import ctypes
import select
import selectors

from baton.log_lines import report_loop_error

_PR_SET_TIMERSLACK = 29


class MicrosecondSelector(selectors.EpollSelector):
    """epoll, with a timeout that is not rounded up to milliseconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            # One descriptor, opened with the loop and so far below select's limit of 1024.
            select.select((self.fileno(),), (), (), timeout)
            timeout = 0
        return super().select(timeout)


def new_precise_loop() -> asyncio.AbstractEventLoop:
    """Such a loop, for the thread that calls: the timer slack is a thread's own."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    loop = asyncio.SelectorEventLoop(MicrosecondSelector())
    loop.set_exception_handler(report_loop_error)
    return loop


def precise_runner() -> asyncio.Runner:
    """Runs coroutines on one such loop."""
    return asyncio.Runner(loop_factory=new_precise_loop)

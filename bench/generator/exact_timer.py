"""A timer that fires within some tens of microseconds of its time, without spinning.

Event loops count their timers in whole milliseconds, and uvloop's are up to two late; a schedule kept by them would
lag by its own clock. The kernel's timerfd is exact to its scheduling and wakes the loop as a socket does. (Spinning
would be as exact and take the time from the server beside it.) Python offers timerfd from 3.13 on, hence ctypes.

In virtual time, and where there is no timerfd, it is the loop's own timer.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable

from baton.testing import VirtualLoop

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("it_interval", _TimeSpec), ("it_value", _TimeSpec))


class ExactTimer:
    """Calls ``fire`` once after each ``arm``. Bound to the running loop, whose clock must be CLOCK_MONOTONIC (see
    ``baton.event_loop``) or virtual."""

    def __init__(self, fire: Callable[[], None]) -> None:
        self._fire = fire
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._fd: int | None = None
        if sys.platform == "linux" and not isinstance(self._loop, VirtualLoop):
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._checked(self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
            self._loop.add_reader(self._fd, self._on_readable)

    def arm(self, at_s: float) -> None:
        """Fires at loop time ``at_s``, soon if that has passed. Replaces what was armed before."""
        if self._fd is None:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_at(at_s, self._fire)
            return
        at_ns = max(1, round(at_s * 1e9))  # 0 would disarm it
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(at_ns // 10**9, at_ns % 10**9))
        self._checked(self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None))

    def close(self) -> None:
        """Nothing fires afterwards. Idempotent."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _on_readable(self) -> None:
        assert self._fd is not None
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # armed anew between waking up and now
            return
        self._fire()

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

"""Virtual time: an event loop whose clock jumps to the next timer whenever every task waits.

Owns the loop and the way to run a coroutine on it. Never waits in real time and never touches the
outside: no sockets, no threads, no subprocesses (each raises ``OutsideWorld`` and says so), because an
answer from outside cannot be placed on a clock that jumps.

Whatever is written against ``asyncio.get_running_loop().time()``, ``asyncio.sleep``, ``asyncio.timeout``,
``wait_for``, queues, locks and task groups runs here unchanged, and exactly reproducibly. Code that asks
``time.monotonic()`` sees real time and is wrong here, as it is in the rest of Baton.

    def test_a_lease_expires():
        async def scenario() -> float:
            await asyncio.sleep(30)
            return asyncio.get_running_loop().time()

        assert run_virtual(scenario()) == 30.0
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextvars import Context
from typing import Any, NoReturn, ParamSpec, TypeVar

__all__ = ["Deadlock", "OutsideWorld", "Unbalanced", "VirtualLoop", "in_virtual_time", "run_virtual"]

T = TypeVar("T")
P = ParamSpec("P")

SIX_HOURS_S = 6 * 3600.0
SETTLE_PASS_COUNT = 200
CLOCK_RESOLUTION_S = 1e-9  # adding a difference back to the clock may miss the timer by a rounding error


class Deadlock(AssertionError):
    """Nothing can ever run again (or the clock passed its limit), and tasks still wait. Lists them."""


class Unbalanced(AssertionError):
    """The coroutine returned but left tasks, or errors nobody retrieved, behind."""


class OutsideWorld(RuntimeError):
    """Something asked the virtual loop for a thread, a socket, a signal or a process."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is not supported in virtual time: its answer would come by the real clock. "
            "Pass a fake in, or run this test on an ordinary event loop."
        )


class _JumpingSelector(selectors.BaseSelector):
    """Never waits: asked to wait for a time, it moves the clock; asked to wait for ever, it raises."""

    def __init__(self) -> None:
        self.now = 0.0
        self.limit_s = SIX_HOURS_S
        self.is_sealed = False
        self.stuck: Callable[[str], NoReturn] | None = None
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert self.stuck is not None
        if timeout is None:
            self.stuck("every task waits and no timer is set: nothing can ever run again")
        if timeout > 0:
            self.now += timeout
            if self.now > self.limit_s:
                self.stuck(f"the clock passed its limit of {self.limit_s:g} s and there is still no end")
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.is_sealed:
            raise OutsideWorld("waiting for a socket or pipe")
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, fd, events, data)  # the loop's own wake-up pipe, never polled
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop in virtual time, starting at 0. ``run_virtual`` is the usual way in."""

    def __init__(self, *, limit_s: float = SIX_HOURS_S) -> None:
        jumping = _JumpingSelector()
        jumping.limit_s = limit_s
        self._jumping = jumping
        super().__init__(jumping)
        jumping.is_sealed = True
        jumping.stuck = self._raise_deadlock
        self._thread_id_of_owner = threading.get_ident()
        self._clock_resolution = CLOCK_RESOLUTION_S

    def time(self) -> float:
        return self._jumping.now

    def advance_limit(self, by_s: float) -> None:
        """Moves the limit of the clock to ``by_s`` from now; for cleaning up after it was passed."""
        self._jumping.limit_s = self._jumping.now + by_s

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() != self._thread_id_of_owner:
            raise OutsideWorld("a callback from another thread")
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_in_executor(self, *_: Any) -> NoReturn:  # type: ignore[override]
        raise OutsideWorld("run_in_executor (and asyncio.to_thread, getaddrinfo)")

    def add_signal_handler(self, *_: Any) -> NoReturn:  # type: ignore[override]
        raise OutsideWorld("add_signal_handler")

    async def subprocess_exec(self, *_: Any, **__: Any) -> NoReturn:
        raise OutsideWorld("a subprocess")

    async def subprocess_shell(self, *_: Any, **__: Any) -> NoReturn:
        raise OutsideWorld("a subprocess")

    def _raise_deadlock(self, why: str) -> NoReturn:
        tasks = asyncio.all_tasks(self)
        raise Deadlock(f"at {self.time():g} s: {why}; {len(tasks)} tasks wait:{_listing(tasks)}")


def run_virtual(coro: Coroutine[Any, Any, T], *, limit_s: float = SIX_HOURS_S) -> T:
    """Runs ``coro`` to its end in virtual time and returns its result. The books must balance.

    ``limit_s`` bounds the virtual clock, so that a periodic task cannot hide a stuck one for ever.
    What is merely ready to run when ``coro`` returns (a cancelled task about to end) may still run, but
    no time passes. Raises ``Deadlock``; ``Unbalanced`` when tasks or unretrieved errors are left;
    otherwise whatever ``coro`` raised. Left-over tasks are cancelled and the loop is closed in any case.
    """
    loop = VirtualLoop(limit_s=limit_s)
    unretrieved: list[str] = []
    loop.set_exception_handler(lambda _, context: unretrieved.append(_unretrieved(context)))
    left = ""
    try:
        try:
            result = loop.run_until_complete(coro)
            loop.run_until_complete(_settle())
            left = _listing(asyncio.all_tasks(loop))
        finally:
            _cancel_leftovers(loop)
    finally:
        loop.close()
    if left:
        raise Unbalanced(f"at {loop.time():g} s the coroutine returned and left tasks behind:{left}")
    if unretrieved:
        raise Unbalanced("errors were raised that nobody retrieved:" + "".join(unretrieved))
    return result


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """A decorator: an ``async def`` test (fixtures and all) becomes a plain one that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_virtual(test(*args, **kwargs))

    return run


async def _settle() -> None:
    for _ in range(SETTLE_PASS_COUNT):
        if len(asyncio.all_tasks()) == 1:
            return
        await asyncio.sleep(0)


def _cancel_leftovers(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    loop.advance_limit(SIX_HOURS_S)  # cleaning up may wait too, even after the limit was passed
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
        for task in tasks:
            if not task.cancelled():
                task.exception()  # retrieved here: the failure that is reported is the test's own
    loop.run_until_complete(loop.shutdown_asyncgens())


def _unretrieved(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"\n  {context.get('message')}: {error!r}"


def _listing(tasks: Iterable[asyncio.Task[Any]]) -> str:
    lines = sorted(f"\n  {task.get_name()}: {_where(task)}" for task in tasks)
    return "".join(lines)


def _where(task: asyncio.Task[Any]) -> str:
    """The chain of suspended frames, outermost first, as far as Python lets one see it."""
    awaited: Awaitable[Any] | Any = task.get_coro()
    steps: list[str] = []
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is None:
            if not steps or not isinstance(awaited, asyncio.Future):
                steps.append(type(awaited).__name__)
            break
        steps.append(f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return " > ".join(steps)

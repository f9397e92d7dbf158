"""A write that was begun, and that nobody waits for until the next one is due.

Waiting for every write as it is made costs a task two turns for each token: one to write, one to hear that it was
written. Begun like this, a write runs to where it would wait; that it is over shows in a future which wakes nobody,
and what it raised is raised where it is settled. Exactly one write of a stream may be under way: gRPC wants it so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any


class BegunWrite:
    """The writes of one stream, one after the other. ``close`` in any case."""

    __slots__ = ("_coroutine", "_future")

    def __init__(self) -> None:
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self._future: asyncio.Future[Any] | None = None
        """What the coroutine waits for; None between two turns of the loop."""

    @property
    def is_under_way(self) -> bool:
        """False also for one that is over and not settled."""
        return self._future is not None and not self._future.done()

    def try_settle(self) -> bool:
        """True: nothing is under way, and what was is settled. Raises what it raised."""
        if self._coroutine is None:
            return True
        if self._future is None or not self._future.done():
            return False
        self._step()
        return self._coroutine is None

    def begin(self, write: Coroutine[Any, Any, None]) -> None:
        """Runs ``write`` to where it waits. The one before must be settled. Raises what it raises until then."""
        assert self._coroutine is None, "a write is begun when the one before is settled"
        self._coroutine = write
        self._step()

    async def settle(self) -> None:
        """Returns when the write is over; at once if there is none. Raises what it raised."""
        while self._coroutine is not None:
            future = self._future
            if future is None:
                await asyncio.sleep(0)  # it gave way to others without waiting for anything
            elif not future.done():
                # The outcome is the coroutine's to look at, in its step. Cancelled here, it is cancelled there.
                await _over(future)
            self._step()

    def close(self) -> None:
        """Gives up what is under way. What is over comes to its end; what it raised is nobody's any more."""
        if self._future is not None and self._future.done() and not self._future.cancelled():
            # gRPC frees what a write allocated in the lines after its wait: closed there, it would never be freed.
            with suppress(Exception, asyncio.CancelledError):
                self._step()
        coroutine, self._coroutine = self._coroutine, None
        future, self._future = self._future, None
        if future is not None:
            future.cancel()  # as the cancelled task of a waiting write would
        if coroutine is not None:
            coroutine.close()

    def _step(self) -> None:
        coroutine = self._coroutine
        assert coroutine is not None
        try:
            waited_for = coroutine.send(None)
        except BaseException as error:
            self._coroutine = self._future = None
            if isinstance(error, StopIteration):
                return
            raise
        self._future = waited_for
        if waited_for is not None:
            waited_for._asyncio_future_blocking = False  # as a task does: heard, and waited for in our own way


async def _over(future: asyncio.Future[Any]) -> None:
    """Returns when ``future`` is done, whatever became of it. Cancelled, it leaves it as it is. ``asyncio.wait`` of
    one, at a third of its cost."""
    waiter = future.get_loop().create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        future.remove_done_callback(wake)

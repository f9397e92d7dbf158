"""How the router speaks to one worker, and the client for a worker in the same process.

The Protocol is the router's whole knowledge of workers. Every failure is a ``BatonError``; a lost connection is one
with status UNAVAILABLE. Whoever opens a stream closes it (``aclosing``): that cancels the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from baton.errors import deadline_exceeded, engine_failed
from baton.leg import DecodeEvent, DecodeOrder, Introduced, PrefillOrder, PrefillReply, WorkerInfo, WorkerLoad
from router.cluster_view import WorkerSpec

T = TypeVar("T")


class WorkerClient(Protocol):
    """One worker, one connection. ``timeout_s`` of each call is its whole time; past it, DEADLINE_EXCEEDED."""

    async def prefill(self, order: PrefillOrder, *, timeout_s: float) -> PrefillReply:
        """Cancelling aborts it. If an answer was on its way, whoever sent it lets go when its lease ends."""

    def decode(self, order: DecodeOrder, *, timeout_s: float) -> AsyncGenerator[DecodeEvent, None]:
        """``KvAdopted Stepped* DecodeDone``. Closing the generator aborts the decode."""

    async def release_kv(self, ticket_id: str, *, timeout_s: float) -> bool:
        """False: it was gone already."""

    async def extend_lease(self, ticket_id: str, lease_s: float, *, timeout_s: float) -> bool:
        """False: it has ended."""

    def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        """Reports at least every ``interval_s``, without end."""

    async def info(self, *, timeout_s: float) -> WorkerInfo: ...

    async def introduce(self, transfer_peers: Sequence[bytes], *, timeout_s: float) -> list[Introduced]:
        """Has the worker's engine meet those of other workers, given as they said it."""

    async def close(self) -> None:
        """Cancels every call. Idempotent."""


Connect = Callable[[WorkerSpec], WorkerClient]
"""Makes a client for a worker; does not wait for the connection."""


class PrefillPart(Protocol):
    """The prefill phase of a worker in this process."""

    async def prefill(self, order: PrefillOrder) -> PrefillReply: ...

    async def release_kv(self, ticket_id: str) -> bool: ...

    async def extend_lease(self, ticket_id: str, lease_s: float) -> bool: ...


class DecodePart(Protocol):
    """The decode phase of a worker in this process."""

    def decode(self, order: DecodeOrder) -> AsyncGenerator[DecodeEvent, None]: ...


class InProcessWorkerClient:
    """Calls the worker's objects directly; same deadlines, no wire. For tests and the simulator."""

    def __init__(
        self,
        info: WorkerInfo,
        prefill: PrefillPart,
        decode: DecodePart,
        load: Callable[[], WorkerLoad],
        *,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """``is_gone``: the process this stands for is dead, so that every call fails as on a lost connection."""
        self._info = info
        self._prefill = prefill
        self._decode = decode
        self._load = load
        self._is_gone = is_gone
        self._is_closed = False

    async def prefill(self, order: PrefillOrder, *, timeout_s: float) -> PrefillReply:
        return await self._call(lambda: self._prefill.prefill(order), "prefill", timeout_s)

    async def release_kv(self, ticket_id: str, *, timeout_s: float) -> bool:
        return await self._call(lambda: self._prefill.release_kv(ticket_id), "release", timeout_s)

    async def extend_lease(self, ticket_id: str, lease_s: float, *, timeout_s: float) -> bool:
        return await self._call(lambda: self._prefill.extend_lease(ticket_id, lease_s), "extend", timeout_s)

    async def decode(self, order: DecodeOrder, *, timeout_s: float) -> AsyncGenerator[DecodeEvent, None]:
        ends_at = asyncio.get_running_loop().time() + timeout_s
        self._check_there()
        async with aclosing(self._decode.decode(order)) as events:
            while True:
                try:
                    async with asyncio.timeout_at(ends_at) as limit:
                        event = await anext(events)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not limit.expired():
                        raise
                    raise deadline_exceeded("decode", 0) from None
                yield event

    async def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        while True:
            self._check_there()
            yield self._load()
            await asyncio.sleep(interval_s)

    async def info(self, *, timeout_s: float) -> WorkerInfo:
        self._check_there()
        return self._info

    async def introduce(self, transfer_peers: Sequence[bytes], *, timeout_s: float) -> list[Introduced]:
        """Nobody to meet: engines of one process know each other."""
        self._check_there()
        return []

    async def close(self) -> None:
        self._is_closed = True

    async def _call(self, call: Callable[[], Awaitable[T]], phase: str, timeout_s: float) -> T:
        self._check_there()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await call()
        except TimeoutError:
            if not limit.expired():
                raise
            raise deadline_exceeded(phase, 0) from None

    def _check_there(self) -> None:
        if self._is_closed or self._is_gone():
            raise engine_failed(self._info.worker_id, "connection refused")

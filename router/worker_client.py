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
from baton.leg import (
    DecodeDone,
    DecodeEvent,
    DecodeOrder,
    Introduced,
    KvAdopted,
    PrefillOrder,
    PrefillReply,
    Stepped,
    WorkerInfo,
    WorkerLoad,
)
from baton.request import LegFinish, TokenLogprobs
from router.cluster_view import WorkerSpec

T = TypeVar("T")


class DecodeSink(Protocol):
    """Whom a decode is told to: ``adopted tokens* done``, or less before it fails. Called as things arrive, from
    within whatever reads the connection: quick, and raises nothing."""

    def adopted(self, kv: KvAdopted) -> None: ...

    def tokens(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        """The next of the leg, in order; ``logprobs`` has one of each, or none."""

    def done(self, finish: LegFinish) -> None: ...


class WorkerClient(Protocol):
    """One worker, one connection. ``timeout_s`` of each call is its whole time; past it, DEADLINE_EXCEEDED."""

    async def prefill(self, order: PrefillOrder, *, timeout_s: float) -> PrefillReply:
        """Cancelling aborts it. If an answer was on its way, whoever sent it lets go when its lease ends."""

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        """Tells ``sink``; returns when all was told. Cancelling aborts the decode, and nothing is told any more. A
        decode that ended without ``done`` did not say why, and is as good as failed."""

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


async def tell(events: AsyncGenerator[DecodeEvent, None], sink: DecodeSink) -> None:
    """Tells ``sink`` of a decode in this process, and closes it."""
    async with aclosing(events):
        async for event in events:
            match event:
                case Stepped():
                    sink.tokens(event.token_ids, event.logprobs)
                case KvAdopted():
                    sink.adopted(event)
                case DecodeDone():
                    sink.done(event.finish)
                    return


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

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        self._check_there()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await tell(self._decode.decode(order), sink)
        except TimeoutError:
            if not limit.expired():
                raise
            raise deadline_exceeded("decode", 0) from None

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

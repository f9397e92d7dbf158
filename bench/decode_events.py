"""A decode through a worker's client as a stream of events, for whoever asks a worker without a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from baton.leg import DecodeDone, DecodeEvent, DecodeOrder, KvAdopted, Stepped
from baton.request import LegFinish, TokenLogprobs
from router.worker_client import WorkerClient


class _Keeping:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[DecodeEvent | None] = asyncio.Queue()

    def adopted(self, kv: KvAdopted) -> None:
        self.events.put_nowait(kv)

    def tokens(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self.events.put_nowait(Stepped(token_ids, logprobs))

    def done(self, finish: LegFinish) -> None:
        self.events.put_nowait(DecodeDone(finish))


async def told(client: WorkerClient, order: DecodeOrder, timeout_s: float = 5) -> AsyncGenerator[DecodeEvent, None]:
    """What a decode tells, and then what it raises. Closed, the decode is aborted."""
    sink = _Keeping()
    decode = asyncio.create_task(client.decode(order, timeout_s=timeout_s, sink=sink))
    decode.add_done_callback(lambda _: sink.events.put_nowait(None))
    try:
        while (event := await sink.events.get()) is not None:
            yield event
        await decode
    finally:
        decode.cancel()
        await asyncio.gather(decode, return_exceptions=True)

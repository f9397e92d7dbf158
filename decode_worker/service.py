"""DecodeService on the wire: one leg in a call of its own, or many on a stream. Thin; protobuf stops here."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import grpc

from baton.errors import BatonError
from baton.leg import KvAdopted
from baton.worker.v1 import worker_pb2_grpc
from decode_worker.leg_messages_proto import events_to_proto, order_from_proto
from decode_worker.leg_stream_service import LegStream
from decode_worker.worker import DecodeWorker
from engine.service import answering

SERVICE = "baton.worker.v1.DecodeService"


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker

    async def Decode(self, request: Any, context: Any) -> None:
        # A coroutine that writes, not a generator handler: grpc.aio leaves the closing of a generator to the
        # garbage collector, and the engine's request with it.
        async with answering(context, "decode"), aclosing(self._worker.decode(order_from_proto(request))) as events:
            untold: KvAdopted | None = None
            try:
                async for event in events:
                    if isinstance(event, KvAdopted) and event.is_with_tokens:
                        # Its tokens are here already. A write of their own would have the router let go of the held
                        # KV on the very cores that the first token is on its way over.
                        untold = event
                        continue
                    told, untold = untold, None
                    await context.write(events_to_proto(*(() if told is None else (told,)), event))
            except BatonError:
                if untold is not None:  # a leg that fails all the same has adopted: say so before its status
                    await context.write(events_to_proto(untold))
                raise

    async def DecodeMany(self, requests: Any, context: Any) -> None:
        # As long as the caller has legs to start: each leg has its own time.
        async with answering(context, "decode", max_s=None):
            await LegStream(self._worker, context).run()


def add_decode_service(server: grpc.aio.Server, worker: DecodeWorker) -> str:
    """Attaches the service and returns its full name, which the host reports health under."""
    add = worker_pb2_grpc.add_DecodeServiceServicer_to_server
    add(DecodeServicer(worker), server)  # type: ignore[no-untyped-call]  # generated
    return SERVICE

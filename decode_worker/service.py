"""DecodeService on the wire: messages in, events out. Thin; protobuf stops here."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import grpc

from baton.errors import BatonError
from baton.leg import DecodeDone, DecodeEvent, DecodeOrder, KvAdopted, RecomputeReason, Stepped
from baton.worker.v1 import worker_pb2, worker_pb2_grpc
from decode_worker.worker import DecodeWorker
from engine.order_proto import FINISH_TO_PROTO, logprobs_to_proto, order_fields
from engine.service import answering

SERVICE = "baton.worker.v1.DecodeService"
RECOMPUTE_REASON_TO_PROTO = {
    None: worker_pb2.RECOMPUTE_REASON_UNSPECIFIED,
    RecomputeReason.FAILED: worker_pb2.RECOMPUTE_REASON_FAILED,
    RecomputeReason.TIMED_OUT: worker_pb2.RECOMPUTE_REASON_TIMED_OUT,
    RecomputeReason.EXPIRED: worker_pb2.RECOMPUTE_REASON_EXPIRED,
    RecomputeReason.STALE: worker_pb2.RECOMPUTE_REASON_STALE,
    RecomputeReason.CORRUPT: worker_pb2.RECOMPUTE_REASON_CORRUPT,
}


def order_from_proto(request: Any) -> DecodeOrder:
    """Raises INVALID_REQUEST. Ranges and the ticket are the worker's to check."""
    return DecodeOrder(ticket=request.ticket, **order_fields(request))


def events_to_proto(*events: DecodeEvent) -> worker_pb2.DecodeResponse:
    """One message of events that follow one another, at most one of each kind."""
    message = worker_pb2.DecodeResponse()
    for event in events:
        message.MergeFrom(_event_to_proto(event))
    return message


def _event_to_proto(event: DecodeEvent) -> worker_pb2.DecodeResponse:
    match event:
        case Stepped():
            logprobs = [logprobs_to_proto(each) for each in event.logprobs]
            return worker_pb2.DecodeResponse(step=worker_pb2.Step(token_ids=event.token_ids, logprobs=logprobs))
        case KvAdopted():
            return worker_pb2.DecodeResponse(
                adopted=worker_pb2.Adopted(
                    wait_s=event.wait_s,
                    transfer_s=event.transfer_s,
                    decode_wait_s=event.decode_wait_s,
                    transfer_byte_count=event.transfer_bytes,
                    descriptor_count=event.descriptor_count,
                    recomputed_token_count=event.recomputed_token_count,
                    prefill_s=event.prefill_s,
                    cached_token_count=event.cached_token_count,
                    first_step_s=event.first_step_s,
                    recompute_reason=RECOMPUTE_REASON_TO_PROTO[event.recompute_reason],
                    pull_count=event.pull_count,
                    post_s=event.post_s,
                    wire_s=event.wire_s,
                    verify_s=event.verify_s,
                )
            )
        case DecodeDone():
            return worker_pb2.DecodeResponse(finished=worker_pb2.DecodeFinished(finish=FINISH_TO_PROTO[event.finish]))


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


def add_decode_service(server: grpc.aio.Server, worker: DecodeWorker) -> str:
    """Attaches the service and returns its full name, which the host reports health under."""
    add = worker_pb2_grpc.add_DecodeServiceServicer_to_server
    add(DecodeServicer(worker), server)  # type: ignore[no-untyped-call]  # generated
    return SERVICE

"""PrefillService on the wire: messages in, orders out, and back. Thin; protobuf stops here."""

from __future__ import annotations

from typing import Any

import grpc

from baton.leg import PrefillOrder, PrefillReply
from baton.worker.v1 import worker_pb2, worker_pb2_grpc
from engine.order_proto import FINISH_TO_PROTO, logprobs_to_proto, order_fields
from engine.service import answering
from prefill_worker.worker import PrefillWorker

SERVICE = "baton.worker.v1.PrefillService"


def order_from_proto(request: Any) -> PrefillOrder:
    """Raises INVALID_REQUEST. Ranges are the worker's to check."""
    return PrefillOrder(lease_s=request.lease_s, **order_fields(request))


def reply_to_proto(reply: PrefillReply) -> worker_pb2.PrefillResponse:
    return worker_pb2.PrefillResponse(
        first_token_id=reply.first_token_id,
        finish=FINISH_TO_PROTO[reply.finish],
        ticket=reply.ticket,
        ticket_id=reply.ticket_id,
        queue_s=reply.queue_s,
        compute_s=reply.compute_s,
        cached_token_count=reply.cached_token_count,
        kv_byte_count=reply.kv_bytes,
        first_logprobs=None if reply.first_logprobs is None else logprobs_to_proto(reply.first_logprobs),
    )


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: PrefillWorker) -> None:
        self._worker = worker

    async def Prefill(self, request: Any, context: Any) -> worker_pb2.PrefillResponse:
        async with answering(context, "prefill"):
            return reply_to_proto(await self._worker.prefill(order_from_proto(request)))

    async def ReleaseKv(self, request: Any, context: Any) -> worker_pb2.ReleaseKvResponse:
        async with answering(context, "release"):
            return worker_pb2.ReleaseKvResponse(was_held=await self._worker.release_kv(request.ticket_id))

    async def ExtendLease(self, request: Any, context: Any) -> worker_pb2.ExtendLeaseResponse:
        async with answering(context, "extend"):
            is_held = await self._worker.extend_lease(request.ticket_id, request.lease_s)
            return worker_pb2.ExtendLeaseResponse(is_held=is_held)


def add_prefill_service(server: grpc.aio.Server, worker: PrefillWorker) -> str:
    """Attaches the service and returns its full name, which the host reports health under."""
    add = worker_pb2_grpc.add_PrefillServiceServicer_to_server
    add(PrefillServicer(worker), server)  # type: ignore[no-untyped-call]  # generated
    return SERVICE

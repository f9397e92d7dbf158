"""PrefillService on the wire: messages in, orders out, and back. Thin; protobuf stops here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc

from baton.errors import internal
from baton.leg import PrefillOrder, PrefillReply, PromptLogprobs
from baton.worker.v1 import worker_pb2, worker_pb2_grpc
from engine.order_proto import FINISH_TO_PROTO, logprobs_to_proto, order_fields
from engine.service import answering
from prefill_worker.worker import PrefillWorker

SERVICE = "baton.worker.v1.PrefillService"

MAX_PART_BYTES = 128 * 1024
"""Of a prompt's logprobs in one message."""
_ENTRY_BYTES = 13
"""A double and an int32 of at most five bytes."""


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


def scores_to_proto(scores: PromptLogprobs | None) -> Iterator[worker_pb2.PromptScores]:
    """In parts of at most about ``MAX_PART_BYTES``. Raises INTERNAL where an engine brought none."""
    if scores is None:
        raise internal("the engine brought no logprobs of a prompt")
    top = scores.top_count
    size = MAX_PART_BYTES // (_ENTRY_BYTES * (1 + top))
    for start in range(0, len(scores), size):
        stop = min(start + size, len(scores))
        yield worker_pb2.PromptScores(
            logprobs=scores.logprobs[start:stop],
            ranks=scores.ranks[start:stop],
            top_token_ids=scores.top_token_ids[start * top : stop * top],
            top_logprobs=scores.top_logprobs[start * top : stop * top],
        )


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: PrefillWorker) -> None:
        self._worker = worker

    async def Prefill(self, request: Any, context: Any) -> worker_pb2.PrefillResponse:
        async with answering(context, "prefill"):
            return reply_to_proto(await self._worker.prefill(order_from_proto(request)))

    async def PrefillScored(self, request: Any, context: Any) -> None:
        async with answering(context, "prefill"):
            order = order_from_proto(request.prefill)
            reply = await self._worker.prefill(replace(order, prompt_logprob_count=request.prompt_logprob_count))
            try:
                for part in scores_to_proto(reply.prompt_logprobs):
                    await context.write(worker_pb2.PrefillScoredResponse(part=part))
                await context.write(worker_pb2.PrefillScoredResponse(prefilled=reply_to_proto(reply)))
            except BaseException:
                # The caller left before it knew of what is held for it.
                if reply.ticket_id:
                    await asyncio.shield(self._worker.release_kv(reply.ticket_id))
                raise

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

"""Orders and events of decode legs, to messages and back. Protobuf stops here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.leg import DecodeDone, DecodeEvent, DecodeOrder, KvAdopted, RecomputeReason, Stepped
from baton.request import LegFinish, TokenLogprobs
from baton.worker.v1 import worker_pb2
from engine.order_proto import FINISH_TO_PROTO, logprobs_to_proto, order_fields

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
    adopted: KvAdopted | None = None
    stepped = Stepped(())
    finish: LegFinish | None = None
    for event in events:
        match event:
            case Stepped():
                stepped = event
            case KvAdopted():
                adopted = event
            case DecodeDone():
                finish = event.finish
    return events_of(adopted, stepped.token_ids, stepped.logprobs, finish)


def events_of(
    adopted: KvAdopted | None,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    finish: LegFinish | None,
) -> worker_pb2.DecodeResponse:
    """What of them there is."""
    return worker_pb2.DecodeResponse(
        adopted=None if adopted is None else _adopted(adopted),
        step=worker_pb2.Step(token_ids=token_ids, logprobs=map(logprobs_to_proto, logprobs)) if token_ids else None,
        finished=None if finish is None else worker_pb2.DecodeFinished(finish=FINISH_TO_PROTO[finish]),
    )


def _adopted(adopted: KvAdopted) -> worker_pb2.Adopted:
    return worker_pb2.Adopted(
        wait_s=adopted.wait_s,
        transfer_s=adopted.transfer_s,
        decode_wait_s=adopted.decode_wait_s,
        transfer_byte_count=adopted.transfer_bytes,
        descriptor_count=adopted.descriptor_count,
        recomputed_token_count=adopted.recomputed_token_count,
        prefill_s=adopted.prefill_s,
        cached_token_count=adopted.cached_token_count,
        first_step_s=adopted.first_step_s,
        recompute_reason=RECOMPUTE_REASON_TO_PROTO[adopted.recompute_reason],
        pull_count=adopted.pull_count,
        post_s=adopted.post_s,
        wire_s=adopted.wire_s,
        verify_s=adopted.verify_s,
    )

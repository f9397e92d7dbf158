"""Orders and events of legs, to messages and back. Protobuf stops here."""

from __future__ import annotations

from typing import Any

from baton.errors import internal
from baton.leg import (
    DecodeDone,
    DecodeEvent,
    DecodeOrder,
    KvAdopted,
    PrefillOrder,
    RecomputeReason,
    Stepped,
    pack_token_ids,
)
from baton.request import EngineStop, LegFinish, Sampling, StructureKind, TokenLogprobs
from baton.worker.v1 import worker_pb2 as pb

_FINISH = {pb.LEG_FINISH_STOP: LegFinish.STOP, pb.LEG_FINISH_LENGTH: LegFinish.LENGTH}
_RECOMPUTE_REASONS = {
    pb.RECOMPUTE_REASON_FAILED: RecomputeReason.FAILED,
    pb.RECOMPUTE_REASON_TIMED_OUT: RecomputeReason.TIMED_OUT,
    pb.RECOMPUTE_REASON_EXPIRED: RecomputeReason.EXPIRED,
    pb.RECOMPUTE_REASON_STALE: RecomputeReason.STALE,
    pb.RECOMPUTE_REASON_CORRUPT: RecomputeReason.CORRUPT,
}
_STRUCTURE_KINDS = {
    StructureKind.JSON_SCHEMA: pb.STRUCTURE_KIND_JSON_SCHEMA,
    StructureKind.JSON_OBJECT: pb.STRUCTURE_KIND_JSON_OBJECT,
    StructureKind.REGEX: pb.STRUCTURE_KIND_REGEX,
    StructureKind.CHOICE: pb.STRUCTURE_KIND_CHOICE,
    StructureKind.GRAMMAR: pb.STRUCTURE_KIND_GRAMMAR,
}


def finish_of(finished: Any) -> LegFinish | None:
    """Of anything that has a finish; None: it is not over, or ended in a way that is not known here."""
    return _FINISH.get(finished.finish)


def prefill_request(order: PrefillOrder) -> pb.PrefillRequest:
    return pb.PrefillRequest(
        leg_id=order.leg_id,
        prompt_token_ids=pack_token_ids(order.prompt_token_ids),
        sampling=_sampling(order.sampling),
        stop=_stop(order.stop),
        lease_s=order.lease_s,
        priority=order.priority,
        output_token_count=order.output_token_count,
        top_logprob_count=order.top_logprob_count,
        tenant=order.tenant,
    )


def decode_request(order: DecodeOrder) -> pb.DecodeRequest:
    return pb.DecodeRequest(
        leg_id=order.leg_id,
        prompt_token_ids=pack_token_ids(order.prompt_token_ids),
        sampling=_sampling(order.sampling),
        stop=_stop(order.stop),
        ticket=order.ticket,
        priority=order.priority,
        output_token_count=order.output_token_count,
        top_logprob_count=order.top_logprob_count,
        tenant=order.tenant,
    )


def events_from_proto(message: Any) -> list[DecodeEvent]:
    """In the order they happened in. Raises INTERNAL for a message without an event."""
    events: list[DecodeEvent] = []
    if message.HasField("adopted"):
        events.append(kv_adopted(message.adopted, is_with_tokens=message.HasField("step")))
    if message.HasField("step"):
        events.append(Stepped(tuple(message.step.token_ids), tuple(map(logprobs_of, message.step.logprobs))))
    if message.HasField("finished") and message.finished.finish in _FINISH:
        events.append(DecodeDone(_FINISH[message.finished.finish]))
    if not events:
        raise internal("a decode brought an event this router does not know")
    return events


def kv_adopted(adopted: Any, *, is_with_tokens: bool) -> KvAdopted:
    return KvAdopted(
        wait_s=adopted.wait_s,
        transfer_s=adopted.transfer_s,
        decode_wait_s=adopted.decode_wait_s,
        transfer_bytes=adopted.transfer_byte_count,
        descriptor_count=adopted.descriptor_count,
        recomputed_token_count=adopted.recomputed_token_count,
        prefill_s=adopted.prefill_s,
        cached_token_count=adopted.cached_token_count,
        first_step_s=adopted.first_step_s,
        recompute_reason=_RECOMPUTE_REASONS.get(adopted.recompute_reason),
        pull_count=adopted.pull_count,
        post_s=adopted.post_s,
        wire_s=adopted.wire_s,
        verify_s=adopted.verify_s,
        is_with_tokens=is_with_tokens,
    )


def logprobs_of(message: Any) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, message.rank, tuple((each.token_id, each.logprob) for each in message.top))


def _sampling(sampling: Sampling) -> pb.SamplingSpec:
    structure = sampling.structure
    return pb.SamplingSpec(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=[pb.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        allowed_token_ids=sampling.allowed_token_ids,
        bad_token_sequences=[pb.TokenSequence(token_ids=each) for each in sampling.bad_token_sequences],
        structure=None
        if structure is None
        else pb.StructureSpec(kind=_STRUCTURE_KINDS[structure.kind], text=structure.text, choices=structure.choices),
    )


def _stop(stop: EngineStop) -> pb.StopSpec:
    return pb.StopSpec(
        max_token_count=stop.max_token_count,
        stop_token_ids=stop.stop_token_ids,
        ignore_eos=stop.ignore_eos,
        min_token_count=stop.min_token_count,
    )

"""Messages of the public API's streams and models, as events and values: what a client reads. Tolerates what it does
not know: a newer server may send it."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from baton.events import (
    Chunk,
    Event,
    Finished,
    PhaseTimings,
    PromptPart,
    SampleResult,
    Started,
    TokenLogprob,
)
from baton.leg import RecomputeReason
from baton.models import Capabilities, Model, SpecialToken
from baton.request import FinishReason, Handover, PlacementMode, ToolCall, ToolCallDelta, Usage
from baton.timeline import PHASES
from baton.transfer_report import TransferReport
from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2

_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_MAX_OUTPUT_TOKENS: FinishReason.MAX_OUTPUT_TOKENS,
    pb.FINISH_REASON_CONTEXT_FULL: FinishReason.CONTEXT_FULL,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}
_MODES = {
    pb.PLACEMENT_MODE_SPLIT: PlacementMode.SPLIT,
    pb.PLACEMENT_MODE_LOCAL: PlacementMode.LOCAL,
    pb.PLACEMENT_MODE_PREFILL_ONLY: PlacementMode.PREFILL_ONLY,
}
_HANDOVERS = {
    pb.HANDOVER_MODE_NONE: Handover.NONE,
    pb.HANDOVER_MODE_OUTPUT_INJECTION: Handover.OUTPUT_INJECTION,
}
_RECOMPUTE_REASONS = {
    pb.RECOMPUTE_REASON_FAILED: RecomputeReason.FAILED,
    pb.RECOMPUTE_REASON_TIMED_OUT: RecomputeReason.TIMED_OUT,
    pb.RECOMPUTE_REASON_EXPIRED: RecomputeReason.EXPIRED,
    pb.RECOMPUTE_REASON_STALE: RecomputeReason.STALE,
    pb.RECOMPUTE_REASON_CORRUPT: RecomputeReason.CORRUPT,
}


def event_from_proto(response: pb.GenerateResponse | pb.ResumeGenerateResponse) -> Event | None:
    """None for an event of a newer server."""
    match response.WhichOneof("event"):
        case "started":
            return _started_from_proto(response.started)
        case "chunk":
            chunk = response.chunk
            return Chunk(
                chunk.first_token_index,
                chunk.text,
                tuple(chunk.token_ids),
                chunk.token_count,
                _logprobs(chunk.logprobs) if chunk.logprobs else (),
                chunk.sample_index,
                chunk.reasoning_text,
                tuple(
                    ToolCallDelta(each.index, each.id, each.name, each.arguments_json)
                    for each in chunk.tool_call_deltas
                )
                if chunk.tool_call_deltas
                else (),
            )
        case "prompt":
            prompt = response.prompt  # type: ignore[union-attr]  # a resumed stream has none
            return PromptPart(
                prompt.first_token_index,
                prompt.text,
                tuple(prompt.token_ids),
                prompt.token_count,
                _logprobs(prompt.logprobs),
            )
        case "finished":
            return _finished_from_proto(response.finished)
    return None


def _started_from_proto(started: pb.Started) -> Started:
    return Started(
        started.generation_id,
        started.model,
        started.prompt_token_count,
        started.resume_token,
        _seconds(started.resume_grace) if started.HasField("resume_grace") else None,
        _seconds(started.time_allowed) if started.HasField("time_allowed") else None,
    )


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(each.token_id, each.logprob, each.rank, tuple((t.token_id, t.logprob) for t in each.top))
        for each in messages
    )


def _tool_calls(messages: Iterable[pb.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(each.id, each.name, each.arguments_json) for each in messages)


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _sample_from_proto(sample: pb.SampleResult) -> SampleResult:
    return SampleResult(
        sample_index=sample.sample_index,
        reason=_REASONS.get(sample.reason),
        matched_stop_sequence=sample.matched_stop_sequence or None,
        matched_stop_token_id=sample.matched_stop_token_id if sample.HasField("matched_stop_token_id") else None,
        output_token_count=sample.output_token_count,
        cumulative_logprob=sample.cumulative_logprob if sample.HasField("cumulative_logprob") else None,
        tool_calls=_tool_calls(sample.tool_calls),
    )


def model_from_proto(model: model_pb2.Model) -> Model:
    has = model.capabilities
    return Model(
        name=model.name,
        max_context_token_count=model.max_context_token_count,
        vocab_size=model.vocab_size,
        special_tokens=tuple(SpecialToken(each.token_id, each.text) for each in model.special_tokens),
        end_token_ids=tuple(model.end_token_ids),
        chat_template=model.chat_template,
        capabilities=Capabilities(
            has_chat=has.has_chat,
            has_tools=has.has_tools,
            tool_parser=has.tool_parser,
            reasoning_parser=has.reasoning_parser,
            template_argument_names=tuple(has.template_argument_names),
            max_sample_count=has.max_sample_count,
            max_top_logprob_count=has.max_top_logprob_count,
            has_resume=has.has_resume,
        ),
    )


def _finished_from_proto(finished: pb.Finished) -> Finished:
    phases = finished.phases
    seconds = {phase: _seconds(getattr(phases, phase.value)) for phase in PHASES}
    has_first = phases.HasField("time_to_first_token")
    return Finished(
        reason=_REASONS.get(finished.reason),
        matched_stop_sequence=finished.matched_stop_sequence or None,
        matched_stop_token_id=finished.matched_stop_token_id if finished.HasField("matched_stop_token_id") else None,
        usage=Usage(
            finished.usage.prompt_token_count,
            finished.usage.output_token_count,
            finished.usage.cached_prompt_token_count,
        ),
        phases=PhaseTimings(
            seconds=seconds,
            time_to_first_token_s=_seconds(phases.time_to_first_token) if has_first else None,
            transfer=TransferReport(
                kv_bytes=phases.kv_transfer_byte_count,
                descriptor_count=phases.kv_transfer_descriptor_count,
                pull_count=phases.kv_pull_count,
                post_s=_seconds(phases.kv_post),
                wire_s=_seconds(phases.kv_wire),
                verify_s=_seconds(phases.kv_verify),
                recomputed_token_count=phases.recomputed_token_count,
                recompute_reason=_RECOMPUTE_REASONS.get(phases.recompute_reason),
            ),
            handover=_HANDOVERS.get(phases.handover_mode),
            prefill_worker_id=phases.prefill_worker_id,
            decode_worker_id=phases.decode_worker_id,
            attempt_count=phases.attempt_count,
            placement_mode=_MODES.get(phases.placement_mode),
            placement_reason=phases.placement_reason,
        ),
        cumulative_logprob=finished.cumulative_logprob if finished.HasField("cumulative_logprob") else None,
        tool_calls=_tool_calls(finished.tool_calls),
        samples=tuple(_sample_from_proto(each) for each in finished.samples),
    )

"""What the relay and the stages after it say, as messages of the public API: the way out.

Mechanical, and on the path of every token: no lookup here that could be made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from baton.leg import RecomputeReason
from baton.request import (
    FinishReason,
    Handover,
    OutputOptions,
    PlacementMode,
    TokenLogprobs,
    ToolCall,
)
from baton.timeline import Phase
from baton.v1 import generation_pb2 as pb
from router.answering import Completed, PhaseReport, Piece, PromptPart

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_OUTPUT_TOKENS: pb.FINISH_REASON_MAX_OUTPUT_TOKENS,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
_MODES = {
    PlacementMode.SPLIT: pb.PLACEMENT_MODE_SPLIT,
    PlacementMode.LOCAL: pb.PLACEMENT_MODE_LOCAL,
    PlacementMode.PREFILL_ONLY: pb.PLACEMENT_MODE_PREFILL_ONLY,
}
_HANDOVERS = {
    Handover.NONE: pb.HANDOVER_MODE_NONE,
    Handover.OUTPUT_INJECTION: pb.HANDOVER_MODE_OUTPUT_INJECTION,
}
_RECOMPUTE_REASONS = {
    None: pb.RECOMPUTE_REASON_UNSPECIFIED,
    RecomputeReason.FAILED: pb.RECOMPUTE_REASON_FAILED,
    RecomputeReason.TIMED_OUT: pb.RECOMPUTE_REASON_TIMED_OUT,
    RecomputeReason.EXPIRED: pb.RECOMPUTE_REASON_EXPIRED,
    RecomputeReason.STALE: pb.RECOMPUTE_REASON_STALE,
    RecomputeReason.CORRUPT: pb.RECOMPUTE_REASON_CORRUPT,
}


def started_to_proto(
    generation_id: str,
    model: str,
    prompt_token_count: int,
    *,
    time_allowed_s: float,
    resume_token: str = "",
    resume_grace_s: float | None = None,
    response: Any = pb.GenerateResponse,
) -> Any:
    """``response``: the class of the stream's messages. ``resume_token``: empty for what cannot be resumed."""
    started = pb.Started(
        generation_id=generation_id,
        model=model,
        prompt_token_count=prompt_token_count,
        time_allowed=_duration(time_allowed_s),
        resume_token=resume_token,
        resume_grace=None if resume_grace_s is None else _duration(resume_grace_s),
    )
    return response(started=started)


def prompt_to_proto(part: PromptPart, output: OutputOptions) -> pb.GenerateResponse:
    """Raises ``ValueError`` unless there are no logprobs or one of each token."""
    return pb.GenerateResponse(
        prompt=pb.Prompt(
            first_token_index=part.first_token_index,
            text=part.text if output.echo_prompt and output.wants_text else "",
            token_ids=part.token_ids if output.echo_prompt and output.wants_token_ids else (),
            token_count=len(part.token_ids),
            logprobs=_logprobs(part.token_ids, part.logprobs),
        )
    )


def chunk_to_proto(piece: Piece, output: OutputOptions, *, response: Any = pb.GenerateResponse) -> Any:
    """Raises ``ValueError`` unless there are no logprobs or one of each token."""
    token_ids = piece.token_ids
    chunk = pb.Chunk(
        first_token_index=piece.first_token_index,
        text=piece.text if output.wants_text else "",
        token_ids=token_ids if output.wants_token_ids else (),
        token_count=len(token_ids),
        sample_index=piece.sample_index,
    )
    if piece.logprobs:
        chunk.logprobs.extend(_logprobs(token_ids, piece.logprobs))
    if piece.reasoning_text and output.wants_text:
        chunk.reasoning_text = piece.reasoning_text
    for call in piece.tool_calls:
        chunk.tool_call_deltas.add(index=call.index, id=call.id, name=call.name, arguments_json=call.arguments_json)
    return response(chunk=chunk)


def finished_to_proto(completed: Completed, *, response: Any = pb.GenerateResponse) -> Any:
    finished = pb.Finished(
        reason=_REASONS[completed.reason],
        matched_stop_sequence=completed.matched_stop_sequence or "",
        matched_stop_token_id=completed.matched_stop_token_id,
        cumulative_logprob=completed.cumulative_logprob,
        usage=pb.Usage(
            prompt_token_count=completed.usage.prompt_token_count,
            output_token_count=completed.usage.output_token_count,
            cached_prompt_token_count=completed.usage.cached_prompt_token_count,
        ),
        phases=_phases_to_proto(completed.report),
        tool_calls=_tool_calls(completed.tool_calls),
        samples=[
            pb.SampleResult(
                sample_index=each.sample_index,
                reason=_REASONS[each.reason],
                matched_stop_sequence=each.matched_stop_sequence or "",
                matched_stop_token_id=each.matched_stop_token_id,
                output_token_count=each.output_token_count,
                cumulative_logprob=each.cumulative_logprob,
                tool_calls=_tool_calls(each.tool_calls),
            )
            for each in completed.samples
        ],
    )
    return response(finished=finished)


def _tool_calls(calls: Sequence[ToolCall]) -> list[pb.ToolCall]:
    return [pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in calls]


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(token_id=token_id)
        if each is None
        else pb.TokenLogprobs(
            token_id=token_id,
            logprob=each.logprob,
            rank=each.rank,
            top=[pb.TopLogprob(token_id=top_id, logprob=logprob) for top_id, logprob in each.top],
        )
        for token_id, each in zip(token_ids if logprobs else (), logprobs, strict=True)
    ]


def _phases_to_proto(report: PhaseReport) -> pb.PhaseTimings:
    durations = report.durations
    timings = pb.PhaseTimings(
        queue=_duration(durations[Phase.QUEUE]),
        prefill=_duration(durations[Phase.PREFILL]),
        handoff_wait=_duration(durations[Phase.HANDOFF_WAIT]),
        kv_transfer=_duration(durations[Phase.KV_TRANSFER]),
        decode_wait=_duration(durations[Phase.DECODE_WAIT]),
        decode=_duration(durations[Phase.DECODE]),
        kv_transfer_byte_count=report.kv_transfer_bytes,
        prefill_worker_id=report.prefill_worker_id or "",
        decode_worker_id=report.decode_worker_id or "",
        attempt_count=report.attempt_count,
        placement_mode=_MODES[report.mode],
        placement_reason=report.placement_reason,
        recomputed_token_count=report.recomputed_token_count,
        handover_mode=_HANDOVERS[report.handover],
        kv_transfer_descriptor_count=report.transfer.descriptor_count,
        kv_pull_count=report.transfer.pull_count,
        kv_post=_duration(report.transfer.post_s),
        kv_wire=_duration(report.transfer.wire_s),
        kv_verify=_duration(report.transfer.verify_s),
        recompute_reason=_RECOMPUTE_REASONS[report.transfer.recompute_reason],
    )
    if durations.time_to_first_token_s is not None:
        timings.time_to_first_token.CopyFrom(_duration(durations.time_to_first_token_s))
    return timings


_ZERO = Duration()


def _duration(seconds: float) -> Duration:
    if seconds <= 0.0:
        return _ZERO  # copied into the message, as any other
    nanos = round(seconds * 1e9)
    if nanos < 1_000_000_000:
        return Duration(nanos=nanos)
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)

"""Protobuf to the words of ``baton.request`` and back: with service.py, the only places that know both.

Mechanical: defaults are filled in, presence becomes None; ranges are validation.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from baton.errors import FieldViolation
from baton.leg import RecomputeReason
from baton.request import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    Handover,
    OutputOptions,
    PlacementMode,
    Prompt,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
    Usage,
)
from baton.timeline import Phase
from baton.v1 import generation_pb2 as pb
from router.answering import PhaseReport

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_OUTPUT_TOKENS: pb.FINISH_REASON_MAX_OUTPUT_TOKENS,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
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
_CONTENTS = {
    pb.OutputOptions.CONTENT_UNSPECIFIED: (True, False),
    pb.OutputOptions.CONTENT_TEXT: (True, False),
    pb.OutputOptions.CONTENT_TOKEN_IDS: (False, True),
    pb.OutputOptions.CONTENT_BOTH: (True, True),
}


def request_from_proto(message: pb.GenerateRequest) -> tuple[GenerateRequest, list[FieldViolation]]:
    """The request, and what could not be expressed in it: an unknown output content, a list that is there and has
    nothing in it, a structure of no kind."""
    violations = []
    contents = _CONTENTS.get(message.output.content)
    if contents is None:
        violations.append(
            FieldViolation("output.content", f"is {message.output.content}; must be a value of OutputOptions.Content")
        )
    wants_text, wants_token_ids = contents or (True, False)
    if message.sampling.HasField("allowed_token_ids") and not message.sampling.allowed_token_ids.ids:
        violations.append(
            FieldViolation(
                "sampling.allowed_token_ids", "is empty; give at least one token id, or leave it out for all"
            )
        )
    if message.sampling.HasField("structure") and message.sampling.structure.WhichOneof("kind") is None:
        kinds = ", ".join(field.name for field in pb.StructuredOutput.DESCRIPTOR.fields)
        violations.append(FieldViolation("sampling.structure", f"is of no kind; set one of {kinds}, or leave it out"))
    default = OutputOptions()
    request = GenerateRequest(
        prompt=_prompt_from_proto(message),
        model=message.model,
        sampling=_sampling_from_proto(message.sampling),
        stop=StopConditions(
            max_output_token_count=(
                message.stop.max_output_token_count if message.stop.HasField("max_output_token_count") else None
            ),
            stop_sequences=tuple(message.stop.stop_sequences),
            stop_token_ids=tuple(message.stop.stop_token_ids),
            ignore_eos=message.stop.ignore_eos,
            min_output_token_count=message.stop.min_output_token_count,
        ),
        output=OutputOptions(
            wants_text=wants_text,
            wants_token_ids=wants_token_ids,
            max_chunk_token_count=(
                message.output.max_chunk_token_count
                if message.output.HasField("max_chunk_token_count")
                else default.max_chunk_token_count
            ),
            top_logprob_count=(
                message.output.top_logprob_count if message.output.HasField("top_logprob_count") else None
            ),
        ),
        priority=message.priority,
        session_id=message.session_id,
        correlation_id=message.correlation_id,
        tenant=message.tenant,
    )
    return request, violations


def _prompt_from_proto(message: pb.GenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "token_ids":
            return TokenPrompt(tuple(message.token_ids.ids))
        case "chat":
            return ChatPrompt(tuple(ChatMessage(entry.role, entry.content) for entry in message.chat.messages))
        case _:
            return TextPrompt(message.text)  # an absent prompt is an empty one, and refused as such


def _sampling_from_proto(message: pb.Sampling) -> Sampling:
    default = Sampling()
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else default.temperature,
        top_p=message.top_p if message.HasField("top_p") else default.top_p,
        top_k=message.top_k if message.HasField("top_k") else default.top_k,
        min_p=message.min_p if message.HasField("min_p") else default.min_p,
        seed=message.seed if message.HasField("seed") else default.seed,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else default.repetition_penalty
        ),
        logit_bias=tuple((each.token_id, each.bias) for each in message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids.ids),
        bad_token_sequences=tuple(tuple(each.ids) for each in message.bad_token_sequences),
        structure=_structure_from_proto(message.structure),
    )


def _structure_from_proto(message: pb.StructuredOutput) -> Structure | None:
    match message.WhichOneof("kind"):
        case "json_schema":
            return Structure(StructureKind.JSON_SCHEMA, message.json_schema)
        case "json_object":
            return Structure(StructureKind.JSON_OBJECT)
        case "regex":
            return Structure(StructureKind.REGEX, message.regex)
        case "choice":
            return Structure(StructureKind.CHOICE, choices=tuple(message.choice.texts))
        case "grammar":
            return Structure(StructureKind.GRAMMAR, message.grammar)
    return None


def started_to_proto(generation_id: str, model: str, prompt_token_count: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(generation_id=generation_id, model=model, prompt_token_count=prompt_token_count)
    )


def chunk_to_proto(
    first_token_index: int,
    token_ids: Sequence[int],
    text: str,
    output: OutputOptions,
    logprobs: Sequence[TokenLogprobs] = (),
) -> pb.GenerateResponse:
    """``logprobs``: none, or one for each token. Raises ``ValueError`` otherwise."""
    return pb.GenerateResponse(
        chunk=pb.Chunk(
            first_token_index=first_token_index,
            text=text if output.wants_text else "",
            token_ids=token_ids if output.wants_token_ids else (),
            token_count=len(token_ids),
            logprobs=[
                pb.TokenLogprobs(
                    token_id=token_id,
                    logprob=each.logprob,
                    rank=each.rank,
                    top=[pb.TopLogprob(token_id=top_id, logprob=logprob) for top_id, logprob in each.top],
                )
                for token_id, each in zip(token_ids if logprobs else (), logprobs, strict=True)
            ],
        )
    )


def finished_to_proto(
    reason: FinishReason,
    matched_stop_sequence: str | None,
    matched_stop_token_id: int | None,
    usage: Usage,
    report: PhaseReport,
    cumulative_logprob: float | None = None,
) -> pb.GenerateResponse:
    finished = pb.Finished(
        reason=_REASONS[reason],
        matched_stop_sequence=matched_stop_sequence or "",
        usage=pb.Usage(
            prompt_token_count=usage.prompt_token_count,
            output_token_count=usage.output_token_count,
            cached_prompt_token_count=usage.cached_prompt_token_count,
        ),
        phases=_phases_to_proto(report),
    )
    if matched_stop_token_id is not None:
        finished.matched_stop_token_id = matched_stop_token_id
    if cumulative_logprob is not None:
        finished.cumulative_logprob = cumulative_logprob
    return pb.GenerateResponse(finished=finished)


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


def _duration(seconds: float) -> Duration:
    nanos = max(0, round(seconds * 1e9))
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)

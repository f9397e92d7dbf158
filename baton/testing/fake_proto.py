"""The events of a fake generation, as messages of the public API."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.duration_pb2 import Duration

from baton.request import FinishReason, GenerateRequest, ToolCall, ToolCallDelta
from baton.testing.fake_script import VOCAB_SIZE, FakeSample, FakeToken, Scripted, encode, rendered
from baton.v1 import generation_pb2 as pb

DEFAULT_GRACE_S = 30.0

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_OUTPUT_TOKENS: pb.FINISH_REASON_MAX_OUTPUT_TOKENS,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


@dataclass(slots=True)
class FakeGeneration:
    """One answer, which calls attach to."""

    generation_id: str
    resume_token: str
    message: pb.GenerateRequest
    request: GenerateRequest
    script: Scripted
    samples: tuple[FakeSample, ...]
    is_running: bool = True
    is_cancelled: bool = False
    readers: set[threading.Event] = field(default_factory=set)
    """One of each call that streams it, set when that call is over."""


def started_to_proto(generation: FakeGeneration, model: str, timeout_s: float | None) -> pb.GenerateResponse:
    started = pb.Started(
        generation_id=generation.generation_id,
        model=model,
        prompt_token_count=len(rendered(generation.request.prompt)),
        resume_token=generation.resume_token,
    )
    resume = generation.request.resume
    if resume is not None:
        started.resume_grace.CopyFrom(_duration(DEFAULT_GRACE_S if resume.grace_s is None else resume.grace_s))
    if timeout_s is not None:
        started.time_allowed.CopyFrom(_duration(timeout_s))
    return pb.GenerateResponse(started=started)


def prompt_to_proto(request: GenerateRequest) -> Iterator[pb.GenerateResponse]:
    output = request.output
    if not output.echo_prompt and output.prompt_logprob_count is None:
        return
    text = rendered(request.prompt)
    ids = encode(text)
    part = pb.Prompt(token_count=len(ids))
    if output.echo_prompt and output.wants_text:
        part.text = text
    if output.echo_prompt and output.wants_token_ids:
        part.token_ids.extend(ids)
    if output.prompt_logprob_count is not None:
        part.logprobs.add(token_id=ids[0], rank=0)
        part.logprobs.extend(_logprobs(each, output.prompt_logprob_count) for each in ids[1:])
    yield pb.GenerateResponse(prompt=part)


def chunk_to_proto(
    tokens: Sequence[FakeToken], first: int, sample_index: int, request: GenerateRequest
) -> pb.GenerateResponse:
    output = request.output
    chunk = pb.Chunk(first_token_index=first, token_count=len(tokens), sample_index=sample_index)
    if output.wants_text:
        chunk.text = "".join(token.text for token in tokens)
        chunk.reasoning_text = "".join(token.reasoning_text for token in tokens)
    chunk.tool_call_deltas.extend(  # calls are no text: whoever asked for ids alone gets them, too
        pb.ToolCallDelta(index=each.index, id=each.id, name=each.name, arguments_json=each.arguments_json)
        for each in _joined(tokens)
    )
    if output.wants_token_ids:
        chunk.token_ids.extend(token.token_id for token in tokens)
    if output.top_logprob_count is not None:
        chunk.logprobs.extend(_logprobs(token.token_id, output.top_logprob_count) for token in tokens)
    return pb.GenerateResponse(chunk=chunk)


def _joined(tokens: Sequence[FakeToken]) -> list[ToolCallDelta]:
    found: list[ToolCallDelta] = []
    for delta in (token.delta for token in tokens if token.delta is not None):
        if found and found[-1].index == delta.index:
            found[-1] = replace(found[-1], arguments_json=found[-1].arguments_json + delta.arguments_json)
        else:
            found.append(delta)
    return found


def _logprobs(token_id: int, top_count: int) -> pb.TokenLogprobs:
    """Every token is the likeliest; those after it are the next code points."""
    return pb.TokenLogprobs(
        token_id=token_id,
        logprob=-0.5,
        rank=1,
        top=[
            pb.TopLogprob(token_id=(token_id + place) % VOCAB_SIZE, logprob=-0.5 - place)
            for place in range(top_count)
        ],
    )


def finished_to_proto(generation: FakeGeneration) -> pb.GenerateResponse:
    first = generation.samples[0]
    has_logprobs = generation.request.output.top_logprob_count is not None
    finished = pb.Finished(
        reason=_REASONS[first.reason],
        matched_stop_sequence=first.matched_stop_sequence or "",
        matched_stop_token_id=first.matched_stop_token_id,
        usage=pb.Usage(
            prompt_token_count=len(rendered(generation.request.prompt)),
            output_token_count=sum(len(sample.tokens) for sample in generation.samples),
            cached_prompt_token_count=generation.script.cached_prompt_token_count,
        ),
        phases=pb.PhaseTimings(
            queue=_duration(0.001),
            prefill=_duration(0.002),
            handoff_wait=_duration(0.001),
            kv_transfer=_duration(0.001),
            decode_wait=_duration(0.001),
            decode=_duration(0.004),
            time_to_first_token=_duration(0.003),
            kv_pull_count=1,
            prefill_worker_id="fake-prefill",
            decode_worker_id="fake-decode",
            attempt_count=1,
            placement_mode=pb.PLACEMENT_MODE_SPLIT,
            placement_reason="fake",
            handover_mode=pb.HANDOVER_MODE_OUTPUT_INJECTION,
        ),
        cumulative_logprob=-0.5 * len(first.tokens) if has_logprobs else None,
        tool_calls=_tool_calls(first.tool_calls),
    )
    if len(generation.samples) > 1:
        finished.samples.extend(
            pb.SampleResult(
                sample_index=index,
                reason=_REASONS[sample.reason],
                matched_stop_sequence=sample.matched_stop_sequence or "",
                matched_stop_token_id=sample.matched_stop_token_id,
                output_token_count=len(sample.tokens),
                cumulative_logprob=-0.5 * len(sample.tokens) if has_logprobs else None,
                tool_calls=_tool_calls(sample.tool_calls),
            )
            for index, sample in enumerate(generation.samples)
        )
    return pb.GenerateResponse(finished=finished)


def _tool_calls(calls: Sequence[ToolCall]) -> list[pb.ToolCall]:
    return [pb.ToolCall(id=each.id, name=each.name, arguments_json=each.arguments_json) for each in calls]


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration

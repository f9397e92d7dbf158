"""The messages of one generation's calls: what begins it, what goes on with it, what ends it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from baton.prompts import prompt_of
from baton.request import (
    MAX_SAMPLE_COUNT,
    ChatPrompt,
    OutputOptions,
    Prompt,
    ResumeOptions,
    Sampling,
    StopConditions,
    TextPrompt,
)
from baton.request_proto import chat_to_proto, request_to_proto
from baton.resuming import Continuity
from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2


class GenerateOptions(TypedDict, total=False):
    """What may be said of a generation besides its prompt; see ``proto/baton/v1/generation.proto`` for the ranges."""

    model: str
    sampling: Sampling | None
    stop: StopConditions | None
    output: OutputOptions | None
    priority: int
    session_id: str
    correlation_id: str
    tenant: str
    sample_count: int
    resume: bool | ResumeOptions | None
    """True, or for how long the server waits for us: the client attaches again by itself after a cut."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A generation, as it is asked for."""

    message: pb.GenerateRequest = field(repr=False)
    timeout_s: float
    sample_count: int
    is_resumable: bool
    wants_token_ids: bool


def checked_timeout(timeout: float) -> float:
    """Raises ValueError: a call without an end is never right."""
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout must be positive and finite seconds, not {timeout}")
    return timeout


def asked(prompt: str | Sequence[int] | Prompt, timeout: float, options: GenerateOptions) -> Asked:
    """Raises ``ValueError`` for a timeout that is none, and for numbers that no message can carry."""
    checked_timeout(timeout)
    resume = options.get("resume")
    resume_options = ResumeOptions() if resume is True else resume or None
    output = options.get("output")
    message = request_to_proto(
        prompt_of(prompt),
        model=options.get("model", ""),
        sampling=options.get("sampling"),
        stop=options.get("stop"),
        output=output,
        priority=options.get("priority", 0),
        session_id=options.get("session_id", ""),
        correlation_id=options.get("correlation_id", ""),
        tenant=options.get("tenant", ""),
        sample_count=options.get("sample_count", 1),
        resume=resume_options,
    )
    wants_token_ids = output is not None and output.wants_token_ids
    if resume_options is not None and not wants_token_ids:
        # Another router can go on from token ids alone.
        message.output.content = pb.OutputOptions.CONTENT_BOTH
    # More than the server would ever draw is refused there; here it must not become a list as long.
    sample_count = min(max(1, options.get("sample_count", 1)), 16 * MAX_SAMPLE_COUNT)
    return Asked(message, timeout, sample_count, resume_options is not None, wants_token_ids)


def resume_to_proto(request: pb.GenerateRequest, state: Continuity) -> pb.ResumeGenerateRequest:
    """What goes on with ``request``, here or on another router."""
    indices = state.next_token_indices
    is_one = len(indices) == 1
    return pb.ResumeGenerateRequest(
        resume_token=state.resume_token,
        next_token_index=indices[0] if is_one else 0,
        next_token_indices=() if is_one else indices,
        tenant=request.tenant,
        continuation=pb.Continuation(request=request, samples=[pb.TokenIds(ids=ids) for ids in state.token_ids]),
    )


def cancel_to_proto(resume_token: str, tenant: str) -> pb.CancelGenerationRequest:
    return pb.CancelGenerationRequest(resume_token=resume_token, tenant=tenant)


def count_to_proto(prompt: str | TextPrompt | ChatPrompt, model: str) -> model_pb2.CountTokensRequest:
    match prompt:
        case ChatPrompt():
            return model_pb2.CountTokensRequest(model=model, chat=chat_to_proto(prompt))
        case TextPrompt(text) | str(text):
            return model_pb2.CountTokensRequest(model=model, text=text)


def tokenize_to_proto(
    prompt: str | TextPrompt | ChatPrompt, *, model: str, add_special_tokens: bool
) -> model_pb2.TokenizeRequest:
    message = model_pb2.TokenizeRequest(model=model)
    match prompt:
        case ChatPrompt():
            message.chat.CopyFrom(chat_to_proto(prompt))
        case TextPrompt(text) | str(text):
            message.text = text
    if not add_special_tokens:
        message.add_special_tokens = False
    return message


def detokenize_to_proto(
    token_ids: Sequence[int], *, model: str, keep_special_tokens: bool
) -> model_pb2.DetokenizeRequest:
    return model_pb2.DetokenizeRequest(
        model=model, token_ids=pb.TokenIds(ids=token_ids), keep_special_tokens=keep_special_tokens
    )

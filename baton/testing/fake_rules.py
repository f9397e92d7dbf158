"""What a fake Baton refuses: the rules of the public API that need no model, so that a wrong request fails in the
tests of whoever sends it, and not only in front of a server. Pure.

Fewer than the server has (its own are next to its validation); none that it has not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from baton.errors import FieldViolation, invalid_request, model_not_found, prompt_too_long
from baton.request import (
    MAX_BIAS,
    MAX_CHUNK_TOKEN_COUNT,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SAMPLE_COUNT,
    MAX_TOP_LOGPROB_COUNT,
    MIN_REPETITION_PENALTY,
    ChatPrompt,
    GenerateRequest,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)
from baton.structures import structure_problem
from baton.testing.fake_script import VOCAB_SIZE

_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_request(request: GenerateRequest, *, model: str, max_context_token_count: int, prompt_length: int) -> None:
    """Raises INVALID_REQUEST with every broken rule, MODEL_NOT_FOUND or PROMPT_TOO_LONG."""
    if request.model and request.model != model:
        raise model_not_found(request.model, [model])
    violations = [*_prompt(request), *_sampling(request), *_stop(request), *_output(request), *_rest(request)]
    if violations:
        raise invalid_request(violations)
    if prompt_length > max_context_token_count - 1:
        raise prompt_too_long(prompt_length, max_context_token_count - 1)


def _prompt(request: GenerateRequest) -> Iterator[FieldViolation]:
    match request.prompt:
        case TextPrompt(""):
            yield FieldViolation("prompt", "is empty; set text, token_ids or chat with at least one token")
        case TokenPrompt(token_ids):
            if not token_ids:
                yield FieldViolation("token_ids.ids", "is empty; give at least one token id")
            for index, token_id in enumerate(token_ids):
                if not 0 <= token_id < VOCAB_SIZE:
                    yield FieldViolation(
                        f"token_ids.ids[{index}]", f"is {token_id}; token ids are 0 to {VOCAB_SIZE - 1}"
                    )
                    break
        case ChatPrompt():
            yield from _chat(request.prompt)


def _chat(chat: ChatPrompt) -> Iterator[FieldViolation]:
    if not chat.messages:
        yield FieldViolation("chat.messages", "is empty; give at least one message")
    for index, message in enumerate(chat.messages):
        if not message.role:
            yield FieldViolation(f"chat.messages[{index}].role", 'is empty; say "system", "user" or "assistant"')
    names = [tool.name for tool in chat.tools]
    for index, tool in enumerate(chat.tools):
        if not _TOOL_NAME.fullmatch(tool.name):
            yield FieldViolation(f"chat.tools[{index}].name", "must be 1 to 64 letters, digits or any of _ -")
        if tool.parameters_json_schema and not _is_object(tool.parameters_json_schema):
            yield FieldViolation(f"chat.tools[{index}].parameters_json_schema", "must be a JSON object, or empty")
    if chat.tool_choice is ToolChoice.REQUIRED and not chat.tools:
        yield FieldViolation("chat.tool_choice.mode", "is REQUIRED without tools; give tools, or leave it out")
    if chat.tool_name and (chat.tool_choice is not ToolChoice.REQUIRED or chat.tool_name not in names):
        yield FieldViolation("chat.tool_choice.tool_name", "must be one of the tools, with mode REQUIRED, or empty")
    if chat.template_arguments_json and not _is_object(chat.template_arguments_json):
        yield FieldViolation("chat.template_arguments_json", "must be a JSON object, or empty")


def _sampling(request: GenerateRequest) -> Iterator[FieldViolation]:
    sampling = request.sampling
    # Written as "not inside", so that NaN is outside.
    for name, least, most in (
        ("temperature", 0.0, 2.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
        ("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    ):
        value = getattr(sampling, name)
        if not least <= value <= most:
            yield FieldViolation(f"sampling.{name}", f"is {value:g}; must be {least:g} to {most:g}")
    if not 0.0 < sampling.top_p <= 1.0:
        yield FieldViolation("sampling.top_p", f"is {sampling.top_p:g}; must be greater than 0 and at most 1")
    if sampling.top_k < 0:
        yield FieldViolation("sampling.top_k", f"is {sampling.top_k}; must be 1 or more, or 0 to keep all")
    if sampling.seed is not None and sampling.seed < 0:
        yield FieldViolation("sampling.seed", f"is {sampling.seed}; must be 0 or more, or absent")
    for index, (_, bias) in enumerate(sampling.logit_bias):
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            yield FieldViolation(
                f"sampling.logit_bias[{index}].bias", f"is {bias:g}; must be {-MAX_BIAS:g} to {MAX_BIAS:g}"
            )
    if sampling.structure is not None:
        problem = structure_problem(sampling.structure)
        if problem is not None:
            yield FieldViolation(f"sampling.structure.{sampling.structure.kind.value}", problem)
        if request.stop.ignore_eos:
            yield FieldViolation("stop.ignore_eos", "is set with sampling.structure; leave one out")


def _stop(request: GenerateRequest) -> Iterator[FieldViolation]:
    stop = request.stop
    most = stop.max_output_token_count
    if most is not None and most < 1:
        yield FieldViolation("stop.max_output_token_count", f"is {most}; must be at least 1, or absent")
    if stop.min_output_token_count < 0 or (most is not None and stop.min_output_token_count > max(1, most)):
        yield FieldViolation(
            "stop.min_output_token_count",
            f"is {stop.min_output_token_count}; must be 0 to max_output_token_count",
        )
    if len(stop.stop_sequences) > 16:
        yield FieldViolation("stop.stop_sequences", f"has {len(stop.stop_sequences)} sequences; at most 16")
    for index, sequence in enumerate(stop.stop_sequences[:16]):
        if not 1 <= len(sequence.encode()) <= 256:
            yield FieldViolation(f"stop.stop_sequences[{index}]", "must have 1 to 256 bytes")


def _output(request: GenerateRequest) -> Iterator[FieldViolation]:
    output = request.output
    if output.max_chunk_token_count < 1:
        yield FieldViolation(
            "output.max_chunk_token_count",
            f"is {output.max_chunk_token_count}; must be 1 or more (above {MAX_CHUNK_TOKEN_COUNT} means "
            f"{MAX_CHUNK_TOKEN_COUNT}), or absent",
        )
    for name in ("top_logprob_count", "prompt_logprob_count"):
        value = getattr(output, name)
        if value is not None and not 0 <= value <= MAX_TOP_LOGPROB_COUNT:
            yield FieldViolation(f"output.{name}", f"is {value}; must be 0 to {MAX_TOP_LOGPROB_COUNT}, or absent")


def _rest(request: GenerateRequest) -> Iterator[FieldViolation]:
    if not -100 <= request.priority <= 100:
        yield FieldViolation("priority", f"is {request.priority}; must be -100 to 100")
    for name, value in (("session_id", request.session_id), ("correlation_id", request.correlation_id)):
        if (size := len(value.encode())) > 128:
            yield FieldViolation(name, f"has {size} bytes; at most 128")
    if request.tenant and not _TENANT.fullmatch(request.tenant):
        said = f"has {len(request.tenant)} characters; must be 1 to 64 letters, digits or any of _ . -, or absent"
        yield FieldViolation("tenant", said)
    if not 1 <= request.sample_count <= MAX_SAMPLE_COUNT:
        yield FieldViolation("sample_count", f"is {request.sample_count}; must be 1 to {MAX_SAMPLE_COUNT}")
    elif request.sample_count > 1 and request.sampling.is_greedy:
        yield FieldViolation("sample_count", f"is {request.sample_count} at temperature 0; samples would be one")
    if request.resume is not None:
        if request.resume.grace_s is not None and not request.resume.grace_s > 0:
            yield FieldViolation("resume.grace", f"is {request.resume.grace_s:g} s; must be more than 0, or absent")
        if request.output.echo_prompt:
            yield FieldViolation("output.echo_prompt", "is set with resume; leave one out")
        if request.output.prompt_logprob_count is not None:
            yield FieldViolation("output.prompt_logprob_count", "is set with resume; leave one out")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False

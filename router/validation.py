"""Says everything that is wrong with a request, before it costs anything.

Pure. Owns the public API's ranges; what depends on the model (vocabulary, context) comes in as ``ModelLimits``.
Every broken rule is reported, each with the field, the value, the bound and what to do. Values of text fields
are never repeated, only their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.errors import FieldViolation, invalid_request, model_not_found, prompt_too_long
from baton.request import (
    ChatPrompt,
    GenerateRequest,
    OutputOptions,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenPrompt,
)

MAX_TEMPERATURE = 2.0
MAX_STOP_SEQUENCE_COUNT = 16
MAX_STOP_SEQUENCE_BYTES = 256
MAX_STOP_TOKEN_COUNT = 64
MAX_ID_BYTES = 128
MAX_PRIORITY = 100
MAX_SEED = 2**63 - 1
MAX_MESSAGE_COUNT = 1024
MAX_ROLE_BYTES = 64
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model can take."""

    model: str
    vocab_size: int
    max_context_token_count: int

    @property
    def max_prompt_token_count(self) -> int:
        """One token of the context is for the answer."""
        return self.max_context_token_count - 1


def check(request: GenerateRequest, limits: ModelLimits, also: Sequence[FieldViolation] = ()) -> None:
    """Raises INVALID_REQUEST with every broken rule (``also``: those found while decoding the message),
    MODEL_NOT_FOUND, or PROMPT_TOO_LONG for a token prompt."""
    if request.model and request.model != limits.model:
        raise model_not_found(_shown(request.model), [limits.model])
    violations = [*also, *violations_of(request, limits)]
    if violations:
        raise invalid_request(violations)
    if isinstance(request.prompt, TokenPrompt):
        check_prompt_length(len(request.prompt.token_ids), limits)


def check_prompt_length(token_count: int, limits: ModelLimits) -> None:
    """Raises PROMPT_TOO_LONG, or INVALID_REQUEST for a prompt that tokenised to nothing."""
    if token_count == 0:
        raise invalid_request([FieldViolation("prompt", "has no tokens; it must have at least one")])
    if token_count > limits.max_prompt_token_count:
        raise prompt_too_long(token_count, limits.max_prompt_token_count)


def resolved_output_token_count(asked: int | None, prompt_token_count: int, limits: ModelLimits) -> int:
    """How many tokens the answer may have: what was asked for, or what the context has left if that is less."""
    left = limits.max_context_token_count - prompt_token_count
    return left if asked is None else min(asked, left)


def violations_of(request: GenerateRequest, limits: ModelLimits) -> list[FieldViolation]:
    """Every broken rule, in the order of the fields."""
    return [
        *_prompt(request, limits),
        *_sampling(request.sampling),
        *_stop(request.stop, limits),
        *_output(request.output),
        *_rest(request),
    ]


def _prompt(request: GenerateRequest, limits: ModelLimits) -> Iterator[FieldViolation]:
    match request.prompt:
        case TextPrompt(text):
            if not text:
                yield FieldViolation("prompt", "is empty; set text, token_ids or chat with at least one token")
        case TokenPrompt(token_ids):
            if not token_ids:
                yield FieldViolation("token_ids.ids", "is empty; give at least one token id")
            elif min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
                yield _outside_vocabulary("token_ids.ids", token_ids, limits)
        case ChatPrompt(messages):
            if not messages:
                yield FieldViolation("chat.messages", "is empty; give at least one message")
            if len(messages) > MAX_MESSAGE_COUNT:
                yield FieldViolation(
                    "chat.messages",
                    f"has {len(messages)} messages; at most {MAX_MESSAGE_COUNT}. Merge or drop old ones.",
                )
            for index, message in enumerate(messages[:MAX_MESSAGE_COUNT]):
                if not message.role:
                    yield FieldViolation(
                        f"chat.messages[{index}].role", 'is empty; say "system", "user" or "assistant"'
                    )
                elif (size := len(message.role.encode())) > MAX_ROLE_BYTES:
                    yield FieldViolation(
                        f"chat.messages[{index}].role", f"has {size} bytes; at most {MAX_ROLE_BYTES}"
                    )


def _sampling(sampling: Sampling) -> Iterator[FieldViolation]:
    # Written as "not inside", so that NaN, which is neither above nor below, is outside.
    if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:
        yield FieldViolation(
            "sampling.temperature",
            f"is {_number(sampling.temperature)}; must be 0 to {MAX_TEMPERATURE:g}, where 0 is greedy",
        )
    if not 0.0 < sampling.top_p <= 1.0:
        yield FieldViolation(
            "sampling.top_p", f"is {_number(sampling.top_p)}; must be greater than 0 and at most 1, where 1 keeps all"
        )
    if sampling.top_k < 0:
        yield FieldViolation("sampling.top_k", f"is {sampling.top_k}; must be 1 or more, or 0 to keep all")
    if not 0.0 <= sampling.min_p <= 1.0:
        yield FieldViolation("sampling.min_p", f"is {_number(sampling.min_p)}; must be 0 to 1, where 0 drops none")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        yield FieldViolation(
            "sampling.seed", f"is {sampling.seed}; must be 0 to {MAX_SEED}, or absent for a draw of its own"
        )


def _stop(stop: StopConditions, limits: ModelLimits) -> Iterator[FieldViolation]:
    if stop.max_output_token_count is not None and stop.max_output_token_count < 1:
        yield FieldViolation(
            "stop.max_output_token_count",
            f"is {stop.max_output_token_count}; must be at least 1, or absent for what the context has left",
        )
    if len(stop.stop_sequences) > MAX_STOP_SEQUENCE_COUNT:
        yield FieldViolation(
            "stop.stop_sequences", f"has {len(stop.stop_sequences)} sequences; at most {MAX_STOP_SEQUENCE_COUNT}"
        )
    for index, sequence in enumerate(stop.stop_sequences[:MAX_STOP_SEQUENCE_COUNT]):
        size = len(sequence.encode())
        if not 1 <= size <= MAX_STOP_SEQUENCE_BYTES:
            yield FieldViolation(
                f"stop.stop_sequences[{index}]", f"has {size} bytes; must have 1 to {MAX_STOP_SEQUENCE_BYTES}"
            )
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_COUNT:
        yield FieldViolation(
            "stop.stop_token_ids", f"has {len(stop.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_COUNT}"
        )
    elif any(not 0 <= token_id < limits.vocab_size for token_id in stop.stop_token_ids):
        yield _outside_vocabulary("stop.stop_token_ids", stop.stop_token_ids, limits)


def _output(output: OutputOptions) -> Iterator[FieldViolation]:
    if output.max_chunk_token_count < 1:
        yield FieldViolation(
            "output.max_chunk_token_count",
            f"is {output.max_chunk_token_count}; must be at least 1, or absent for the default",
        )


def _rest(request: GenerateRequest) -> Iterator[FieldViolation]:
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        yield FieldViolation("priority", f"is {request.priority}; must be -{MAX_PRIORITY} to {MAX_PRIORITY}")
    for name, value in (("session_id", request.session_id), ("correlation_id", request.correlation_id)):
        if (size := len(value.encode())) > MAX_ID_BYTES:
            yield FieldViolation(name, f"has {size} bytes; at most {MAX_ID_BYTES}")


def _outside_vocabulary(field: str, token_ids: Sequence[int], limits: ModelLimits) -> FieldViolation:
    outside = [index for index, token_id in enumerate(token_ids) if not 0 <= token_id < limits.vocab_size]
    more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
    return FieldViolation(
        f"{field}[{outside[0]}]",
        f"is {token_ids[outside[0]]}; token ids of {limits.model} are 0 to {limits.vocab_size - 1}{more}",
    )


def _number(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:g}"


def _shown(name: str) -> str:
    """A name as an error may repeat it: short and printable."""
    return "".join(char if char.isprintable() else "?" for char in name[:MAX_ID_BYTES])

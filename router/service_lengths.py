"""How long a message's lists are, looked at before anything is made of them.

Turning a list into our own objects takes about a microsecond an element, on the event loop: of a message as large as
the server takes it would stop every other call for seconds. So a list that is too long is refused by its count alone,
and nothing else is said of that message. Small messages cannot do that: of those validation.py says all that is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from baton.errors import FieldViolation, invalid_request, prompt_too_long
from baton.request import (
    MAX_BAD_SEQUENCE_COUNT,
    MAX_BAD_SEQUENCE_LENGTH,
    MAX_BIAS_COUNT,
    MAX_CHOICE_COUNT,
    MAX_SAMPLE_COUNT,
)
from baton.v1 import generation_pb2 as pb
from router.chats.validation_chat import MAX_CALL_COUNT, MAX_TOOL_COUNT
from router.validation import (
    MAX_MESSAGE_COUNT,
    MAX_STOP_SEQUENCE_COUNT,
    MAX_STOP_TOKEN_COUNT,
    ModelLimits,
)

SMALL_BYTES = 4096
MAX_CALLS_OF_CHAT = 4096
"""Of all messages of a conversation together."""

_List = tuple[str, Sequence[object], int]


def check_lengths(message: pb.GenerateRequest, limits: Callable[[], ModelLimits]) -> None:
    """Raises INVALID_REQUEST with every list that is too long, or PROMPT_TOO_LONG."""
    if message.ByteSize() <= SMALL_BYTES:
        return
    most = limits()
    _refuse_longer(_lists(message, most))
    check_id_count(message.token_ids.ids, most)


def check_continuation_lengths(message: pb.ResumeGenerateRequest, limits: Callable[[], ModelLimits]) -> None:
    """The same of a request to go on: of the request it brings, and of what came of it so far."""
    if message.ByteSize() <= SMALL_BYTES:
        return
    most = limits()
    samples = message.continuation.samples
    _refuse_longer([
        ("next_token_indices", message.next_token_indices, MAX_SAMPLE_COUNT),
        ("continuation.samples", samples, MAX_SAMPLE_COUNT),
        *(
            (f"continuation.samples[{index}].ids", each.ids, most.max_context_token_count)
            for index, each in enumerate(samples[:MAX_SAMPLE_COUNT])
        ),
        *((f"continuation.request.{field}", items, bound) for field, items, bound in
          _lists(message.continuation.request, most)),
    ])  # fmt: skip
    check_id_count(message.continuation.request.token_ids.ids, most)


def check_chat_lengths(chat: pb.Chat) -> None:
    """The same of a conversation alone."""
    if chat.ByteSize() > SMALL_BYTES:
        _refuse_longer(_chat_lists(chat))


def check_id_count(token_ids: Sequence[int], limits: ModelLimits) -> None:
    """Raises PROMPT_TOO_LONG."""
    if len(token_ids) > limits.max_prompt_token_count:
        raise prompt_too_long(len(token_ids), limits.max_prompt_token_count)


def _lists(message: pb.GenerateRequest, limits: ModelLimits) -> Iterator[_List]:
    sampling, stop = message.sampling, message.stop
    bad = sampling.bad_token_sequences
    yield from _chat_lists(message.chat)
    yield "sampling.logit_bias", sampling.logit_bias, MAX_BIAS_COUNT
    # Each once: there can be no more than the vocabulary has.
    yield "sampling.allowed_token_ids.ids", sampling.allowed_token_ids.ids, limits.vocab_size
    yield "sampling.bad_token_sequences", bad, MAX_BAD_SEQUENCE_COUNT
    for index, each in enumerate(bad[:MAX_BAD_SEQUENCE_COUNT]):
        yield f"sampling.bad_token_sequences[{index}].ids", each.ids, MAX_BAD_SEQUENCE_LENGTH
    yield "sampling.structure.choice.texts", sampling.structure.choice.texts, MAX_CHOICE_COUNT
    yield "stop.stop_sequences", stop.stop_sequences, MAX_STOP_SEQUENCE_COUNT
    yield "stop.stop_token_ids", stop.stop_token_ids, MAX_STOP_TOKEN_COUNT


def _chat_lists(chat: pb.Chat) -> Iterator[_List]:
    yield "chat.messages", chat.messages, MAX_MESSAGE_COUNT
    yield "chat.tools", chat.tools, MAX_TOOL_COUNT
    if len(chat.messages) > MAX_MESSAGE_COUNT:
        return
    for index, message in enumerate(chat.messages):
        yield f"chat.messages[{index}].tool_calls", message.tool_calls, MAX_CALL_COUNT
    calls = range(sum(len(message.tool_calls) for message in chat.messages))
    yield "chat.messages.tool_calls", calls, MAX_CALLS_OF_CHAT


def _refuse_longer(lists: Iterator[_List] | Sequence[_List]) -> None:
    violations = [
        FieldViolation(field, f"has {len(items)} entries; at most {bound}. Leave the others out.")
        for field, items, bound in lists
        if len(items) > bound
    ]
    if violations:
        raise invalid_request(violations)

"""Lists that are too long are refused by their count, before anything is made of their elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import message_factory

from baton.errors import BatonError, Reason
from baton.v1 import generation_pb2 as pb
from router.service_lengths import check_chat_lengths, check_continuation_lengths, check_lengths
from router.validation import ModelLimits

LIMITS = ModelLimits("tiny", vocab_size=400, max_context_token_count=2048)
MANY = 6000
"""Elements of a list: more than any may have."""


def lists_of(descriptor: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every list in a message of that kind."""
    for field in descriptor.fields:
        path = (*before, field.name)
        if field.is_repeated:
            yield path
        if field.message_type is not None and field.message_type.file.name.startswith("baton/"):
            yield from lists_of(field.message_type, path)


def with_many(message: Any, path: tuple[str, ...]) -> Any:
    """``message`` with a list of ``MANY`` at ``path``, and one element in each list on the way there."""
    at = message
    for name in path[:-1]:
        part = getattr(at, name)
        field = at.DESCRIPTOR.fields_by_name[name]
        at = part.add() if field.is_repeated else part
    field = at.DESCRIPTOR.fields_by_name[path[-1]]
    if field.message_type is not None:
        getattr(at, path[-1]).MergeFrom([message_factory.GetMessageClass(field.message_type)()] * MANY)
    else:
        getattr(at, path[-1]).extend(["x" if field.type == field.TYPE_STRING else 5] * MANY)
    return message


@pytest.mark.parametrize("path", list(lists_of(pb.GenerateRequest.DESCRIPTOR)), ids=".".join)
def test_no_list_of_a_request_is_longer_than_its_bound(path: tuple[str, ...]) -> None:
    with pytest.raises(BatonError) as refused:
        check_lengths(with_many(pb.GenerateRequest(), path), lambda: LIMITS)
    if path[0] == "token_ids":
        assert refused.value.reason is Reason.PROMPT_TOO_LONG
        return
    assert refused.value.reason is Reason.INVALID_REQUEST
    named = refused.value.violations[0]
    assert [part.partition("[")[0] for part in named.field.split(".")] == list(path)
    assert f"has {MANY} entries; at most " in named.description


@pytest.mark.parametrize("path", list(lists_of(pb.ResumeGenerateRequest.DESCRIPTOR)), ids=".".join)
def test_no_list_of_a_request_to_go_on_is_either(path: tuple[str, ...]) -> None:
    with pytest.raises(BatonError) as refused:
        check_continuation_lengths(with_many(pb.ResumeGenerateRequest(), path), lambda: LIMITS)
    assert refused.value.reason in (Reason.INVALID_REQUEST, Reason.PROMPT_TOO_LONG)


@pytest.mark.parametrize("path", list(lists_of(pb.Chat.DESCRIPTOR)), ids=".".join)
def test_no_list_of_a_conversation_is_either(path: tuple[str, ...]) -> None:
    with pytest.raises(BatonError) as refused:
        check_chat_lengths(with_many(pb.Chat(), path))
    assert refused.value.violations[0].field.startswith("chat.")


def test_calls_are_counted_over_all_messages_of_a_conversation() -> None:
    each = pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall()] * 128)
    check_chat_lengths(pb.Chat(messages=[each] * 32))
    with pytest.raises(BatonError) as refused:
        check_chat_lengths(pb.Chat(messages=[each] * 33))
    assert [violation.field for violation in refused.value.violations] == ["chat.messages.tool_calls"]


def test_lists_as_long_as_they_may_be_pass() -> None:
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * 1024, tools=[pb.Tool(name="a")] * 128),
        sampling=pb.Sampling(
            logit_bias=[pb.TokenBias()] * 1024,
            allowed_token_ids=pb.TokenIds(ids=range(400)),
            bad_token_sequences=[pb.TokenIds(ids=range(16))] * 64,
        ),
        stop=pb.StopConditions(stop_sequences=["a"] * 16, stop_token_ids=range(64)),
    )
    assert request.ByteSize() > 4096
    check_lengths(request, lambda: LIMITS)
    check_lengths(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300] * 2047)), lambda: LIMITS)


def test_a_small_message_is_not_looked_at() -> None:
    def limits() -> ModelLimits:
        raise AssertionError("asked")

    check_lengths(pb.GenerateRequest(text="hello", stop=pb.StopConditions(stop_token_ids=range(65))), limits)

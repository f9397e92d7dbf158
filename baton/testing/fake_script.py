"""What a fake Baton says and what it was asked: values, and how an answer is cut into tokens. Pure.

One token is one character and its id the code point: every text has tokens, every count is a length, and two fakes
agree on both without a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from baton.errors import BatonError
from baton.request import (
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
    ToolCall,
    ToolCallDelta,
)

VOCAB_SIZE = 0x110000
"""Token ids are code points."""


@dataclass(frozen=True, slots=True)
class Scripted:
    """What one generation answers."""

    texts: tuple[tuple[str, ...], ...]
    """Of each sample, its chunks; a sample beyond them gets the last one's."""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reason: FinishReason | None = None
    """None: what fits: TOOL_CALLS with calls, MAX_OUTPUT_TOKENS where it is cut, otherwise STOP."""
    cached_prompt_token_count: int = 0
    delay_s: float = 0.0
    """Before anything."""
    chunk_delay_s: float = 0.0
    """Before each chunk."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one call."""

    after_token_count: int | None
    """Of this call's tokens. None: before the call is admitted."""
    error: BatonError | None
    """None: the connection is lost, or, with ``is_stall``, nothing more comes."""
    is_stall: bool = False
    method: str = ""
    """Whose call it is for, by its name in the API. Empty: Generate's or ResumeGenerate's, whichever comes first."""


@dataclass(slots=True)
class FakeCall:
    """A call that a fake got. Grows while it runs."""

    method: str
    """"Generate", "ResumeGenerate", "CancelGeneration", "GetModel", ..."""
    request: GenerateRequest | None = field(default=None, repr=False)
    """Of Generate, and of a resume its continuation's."""
    timeout_s: float | None = None
    """The caller's, less the way here. None: it set none."""
    resume_token: str = field(default="", repr=False)
    next_token_indices: tuple[int, ...] = ()
    """Of ResumeGenerate, one of each sample."""
    sent_token_count: int = 0
    is_over: bool = False
    was_left: bool = False
    """The caller went, or its deadline passed, before the end."""


@dataclass(frozen=True, slots=True)
class FakeToken:
    """One token of an answer, and what it shows."""

    token_id: int
    text: str = ""
    reasoning_text: str = ""
    delta: ToolCallDelta | None = None
    ends_chunk: bool = False


@dataclass(frozen=True, slots=True)
class FakeSample:
    """One sample, whole."""

    tokens: tuple[FakeToken, ...]
    reason: FinishReason
    matched_stop_sequence: str | None
    matched_stop_token_id: int | None
    tool_calls: tuple[ToolCall, ...]


def encode(text: str) -> tuple[int, ...]:
    return tuple(ord(char) for char in text)


def decode(token_ids: Sequence[int]) -> str:
    """Ids that are no characters (surrogates) are replaced."""
    return "".join("\ufffd" if 0xD800 <= each <= 0xDFFF else chr(each) for each in token_ids)


def rendered(prompt: Prompt) -> str:
    """As a model would read it."""
    match prompt:
        case TextPrompt(text):
            return text
        case TokenPrompt(token_ids):
            return decode(token_ids)
        case ChatPrompt(messages):
            return "".join(f"<{each.role}>{each.content}\n" for each in messages) + "<assistant>"


def echo_of(prompt: Prompt) -> str:
    """What a fake says of itself."""
    said = prompt.messages[-1].content if isinstance(prompt, ChatPrompt) else rendered(prompt)
    return f"You said: {said}"


def words(text: str) -> tuple[str, ...]:
    """The chunks of a text for which nobody said any: words, each with the blank before it."""
    found: list[str] = []
    for word in text.split(" "):
        found.append(word if not found else " " + word)
    return tuple(word for word in found if word)


def sample_of(script: Scripted, request: GenerateRequest, index: int, room: int) -> FakeSample:
    """``room``: tokens that the context has left for it."""
    chunks = script.texts[min(index, len(script.texts) - 1)]
    tokens = [*_reasoning(script.reasoning, request.prompt), *_texts(chunks), *_calls(script.tool_calls)]
    calls = script.tool_calls
    reason = script.reason or (FinishReason.TOOL_CALLS if calls else FinishReason.STOP)
    matched, matched_id = None, None
    text = "".join(token.text for token in tokens)
    found = [(at, stop) for stop in request.stop.stop_sequences if (at := text.find(stop)) >= 0]
    if found:
        at, matched = min(found)
        tokens = list(_stopped(tokens, at, matched))
        reason, calls = FinishReason.STOP, ()
    stops = frozenset(request.stop.stop_token_ids)
    for place, token in enumerate(tokens):
        if token.token_id in stops:
            matched, matched_id = None, token.token_id
            tokens = [*tokens[:place], FakeToken(token.token_id)]
            reason, calls = FinishReason.STOP, ()
            break
    asked = request.stop.max_output_token_count
    limit = room if asked is None else min(asked, room)
    if len(tokens) > limit:
        tokens = tokens[:limit]
        reason = FinishReason.CONTEXT_FULL if asked is None or asked > room else FinishReason.MAX_OUTPUT_TOKENS
        matched, matched_id, calls = None, None, ()
    return FakeSample(tuple(tokens), reason, matched, matched_id, calls)


def _reasoning(reasoning: str, prompt: Prompt) -> Iterator[FakeToken]:
    in_text = not isinstance(prompt, ChatPrompt) or prompt.keep_reasoning_in_text
    for chunk in words(reasoning):
        for place, char in enumerate(chunk):
            is_last = place == len(chunk) - 1
            yield FakeToken(ord(char), char if in_text else "", "" if in_text else char, ends_chunk=is_last)


def _texts(chunks: Sequence[str]) -> Iterator[FakeToken]:
    for chunk in chunks:
        for place, char in enumerate(chunk):
            yield FakeToken(ord(char), char, ends_chunk=place == len(chunk) - 1)


def _calls(calls: Sequence[ToolCall]) -> Iterator[FakeToken]:
    for index, call in enumerate(calls):
        head = ToolCallDelta(index, call.id, call.name)
        for place, char in enumerate(call.name):
            is_last = place == len(call.name) - 1
            yield FakeToken(ord(char), delta=head if is_last else None, ends_chunk=is_last)
        for place, char in enumerate(call.arguments_json):
            delta = ToolCallDelta(index, arguments_json=char)
            yield FakeToken(ord(char), delta=delta, ends_chunk=place == len(call.arguments_json) - 1)


def _stopped(tokens: Sequence[FakeToken], at: int, stop: str) -> Iterator[FakeToken]:
    """To the end of the stop sequence, which starts at ``at`` of the text and shows nothing."""
    shown_count = 0
    for token in tokens:
        is_cut = bool(token.text) and shown_count >= at
        shown_count += bool(token.text)
        yield replace(token, text="") if is_cut else token
        if shown_count == at + len(stop):
            return

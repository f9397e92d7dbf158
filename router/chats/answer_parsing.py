"""The stage between one answer and its caller where thinking and tool calls are taken out of the text.

Owns what becomes of tokens whose text a parser holds back: their pieces go out at once, with the text that is due, so
that counts and indices are what they were; the text comes later, at the latest in the one piece without tokens at the
end. Where the parsers run is ``parser_child.py``'s. Answers that need no parsing never come here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from baton.errors import BatonError, FieldViolation, deadline_exceeded, invalid_request
from baton.request import ChatPrompt, FinishReason, OutputOptions, Prompt, ToolCall, ToolCallDelta, ToolChoice
from baton.timeline import Phase
from router.answer import TextAnswer
from router.answering import Answer, Completed, Piece, RelayEvent, RoutedRequest
from router.chats.chat_abilities import ChatAbilities
from router.chats.tool_words import call_names, openai_tools
from router.chats.validation_chat import template_arguments

PUSH_TOKEN_COUNT = 64
"""Tokens that parsers read at a stretch. Each stretch has the deadline of one step, and between two of them others
get their turn: some parsers take longer for each token the longer the answer is, and a beginning may be a context."""

_STRUCTURE = "sampling.structure"


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How the answer to one chat is parsed."""

    uses_tools: bool
    uses_reasoning: bool
    is_required: bool = False
    """The answer was held to the tools' schemas: it is calls and nothing else, in JSON."""
    tools: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """In OpenAI's shape."""
    choice: Any = "auto"
    """In OpenAI's shape."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Some parsers ask them whether the model thinks."""


@dataclass(frozen=True, slots=True)
class WholeCall:
    name: str
    arguments_json: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Parsed:
    """What parsers made of some tokens. ``calls``: without ids. ``whole``: at the end, all calls of the answer."""

    text: str = field(repr=False)
    reasoning_text: str = field(repr=False)
    calls: tuple[ToolCallDelta, ...] = field(default=(), repr=False)
    whole: tuple[WholeCall, ...] = field(default=(), repr=False)


class Stream(Protocol):
    """One answer in a parser."""

    async def push(self, texts: Sequence[str], token_ids: Sequence[int]) -> Parsed: ...
    async def finish(self, text: str) -> Parsed: ...
    def close(self) -> None: ...


class Parsers(Protocol):
    """What this stage needs of ``parser_child.ParserChild``."""

    async def ready(self) -> None: ...
    def keeps_special_tokens(self, plan: AnswerPlan) -> bool: ...
    def open(
        self, plan: AnswerPlan, prompt_token_ids: Sequence[int], *, keeps_special_tokens: bool, deadline_at: float
    ) -> Stream: ...


def plan_of(prompt: Prompt, abilities: ChatAbilities) -> AnswerPlan | None:
    """None for an answer that is text and nothing else. ``prompt`` must have been checked (validation_chat.py)."""
    if not isinstance(prompt, ChatPrompt):
        return None
    is_required = prompt.tool_choice is ToolChoice.REQUIRED
    uses_tools = bool(prompt.tools) and prompt.tool_choice is not ToolChoice.NONE
    # A call that must be made is made from the first token on: there is no room for thinking before.
    uses_reasoning = bool(abilities.reasoning_parser) and not prompt.keep_reasoning_in_text and not is_required
    if not (uses_tools or uses_reasoning):
        return None
    choice: Any = "auto"
    if is_required:
        named = {"type": "function", "function": {"name": prompt.tool_name}}
        choice = named if prompt.tool_name else "required"
    return AnswerPlan(
        uses_tools=uses_tools,
        uses_reasoning=uses_reasoning,
        is_required=is_required,
        tools=openai_tools(prompt.tools) if uses_tools else (),
        choice=choice,
        template_arguments=template_arguments(prompt),
    )


class ParsedAnswer:
    """Satisfies ``answering.Answer``, and remembers which text each token completed until the stage has taken it."""

    def __init__(self, answer: TextAnswer, *, keeps_special_tokens: bool) -> None:
        """``keeps_special_tokens``: whether ``answer`` does."""
        self._answer = answer
        self.keeps_special_tokens = keeps_special_tokens
        self._texts: deque[str] = deque()

    def push(self, token_ids: tuple[int, ...]) -> Piece:
        pieces: list[Piece] = []
        for token_id in token_ids:
            piece = self._answer.push((token_id,))
            if not piece.token_ids:  # after its end
                break
            pieces.append(piece)
            self._texts.append(piece.text)
            if piece.matched_stop_sequence is not None:
                break
        if not pieces:
            return self._answer.push(())
        last = pieces[-1]
        return Piece(
            pieces[0].first_token_index,
            token_ids[: len(pieces)],
            "".join(piece.text for piece in pieces),
            last.matched_stop_sequence,
        )

    def flush(self) -> Piece:
        return self._answer.flush()

    def take(self, count: int) -> list[str]:
        """The texts of the next ``count`` tokens, in order; each is given once."""
        return [self._texts.popleft() for _ in range(count)]


def text_wanted(output: OutputOptions) -> OutputOptions:
    """Parsers read text, whether or not the caller does."""
    return replace(output, wants_text=True)


class AnswerParsing:
    """The stage, as the pipeline puts it in. One per process: of all long pieces one stretch is at the parsers."""

    def __init__(self, parsers: Parsers, abilities: ChatAbilities) -> None:
        self._parsers = parsers
        self._abilities = abilities
        self._long_piece = asyncio.Lock()

    def plan(self, prompt: Prompt) -> AnswerPlan | None:
        """See ``plan_of``."""
        return plan_of(prompt, self._abilities)

    async def ready(self) -> None:
        """Returns when answers can be parsed. Raises NO_WORKER."""
        await self._parsers.ready()

    def keeps_special_tokens(self, plan: AnswerPlan) -> bool:
        """Whether the text of this answer must have special tokens in it."""
        return self._parsers.keeps_special_tokens(plan)

    async def run(
        self,
        events: AsyncGenerator[RelayEvent, None],
        plan: AnswerPlan,
        answer: Answer,
        routed: RoutedRequest,
        *,
        deadline_at: float,
        sample_index: int = 0,
    ) -> AsyncGenerator[RelayEvent, None]:
        """The same events with text, thinking and calls apart.

        ``answer``: what makes the pieces of ``events``; made by ``Intake.answer`` for this plan. Every piece with
        tokens gives one piece with these tokens; there is at most one without, at the end. Raises what ``events``
        raises, and NO_WORKER, ATTEMPTS_EXHAUSTED, DEADLINE_EXCEEDED and INTERNAL of the parsers.
        """
        assert isinstance(answer, ParsedAnswer), "those of a plan are"
        names = _CallNames(call_names(routed.prompt_token_ids, sample_index))
        stream: Stream | None = None
        tail: Piece | None = None
        next_index = 0
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Piece) and not event.token_ids:
                        tail = event  # goes along with what the parsers still hold back
                        continue
                    if isinstance(event, Piece | Completed) and stream is None:
                        # Not before: while a request waits for its place, the process may be started again.
                        await self._ready_by(deadline_at)
                        stream = self._parsers.open(
                            plan,
                            routed.prompt_token_ids,
                            keeps_special_tokens=answer.keeps_special_tokens,
                            deadline_at=deadline_at,
                        )
                    match event:
                        case Piece():
                            assert stream is not None
                            next_index = event.first_token_index + event.token_count
                            texts = answer.take(event.token_count)
                            parsed = await self._pushed(stream, event, texts, deadline_at)
                            yield _piece(event, parsed, names)
                        case Completed():
                            assert stream is not None
                            parsed = await stream.finish("" if tail is None else tail.text)
                            if tail is not None or parsed.text or parsed.reasoning_text or parsed.calls:
                                yield _piece(tail or Piece(next_index, (), "", None), parsed, names)
                            yield _completed(event, parsed, names)
                        case _:
                            yield event
        except BatonError as error:
            if not plan.is_required:
                raise
            raise _of_the_tools(error) from error
        finally:
            if stream is not None:
                stream.close()

    async def _pushed(self, stream: Stream, piece: Piece, texts: Sequence[str], deadline_at: float) -> Parsed:
        """What parsers make of one piece, however long: a beginning may be a whole context."""
        token_ids = piece.token_ids
        if len(token_ids) <= PUSH_TOKEN_COUNT:  # nearly always
            return await stream.push(texts, token_ids)
        parts = []
        for first in range(0, len(token_ids), PUSH_TOKEN_COUNT):
            last = first + PUSH_TOKEN_COUNT
            async with self._turn(deadline_at, piece.first_token_index):
                parts.append(await stream.push(texts[first:last], token_ids[first:last]))
        return _joined(parts)

    @asynccontextmanager
    async def _turn(self, deadline_at: float, emitted_token_count: int) -> AsyncIterator[None]:
        """Long pieces take turns among themselves, so that whoever gets a token waits for one stretch of one of them
        and not of each. BEFORE a step's deadline begins: to wait here is no silence. Raises DEADLINE_EXCEEDED."""
        try:
            async with asyncio.timeout_at(deadline_at):
                await self._long_piece.acquire()
        except TimeoutError:
            raise deadline_exceeded(Phase.DECODE.value, emitted_token_count) from None
        try:
            yield
        finally:
            self._long_piece.release()

    async def _ready_by(self, deadline_at: float) -> None:
        """For an answer of which nothing was passed on yet, though its tokens come. Raises DEADLINE_EXCEEDED, too."""
        try:
            async with asyncio.timeout_at(deadline_at):
                await self._parsers.ready()
        except TimeoutError:
            raise deadline_exceeded(Phase.DECODE.value, 0) from None


def _joined(parts: Sequence[Parsed]) -> Parsed:
    """What parsers said of stretches that follow one another, as if they had been one."""
    calls: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    for call in (call for part in parts for call in part.calls):
        if calls and calls[-1].index == call.index and not call.name:
            arguments[-1].append(call.arguments_json)
        else:
            calls.append(call)
            arguments.append([call.arguments_json])
    return Parsed(
        text="".join(part.text for part in parts),
        reasoning_text="".join(part.reasoning_text for part in parts),
        calls=tuple(replace(call, arguments_json="".join(each)) for call, each in zip(calls, arguments, strict=True)),
    )


def _of_the_tools(error: BatonError) -> BatonError:
    """What an engine says against the structure of a required call, said of where the structure came from."""
    if not any(violation.field.startswith(_STRUCTURE) for violation in error.violations):
        return error
    return invalid_request(
        [
            FieldViolation("chat.tools", f"become, with REQUIRED, a structure that {violation.description}")
            if violation.field.startswith(_STRUCTURE)
            else violation
            for violation in error.violations
        ]
    )


class _CallNames:
    """The ids of one answer's calls: each said once, in the first piece of its call."""

    def __init__(self, of: Callable[[int], str]) -> None:
        self.of = of
        self._named: set[int] = set()

    def named(self, call: ToolCallDelta) -> ToolCallDelta:
        if call.index in self._named:
            return call
        self._named.add(call.index)
        return replace(call, id=self.of(call.index))


def _piece(piece: Piece, parsed: Parsed, names: _CallNames) -> Piece:
    calls = tuple(names.named(call) for call in parsed.calls)
    return replace(piece, text=parsed.text, reasoning_text=parsed.reasoning_text, tool_calls=calls)


def _completed(completed: Completed, parsed: Parsed, names: _CallNames) -> Completed:
    calls = tuple(
        ToolCall(names.of(index), each.name, each.arguments_json) for index, each in enumerate(parsed.whole)
    )
    # An answer that was cut short does not wait for what its calls say, though some may be whole.
    is_called = bool(calls) and completed.reason is FinishReason.STOP
    return replace(completed, reason=FinishReason.TOOL_CALLS if is_called else completed.reason, tool_calls=calls)

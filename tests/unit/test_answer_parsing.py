"""The parsing stage: tokens and their numbers stay what they were, whatever a parser does with their text."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import pytest

from baton.errors import BatonError, FieldViolation, Reason, internal, invalid_request
from baton.request import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    Handover,
    OutputOptions,
    PlacementMode,
    TextPrompt,
    Tool,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from baton.testing import in_virtual_time
from baton.timeline import Timeline
from baton.transfer_report import TransferReport
from router.answer import TextAnswer
from router.answering import Admitted, Completed, PhaseReport, Piece, RelayEvent, RoutedRequest
from router.chats.answer_parsing import (
    PUSH_TOKEN_COUNT,
    AnswerParsing,
    AnswerPlan,
    Parsed,
    ParsedAnswer,
    WholeCall,
    plan_of,
)
from router.chats.chat_abilities import ChatAbilities
from router.tiny_model import tiny_tokenizer
from router.tokenizer import Tokenizer

TINY = Tokenizer(tiny_tokenizer(), vocab_size=400, eos_token_ids=(2,))
ROUTED = RoutedRequest("gen-1", (5, 6, 7), 100)
PLAN = AnswerPlan(uses_tools=True, uses_reasoning=False)
BOTH = ChatAbilities(has_chat=True, knows_tools=True, tool_parser="hermes", reasoning_parser="qwen3")
USER = (ChatMessage("user", "x"),)


@dataclass
class ScriptedStream:
    """A parser that holds everything in brackets back, and gives it as one call at the closing bracket."""

    fails_at: int | None = None
    pushed: list[tuple[list[str], list[int]]] = field(default_factory=list)
    is_closed: bool = False
    finished_with: str | None = None
    _held: str | None = None
    _calls: list[str] = field(default_factory=list)

    async def push(self, texts: Sequence[str], token_ids: Sequence[int]) -> Parsed:
        if self.fails_at == len(self.pushed):
            raise internal("scripted")
        self.pushed.append((list(texts), list(token_ids)))
        return self._parsed("".join(texts))

    async def finish(self, text: str) -> Parsed:
        self.finished_with = text
        parsed = self._parsed(text)
        left, self._held = "" if self._held is None else "[" + self._held, None
        whole = tuple(WholeCall(name, "{}") for name in self._calls)
        return Parsed(parsed.text + left, "", parsed.calls, whole)

    def close(self) -> None:
        self.is_closed = True

    def _parsed(self, text: str) -> Parsed:
        said, calls = "", []
        for char in text:
            if self._held is not None and char == "]":
                calls.append(ToolCallDelta(len(self._calls), "", self._held, "{"))
                calls.append(ToolCallDelta(len(self._calls), "", "", "}"))
                self._calls.append(self._held)
                self._held = None
            elif self._held is not None:
                self._held += char
            elif char == "[":
                self._held = ""
            else:
                said += char
        return Parsed(said, "", tuple(calls))


@dataclass
class ScriptedParsers:
    stream: ScriptedStream
    prompts: list[Sequence[int]] = field(default_factory=list)
    ready_after_s: float = 0.0

    async def ready(self) -> None:
        if self.ready_after_s:
            await asyncio.sleep(self.ready_after_s)

    def keeps_special_tokens(self, plan: AnswerPlan) -> bool:
        return True

    def open(
        self, plan: AnswerPlan, prompt_token_ids: Sequence[int], *, keeps_special_tokens: bool, deadline_at: float
    ) -> ScriptedStream:
        self.prompts.append(prompt_token_ids)
        return self.stream


def completed(count: int, reason: FinishReason = FinishReason.STOP) -> Completed:
    timeline = Timeline(0.0)
    timeline.close(1.0)
    report = PhaseReport(
        timeline.durations(), TransferReport(), Handover.NONE, "p", "d", 1, PlacementMode.SPLIT, "split"
    )
    return Completed(reason, None, None, Usage(3, count, 0), report)


def new_answer(stop_sequences: Sequence[str] = ()) -> ParsedAnswer:
    answer = TextAnswer(TINY, OutputOptions(), stop_sequences=stop_sequences, keeps_special_tokens=True)
    return ParsedAnswer(answer, keeps_special_tokens=True)


async def events_of(
    answer: ParsedAnswer, chunks: Sequence[Sequence[int]], reason: FinishReason = FinishReason.STOP
) -> AsyncGenerator[RelayEvent, None]:
    yield Admitted("gen-1")
    count = 0
    for chunk in chunks:
        piece = answer.push(tuple(chunk))
        count += piece.token_count
        yield piece
    tail = answer.flush()
    if tail.text:
        yield tail
    yield completed(count, reason)


async def run(
    text: str, sizes: Sequence[int] = (), *, stop_sequences: Sequence[str] = (), stream: ScriptedStream | None = None
) -> tuple[list[RelayEvent], ScriptedStream]:
    stream = stream or ScriptedStream()
    ids = list(TINY.encode(text, add_special_tokens=False))
    chunks = []
    for size in [*sizes, *[1] * len(ids)]:
        if ids:
            chunks.append(ids[:size])
            del ids[:size]
    answer = new_answer(stop_sequences)
    stage = AnswerParsing(ScriptedParsers(stream), BOTH)
    async with aclosing(stage.run(events_of(answer, chunks), PLAN, answer, ROUTED, deadline_at=1e9)) as events:
        return [event async for event in events], stream


def pieces_of(events: Sequence[RelayEvent]) -> list[Piece]:
    return [event for event in events if isinstance(event, Piece)]


def end_of(events: Sequence[RelayEvent]) -> Completed:
    last = events[-1]
    assert isinstance(last, Completed)
    return last


async def test_every_token_goes_out_with_its_number_though_its_text_is_held_back() -> None:
    text = "Time: [clock] and [the weather] now."
    events, stream = await run(text)
    pieces = pieces_of(events)
    ids = TINY.encode(text, add_special_tokens=False)
    assert [token_id for piece in pieces for token_id in piece.token_ids] == list(ids)
    count = 0
    for piece in pieces:
        assert piece.first_token_index == count
        count += piece.token_count
    assert "".join(piece.text for piece in pieces) == "Time:  and  now."
    assert stream.is_closed


async def test_calls_are_named_once_and_the_same_in_pieces_and_whole() -> None:
    events, _ = await run("[clock][weather]", [3])
    deltas = [call for piece in pieces_of(events) for call in piece.tool_calls]
    first = {call.index: call for call in deltas if call.id}
    end = end_of(events)
    assert end.reason is FinishReason.TOOL_CALLS
    assert [(first[index].id, first[index].name) for index in (0, 1)] == [
        (call.id, call.name) for call in end.tool_calls
    ]
    assert len({call.id for call in end.tool_calls}) == 2
    assert [call.id for call in deltas if call.index == 0][1:] == [""]


async def test_an_answer_gone_on_with_elsewhere_names_and_splits_its_calls_the_same() -> None:
    once, _ = await run("Well, [clock] it is [weather]", [1] * 50)
    again, _ = await run("Well, [clock] it is [weather]", [12])
    assert end_of(once).tool_calls == end_of(again).tool_calls
    late = [piece for piece in pieces_of(once) if piece.first_token_index >= 12]
    assert late == [piece for piece in pieces_of(again) if piece.first_token_index >= 12]


async def test_tokens_reach_the_parser_each_with_its_own_text() -> None:
    _, stream = await run("Time: [clock] 👍!", [4, 2])
    assert [len(ids) for _, ids in stream.pushed[:2]] == [4, 2]
    assert all(len(texts) == len(ids) for texts, ids in stream.pushed)
    assert "".join(text for texts, _ in stream.pushed for text in texts) == "Time: [clock] 👍!"


async def test_text_held_back_for_a_stop_sequence_and_by_the_parser_comes_in_one_piece_at_the_end() -> None:
    events, stream = await run("See [clock", stop_sequences=["kxx"])
    assert stream.finished_with == "k"
    assert end_of(events).reason is FinishReason.STOP
    pieces = pieces_of(events)
    tails = [piece for piece in pieces if not piece.token_ids]
    assert [piece.text for piece in tails] == ["[clock"]
    assert tails[0].first_token_index == len(TINY.encode("See [clock", add_special_tokens=False))
    assert "".join(piece.text for piece in pieces) == "See [clock"


async def test_what_only_the_parser_held_back_makes_a_last_piece_too() -> None:
    events, _ = await run("See [clock")
    assert [piece.text for piece in pieces_of(events) if not piece.token_ids] == ["[clock"]


async def test_an_answer_with_nothing_left_to_say_has_no_piece_without_tokens() -> None:
    events, _ = await run("See [clock]")
    assert all(piece.token_ids for piece in pieces_of(events))


async def test_an_answer_cut_short_keeps_its_reason_though_a_call_is_whole() -> None:
    answer = new_answer()
    chunks = [TINY.encode("[clock] an", add_special_tokens=False)]
    source = events_of(answer, chunks, FinishReason.MAX_OUTPUT_TOKENS)
    stage = AnswerParsing(ScriptedParsers(ScriptedStream()), BOTH)
    async with aclosing(stage.run(source, PLAN, answer, ROUTED, deadline_at=1e9)) as events:
        end = end_of([event async for event in events])
    assert end.reason is FinishReason.MAX_OUTPUT_TOKENS
    assert [call.name for call in end.tool_calls] == ["clock"]


async def test_a_stop_sequence_ends_the_answer_before_its_parser_sees_it() -> None:
    events, stream = await run("one STOP [clock]", [50], stop_sequences=["STOP"])
    assert "".join(text for texts, _ in stream.pushed for text in texts) == "one "
    assert end_of(events).tool_calls == ()


async def test_a_parser_that_fails_ends_the_answer_and_everything_behind_it() -> None:
    stream = ScriptedStream(fails_at=2)
    answer = new_answer()
    is_over = False

    async def source() -> AsyncGenerator[RelayEvent, None]:
        nonlocal is_over
        try:
            async for event in events_of(answer, [[20]] * 10):
                yield event
        finally:
            is_over = True

    stage = AnswerParsing(ScriptedParsers(stream), BOTH)
    seen = 0

    async def read() -> None:
        nonlocal seen
        async with aclosing(stage.run(source(), PLAN, answer, ROUTED, deadline_at=1e9)) as events:
            async for _ in events:
                seen += 1

    with pytest.raises(BatonError, match="scripted"):
        await read()
    assert (seen, is_over, stream.is_closed) == (3, True, True)


@in_virtual_time
async def test_the_wait_for_parsers_that_are_started_again_ends_with_the_deadline() -> None:
    loop, answer = asyncio.get_running_loop(), new_answer()
    parsers = ScriptedParsers(ScriptedStream(), ready_after_s=60.0)
    stage = AnswerParsing(parsers, BOTH)
    began_at = loop.time()
    source = events_of(answer, [[20]])
    events = stage.run(source, PLAN, answer, ROUTED, deadline_at=began_at + 2.0)
    with pytest.raises(BatonError) as caught:
        [event async for event in events]
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert caught.value.metadata["phase"] == "decode"
    assert loop.time() == began_at + 2.0
    assert getattr(source, "ag_frame", source) is None, "and with it what it read from"


async def test_random_chunkings_lose_nothing() -> None:
    rng = random.Random(20261121)
    text = "A [b] c [dd] 👍 eee [f"
    whole, _ = await run(text)
    for _ in range(50):
        events, _ = await run(text, [rng.randint(1, 5) for _ in range(10)])
        assert "".join(p.text for p in pieces_of(events)) == "".join(p.text for p in pieces_of(whole))
        assert end_of(events).tool_calls == end_of(whole).tool_calls


LONG = "Time: [clock] and [the weather] now, as it was before and will be. " * 20


async def test_a_long_beginning_reaches_the_parser_in_stretches_and_comes_out_as_one_piece() -> None:
    count = len(TINY.encode(LONG, add_special_tokens=False))
    assert count > 5 * PUSH_TOKEN_COUNT
    events, stream = await run(LONG, [count])
    assert max(len(ids) for _, ids in stream.pushed) == PUSH_TOKEN_COUNT
    assert sum(len(ids) for _, ids in stream.pushed) == count
    single, _ = await run(LONG)
    assert [(piece.first_token_index, piece.token_count) for piece in pieces_of(events)] == [(0, count)]
    assert pieces_of(events)[0].text == "".join(piece.text for piece in pieces_of(single))
    named = [
        [(call.index, call.id, call.name) for piece in pieces_of(each) for call in piece.tool_calls if call.name]
        for each in (events, single)
    ]
    assert named[0] == named[1]
    assert end_of(events).tool_calls == end_of(single).tool_calls


class ArgumentStream(ScriptedStream):
    """Two calls; each push adds one letter to the arguments of the first, and from the third on of the second."""

    async def push(self, texts: Sequence[str], token_ids: Sequence[int]) -> Parsed:
        self.pushed.append((list(texts), list(token_ids)))
        place = len(self.pushed)
        index, is_first = int(place > 2), place in (1, 3)
        return Parsed("", "t", (ToolCallDelta(index, "", f"f{index}" if is_first else "", "abcdef"[place - 1]),))


async def test_a_call_that_spans_stretches_is_one_delta_of_the_piece() -> None:
    ids = [20] * (4 * PUSH_TOKEN_COUNT)
    answer, stream = new_answer(), ArgumentStream()
    stage = AnswerParsing(ScriptedParsers(stream), BOTH)
    async with aclosing(stage.run(events_of(answer, [ids]), PLAN, answer, ROUTED, deadline_at=1e9)) as events:
        piece = pieces_of([event async for event in events])[0]
    assert [(call.index, call.name, call.arguments_json) for call in piece.tool_calls] == [
        (0, "f0", "ab"),
        (1, "f1", "cd"),
    ]
    assert [bool(call.id) for call in piece.tool_calls] == [True, True]
    assert piece.reasoning_text == "tttt"


class OneProcess:
    """What is asked of it is answered in the order it came, and each token takes it ``token_s``."""

    def __init__(self, token_s: float) -> None:
        self.token_s = token_s
        self.longest_wait_s = 0.0
        self._busy = asyncio.Lock()

    async def ready(self) -> None: ...

    def keeps_special_tokens(self, plan: AnswerPlan) -> bool:
        return True

    def open(
        self, plan: AnswerPlan, prompt_token_ids: Sequence[int], *, keeps_special_tokens: bool, deadline_at: float
    ) -> OneProcessStream:
        return OneProcessStream(self)

    async def serve(self, count: int) -> None:
        asked_at = asyncio.get_running_loop().time()
        async with self._busy:
            await asyncio.sleep(count * self.token_s)
        self.longest_wait_s = max(self.longest_wait_s, asyncio.get_running_loop().time() - asked_at)


class OneProcessStream(ScriptedStream):
    def __init__(self, process: OneProcess) -> None:
        super().__init__()
        self.process = process

    async def push(self, texts: Sequence[str], token_ids: Sequence[int]) -> Parsed:
        await self.process.serve(len(token_ids))
        return await super().push(texts, token_ids)


@in_virtual_time
async def test_many_long_beginnings_keep_a_token_of_others_for_one_stretch_and_no_longer() -> None:
    process = OneProcess(token_s=0.01)
    stage = AnswerParsing(process, BOTH)

    async def read(chunks: Sequence[Sequence[int]], deadline_at: float = 1e9) -> list[RelayEvent]:
        answer = new_answer()
        stream = stage.run(events_of(answer, chunks), PLAN, answer, ROUTED, deadline_at=deadline_at)
        async with aclosing(stream) as events:
            return [event async for event in events]

    long = [asyncio.create_task(read([[20] * (20 * PUSH_TOKEN_COUNT)])) for _ in range(10)]
    late = asyncio.create_task(read([[20] * (20 * PUSH_TOKEN_COUNT)], deadline_at=5.0))
    await read([[20]] * 100)
    assert process.longest_wait_s <= (2 * PUSH_TOKEN_COUNT + 1) * process.token_s
    for each in await asyncio.gather(*long):
        assert pieces_of(each)[0].token_count == 20 * PUSH_TOKEN_COUNT
    with pytest.raises(BatonError) as told:
        await late
    assert told.value.reason is Reason.DEADLINE_EXCEEDED


def test_only_answers_that_need_it_are_parsed() -> None:
    tools = (Tool("f"),)
    nothing = ChatAbilities(has_chat=True)
    no_thinking = ChatAbilities(has_chat=True, knows_tools=True, tool_parser="hermes")
    assert plan_of(TextPrompt("x"), BOTH) is None
    assert plan_of(ChatPrompt(USER), nothing) is None
    assert plan_of(ChatPrompt(USER), no_thinking) is None
    assert plan_of(ChatPrompt(USER, keep_reasoning_in_text=True), BOTH) is None
    assert plan_of(ChatPrompt(USER, tools, ToolChoice.NONE), no_thinking) is None
    thinking = plan_of(ChatPrompt(USER, tools, ToolChoice.NONE), BOTH)
    assert thinking is not None
    assert (thinking.uses_tools, thinking.uses_reasoning, list(thinking.tools)) == (False, True, [])
    auto = plan_of(ChatPrompt(USER, tools), BOTH)
    assert auto is not None
    assert (auto.uses_tools, auto.uses_reasoning, auto.choice) == (True, True, "auto")


def test_a_call_that_must_be_made_leaves_no_room_for_thinking() -> None:
    any_tool = plan_of(ChatPrompt(USER, (Tool("f"),), ToolChoice.REQUIRED), BOTH)
    one_tool = plan_of(ChatPrompt(USER, (Tool("f"),), ToolChoice.REQUIRED, "f"), BOTH)
    assert any_tool is not None
    assert one_tool is not None
    assert (any_tool.uses_reasoning, any_tool.is_required, any_tool.choice) == (False, True, "required")
    assert one_tool.choice == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("is_required", "field"), [(True, "chat.tools"), (False, "sampling.structure")])
async def test_what_an_engine_says_against_a_required_calls_structure_names_the_tools(
    is_required: bool, field: str
) -> None:
    async def source() -> AsyncGenerator[RelayEvent, None]:
        raise invalid_request([FieldViolation("sampling.structure", "takes too long to read")])
        yield Admitted("gen-1")

    plan = replace(PLAN, is_required=is_required)
    stage = AnswerParsing(ScriptedParsers(ScriptedStream()), BOTH)
    events = stage.run(source(), plan, new_answer(), ROUTED, deadline_at=1e9)
    with pytest.raises(BatonError, match="takes too long to read") as refused:
        await anext(events)
    assert [violation.field for violation in refused.value.violations] == [field]

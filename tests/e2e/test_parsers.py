"""vLLM's own parsers as the router drives them: token by token and in any pieces they find what the whole has.

No engine: answers are written here. The model folder has the markers as tokens of its own, some special, as the
models have that these parsers are for.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from patience import START_S, WITHIN_S
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from baton.request import ChatPrompt, OutputOptions, Tool, ToolChoice
from router.answer import TextAnswer
from router.chats.answer_parsing import AnswerPlan, Parsed, ParsedAnswer
from router.chats.parser_child import ParserChild, ParserSpec, ParserStartError
from router.chats.tool_words import openai_tools, required_structure
from router.tiny_model import write_tiny_model
from router.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

SPECIAL = ("<|python_tag|>", "<|eom_id|>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
WEATHER = Tool(
    "get_weather",
    "x",
    json.dumps({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
)
CLOCK = Tool("tell_time")
TOOLS = openai_tools((WEATHER, CLOCK))
OSLO = ("get_weather", {"city": "Oslo", "days": 2})
TIME: tuple[str, dict[str, object]] = ("tell_time", {})
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
HERMES_TIME = '<tool_call>\n{"name": "tell_time", "arguments": {}}\n</tool_call>'
CUT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "O'
ROUNDS = 6


@dataclass(frozen=True)
class Case:
    said: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


AUTO: dict[tuple[str, str], list[Case]] = {
    ("hermes", ""): [
        Case("Just words, 👍 and < brackets >.", "Just words, 👍 and < brackets >."),
        Case(HERMES, calls=(OSLO,)),
        Case(f"Let me see. {HERMES}", "Let me see. ", calls=(OSLO,)),
        Case(f"{HERMES}\n{HERMES_TIME}", calls=(OSLO, TIME)),
        Case(CUT, CUT),
        Case("a <tool_call>\n{no json}\n</tool_call>", "a <tool_call>\n{no json}\n</tool_call>"),
        Case(
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "\\"}</tool_call", "days": 1}}\n</tool_call>',
            calls=(("get_weather", {"city": '"}</tool_call', "days": 1}),),
        ),
    ],
    ("llama3_json", ""): [
        Case("Just words.", "Just words."),
        Case('{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}', calls=(OSLO,)),
        Case('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}', calls=(OSLO,)),
    ],
    ("pythonic", ""): [
        Case("Just words.", "Just words."),
        Case('[get_weather(city="Oslo", days=2)]', calls=(OSLO,)),
        Case('[get_weather(city="Oslo", days=2), tell_time()]', calls=(OSLO, TIME)),
    ],
    ("", "qwen3"): [
        Case("<think>hm, so</think>Hello 👍.", "Hello 👍.", "hm, so"),
        Case("<think>hm, never end", "", "hm, never end"),
    ],
    ("", "deepseek_r1"): [
        Case("<think>hm, so</think>Hello.", "Hello.", "hm, so"),
        Case("hm, so</think>Hello.", "Hello.", "hm, so"),
    ],
    ("hermes", "qwen3"): [
        Case(f"<think>hm</think>Let me see. {HERMES}", "Let me see. ", "hm", (OSLO,)),
        # vLLM's parser of this model takes a call for the end of the thinking, and what follows a call for nothing.
        Case(f"<think>hm, {HERMES_TIME}?</think>No. {HERMES}", "", "hm, ", (TIME, OSLO)),
    ],
    ("hermes", "deepseek_r1"): [
        Case(f"<think>hm</think>{HERMES}{HERMES_TIME}", "", "hm", (OSLO, TIME)),
        Case("<think>hm</think>Hello.", "Hello.", "hm"),
    ],
}


@dataclass
class Heard:
    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    whole: list[tuple[str, str]] = field(default_factory=list)
    steps: list[Parsed] = field(default_factory=list)

    def add(self, parsed: Parsed) -> None:
        self.steps.append(parsed)
        self.text += parsed.text
        self.reasoning += parsed.reasoning_text
        for call in parsed.calls:
            put = self.calls.setdefault(call.index, ["", ""])
            put[0] += call.name
            put[1] += call.arguments_json
        self.whole += [(call.name, call.arguments_json) for call in parsed.whole]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("markers"))
    path = directory / "tokenizer.json"
    tokenizer = HfTokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in PLAIN])
    tokenizer.save(str(path))
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] = tokenizer.get_vocab_size()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


UNKNOWN = ("", "nonsense")
PROCESSES = (("hermes", "deepseek_r1"), ("hermes", "qwen3"), ("llama3_json", "qwen3"), ("pythonic", ""))
"""Each imports vLLM: a parser alone is asked of one that has another, too."""


class Children:
    """The processes. All of them start at once: each imports vLLM for seconds."""

    def __init__(self, model_dir: Path) -> None:
        self._children = {
            names: ParserChild(
                ParserSpec(str(model_dir), *names, deadline_s=WITHIN_S, start_deadline_s=START_S, wait_s=START_S)
            )
            for names in (*PROCESSES, UNKNOWN)
        }
        self._starts = {names: asyncio.create_task(child.start()) for names, child in self._children.items()}

    async def with_parsers(self, tool_parser: str, reasoning_parser: str) -> ParserChild:
        """Once it is ready. Raises what its start raised."""
        names = next(
            each for each in self._starts if tool_parser in ("", each[0]) and reasoning_parser in ("", each[1])
        )
        await self._starts[names]
        return self._children[names]

    async def close(self) -> None:
        await asyncio.gather(*self._starts.values(), return_exceptions=True)
        for child in self._children.values():
            await child.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def children(model_dir: Path) -> AsyncIterator[Children]:
    all_of_them = Children(model_dir)
    try:
        yield all_of_them
    finally:
        await all_of_them.close()


async def hear(
    child: ParserChild,
    plan: AnswerPlan,
    tokenizer: Tokenizer,
    said: str,
    *,
    sizes: random.Random | None = None,
    stop_sequences: tuple[str, ...] = (),
    prompt: tuple[int, ...] = (5, 6),
) -> Heard:
    """What comes of an answer, token by token or in pieces of random sizes."""
    keeps = child.keeps_special_tokens(plan)
    answer = ParsedAnswer(
        TextAnswer(tokenizer, OutputOptions(), stop_sequences=stop_sequences, keeps_special_tokens=keeps),
        keeps_special_tokens=keeps,
    )
    deadline_at = asyncio.get_running_loop().time() + WITHIN_S
    stream = child.open(plan, prompt, keeps_special_tokens=keeps, deadline_at=deadline_at)
    heard = Heard()
    ids = list(tokenizer.encode(said, add_special_tokens=False))
    while ids:
        size = 1 if sizes is None else sizes.randint(1, 9)
        piece = answer.push(tuple(ids[:size]))
        del ids[:size]
        heard.add(await stream.push(answer.take(piece.token_count), piece.token_ids))
    heard.add(await stream.finish(answer.flush().text))
    stream.close()
    return heard


def assert_is(heard: Heard, case: Case) -> None:
    assert heard.text.strip() == case.text.strip()
    assert heard.reasoning == case.reasoning
    assert tuple((name, json.loads(arguments)) for name, arguments in heard.whole) == case.calls
    # The pieces of a call, joined, are the call, letter for letter.
    assert [tuple(heard.calls[index]) for index in range(len(heard.whole))] == heard.whole


@pytest.mark.parametrize("names", AUTO, ids=lambda names: "+".join(filter(None, names)))
async def test_pieces_give_what_the_whole_does(model_dir: Path, children: Children, names: tuple[str, str]) -> None:
    rng = random.Random(20261121)
    tokenizer = Tokenizer.load(model_dir)
    plan = AnswerPlan(uses_tools=bool(names[0]), uses_reasoning=bool(names[1]), tools=TOOLS if names[0] else ())
    child = await children.with_parsers(*names)
    for case in AUTO[names]:
        by_token = await hear(child, plan, tokenizer, case.said)
        assert_is(by_token, case)
        for _ in range(ROUNDS):
            in_pieces = await hear(child, plan, tokenizer, case.said, sizes=rng)
            assert_is(in_pieces, case)
            # Text that may begin a stop sequence comes later than its token.
            stops = ("</think>never", "<tool_call>\n[", '"days": 9', "noX", "👍👍")
            lagging = await hear(child, plan, tokenizer, case.said, sizes=rng, stop_sequences=stops)
            assert_is(lagging, case)


async def test_required_calls_stream_whatever_the_models_own_way_is(model_dir: Path, children: Children) -> None:
    tokenizer = Tokenizer.load(model_dir)
    any_tool = AnswerPlan(True, False, is_required=True, tools=TOOLS, choice="required")
    named = {"type": "function", "function": {"name": "get_weather"}}
    one_tool = AnswerPlan(True, False, is_required=True, tools=TOOLS, choice=named)
    rng = random.Random(1)
    two = json.dumps([{"name": name, "parameters": arguments} for name, arguments in (OSLO, TIME)])
    arguments = json.dumps(OSLO[1])
    child = await children.with_parsers("pythonic", "")
    for sizes in (None, rng, rng, rng):
        assert_is(await hear(child, any_tool, tokenizer, two, sizes=sizes), Case(two, calls=(OSLO, TIME)))
        assert_is(await hear(child, one_tool, tokenizer, arguments, sizes=sizes), Case(arguments, calls=(OSLO,)))
        cut = await hear(child, one_tool, tokenizer, arguments[:-3], sizes=sizes)
        assert cut.whole == []


async def test_a_prompt_that_ended_the_thinking_leaves_none_to_the_answer(
    model_dir: Path, children: Children
) -> None:
    tokenizer = Tokenizer.load(model_dir)
    prompt = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    plan = AnswerPlan(uses_tools=True, uses_reasoning=True, tools=TOOLS)
    child = await children.with_parsers("hermes", "deepseek_r1")
    heard = await hear(child, plan, tokenizer, f"Now. {HERMES}", prompt=prompt)
    assert_is(heard, Case("", "Now. ", calls=(OSLO,)))


async def test_what_half_a_surrogate_pair_leaves_is_a_character(model_dir: Path, children: Children) -> None:
    tokenizer = Tokenizer.load(model_dir)
    said = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "\\ud800"}}\n</tool_call>'
    plan = AnswerPlan(uses_tools=True, uses_reasoning=False, tools=TOOLS)
    heard = await hear(await children.with_parsers("hermes", ""), plan, tokenizer, said)
    assert [name for name, _ in heard.whole] == ["get_weather"]
    assert all(text.encode() for pair in heard.whole for text in pair)


async def test_a_parser_that_is_not_there_is_named(children: Children) -> None:
    with pytest.raises(ParserStartError, match="nonsense"):
        await children.with_parsers(*UNKNOWN)


async def test_the_schema_of_required_calls_is_vllms() -> None:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.utils import get_json_schema_from_tools

    messages = [{"role": "user", "content": ""}]
    request = ChatCompletionRequest(model="", messages=messages, tools=openai_tools([WEATHER]))
    ours = required_structure(ChatPrompt((), (WEATHER,), ToolChoice.REQUIRED))
    assert ours is not None
    assert json.loads(ours.text) == get_json_schema_from_tools(tool_choice="required", tools=request.tools)

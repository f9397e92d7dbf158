"""The fields of chats with tools and thinking: a server with a tools template and vLLM's own parsers.

Engines are simulated: what the model says is scripted, token by token. The parsers run in their child process.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from drawn_apart import drawn_apart
from field_register import Register
from raw_calls import GENERATION, MODELS, Outcome, ask, generate
from sim_cluster import RULE, TOKENIZER, SimCluster, sim_cluster
from test_conformance_fields import Job, assert_refused
from test_modes_api import overhear

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from router.tiny_model import END_ID

TEMPLATE = Path(__file__).resolve().parents[2] / "deploy" / "templates" / "chatml-tools.jinja"
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
WEATHER = pb.Tool(name="weather", description="Says the weather", parameters_json_schema=SCHEMA)
OTHER = pb.Tool(name="other")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THOUGHT = "I should ask"
SAID = f"<think>\n{THOUGHT}\n</think>\n\nLet me see. {CALL}"
register = Register()
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Script:
    """What the engines say after the next prompt."""

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] = ()
        self.prompt_token_count = 0

    def say(self, text: str, prompt_token_count: int) -> None:
        self.tokens, self.prompt_token_count = (*TOKENIZER.encode(text), END_ID), prompt_token_count

    def __call__(self, position: int) -> int | None:
        at = position - self.prompt_token_count
        return self.tokens[at] if 0 <= at < len(self.tokens) else None


SCRIPT = Script()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: Any) -> AsyncIterator[SimCluster]:
    async with sim_cluster(
        tmp_path_factory.mktemp("tools"),
        sim={"tokens": replace(RULE, scripted=SCRIPT)},
        chat_template_path=str(TEMPLATE),
        tool_parser="hermes",
        reasoning_parser="qwen3",
        template_arguments=("enable_thinking",),
    ) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(cluster: SimCluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.endpoint.address) as channel:
        yield channel


def chat(**changes: Any) -> pb.Chat:
    return pb.Chat(**{"messages": [pb.ChatMessage(role="user", content="Oslo?")], **changes})


def request(chat: pb.Chat, **changes: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"chat": chat, "stop": pb.StopConditions(max_output_token_count=300), **changes})


async def told(channel: grpc.aio.Channel, message: pb.GenerateRequest, text: str = SAID) -> Outcome:
    count = await ask(channel, f"/{MODELS}/CountTokens", models.CountTokensRequest(chat=message.chat))
    assert count.code is grpc.StatusCode.OK, count
    SCRIPT.say(text, count.messages[0].token_count)
    return await generate(channel, message)


async def rendered(channel: grpc.aio.Channel, of: pb.Chat) -> str:
    """What the model reads, special tokens and all."""
    tokens = await ask(channel, f"/{MODELS}/Tokenize", models.TokenizeRequest(chat=of))
    assert tokens.code is grpc.StatusCode.OK, tokens
    ids = models.DetokenizeRequest(token_ids=pb.TokenIds(ids=tokens.messages[0].token_ids), keep_special_tokens=True)
    return str((await ask(channel, f"/{MODELS}/Detokenize", ids)).messages[0].text)


@register.shows(
    "Chat.tools",
    "Tool.name",
    "Tool.description",
    "Tool.parameters_json_schema",
    "Chunk.tool_call_deltas",
    "Chunk.reasoning_text",
    "ToolCallDelta.index",
    "ToolCallDelta.id",
    "ToolCallDelta.name",
    "ToolCallDelta.arguments_json",
    "Finished.tool_calls",
    "ToolCall.id",
    "ToolCall.name",
    "ToolCall.arguments_json",
)
async def test_thinking_text_and_a_call_come_each_as_what_it_is(channel: grpc.aio.Channel) -> None:
    outcome = await told(channel, request(chat(tools=[WEATHER])))
    assert outcome.finished.reason == pb.FINISH_REASON_TOOL_CALLS
    [call] = outcome.finished.tool_calls
    assert (call.name, json.loads(call.arguments_json)) == ("weather", {"city": "Oslo"})
    deltas = [delta for chunk in outcome.chunks for delta in chunk.tool_call_deltas]
    assert {delta.index for delta in deltas} == {0}
    assert (deltas[0].id, deltas[0].name) == (call.id, "weather")
    assert call.id
    assert not any(delta.id or delta.name for delta in deltas[1:])
    assert json.loads("".join(delta.arguments_json for delta in deltas)) == {"city": "Oslo"}
    assert "".join(chunk.reasoning_text for chunk in outcome.chunks) == f"\n{THOUGHT}\n"
    assert outcome.said == "\n\nLet me see. "
    plain = await told(channel, request(chat()))
    assert (plain.finished.reason, list(plain.finished.tool_calls)) == (pb.FINISH_REASON_STOP, [])
    assert plain.said == f"\n\nLet me see. {CALL}", "without tools a call is text"
    assert sum(chunk.token_count for chunk in outcome.chunks) == outcome.finished.usage.output_token_count


@register.shows("SampleResult.tool_calls", "Finished.tool_calls", "Chunk.tool_call_deltas", "Chunk.reasoning_text")
async def test_samples_have_thoughts_texts_and_calls_of_their_own_and_a_resumed_stream_has_them_all(
    channel: grpc.aio.Channel, cluster: SimCluster
) -> None:
    cities = ("Oslo", "Troms\u00f8 \U0001f525", "\u05e9\u05dc\u05d5\u05dd\\u0000")
    calls = [CALL.replace("Oslo", city) for city in cities]
    says = {
        7 + index: (*TOKENIZER.encode(f"<think>\nthought {index} \u00e9\n</think>\n\nAnd {index}. {call}"), END_ID)
        for index, call in enumerate((calls[0], calls[1] + calls[0], calls[2]))
    }
    asked = request(
        chat(tools=[WEATHER]),
        sample_count=3,
        sampling=pb.Sampling(temperature=1, seed=7),
        resume=pb.ResumeOptions(),
        output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH, top_logprob_count=1),
        stop=pb.StopConditions(max_output_token_count=400, stop_sequences=["never said"]),
        tenant="blue",
        session_id="s",
        priority=5,
    )
    with drawn_apart(cluster, says):
        whole = await generate(channel, asked)
    assert whole.code is grpc.StatusCode.OK, whole
    message = pb.ResumeGenerateRequest(
        resume_token=whole.started.resume_token, tenant="blue", next_token_indices=[0, 0, 0]
    )
    again = await ask(channel, f"/{GENERATION}/ResumeGenerate", message)
    wanted = [[cities[0]], [cities[1], cities[0]], [cities[2]]]
    for outcome in (whole, again):
        ends = outcome.finished.samples
        told_cities = [[json.loads(call.arguments_json)["city"] for call in end.tool_calls] for end in ends]
        assert told_cities == [[json.loads(f'"{city}"') for city in of_one] for of_one in wanted]
        assert {end.reason for end in ends} == {pb.FINISH_REASON_TOOL_CALLS}
        assert outcome.finished.tool_calls == ends[0].tool_calls
        for index, end in enumerate(ends):
            chunks = [chunk for chunk in outcome.chunks if chunk.sample_index == index]
            assert "".join(chunk.text for chunk in chunks) == f"\n\nAnd {index}. "
            assert "".join(chunk.reasoning_text for chunk in chunks) == f"\nthought {index} \u00e9\n"
            assert tuple(token_id for chunk in chunks for token_id in chunk.token_ids) == says[7 + index]
            assert sum(len(chunk.logprobs) for chunk in chunks) == end.output_token_count == len(says[7 + index])
            deltas = [delta for chunk in chunks for delta in chunk.tool_call_deltas]
            for number, call in enumerate(end.tool_calls):
                of_call = [delta for delta in deltas if delta.index == number]
                assert (of_call[0].id, of_call[0].name) == (call.id, call.name)
                assert "".join(delta.arguments_json for delta in of_call) == call.arguments_json
        assert outcome.finished.usage.output_token_count == sum(map(len, says.values()))
    assert again.finished.samples == whole.finished.samples
    cancel = pb.CancelGenerationRequest(resume_token=again.started.resume_token, tenant="blue")
    await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)


@pytest.mark.parametrize(
    ("stop", "text", "thought", "reason", "matched"),
    [
        ({"stop_sequences": ["should"]}, "", "\nI ", pb.FINISH_REASON_STOP, "should"),
        ({"stop_sequences": ["</think>"]}, "", "\nI should ask\n", pb.FINISH_REASON_STOP, "</think>"),
        ({"stop_sequences": ["<tool_call>"]}, "\n\nLet me see. ", None, pb.FINISH_REASON_STOP, "<tool_call>"),
        ({"max_output_token_count": 9}, "", "\nI", pb.FINISH_REASON_MAX_OUTPUT_TOKENS, ""),
    ],
)
async def test_stop_sequences_are_found_before_anything_is_parsed(
    channel: grpc.aio.Channel, stop: dict[str, Any], text: str, thought: str | None, reason: int, matched: str
) -> None:
    conditions = pb.StopConditions(**{"max_output_token_count": 300, **stop})
    outcome = await told(channel, request(chat(tools=[WEATHER]), stop=conditions))
    finished = outcome.finished
    assert (finished.reason, finished.matched_stop_sequence, list(finished.tool_calls)) == (reason, matched, [])
    assert outcome.said == text
    reasoning = "".join(chunk.reasoning_text for chunk in outcome.chunks)
    assert reasoning == (f"\n{THOUGHT}\n" if thought is None else thought)
    assert sum(chunk.token_count for chunk in outcome.chunks) == finished.usage.output_token_count


async def test_token_ids_alone_still_bring_calls(channel: grpc.aio.Channel) -> None:
    ids = pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS)
    outcome = await told(channel, request(chat(tools=[WEATHER]), output=ids))
    assert [call.arguments_json for call in outcome.finished.tool_calls] == ['{"city": "Oslo"}']
    assert (outcome.said, "".join(chunk.reasoning_text for chunk in outcome.chunks)) == ("", "")
    assert TOKENIZER.decode(outcome.token_ids) == SAID


@register.shows("Chat.tools", "Tool.name", "Tool.description", "Tool.parameters_json_schema")
async def test_tools_are_shown_to_the_model_and_broken_ones_refused(channel: grpc.aio.Channel) -> None:
    shown = await rendered(channel, chat(tools=[WEATHER]))
    assert all(each in shown for each in ("weather", "Says the weather", "city"))
    assert (await rendered(channel, chat(tools=[pb.Tool(name="a" * 64)]))).count("a" * 64) == 1
    for tools, field, value in (
        ([pb.Tool(name="")], "chat.tools[0].name", "1 to 64"),
        ([pb.Tool(name="a" * 65)], "chat.tools[0].name", "1 to 64"),
        ([pb.Tool(name="a b")], "chat.tools[0].name", "letters"),
        ([WEATHER, WEATHER], "chat.tools[1].name", "weather"),
        ([pb.Tool(name="a", description="d" * 4097)], "chat.tools[0].description", "has 4097 bytes"),
        ([pb.Tool(name="a", parameters_json_schema="[]")], "chat.tools[0].parameters_json_schema", "JSON object"),
        (
            [pb.Tool(name="a", parameters_json_schema='{"a": "%s"}' % ("x" * 65_536))],
            "chat.tools[0].parameters_json_schema",
            "has 65545 bytes",
        ),
        ([pb.Tool(name=f"t{index}") for index in range(129)], "chat.tools", "has 129 tools"),
    ):
        assert_refused(await generate(channel, request(chat(tools=tools))), field, value)


@register.shows("Chat.tool_choice", "ToolChoice.mode", "ToolChoice.tool_name")
async def test_a_choice_holds_the_answer_to_the_tools_or_leaves_calls_as_text(
    channel: grpc.aio.Channel, cluster: SimCluster
) -> None:
    none = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
    outcome = await told(channel, request(chat(tools=[WEATHER], tool_choice=none)))
    assert not outcome.finished.tool_calls
    assert CALL in outcome.said
    jobs: list[Job] = []
    overhear(cluster, jobs)
    auto = await told(channel, request(chat(tools=[WEATHER, OTHER])))
    assert [call.name for call in auto.finished.tool_calls] == ["weather"]
    assert all(job.sampling.structure is None for job in jobs)
    both = '[{"name": "weather", "parameters": {"city": "Oslo"}}, {"name": "other", "parameters": {}}]'
    for choice, said, names in (
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), both, ["weather", "other"]),
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, tool_name="weather"), '{"city": "Oslo"}', ["weather"]),
    ):
        jobs.clear()
        outcome = await told(channel, request(chat(tools=[WEATHER, OTHER], tool_choice=choice)), said)
        assert outcome.finished.reason == pb.FINISH_REASON_TOOL_CALLS
        assert [call.name for call in outcome.finished.tool_calls] == names
        assert json.loads(outcome.finished.tool_calls[0].arguments_json) == {"city": "Oslo"}
        assert outcome.said == ""
        [text] = {job.sampling.structure.text for job in jobs if job.sampling.structure is not None}
        if choice.tool_name:
            assert json.loads(text) == json.loads(SCHEMA)
        else:
            schema = json.loads(text)
            kinds = [each["properties"]["name"]["enum"] for each in schema["items"]["anyOf"]]
            assert (schema["minItems"], kinds) == (1, [["weather"], ["other"]])
        assert all(job.sampling.structure is not None for job in jobs)
    for choice, tools, field, says in (
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), [], "chat.tool_choice.mode", "is REQUIRED without tools"),
        (pb.ToolChoice(mode=99), [WEATHER], "chat.tool_choice.mode", "is 99"),  # type: ignore[arg-type]
        (pb.ToolChoice(tool_name="weather"), [WEATHER], "chat.tool_choice.tool_name", "is set without REQUIRED"),
        (
            pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, tool_name="other"),
            [WEATHER],
            "chat.tool_choice.tool_name",
            "is none of the 1 tools",
        ),
    ):
        outcome = await generate(channel, request(chat(tools=tools, tool_choice=choice)))
        assert_refused(outcome, field, says)
        assert list(outcome.violations) == [field]


@register.shows(
    "Chat.tools", "Tool.description", "Tool.parameters_json_schema", "ToolCall.id", "ToolCall.arguments_json"
)
async def test_the_longest_that_is_taken_is_read_and_only_then_too_long_for_the_context(
    channel: grpc.aio.Channel,
) -> None:
    schema = '{"type": "object", "description": "%s"}'
    wide = '{"a": "%s"}'

    def filled(text: str, size: int) -> str:
        return text % ("x" * (size - len(text) + 2))

    def a_call(**changes: Any) -> pb.ToolCall:
        return pb.ToolCall(**{"id": "call-1", "name": "weather", **changes})

    for most, beyond, field, says in (
        (
            chat(tools=[pb.Tool(name="a", description="d" * 4096)]),
            chat(tools=[pb.Tool(name="a", description="d" * 4097)]),
            "chat.tools[0].description",
            "has 4097 bytes; at most 4096",
        ),
        (
            chat(tools=[pb.Tool(name="a", parameters_json_schema=filled(schema, 65_536))]),
            chat(tools=[pb.Tool(name="a", parameters_json_schema=filled(schema, 65_537))]),
            "chat.tools[0].parameters_json_schema",
            "has 65537 bytes",
        ),
        (
            chat(tools=[pb.Tool(name=f"t{index}") for index in range(128)]),
            chat(tools=[pb.Tool(name=f"t{index}") for index in range(129)]),
            "chat.tools",
            "has 129 ",
        ),
        (
            turns(tool_calls=[a_call(arguments_json=filled(wide, 65_536))]),
            turns(tool_calls=[a_call(arguments_json=filled(wide, 65_537))]),
            "chat.messages[1].tool_calls[0].arguments_json",
            "has 65537 bytes",
        ),
        (
            turns(tool_calls=[a_call(), *(a_call(id=f"i{index}") for index in range(127))]),
            turns(tool_calls=[a_call(), *(a_call(id=f"i{index}") for index in range(128))]),
            "chat.messages[1].tool_calls",
            "has 129 ",
        ),
    ):
        outcome = await generate(channel, request(most))
        assert outcome.reason == "PROMPT_TOO_LONG", outcome.violations
        assert_refused(await generate(channel, request(beyond)), field, says)
    for size, reason in ((4096, ""), (4097, "INVALID_REQUEST")):
        text = '{"enable_thinking": true' + " " * (size - 25) + "}"
        assert (await told_or_refused(channel, chat(template_arguments_json=text))).reason == reason
    for size, reason in ((128, ""), (129, "INVALID_REQUEST")):
        named = turns(tool_calls=[a_call(), a_call(id="i" * size)])
        assert (await told_or_refused(channel, named)).reason == reason


async def told_or_refused(channel: grpc.aio.Channel, of: pb.Chat) -> Outcome:
    return await generate(channel, request(of, stop=pb.StopConditions(max_output_token_count=2)))


@register.shows("Chat.template_arguments_json")
async def test_values_for_the_template_are_of_its_allowlist(channel: grpc.aio.Channel) -> None:
    assert (await rendered(channel, chat())).endswith("assistant\n")
    off = chat(template_arguments_json='{"enable_thinking": false}')
    assert (await rendered(channel, off)).endswith("</think>\n\n")
    for text, value in (
        ('{"other": 1}', "enable_thinking"),
        ("[1]", "JSON object"),
        ('{"enable_thinking": [1]}', "true, false"),
        ('{"enable_thinking": "%s"}' % ("x" * 4096), "has 4119 bytes"),
    ):
        outcome = await generate(channel, request(chat(template_arguments_json=text)))
        assert outcome.reason == "INVALID_REQUEST"
        assert any(value in each for each in outcome.violations.values()), outcome.violations
        assert all(each.startswith("chat.template_arguments_json") for each in outcome.violations)


@register.shows("Chat.keep_reasoning_in_text")
async def test_thinking_stays_in_the_text_on_request(channel: grpc.aio.Channel) -> None:
    outcome = await told(channel, request(chat(keep_reasoning_in_text=True)), f"<think>\n{THOUGHT}\n</think>\n\nyes")
    assert not any(chunk.reasoning_text for chunk in outcome.chunks)
    assert outcome.said == f"<think>\n{THOUGHT}\n</think>\n\nyes"


def turns(**changes: Any) -> pb.Chat:
    """A conversation with a call and what the tool said; ``changes``: to the assistant's message."""
    call = pb.ToolCall(id="call-1", name="weather", arguments_json='{"city": "Oslo"}')
    said = pb.ChatMessage(**{"role": "assistant", "tool_calls": [call], "reasoning": THOUGHT, **changes})
    answer = pb.ChatMessage(role="tool", content="rain", tool_call_id="call-1")
    return chat(messages=[pb.ChatMessage(role="user", content="Oslo?"), said, answer], tools=[WEATHER])


@register.shows(
    "ChatMessage.tool_calls",
    "ChatMessage.tool_call_id",
    "ChatMessage.reasoning",
    "ToolCall.id",
    "ToolCall.name",
    "ToolCall.arguments_json",
)
async def test_calls_their_answers_and_thinking_of_earlier_turns_are_shown_to_the_model(
    channel: grpc.aio.Channel,
) -> None:
    shown = await rendered(channel, turns())
    assert all(each in shown for each in (THOUGHT, '{"name": "weather", "arguments": {"city": "Oslo"}}', "rain"))
    call = {"id": "call-1", "name": "weather", "arguments_json": "{}"}
    for change, field, value in (
        ({"tool_calls": [pb.ToolCall(**{**call, "id": ""})]}, "chat.messages[1].tool_calls[0].id", "has 0 bytes"),
        ({"tool_calls": [pb.ToolCall(**{**call, "id": "i" * 129})]}, "chat.messages[1].tool_calls[0].id", "129"),
        ({"tool_calls": [pb.ToolCall(**{**call, "name": "a b"})]}, "chat.messages[1].tool_calls[0].name", "letters"),
        (
            {"tool_calls": [pb.ToolCall(**{**call, "arguments_json": "[]"})]},
            "chat.messages[1].tool_calls[0].arguments_json",
            "JSON object",
        ),
        (
            {"tool_calls": [pb.ToolCall(**{**call, "id": f"i{n}"}) for n in range(129)]},
            "chat.messages[1].tool_calls",
            "has 129 calls",
        ),
        ({"role": "user"}, "chat.messages[1].tool_calls", "assistant"),
        ({"role": "user"}, "chat.messages[1].reasoning", "assistant"),
        ({"tool_call_id": "call-1"}, "chat.messages[1].tool_call_id", "tool"),
    ):
        assert_refused(await generate(channel, request(turns(**change))), field, value)
    unasked = chat(messages=[pb.ChatMessage(role="tool", content="rain", tool_call_id="call-7")], tools=[WEATHER])
    assert_refused(await generate(channel, request(unasked)), "chat.messages[0].tool_call_id", "no call")


@register.shows("ChatMessage.name")
async def test_a_name_that_the_template_does_not_show_is_refused(channel: grpc.aio.Channel) -> None:
    named = chat(messages=[pb.ChatMessage(role="user", content="hi", name="ann")])
    assert_refused(await generate(channel, request(named)), "chat.messages[0].name", "would be ignored")


@register.shows("ChatMessage.name")
async def test_a_name_is_shown_to_the_model_where_its_template_takes_one(tmp_path: Path) -> None:
    template = tmp_path / "names.jinja"
    template.write_text("{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}\n{% endfor %}")
    async with (
        sim_cluster(tmp_path / "model", chat_template_path=str(template)) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        named = chat(messages=[pb.ChatMessage(role="user", content="hi", name="n" * 64)])
        assert await rendered(channel, named) == f"user {'n' * 64}: hi\n"
        too_long = chat(messages=[pb.ChatMessage(role="user", content="hi", name="n" * 65)])
        assert_refused(await generate(channel, request(too_long)), "chat.messages[0].name", "has 65 bytes")


@register.shows(
    "Capabilities.has_tools",
    "Capabilities.tool_parser",
    "Capabilities.reasoning_parser",
    "Capabilities.template_argument_names",
)
async def test_the_model_says_what_chats_may_ask_of_it(channel: grpc.aio.Channel) -> None:
    outcome = await ask(channel, f"/{MODELS}/GetModel", models.GetModelRequest())
    capabilities = outcome.messages[0].model.capabilities
    assert capabilities.has_tools
    assert (capabilities.tool_parser, capabilities.reasoning_parser) == ("hermes", "qwen3")
    assert list(capabilities.template_argument_names) == ["enable_thinking"]


async def test_a_resumed_stream_has_the_same_calls(channel: grpc.aio.Channel) -> None:
    asked = request(chat(tools=[WEATHER]), resume=pb.ResumeOptions())
    whole = await told(channel, asked)
    message = pb.ResumeGenerateRequest(resume_token=whole.started.resume_token)
    again = await ask(channel, f"/{GENERATION}/ResumeGenerate", message)
    assert again.finished.tool_calls == whole.finished.tool_calls
    cancel = pb.CancelGenerationRequest(resume_token=whole.started.resume_token)
    await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)

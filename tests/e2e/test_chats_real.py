"""Chats with tools on real engines and vLLM's own parsers: required calls fit their schemas, calls that the model
writes come apart from the text, and so does its thinking.

A model of 135 million parameters calls no tool by itself: what it must say is forced with a regex, through the same
public API. A router of its own over the session's workers, since the session's serves no tools.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from patience import WITHIN_S
from second_router import second_router
from service_under_test import Service

from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from router.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="session")]

TEMPLATE = Path(__file__).parents[2] / "deploy/templates/chatml-tools.jinja"
WEATHER = pb.Tool(
    name="get_weather",
    description="The weather of a city.",
    parameters_json_schema=json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        }
    ),
)
CLOCK = pb.Tool(name="tell_time", description="The time now.")
REQUIRED = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)
HURRY = {
    "]": 60.0,
    "}": 50.0,
    ":": 40.0,
    '"': 30.0,
    "}}": 50.0,
    "{": 20.0,
    **{str(digit): 20.0 for digit in range(1, 10)},
}
"""So small a model fills JSON with white space, and calls for ever: what ends something is made likelier."""


@dataclass
class Heard:
    text: str = ""
    reasoning: str = ""
    calls: dict[int, pb.ToolCall] = field(default_factory=dict)
    """Put together from their pieces."""
    token_count: int = 0
    finished: Any = None


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def router(service: Service, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Its address."""
    async with second_router(
        service.fleet,
        tmp_path_factory.mktemp("chats"),
        chat_template_path=str(TEMPLATE),
        template_arguments=("enable_thinking",),
        tool_parser="hermes",
        reasoning_parser="qwen3",
    ) as address:
        yield address


async def ask(router: str, **request: Any) -> Heard:
    """The answer, put together; fails for a gap in its tokens."""
    heard = Heard()
    async with grpc.aio.insecure_channel(router) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request.setdefault("stop", pb.StopConditions(max_output_token_count=120))
        async for message in stub.Generate(pb.GenerateRequest(**request), timeout=WITHIN_S):
            match message.WhichOneof("event"):
                case "chunk":
                    chunk = message.chunk
                    assert chunk.first_token_index == heard.token_count
                    heard.token_count += chunk.token_count
                    heard.text += chunk.text
                    heard.reasoning += chunk.reasoning_text
                    for delta in chunk.tool_call_deltas:
                        call = heard.calls.setdefault(delta.index, pb.ToolCall())
                        call.id += delta.id
                        call.name += delta.name
                        call.arguments_json += delta.arguments_json
                case "finished":
                    heard.finished = message.finished
    assert heard.finished is not None
    assert heard.finished.usage.output_token_count == heard.token_count
    return heard


def asked(text: str, **chat: Any) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role="user", content=text)], **chat)


def assert_calls_are_whole(heard: Heard) -> None:
    assert heard.finished.reason == pb.FINISH_REASON_TOOL_CALLS
    assert [heard.calls[index] for index in sorted(heard.calls)] == list(heard.finished.tool_calls)


@pytest.fixture(scope="module")
def hurry(model_path: Path) -> pb.Sampling:
    tokenizer = Tokenizer.load(model_path)
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in HURRY}
    return pb.Sampling(
        logit_bias=[
            pb.TokenBias(token_id=ids[text][0], bias=bias) for text, bias in HURRY.items() if len(ids[text]) == 1
        ]
    )


async def test_a_required_call_fits_a_schema_of_one_of_the_tools(router: str, hurry: pb.Sampling) -> None:
    chat = asked("What is the weather in Oslo for 3 days?", tools=[WEATHER, CLOCK], tool_choice=REQUIRED)
    heard = await ask(router, chat=chat, sampling=hurry)
    assert_calls_are_whole(heard)
    for call in heard.finished.tool_calls:
        arguments = json.loads(call.arguments_json)
        if call.name == "get_weather":
            assert arguments["city"] in ("Oslo", "Rome")
            assert 1 <= arguments["days"] <= 9
        else:
            assert call.name == "tell_time"
    assert heard.text == ""


async def test_a_named_call_is_of_that_tool(router: str, hurry: pb.Sampling) -> None:
    choice = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, tool_name="get_weather")
    heard = await ask(router, chat=asked("Rome?", tools=[CLOCK, WEATHER], tool_choice=choice), sampling=hurry)
    assert_calls_are_whole(heard)
    (call,) = heard.finished.tool_calls
    assert call.name == "get_weather"
    arguments = json.loads(call.arguments_json)
    assert set(arguments) == {"city", "days"}
    assert call.id.startswith("call_")


async def test_a_call_that_the_model_writes_comes_apart_from_its_text(router: str) -> None:
    call = r'\{"name": "get_weather", "arguments": \{"city": "(Oslo|Rome)", "days": [1-9]\}\}'
    regex = rf"Let me look\. <tool_call>\n{call}\n</tool_call>"
    sampling = pb.Sampling(structure=pb.StructuredOutput(regex=regex))
    heard = await ask(
        router,
        chat=asked("Oslo?", tools=[WEATHER], template_arguments_json='{"enable_thinking": false}'),
        sampling=sampling,
    )
    assert_calls_are_whole(heard)
    assert heard.text == "Let me look. "
    assert heard.calls[0].name == "get_weather"
    assert json.loads(heard.calls[0].arguments_json)["city"] in ("Oslo", "Rome")


async def test_with_choice_none_what_looks_like_a_call_is_text(router: str) -> None:
    said = '<tool_call>\n{"name": "tell_time", "arguments": {}}\n</tool_call>'
    sampling = pb.Sampling(structure=pb.StructuredOutput(regex=said.replace("{", r"\{").replace("}", r"\}")))
    choice = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
    chat = asked("Time?", tools=[CLOCK], tool_choice=choice, keep_reasoning_in_text=True)
    heard = await ask(router, chat=chat, sampling=sampling)
    assert heard.text == said
    assert heard.finished.reason == pb.FINISH_REASON_STOP
    assert not heard.finished.tool_calls


async def test_thinking_comes_as_its_own_field_unless_it_is_to_stay_in_the_text(router: str) -> None:
    sampling = pb.Sampling(structure=pb.StructuredOutput(regex="<think>[a-z ]{10,20}</think>It is [a-z]{4,8}\\."))
    heard = await ask(router, chat=asked("Why?"), sampling=sampling)
    assert 10 <= len(heard.reasoning) <= 20
    assert heard.text.startswith("It is ")
    kept = await ask(router, chat=asked("Why?", keep_reasoning_in_text=True), sampling=sampling)
    assert kept.reasoning == ""
    assert kept.text == f"<think>{heard.reasoning}</think>{heard.text}"


async def test_the_answer_of_a_tool_goes_back_into_the_conversation(router: str) -> None:
    call = pb.ToolCall(id="call_1", name="get_weather", arguments_json='{"city": "Oslo", "days": 1}')
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="user", content="Oslo?"),
            pb.ChatMessage(role="assistant", tool_calls=[call]),
            pb.ChatMessage(role="tool", content="snow", tool_call_id="call_1"),
        ],
        tools=[WEATHER],
        template_arguments_json='{"enable_thinking": false}',
    )
    async with grpc.aio.insecure_channel(router) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        tokens = await models.Tokenize(model_pb2.TokenizeRequest(chat=chat), timeout=WITHIN_S)
        text = await models.Detokenize(
            model_pb2.DetokenizeRequest(token_ids=pb.TokenIds(ids=tokens.token_ids), keep_special_tokens=True)
        )
    assert "<tool_response>\nsnow\n</tool_response>" in text.text
    assert '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}}' in text.text
    heard = await ask(router, chat=chat, stop=pb.StopConditions(max_output_token_count=8))
    assert heard.token_count >= 1


async def test_a_model_says_what_its_chats_may_ask(router: str) -> None:
    async with grpc.aio.insecure_channel(router) as channel:
        reply = await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), timeout=WITHIN_S)  # type: ignore[no-untyped-call]
    capabilities = reply.model.capabilities
    assert (capabilities.has_tools, capabilities.tool_parser, capabilities.reasoning_parser) == (
        True,
        "hermes",
        "qwen3",
    )
    assert list(capabilities.template_argument_names) == ["enable_thinking"]


async def test_a_killed_parser_fails_what_it_had_and_the_next_request_is_served(
    router: str, hurry: pb.Sampling
) -> None:
    chat = asked("Tell me a long story.", tools=[CLOCK])
    stop = pb.StopConditions(max_output_token_count=3000, ignore_eos=True)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await kill_parser_while_it_streams(router, pb.GenerateRequest(chat=chat, stop=stop))
    error = from_rpc_error(failed.value)
    assert error is not None
    assert (error.reason.value, error.status.value) == ("ATTEMPTS_EXHAUSTED", "ABORTED")
    heard = await ask(router, chat=asked("Time?", tools=[CLOCK], tool_choice=REQUIRED), sampling=hurry)
    assert_calls_are_whole(heard)


async def kill_parser_while_it_streams(router: str, request: pb.GenerateRequest) -> None:
    is_killed = False
    async with grpc.aio.insecure_channel(router) as channel:
        async for message in generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=WITHIN_S):  # type: ignore[no-untyped-call]
            if message.WhichOneof("event") == "chunk" and not is_killed:
                is_killed = True
                os.kill(parser_pid(), signal.SIGKILL)


def parser_pid() -> int:
    """Of the router: the process below this one that parses answers."""
    parents: dict[int, int] = {}
    parsers = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text(encoding="utf-8", errors="replace")
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
        if b"router.chats.parser_process" in command:
            parsers.append(int(path.name))
    for pid in parsers:
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if above == os.getpid():
            return pid
    raise AssertionError("no process below this one parses answers")

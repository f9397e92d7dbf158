"""Chats over real sockets: what is parsed reaches the caller in its own fields, and plain requests are never parsed.

The engine is simulated and says what the test scripts; what parses is ``parser_stub.py``, which gives text back in
capitals and ends with one call. What vLLM's parsers make of answers is in tests/e2e.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from sim_cluster import RULE, TOKENIZER, SimCluster, sim_cluster

import router.server
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from router.chats.parser_child import ParserChild, ParserSpec
from router.config import RouterConfig
from router.tiny_model import END_ID

STUB = (str(Path(__file__).with_name("parser_stub.py")),)
TEMPLATE = Path(__file__).parents[2] / "deploy/templates/chatml-tools.jinja"
CLOCK = pb.Tool(name="tell_time", description="The time now.")
CONVERSATION = [pb.ChatMessage(role="user", content="What time is it?")]


@dataclass
class Script:
    """What the model says next: these tokens from this position on, then the end."""

    start: int = 0
    token_ids: tuple[int, ...] = ()

    def __call__(self, position: int) -> int | None:
        at = position - self.start
        if not self.token_ids or at < 0:
            return None
        return self.token_ids[at] if at < len(self.token_ids) else END_ID


@dataclass
class Chats:
    cluster: SimCluster
    script: Script

    async def ask(self, says: str, **request: Any) -> Heard:
        """The answer, put together. ``says``: what the model will."""
        async with grpc.aio.insecure_channel(self.cluster.endpoint.address) as channel:
            await self._tell(channel, says, request)
            stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            heard = Heard()
            async for message in stub.Generate(pb.GenerateRequest(**request), timeout=60):
                heard.add(message)
            return heard

    async def _tell(self, channel: grpc.aio.Channel, says: str, request: dict[str, Any]) -> None:
        prompt = {key: request[key] for key in ("chat", "text") if key in request}
        models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        count = await models.CountTokens(model_pb2.CountTokensRequest(**prompt), timeout=60)
        self.script.start = count.token_count
        self.script.token_ids = TOKENIZER.encode(says, add_special_tokens=False)


@dataclass
class Heard:
    text: str = ""
    calls: list[pb.ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    token_count: int = 0
    finished: Any = None

    def add(self, message: pb.GenerateResponse) -> None:
        match message.WhichOneof("event"):
            case "chunk":
                assert message.chunk.first_token_index == self.token_count
                self.token_count += message.chunk.token_count
                self.text += message.chunk.text
                self.token_ids += message.chunk.token_ids
                self.calls += message.chunk.tool_call_deltas
            case "finished":
                self.finished = message.finished


@pytest_asyncio.fixture
async def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Chats]:
    def stub(config: RouterConfig) -> ParserChild:
        return ParserChild(ParserSpec(config.model_dir, config.tool_parser, command=STUB))

    monkeypatch.setattr(router.server, "parsers_of", stub)
    script = Script()
    config: dict[str, Any] = {
        "tool_parser": "stub",
        "chat_template_path": str(TEMPLATE),
        "template_arguments": ("enable_thinking",),
    }
    async with sim_cluster(tmp_path, sim={"tokens": replace(RULE, scripted=script)}, **config) as cluster:
        yield Chats(cluster, script)


def asked(**chat: Any) -> pb.Chat:
    return pb.Chat(messages=CONVERSATION, **chat)


async def test_a_parsed_answer_comes_in_its_own_fields_and_keeps_its_tokens(chats: Chats) -> None:
    output = pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH)
    heard = await chats.ask("it is noon, said the fox", chat=asked(tools=[CLOCK]), output=output)
    assert heard.text == "IT IS NOON, SAID THE FOX"
    expected = [*TOKENIZER.encode("it is noon, said the fox", add_special_tokens=False), END_ID]
    assert heard.token_ids == expected
    assert heard.finished.usage.output_token_count == heard.token_count == len(expected)
    assert heard.finished.reason == pb.FINISH_REASON_TOOL_CALLS
    (call,) = heard.finished.tool_calls
    assert (call.name, call.arguments_json) == ("f", "{}")
    assert call.id.startswith("call_")


async def test_calls_reach_a_caller_who_wants_token_ids_alone(chats: Chats) -> None:
    output = pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS)
    heard = await chats.ask("it is noon", chat=asked(tools=[CLOCK]), output=output)
    assert (heard.text, len(heard.finished.tool_calls)) == ("", 1)
    assert heard.token_ids


async def test_special_tokens_are_in_the_text_where_parsers_look_for_them(chats: Chats) -> None:
    heard = await chats.ask("a<|im_start|>b", chat=asked(tools=[CLOCK]))
    assert heard.text == "A<|IM_START|>B"


@pytest.mark.parametrize("kind", ["text", "chat", "none"])
async def test_what_needs_no_parser_never_meets_one(chats: Chats, kind: str) -> None:
    nothing = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
    prompts: dict[str, dict[str, Any]] = {
        "text": {"text": "Once upon a time"},
        "chat": {"chat": asked()},
        "none": {"chat": asked(tools=[CLOCK], tool_choice=nothing)},
    }
    heard = await chats.ask("a<|im_start|>quick fox", **prompts[kind])
    assert heard.text == "aquick fox"
    assert heard.finished.reason == pb.FINISH_REASON_STOP


async def test_every_broken_rule_of_a_chat_is_named_with_its_field(chats: Chats) -> None:
    chat = asked(
        tools=[CLOCK, CLOCK, pb.Tool(name="f", parameters_json_schema="[]")],
        tool_choice=pb.ToolChoice(tool_name="tell_time"),
        template_arguments_json='{"messages": "x"}',
        keep_reasoning_in_text=True,
    )
    async with grpc.aio.insecure_channel(chats.cluster.endpoint.address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(chat=chat), timeout=60)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(call))
    error = from_rpc_error(refused.value)
    assert error is not None
    assert [violation.field for violation in error.violations] == [
        "chat.tools[1].name",
        "chat.tools[2].parameters_json_schema",
        "chat.tool_choice.tool_name",
        "chat.template_arguments_json",
        "chat.keep_reasoning_in_text",
    ]


async def test_a_template_argument_changes_the_prompt(chats: Chats) -> None:
    async with grpc.aio.insecure_channel(chats.cluster.endpoint.address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        counts = [
            await models.CountTokens(model_pb2.CountTokensRequest(chat=asked(template_arguments_json=arguments)))
            for arguments in ("", '{"enable_thinking": false}')
        ]
    assert counts[1].token_count > counts[0].token_count


async def test_a_parser_that_dies_fails_the_answer_it_had_and_the_next_is_served(chats: Chats) -> None:
    parsers = chats.cluster.server.parsers
    assert parsers is not None
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await chats.ask("die", chat=asked(tools=[CLOCK]))
    error = from_rpc_error(failed.value)
    assert error is not None
    assert error.reason.value == "ATTEMPTS_EXHAUSTED"
    heard = await chats.ask("it is noon", chat=asked(tools=[CLOCK]))
    assert heard.text == "IT IS NOON"
    assert parsers.start_count == 2


async def test_plain_requests_are_served_while_no_parser_is_there(chats: Chats) -> None:
    parsers = chats.cluster.server.parsers
    assert parsers is not None
    assert parsers.pid is not None
    os.kill(parsers.pid, signal.SIGKILL)
    await chats.cluster.until(lambda: parsers.pid is None, "the parser is gone")
    heard = await chats.ask("still here", chat=asked())
    assert heard.text == "still here"


async def test_a_model_says_what_its_chats_may_ask(chats: Chats) -> None:
    async with grpc.aio.insecure_channel(chats.cluster.endpoint.address) as channel:
        reply = await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())  # type: ignore[no-untyped-call]
    capabilities = reply.model.capabilities
    assert (capabilities.has_chat, capabilities.has_tools, capabilities.tool_parser) == (True, True, "stub")
    assert list(capabilities.template_argument_names) == ["enable_thinking"]

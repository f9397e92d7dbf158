"""ModelService over a real socket: what is served, and tokens counted as Generate counts them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sim_cluster import CONTEXT, MODEL, TOKENIZER, SimCluster, sim_cluster

from baton.errors import BatonError, Reason, no_api_key
from baton.request import MAX_SAMPLE_COUNT, MAX_TOP_LOGPROB_COUNT
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as generation
from baton.v1 import generation_pb2_grpc, model_pb2_grpc
from baton.v1 import model_pb2 as pb
from router.tiny_model import CHAT_TEMPLATE, END_ID

TEXT = "Once upon a time there was a small model 👍🏽"
LONG = "Once upon a time there was a small model. " * 40
"""Too long for the event loop, and within the context."""
CHAT = generation.Chat(messages=[generation.ChatMessage(role="user", content="Hello, fox!")])


@asynccontextmanager
async def models(tmp_path: Path, **config: Any) -> AsyncIterator[tuple[Any, SimCluster]]:
    async with (
        sim_cluster(tmp_path, **config) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        yield model_pb2_grpc.ModelServiceStub(channel), cluster  # type: ignore[no-untyped-call]


async def refused(call: Awaitable[Any]) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def started(cluster: SimCluster, request: generation.GenerateRequest) -> generation.Started:
    async with grpc.aio.insecure_channel(cluster.endpoint.address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=60)  # type: ignore[no-untyped-call]
        events = [event async for event in call]
    first: generation.Started = events[0].started
    return first


async def test_a_model_says_its_limits_its_tokens_its_template_and_what_may_be_asked_of_it(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, _):
        model = (await stub.GetModel(pb.GetModelRequest())).model
        assert model == (await stub.GetModel(pb.GetModelRequest(name=MODEL))).model
        assert list((await stub.ListModels(pb.ListModelsRequest())).models) == [model]
        assert (model.name, model.max_context_token_count, model.vocab_size) == (MODEL, CONTEXT, TOKENIZER.vocab_size)
        spelled = {each.token_id: each.text for each in model.special_tokens}
        assert spelled == {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
        assert list(model.end_token_ids) == [END_ID]
        assert model.chat_template == CHAT_TEMPLATE
        assert model.capabilities.has_chat
        assert model.capabilities.max_sample_count == MAX_SAMPLE_COUNT
        assert model.capabilities.max_top_logprob_count == MAX_TOP_LOGPROB_COUNT


async def test_a_model_of_another_name_is_not_found_by_any_call(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, _):
        for call in (
            stub.GetModel(pb.GetModelRequest(name="other")),
            stub.CountTokens(pb.CountTokensRequest(model="other", text=TEXT)),
            stub.Tokenize(pb.TokenizeRequest(model="other", text=TEXT)),
            stub.Detokenize(pb.DetokenizeRequest(model="other", token_ids=generation.TokenIds(ids=[1]))),
        ):
            error = await refused(call)
            assert error.reason is Reason.MODEL_NOT_FOUND
            assert error.metadata == {"model": "other", "available": MODEL}


async def test_counts_and_tokens_are_those_that_generate_uses(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, cluster):
        stop = generation.StopConditions(max_output_token_count=1)
        for prompt in ({"text": TEXT}, {"text": LONG}, {"chat": CHAT}):
            said = await started(cluster, generation.GenerateRequest(stop=stop, **prompt))
            count = await stub.CountTokens(pb.CountTokensRequest(**prompt))
            token_ids = (await stub.Tokenize(pb.TokenizeRequest(**prompt))).token_ids
            assert said.prompt_token_count == count.token_count == len(token_ids)
            assert count.max_prompt_token_count == CONTEXT - 1


async def test_a_chat_is_tokenised_as_its_template_writes_it(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, _):
        token_ids = (await stub.Tokenize(pb.TokenizeRequest(chat=CHAT, add_special_tokens=False))).token_ids
        request = pb.DetokenizeRequest(token_ids=generation.TokenIds(ids=token_ids), keep_special_tokens=True)
        text = (await stub.Detokenize(request)).text
        assert text == "<|im_start|>user\nHello, fox!<|im_end|>\n<|im_start|>assistant\n"


async def test_text_comes_back_from_its_tokens_and_special_ones_are_silent_unless_kept(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, _):
        token_ids = (await stub.Tokenize(pb.TokenizeRequest(text=TEXT))).token_ids
        for ids, keep, text in (
            (token_ids, False, TEXT),
            ([1, *token_ids, 2], False, TEXT),
            ([1, *token_ids, 2], True, f"<|im_start|>{TEXT}<|im_end|>"),
            (token_ids[:-1], False, TEXT[:-1] + "\ufffd"),
        ):
            request = pb.DetokenizeRequest(token_ids=generation.TokenIds(ids=ids), keep_special_tokens=keep)
            assert (await stub.Detokenize(request)).text == text


async def test_what_generate_would_refuse_is_refused_with_the_same_words(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, cluster):
        robot = generation.Chat(messages=[generation.ChatMessage(role="robot", content="beep")])
        for prompt in ({}, {"text": ""}, {"text": "word " * 4000}, {"chat": generation.Chat()}, {"chat": robot}):
            expected = await refused(started(cluster, generation.GenerateRequest(**prompt)))
            for call in (
                stub.CountTokens(pb.CountTokensRequest(**prompt)),
                stub.Tokenize(pb.TokenizeRequest(**prompt)),
            ):
                error = await refused(call)
                assert error.reason in (Reason.INVALID_REQUEST, Reason.PROMPT_TOO_LONG)
                assert (error.reason, error.message, error.violations, error.metadata) == (
                    *(expected.reason, expected.message, expected.violations, expected.metadata),
                )


async def test_token_ids_that_cannot_be_text_are_refused_by_field_value_and_bound(tmp_path: Path) -> None:
    async with models(tmp_path) as (stub, _):
        for ids, field, said in (
            ([], "token_ids.ids", "at least one"),
            ([5, TOKENIZER.vocab_size], "token_ids.ids[1]", f"0 to {TOKENIZER.vocab_size - 1}"),
            ([5, -1], "token_ids.ids[1]", "is -1"),
            ([5] * (CONTEXT + 1), "token_ids.ids", f"at most {CONTEXT}"),
        ):
            request = pb.DetokenizeRequest(token_ids=generation.TokenIds(ids=ids))
            error = await refused(stub.Detokenize(request))
            assert error.reason is Reason.INVALID_REQUEST
            assert error.violations[0].field == field
            assert said in error.violations[0].description


async def test_a_long_text_waits_for_the_one_before_it_and_its_deadline_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.model_service.MAX_CALL_S", 0.1)  # ours, so that no race decides who speaks of it
    async with models(tmp_path) as (stub, cluster):
        lock = cluster.server.models._long_text
        await lock.acquire()
        try:
            error = await refused(stub.CountTokens(pb.CountTokensRequest(text=LONG), timeout=60))
            assert error.reason is Reason.DEADLINE_EXCEEDED
            assert error.metadata["phase"] == "queue"
            monkeypatch.undo()
            assert (await stub.CountTokens(pb.CountTokensRequest(text=TEXT), timeout=60)).token_count > 0
        finally:
            lock.release()


async def test_many_ids_and_a_chat_that_is_long_in_its_tools_alone_wait_for_the_same_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.model_service.OFF_LOOP_TOKENS", 100)  # what is in the thread need not be long
    monkeypatch.setattr("router.model_service.MAX_CALL_S", 0.1)
    user = generation.ChatMessage(role="user", content="x")
    tool = generation.Tool(name="f", description=LONG)
    called = generation.ToolCall(id="c", name="f", arguments_json=f'{{"a": "{LONG}"}}')
    chats = [
        generation.Chat(messages=[user], tools=[tool]),
        generation.Chat(messages=[user, generation.ChatMessage(role="assistant", tool_calls=[called]), user]),
        generation.Chat(messages=[user, generation.ChatMessage(role="assistant", reasoning=LONG), user]),
    ]
    async with models(tmp_path) as (stub, cluster):
        # What these chats are refused for comes before the turn, and is not what is looked at here.
        monkeypatch.setattr(cluster.server.models._encoder, "violations", lambda prompt: [])
        async with cluster.server.models._long_text:
            many = generation.TokenIds(ids=[20] * 101)
            calls = [stub.Detokenize(pb.DetokenizeRequest(token_ids=many), timeout=60)]
            calls += [stub.CountTokens(pb.CountTokensRequest(chat=chat), timeout=60) for chat in chats]
            for error in await asyncio.gather(*map(refused, calls)):
                assert error.reason is Reason.DEADLINE_EXCEEDED
            monkeypatch.undo()
            few = generation.TokenIds(ids=[20] * 100)
            assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=few), timeout=60)).text
        assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=many), timeout=60)).text


async def test_a_draining_router_refuses_and_waits_for_what_runs(tmp_path: Path) -> None:
    async with models(tmp_path, drain_notice_s=0.02) as (stub, cluster):
        service = cluster.server.models
        async with service._long_text:
            running = asyncio.ensure_future(stub.CountTokens(pb.CountTokensRequest(text=LONG), timeout=60))
            await cluster.until(lambda: service.call_count == 1, "the call runs")
            service.begin_drain()
            for call in (stub.ListModels(pb.ListModelsRequest()), stub.Tokenize(pb.TokenizeRequest(text=TEXT))):
                assert (await refused(call)).reason is Reason.DRAINING
            drain = asyncio.create_task(cluster.server.drain(asyncio.Event()))
            await cluster.until(lambda: not cluster.server.health.is_serving, "the drain began")
            await asyncio.wait([drain], timeout=60 * cluster.config.drain_notice_s)
            assert not drain.done()
        assert (await running).token_count > 0
        await drain


async def test_a_caller_whom_the_hook_turns_away_learns_nothing(tmp_path: Path) -> None:
    def nobody(context: Any) -> None:
        raise no_api_key()

    async with models(tmp_path) as (stub, cluster):
        cluster.server.models._authorise = nobody
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: stub.ListModels(pb.ListModelsRequest()),
            lambda: stub.Tokenize(pb.TokenizeRequest(text=TEXT)),
        ]
        for call in calls:
            assert (await refused(call())).reason is Reason.UNAUTHENTICATED

"""The public API on real engines: its main fields again, structured output that always parses, log probabilities.

What each field does is shown in tests/grpc on simulated engines; here, that the engine does it. The fleet is that of
the session; ``python -m bench.soak structures`` has the volume.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from patience import WITHIN_S
from service_under_test import Service

from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from bench.schemas import FEATURES
from bench.soak_structures import ask_schema, ask_schemas, hurry
from router.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="session")]

SCHEMA_COUNT = 20
LOGPROB_TOLERANCE = 0.25
"""In bfloat16 a prompt that is computed in other parts rounds otherwise. In float32 test_samples_real.py compares."""
TEXT = "The capital of France is"
BOTH = pb.OutputOptions.CONTENT_BOTH


@dataclass
class Heard:
    text: str
    token_ids: list[int]
    logprobs: list[pb.TokenLogprobs]
    finished: pb.Finished


@dataclass
class Api:
    stub: Any
    models: Any
    tokenizer: Tokenizer

    async def ask(self, count: int = 12, **changes: Any) -> Heard:
        request = pb.GenerateRequest(stop=pb.StopConditions(max_output_token_count=count))
        request.output.content = BOTH
        if not {"token_ids", "chat"} & set(changes):
            request.text = TEXT
        request.MergeFrom(pb.GenerateRequest(**changes))
        heard = Heard("", [], [], pb.Finished())
        async for message in self.stub.Generate(request, timeout=WITHIN_S):
            if message.WhichOneof("event") == "chunk":
                assert message.chunk.first_token_index == len(heard.token_ids)
                heard.text += message.chunk.text
                heard.token_ids += message.chunk.token_ids
                heard.logprobs += message.chunk.logprobs
            elif message.WhichOneof("event") == "finished":
                heard.finished = message.finished
        assert heard.finished.usage.output_token_count == len(heard.token_ids)
        return heard


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def api(service: Service, model_path: Path) -> AsyncIterator[Api]:
    async with grpc.aio.insecure_channel(service.fleet.address) as channel:
        yield Api(
            generation_pb2_grpc.GenerationServiceStub(channel),  # type: ignore[no-untyped-call]
            model_pb2_grpc.ModelServiceStub(channel),  # type: ignore[no-untyped-call]
            Tokenizer.load(model_path),
        )


async def test_tokens_are_drawn_as_sampling_says(api: Api) -> None:
    greedy = await api.ask()
    assert (await api.ask(sampling=pb.Sampling(temperature=1.5, top_k=1))).token_ids == greedy.token_ids
    drawn = [await api.ask(sampling=pb.Sampling(temperature=1.5, seed=seed)) for seed in (7, 7, 8)]
    assert drawn[0].token_ids == drawn[1].token_ids != drawn[2].token_ids
    narrow = pb.Sampling(temperature=1.5, top_p=1e-6, min_p=1.0, seed=3)
    assert (await api.ask(sampling=narrow)).token_ids == greedy.token_ids
    pushed = greedy.token_ids[0]
    repelled = pb.Sampling(logit_bias=[pb.TokenBias(token_id=pushed, bias=-100)])
    assert pushed not in (await api.ask(sampling=repelled)).token_ids
    forced = pb.Sampling(logit_bias=[pb.TokenBias(token_id=2000, bias=100)])
    assert set((await api.ask(sampling=forced)).token_ids) == {2000}
    few = [300, 400, 500]
    assert set((await api.ask(sampling=pb.Sampling(allowed_token_ids=pb.TokenIds(ids=few)))).token_ids) <= set(few)
    pair = greedy.token_ids[1:3]
    heard = await api.ask(sampling=pb.Sampling(bad_token_sequences=[pb.TokenIds(ids=pair)]))
    assert heard.token_ids[:2] == greedy.token_ids[:2]
    assert heard.token_ids[2] != greedy.token_ids[2]


async def test_penalties_make_for_more_different_tokens(api: Api) -> None:
    stop = pb.StopConditions(ignore_eos=True)
    plain = await api.ask(80, stop=stop)
    for penalty in (
        pb.Sampling(presence_penalty=2.0),
        pb.Sampling(frequency_penalty=2.0),
        pb.Sampling(repetition_penalty=5.0),
    ):
        heard = await api.ask(80, sampling=penalty, stop=stop)
        assert len(set(heard.token_ids)) > len(set(plain.token_ids)), penalty


async def test_answers_end_when_stop_says(api: Api) -> None:
    whole = await api.ask(24, stop=pb.StopConditions(ignore_eos=True))
    assert whole.finished.reason == pb.FINISH_REASON_MAX_OUTPUT_TOKENS
    assert len(whole.token_ids) == 24
    word = re.findall(r"\w{3,}", whole.text)[2]
    heard = await api.ask(24, stop=pb.StopConditions(stop_sequences=[word]))
    assert (heard.finished.matched_stop_sequence, heard.text) == (word, whole.text.partition(word)[0])
    stop_id = whole.token_ids[5]
    heard = await api.ask(24, stop=pb.StopConditions(stop_token_ids=[stop_id]))
    assert heard.finished.matched_stop_token_id == stop_id
    assert heard.token_ids == whole.token_ids[: whole.token_ids.index(stop_id) + 1]
    least = pb.StopConditions(stop_token_ids=[stop_id], min_output_token_count=15)
    heard = await api.ask(24, stop=least)
    assert len(heard.token_ids) >= 15
    assert stop_id not in heard.token_ids[:14]


async def test_structures_hold_the_answer(api: Api) -> None:
    for structure, pattern in (
        (pb.StructuredOutput(regex="[A-Z]{3}-[0-9]{2}"), "[A-Z]{3}-[0-9]{2}"),
        (pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no", "maybe"])), "yes|no|maybe"),
        (pb.StructuredOutput(grammar='start: "<" WORD ">"\nWORD: /[a-z]{1,6}/'), "<[a-z]{1,6}>"),
    ):
        heard = await api.ask(30, sampling=pb.Sampling(structure=structure))
        assert re.fullmatch(pattern, heard.text), heard.text
        assert heard.finished.reason == pb.FINISH_REASON_STOP
    biases = hurry(api.tokenizer)
    any_object = pb.Sampling(structure=pb.StructuredOutput(json_object=pb.JsonObject()), logit_bias=biases)
    heard = await api.ask(200, sampling=any_object)
    if heard.finished.reason == pb.FINISH_REASON_STOP:
        assert isinstance(json.loads(heard.text), dict)
    else:
        assert heard.text.lstrip().startswith("{")


async def test_answers_held_to_a_schema_always_parse_and_fit(api: Api) -> None:
    verdicts = await ask_schemas(api.stub, SCHEMA_COUNT, hurry(api.tokenizer), concurrency=8)
    kinds = Counter(each.kind for each in verdicts)
    assert kinds["wrong"] == kinds["refused"] == 0, [each for each in verdicts if each.kind != "fits"]
    assert kinds["fits"] >= SCHEMA_COUNT - 2, verdicts


@pytest.mark.parametrize("name", ["not", "uniqueItems", "a remote $ref", "an unknown format"])
async def test_a_schema_that_the_engine_cannot_follow_is_refused_and_not_ignored(api: Api, name: str) -> None:
    verdict = await ask_schema(api.stub, name, FEATURES[name], hurry(api.tokenizer))
    assert verdict.kind == "refused", verdict


async def test_logprobs_are_those_of_one_plain_engine(service: Service, api: Api) -> None:
    """Of the engine that has no connector and no Baton: each token's, and its rank where it is clear."""
    compared = 0
    for case in service.questions.cases[:12]:
        answer = service.questions.oracle[case.name]
        if case.stop_sequences or not answer.logprobs:
            continue
        heard = await api.ask(
            case.max_token_count,
            token_ids=pb.TokenIds(ids=case.prompt_token_ids),
            output=pb.OutputOptions(top_logprob_count=2),
            stop=pb.StopConditions(ignore_eos=case.ignore_eos),
        )
        for token_id, (logprob, rank), told in zip(answer.token_ids, answer.logprobs, heard.logprobs, strict=False):
            if told.token_id != token_id:
                break  # a near tie in bfloat16: from here on the answers are two
            assert abs(told.logprob - logprob) <= LOGPROB_TOLERANCE
            assert told.logprob <= 0
            assert (told.rank == 1) == (told.top[0].token_id == token_id)
            assert rank <= 2
            assert abs(told.rank - rank) <= 1
            compared += 1
        total = sum(told.logprob for told in heard.logprobs)
        assert heard.finished.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert compared >= 50


async def test_text_chat_and_tokens_are_one_prompt_and_counted_alike(api: Api) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Say hello.")])
    ids = (await api.models.Tokenize(model_pb2.TokenizeRequest(chat=chat), timeout=WITHIN_S)).token_ids
    count = await api.models.CountTokens(model_pb2.CountTokensRequest(chat=chat), timeout=WITHIN_S)
    by_chat = await api.ask(chat=chat)
    by_ids = await api.ask(token_ids=pb.TokenIds(ids=ids))
    assert by_chat.token_ids == by_ids.token_ids
    assert by_chat.finished.usage.prompt_token_count == len(ids) == count.token_count


async def test_what_is_wrong_is_refused_as_on_simulated_engines(api: Api) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await api.ask(sampling=pb.Sampling(temperature=2.5, allowed_token_ids=pb.TokenIds(ids=[49_152])))
    error = from_rpc_error(refused.value)
    assert [each.field for each in error.violations] == [
        "sampling.temperature",
        "sampling.allowed_token_ids.ids[0]",
    ]

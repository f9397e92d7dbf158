"""Samples, echo and the prompt's logprobs over real sockets: from the public API down to a worker's wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sim_cluster import RULE, TOKENIZER, SimCluster, sim_cluster

from baton.errors import BatonError, Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc
from engine.sim_tokens import simulated_answer

TEXT = "Once upon a time there was a small model 👍🏽"
LONG = "Once upon a time there was a small model. " * 40
BOTH = pb.OutputOptions.CONTENT_BOTH
DRAWN = pb.Sampling(temperature=0.7)
ECHO = pb.OutputOptions(echo_prompt=True)


@asynccontextmanager
async def generation(tmp_path: Path, **config: Any) -> AsyncIterator[tuple[Any, SimCluster]]:
    async with (
        sim_cluster(tmp_path, **config) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        yield generation_pb2_grpc.GenerationServiceStub(channel), cluster  # type: ignore[no-untyped-call]


async def collect(stub: Any, **fields: Any) -> list[Any]:
    fields.setdefault("stop", pb.StopConditions(max_output_token_count=6))
    return [event async for event in stub.Generate(pb.GenerateRequest(**fields), timeout=60)]


async def refused(stub: Any, **fields: Any) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub, **fields)
    return from_rpc_error(caught.value)


def kinds(events: Sequence[Any]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def expected(text: str, count: int) -> tuple[int, ...]:
    return simulated_answer(TOKENIZER.encode(text), count, RULE)


async def test_samples_come_in_one_stream_each_with_its_text_and_its_stop(tmp_path: Path) -> None:
    async with generation(tmp_path) as (stub, _):
        ids = expected(TEXT, 12)
        stop_text = TOKENIZER.decode(ids[4:6]).strip()
        stop = pb.StopConditions(max_output_token_count=12, stop_sequences=[stop_text])
        output = pb.OutputOptions(content=BOTH, top_logprob_count=2)
        one = await collect(stub, text=TEXT, stop=stop, output=output)
        events = await collect(stub, text=TEXT, stop=stop, output=output, sampling=DRAWN, sample_count=5)
        assert kinds(events)[0] == "started"
        assert kinds(events).count("started") == kinds(events).count("finished") == 1
        alone = one[-1].finished
        finished = events[-1].finished
        for index in range(5):
            chunks = [event.chunk for event in events[1:-1] if event.chunk.sample_index == index]
            told = [token_id for chunk in chunks for token_id in chunk.token_ids]
            assert told == [token_id for event in one[1:-1] for token_id in event.chunk.token_ids]
            assert "".join(chunk.text for chunk in chunks) == "".join(event.chunk.text for event in one[1:-1])
            starts = [chunk.first_token_index for chunk in chunks]
            assert starts == [sum(c.token_count for c in chunks[:at]) for at in range(len(chunks))]
            sample = finished.samples[index]
            assert (sample.sample_index, sample.reason) == (index, pb.FINISH_REASON_STOP)
            assert sample.matched_stop_sequence == stop_text
            assert sample.output_token_count == alone.usage.output_token_count == len(told)
            assert sample.cumulative_logprob == pytest.approx(alone.cumulative_logprob)
        assert finished.usage.output_token_count == 5 * alone.usage.output_token_count
        assert finished.usage.prompt_token_count == alone.usage.prompt_token_count


async def test_one_sample_looks_as_it_always_did(tmp_path: Path) -> None:
    async with generation(tmp_path) as (stub, _):
        for count in (0, 1):
            events = await collect(stub, text=TEXT, sample_count=count)
            assert not events[-1].finished.samples
            assert {event.chunk.sample_index for event in events[1:-1]} == {0}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"sample_count": 17, "sampling": DRAWN}, "sample_count", ("is 17", "1 to 16")),
        ({"sample_count": -1, "sampling": DRAWN}, "sample_count", ("is -1", "1 to 16")),
        ({"sample_count": 2_000_000_000, "sampling": DRAWN}, "sample_count", ("1 to 16",)),
        ({"sample_count": 2}, "sample_count", ("temperature 0", "set a temperature")),
        ({"sample_count": 2, "sampling": pb.Sampling(temperature=0.000001)}, "sample_count", ("temperature 1e-06",)),
        (
            {"sample_count": 3, "sampling": pb.Sampling(temperature=1, seed=2**63 - 2)},
            "sampling.seed",
            ("seed + 2", f"at most {2**63 - 1}"),
        ),
        ({"output": pb.OutputOptions(prompt_logprob_count=21)}, "output.prompt_logprob_count", ("is 21", "0 to 20")),
        ({"output": pb.OutputOptions(prompt_logprob_count=-1)}, "output.prompt_logprob_count", ("is -1", "0 to 20")),
        (
            {"output": pb.OutputOptions(echo_prompt=True), "resume": pb.ResumeOptions()},
            "output.echo_prompt",
            ("resume",),
        ),
    ],
)
async def test_what_cannot_be_drawn_is_refused_by_field_value_bound_and_fix(
    tmp_path: Path, fields: dict[str, Any], field: str, words: tuple[str, ...]
) -> None:
    async with generation(tmp_path) as (stub, _):
        error = await refused(stub, text=TEXT, **fields)
        assert error.reason is Reason.INVALID_REQUEST
        (violation,) = error.violations
        assert violation.field == field
        for word in words:
            assert word in violation.description


async def test_cancelling_many_samples_leaves_nothing(tmp_path: Path) -> None:
    async with generation(tmp_path) as (stub, cluster):
        stop = pb.StopConditions(max_output_token_count=500)
        for taken in (0, 1, 5, 30):
            call = stub.Generate(pb.GenerateRequest(text=TEXT, stop=stop, sampling=DRAWN, sample_count=8), timeout=60)
            for _ in range(taken):
                await call.read()
            with cluster.standing():
                call.cancel()
                await cluster.until_balanced()


# The prompt


def prompt_of(events: Sequence[Any]) -> list[pb.Prompt]:
    parts = [event.prompt for event in events if event.WhichOneof("event") == "prompt"]
    said = kinds(events)
    assert said[1 : 1 + len(parts)] == ["prompt"] * len(parts), "right behind Started, before any chunk"
    assert [part.first_token_index for part in parts] == [
        sum(each.token_count for each in parts[:index]) for index in range(len(parts))
    ]
    return parts


@pytest.mark.parametrize("content", ["TEXT", "TOKEN_IDS", "BOTH"])
@pytest.mark.parametrize("scored", [False, True])
async def test_the_prompt_comes_back_in_the_form_of_the_answer(tmp_path: Path, content: str, scored: bool) -> None:
    async with generation(tmp_path) as (stub, _):
        output = pb.OutputOptions(content=f"CONTENT_{content}", echo_prompt=True)
        if scored:
            output.prompt_logprob_count = 0
        for text in (TEXT, LONG):
            ids = TOKENIZER.encode(text)
            parts = prompt_of(await collect(stub, text=text, output=output))
            assert sum(part.token_count for part in parts) == len(ids)
            assert "".join(part.text for part in parts) == ("" if content == "TOKEN_IDS" else text)
            told = [token_id for part in parts for token_id in part.token_ids]
            assert told == ([] if content == "TEXT" else list(ids))
            assert sum(len(part.logprobs) for part in parts) == (len(ids) if scored else 0)


async def test_a_chat_is_echoed_as_the_model_read_it_special_tokens_and_all(tmp_path: Path) -> None:
    async with generation(tmp_path) as (stub, _):
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hello, fox!")])
        parts = prompt_of(await collect(stub, chat=chat, output=ECHO))
        assert "".join(part.text for part in parts) == (
            "<|im_start|>user\nHello, fox!<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_a_prompt_that_ends_inside_a_character_is_told_to_its_end(tmp_path: Path) -> None:
    async with generation(tmp_path) as (stub, _):
        ids = TOKENIZER.encode(TEXT)[:-1]
        events = await collect(stub, token_ids=pb.TokenIds(ids=ids), output=ECHO)
        assert "".join(part.text for part in prompt_of(events)) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("placement", ["split", "local"])
async def test_a_long_prompts_logprobs_come_in_messages_of_bounded_size(tmp_path: Path, placement: str) -> None:
    async with generation(tmp_path, placement=placement) as (stub, _):
        ids = [3 + index % 300 for index in range(2000)]
        output = pb.OutputOptions(content=BOTH, prompt_logprob_count=20)
        events = await collect(stub, token_ids=pb.TokenIds(ids=ids), output=output)
        parts = prompt_of(events)
        assert max(event.ByteSize() for event in events) <= 96 * 1024
        assert len(parts) > 5
        assert all(not part.text and not part.token_ids for part in parts), "not asked for"
        told = [each for part in parts for each in part.logprobs]
        scores = RULE.prompt_logprobs(ids, 20)
        assert [each.token_id for each in told] == ids
        assert told[0].rank == 0
        assert not told[0].top
        for index in range(1, len(ids)):
            score = scores[index]
            assert score is not None
            assert (told[index].logprob, told[index].rank) == (score.logprob, score.rank)
            assert [(top.token_id, top.logprob) for top in told[index].top] == list(score.top)
        assert events[-1].finished.usage.cached_prompt_token_count == 0


async def test_a_reader_who_stalls_in_the_prompt_holds_no_other_up(tmp_path: Path) -> None:
    async with generation(tmp_path) as (stub, cluster):
        ids = [3 + index % 300 for index in range(2000)]
        output = pb.OutputOptions(content=BOTH, prompt_logprob_count=20)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), output=output)
        stalled = stub.Generate(request, timeout=60)
        await stalled.read()
        for _ in range(3):
            assert kinds(await collect(stub, text=TEXT))[-1] == "finished"
        stalled.cancel()
        await asyncio.sleep(0)
        await cluster.until_balanced()

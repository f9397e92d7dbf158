"""Several samples, log probabilities and cached tokens on real engines in float32, beside one plain vLLM engine.

In float32 an answer does not depend on what else is in the batch, so tokens must be equal and log probabilities equal
within its rounding.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from patience import START_S, WITHIN_S, patient

from baton.leg import DecodeOrder, KvAdopted, PrefillOrder, Stepped
from baton.request import EngineStop, LegFinish, Sampling
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc
from bench.cores import pinned_engine_environment
from bench.corpus import Corpus
from bench.decode_events import told
from bench.fleet_under_test import FleetUnderTest, running_fleet
from bench.real_fleet import fleet_config
from router.grpc_worker_client import GrpcWorkerClient

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

BLOCK = 128
PROMPT_LENGTH, SCORED_LENGTH, CACHED_LENGTH = 1100, 700, 900
SAMPLE_COUNT, OUTPUT_LENGTH, SEED = 8, 40, 1234
KV_BYTES_PER_TOKEN = 2 * 23_040
"""30 layers, 3 KV heads of 64, K and V, float32."""
TOLERANCE = 2e-3
TOP_COUNT = 5
REGEX = "[a-z]{3,8} [0-9]{2,4}"


@dataclass
class Heard:
    """What one call brought."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[pb.TokenLogprobs]] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)
    prompt: list[pb.TokenLogprobs] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    prompt_text: str = ""
    generation_id: str = ""
    finished: pb.Finished = field(default_factory=pb.Finished)
    largest_part_bytes: int = 0
    used_block_counts: list[int] = field(default_factory=list)


@dataclass
class Baton:
    """The fleet, a stub, and what a plain engine says to the same questions."""

    fleet: FleetUnderTest
    stub: Any
    plain: list[dict[str, Any]]
    prompts: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[tuple[int, ...]]:
    corpus = Corpus(model_path, 55)
    return [corpus.prompt(length) for length in (PROMPT_LENGTH, SCORED_LENGTH, CACHED_LENGTH)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def baton(
    model_path: Path, prompts: list[tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Baton]:
    folder = tmp_path_factory.mktemp("samples")
    config = patient(
        fleet_config(model_path, folder / "fleet", prefill_cores="[[0]]", decode_cores="[[1]]", dtype="float32")
    )
    asking = asyncio.create_task(asyncio.to_thread(plain_answers, model_path, folder, prompts))
    try:
        async with (
            running_fleet(config, start_timeout_s=START_S) as fleet,
            grpc.aio.insecure_channel(fleet.address) as channel,
        ):
            stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            yield Baton(fleet, stub, await asking, prompts)
    finally:
        await asyncio.gather(asking, return_exceptions=True)


def plain_answers(model_path: Path, folder: Path, prompts: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    samples = {
        "n": SAMPLE_COUNT,
        "temperature": 1.0,
        "seed": SEED,
        "max_tokens": OUTPUT_LENGTH,
        "ignore_eos": True,
        "logprobs": 0,
    }
    scored = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": TOP_COUNT, "prompt_logprobs": 5}
    held = {
        "n": 3,
        "temperature": 1.0,
        "seed": 99,
        "max_tokens": 24,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "structured_outputs": {"regex": REGEX},
    }
    questions = [
        {"prompt_token_ids": prompts[0], "params": samples},
        {"prompt_token_ids": prompts[1], "params": scored},
        {"prompt_token_ids": prompts[1], "params": held},
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    command = [sys.executable, str(Path(__file__).with_name("plain_engine.py")), "--core", "0"]
    for name, value in (
        ("model", model_path),
        ("questions", folder / "questions.json"),
        ("out", folder / "out.json"),
    ):
        command += [f"--{name}", str(value)]
    environment = pinned_engine_environment(os.environ, (0,))
    root = Path(__file__).resolve().parents[2]
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(root)}
    subprocess.run(command, check=True, env=environment, cwd=root, timeout=START_S)
    answers: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return answers


async def ask(baton: Baton, request: pb.GenerateRequest) -> Heard:
    heard = Heard()
    async for event in baton.stub.Generate(request, timeout=WITHIN_S):
        match event.WhichOneof("event"):
            case "started":
                heard.generation_id = event.started.generation_id
            case "prompt":
                heard.prompt += event.prompt.logprobs
                heard.prompt_ids += event.prompt.token_ids
                heard.prompt_text += event.prompt.text
                heard.largest_part_bytes = max(heard.largest_part_bytes, event.ByteSize())
            case "chunk":
                ids = heard.ids.setdefault(event.chunk.sample_index, [])
                assert event.chunk.first_token_index == len(ids), "no gap, no repeat within a sample"
                ids += event.chunk.token_ids
                heard.texts[event.chunk.sample_index] = (
                    heard.texts.get(event.chunk.sample_index, "") + event.chunk.text
                )
                heard.logprobs.setdefault(event.chunk.sample_index, []).extend(event.chunk.logprobs)
                if len(heard.ids) == SAMPLE_COUNT and len(heard.used_block_counts) < SAMPLE_COUNT:
                    books = await baton.fleet.books()
                    heard.used_block_counts.append(max(each.used_block_count for each in books.values()))
            case "finished":
                heard.finished = event.finished
    return heard


def request(prompt: Sequence[int], **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), **fields)


def samples_of(prompt: Sequence[int]) -> pb.GenerateRequest:
    return request(
        prompt,
        sampling=pb.Sampling(temperature=1.0, seed=SEED),
        stop=pb.StopConditions(max_output_token_count=OUTPUT_LENGTH, ignore_eos=True),
        output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS, top_logprob_count=0),
        sample_count=SAMPLE_COUNT,
    )


def worker_metric(fleet: FleetUnderTest, name: str) -> dict[str, float]:
    """Of each worker, summed over labels."""
    return {
        worker_id: scraped(str(endpoint["metrics_address"]), name)
        for worker_id, endpoint in fleet.endpoints().items()
    }


def scraped(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        text = page.read().decode()
    return sum(float(each) for each in re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([-+0-9.eE]+)$", text, re.M))


async def test_eight_samples_share_one_prefill_and_equal_those_of_one_plain_engine(baton: Baton) -> None:
    prompt = baton.prompts[0]
    before = worker_metric(baton.fleet, "baton_worker_prefill_tokens_total")
    router = baton.fleet.config.router.metrics_address
    names = ("baton_kv_transfer_bytes_total", "baton_cached_prompt_tokens_total", "baton_kv_pulls_total")
    said_before = [scraped(router, name) for name in names]
    heard = await ask(baton, samples_of(prompt))
    after = worker_metric(baton.fleet, "baton_worker_prefill_tokens_total")
    pulled_bytes, cached, pulls = (
        scraped(router, name) - before for name, before in zip(names, said_before, strict=True)
    )

    plain = baton.plain[0]["samples"]
    assert [heard.ids[index] for index in range(SAMPLE_COUNT)] == [each["token_ids"] for each in plain]
    assert len({tuple(ids) for ids in heard.ids.values()}) == SAMPLE_COUNT, "each has a seed of its own"
    for index, sample in enumerate(plain):
        for said, (logprob, rank) in zip(heard.logprobs[index], sample["logprobs"], strict=True):
            assert said.logprob == pytest.approx(logprob, abs=TOLERANCE)
            assert is_rank_like(said.rank, rank)

    # The KV: one prefill, one pull, and the prompt's blocks once.
    full_blocks = PROMPT_LENGTH // BLOCK
    (prefill_id,) = [each for each in after if each.startswith("p")]
    (decode_id,) = [each for each in after if each.startswith("d")]
    assert after[prefill_id] - before[prefill_id] == PROMPT_LENGTH
    tail = PROMPT_LENGTH - full_blocks * BLOCK
    assert after[decode_id] - before[decode_id] == (SAMPLE_COUNT - 1) * tail
    assert pulls == 1
    assert pulled_bytes == heard.finished.phases.kv_transfer_byte_count
    assert pulled_bytes == (full_blocks + 1) * BLOCK * KV_BYTES_PER_TOKEN
    assert cached == (SAMPLE_COUNT - 1) * full_blocks * BLOCK
    assert heard.used_block_counts, "the books were read while all samples ran"
    assert max(heard.used_block_counts) <= full_blocks + SAMPLE_COUNT * 2

    finished = heard.finished
    assert finished.usage.prompt_token_count == PROMPT_LENGTH
    assert finished.usage.output_token_count == SAMPLE_COUNT * OUTPUT_LENGTH
    assert finished.usage.cached_prompt_token_count == 0
    assert [each.sample_index for each in finished.samples] == list(range(SAMPLE_COUNT))
    await baton.fleet.quiet_after_s(None, WITHIN_S)


async def test_each_sample_has_a_structure_and_penalties_of_its_own(baton: Baton) -> None:
    sampling = pb.Sampling(
        temperature=1.0,
        seed=99,
        presence_penalty=0.5,
        repetition_penalty=1.1,
        structure=pb.StructuredOutput(regex=REGEX),
    )
    stop = pb.StopConditions(max_output_token_count=24)
    output = pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH)
    asked = request(baton.prompts[1], sampling=sampling, stop=stop, output=output, sample_count=3)
    heard = await ask(baton, asked)
    assert [heard.ids[index] for index in range(3)] == [each["token_ids"] for each in baton.plain[2]["samples"]]
    for text in heard.texts.values():
        assert re.fullmatch(REGEX, "".join(text))


async def test_prompt_and_answer_logprobs_equal_those_of_one_plain_engine(baton: Baton) -> None:
    prompt = baton.prompts[1]
    output = pb.OutputOptions(
        content=pb.OutputOptions.CONTENT_BOTH, top_logprob_count=TOP_COUNT, prompt_logprob_count=5, echo_prompt=True
    )
    stop = pb.StopConditions(max_output_token_count=8, ignore_eos=True)
    plain = baton.plain[1]
    for _ in range(2):  # the second time the prompt is in the cache, which must not be read
        heard = await ask(baton, request(prompt, stop=stop, output=output))
        assert heard.ids[0] == plain["samples"][0]["token_ids"]
        for said, (logprob, rank) in zip(heard.logprobs[0], plain["samples"][0]["logprobs"], strict=True):
            assert said.logprob == pytest.approx(logprob, abs=TOLERANCE)
            assert is_rank_like(said.rank, rank)
        assert heard.prompt_ids == list(prompt)
        assert [each.token_id for each in heard.prompt] == list(prompt)
        assert heard.prompt[0].rank == 0
        for entry, (logprob, rank, likeliest) in zip(heard.prompt[1:], plain["prompt"], strict=True):
            assert entry.logprob == pytest.approx(logprob, abs=TOLERANCE)
            assert is_rank_like(entry.rank, rank)
            expected = dict(likeliest)
            assert len(entry.top) == TOP_COUNT
            for top in entry.top:
                nearest = min(abs(top.logprob - other) for other in expected.values())
                assert nearest <= TOLERANCE
                assert top.token_id not in expected or top.logprob == pytest.approx(
                    expected[top.token_id], abs=TOLERANCE
                )
        assert heard.finished.usage.cached_prompt_token_count == 0
        assert heard.largest_part_bytes <= 256 * 1024


async def test_the_second_ask_of_a_prompt_counts_the_tokens_that_the_engine_found_in_its_cache(baton: Baton) -> None:
    prompt = baton.prompts[2]
    stop = pb.StopConditions(max_output_token_count=4, ignore_eos=True)
    found, computed = [], []
    for _ in range(3):
        before = worker_metric(baton.fleet, "baton_worker_prefill_tokens_total")
        output = pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS)
        heard = await ask(baton, request(prompt, stop=stop, output=output))
        after = worker_metric(baton.fleet, "baton_worker_prefill_tokens_total")
        found.append(heard.finished.usage.cached_prompt_token_count)
        computed.append(sum(after.values()) - sum(before.values()))
    cached = (CACHED_LENGTH - 1) // BLOCK * BLOCK
    assert found == [0, cached, cached]
    assert computed == [CACHED_LENGTH - each for each in found], "what was not found was computed"


async def test_a_worker_that_scores_a_prompt_for_itself_goes_on_from_its_first_token(baton: Baton) -> None:
    """What a router does where the decode worker computes the prompt: a prefill that holds nothing, then a decode."""
    prompt = baton.prompts[1]
    plain = baton.plain[1]
    (endpoint,) = [each for worker_id, each in baton.fleet.endpoints().items() if worker_id.startswith("d")]
    client = GrpcWorkerClient(str(endpoint["address"]), baton.fleet.secret)
    try:
        stop = EngineStop(max_token_count=1, ignore_eos=True)
        order = PrefillOrder("t.1", prompt, Sampling(), stop, 60.0, prompt_logprob_count=TOP_COUNT)
        reply = await client.prefill(order, timeout_s=WITHIN_S)
        assert (reply.finish, reply.ticket) == (LegFinish.LENGTH, b"")
        assert reply.prompt_logprobs is not None
        for index, (logprob, rank, _) in enumerate(plain["prompt"], start=1):
            said = reply.prompt_logprobs[index]
            assert said is not None
            assert said.logprob == pytest.approx(logprob, abs=TOLERANCE)
            assert is_rank_like(said.rank, rank)
        stop = EngineStop(max_token_count=7, ignore_eos=True)
        goes_on = DecodeOrder("t.2", (*prompt, reply.first_token_id), Sampling(), stop, output_token_count=1)
        async with aclosing(told(client, goes_on, WITHIN_S)) as events:
            adopted, *steps = [event async for event in events]
        tokens = [token_id for step in steps if isinstance(step, Stepped) for token_id in step.token_ids]
        assert [reply.first_token_id, *tokens] == plain["samples"][0]["token_ids"]
        assert isinstance(adopted, KvAdopted)
        assert adopted.cached_token_count == SCORED_LENGTH // BLOCK * BLOCK, "what was scored is in the cache"
    finally:
        await client.close()


def is_rank_like(said: int, rank: int) -> bool:
    """Far from the likeliest, tokens lie so close together that rounding swaps them."""
    return abs(said - rank) <= max(1 if rank > TOP_COUNT else 0, rank // 50)

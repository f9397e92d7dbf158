"""Every mode of the public API over real sockets: what a caller asks reaches the engine, what it is told is whole."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from sim_cluster import RULE, TOKENIZER, SimCluster, sim_cluster

from baton.client import BatonClient, Chunk, Event, Finished
from baton.errors import BatonError, Reason
from baton.request import (
    Handover,
    OutputOptions,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
)
from baton.status import from_rpc_error
from baton.sync_client import BatonClientSync
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from engine.protocol import DecodeJob, PrefillJob
from engine.sim_tokens import simulated_answer

PROMPT = "Once upon a time there was a small model"
EVERY_MODE = Sampling(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    seed=17,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.25,
    logit_bias=((3, 2.5), (4, -100.0)),
    allowed_token_ids=tuple(range(3, 200)),
    bad_token_sequences=((5,), (6, 7)),
)


async def collect(client: BatonClient, **options: Any) -> list[Event]:
    async with aclosing(client.generate(PROMPT, timeout=60, **options)) as events:
        return [event async for event in events]


def overhear(cluster: SimCluster, jobs: list[PrefillJob | DecodeJob]) -> None:
    """Notes every job that an engine is given."""
    for worker in cluster.workers.values():
        engine: Any = worker.engine
        prefill, decode = engine.prefill, engine.decode

        def heard_prefill(job: PrefillJob, prefill: Any = prefill) -> Any:
            jobs.append(job)
            return prefill(job)

        def heard_decode(job: DecodeJob, decode: Any = decode) -> Any:
            jobs.append(job)
            return decode(job)

        engine.prefill, engine.decode = heard_prefill, heard_decode


async def test_every_mode_reaches_both_engines_as_it_was_asked(tmp_path: Path) -> None:
    structure = Structure(StructureKind.JSON_SCHEMA, '{"type": "object"}')
    with_structure = Sampling(temperature=0.5, seed=1, structure=structure)
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        for sampling, stop in (
            (EVERY_MODE, StopConditions(9, stop_token_ids=(11,), min_output_token_count=4)),
            (with_structure, StopConditions(9)),
        ):
            jobs: list[PrefillJob | DecodeJob] = []
            overhear(cluster, jobs)
            options = OutputOptions(top_logprob_count=2)
            await collect(client, sampling=sampling, stop=stop, output=options, tenant="blue")
            assert {type(job) for job in jobs} == {PrefillJob, DecodeJob}
            for job in jobs:
                assert job.sampling == sampling
                assert (job.stop.stop_token_ids, job.stop.min_token_count) == (
                    stop.stop_token_ids,
                    stop.min_output_token_count,
                )
                assert (job.top_logprob_count, job.tenant) == (2, "blue")
                assert job.output_token_count == (1 if isinstance(job, DecodeJob) else 0)


async def test_logprobs_come_one_for_each_token_with_their_sum_and_only_if_asked_for(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        stop = StopConditions(20, ignore_eos=True)
        for output in (OutputOptions(top_logprob_count=3), OutputOptions(False, True, 1, 0)):
            events = await collect(client, stop=stop, output=output)
            chunks = [event for event in events if isinstance(event, Chunk)]
            finished = events[-1]
            assert isinstance(finished, Finished)
            entries = [each for chunk in chunks for each in chunk.logprobs]
            expected = simulated_answer(TOKENIZER.encode(PROMPT), 20, RULE, ignore_eos=True)
            assert tuple(each.token_id for each in entries) == expected
            assert {len(each.top) for each in entries} == {output.top_logprob_count}
            assert finished.cumulative_logprob == pytest.approx(sum(each.logprob for each in entries))
        events = await collect(client, stop=stop)
        assert all(not event.logprobs for event in events if isinstance(event, Chunk))
        assert isinstance(events[-1], Finished)
        assert events[-1].cumulative_logprob is None


async def test_a_stop_sequence_cuts_text_logprobs_and_sum_alike(tmp_path: Path) -> None:
    whole = simulated_answer(TOKENIZER.encode(PROMPT), 20, RULE, ignore_eos=True)
    texts = [TOKENIZER.decode((token,)) for token in whole]
    at = next(index for index in range(5, 20) if texts[index].isprintable() and texts[index].strip())
    sequence = texts[at]
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        stop = StopConditions(20, stop_sequences=(sequence,), ignore_eos=True)
        events = await collect(client, stop=stop, output=OutputOptions(top_logprob_count=0))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.matched_stop_sequence == sequence
    entries = [each for event in events if isinstance(event, Chunk) for each in event.logprobs]
    count = finished.usage.output_token_count
    assert tuple(each.token_id for each in entries) == whole[:count]
    assert count <= at + 1
    assert finished.cumulative_logprob == pytest.approx(sum(each.logprob for each in entries))


async def test_a_caller_is_told_what_its_transfer_took(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        finished = (await collect(client, stop=StopConditions(8)))[-1]
        assert isinstance(finished, Finished)
        transfer = finished.phases.transfer
        assert finished.phases.handover is Handover.OUTPUT_INJECTION
        assert transfer.kv_bytes > 0
        assert transfer.pull_count == 1
        assert transfer.recompute_reason is None
        first_only = (await collect(client, stop=StopConditions(1)))[-1]
        assert isinstance(first_only, Finished)
        assert first_only.phases.handover is Handover.NONE


async def test_a_violation_names_every_new_field_at_once(tmp_path: Path) -> None:
    wrong = replace(
        EVERY_MODE,
        presence_penalty=3.0,
        frequency_penalty=-3.0,
        repetition_penalty=0.0,
        logit_bias=((10**6, 0.0),),
        allowed_token_ids=(-1,),
        bad_token_sequences=((),),
    )
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        with pytest.raises(BatonError) as refused:
            await collect(
                client,
                sampling=wrong,
                stop=StopConditions(4, min_output_token_count=5),
                output=OutputOptions(top_logprob_count=21),
            )
        with pytest.raises(BatonError) as refused_tenant:
            await collect(client, tenant="not/this")
    assert [violation.field for violation in refused_tenant.value.violations] == ["tenant"]
    assert refused.value.reason is Reason.INVALID_REQUEST
    assert [violation.field for violation in refused.value.violations] == [
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "sampling.repetition_penalty",
        "sampling.logit_bias[0].token_id",
        "sampling.allowed_token_ids.ids[0]",
        "sampling.bad_token_sequences[0].ids",
        "stop.min_output_token_count",
        "output.top_logprob_count",
    ]


async def test_an_empty_list_and_a_structure_of_no_kind_are_refused_on_the_wire(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, grpc.aio.insecure_channel(cluster.endpoint.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        sampling = pb.Sampling(allowed_token_ids=pb.TokenIds(), structure=pb.StructuredOutput())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Generate(pb.GenerateRequest(text="hi", sampling=sampling), timeout=60):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = from_rpc_error(refused.value, peer="router")
        assert [each.field for each in error.violations] == ["sampling.allowed_token_ids", "sampling.structure"]


async def test_the_client_without_a_loop_speaks_every_mode_too(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:

        def ask() -> list[Event]:
            with BatonClientSync(cluster.endpoint.address) as client:
                return list(
                    client.generate(
                        PROMPT,
                        timeout=60,
                        sampling=EVERY_MODE,
                        stop=StopConditions(5),
                        output=OutputOptions(top_logprob_count=1),
                        tenant="blue",
                    )
                )

        events = await asyncio.to_thread(ask)
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.cumulative_logprob is not None

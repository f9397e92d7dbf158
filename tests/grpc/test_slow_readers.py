"""Callers that stop reading. They cost a bounded memory and a bounded time, deadline or no deadline of theirs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from sim_cluster import sim_cluster

from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc

PROMPT = "Once upon a time there was a small model"


async def test_a_caller_who_never_reads_is_let_go_at_the_deadline_the_router_gave_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits: dict[str, Any] = {"max_deadline_s": 3.0, "default_deadline_s": 3.0}
    # A window of the smallest size: it is full after a few chunks.
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with (
        sim_cluster(tmp_path, **limits) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address, options=options) as channel,
    ):
        stub: Any = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.GenerateRequest(
            text=PROMPT,
            stop=pb.StopConditions(max_output_token_count=1900, ignore_eos=True),
            output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH, max_chunk_token_count=1),
        )
        calls = [stub.Generate(request) for _ in range(3)]
        for call in calls:
            await call.read()
        await asyncio.sleep(0.3)
        assert cluster.server.generation.call_count == 3
        await cluster.until(lambda: cluster.server.generation.call_count == 0, "the end of calls that nobody reads")
        await cluster.until(lambda: not handlers(), "the end of statuses that nobody reads")
        for call in calls:
            call.cancel()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_callers_who_never_read_keep_no_place_of_those_who_do(tmp_path: Path) -> None:
    """To gRPC a call is open until its caller has read its end, and to us until our part of it is over."""
    limits: dict[str, Any] = {"max_deadline_s": 2.5, "default_deadline_s": 2.5, "max_concurrent_call_count": 2}
    async with (
        sim_cluster(tmp_path, **limits) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address, options=SMALL_WINDOW) as deaf,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        long = ask(1900, pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH, max_chunk_token_count=1))
        calls = [stub_of(deaf).Generate(long) for _ in range(2)]
        for call in calls:
            await call.read()
        await cluster.until(lambda: not handlers(), "the end of statuses that nobody reads")
        assert not any(call.done() for call in calls), "to gRPC they are open"
        assert sum(await chunk_sizes(stub_of(channel).Generate(ask(5, pb.OutputOptions()), timeout=60))) == 5
        for call in calls:
            call.cancel()


def handlers() -> list[str]:
    """gRPC's tasks that serve a call."""
    return [name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("HandleExceptions")]


async def test_what_a_stalled_reader_does_not_take_is_its_answer_in_large_pieces_and_no_engine_waits_for_it(
    tmp_path: Path,
) -> None:
    token_count = 1900
    async with (
        sim_cluster(tmp_path) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address, options=SMALL_WINDOW) as slow_channel,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        call = stub_of(slow_channel).Generate(ask(token_count, pb.OutputOptions()), timeout=60)
        await call.read()  # Started; and then nothing more is read
        await cluster.until(lambda: cluster.server.generation.call_count == 1, "the stream")
        await cluster.until(
            lambda: all(worker.is_balanced() for worker in cluster.workers.values()), "every engine done with it"
        )
        assert cluster.server.generation.call_count == 1, "the call is still there: nobody read it"
        (flight,) = cluster.server.relay._flights
        waiting_count = len(flight.outbox._items)
        largest = flight.request.max_chunk_token_count
        assert 0 < waiting_count <= 2 + token_count // (largest // 2), "it is not merged while it waits"

        other = stub_of(channel).Generate(ask(50, pb.OutputOptions()), timeout=60)
        assert sum(await chunk_sizes(other)) == 50, "others are served meanwhile"

        sizes = await chunk_sizes(call)
        assert sum(sizes) == token_count
        assert max(sizes) > 1
        assert len(sizes) < token_count / 2


SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


def stub_of(channel: Any) -> Any:
    return pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]


def ask(count: int, output: pb.OutputOptions) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_output_token_count=count, ignore_eos=True)
    return pb.GenerateRequest(text=PROMPT, stop=stop, output=output)


async def chunk_sizes(call: Any) -> list[int]:
    """Tokens of each chunk, none missing and none twice; the stream must end as it should."""
    sizes: list[int] = []
    is_finished = False
    while (response := await call.read()) is not grpc.aio.EOF:
        if response.HasField("chunk"):
            assert response.chunk.first_token_index == sum(sizes)
            sizes.append(response.chunk.token_count)
        is_finished = is_finished or response.HasField("finished")
    assert is_finished
    return sizes

"""The end of a drain, of more calls than can be told at once: each hears why, however slow it goes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from sim_cluster import sim_cluster

from baton.errors import Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from engine.cost import CostModel, DecodeCost
from router import goodbyes
from router.flight import Flight

CALL_COUNT = 48
HELD_UP_S = 0.05
"""Of the loop, by the end of each call: 2.4 s in all, longer than any wait of a fixed second."""
TURN_COUNT = 20
"""Of the loop, in which that is: told all at once, none would have its status before the last of these turns."""


async def test_every_stream_open_at_the_end_of_a_drain_hears_draining_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_up = Flight._clean_up

    async def slow(flight: Flight) -> None:
        for _ in range(TURN_COUNT):
            time.sleep(HELD_UP_S / TURN_COUNT)  # noqa: ASYNC251  # the loop is to be held up
            await asyncio.sleep(0)
        await clean_up(flight)

    monkeypatch.setattr(Flight, "_clean_up", slow)
    monkeypatch.setattr(goodbyes, "LEAST_S", 60.0)  # nobody waits so long; a machine that stands still may
    sim = {"cost": CostModel(decode=DecodeCost(base_s=2.0)), "max_running_count": 2 * CALL_COUNT}
    config: dict[str, Any] = {"drain_notice_s": 0.0, "drain_grace_s": 0.0}
    async with (
        sim_cluster(tmp_path, sim=sim, **config) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        stub: Any = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        stop = pb.StopConditions(max_output_token_count=500, ignore_eos=True)
        plain = pb.GenerateRequest(text="hello", stop=stop)
        resumable = pb.GenerateRequest(text="hello", stop=stop, resume=pb.ResumeOptions())
        calls = [stub.Generate(resumable if number % 3 == 0 else plain, timeout=300) for number in range(CALL_COUNT)]
        for call in calls:
            while not (await call.read()).HasField("chunk"):
                pass
        await cluster.server.drain(asyncio.Event())
        closing = asyncio.create_task(cluster.server.close())
        reasons = [await _reason(call) for call in calls]
        await closing
        assert reasons == [Reason.DRAINING] * CALL_COUNT


async def _reason(call: Any) -> Reason | None:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return None


async def test_what_is_refused_before_it_is_served_is_counted_as_ended_without_success(tmp_path: Path) -> None:
    sim = {"cost": CostModel(decode=DecodeCost(base_s=2.0))}
    async with (
        sim_cluster(tmp_path, sim=sim, max_concurrent_call_count=1) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        stub: Any = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.GenerateRequest(text="hello", stop=pb.StopConditions(ignore_eos=True))
        runs = stub.Generate(request, timeout=300)
        await runs.read()
        assert await _reason(stub.Generate(request, timeout=300)) is Reason.QUEUE_FULL
        counts = cluster.server.counts()
        assert (counts.finished_count, counts.failed_count) == (1, 1)
        unreadable: Any = channel.unary_stream("/baton.v1.GenerationService/Generate")
        assert await _reason(unreadable(b"\xff\xff", timeout=300)) is Reason.INVALID_REQUEST
        counts = cluster.server.counts()
        assert (counts.finished_count, counts.failed_count, counts.in_flight_count) == (2, 2, 1)
        runs.cancel()

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


def handlers() -> list[str]:
    """gRPC's tasks that serve a call."""
    return [name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("HandleExceptions")]

"""What a call can end with besides Baton's own reasons: messages that are none, and what gRPC itself refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_calls import GENERATION, METHODS, MODELS, ask, generate
from sim_cluster import SimCluster, sim_cluster

from baton.errors import BatonError, Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.v1 import status_pb2, status_pb2_grpc
from engine.sim_config import PhaseDelays

UNREADABLE = {
    "cut short": pb.GenerateRequest(text="a secret").SerializeToString()[:-3],
    "a wire type that is none": b"\x0f\x0f\x0f",
    "text that is not UTF-8": b"\x12\x02\xff\xfe",
    "bytes of anything": bytes(range(255, 128, -1)),
}
HELLO = pb.GenerateRequest(text="hello", stop=pb.StopConditions(max_output_token_count=3))


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[SimCluster]:
    async with sim_cluster(tmp_path, max_message_bytes=65_536) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def channel(cluster: SimCluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.endpoint.address) as channel:
        yield channel


@pytest.mark.parametrize("what", UNREADABLE)
async def test_bytes_that_are_no_request_are_refused_with_a_reason(
    channel: grpc.aio.Channel, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        outcome = await generate(channel, UNREADABLE[what])
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert list(outcome.violations) == ["request"]
    assert not outcome.has_headers
    assert "secret" not in outcome.text
    assert caplog.text == "", "a caller's rubbish is no line in our log"
    assert (await generate(channel, HELLO)).finished.usage.output_token_count == 3


async def test_unknown_fields_are_tolerated_as_newer_clients_may_send_them(channel: grpc.aio.Channel) -> None:
    unknown = bytes([0xFA, 0x7F, 2]) + b"ab"  # field 2047, two bytes
    outcome = await generate(channel, HELLO.SerializeToString() + unknown)
    assert outcome.finished.usage.output_token_count == 3


async def test_a_method_that_is_not_there_is_unimplemented(channel: grpc.aio.Channel) -> None:
    outcome = await ask(channel, f"/{GENERATION}/Nonsense", b"")
    assert outcome.code is grpc.StatusCode.UNIMPLEMENTED
    assert outcome.reason == ""


async def test_a_message_larger_than_the_limit_is_refused_by_grpc_itself(channel: grpc.aio.Channel) -> None:
    outcome = await generate(channel, pb.GenerateRequest(text="a" * 70_000))
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "")
    assert "larger than max" in outcome.text


async def test_a_small_message_that_unpacks_to_a_large_one_is_refused_too(channel: grpc.aio.Channel) -> None:
    bomb = pb.GenerateRequest(text="a" * 30_000_000)
    outcome = await generate(channel, bomb, compression=grpc.Compression.Gzip)
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "")
    assert "larger than max" in outcome.text
    small = await generate(channel, HELLO, compression=grpc.Compression.Gzip)
    assert small.finished.usage.output_token_count == 3


async def test_our_client_says_invalid_request_of_a_message_too_large(channel: grpc.aio.Channel) -> None:
    call: Any = channel.unary_stream(f"/{GENERATION}/Generate", request_serializer=bytes)(b"a" * 70_000)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(aiter(call))
    error = from_rpc_error(refused.value)
    assert isinstance(error, BatonError)
    assert error.reason is Reason.INVALID_REQUEST


async def test_more_calls_at_once_than_may_run_are_refused_with_a_reason_and_far_more_by_grpc_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"extra_delay_s": PhaseDelays(prefill=2.0)}
    async with (
        sim_cluster(tmp_path, sim=slow, max_concurrent_call_count=2) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        outcomes = await asyncio.gather(*(generate(channel, HELLO) for _ in range(6)))
        refused = [outcome for outcome in outcomes if outcome.code is not grpc.StatusCode.OK]
        assert len(refused) == 4
        for outcome in refused:
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert outcome.metadata == {"queued_count": "2", "queue_limit": "2"}
            assert outcome.details["RetryInfo"].retry_delay.seconds == 1
        assert cluster.server.generation.call_count == 0

        async def stuck(*_: Any) -> bool:
            await asyncio.sleep(2.0)
            return False

        monkeypatch.setattr(cluster.server.generation, "_counted", stuck)  # as calls are to gRPC that nobody reads
        outcomes = await asyncio.gather(*(generate(channel, HELLO) for _ in range(20)))
        texts = [outcome.text for outcome in outcomes]
        assert texts.count("Concurrent RPC limit exceeded!") == 20 - (4 + 3) * 2


async def test_who_watches_takes_no_place_of_who_generates_and_is_refused_with_a_reason(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, max_concurrent_call_count=2) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        status = status_pb2_grpc.StatusServiceStub(channel)  # type: ignore[no-untyped-call]
        health = health_pb2_grpc.HealthStub(channel)

        def watching() -> int:
            places = (cluster.server.status._places, cluster.server.health._servicers[0]._places)
            return max(each.taken_count for each in places)

        watches: list[Callable[[], Any]] = [
            lambda: status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60),
            lambda: health.Watch(health_pb2.HealthCheckRequest(), timeout=60),
        ]
        for watch in watches:
            calls = [watch() for _ in range(2)]
            for call in calls:
                assert await call.read() is not grpc.aio.EOF
            for _ in range(20):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await watch().read()
                error = from_rpc_error(refused.value)
                assert (error.reason, error.status.value) == (Reason.QUEUE_FULL, "RESOURCE_EXHAUSTED")
                assert error.metadata == {"queued_count": "2", "queue_limit": "2"}
                assert error.retry_after_s == 1.0
            assert (await generate(channel, HELLO)).code is grpc.StatusCode.OK
            calls.pop().cancel()
            await cluster.until(lambda: watching() < 2, "a place")
            again = watch()
            assert await again.read() is not grpc.aio.EOF
            for call in (*calls, again):
                call.cancel()
            await cluster.until(lambda: watching() == 0, "nobody watches")


async def test_more_calls_of_the_model_service_than_may_run_are_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        sim_cluster(tmp_path, max_concurrent_call_count=2) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        may_go_on = asyncio.Event()
        encode = cluster.server.models._token_ids

        async def slow(*arguments: Any, **options: Any) -> Any:
            await may_go_on.wait()
            return await encode(*arguments, **options)

        monkeypatch.setattr(cluster.server.models, "_token_ids", slow)
        request = models.CountTokensRequest(text="hello")
        running = [asyncio.create_task(ask(channel, f"/{MODELS}/CountTokens", request)) for _ in range(2)]
        await cluster.until(lambda: cluster.server.models.call_count == 2, "as many as may run")
        outcome = await ask(channel, f"/{MODELS}/CountTokens", request)
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (await generate(channel, HELLO)).code is grpc.StatusCode.OK
        may_go_on.set()
        assert [each.code for each in await asyncio.gather(*running)] == [grpc.StatusCode.OK] * 2


@pytest.mark.parametrize("path", METHODS)
async def test_every_public_method_is_served(channel: grpc.aio.Channel, path: str) -> None:
    outcome = await ask(channel, path, b"\xff")
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")

"""Connections over real sockets: their age, pings through silence, a router that goes, a greedy client."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from sim_cluster import FAST, SimCluster, sim_cluster

from baton.channels import SERVICE_CONFIG, channel_options
from baton.errors import Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from engine.cost import CostModel, DecodeCost, PrefillCost

PROMPT = "Once upon a time there was a small model"
STEP_S = 0.03
SLOW = CostModel(decode=DecodeCost(base_s=STEP_S))


def ask(count: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=PROMPT, stop=pb.StopConditions(max_output_token_count=count, ignore_eos=True))


def stub_of(channel: Any) -> Any:
    return pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]


async def token_count(call: Any) -> int:
    """Of the answer, every index in its place."""
    count = 0
    async for response in call:
        if response.HasField("chunk"):
            assert response.chunk.first_token_index == count
            count += response.chunk.token_count
    return count


class Wire:
    """Between client and router: counts the connections that were made, and whose end the router has closed."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self.opened_count = 0
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened_count += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            upstream, up = await asyncio.open_connection(self._host, self._port)
            await asyncio.gather(_copy(reader, up), _copy(upstream, writer), return_exceptions=True)
        except asyncio.CancelledError:
            return  # the end of the test: streams ask a cancelled task for its error, and would log that as one


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


@asynccontextmanager
async def wired(cluster: SimCluster, *options: tuple[str, Any]) -> AsyncIterator[tuple[Wire, Any]]:
    """``options`` come FIRST: of two of the same name gRPC takes the first."""
    wire = Wire(cluster.endpoint.address)
    async with (
        wire as address,
        grpc.aio.insecure_channel(address, options=[*options, *channel_options(address)]) as channel,
    ):
        yield wire, stub_of(channel)


async def test_a_stream_outlives_the_age_of_its_connection_and_the_next_call_comes_over_a_new_one(
    tmp_path: Path,
) -> None:
    config: dict[str, Any] = {
        "max_connection_age_s": 0.4,
        "max_connection_age_grace_s": 600.0,
        "max_deadline_s": 300.0,
        "default_deadline_s": 300.0,
    }
    async with sim_cluster(tmp_path, sim={"cost": SLOW}, **config) as cluster, wired(cluster) as (wire, stub):
        long = stub.Generate(ask(1500), timeout=200)
        counting = asyncio.create_task(token_count(long))
        await cluster.until(lambda: cluster.server.generation.call_count == 1, "the stream runs")
        assert wire.opened_count == 1

        async def reconnected() -> None:
            while wire.opened_count == 1:
                assert await token_count(stub.Generate(ask(2), timeout=60)) == 2
                await asyncio.sleep(0.05)

        await asyncio.wait_for(reconnected(), 60)
        assert not counting.done(), "the stream was on the old connection when the new one was made"
        cluster.set_cost(FAST)
        assert await counting == 1500
        assert await long.code() == grpc.StatusCode.OK


async def test_without_an_age_a_connection_stays(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, wired(cluster) as (wire, stub):
        for _ in range(20):
            assert await token_count(stub.Generate(ask(2), timeout=60)) == 2
            await asyncio.sleep(0.02)
        assert wire.opened_count == 1


SILENCE_S = 6.5
LONG_PREFILL = CostModel(prefill=PrefillCost(base_s=SILENCE_S))
PINGS = [("grpc.keepalive_time_ms", 200), ("grpc.keepalive_timeout_ms", 5000), ("grpc.enable_retries", 0)]
"""gRPC sends one a second at most. A server lets the first two pass and cuts off at the third strike after them."""


async def test_pings_through_a_silent_prefill_are_welcome_and_the_limit_is_what_makes_them_so(tmp_path: Path) -> None:
    """The real intervals, 60 s and 30 s, made short; and beside it a router that permits none, which does cut off."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sim = {"cost": LONG_PREFILL}
    async with (
        sim_cluster(tmp_path / "a", sim=sim, min_ping_interval_s=0.4) as patient,
        sim_cluster(tmp_path / "b", sim=sim, min_ping_interval_s=30.0) as strict,
        wired(patient, *PINGS) as (wire, welcome),
        wired(strict, *PINGS) as (_, unwelcome),
    ):
        asked = asyncio.create_task(token_count(welcome.Generate(ask(3), timeout=60)))
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await token_count(unwelcome.Generate(ask(3), timeout=60))
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "too many pings" in str(cut.value.details()).lower()
        assert await asked == 3
        assert wire.opened_count == 1


@asynccontextmanager
async def two_routers(directory: Path, **config: Any) -> AsyncIterator[tuple[SimCluster, SimCluster, str]]:
    """And a target that names both."""
    for name in ("a", "b"):
        (directory / name).mkdir()
    async with (
        sim_cluster(directory / "a", sim={"cost": SLOW}, **config) as first,
        sim_cluster(directory / "b", sim={"cost": SLOW}, **config) as second,
    ):
        yield first, second, f"ipv4:{first.endpoint.address},{second.endpoint.address}"


async def test_a_draining_router_says_so_first_then_refuses_and_finishes_what_runs_while_the_second_serves(
    tmp_path: Path,
) -> None:
    """A client that knows no health: the first address that answers is its own, until it is told to connect anew."""
    async with (
        two_routers(tmp_path, drain_notice_s=0.1, drain_grace_s=300.0) as (first, second, target),
        grpc.aio.insecure_channel(target, options=channel_options("127.0.0.1:1")) as channel,
    ):
        stub = stub_of(channel)
        order: list[str] = []
        long = asyncio.create_task(token_count(stub.Generate(ask(1500), timeout=200)))
        await first.until(lambda: first.server.generation.call_count == 1, "the first address is the first taken")
        _note(first, order)
        draining = asyncio.create_task(first.server.drain(asyncio.Event()))
        await first.until(lambda: "refuses" in order, "it refuses")
        assert order == ["health", "refuses"], "health flips before anything is refused"
        for _ in range(5):
            assert await token_count(stub.Generate(ask(2), timeout=60)) == 2
        assert not draining.done()
        assert second.server.generation.ended_count == 5
        first.set_cost(FAST)
        assert await long == 1500
        await draining


async def test_a_client_that_watches_health_turns_away_before_anything_is_refused(tmp_path: Path) -> None:
    config = {
        **SERVICE_CONFIG,
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "baton.v1.GenerationService"},
    }
    options = [("grpc.service_config", json.dumps(config)), *channel_options("127.0.0.1:1")]
    async with (
        two_routers(tmp_path, drain_notice_s=300.0, drain_grace_s=300.0) as (first, second, target),
        grpc.aio.insecure_channel(target, options=options) as channel,
    ):
        stub = stub_of(channel)
        while not (first.server.generation.ended_count and second.server.generation.ended_count):
            assert await token_count(stub.Generate(ask(2), timeout=60)) == 2  # round robin, once both are known
        long = [asyncio.create_task(token_count(stub.Generate(ask(1500), timeout=200))) for _ in range(2)]
        await first.until(lambda: first.server.generation.call_count == 1, "one of them is here")
        hurry = asyncio.Event()
        draining = asyncio.create_task(first.server.drain(hurry))
        await first.until(lambda: not first.server.health.is_serving, "health flips")
        await _until_seen(first, stub)
        before = first.server.generation.ended_count
        for _ in range(5):
            assert await token_count(stub.Generate(ask(2), timeout=60)) == 2
        assert first.server.generation.ended_count == before
        assert not first.server.generation.is_draining, "nothing has been refused yet"
        first.set_cost(FAST)
        second.set_cost(FAST)
        assert await asyncio.gather(*long) == [1500, 1500]
        hurry.set()
        await draining


async def _until_seen(first: SimCluster, stub: Any) -> None:
    """The client's own watch of the health has the news when two calls in a row went to the other router."""
    elsewhere_count = 0
    async with asyncio.timeout(60):
        while elsewhere_count < 2:
            before = first.server.generation.ended_count
            assert await token_count(stub.Generate(ask(2), timeout=60)) == 2
            elsewhere_count = elsewhere_count + 1 if first.server.generation.ended_count == before else 0


def _note(cluster: SimCluster, order: list[str]) -> None:
    health_drain, begin_drain = cluster.server.health.drain, cluster.server.generation.begin_drain

    async def flip() -> None:
        await health_drain()
        order.append("health")

    def refuse() -> None:
        begin_drain()
        order.append("refuses")

    cluster.server.health.drain = flip  # type: ignore[method-assign]
    cluster.server.generation.begin_drain = refuse  # type: ignore[method-assign]


async def test_a_greedy_connection_waits_for_its_own_calls_and_others_are_served(tmp_path: Path) -> None:
    config: dict[str, Any] = {"max_connection_call_count": 4}
    async with (
        sim_cluster(tmp_path, sim={"cost": SLOW}, **config) as cluster,
        wired(cluster) as (_, greedy),
        wired(cluster) as (_, modest),
    ):
        calls = [asyncio.create_task(token_count(greedy.Generate(ask(20), timeout=60))) for _ in range(12)]
        await cluster.until(lambda: cluster.server.generation.call_count >= 4, "as many as it may")
        seen = 0
        answer = asyncio.create_task(token_count(modest.Generate(ask(20), timeout=60)))
        while not answer.done():
            seen = max(seen, cluster.server.generation.call_count)
            await asyncio.sleep(0.005)
        assert await answer == 20
        assert seen <= 5
        assert await asyncio.gather(*calls) == [20] * 12, "kept back, not refused"


async def test_a_call_too_many_for_the_process_is_refused_and_can_be_told(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim={"cost": SLOW}, max_concurrent_call_count=4) as cluster,
        wired(cluster, ("grpc.enable_retries", 0)) as (_, stub),
    ):
        running = [stub.Generate(ask(1500), timeout=200) for _ in range(4)]
        await cluster.until(lambda: cluster.server.generation.call_count == 4, "as many as there may be")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await token_count(stub.Generate(ask(2), timeout=60))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert from_rpc_error(refused.value).reason is not Reason.INVALID_REQUEST
        for call in running:
            call.cancel()


async def test_a_burst_that_comes_while_the_router_is_busy_waits_and_is_not_cancelled_unseen(tmp_path: Path) -> None:
    """gRPC itself keeps calls that nobody has come to yet, and by default cancels those beyond a thousand or so."""
    wrong = pb.GenerateRequest(text=PROMPT, sampling=pb.Sampling(top_p=7.0))  # refused at once, and costs nothing
    async with sim_cluster(tmp_path) as cluster, AsyncExitStack() as stack:
        calls = []
        for _ in range(4):
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    cluster.endpoint.address,
                    options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)],
                )
            )
            await channel.channel_ready()
            calls += [stub_of(channel).Generate(wrong, timeout=60) for _ in range(900)]
        await asyncio.sleep(0)  # every call has begun...
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251  # ...and the loop that serves them is busy
        codes = Counter([await call.code() for call in calls])
        assert codes == {grpc.StatusCode.INVALID_ARGUMENT: len(calls)}

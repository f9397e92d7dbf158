"""Worker services over real loopback sockets: round trips, leaving early, outsiders, and closing time."""

from __future__ import annotations

import asyncio
import logging
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from baton.errors import BatonError, Reason, engine_failed
from baton.leg import RecomputeReason, pack_token_ids
from baton.metrics import WorkerMetrics
from baton.request import Role
from baton.secret import TOKEN_KEY, cluster_token
from baton.status import from_rpc_error
from baton.worker.v1 import worker_pb2, worker_pb2_grpc
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.hosting import HostConfig, HostingError, WorkerEndpoint, WorkerHost, run_worker_host, start_unless_stopped
from engine.introductions import Introductions
from engine.load_board import LoadBoard
from engine.protocol import DecodeEvent, DecodeJob, KvAdopted, Stepped
from engine.service import add_worker_service, worker_info
from engine.sim import SimConfig, SimEngine, SimNetwork, TokenRule, simulated_answer
from prefill_worker.service import add_prefill_service
from prefill_worker.worker import PrefillWorker

SECRET = bytes(range(32))
TOKEN = ((TOKEN_KEY, cluster_token(SECRET)),)
RULE = TokenRule(eos_probability=0.0)
PROMPT = tuple(range(5, 205))
STEP_S = 0.002
COST = CostModel(prefill=PrefillCost(base_s=0.005, per_token_s=1e-4), decode=DecodeCost(base_s=STEP_S))
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Worker:
    """A worker process's inside, and a stub for each of its services."""

    engine: SimEngine
    prefill: PrefillWorker
    decode: DecodeWorker
    board: LoadBoard
    host: WorkerHost
    channel: grpc.aio.Channel
    prefill_stub: Any
    decode_stub: Any
    worker_stub: Any
    health_stub: Any


def make_worker(name: str, network: SimNetwork, config: HostConfig) -> tuple[Any, ...]:
    engine = SimEngine(SimConfig(engine_id=name, tokens=RULE, cost=COST), network)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, name)
    shared: Any = {"worker_id": name, "epoch": "e1", "secret": SECRET, "metrics": metrics}
    prefill, decode = PrefillWorker(engine, **shared), DecodeWorker(engine, **shared)
    board = LoadBoard(engine, [prefill, decode], epoch="e1", metrics=metrics)
    info = worker_info(engine.info, worker_id=name, epoch="e1", role=Role.PREFILL)
    met = Introductions(engine, worker_id=name, secret=SECRET, allowed_hosts=["127.0.0.1"])
    attach = [
        partial(add_prefill_service, worker=prefill),
        partial(add_decode_service, worker=decode),
        partial(add_worker_service, info=info, board=board, introductions=met),
    ]
    return engine, prefill, decode, board, WorkerHost(config, secret=SECRET, registry=registry, attach=attach)


@asynccontextmanager
async def a_worker(
    name: str = "w0", network: SimNetwork | None = None, config: HostConfig | None = None
) -> AsyncIterator[Worker]:
    config = config or HostConfig(drain_s=0.2, grace_s=0.2)
    engine, prefill, decode, board, host = make_worker(name, network or SimNetwork(), config)
    await engine.start()
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(
        run_worker_host(
            engine, [prefill, decode], board, host, config, worker_id=name, stop=stop, on_ready=lambda _: ready.set()
        )
    )
    await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert ready.is_set(), running
    options = [("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(host.address, options=options) as channel:
            yield Worker(
                engine,
                prefill,
                decode,
                board,
                host,
                channel,
                worker_pb2_grpc.PrefillServiceStub(channel),  # type: ignore[no-untyped-call]
                worker_pb2_grpc.DecodeServiceStub(channel),  # type: ignore[no-untyped-call]
                worker_pb2_grpc.WorkerServiceStub(channel),  # type: ignore[no-untyped-call]
                health_pb2_grpc.HealthStub(channel),
            )
            await eventually(lambda: prefill.running_count == decode.running_count == 0)
            await eventually(lambda: engine.load().running_count == 0)
    finally:
        stop.set()
        await running
    assert engine.held_count == 0
    assert engine.load().used_block_count == 0


async def eventually(is_so: Callable[[], bool], within_s: float = 5.0) -> None:
    """Real sockets answer when they answer; polled, with a deadline."""
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110  what is waited for has no event: it is the outside of a process
            await asyncio.sleep(0.005)


def prefill_request(prompt: tuple[int, ...] = PROMPT, max_token_count: int = 6, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "leg_id": "leg-1",
        "prompt_token_ids": pack_token_ids(prompt),
        "sampling": worker_pb2.SamplingSpec(top_p=1.0, repetition_penalty=1.0),
        "stop": worker_pb2.StopSpec(max_token_count=max_token_count),
        "lease_s": 10.0,
    }
    return worker_pb2.PrefillRequest(**{**values, **changes})


def decode_request(prompt: tuple[int, ...] = PROMPT, max_token_count: int = 6, ticket: bytes = b"") -> Any:
    return worker_pb2.DecodeRequest(
        leg_id="leg-2",
        prompt_token_ids=pack_token_ids(prompt),
        sampling=worker_pb2.SamplingSpec(top_p=1.0, repetition_penalty=1.0),
        stop=worker_pb2.StopSpec(max_token_count=max_token_count),
        ticket=ticket,
    )


async def failure(call: Any) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, peer="w0")


async def failure_of_stream(call: Any) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in call]
    return from_rpc_error(caught.value, peer="w0")


async def test_a_prompt_prefilled_on_one_worker_is_continued_on_another_over_the_wire() -> None:
    network = SimNetwork(spans_processes=False)
    async with a_worker("p0", network) as p, a_worker("d0", network) as d:
        reply = await p.prefill_stub.Prefill(prefill_request(), metadata=TOKEN, timeout=60)
        assert reply.finish == worker_pb2.LEG_FINISH_UNSPECIFIED
        request = decode_request((*PROMPT, reply.first_token_id), 5, reply.ticket)
        events = [event async for event in d.decode_stub.Decode(request, metadata=TOKEN, timeout=60)]
        assert [event.HasField("adopted") for event in events] == [True] + [False] * (len(events) - 1)
        assert [event.HasField("finished") for event in events] == [False] * (len(events) - 1) + [True]
        assert events[0].adopted.transfer_byte_count > 0
        assert events[0].adopted.recomputed_token_count == 0
        tokens = [reply.first_token_id, *(token for event in events for token in event.step.token_ids)]
        assert tokens == list(simulated_answer(PROMPT, 6, RULE))
        assert events[-1].finished.finish == worker_pb2.LEG_FINISH_LENGTH
        release = worker_pb2.ReleaseKvRequest(ticket_id=reply.ticket_id)
        assert (await p.prefill_stub.ReleaseKv(release, metadata=TOKEN, timeout=60)).was_held
        assert not (await p.prefill_stub.ReleaseKv(release, metadata=TOKEN, timeout=60)).was_held


async def test_adoption_and_the_tokens_that_come_with_it_are_one_message() -> None:
    async with a_worker() as w:  # no ticket: it tells of adoption when the first token is there
        events = [event async for event in w.decode_stub.Decode(decode_request(), metadata=TOKEN, timeout=60)]
        assert events[0].HasField("adopted")
        assert events[0].HasField("step")
        assert not any(event.HasField("adopted") for event in events[1:])


async def test_a_leg_that_fails_right_after_its_adoption_tells_of_both() -> None:
    async with a_worker() as w:
        adopted = KvAdopted(0, 0, 0, 0, 0, 5, 0, 0, recompute_reason=RecomputeReason.STALE, is_with_tokens=True)

        async def decode(_: object) -> AsyncGenerator[DecodeEvent, None]:
            yield adopted
            raise engine_failed("w0", "the engine died")

        w.engine.decode = decode  # type: ignore[method-assign, assignment]
        call = w.decode_stub.Decode(decode_request(), metadata=TOKEN, timeout=60)
        first = await call.read()
        assert first.adopted.recompute_reason == worker_pb2.RECOMPUTE_REASON_STALE
        assert (await failure(call.read())).reason is Reason.ENGINE_FAILED


async def test_a_lease_is_extended_over_the_wire_until_it_is_gone() -> None:
    async with a_worker() as w:
        reply = await w.prefill_stub.Prefill(prefill_request(lease_s=3.0), metadata=TOKEN, timeout=60)
        extend = worker_pb2.ExtendLeaseRequest(ticket_id=reply.ticket_id, lease_s=0.3)
        assert (await w.prefill_stub.ExtendLease(extend, metadata=TOKEN, timeout=60)).is_held
        await eventually(lambda: w.prefill.held_lease_count == 0)
        assert not (await w.prefill_stub.ExtendLease(extend, metadata=TOKEN, timeout=60)).is_held
        bad = worker_pb2.ExtendLeaseRequest(ticket_id=reply.ticket_id, lease_s=float("nan"))
        assert (await failure(w.prefill_stub.ExtendLease(bad, metadata=TOKEN))).reason is Reason.INVALID_REQUEST


async def test_refusals_arrive_typed_with_every_violation() -> None:
    async with a_worker() as w:
        torn = prefill_request(prompt_token_ids=b"12345")
        error = await failure(w.prefill_stub.Prefill(torn, metadata=TOKEN))
        assert (error.reason, error.violations[0].field) == (Reason.INVALID_REQUEST, "prompt_token_ids")
        empty = worker_pb2.DecodeRequest(leg_id="leg-1")
        error = await failure_of_stream(w.decode_stub.Decode(empty, metadata=TOKEN))
        assert {violation.field for violation in error.violations} == {"sampling", "stop"}
        error = await failure_of_stream(w.decode_stub.Decode(decode_request(ticket=b"forged"), metadata=TOKEN))
        assert (error.reason, error.metadata) == (Reason.TICKET_REFUSED, {"check": "format"})
        error = await failure(w.prefill_stub.Prefill(prefill_request((7,) * 9000), metadata=TOKEN))
        assert (error.reason, error.metadata["prompt_token_count"]) == (Reason.PROMPT_TOO_LONG, "9000")


# Leaving early ---------------------------------------------------------------------------------------------------


async def test_a_cancelled_decode_ends_in_the_engine() -> None:
    async with a_worker() as w:
        call = w.decode_stub.Decode(decode_request(max_token_count=5000), metadata=TOKEN, timeout=60)
        async for event in call:
            if event.HasField("step"):
                break
        assert w.engine.load().running_count == 1
        call.cancel()
        await eventually(lambda: w.engine.load().used_block_count == 0)


async def test_a_cancelled_prefill_ends_in_the_engine_and_holds_nothing() -> None:
    async with a_worker() as w:
        call = w.prefill_stub.Prefill(prefill_request((7,) * 8000), metadata=TOKEN, timeout=60)
        await eventually(lambda: w.prefill.running_count == 1)
        call.cancel()
        await eventually(lambda: w.engine.load().used_block_count == 0 and w.prefill.held_lease_count == 0)


async def test_a_deadline_ends_the_work_on_the_worker_too() -> None:
    async with a_worker() as w:
        error = await failure(w.prefill_stub.Prefill(prefill_request((7,) * 8000), metadata=TOKEN, timeout=0.1))
        assert error.reason is Reason.DEADLINE_EXCEEDED
        call = w.decode_stub.Decode(decode_request(max_token_count=5000), metadata=TOKEN, timeout=0.2)
        assert (await failure_of_stream(call)).reason is Reason.DEADLINE_EXCEEDED
        await eventually(lambda: w.engine.load().used_block_count == 0)


async def test_a_closed_channel_ends_its_streams_on_the_worker() -> None:
    async with a_worker() as w:
        channel = grpc.aio.insecure_channel(w.host.address)
        stub = worker_pb2_grpc.DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Decode(decode_request(max_token_count=5000), metadata=TOKEN)
        await call.read()
        await channel.close()
        await eventually(lambda: w.engine.load().used_block_count == 0)


async def test_a_decode_blocked_in_a_write_to_a_stalled_reader_is_cleaned_up_when_the_reader_leaves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert issubclass(cygrpc.ExecuteBatchError, grpc.aio.InternalError), "answering() relies on it"
    step_count, is_closed = 0, False

    async def endless(_: DecodeJob) -> AsyncGenerator[Any, None]:
        nonlocal step_count, is_closed
        try:
            yield KvAdopted(0, 0, 0, 0, 0, 0, 0, 0)
            while True:
                step_count += 1
                yield Stepped((3,) * 20_000)
                await asyncio.sleep(0)
        finally:
            is_closed = True

    async with a_worker() as w:
        monkeypatch.setattr(w.engine, "decode", endless)
        call = w.decode_stub.Decode(decode_request(), metadata=TOKEN, timeout=60)
        await call.read()
        seen = -1
        async with asyncio.timeout(60):
            while seen != step_count or seen <= 5:  # until nothing moves: the write is blocked
                seen = step_count
                await asyncio.sleep(0.3)
        assert not is_closed
        call.cancel()
        await eventually(lambda: is_closed and w.decode.running_count == 0)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_bug_in_a_handler_is_answered_as_one_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_worker() as w:

        def broken() -> Any:
            raise KeyError("what the user said")

        monkeypatch.setattr(w.board, "current", broken)
        error = await failure_of_stream(w.worker_stub.WatchLoad(worker_pb2.WatchLoadRequest(), metadata=TOKEN))
        assert error.reason is Reason.INTERNAL
        assert "KeyError" in error.message
        assert "user" not in error.message


# Outsiders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [(), ((TOKEN_KEY, ""),), ((TOKEN_KEY, "0" * 64),), ((TOKEN_KEY, SECRET.hex()),), (*TOKEN, *TOKEN)],
    ids=["none", "empty", "wrong", "the secret itself", "twice"],
)
async def test_without_the_clusters_token_nothing_is_answered(metadata: Any) -> None:
    async with a_worker() as w:
        unary = [
            w.prefill_stub.Prefill(prefill_request(), metadata=metadata),
            w.prefill_stub.ReleaseKv(worker_pb2.ReleaseKvRequest(ticket_id="t"), metadata=metadata),
            w.worker_stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), metadata=metadata),
            w.worker_stub.Drain(worker_pb2.DrainRequest(timeout_s=1), metadata=metadata),
        ]
        streams = [
            w.decode_stub.Decode(decode_request(), metadata=metadata),
            w.worker_stub.WatchLoad(worker_pb2.WatchLoadRequest(), metadata=metadata),
        ]
        for call in unary:
            assert (await failure(call)).reason is Reason.UNAUTHENTICATED
        for call in streams:
            assert (await failure_of_stream(call)).reason is Reason.UNAUTHENTICATED
        assert not w.board.is_draining
        assert (await w.health_stub.Check(health_pb2.HealthCheckRequest())).status == SERVING


async def test_a_message_of_64_mib_is_refused_and_harms_nobody() -> None:
    async with a_worker() as w:
        huge = prefill_request(prompt_token_ids=bytes(64 << 20))
        error = await failure(w.prefill_stub.Prefill(huge, metadata=TOKEN, timeout=60))
        assert error.reason is Reason.INVALID_REQUEST
        assert w.prefill.running_count == 0
        reply = await w.prefill_stub.Prefill(prefill_request(max_token_count=1), metadata=TOKEN, timeout=60)
        assert reply.finish == worker_pb2.LEG_FINISH_LENGTH


# What a worker says of itself ------------------------------------------------------------------------------------


async def test_a_worker_tells_who_it_is() -> None:
    async with a_worker("w7") as w:
        info = await w.worker_stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), metadata=TOKEN, timeout=60)
        assert (info.worker_id, info.epoch, info.role, info.engine) == ("w7", "e1", "prefill", "simulated")
        assert (info.vocab_size, info.max_context_token_count) == (RULE.vocab_size, 8192)


async def test_load_is_told_at_once_after_a_change_and_at_least_every_interval() -> None:
    async with a_worker() as w:
        call = w.worker_stub.WatchLoad(worker_pb2.WatchLoadRequest(interval_ms=50), metadata=TOKEN)
        async with asyncio.timeout(60):
            first = await call.read()
            assert (first.epoch, first.running_count, first.is_draining) == ("e1", 0, False)
            for _ in range(3):  # nothing changes, and still they come
                assert await call.read() == first
        call.cancel()

        call = w.worker_stub.WatchLoad(worker_pb2.WatchLoadRequest(interval_ms=10_000), metadata=TOKEN)
        await call.read()
        reply = await w.prefill_stub.Prefill(prefill_request(), metadata=TOKEN, timeout=60)
        async with asyncio.timeout(60):
            while (await call.read()).held_lease_count != 1:
                pass
        await w.prefill_stub.ReleaseKv(worker_pb2.ReleaseKvRequest(ticket_id=reply.ticket_id), metadata=TOKEN)
        async with asyncio.timeout(60):
            while (load := await call.read()).held_lease_count != 0 or load.used_block_count != 0:
                pass
        call.cancel()
        bad = worker_pb2.WatchLoadRequest(interval_ms=5)
        assert (await failure_of_stream(w.worker_stub.WatchLoad(bad, metadata=TOKEN))).violations[0].field == (
            "interval_ms"
        )


async def test_a_draining_worker_says_so_finishes_what_it_has_and_takes_nothing_new() -> None:
    async with a_worker() as w:
        call = w.decode_stub.Decode(decode_request(max_token_count=1000), metadata=TOKEN, timeout=60)
        await call.read()
        drain = worker_pb2.DrainRequest(timeout_s=0.01)
        assert (await w.worker_stub.Drain(drain, metadata=TOKEN, timeout=60)).remaining_count == 1
        error = await failure(w.prefill_stub.Prefill(prefill_request(), metadata=TOKEN))
        assert error.reason is Reason.DRAINING
        statuses = [
            (await w.health_stub.Check(health_pb2.HealthCheckRequest(service=name))).status
            for name in ("", "baton.worker.v1.PrefillService", "baton.worker.v1.DecodeService")
        ]
        assert statuses == [NOT_SERVING] * 3
        while (event := await call.read()) is not grpc.aio.EOF:
            last = event
        assert last.HasField("finished")
        drain = worker_pb2.DrainRequest(timeout_s=60)
        assert (await w.worker_stub.Drain(drain, metadata=TOKEN, timeout=60)).remaining_count == 0
        bad = worker_pb2.DrainRequest(timeout_s=-1)
        assert (await failure(w.worker_stub.Drain(bad, metadata=TOKEN))).reason is Reason.INVALID_REQUEST


async def test_metrics_are_on_loopback_and_gone_after_the_worker() -> None:
    async with a_worker() as w:
        await w.prefill_stub.Prefill(prefill_request(max_token_count=1), metadata=TOKEN, timeout=60)
        url = f"http://{w.host.metrics_address}/metrics"
        assert url.startswith("http://127.0.0.1:")
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=60).read().decode())
        assert 'baton_worker_legs_total{outcome="ok",phase="prefill"} 1.0' in text
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", w.host.metrics_port)


# Start and stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["port", "metrics_port"])
async def test_a_port_in_use_is_named_with_what_to_do_and_nothing_is_left_open(key: str) -> None:
    async with a_worker() as w:
        port = getattr(w.host, key)
        config = HostConfig(**{key: port})
        engine, prefill, decode, board, host = make_worker("w1", SimNetwork(), config)
        await engine.start()
        with pytest.raises(HostingError, match=rf"127\.0\.0\.1:{port}.*set {key} to another port"):
            await run_worker_host(
                engine, [prefill, decode], board, host, config, worker_id="w1", stop=asyncio.Event()
            )
        with pytest.raises(BatonError):
            await engine.check_health()
        assert (await w.health_stub.Check(health_pb2.HealthCheckRequest())).status == SERVING


async def test_a_worker_whose_engine_dies_goes_down_with_it() -> None:
    config = HostConfig(health_interval_s=0.05, grace_s=0.2)
    engine, prefill, decode, board, host = make_worker("w0", SimNetwork(), config)
    await engine.start()
    endpoints: list[WorkerEndpoint] = []
    running = asyncio.create_task(
        run_worker_host(
            engine,
            [prefill, decode],
            board,
            host,
            config,
            worker_id="w0",
            stop=asyncio.Event(),
            on_ready=endpoints.append,
        )
    )
    await eventually(lambda: bool(endpoints))
    engine.kill()
    with pytest.raises(BatonError) as caught:
        async with asyncio.timeout(60):
            await running
    assert caught.value.reason is Reason.ENGINE_FAILED
    async with grpc.aio.insecure_channel(endpoints[0].address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        error = await failure(stub.Check(health_pb2.HealthCheckRequest(), timeout=60))
        assert error.reason is Reason.ENGINE_FAILED


async def test_a_stop_while_the_model_loads_closes_the_engine() -> None:
    engine = SimEngine(SimConfig(engine_id="slow", start_s=60.0), SimNetwork())
    stop = asyncio.Event()
    starting = asyncio.create_task(start_unless_stopped(engine, stop))
    await asyncio.sleep(0)
    stop.set()
    async with asyncio.timeout(60):
        assert await starting is False
    with pytest.raises(BatonError):
        await engine.check_health()

"""Many legs on one stream, over real sockets: order, cancels, errors of one leg, broken streams, a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from baton.errors import BatonError, Reason
from baton.leg import DecodeDone, DecodeOrder, KvAdopted, Stepped
from baton.metrics import WorkerMetrics
from baton.request import EngineStop, LegFinish, Sampling
from baton.secret import TOKEN_KEY, cluster_token
from baton.status import from_status_bytes
from baton.worker.v1 import worker_pb2 as pb
from baton.worker.v1 import worker_pb2_grpc
from bench.decode_events import told
from decode_worker.leg_stream_service import AHEAD_COUNT
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.hosting import HostConfig, WorkerHost
from engine.sim import SimConfig, SimEngine, SimNetwork, TokenRule, simulated_answer
from router.grpc_worker_client import GrpcWorkerClient
from router.leg_messages_client import decode_request
from router.leg_stream_client import MAX_STARTS_BYTES, TELL_AFTER_COUNT

SECRET = bytes(range(32))
RULE = TokenRule()
COST = CostModel(
    prefill=PrefillCost(base_s=0.002, per_token_s=1e-6, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=0.004, per_context_token_s=0.0, per_sequence_s=0.0),
)
FOREVER = CostModel(decode=DecodeCost(base_s=600.0))
"""Of what is not to end by itself."""


@dataclass
class Hosted:
    engine: SimEngine
    decode: DecodeWorker
    client: GrpcWorkerClient
    stub: Any


@asynccontextmanager
async def hosted(**engine_limits: Any) -> AsyncIterator[Hosted]:
    engine = SimEngine(SimConfig(engine_id="d", tokens=RULE, cost=COST, **engine_limits), SimNetwork())
    metrics = WorkerMetrics(CollectorRegistry(), "d")
    decode = DecodeWorker(engine, worker_id="d", epoch="e1", secret=SECRET, metrics=metrics)
    attach = [partial(add_decode_service, worker=decode)]
    host = WorkerHost(HostConfig(), secret=SECRET, registry=CollectorRegistry(), attach=attach)
    await engine.start()
    await host.start()
    client = GrpcWorkerClient(host.address, SECRET)
    try:
        async with grpc.aio.insecure_channel(host.address) as channel:
            yield Hosted(engine, decode, client, worker_pb2_grpc.DecodeServiceStub(channel))  # type: ignore[no-untyped-call]
        await eventually(lambda: decode.running_count == 0 and engine.load().used_block_count == 0)
    finally:
        await client.close()
        await host.stop(0)
        await decode.close()
        await engine.close()


async def eventually(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110  # what is waited for is on the other side of a socket
            await asyncio.sleep(0.005)


def prompt(number: int) -> tuple[int, ...]:
    return tuple(range(20 + number, 60 + number))


def order(number: int, count: int, **more: Any) -> DecodeOrder:
    stop = EngineStop(max_token_count=count, ignore_eos=True)
    return DecodeOrder(f"g.{number}", prompt(number), Sampling(), stop, **more)


def answer(number: int, count: int) -> list[int]:
    return list(simulated_answer(prompt(number), count, RULE, ignore_eos=True))


async def tokens_of(client: GrpcWorkerClient, number: int, count: int) -> list[int]:
    async with aclosing(told(client, order(number, count), 60)) as events:
        adopted, *steps, done = [event async for event in events]
    assert isinstance(adopted, KvAdopted)
    assert done == DecodeDone(LegFinish.LENGTH)
    return [token_id for step in steps if isinstance(step, Stepped) for token_id in step.token_ids]


def begin(*numbers: int, count: int, **more: Any) -> Any:
    return pb.DecodeManyRequest(
        starts=[
            pb.LegStart(leg_number=number, order=decode_request(order(number, count, **more)), timeout_s=60.0)
            for number in numbers
        ]
    )


class Reader:
    """Reads a stream as the router does, and keeps what each leg said."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.DecodeMany(metadata=((TOKEN_KEY, cluster_token(SECRET)),))
        self.tokens: dict[int, list[int]] = {}
        self.finished: set[int] = set()
        self.failures: dict[int, BatonError] = {}
        self.messages: list[Any] = []

    async def read(self) -> Any:
        async with asyncio.timeout(60):
            message = await self.call.read()
        self.messages.append(message)
        begin_at = 0
        for number, count in zip(
            message.leg_numbers, message.token_counts or [1] * len(message.leg_numbers), strict=True
        ):
            self.tokens.setdefault(number, []).extend(message.token_ids[begin_at : begin_at + count])
            begin_at += count
        for news in message.news:
            self.tokens.setdefault(news.leg_number, []).extend(news.events.step.token_ids)
            if news.events.HasField("finished"):
                self.finished.add(news.leg_number)
            if news.failure:
                self.failures[news.leg_number] = from_status_bytes(news.failure)
        return message

    async def read_and_tell(self) -> None:
        await self.read()
        await self.call.write(pb.DecodeManyRequest(taken_response_count=len(self.messages)))


def test_the_reader_tells_of_what_it_took_before_the_worker_stops_sending() -> None:
    assert TELL_AFTER_COUNT < AHEAD_COUNT


async def test_many_legs_on_one_stream_each_bring_their_own_answer_in_order() -> None:
    async with hosted() as worker:
        answers = await asyncio.gather(*(tokens_of(worker.client, number, 40 + number) for number in range(12)))
        assert answers == [answer(number, 40 + number) for number in range(12)]


async def test_what_one_step_brings_to_all_legs_is_one_message() -> None:
    async with hosted() as worker:
        reader = Reader(worker.stub)
        await reader.call.write(begin(*range(1, 9), count=50))
        while len(reader.finished) < 8:
            await reader.read_and_tell()
        assert reader.tokens == {number: answer(number, 50) for number in range(1, 9)}
        # Some messages more than steps: legs are admitted one by one, and the last has what they have to say.
        assert len(reader.messages) < 50 + 20
        assert max(len(message.leg_numbers) for message in reader.messages) == 8
        reader.call.cancel()


async def test_a_reader_that_does_not_tell_gets_few_messages_and_then_all_the_rest_at_once() -> None:
    async with hosted() as worker:
        reader = Reader(worker.stub)
        await reader.call.write(begin(1, 2, count=60))
        for _ in range(AHEAD_COUNT):
            await reader.read()
        await eventually(lambda: worker.decode.running_count == 0)  # nobody waited for the reader
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.shield(rest := asyncio.ensure_future(reader.read()))
        await reader.call.write(pb.DecodeManyRequest(taken_response_count=AHEAD_COUNT))
        await rest
        assert reader.tokens == {number: answer(number, 60) for number in (1, 2)}
        assert len(reader.messages) == AHEAD_COUNT + 1
        reader.call.cancel()


async def test_a_leg_that_is_called_off_ends_in_the_engine_and_the_others_go_on() -> None:
    async with hosted() as worker:
        others = [asyncio.create_task(tokens_of(worker.client, number, 300)) for number in (1, 2)]
        async with aclosing(told(worker.client, order(3, 5000), 600)) as events:
            async for event in events:
                if isinstance(event, Stepped):
                    break
            assert worker.decode.running_count == 3
        assert await asyncio.gather(*others) == [answer(1, 300), answer(2, 300)]
        worker.engine.config = replace(worker.engine.config, cost=FOREVER)
        await eventually(lambda: worker.decode.running_count == 0)


async def test_a_leg_called_off_in_the_message_that_starts_it_says_nothing() -> None:
    async with hosted() as worker:
        reader = Reader(worker.stub)
        request = begin(1, 2, count=20)
        request.cancelled_leg_numbers.append(1)
        request.cancelled_leg_numbers.append(99)
        await reader.call.write(request)
        while 2 not in reader.finished:
            await reader.read_and_tell()
        assert reader.tokens == {2: answer(2, 20)}
        reader.call.cancel()


async def test_a_leg_cancelled_before_its_start_was_written_is_never_heard_of() -> None:
    async with hosted() as worker:
        decode = asyncio.create_task(tokens_of(worker.client, 1, 5000))
        await asyncio.sleep(0)
        decode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decode
        assert await tokens_of(worker.client, 2, 5) == answer(2, 5)
        assert worker.decode.running_count == 0


async def test_the_error_of_one_leg_keeps_its_reason_and_is_nobody_elses() -> None:
    async with hosted() as worker:
        other = asyncio.create_task(tokens_of(worker.client, 1, 60))
        with pytest.raises(BatonError) as refused:
            async for _ in told(worker.client, order(2, 5, ticket=b"forged")):
                pass
        assert (refused.value.reason, refused.value.metadata) == (Reason.TICKET_REFUSED, {"check": "format"})
        with pytest.raises(BatonError) as wrong:
            async for _ in told(worker.client, order(3, 5, tenant="t" * 1000)):
                pass
        assert wrong.value.reason is Reason.INVALID_REQUEST
        assert wrong.value.violations[0].field == "tenant"
        assert await other == answer(1, 60)


async def test_a_leg_has_its_own_time_on_the_worker_too() -> None:
    async with hosted() as worker:
        reader = Reader(worker.stub)
        request = begin(1, 2, 3, count=5000)
        request.starts[0].timeout_s = 0.05
        request.starts[1].timeout_s = -1.0
        await reader.call.write(request)
        while len(reader.failures) < 2:
            await reader.read_and_tell()
        reasons = {number: error.reason for number, error in reader.failures.items()}
        assert reasons == {1: Reason.DEADLINE_EXCEEDED, 2: Reason.INVALID_REQUEST}
        await eventually(lambda: worker.decode.running_count == 1)
        reader.call.cancel()


async def test_large_orders_go_out_in_several_messages_and_a_huge_one_in_its_own_call() -> None:
    """The worker refuses messages of 1 MiB with everything that is on their stream."""
    async with hosted(max_context_token_count=MAX_STARTS_BYTES // 2, block_count=65536) as worker:

        def large(number: int, token_count: int) -> DecodeOrder:
            stop = EngineStop(max_token_count=5, ignore_eos=True)
            prompt_token_ids = tuple(100 + (number + each) % 1000 for each in range(token_count))
            return DecodeOrder(f"g.{number}", prompt_token_ids, Sampling(), stop)

        async def ask(asked: DecodeOrder) -> Any:
            return [event async for event in told(worker.client, asked, 60)][-1]

        size = decode_request(large(1, 5000)).ByteSize()
        assert size < MAX_STARTS_BYTES
        together = await asyncio.gather(*(ask(large(number, 5000)) for number in range(1, 61)))
        assert 60 * size > HostConfig().max_message_bytes
        assert together == [DecodeDone(LegFinish.LENGTH)] * 60

        def with_ticket(byte_count: int) -> DecodeOrder:
            return order(99, 5, ticket=bytes(byte_count))

        alone = large(98, MAX_STARTS_BYTES // 4)
        assert decode_request(alone).ByteSize() > MAX_STARTS_BYTES
        async with aclosing(told(worker.client, alone, 60)) as events:
            adopted, *steps, done = [event async for event in events]
        assert isinstance(adopted, KvAdopted)
        assert sum(len(step.token_ids) for step in steps if isinstance(step, Stepped)) == 5
        assert done == DecodeDone(LegFinish.LENGTH)

        other = asyncio.create_task(tokens_of(worker.client, 1, 100))
        await eventually(lambda: worker.decode.running_count == 1)
        for byte_count, reason in ((MAX_STARTS_BYTES, Reason.TICKET_REFUSED), (2 << 20, Reason.INVALID_REQUEST)):
            with pytest.raises(BatonError) as refused:
                await ask(with_ticket(byte_count))
            assert refused.value.reason is reason
        assert await other == answer(1, 100)


async def test_a_stream_that_its_caller_ends_aborts_every_leg() -> None:
    async with hosted() as worker:
        worker.engine.config = replace(worker.engine.config, cost=FOREVER)
        for end in ("cancel", "half-close"):
            reader = Reader(worker.stub)
            await reader.call.write(begin(1, 2, 3, count=5000))
            await eventually(lambda: worker.decode.running_count == 3)
            if end == "cancel":
                reader.call.cancel()
            else:
                await reader.call.done_writing()
            await eventually(lambda: worker.decode.running_count == 0)


async def test_a_broken_stream_fails_every_leg_and_the_next_leg_opens_another() -> None:
    async with hosted() as worker:
        decodes = [asyncio.create_task(tokens_of(worker.client, number, 5000)) for number in (1, 2, 3)]
        await eventually(lambda: worker.decode.running_count == 3)
        stream = worker.client._legs._stream
        assert stream is not None
        stream._call.cancel()
        for outcome in await asyncio.gather(*decodes, return_exceptions=True):
            assert isinstance(outcome, BatonError)
            assert (outcome.reason, outcome.status.value) == (Reason.ENGINE_FAILED, "UNAVAILABLE")
        await eventually(lambda: worker.decode.running_count == 0)
        assert await tokens_of(worker.client, 4, 10) == answer(4, 10)


async def test_tokens_that_belong_to_no_leg_break_the_stream() -> None:
    class Liar(worker_pb2_grpc.DecodeServiceServicer):
        async def DecodeMany(self, requests: Any, context: Any) -> None:
            await context.read()
            await context.write(pb.DecodeManyResponse(leg_numbers=[1], token_ids=[5, 6]))
            await asyncio.sleep(60)

    server = grpc.aio.server()
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(Liar(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = GrpcWorkerClient(f"127.0.0.1:{port}", SECRET)
    try:
        with pytest.raises(BatonError) as caught:
            await tokens_of(client, 1, 5)
        assert caught.value.reason is Reason.INTERNAL
        assert "belong to no leg" in caught.value.message
    finally:
        await client.close()
        await server.stop(0)

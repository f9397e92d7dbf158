"""Tokens that reach the caller's stream by a call: the same as on the usual way, in every order of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.errors import BatonError, Reason
from baton.metrics import Outcome, RouterMetrics
from baton.request import OutputOptions
from baton.testing import in_virtual_time
from baton.v1 import generation_pb2 as pb
from bench.virtual_cluster import TokenAnswer, VirtualCluster, virtual_cluster
from router.answering import Admitted, Piece, Reader, RelayEvent
from router.flight import FlightLimits
from router.outbox import Outbox
from router.phase_window import PhaseWindow
from router.relay_run import RelayRun, TokenMeter
from router.stream_writer import WRITE_GRACE_S, StreamWriter


class Caller:
    """A call's context whose reader takes ``write_s`` for each message; ``fails_at``: gone from that message on."""

    def __init__(self, write_s: float = 0.0, fails_at: int | None = None, *, is_back: bool = False) -> None:
        """``is_back``: that message fails, and those after it would not."""
        self.write_s = write_s
        self.fails_at = fails_at
        self.is_back = is_back
        self.messages: list[bytes] = []
        self.under_way = 0
        self.tasks: set[Any] = set()

    async def write(self, message: Any) -> None:
        assert self.under_way == 0, "one write at a time is all that gRPC takes"
        self.tasks.add(asyncio.current_task())
        data = message.SerializeToString()
        self.under_way += 1
        try:
            if self.fails_at is not None and len(self.messages) >= self.fails_at:
                self.fails_at = None if self.is_back else self.fails_at
                raise ConnectionError("the caller is gone")
            if self.write_s:
                over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                timer = asyncio.get_running_loop().call_later(self.write_s, over.set_result, None)
                try:
                    await over
                finally:
                    timer.cancel()
            self.messages.append(data)
        finally:
            self.under_way -= 1

    @property
    def chunks(self) -> list[Any]:
        said = [pb.GenerateResponse.FromString(each) for each in self.messages]
        return [each.chunk for each in said if each.HasField("chunk")]


def writer_for(caller: Caller, deadline_at: float, reader: Reader | None = None) -> StreamWriter:
    return StreamWriter(
        caller,
        response=pb.GenerateResponse,
        started=pb.GenerateResponse(started=pb.Started()),
        output=OutputOptions(),
        window=PhaseWindow(),
        deadline_at=deadline_at,
        reader=reader,
    )


async def written(cluster: VirtualCluster, caller: Caller, count: int = 40, *, timeout_s: float = 60.0) -> None:
    now = asyncio.get_running_loop().time()
    writer = writer_for(caller, now + timeout_s)
    request = cluster.request(50, count)
    await writer.write_all(cluster.relay.run(request, TokenAnswer(), now + timeout_s, received_at=now))


def indices(caller: Caller) -> list[int]:
    return [chunk.first_token_index + at for chunk in caller.chunks for at in range(chunk.token_count)]


@in_virtual_time
async def test_a_caller_that_keeps_up_gets_each_token_from_where_it_came_without_its_task() -> None:
    async with virtual_cluster() as cluster:
        caller = Caller()
        await written(cluster, caller)
        assert indices(caller) == list(range(40))
        assert len(caller.chunks) == 40
        assert len(caller.tasks) > 1, "tokens are written from where the worker is heard"
        value = cluster.registry.get_sample_value
        assert value("baton_output_tokens_total") == 40
        assert value("baton_inter_token_latency_seconds_count") == 39


@in_virtual_time
async def test_a_slow_caller_gets_every_token_in_order_in_fewer_messages() -> None:
    async with virtual_cluster() as cluster:
        for write_s in (0.005, 0.012, 0.05, 1.0):
            caller = Caller(write_s=write_s)
            await written(cluster, caller)
            assert indices(caller) == list(range(40))
            assert (len(caller.chunks) < 40) == (write_s > 0.01)


@in_virtual_time
@pytest.mark.parametrize("is_direct", [False, True])
async def test_a_bug_leaves_the_write_under_way_be_so_that_its_status_can_follow(
    monkeypatch: pytest.MonkeyPatch, is_direct: bool
) -> None:
    """gRPC sends no status while a write is given up half-way: the caller would wait for its deadline."""
    caller = Caller(write_s=0.5)
    now = asyncio.get_running_loop().time()
    if is_direct:
        caller = Caller(write_s=0.005)

        def broken(self: StreamWriter, piece: Piece, now: float) -> None:
            raise ValueError("a bug")

        async with virtual_cluster() as cluster:
            monkeypatch.setattr(StreamWriter, "_chunk", broken)
            with pytest.raises(ValueError, match="a bug"):
                await written(cluster, caller)
    else:

        async def events() -> AsyncGenerator[RelayEvent, None]:
            yield Admitted("g")
            raise ValueError("a bug")

        with pytest.raises(ValueError, match="a bug"):
            await writer_for(caller, now + 60.0).write_all(events())
    assert len(caller.messages) == 1


@in_virtual_time
async def test_a_caller_that_is_gone_is_noticed_and_its_request_ends() -> None:
    async with virtual_cluster() as cluster:
        for fails_at in (0, 1, 2, 10, 41):
            for write_s in (0.0, 0.005):
                caller = Caller(write_s=write_s, fails_at=fails_at)
                with pytest.raises(ConnectionError):
                    await written(cluster, caller)
                await asyncio.sleep(0)
                assert cluster.relay.in_flight_count == 0


@in_virtual_time
async def test_a_write_that_failed_is_not_forgotten_because_the_next_one_would_not() -> None:
    async with virtual_cluster() as cluster:
        for write_s in (0.0, 0.005):
            with pytest.raises(ConnectionError):
                await written(cluster, Caller(write_s=write_s, fails_at=10, is_back=True))


@in_virtual_time
async def test_a_caller_that_does_not_read_is_let_go_at_the_deadline() -> None:
    async with virtual_cluster() as cluster:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        with pytest.raises(BatonError) as late:
            await written(cluster, Caller(write_s=1000.0), timeout_s=3.0)
        assert late.value.reason is Reason.DEADLINE_EXCEEDED
        assert loop.time() - began_at <= 3.0 + WRITE_GRACE_S + 0.01


async def _nothing() -> AsyncGenerator[RelayEvent, None]:
    return
    yield


async def test_the_line_is_used_only_while_the_reader_waits_and_after_the_first_tokens() -> None:
    outbox, meter = Outbox(64), TokenMeter(RouterMetrics(CollectorRegistry()))
    run = RelayRun(_nothing(), outbox, meter, asyncio.get_running_loop().time)
    taken: list[int] = []
    is_open = True

    def line(piece: Piece, now: float) -> bool:
        if is_open:
            taken.append(piece.first_token_index)
        return is_open

    run.deliver_to(line)
    outbox.put(Piece(0, (1,), "a", None))
    assert taken == [], "nobody waits"
    assert await outbox.take() == Piece(0, (1,), "a", None)
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.put(Piece(1, (1,), "a", None))
    assert taken == [], "the first tokens go the usual way"
    assert (await waiting).first_token_index == 1  # type: ignore[union-attr]
    meter.sent(1, 0.0)
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.put(Piece(2, (1,), "a", None))
    assert taken == [2]
    is_open = False
    outbox.put(Piece(3, (1,), "a", None))
    is_open = True
    outbox.put(Piece(4, (1,), "a", None))
    assert taken == [2], "never past what went the usual way"
    assert (await waiting).token_ids == (1, 1)  # type: ignore[union-attr]
    outbox = Outbox(1)
    run = RelayRun(_nothing(), outbox, meter, asyncio.get_running_loop().time)
    run.deliver_to(line)
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    is_open = False
    outbox.put(Piece(3, (1,), "a", None))
    is_open = True
    outbox.put(Piece(4, (1,), "a", None))
    assert taken == [2], "nor past what it cannot be merged with"
    assert [(await waiting).first_token_index, (await outbox.take()).first_token_index] == [3, 4]  # type: ignore[union-attr]
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    await run.aclose()
    outbox.put(Piece(5, (1,), "a", None))
    assert taken == [2], "closed"
    assert (await waiting).first_token_index == 5  # type: ignore[union-attr]


@in_virtual_time
@pytest.mark.parametrize("write_s", [1.0, 1e6])
async def test_a_caller_past_the_bound_gets_what_is_kept_while_it_takes_it_and_is_let_go_when_it_does_not(
    write_s: float,
) -> None:
    async with virtual_cluster(flight=FlightLimits(max_unread_bytes=4 * 1024)) as cluster:
        caller = Caller()
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        request = cluster.request(50, 900)
        writer = writer_for(caller, begun_at + 3600, request.reader)
        run = cluster.relay.run(request, TokenAnswer(), begun_at + 3600, received_at=begun_at)
        writing = asyncio.create_task(writer.write_all(run))
        while len(caller.chunks) < 20:  # noqa: ASYNC110  # the fake caller tells nobody
            await asyncio.sleep(0.01)
        caller.write_s = write_s
        with pytest.raises(BatonError) as failed:
            await writing
        assert failed.value.reason is Reason.READER_TOO_SLOW
        took = indices(caller)
        assert took == list(range(len(took)))
        is_reading = write_s == 1.0
        told = int(failed.value.metadata["emitted_token_count"])
        assert len(took) == told if is_reading else len(took) < told, "the message under way may still come"
        assert loop.time() - begun_at < 60
        assert cluster.relay.in_flight_count == 0
        value = cluster.registry.get_sample_value
        ended = {each.value: value("baton_requests_total", {"outcome": each.value}) for each in Outcome}
        assert ended.get("cancelled") in (None, 0.0)

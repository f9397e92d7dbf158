"""The router's gRPC client against real worker services: everything crosses, and every loss is noticed at once."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.errors import BatonError, Reason
from baton.leg import DecodeDone, DecodeOrder, KvAdopted, PrefillOrder, Stepped
from baton.metrics import WorkerMetrics
from baton.request import EngineStop, LegFinish, Role, Sampling
from bench.decode_events import told
from bench.virtual_cluster import TokenAnswer
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.hosting import HostConfig, WorkerHost
from engine.introductions import Introductions
from engine.load_board import LoadBoard
from engine.service import add_worker_service, worker_info
from engine.sim import PhaseDelays, SimConfig, SimEngine, SimNetwork, TokenRule, simulated_answer
from kvtransfer.peer import PeerAddress, seal_peer
from prefill_worker.service import add_prefill_service
from prefill_worker.worker import PrefillWorker
from router.admission import Admission
from router.answering import Piece, RoutedRequest
from router.cluster_view import WorkerSpec
from router.grpc_worker_client import GrpcWorkerClient
from router.relay import Relay
from router.roster import Roster

SECRET = bytes(range(32))
RULE = TokenRule()
PROMPT = tuple(range(20, 70))
SAMPLING = Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=11)
COST = CostModel(
    prefill=PrefillCost(base_s=0.002, per_token_s=1e-5, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=0.002, per_context_token_s=0.0, per_sequence_s=0.0),
)


class HostedWorker:
    """An engine, both phases and the sockets, in this process."""

    def __init__(self, worker_id: str, network: SimNetwork, role: Role = Role.DECODE, **sim: Any) -> None:
        self.engine = SimEngine(SimConfig(engine_id=worker_id, tokens=RULE, cost=COST, **sim), network)
        registry = CollectorRegistry()
        metrics = WorkerMetrics(registry, worker_id)
        shared: Any = {"worker_id": worker_id, "epoch": "e1", "secret": SECRET, "metrics": metrics}
        self.prefill, self.decode = PrefillWorker(self.engine, **shared), DecodeWorker(self.engine, **shared)
        board = LoadBoard(self.engine, [self.prefill, self.decode], epoch="e1", metrics=metrics)
        self.info = worker_info(self.engine.info, worker_id=worker_id, epoch="e1", role=role)
        met = Introductions(self.engine, worker_id=worker_id, secret=SECRET, allowed_hosts=["127.0.0.1"])
        attach = [
            partial(add_prefill_service, worker=self.prefill),
            partial(add_decode_service, worker=self.decode),
            partial(add_worker_service, info=self.info, board=board, introductions=met),
        ]
        self.host = WorkerHost(HostConfig(), secret=SECRET, registry=registry, attach=attach)

    def is_idle(self) -> bool:
        counts = (self.prefill.running_count, self.decode.running_count, self.prefill.held_lease_count)
        return counts == (0, 0, 0) and self.engine.held_count == 0


@asynccontextmanager
async def hosted(*worker_ids: str) -> AsyncIterator[list[tuple[HostedWorker, GrpcWorkerClient]]]:
    network = SimNetwork()
    pairs = []
    try:
        for worker_id in worker_ids:
            worker = HostedWorker(worker_id, network)
            await worker.engine.start()
            await worker.host.start()
            pairs.append((worker, GrpcWorkerClient(worker.host.address, SECRET)))
        yield pairs
        for worker, _ in pairs:
            await eventually(worker.is_idle)
    finally:
        for worker, client in pairs:
            await client.close()
            await worker.host.stop(0)
            await worker.decode.close()
            await worker.prefill.close()
            await worker.engine.close()


async def eventually(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110  # what is waited for is on the other side of a socket
            await asyncio.sleep(0.005)


def prefill_order(**changes: Any) -> PrefillOrder:
    values: dict[str, Any] = {"leg_id": "g.1", "stop": EngineStop(max_token_count=5), "lease_s": 60.0, **changes}
    return PrefillOrder(prompt_token_ids=PROMPT, sampling=SAMPLING, **values)


def decode_order(prompt: tuple[int, ...] = PROMPT, count: int = 5, **changes: Any) -> DecodeOrder:
    return DecodeOrder("g.2", prompt, SAMPLING, EngineStop(max_token_count=count), **changes)


async def test_a_prefill_and_its_decode_cross_the_wire_whole() -> None:
    async with hosted("p", "d") as [(prefiller, prefill), (_, decode)]:
        assert await prefill.info(timeout_s=60) == prefiller.info
        reply = await prefill.prefill(prefill_order(), timeout_s=60)
        assert reply.finish is None
        assert reply.kv_bytes > 0
        order = decode_order((*PROMPT, reply.first_token_id), 4, ticket=reply.ticket)
        async with aclosing(told(decode, order)) as stream:
            adopted, *steps, done = [event async for event in stream]
        assert isinstance(adopted, KvAdopted)
        assert adopted.transfer_bytes > 0
        tokens = [reply.first_token_id]
        for step in steps:
            assert isinstance(step, Stepped)
            tokens += step.token_ids
        assert done == DecodeDone(LegFinish.LENGTH)
        assert tuple(tokens) == simulated_answer(PROMPT, 5, RULE)
        await prefill.release_kv(reply.ticket_id, timeout_s=60)
        assert await prefill.release_kv(reply.ticket_id, timeout_s=60) is False


async def test_a_worker_is_introduced_to_all_but_itself_and_meets_only_allowed_hosts_of_its_cluster() -> None:
    async with hosted("p") as [(_, client)]:
        here, afar = (
            PeerAddress("d", "e2", "d-1", "127.0.0.1", 5600),
            PeerAddress("x", "e3", "x-1", "192.0.2.1", 5600),
        )
        itself = PeerAddress("p", "e1", "p-1", "127.0.0.1", 5601)
        sealed = [seal_peer(each, SECRET) for each in (afar, itself, here)]
        first, second = await client.introduce(sealed, timeout_s=60)
        assert (first.worker_id, first.epoch) == ("x", "e3")
        assert "peer_hosts" in first.problem
        assert (second.worker_id, second.epoch, second.problem) == ("d", "e2", "")
        for bad in ([seal_peer(here, bytes(32))], [b"?"], [seal_peer(here, SECRET)] * 65):
            with pytest.raises(BatonError) as refused:
                await client.introduce(bad, timeout_s=60)
            assert refused.value.reason is Reason.INVALID_REQUEST


async def test_leases_are_extended_and_released_by_ticket() -> None:
    async with hosted("p") as [(worker, client)]:
        reply = await client.prefill(prefill_order(), timeout_s=60)
        assert await client.extend_lease(reply.ticket_id, 30.0, timeout_s=60) is True
        assert await client.release_kv(reply.ticket_id, timeout_s=60) is True
        assert worker.prefill.held_lease_count == 0
        assert await client.extend_lease(reply.ticket_id, 30.0, timeout_s=60) is False


async def test_an_end_at_the_first_token_crosses_without_a_ticket() -> None:
    async with hosted("p") as [(_, client)]:
        reply = await client.prefill(prefill_order(stop=EngineStop(max_token_count=1)), timeout_s=60)
        assert (reply.finish, reply.ticket, reply.ticket_id) == (LegFinish.LENGTH, b"", "")


async def test_closing_a_decode_aborts_it_on_the_worker() -> None:
    async with hosted("d") as [(worker, client)]:
        async with aclosing(told(client, decode_order(count=5000), 600)) as stream:
            async for event in stream:
                if isinstance(event, Stepped):
                    break
            assert worker.decode.running_count == 1
            forever = CostModel(decode=DecodeCost(base_s=600.0))  # it does not end by itself
            worker.engine.config = dataclasses.replace(worker.engine.config, cost=forever)
        await eventually(lambda: worker.decode.running_count == 0)


async def test_cancelling_a_prefill_at_any_moment_leaves_nothing_held() -> None:
    async with hosted("p") as [(worker, client)]:
        for delay_ms in range(12):
            call = asyncio.create_task(
                client.prefill(prefill_order(leg_id=f"g.{delay_ms}", lease_s=600.0), timeout_s=60)
            )
            await asyncio.sleep(delay_ms / 1000)
            if call.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await call
            else:
                await client.release_kv(call.result().ticket_id, timeout_s=60)
        await eventually(worker.is_idle)


async def test_errors_keep_their_reason() -> None:
    async with hosted("p") as [(_, client)]:
        with pytest.raises(BatonError) as caught:
            await client.prefill(prefill_order(lease_s=-1.0), timeout_s=60)
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert caught.value.violations[0].field == "lease_s"
        with pytest.raises(BatonError) as caught:
            async for _ in told(client, decode_order(ticket=b"forged")):
                pass
        assert caught.value.reason is Reason.TICKET_REFUSED


async def test_a_deadline_ends_a_call() -> None:
    async with hosted("p") as [(worker, client)]:
        worker.engine.extra_delay_s = PhaseDelays(prefill=5.0)
        with pytest.raises(BatonError) as caught:
            await client.prefill(prefill_order(), timeout_s=0.1)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_an_outsider_is_refused() -> None:
    async with hosted("p") as [(worker, _)]:
        outsider = GrpcWorkerClient(worker.host.address, bytes(32))
        with pytest.raises(BatonError) as caught:
            await outsider.prefill(prefill_order(), timeout_s=60)
        assert caught.value.reason is Reason.UNAUTHENTICATED
        await outsider.close()


async def test_load_is_told_at_once_and_again_and_again() -> None:
    async with hosted("d") as [(_, client)], aclosing(client.watch_load(0.05)) as loads:
        for _ in range(3):
            async with asyncio.timeout(60):
                load = await anext(loads)
            assert load.epoch == "e1"
            assert load.block_count > 0


async def test_nobody_at_the_address_is_known_by_the_connection_and_not_by_the_deadline() -> None:
    client = GrpcWorkerClient("127.0.0.1:1", SECRET)
    with pytest.raises(BatonError) as caught:
        await client.info(timeout_s=60)
    assert (caught.value.reason, caught.value.status.value) == (Reason.ENGINE_FAILED, "UNAVAILABLE")
    await client.close()


async def test_closing_the_client_fails_its_calls_and_does_not_cancel_their_callers() -> None:
    async with hosted("d") as [(worker, _)]:
        client = GrpcWorkerClient(worker.host.address, SECRET)

        async def consume() -> None:
            async with aclosing(told(client, decode_order(count=5000), 60)) as stream:
                async for _ in stream:
                    started.set()

        started = asyncio.Event()
        consumer = asyncio.create_task(consume())
        await started.wait()
        await client.close()
        with pytest.raises(BatonError) as caught:
            await consumer
        assert caught.value.reason is Reason.ENGINE_FAILED
        with pytest.raises(BatonError) as caught:
            await client.info(timeout_s=60)
        assert caught.value.reason is Reason.ENGINE_FAILED


async def test_a_decode_without_room_waits_over_sockets_until_its_worker_reports_some() -> None:
    """Router and workers with everything between them: refusal, load report, the same ticket again."""
    small: Any = {"block_count": 64, "block_token_count": 16, "max_context_token_count": 1024}
    network = SimNetwork()
    workers = [HostedWorker(role.value, network, role, **small) for role in (Role.PREFILL, Role.DECODE)]
    prefiller, decoder = workers
    for worker in workers:
        await worker.engine.start()
        await worker.host.start()
    roster = Roster(lambda spec: GrpcWorkerClient(spec.address, SECRET))
    relay = Relay(roster, Admission(roster, rng=random.Random(1)))
    try:
        roster.set_workers(
            WorkerSpec(worker.info.worker_id, worker.host.address, worker.info.role) for worker in workers
        )
        await eventually(lambda: len(roster.view().ready()) == 2)

        async def ask(name: str) -> list[int]:
            request = RoutedRequest(name, PROMPT, 700, eos_token_ids=(), ignore_eos=True)
            now = asyncio.get_running_loop().time()
            tokens: list[int] = []
            async with aclosing(relay.run(request, TokenAnswer(), now + 60, received_at=now)) as events:
                async for event in events:
                    tokens += event.token_ids if isinstance(event, Piece) else ()
            return tokens

        callers = [asyncio.create_task(ask(name)) for name in ("g1", "g2")]
        await eventually(lambda: relay.admission.room_waiting_count == 1)
        assert prefiller.prefill.held_lease_count >= 1
        assert decoder.decode.running_count == 1, "it does not wait in the worker"
        expected = list(simulated_answer(PROMPT, 700, RULE, ignore_eos=True))
        assert await asyncio.gather(*callers) == [expected, expected]
        assert decoder.decode.no_room_count >= 1
        assert decoder.decode.reserved_block_count == 0
        await eventually(lambda: all(worker.is_idle() for worker in workers))
    finally:
        await relay.close()
        await roster.close()
        for worker in workers:
            await worker.host.stop(0)
            await worker.decode.close()
            await worker.prefill.close()
            await worker.engine.close()


async def test_a_killed_process_is_noticed_by_its_connection_and_not_by_a_deadline() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            address = (await process.stdout.readline()).decode().strip()
        client = GrpcWorkerClient(address, SECRET)
        async with aclosing(told(client, decode_order(count=8000), 60)) as stream:
            while not isinstance(await anext(stream), Stepped):
                pass
            process.send_signal(signal.SIGKILL)
            with pytest.raises(BatonError) as caught:
                await _exhaust(stream)
        assert (caught.value.reason, caught.value.status.value) == (Reason.ENGINE_FAILED, "UNAVAILABLE")
        await client.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _exhaust(stream: AsyncGenerator[Any, None]) -> None:
    async for _ in stream:
        pass


async def _serve_for_ever() -> None:
    worker = HostedWorker("d", SimNetwork())
    await worker.engine.start()
    await worker.host.start()
    print(worker.host.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    asyncio.run(_serve_for_ever())

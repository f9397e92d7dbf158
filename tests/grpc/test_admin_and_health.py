"""The admin API, health, reflection and /metrics over real sockets."""

from __future__ import annotations

import asyncio
import urllib.request
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sim_cluster import FAST, SECRET, SimCluster, sim_cluster

from baton.admin.v1 import cluster_pb2 as pb
from baton.admin.v1 import cluster_pb2_grpc as pb_grpc
from baton.admin_client import AdminClient, ClusterView
from baton.client import BatonClient, Finished
from baton.errors import BatonError, Reason, StatusName
from baton.request import PlacementMode, Role, StopConditions
from baton.secret import TOKEN_KEY, cluster_token
from baton.status import from_rpc_error
from baton.timeline import Phase
from engine.cost import CostModel, DecodeCost
from router.phase_window import NAMES

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "baton.v1.GenerationService", "baton.admin.v1.ClusterService")


async def answer(client: BatonClient, count: int = 4) -> Finished:
    stop = StopConditions(max_output_token_count=count)
    events = [event async for event in client.generate("Once upon a time", timeout=60, stop=stop)]
    assert isinstance(events[-1], Finished)
    return events[-1]


async def snapshot(cluster: SimCluster) -> ClusterView:
    async with AdminClient(cluster.endpoint.admin_address) as admin, aclosing(admin.watch()) as views:
        return await anext(views)


async def health_of(address: str) -> set[int]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in SERVICES}


async def test_a_snapshot_shows_workers_roles_load_and_phases(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        for _ in range(3):
            await answer(client)
        view = await snapshot(cluster)
        assert [(w.worker_id, w.role, w.health) for w in view.workers] == [
            ("decode-0", "decode", "ready"),
            ("prefill-0", "prefill", "ready"),
        ]
        assert all(worker.block_count > 0 for worker in view.workers)
        assert [phase.name for phase in view.phases] == list(NAMES)
        decode = next(phase for phase in view.phases if phase.name == "decode")
        assert decode.sample_count == 3
        assert 0 < decode.p50_ms <= decode.p95_ms
        assert (view.finished_count, view.failed_count, view.is_serving) == (3, 0, True)


async def test_snapshots_keep_coming_at_the_interval_asked_for(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, AdminClient(cluster.endpoint.admin_address) as admin:
        loop = asyncio.get_running_loop()
        async with aclosing(admin.watch(interval_s=0.1)) as views, aclosing(admin.watch(interval_s=60.0)) as rare:
            await anext(rare)
            second_of_the_rare = asyncio.ensure_future(anext(rare))
            began_at = loop.time()
            for _ in range(4):
                await anext(views)
            assert loop.time() - began_at > 0.25
            assert not second_of_the_rare.done()
            second_of_the_rare.cancel()
            await asyncio.wait([second_of_the_rare])
        with pytest.raises(BatonError) as refused:
            await anext(admin.watch(interval_s=0.01))
        assert refused.value.violations[0].field == "interval_ms"


@pytest.mark.parametrize("metadata", [(), ((TOKEN_KEY, "0" * 64),), ((TOKEN_KEY, cluster_token(bytes(32))),)])
async def test_changes_without_the_clusters_token_are_refused(
    tmp_path: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    async with sim_cluster(tmp_path) as cluster, grpc.aio.insecure_channel(cluster.endpoint.admin_address) as channel:
        stub = pb_grpc.ClusterServiceStub(channel)  # type: ignore[no-untyped-call]
        calls: list[tuple[Any, Any]] = [
            (stub.SetWorkers, pb.SetWorkersRequest()),
            (stub.DrainWorker, pb.DrainWorkerRequest(worker_id="decode-0")),
            (stub.SetWorkerRole, pb.SetWorkerRoleRequest(worker_id="decode-0", role="prefill")),
        ]
        for method, request in calls:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await method(request, metadata=metadata, timeout=60)
            assert from_rpc_error(failed.value).reason is Reason.UNAUTHENTICATED
        view = await snapshot(cluster)
        assert {(w.worker_id, w.role, w.health) for w in view.workers} == {
            ("decode-0", "decode", "ready"),
            ("prefill-0", "prefill", "ready"),
        }


async def test_a_role_changed_by_hand_is_followed_by_the_next_placement(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path) as cluster,
        BatonClient(cluster.endpoint.address) as client,
        AdminClient(cluster.endpoint.admin_address, secret=SECRET) as admin,
    ):
        assert (await answer(client)).phases.placement_mode is PlacementMode.SPLIT
        await admin.set_worker_role("prefill-0", Role.DECODE, timeout=60)
        finished = await answer(client)
        assert finished.phases.placement_mode is PlacementMode.LOCAL
        assert finished.phases.placement_reason == "no_prefill_worker"


async def test_a_drained_worker_gets_nothing_new_and_what_runs_on_it_finishes(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, decode_count=2) as cluster,
        BatonClient(cluster.endpoint.address) as client,
        AdminClient(cluster.endpoint.admin_address, secret=SECRET) as admin,
    ):
        running = asyncio.create_task(answer(client, 200))
        decoders = ["decode-0", "decode-1"]
        await cluster.until(lambda: any(cluster.workers[name].decode.running_count for name in decoders), "a leg")
        (drained,) = (name for name in decoders if cluster.workers[name].decode.running_count)
        decoders.remove(drained)
        await admin.drain_worker(drained, timeout=60)
        for _ in range(4):
            assert [(await answer(client)).phases.decode_worker_id] == decoders
        assert (await running).usage.output_token_count == 200
        view = await snapshot(cluster)
        assert next(w for w in view.workers if w.worker_id == drained).health == "draining"


async def test_an_unknown_worker_or_role_is_named(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path) as cluster,
        AdminClient(cluster.endpoint.admin_address, secret=SECRET) as admin,
    ):
        with pytest.raises(BatonError, match="decode-0, prefill-0"):
            await admin.drain_worker("decode-9", timeout=60)


@pytest.mark.parametrize(
    ("worker", "field"),
    [
        (pb.WorkerSpec(worker_id="", address="h:1", role="decode"), "workers[1].worker_id"),
        (pb.WorkerSpec(worker_id="decode-0", address="h:1", role="decode"), "workers[1].worker_id"),
        (pb.WorkerSpec(worker_id="w", address="nowhere", role="decode"), "workers[1].address"),
        (pb.WorkerSpec(worker_id="w", address="h:1", role="both"), "workers[1].role"),
    ],
)
async def test_a_half_understood_roster_does_not_replace_a_good_one(
    tmp_path: Path, worker: pb.WorkerSpec, field: str
) -> None:
    async with sim_cluster(tmp_path) as cluster, grpc.aio.insecure_channel(cluster.endpoint.admin_address) as channel:
        stub = pb_grpc.ClusterServiceStub(channel)  # type: ignore[no-untyped-call]
        good = pb.WorkerSpec(worker_id="decode-0", address="127.0.0.1:1", role="decode")
        metadata = ((TOKEN_KEY, cluster_token(SECRET)),)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.SetWorkers(pb.SetWorkersRequest(workers=[good, worker]), metadata=metadata, timeout=60)
        assert from_rpc_error(failed.value).violations[0].field == field
        assert len((await snapshot(cluster)).workers) == 2


async def test_health_follows_the_roster_for_every_service_name(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        for address in (cluster.endpoint.address, cluster.endpoint.admin_address):
            assert await health_of(address) == {SERVING}
        assert await client.is_serving(timeout=60)
        async with grpc.aio.insecure_channel(cluster.endpoint.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICES[1]))
            seen = [(await watch.read()).status]
            cluster.set_workers()
            seen.append((await watch.read()).status)
            cluster.set_workers(*cluster.workers)
            seen.append((await watch.read()).status)
            watch.cancel()
        assert seen == [SERVING, NOT_SERVING, SERVING]
        await client.wait_until_serving(timeout=60)


async def test_draining_flips_health_refuses_new_calls_and_lets_running_ones_finish(tmp_path: Path) -> None:
    slow = CostModel(decode=DecodeCost(base_s=0.04))
    async with (
        sim_cluster(tmp_path, sim={"cost": slow}, drain_notice_s=0.1, drain_grace_s=120.0) as cluster,
        BatonClient(cluster.endpoint.address) as client,
    ):
        may_go_on, flip = asyncio.Event(), cluster.server.health.drain

        async def flip_and_wait() -> None:
            await flip()
            await may_go_on.wait()  # the notice begins when all has been seen that holds during it

        cluster.server.health.drain = flip_and_wait  # type: ignore[method-assign]
        running = asyncio.create_task(answer(client, 1000))
        await cluster.until(lambda: cluster.server.generation.call_count == 1, "a call")
        draining = asyncio.create_task(cluster.server.drain(asyncio.Event()))
        await cluster.until(lambda: not cluster.server.health.is_serving, "health flips")
        assert await health_of(cluster.endpoint.address) == {NOT_SERVING}
        assert (await answer(client)).usage.output_token_count == 4, "who has not seen it yet is still served"
        may_go_on.set()
        await cluster.until(lambda: cluster.server.generation.is_draining, "the notice is over")
        with pytest.raises(BatonError) as refused:
            await answer(client)
        assert refused.value.status is StatusName.UNAVAILABLE
        assert not draining.done()
        cluster.set_cost(FAST)
        assert (await running).usage.output_token_count == 1000
        await draining


async def test_hurry_ends_draining_at_once(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        running = asyncio.create_task(answer(client, 1500))
        await cluster.until(lambda: cluster.server.generation.call_count == 1, "a call")
        hurry = asyncio.Event()
        hurry.set()
        async with asyncio.timeout(60):
            await cluster.server.drain(hurry)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_reflection_lists_the_services_of_each_address(tmp_path: Path) -> None:
    async def services(address: str) -> set[str]:
        async with grpc.aio.insecure_channel(address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            reply = await call.read()
            await call.done_writing()
            return {service.name for service in reply.list_services_response.service}

    async with sim_cluster(tmp_path) as cluster:
        assert {"baton.v1.GenerationService", "grpc.health.v1.Health"} <= await services(cluster.endpoint.address)
        admin = await services(cluster.endpoint.admin_address)
        assert "baton.admin.v1.ClusterService" in admin
        assert "baton.v1.GenerationService" not in admin


async def test_metrics_tell_the_same_as_the_answers(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        answers = [await answer(client, 5) for _ in range(3)]
        with pytest.raises(BatonError):
            await anext(client.generate("", timeout=60))
        url = f"http://{cluster.endpoint.metrics_address}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=60).read().decode())
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert float(values['baton_requests_total{outcome="ok"}']) == 3
        assert float(values['baton_requests_total{outcome="rejected"}']) == 1
        assert float(values["baton_output_tokens_total"]) == 15
        for phase, seconds in answers[0].phases.seconds.items():
            total = sum(each.phases.seconds[phase] for each in answers)
            assert float(values[f'baton_phase_seconds_sum{{phase="{phase.value}"}}']) == pytest.approx(
                total, abs=1e-6
            )
            assert seconds >= 0
        moved = sum(each.phases.kv_transfer_bytes for each in answers)
        assert float(values["baton_kv_transfer_bytes_total"]) == moved
        assert float(values["baton_kv_pulls_total"]) == sum(each.phases.transfer.pull_count for each in answers)
        for part in ("post", "wire", "verify"):
            told = float(values[f'baton_kv_transfer_part_seconds_sum{{part="{part}"}}'])
            assert told == pytest.approx(
                sum(getattr(each.phases.transfer, f"{part}_s") for each in answers), abs=1e-6
            )


async def test_a_snapshot_shows_the_bandwidth_of_the_last_pulls_where_they_were_made(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        assert {worker.kv_bytes_per_s for worker in (await snapshot(cluster)).workers} == {0.0}
        phases = (await answer(client, 5)).phases
        workers = {worker.worker_id: worker for worker in (await snapshot(cluster)).workers}
        felt = phases.kv_transfer_bytes / phases[Phase.KV_TRANSFER]
        assert workers["decode-0"].kv_bytes_per_s == pytest.approx(felt, rel=1e-3)
        assert workers["prefill-0"].kv_bytes_per_s == 0.0
        assert workers["decode-0"].recomputed_share == 0.0

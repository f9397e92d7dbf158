"""StatusService over real sockets: what `baton top` shows, from the public port."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing
from pathlib import Path

import pytest
from sim_cluster import sim_cluster

from baton.client import BatonClient
from baton.errors import BatonError, Reason, StatusName
from baton.request import StopConditions
from baton.status_client import ServiceStatus, StatusClient
from router.phase_window import NAMES


async def status_of(address: str) -> ServiceStatus:
    async with StatusClient(address) as client, aclosing(client.watch(timeout=60)) as statuses:
        return await anext(statuses)


async def test_the_status_shows_workers_load_and_phases_and_no_address(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        for _ in range(3):
            async for _event in client.generate("hi", timeout=60, stop=StopConditions(max_output_token_count=4)):
                pass
        status = await status_of(cluster.endpoint.address)
        assert [(worker.worker_id, worker.role, worker.health) for worker in status.workers] == [
            ("decode-0", "decode", "ready"),
            ("prefill-0", "prefill", "ready"),
        ]
        assert all(0 <= worker.used_block_count < worker.block_count for worker in status.workers)
        assert [phase.name for phase in status.phases] == list(NAMES)
        decode = next(phase for phase in status.phases if phase.name == "decode")
        assert decode.sample_count == 3
        assert 0 < decode.p50_s <= decode.p95_s
        assert (status.finished_count, status.failed_count, status.is_serving) == (3, 0, True)
        assert not any(worker.spec.address in repr(status) for worker in cluster.workers.values())


async def test_a_lost_worker_and_a_router_that_cannot_serve_show(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path) as cluster,
        StatusClient(cluster.endpoint.address) as client,
        aclosing(client.watch(interval_s=0.1)) as seen,
    ):
        assert (await anext(seen)).is_serving
        cluster.set_workers()
        async with asyncio.timeout(60):
            async for status in seen:
                if not status.is_serving:
                    break
        assert status.workers == ()


async def test_pulls_in_quarantine_show_at_the_worker_that_gave_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sim_cluster(tmp_path) as cluster:
        engine = cluster.workers["decode-0"].engine
        load = engine.load
        monkeypatch.setattr(engine, "load", lambda: dataclasses.replace(load(), quarantined_pull_count=3))
        async with StatusClient(cluster.endpoint.address) as client, aclosing(client.watch(interval_s=0.1)) as seen:
            async with asyncio.timeout(60):
                async for status in seen:
                    counts = {worker.worker_id: worker.quarantined_pull_count for worker in status.workers}
                    if counts["decode-0"]:
                        break
        assert counts == {"decode-0": 3, "prefill-0": 0}


async def test_an_interval_out_of_range_is_refused_with_its_bounds(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, StatusClient(cluster.endpoint.address) as client:
        for interval_s in (0.0, 0.09, 61.0, -1.0):
            with pytest.raises(BatonError) as refused:
                await anext(client.watch(interval_s=interval_s))
            assert refused.value.reason is Reason.INVALID_REQUEST
            (violation,) = refused.value.violations
            assert violation.field == "interval"
            assert "0.1 to 60 s" in violation.description


async def test_many_watchers_are_shown_one_picture(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        made = 0
        counts = cluster.server.status._counts

        def counted() -> object:
            nonlocal made
            made += 1
            return counts()

        cluster.server.status._counts = counted  # type: ignore[assignment]
        await asyncio.gather(*(status_of(cluster.endpoint.address) for _ in range(20)))
        assert made < 20


async def test_a_watch_ends_with_its_deadline(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, StatusClient(cluster.endpoint.address) as client:
        with pytest.raises(BatonError) as ended:
            async for _status in client.watch(interval_s=60.0, timeout=0.3):
                pass
        assert ended.value.status is StatusName.DEADLINE_EXCEEDED

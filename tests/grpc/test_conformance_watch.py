"""Each field of WatchStatus beside what the router and its engines were brought to, exactly, in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from field_register import Register
from raw_calls import Outcome
from test_conformance_times import (
    BLOCK_BYTES,
    COUNT,
    IN_PLACE_S,
    SIX,
    STEP_S,
    TRANSFER_S,
    near,
    phases,
    prefill_s,
    request,
    scripted,
    seconds,
    unreachable,
)
from virtual_calls import Context, VirtualCluster, now

from baton.v1 import generation_pb2 as pb
from baton.v1 import status_pb2 as status
from decode_worker.reservations import BlockBook

register = Register()


async def watched(cluster: VirtualCluster, request: status.WatchStatusRequest, for_s: float) -> Context:
    """What a watcher is told who stays ``for_s``."""
    context = Context(timeout=None)
    call = asyncio.create_task(cluster.call("WatchStatus", request, context=context))
    await asyncio.wait((call,), timeout=for_s)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    return context


async def status_of(cluster: VirtualCluster) -> status.WatchStatusResponse:
    """Now; what workers report is 0.1 s old at most, and so long is waited."""
    await asyncio.sleep(0.1)
    [(_, message)] = (await watched(cluster, status.WatchStatusRequest(), 0.001)).written
    found: status.WatchStatusResponse = message
    return found


def workers(of: status.WatchStatusResponse, *names: str) -> dict[str, tuple[Any, ...]]:
    return {each.worker_id: tuple(getattr(each, name) for name in names) for each in of.workers}


@register.shows("WatchStatusRequest.interval")
def test_the_status_comes_at_once_and_then_exactly_as_often_as_asked(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        for interval_s, count in ((0.1, 25), (None, 3), (2.0, 2), (60.0, 1)):
            message = status.WatchStatusRequest()
            if interval_s is not None:
                message.interval.FromMicroseconds(round(interval_s * 1e6))
            began = now()
            told = await watched(cluster, message, 2.45)
            assert [at - began for at, _ in told.written] == [near(n * (interval_s or 1.0)) for n in range(count)]

    scripted(tmp_path, scenario)


@register.shows(
    "WatchStatusResponse.in_flight_count",
    "WatchStatusResponse.queued_count",
    "WatchStatusResponse.finished_count",
    "WatchStatusResponse.failed_count",
)
def test_calls_are_counted_while_they_run_wait_and_when_they_have_ended(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        def counts(of: status.WatchStatusResponse) -> tuple[int, int, int, int]:
            return (of.in_flight_count, of.queued_count, of.finished_count, of.failed_count)

        assert counts(await status_of(cluster)) == (0, 0, 0, 0)
        running = [asyncio.create_task(cluster.generate(request())) for _ in range(4)]
        drawn = pb.Sampling(temperature=1)
        running.append(asyncio.create_task(cluster.generate(request(sample_count=3, sampling=drawn))))
        assert counts(await status_of(cluster)) == (5, 3, 0, 0), "three samples that wait are one request"
        refused = await cluster.generate(request(priority=101))
        assert refused.reason == "INVALID_REQUEST"
        late = await cluster.generate(request(), timeout=1.0)
        assert late.reason == "DEADLINE_EXCEEDED"
        assert counts(await status_of(cluster)) == (5, 3, 2, 2)
        running[0].cancel()
        assert counts(await status_of(cluster)) == (4, 2, 3, 3), "a caller who leaves makes room, and is no success"
        await asyncio.gather(*running, return_exceptions=True)
        assert counts(await status_of(cluster)) == (0, 0, 7, 3)

    scripted(tmp_path, scenario, max_in_flight_count=2)


@register.shows("WatchStatusResponse.is_serving", "WatchStatusResponse.workers", "WorkerStatus.health")
def test_it_serves_while_any_worker_is_ready(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        ready, draining = (status.WORKER_HEALTH_READY,), (status.WORKER_HEALTH_DRAINING,)
        told = await status_of(cluster)
        assert (told.is_serving, workers(told, "health")) == (True, {"prefill-0": ready, "decode-0": ready})
        await cluster.workers["decode-0"].decode.drain(1.0)
        told = await status_of(cluster)
        assert (told.is_serving, workers(told, "health")) == (True, {"prefill-0": ready, "decode-0": draining})
        timings = (await cluster.generate(request())).finished.phases  # any worker can do both
        assert (timings.placement_mode, timings.placement_reason) == (pb.PLACEMENT_MODE_LOCAL, "no_decode_worker")
        assert timings.decode_worker_id == "prefill-0"
        await cluster.workers["prefill-0"].prefill.drain(1.0)
        told = await status_of(cluster)
        assert (told.is_serving, workers(told, "health")) == (False, {"prefill-0": draining, "decode-0": draining})
        cluster.set_workers("prefill-0")
        told = await status_of(cluster)
        assert workers(told, "health") == {"prefill-0": draining}, "whom the fleet does not name is not there"

    scripted(tmp_path, scenario)


@register.shows("WorkerStatus.health")
def test_a_worker_that_falls_silent_is_suspect_then_lost_and_the_status_goes_on(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        message = status.WatchStatusRequest()
        message.interval.FromMilliseconds(500)
        cluster.silent.update(cluster.workers)
        told = await watched(cluster, message, 4.9)
        healths = [workers(each, "health")["decode-0"][0] for _, each in told.written]
        assert len(healths) == 10, "a lost worker does not end the status"
        names = [status.WorkerHealth.Name(each).removeprefix("WORKER_HEALTH_") for each in dict.fromkeys(healths)]
        assert names == ["READY", "SUSPECT", "LOST"], healths
        is_ready = [health == status.WORKER_HEALTH_READY for health in healths]
        assert [each.is_serving for _, each in told.written] == is_ready
        cluster.silent.clear()
        assert workers(await status_of(cluster), "health")["decode-0"] == (status.WORKER_HEALTH_READY,)

    scripted(tmp_path, scenario)


@register.shows("WorkerStatus.health", "WorkerStatus.block_count")
def test_a_worker_not_heard_of_yet_is_connecting_and_its_blocks_are_not_known(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        assert set(workers(await status_of(cluster), "block_count").values()) == {(1024,)}
        cluster.workers["decode-0"].is_gone = True
        cluster.set_workers("prefill-0")
        cluster.set_workers("prefill-0", "decode-0")
        told = await status_of(cluster)
        assert workers(told, "health", "block_count") == {
            "prefill-0": (status.WORKER_HEALTH_READY, 1024),
            "decode-0": (status.WORKER_HEALTH_CONNECTING, 0),
        }

    scripted(tmp_path, scenario)


def test_every_health_of_a_worker_has_a_value_of_its_own() -> None:
    from router.cluster_view import Health
    from router.status_service import _HEALTHS

    assert set(_HEALTHS) == set(Health)
    assert sorted(_HEALTHS.values()) == sorted(set(status.WorkerHealth.values()) - {0})


@register.shows(
    "WorkerStatus.worker_id",
    "WorkerStatus.role",
    "WorkerStatus.assigned_count",
    "WorkerStatus.running_count",
    "WorkerStatus.waiting_count",
    "WorkerStatus.used_block_count",
    "WorkerStatus.held_lease_count",
)
def test_each_worker_has_the_load_that_its_engine_and_this_router_put_on_it(tmp_path: Path) -> None:
    names = ("role", "assigned_count", "running_count", "waiting_count", "used_block_count", "held_lease_count")
    prefill, decode = status.WORKER_ROLE_PREFILL, status.WORKER_ROLE_DECODE
    idle = {"prefill-0": (prefill, 0, 0, 0, 0, 0), "decode-0": (decode, 0, 0, 0, 0, 0)}

    async def scenario(cluster: VirtualCluster) -> None:
        assert workers(await status_of(cluster), *names) == idle
        running = [asyncio.create_task(cluster.generate(request())) for _ in range(2)]
        began = now()

        async def at(moment_s: float) -> dict[str, tuple[Any, ...]]:
            await asyncio.sleep(began + moment_s - 0.1 - now())
            return workers(await status_of(cluster), *names)

        # In the engine's queue for 0.7 s, then one computes at a time: three blocks of 16 for 40 tokens.
        assert await at(0.5) == {"prefill-0": (prefill, 2, 0, 2, 0, 0), "decode-0": (decode, 2, 0, 0, 0, 0)}
        assert await at(1.0) == {"prefill-0": (prefill, 2, 1, 1, 3, 0), "decode-0": (decode, 2, 0, 0, 0, 0)}
        # The first is held for its decode, which waits for 1.1 s; the second computes.
        first_s = 0.7 + prefill_s(40)
        assert await at(first_s + 0.5) == {"prefill-0": (prefill, 1, 1, 0, 6, 1), "decode-0": (decode, 2, 0, 1, 0, 0)}
        await asyncio.gather(*running)
        assert workers(await status_of(cluster), *names) == idle

    scripted(tmp_path, scenario, sim={"max_running_count": 1})


@register.shows("WorkerStatus.running_count", "WorkerStatus.used_block_count")
def test_a_decode_uses_the_blocks_of_all_its_tokens(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        for count, block_count in ((COUNT, 4), (60, 7)):  # of 16; promised to the whole answer when it begins
            running = asyncio.create_task(cluster.generate(request(count)))
            await asyncio.sleep(IN_PLACE_S + 2.5 * STEP_S - 0.1)
            told = workers(await status_of(cluster), "running_count", "used_block_count")
            assert told == {"prefill-0": (0, 0), "decode-0": (1, block_count)}
            await running

    scripted(tmp_path, scenario)


@register.shows("WorkerStatus.kv_bytes_per_s", "WorkerStatus.recomputed_share")
def test_what_a_worker_pulled_and_computed_again_is_told_of_its_last_requests(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        assert set(workers(await status_of(cluster), "kv_bytes_per_s", "recomputed_share").values()) == {(0, 0)}
        for _ in range(3):
            await cluster.generate(request())
        rate = pytest.approx(3 * BLOCK_BYTES / (0.4 + TRANSFER_S))
        told = workers(await status_of(cluster), "kv_bytes_per_s", "recomputed_share")
        assert told == {"prefill-0": (0, 0), "decode-0": (rate, 0)}
        unreachable(cluster)
        await cluster.generate(request())
        told = workers(await status_of(cluster), "kv_bytes_per_s", "recomputed_share")
        assert told == {"prefill-0": (0, 0), "decode-0": (rate, 0.25)}, "one of four, whose time pulled nothing"
        await asyncio.sleep(300)
        assert set(workers(await status_of(cluster), "kv_bytes_per_s", "recomputed_share").values()) == {(0, 0)}

    scripted(tmp_path, scenario)


@register.shows("WorkerStatus.no_room_count")
def test_decodes_refused_for_want_of_blocks_are_counted_at_the_worker_that_refused(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        refusing = cluster.workers["decode-0"].decode
        refusing._book = BlockBook(6)
        running = [asyncio.create_task(cluster.generate(request())) for _ in range(2)]
        outcomes = await asyncio.gather(*running)
        assert [each.finished.usage.output_token_count for each in outcomes] == [COUNT, COUNT]
        told = workers(await status_of(cluster), "no_room_count")
        assert refusing.no_room_count > 0
        assert told == {"prefill-0": (0,), "decode-0": (refusing.no_room_count,)}

    scripted(tmp_path, scenario)


@register.shows("WorkerStatus.quarantined_pull_count")
def test_pulls_given_up_whose_blocks_are_still_written_to_are_counted(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        network = cluster.workers["decode-0"].engine.network
        network.link = replace(network.link, bytes_per_s=BLOCK_BYTES / 10)  # 30 s; a pull may take 10
        running, began = asyncio.create_task(cluster.generate(request())), now()
        await asyncio.sleep(0.7 + prefill_s(40) + 1.1 + 10.0 + 0.1)
        network.link = replace(network.link, bytes_per_s=1e9)
        assert workers(await status_of(cluster), "quarantined_pull_count") == {"prefill-0": (0,), "decode-0": (1,)}
        outcome = await running
        timings = outcome.finished.phases
        assert (timings.attempt_count, timings.placement_reason) == (2, "recompute")
        await asyncio.sleep(began + 40 - now())
        assert workers(await status_of(cluster), "quarantined_pull_count") == {"prefill-0": (0,), "decode-0": (0,)}

    scripted(tmp_path, scenario)


@register.shows(
    "WatchStatusResponse.phases",
    "PhaseStatistics.name",
    "PhaseStatistics.sample_count",
    "PhaseStatistics.p50",
    "PhaseStatistics.p95",
)
def test_the_statistics_are_those_of_the_last_requests_and_forget_after_five_minutes(tmp_path: Path) -> None:
    names = [*SIX, "time_to_first_token", "inter_token_latency", "end_to_end"]

    def statistics(of: status.WatchStatusResponse) -> dict[str, tuple[int, float, float]]:
        assert [each.name for each in of.phases] == names
        return {each.name: (each.sample_count, seconds(each.p50), seconds(each.p95)) for each in of.phases}

    async def scenario(cluster: VirtualCluster) -> None:
        assert statistics(await status_of(cluster)) == dict.fromkeys(names, (0, 0.0, 0.0))
        outcomes: list[Outcome] = []
        for count in (20, 40, 60):  # tokens of prompt
            ids = pb.TokenIds(ids=range(10, 10 + count))
            outcomes.append(await cluster.generate(request(token_ids=ids)))
        told = statistics(await status_of(cluster))

        def of_three(values: list[float]) -> tuple[int, Any, Any]:
            _, middle, high = sorted(values)
            return (3, near(middle), near(middle + 0.9 * (high - middle)))

        for name in SIX:
            assert told[name] == of_three([phases(each)[name] for each in outcomes]), name
        assert told["prefill"] == of_three([prefill_s(20), prefill_s(40), prefill_s(60)])
        firsts = [seconds(each.finished.phases.time_to_first_token) for each in outcomes]
        assert told["time_to_first_token"] == of_three(firsts)
        assert told["end_to_end"] == of_three([sum(phases(each).values()) for each in outcomes])
        gap_count, gap_p50_s, gap_p95_s = told["inter_token_latency"]
        assert (gap_count, gap_p50_s) == (3 * (COUNT - 1), near(STEP_S))
        assert gap_p95_s > 1.1, "three of 33 have the way to the decode worker in them"
        refused = await cluster.generate(request(), timeout=1.0)
        assert refused.reason == "DEADLINE_EXCEEDED"
        assert statistics(await status_of(cluster))["end_to_end"][0] == 3, "of requests that ended well"
        await asyncio.sleep(300)
        assert statistics(await status_of(cluster)) == dict.fromkeys(names, (0, 0.0, 0.0))

    scripted(tmp_path, scenario)


@register.shows("PhaseStatistics.sample_count")
def test_at_most_512_samples_are_kept_of_each(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        await cluster.generate(request(600))
        told = {each.name: each.sample_count for each in (await status_of(cluster)).phases}
        assert (told["inter_token_latency"], told["decode"]) == (512, 1)

    scripted(tmp_path, scenario)

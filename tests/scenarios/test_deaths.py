"""Workers that die, hang, come back, or were never there. Callers notice a pause at most."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.errors import Reason
from baton.request import PlacementMode, Role
from baton.testing import in_virtual_time
from bench.virtual_cluster import LEASE_S, VirtualCluster, virtual_cluster
from engine.sim import PhaseDelays
from router.flight import FlightLimits
from router.placement import PlacementPolicy


def _ask(cluster: VirtualCluster, request: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(cluster.ask(request, **options), name="caller")


@pytest.mark.parametrize("prefill_count", [0, 1, 2])
@pytest.mark.parametrize("at_token", range(1, 13))
def test_the_death_of_the_decode_worker_after_any_token_is_not_seen(at_token: int, prefill_count: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(prefill_count, 2) as cluster:
            killed: list[str] = []

            def kill_once(count: int) -> None:
                if count >= at_token and not killed:
                    (flight,) = cluster.relay._flights
                    worker_id = flight.handoff.decode_worker_id
                    killed.append(worker_id)
                    if worker_id:
                        cluster.processes[worker_id].die()

            heard = await cluster.exact(cluster.request(50, 12), on_token=kill_once)
            if at_token < 12 and killed[0]:
                assert heard.report.attempt_count == 2
                assert heard.report.decode_worker_id != killed[0]

    scenario()


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("prefill_count", [1, 2])
@pytest.mark.parametrize("at_ms", [0, 1, *range(5, 200, 9)])
def test_a_worker_that_dies_at_any_time_is_not_seen(at_ms: int, prefill_count: int, worker_id: str) -> None:
    """Before, during and after its prefill or transfer or decode, with many requests at once."""

    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(prefill_count, 2) as cluster:
            callers = [
                asyncio.create_task(cluster.exact(cluster.request(10 + 9 * index, 12)), name="caller")
                for index in range(6)
            ]
            await asyncio.sleep(at_ms / 1000)
            cluster.processes[worker_id].die()
            await asyncio.gather(*callers)

    scenario()


@in_virtual_time
async def test_without_a_prefill_worker_the_decode_worker_prefills() -> None:
    async with virtual_cluster(1, 1) as cluster:
        cluster.processes["prefill-0"].die()
        heard = await cluster.exact(cluster.request(100, 5))
        assert heard.report.mode is PlacementMode.LOCAL
        assert heard.report.placement_reason == "no_prefill_worker"


@in_virtual_time
async def test_without_a_decode_worker_a_prefill_worker_serves_whole_requests() -> None:
    async with virtual_cluster(1, 1) as cluster:
        cluster.processes["decode-0"].die()
        heard = await cluster.exact(cluster.request(100, 5))
        assert (heard.report.mode, heard.report.placement_reason) == (PlacementMode.LOCAL, "no_decode_worker")
        assert heard.report.decode_worker_id == "prefill-0"


@pytest.mark.parametrize("timeout_s", [1.0, 5.0, 300.0])
def test_with_no_worker_left_the_reason_comes_before_the_deadline(timeout_s: float) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(1, 1) as cluster:
            for process in cluster.processes.values():
                process.die()
            await asyncio.sleep(0.3)  # the router has seen it
            started_at = asyncio.get_running_loop().time()
            heard = await cluster.ask(cluster.request(), timeout_s=timeout_s)
            assert heard.error is not None
            assert (heard.error.reason, heard.error.status.value) == (Reason.NO_WORKER, "UNAVAILABLE")
            assert heard.ended_at - started_at < timeout_s
            assert not heard.is_admitted, "a refused call must be safe to retry"
            assert not cluster.relay.could_serve

    scenario()


@in_virtual_time
async def test_a_request_that_meets_a_dead_fleet_before_the_router_knows_is_safe_to_retry() -> None:
    async with virtual_cluster(1, 1) as cluster:
        for process in cluster.processes.values():
            process.die()
        heard = await cluster.ask(cluster.request())
        assert heard.error is not None
        assert (heard.error.reason, heard.error.status.value) == (Reason.NO_WORKER, "UNAVAILABLE")


@in_virtual_time
async def test_a_leg_that_fails_warns_other_requests_off_its_worker() -> None:
    async with virtual_cluster(2, 2) as cluster:
        await cluster.exact(cluster.request(100, 5))
        cluster.processes["decode-0"].die()
        cluster.processes["prefill-0"].die()
        callers = []
        for _ in range(20):
            callers.append(_ask(cluster, cluster.request(20, 5)))
            await asyncio.sleep(0.005)
        attempts = [(await caller).report.attempt_count for caller in callers]
        assert sum(attempts) <= len(attempts) + 4


@in_virtual_time
async def test_when_all_die_in_the_middle_of_an_answer_it_is_aborted_not_called_safe_to_retry() -> None:
    async with virtual_cluster(1, 1) as cluster:
        caller = _ask(cluster, cluster.request(50, 100))
        await asyncio.sleep(0.5)
        for process in cluster.processes.values():
            process.die()
        heard = await caller
        assert heard.error is not None
        assert (heard.error.reason, heard.error.status.value) == (Reason.ATTEMPTS_EXHAUSTED, "ABORTED")
        assert heard.error.metadata["emitted_token_count"] == str(len(heard.tokens))
        assert len(heard.tokens) > 3


@in_virtual_time
async def test_a_worker_that_comes_back_resumes_service_and_running_answers() -> None:
    async with virtual_cluster(1, 1) as cluster:
        request = cluster.request(50, 60)
        caller = _ask(cluster, request)
        await asyncio.sleep(0.4)
        for process in cluster.processes.values():
            process.die()
        waiting = _ask(cluster, cluster.request(20, 5))
        await asyncio.sleep(5.0)
        assert not caller.done()
        await cluster.launch("decode-0", Role.DECODE)
        await cluster.launch("prefill-0", Role.PREFILL)
        heard = await caller
        assert heard.error is None
        assert heard.tokens == cluster.expected(request)
        assert (await waiting).error is None
        await cluster.exact(cluster.request())


@in_virtual_time
async def test_attempts_are_bounded() -> None:
    async with virtual_cluster(0, 5) as cluster:

        def kill(count: int) -> None:
            for flight in cluster.relay._flights:
                cluster.processes[flight.handoff.decode_worker_id].die()

        heard = await cluster.ask(cluster.request(50, 100), on_token=kill)
        assert heard.error is not None
        assert heard.error.reason is Reason.ATTEMPTS_EXHAUSTED
        assert heard.error.metadata["attempt_count"] == "3"
        assert cluster.registry.get_sample_value("baton_lost_legs_total", {"phase": "decode"}) == 3


@in_virtual_time
async def test_a_stopped_decode_worker_is_given_up_after_its_silence_and_its_answers_go_on_elsewhere() -> None:
    async with virtual_cluster(1, 2) as cluster:
        request = cluster.request(50, 200)
        caller = _ask(cluster, request)
        await asyncio.sleep(0.5)
        (flight,) = cluster.relay._flights
        stopped = cluster.processes[flight.handoff.decode_worker_id]
        stopped.stop()
        stopped_at = asyncio.get_running_loop().time()
        await asyncio.sleep(1.5)
        assert cluster.relay.could_serve
        fresh = await cluster.exact(cluster.request(20, 5))
        assert fresh.report.decode_worker_id != stopped.worker_id, "a suspect worker gets nothing new"
        heard = await caller
        assert heard.tokens == cluster.expected(request)
        assert heard.report.attempt_count == 2
        assert heard.ended_at - stopped_at < 2.0 + 3.0
        stopped.go_on()
        await asyncio.sleep(1.0)
        assert all(worker.is_ready for worker in cluster.roster.view().workers)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_leg_that_is_tried_elsewhere_ends_at_once_on_a_worker_that_lives(role: Role) -> None:
    """Given up for its silence it computes on: nobody but the router can end the old leg, and not only at the end."""

    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(2, 2) as cluster:
            if role is Role.PREFILL:
                for process in cluster.processes.values():
                    process.engine.extra_delay_s = PhaseDelays(prefill=8.0)
            request = cluster.request(50, 800)
            caller = _ask(cluster, request)
            await asyncio.sleep(0.5)
            (flight,) = cluster.relay._flights
            (silent,) = (process for process in cluster.processes.values() if process.books()["legs"])
            assert silent.role is role
            silent.go_silent()
            async with asyncio.timeout(6.0):
                while flight.handoff.attempt_count == 1:
                    assert silent.books()["legs"] == 1
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # the step that it was in
            assert not any(silent.books().values()), silent.books()
            assert not caller.done()
            silent.go_on()
            heard = await caller
            assert heard.tokens == cluster.expected(request)
            assert heard.report.attempt_count == 2

    scenario()


@in_virtual_time
async def test_a_worker_that_only_pauses_keeps_its_answers() -> None:
    async with virtual_cluster(1, 1) as cluster:
        caller = _ask(cluster, cluster.request(50, 50))
        await asyncio.sleep(0.3)
        cluster.processes["decode-0"].stop()
        await asyncio.sleep(1.2)
        cluster.processes["decode-0"].go_on()
        heard = await caller
        assert heard.error is None
        assert heard.report.attempt_count == 1


@in_virtual_time
async def test_a_pull_that_fails_is_recomputed_and_reported() -> None:
    async with virtual_cluster(1, 1) as cluster:
        cluster.network.cut_off(cluster.processes["prefill-0"].engine.config.engine_id)
        heard = await cluster.exact(cluster.request(100, 5))
        assert heard.report.recomputed_token_count > 0
        assert heard.report.attempt_count == 1


@in_virtual_time
async def test_a_refused_ticket_becomes_a_recompute_and_its_kv_is_released() -> None:
    async with virtual_cluster(1, 1) as cluster:
        cluster.processes["decode-0"].decode._secret = bytes(32)
        heard = await cluster.exact(cluster.request(100, 5))
        assert heard.report.attempt_count == 2
        assert (heard.report.mode, heard.report.placement_reason) == (PlacementMode.LOCAL, "recompute")


@in_virtual_time
async def test_a_hanging_prefill_is_tried_elsewhere_after_its_own_timeout() -> None:
    limits = FlightLimits(lease_s=LEASE_S, prefill_timeout_s=1.5, gap_timeout_s=1.5)
    async with virtual_cluster(2, 1, flight=limits) as cluster:
        for process in cluster.processes.values():
            if process.role is Role.PREFILL:
                process.engine.hang()  # the engine hangs, the process goes on reporting
                break
        for _ in range(4):
            await cluster.exact(cluster.request(100, 5))
        process.engine.resume()


@in_virtual_time
async def test_a_decode_that_falls_silent_is_tried_elsewhere() -> None:
    limits = FlightLimits(lease_s=LEASE_S, gap_timeout_s=1.5)
    async with virtual_cluster(1, 2, flight=limits) as cluster:
        request = cluster.request(100, 100)
        caller = _ask(cluster, request)
        await asyncio.sleep(0.5)
        (flight,) = cluster.relay._flights
        engine = cluster.processes[flight.handoff.decode_worker_id].engine
        engine.hang()
        heard = await caller
        assert heard.tokens == cluster.expected(request)
        assert heard.report.attempt_count == 2
        engine.resume()


@in_virtual_time
async def test_the_lease_is_extended_while_a_request_waits_for_adoption() -> None:
    limits = FlightLimits(lease_s=3.0)
    async with virtual_cluster(1, 1, flight=limits) as cluster:
        cluster.processes["decode-0"].engine.hang()
        caller = _ask(cluster, cluster.request(100, 5))
        await asyncio.sleep(10.0)
        assert cluster.processes["prefill-0"].books()["leases"] == 1
        cluster.processes["decode-0"].engine.resume()
        heard = await caller
        assert heard.error is None
        assert heard.report.recomputed_token_count == 0


@in_virtual_time
async def test_a_rolling_restart_under_load_is_not_seen() -> None:
    async with virtual_cluster(2, 2, policy=PlacementPolicy()) as cluster:
        callers = []

        async def load() -> None:
            for index in range(150):
                request = cluster.request(10 + 3 * index % 30, 20)
                callers.append(asyncio.create_task(cluster.exact(request), name="caller"))
                await asyncio.sleep(0.04)

        async def restarts() -> None:
            for worker_id, process in list(cluster.processes.items()):
                await asyncio.sleep(1.0)
                process.die()
                await asyncio.sleep(0.5)
                await cluster.launch(worker_id, process.role)

        await asyncio.gather(load(), restarts())
        await asyncio.gather(*callers)


@in_virtual_time
async def test_a_role_that_is_set_is_followed_from_the_next_request_on() -> None:
    async with virtual_cluster(2, 1) as cluster:
        cluster.roster.set_role("prefill-1", Role.DECODE)
        cluster.roster.set_role("decode-0", Role.PREFILL)
        heard = await cluster.exact(cluster.request())
        assert heard.report.decode_worker_id == "prefill-1"
        cluster.tell_fleet()
        assert (await cluster.exact(cluster.request())).report.decode_worker_id == "prefill-1", "a heartbeat undid it"

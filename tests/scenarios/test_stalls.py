"""Engines that hang while their process goes on reporting: a request is moved, or it ends with STALLED."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import Reason, StatusName
from baton.request import Role
from baton.testing import in_virtual_time
from bench.virtual_cluster import LEASE_S, VirtualCluster, virtual_cluster
from engine.sim import PhaseDelays
from router.admission import AdmissionLimits
from router.flight import FlightLimits
from router.placement import PlacementPolicy

GAP_S = 2.0
PREFILL_S = 5.0
LIMITS = FlightLimits(lease_s=LEASE_S, prefill_timeout_s=PREFILL_S, gap_timeout_s=GAP_S)


def _hang(cluster: VirtualCluster, role: Role) -> None:
    for process in cluster.processes.values():
        if process.role is role:
            process.engine.hang()


def _resume(cluster: VirtualCluster) -> None:
    for process in cluster.processes.values():
        process.engine.resume()


@pytest.mark.parametrize("decode_count", [1, 2])
@in_virtual_time
async def test_a_stream_that_can_be_moved_nowhere_ends_stalled_after_its_attempts(decode_count: int) -> None:
    async with virtual_cluster(1, decode_count, flight=LIMITS) as cluster:
        caller = asyncio.create_task(cluster.ask(cluster.request(40, 100)))
        await asyncio.sleep(0.5)
        for process in cluster.processes.values():
            process.engine.hang()
        began = asyncio.get_running_loop().time()
        heard = await caller
        assert heard.error is not None
        assert heard.error.reason is Reason.STALLED
        assert heard.error.status is StatusName.ABORTED, "tokens were sent"
        assert heard.error.metadata["emitted_token_count"] == str(len(heard.tokens)) != "0"
        assert heard.error.metadata["phase"] in ("prefill", "decode")
        took_s = heard.ended_at - began
        assert GAP_S + 2 * min(GAP_S, PREFILL_S) <= took_s <= GAP_S + 2 * PREFILL_S + 1, (
            "each attempt had its silence"
        )
        _resume(cluster)
        await cluster.exact(cluster.request())


@in_virtual_time
async def test_a_hanging_prefill_before_any_token_is_unavailable_and_says_the_phase() -> None:
    async with virtual_cluster(2, 1, flight=LIMITS) as cluster:
        _hang(cluster, Role.PREFILL)
        _hang(cluster, Role.DECODE)
        heard = await cluster.ask(cluster.request(40, 8))
        assert heard.error is not None
        assert (heard.error.reason, heard.error.status) == (Reason.STALLED, StatusName.UNAVAILABLE)
        assert heard.error.metadata == {"phase": "prefill", "gap_s": "5", "emitted_token_count": "0"}
        assert heard.ended_at == pytest.approx(3 * PREFILL_S, abs=0.5)
        _resume(cluster)


@in_virtual_time
async def test_a_hang_in_the_handoff_is_counted_as_a_gap_and_its_kv_is_let_go() -> None:
    once = FlightLimits(lease_s=LEASE_S, prefill_timeout_s=PREFILL_S, gap_timeout_s=GAP_S, max_attempt_count=1)
    async with virtual_cluster(1, 1, flight=once) as cluster:
        _hang(cluster, Role.DECODE)
        heard = await cluster.ask(cluster.request(40, 8))
        assert heard.error is not None
        assert heard.error.reason is Reason.STALLED
        assert heard.error.metadata == {"phase": "handoff_wait", "gap_s": "2", "emitted_token_count": "1"}
        await asyncio.sleep(0.1)
        assert cluster.processes["prefill-0"].books()["leases"] == 0
        _resume(cluster)


@in_virtual_time
async def test_a_local_prompt_has_the_time_of_a_prefill_and_then_the_gap_of_a_decode() -> None:
    policy = PlacementPolicy(mode="local")
    async with virtual_cluster(0, 1, flight=LIMITS, policy=policy, sim={"max_running_count": 8}) as cluster:
        engine = cluster.processes["decode-0"].engine
        engine.hang()
        caller = asyncio.create_task(cluster.ask(cluster.request(40, 50)))
        await asyncio.sleep(GAP_S + 1.0)
        engine.resume()  # longer than a gap, shorter than a prefill: no attempt is lost
        await asyncio.sleep(0.3)
        engine.hang()
        await asyncio.sleep(GAP_S - 0.1)
        engine.resume()
        heard = await caller
        assert heard.error is None
        assert heard.report.attempt_count == 1


@in_virtual_time
async def test_tokens_that_keep_coming_slowly_are_no_stall() -> None:
    async with virtual_cluster(1, 1, flight=LIMITS) as cluster:
        cluster.processes["decode-0"].engine.extra_delay_s = PhaseDelays(decode=GAP_S - 0.1)
        heard = await cluster.exact(cluster.request(40, 10))
        assert heard.report.attempt_count == 1
        assert heard.ended_at > 8 * (GAP_S - 0.1)


@in_virtual_time
async def test_nowhere_else_to_go_after_a_stall_says_stalled_and_not_that_the_queue_was_full() -> None:
    admission = AdmissionLimits(max_wait_s=1.0, no_worker_s=0.5)
    async with virtual_cluster(1, 1, flight=LIMITS, admission=admission) as cluster:
        caller = asyncio.create_task(cluster.ask(cluster.request(40, 100)))
        await asyncio.sleep(0.5)
        process = cluster.processes["decode-0"]
        process.engine.hang()
        await asyncio.sleep(GAP_S - 1.3)
        for each in cluster.processes.values():
            each.go_silent()  # when the gap is over: suspect, so that nothing is placed on them, and not lost yet
        heard = await caller
        assert heard.error is not None
        for each in cluster.processes.values():
            each.go_on()
        assert heard.error.reason is Reason.STALLED, heard.error
        assert heard.error.status is StatusName.ABORTED


@in_virtual_time
async def test_the_deadline_still_wins_over_a_longer_gap() -> None:
    async with virtual_cluster(1, 1, flight=LIMITS) as cluster:
        _hang(cluster, Role.DECODE)
        heard = await cluster.ask(cluster.request(40, 8), timeout_s=1.0)
        assert heard.error is not None
        assert (heard.error.reason, heard.error.metadata["phase"]) == (Reason.DEADLINE_EXCEEDED, "handoff_wait")
        _resume(cluster)

"""Workers that are lost while a request is on its way to them: nobody else will tell it."""

from __future__ import annotations

import asyncio

import pytest

from baton.testing import in_virtual_time
from bench.virtual_cluster import VirtualCluster, virtual_cluster
from router.roster import RosterLimits

QUICK = RosterLimits(load_interval_s=0.05, silence_s=0.1, lost_s=0.2)


async def _decoder_of_the_one_request(cluster: VirtualCluster) -> str:
    await asyncio.sleep(0.1)
    (flight,) = cluster.relay._flights
    assert flight.handoff.placement is not None
    return flight.handoff.placement.decode.worker_id


@pytest.mark.parametrize("decode_count", [1, 2])
def test_a_decode_worker_lost_during_the_prefill_is_not_waited_for(decode_count: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(1, decode_count, roster=QUICK) as cluster:
            request = cluster.request(900, 5)  # prefilled in 0.9 s
            started_at = asyncio.get_running_loop().time()
            caller = asyncio.create_task(cluster.exact(request), name="caller")
            stopped = cluster.processes[await _decoder_of_the_one_request(cluster)]
            stopped.stop()
            heard = await caller
            assert heard.report.decode_worker_id != stopped.worker_id
            assert heard.ended_at - started_at < 4.0, "it waited for a worker known to be lost"
            stopped.go_on()

    scenario()


@in_virtual_time
async def test_a_prefill_worker_that_leaves_the_set_while_it_holds_kv_is_still_told_to_let_go() -> None:
    """The lease is 600 s: nothing but the release can balance the books."""
    async with virtual_cluster(1, 1) as cluster:
        cluster.processes["decode-0"].engine.hang()  # so that the KV waits for its adoption
        caller = asyncio.create_task(cluster.exact(cluster.request(100, 5)), name="caller")
        await asyncio.sleep(0.5)
        prefill = cluster.processes["prefill-0"]
        assert prefill.books()["leases"] == 1
        cluster.roster.set_workers([cluster.processes["decode-0"].spec])
        await asyncio.sleep(0.5)
        cluster.processes["decode-0"].engine.resume()
        await caller
        await asyncio.sleep(0.5)
        assert prefill.books()["leases"] == 0
        assert "0 leaving" in repr(cluster.roster), "and then it is let go itself"

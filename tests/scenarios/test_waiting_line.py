"""The line before placement, through whole requests: its bound, and whoever leaves it in the moment they came."""

from __future__ import annotations

import asyncio

from baton.errors import Reason
from baton.testing import in_virtual_time
from bench.virtual_cluster import virtual_cluster
from router.admission import AdmissionLimits


@in_virtual_time
async def test_requests_of_one_moment_do_not_overfill_the_line() -> None:
    limits = AdmissionLimits(max_in_flight_count=3, queue_limit=2)
    async with virtual_cluster(admission=limits) as cluster:
        answers = await asyncio.gather(*(cluster.ask(cluster.request()) for _ in range(8)))
    reasons = [answer.error.reason for answer in answers if answer.error is not None]
    assert reasons == [Reason.QUEUE_FULL] * 3


@in_virtual_time
async def test_a_caller_who_leaves_in_the_moment_it_came_leaves_no_turn_behind() -> None:
    limits = AdmissionLimits(max_in_flight_count=1, queue_limit=4)
    async with virtual_cluster(admission=limits) as cluster:
        running = asyncio.create_task(cluster.exact(cluster.request()))
        await asyncio.sleep(0.005)
        for pass_count in range(12):
            leaver = asyncio.create_task(cluster.ask(cluster.request()))
            for _ in range(pass_count):
                await asyncio.sleep(0)
            leaver.cancel()
            await asyncio.wait((leaver,))
        assert cluster.admission.waiting_count == 0
        await running
        await cluster.exact(cluster.request())

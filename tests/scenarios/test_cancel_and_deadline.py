"""Callers that leave and deadlines that pass, at every moment there is: everything is given back, at once."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from baton.testing import in_virtual_time
from bench.virtual_cluster import TokenAnswer, VirtualCluster, virtual_cluster
from engine.sim import PhaseDelays
from router.answering import Piece, RoutedRequest
from router.placement import PlacementPolicy


def _ask(cluster: VirtualCluster, request: RoutedRequest, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(cluster.ask(request, **options), name="caller")


@pytest.mark.parametrize("mode", ["split", "local"])
def test_a_caller_that_leaves_at_any_step_leaves_nothing_behind(mode: str) -> None:
    """The clock jumps only when every task waits, so a step is a pass of the loop: cancel after each k of them."""

    @in_virtual_time
    async def scenario() -> int:
        async with virtual_cluster(policy=PlacementPolicy(mode=mode)) as cluster:
            for step in range(10_000):
                caller = _ask(cluster, cluster.request(20, 4))
                for _ in range(step):
                    await asyncio.sleep(0)
                    if not _is_anything_ready():
                        await asyncio.sleep(0.0005)
                if caller.done():
                    return step
                caller.cancel()
                await asyncio.wait((caller,))
                await cluster.assert_balanced(within_s=0.2)
        raise AssertionError("never completed")

    def _is_anything_ready() -> bool:
        return len(asyncio.get_running_loop()._ready) > 0  # type: ignore[attr-defined]

    assert scenario() > 30


@in_virtual_time
async def test_a_flight_that_is_itself_cancelled_says_so_to_who_still_reads_and_leaves_nothing() -> None:
    """Not by its caller: by whoever ends every task of a process. Without an end the caller would wait on."""
    async with virtual_cluster() as cluster:
        now = asyncio.get_running_loop().time()
        run = cluster.relay.run(cluster.request(40, 8), TokenAnswer(), now + 60, received_at=now)
        async with aclosing(run) as events:
            count = 0
            while count < 3:
                event = await anext(events)
                count += event.token_count if isinstance(event, Piece) else 0
            ((flight, task),) = cluster.relay._flights.items()
            task.cancel()

            async def the_rest() -> None:
                while True:
                    await flight.outbox.take()

            with pytest.raises(BatonError) as stopped:
                await asyncio.wait_for(the_rest(), 1.0)
            assert stopped.value.reason is Reason.DRAINING
            assert 3 <= int(stopped.value.metadata["emitted_token_count"]) < 8
            await asyncio.wait((task,))
        await cluster.assert_balanced(within_s=0.2)


@pytest.mark.parametrize("at_ms", [*range(0, 80, 3), *range(80, 200, 20)])
def test_a_caller_that_leaves_at_any_time_leaves_nothing_behind(at_ms: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(2, 2) as cluster:
            callers = [_ask(cluster, cluster.request(1 + 5 * index, 10)) for index in range(12)]
            await asyncio.sleep(at_ms / 1000)
            for caller in callers:
                caller.cancel()
            await asyncio.wait(callers)
            await cluster.assert_balanced(within_s=0.1)
            await cluster.exact(cluster.request())

    scenario()


@in_virtual_time
async def test_closing_the_stream_after_any_piece_ends_the_request() -> None:
    async with virtual_cluster() as cluster:
        for count in range(1, 8):
            request = cluster.request(40, 8)
            now = asyncio.get_running_loop().time()
            async with aclosing(cluster.relay.run(request, TokenAnswer(), now + 60, received_at=now)) as events:
                async for event in events:
                    if isinstance(event, Piece) and event.first_token_index + event.token_count == count:
                        break
            assert cluster.relay.in_flight_count == 0
            await cluster.assert_balanced(within_s=0.1)


DEADLINES = [
    ("prefill", PhaseDelays(prefill=5.0), "prefill"),
    ("decode", PhaseDelays(queue=5.0), "handoff_wait"),
    ("decode", PhaseDelays(transfer=5.0), "handoff_wait"),  # how much of it was transfer is told only afterwards
    ("decode", PhaseDelays(decode=5.0), "decode"),
]


@pytest.mark.parametrize(("role", "delays", "phase"), DEADLINES)
def test_a_deadline_names_the_phase_it_passed_in(role: str, delays: PhaseDelays, phase: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            cluster.processes[f"{role}-0"].engine.extra_delay_s = delays
            heard = await cluster.ask(cluster.request(40, 8), timeout_s=2.0)
            assert heard.error is not None
            assert heard.error.reason is Reason.DEADLINE_EXCEEDED
            assert heard.error.metadata["phase"] == phase
            assert heard.error.metadata["emitted_token_count"] == str(len(heard.tokens))
            assert cluster.relay.in_flight_count == 0
            await cluster.assert_balanced(within_s=0.1)

    scenario()


@in_virtual_time
async def test_no_request_outlives_its_deadline_wherever_it_is() -> None:
    async with virtual_cluster() as cluster:
        for timeout_ms in range(1, 200, 7):
            started_at = asyncio.get_running_loop().time()
            heard = await cluster.ask(cluster.request(40, 100), timeout_s=timeout_ms / 1000)
            assert heard.error is not None
            assert heard.error.reason is Reason.DEADLINE_EXCEEDED
            assert heard.ended_at - started_at == pytest.approx(timeout_ms / 1000, abs=1e-6)
            await cluster.assert_balanced(within_s=0.1)


@in_virtual_time
async def test_a_deadline_that_has_passed_already_costs_nothing() -> None:
    async with virtual_cluster() as cluster:
        heard = await cluster.ask(cluster.request(), timeout_s=0.0)
        assert heard.error is not None
        assert heard.error.metadata["phase"] == "queue"
        assert not heard.is_admitted


@in_virtual_time
async def test_a_deadline_in_the_queue_says_queue() -> None:
    async with virtual_cluster(sim={"max_running_count": 1}, policy=PlacementPolicy(decode_ahead_count=0)) as cluster:
        first = _ask(cluster, cluster.request(20, 500))
        await asyncio.sleep(0.1)
        heard = await cluster.ask(cluster.request(20, 8), timeout_s=1.0)
        assert heard.error is not None
        assert heard.ended_at == pytest.approx(1.1, abs=0.01)
        assert (heard.error.reason, heard.error.metadata["phase"]) == (Reason.DEADLINE_EXCEEDED, "queue")
        assert (await first).error is None


@in_virtual_time
async def test_a_storm_of_cancels_leaves_nothing_behind() -> None:
    async with virtual_cluster(2, 2) as cluster:
        callers = []
        for index in range(200):
            callers.append(_ask(cluster, cluster.request(1 + 7 * index % 200, 30)))
            await asyncio.sleep(0.003)
            if index % 2:
                callers[-1 - index * 7919 % min(40, len(callers))].cancel()
        await asyncio.wait(callers)
        for caller in callers:
            if not caller.cancelled():
                assert caller.result().error is None
        await cluster.assert_balanced(within_s=0.1)
        sample = cluster.registry.get_sample_value
        counts = {name: sample("baton_requests_total", {"outcome": name}) or 0 for name in ("ok", "cancelled")}
        assert counts["ok"] == sum(not caller.cancelled() for caller in callers)
        assert counts["cancelled"] == sum(caller.cancelled() for caller in callers) > 50


@in_virtual_time
async def test_closing_the_relay_tells_callers_that_still_listen() -> None:
    async with virtual_cluster() as cluster:
        started = _ask(cluster, cluster.request(20, 100))
        await asyncio.sleep(0.1)
        fresh = _ask(cluster, cluster.request(200, 100))
        await asyncio.sleep(0)
        await cluster.relay.close()
        first, second = (await started).error, (await fresh).error
        assert isinstance(first, BatonError)
        assert isinstance(second, BatonError)
        assert (first.reason, first.status.value) == (Reason.DRAINING, "ABORTED")
        assert (second.reason, second.status.value) == (Reason.DRAINING, "UNAVAILABLE")
        late = await cluster.ask(cluster.request())
        assert late.error is not None
        assert late.error.reason is Reason.DRAINING

"""Decode workers whose KV blocks are taken: refused early, waited for at the router with the KV held, never lost."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from baton.errors import Reason
from baton.request import PlacementMode, Role
from baton.testing import in_virtual_time
from baton.timeline import Phase
from bench.virtual_cluster import Heard, VirtualCluster, virtual_cluster
from decode_worker.reservations import BlockBook
from router.admission import Entry
from router.answering import RoutedRequest
from router.cluster_view import WorkerIdentity
from router.flight import FlightLimits
from router.handoff import State

SMALL = {"block_count": 64}
"""Of 16 tokens. One answer of ``large`` needs 44 of them, which two do not find."""


def large(cluster: VirtualCluster, **more: Any) -> RoutedRequest:
    return cluster.request(100, 600, ignore_eos=True, **more)


def _ask(cluster: VirtualCluster, request: RoutedRequest, **options: Any) -> asyncio.Task[Heard]:
    return asyncio.create_task(cluster.ask(request, **options), name="caller")


async def _until_one_waits(cluster: VirtualCluster, count: int = 1) -> None:
    async with asyncio.timeout(3.0):
        while cluster.admission.room_waiting_count < count:  # noqa: ASYNC110  virtual time
            await asyncio.sleep(0.01)


def _refusals(cluster: VirtualCluster) -> float:
    return cluster.registry.get_sample_value("baton_no_room_refusals_total") or 0.0


@in_virtual_time
async def test_a_decode_without_room_waits_with_its_kv_held_and_starts_as_soon_as_there_is_some() -> None:
    async with virtual_cluster(1, 1, sim=SMALL, flight=FlightLimits(lease_s=2.0)) as cluster:
        first, second = large(cluster), large(cluster)
        callers = [_ask(cluster, first), _ask(cluster, second)]
        await _until_one_waits(cluster)
        await asyncio.sleep(3.0)  # past its lease, which is extended meanwhile
        decode, prefill = cluster.processes["decode-0"], cluster.processes["prefill-0"]
        states = sorted(flight.handoff.state.value for flight in cluster.relay._flights)
        assert states == [State.DECODING.value, State.NO_ROOM.value]
        assert prefill.books()["leases"] == 1
        assert (decode.engine.load().waiting_count, decode.books()["legs"]) == (0, 1), "it is not in the engine"
        assert _refusals(cluster) == 1 == decode.board.current().no_room_count, "asked once, and not again and again"
        done = await asyncio.gather(*callers)
        assert [heard.tokens for heard in done] == [cluster.expected(first), cluster.expected(second)]
        for heard in done:
            assert heard.report.attempt_count == 1
            assert (heard.report.transfer.pull_count, heard.report.recomputed_token_count) == (1, 0)
        # 600 steps of 10 ms each, one after the other, and a load report between them.
        assert done[1].ended_at - done[0].ended_at < 6.5
        assert max(heard.report.durations[Phase.HANDOFF_WAIT] for heard in done) > 5.0
        assert _refusals(cluster) <= 2


@in_virtual_time
async def test_another_decode_worker_that_has_room_is_taken() -> None:
    async with virtual_cluster(1, 1, sim=SMALL) as cluster:
        callers = [_ask(cluster, large(cluster)), _ask(cluster, large(cluster))]
        await asyncio.sleep(0.05)  # both are placed on the only one
        await cluster.launch("decode-1", Role.DECODE)
        done = await asyncio.gather(*callers)
        assert {heard.report.decode_worker_id for heard in done} == {"decode-0", "decode-1"}
        assert all(heard.report.attempt_count == 1 for heard in done)
        assert abs(done[1].ended_at - done[0].ended_at) < 1.0, "nobody waited for the other"
        assert _refusals(cluster) == 1


@pytest.mark.parametrize("priorities", [(0, 0), (0, 5)])
def test_those_that_wait_are_served_by_priority_and_then_in_order(priorities: tuple[int, int]) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(1, 1, sim=SMALL) as cluster:
            running = _ask(cluster, large(cluster))
            await asyncio.sleep(0.02)
            earlier = _ask(cluster, large(cluster, priority=priorities[0]))
            await asyncio.sleep(0.2)
            later = _ask(cluster, large(cluster, priority=priorities[1]))
            await _until_one_waits(cluster, 2)
            ended_at = [heard.ended_at for heard in await asyncio.gather(running, earlier, later)]
            assert ended_at[0] < min(ended_at[1:])
            assert (ended_at[2] < ended_at[1]) == (priorities[1] > priorities[0])

    scenario()


@in_virtual_time
async def test_room_promised_to_one_that_has_come_and_gone_is_free_again() -> None:
    async with virtual_cluster(1, 1, sim=SMALL) as cluster:
        # The second is promised the room of an idle worker, uses it, and ends: the same room is there again.
        await asyncio.gather(_ask(cluster, large(cluster)), _ask(cluster, large(cluster)))
        await asyncio.sleep(0.5)
        prompt = tuple(range(100))
        entry = Entry(prompt, 600, priority=0, session_id="", deadline_at=asyncio.get_running_loop().time() + 60)
        place = cluster.admission.try_enter(entry)
        assert place is not None
        (decode,) = (w.identity for w in cluster.roster.view().workers if w.role is Role.DECODE)
        elsewhere = WorkerIdentity("elsewhere", "e")
        async with asyncio.timeout(0.1):
            found = await cluster.admission.wait_for_room(
                place, 44, refused_by=elsewhere, barred=frozenset({elsewhere}), otherwise=None
            )
        assert found == decode
        place.close()


@in_virtual_time
async def test_nothing_new_overtakes_what_waits_for_room() -> None:
    async with virtual_cluster(1, 1, sim=SMALL) as cluster:
        running, waiting = _ask(cluster, large(cluster)), _ask(cluster, large(cluster))
        await _until_one_waits(cluster)
        small = _ask(cluster, cluster.request(16, 8))
        await asyncio.sleep(1.0)
        assert cluster.admission.waiting_count == 1, "it would take what the other waits for"
        assert cluster.processes["prefill-0"].books()["leases"] == 1, "and no prompt is computed for it"
        assert (await running).ended_at < (await small).ended_at
        assert (await waiting).error is None


@in_virtual_time
async def test_a_caller_that_leaves_while_it_waits_for_room_frees_everything() -> None:
    async with virtual_cluster(1, 1, sim=SMALL) as cluster:
        running, waiting = _ask(cluster, large(cluster)), _ask(cluster, large(cluster))
        await _until_one_waits(cluster)
        waiting.cancel()
        await asyncio.wait((waiting,))
        await asyncio.sleep(0.05)
        assert not any(cluster.processes["prefill-0"].books().values()), "the KV it held is let go"
        assert (cluster.admission.room_waiting_count, cluster.relay.in_flight_count) == (0, 1)
        assert (await running).error is None


@in_virtual_time
async def test_a_deadline_that_passes_while_it_waits_for_room_names_its_phase() -> None:
    async with virtual_cluster(1, 1, sim=SMALL) as cluster:
        running, waiting = _ask(cluster, large(cluster)), _ask(cluster, large(cluster), timeout_s=2.0)
        heard = await waiting
        assert heard.error is not None
        assert (heard.error.reason, heard.error.metadata["phase"]) == (Reason.DEADLINE_EXCEEDED, "handoff_wait")
        assert heard.ended_at == pytest.approx(2.0, abs=0.05)
        await asyncio.sleep(0.05)
        assert not any(cluster.processes["prefill-0"].books().values())
        assert (await running).error is None


@in_virtual_time
async def test_what_waits_for_a_worker_that_dies_goes_on_without_it() -> None:
    async with virtual_cluster(1, 1, sim=SMALL) as cluster:
        callers = [_ask(cluster, large(cluster)), _ask(cluster, large(cluster))]
        await _until_one_waits(cluster)
        cluster.processes["decode-0"].die()
        for heard in await asyncio.gather(*callers):
            assert heard.error is None
            assert heard.report.mode is PlacementMode.LOCAL, "the prefill worker is all that is left"


@in_virtual_time
async def test_what_fits_no_decode_worker_is_said_at_once() -> None:
    async with virtual_cluster(1, 1) as cluster:
        cluster.processes["decode-0"].decode._book = BlockBook(32)
        heard = await cluster.ask(large(cluster))
        assert heard.error is not None
        assert (heard.error.reason, heard.error.metadata["wanted_block_count"]) == (Reason.PROMPT_TOO_LONG, "44")
        assert heard.ended_at < 1.0


@in_virtual_time
async def test_what_fits_one_decode_worker_and_not_another_goes_where_it_fits() -> None:
    async with virtual_cluster(1, 1) as cluster:
        cluster.processes["decode-0"].decode._book = BlockBook(32)
        caller = _ask(cluster, large(cluster))
        await asyncio.sleep(0.05)  # placed on the small one
        await cluster.launch("decode-1", Role.DECODE)
        heard = await caller
        assert heard.error is None
        assert (heard.report.decode_worker_id, heard.report.attempt_count) == ("decode-1", 1)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_while_decodes_wait_for_room_answers_are_exact_and_nothing_is_left(seed: int) -> None:
    """Callers of two priorities on pools that hold two or three of them; some leave, and a decode worker may die."""

    @in_virtual_time
    async def scenario() -> float:
        rng = random.Random(seed)
        async with virtual_cluster(2, 2, sim=SMALL) as cluster:

            async def call() -> None:
                await asyncio.sleep(rng.random() * 3)
                answer_token_count = rng.choice((8, 200, 500))
                request = cluster.request(rng.randint(10, 250), answer_token_count, priority=rng.choice((0, 1)))
                asking = _ask(cluster, request)
                if rng.random() < 0.2:
                    await asyncio.wait((asking,), timeout=rng.random() * 5)
                    asking.cancel()
                await asyncio.wait((asking,))
                if not asking.cancelled():
                    heard = asking.result()
                    assert heard.error is None, heard.error
                    assert heard.tokens == cluster.expected(request)

            callers = [asyncio.create_task(call()) for _ in range(24)]
            if rng.random() < 0.5:
                await asyncio.sleep(1 + rng.random() * 3)
                cluster.processes["decode-0"].die()
                await asyncio.sleep(rng.random() * 3)
                await cluster.launch("decode-0", Role.DECODE)
            await asyncio.gather(*callers)
            await asyncio.sleep(0.5)
            for process in cluster.processes.values():
                assert process.decode.reserved_block_count == 0
                assert len(process.decode._book or ()) == 0
            return _refusals(cluster)

    assert scenario() >= 1

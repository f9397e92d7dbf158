"""Real engines whose transfers go wrong: a sample of the soak's section ``faults-real``, on one pair of engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from patience import WITHIN_S

from baton.errors import BatonError, Reason
from baton.leg import DecodeOrder, Stepped
from baton.request import EngineStop, Sampling
from bench.real_faults import (
    BLOCK,
    HOLDER,
    LEASE_S,
    OPERATIONS,
    READER,
    STUCK_S,
    FaultyCluster,
    faulty_cluster,
    start_that_meets,
)
from bench.tiny_model import make_tiny_model
from engine.protocol import DecodeJob, PrefillJob
from kvtransfer.faults import Fault
from router.answering import RoutedRequest

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

POOL_BLOCK_COUNT = 128
LONG_S = 600.0
"""Longer than any test: what ends within one did not wait for this."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny_model: Path) -> AsyncIterator[FaultyCluster]:
    async with faulty_cluster(tiny_model, block_count=POOL_BLOCK_COUNT) as cluster:
        yield cluster


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


async def held_prompt(cluster: FaultyCluster, block_count: int, number: int) -> tuple[Any, tuple[int, ...]]:
    """Parameters of a pull of this many blocks, and the prompt that goes with it."""
    prompt = tuple(3 + (number * 17 + index * 5) % 500 for index in range(BLOCK * block_count))
    job = PrefillJob(f"p{number}", prompt, stop=EngineStop(8, ignore_eos=True), hold_kv=True, lease_s=LONG_S)
    prefilled = await cluster.processes[HOLDER].engine.prefill(job)
    assert prefilled.held is not None
    return prefilled.held, (*prompt, prefilled.first_token_id)


async def decoded(cluster: FaultyCluster, job: DecodeJob) -> tuple[int, ...]:
    tokens: list[int] = []
    async with aclosing(cluster.processes[READER].engine.decode(job)) as events:
        async for event in events:
            if isinstance(event, Stepped):
                tokens += event.token_ids
    return tuple(tokens)


async def test_answers_are_one_engines_and_nothing_is_left_while_a_quarter_of_all_operations_go_wrong(
    cluster: FaultyCluster,
) -> None:
    questions = await cluster.questions(12, seed=1)
    before = await cluster.fault_counts()
    for worker_id, operations in OPERATIONS.items():
        plan = {"probability": 0.25, "operations": [each.value for each in operations], "seed": 1, "stuck_s": STUCK_S}
        cluster.tell_engine(worker_id, plan, forgets_peers=True)
    tally = await cluster.ask_all(questions * 5, concurrency=8)
    assert tally.wrong == []
    assert tally.outcomes == {"complete": 60}
    assert tally.exact_count == 60
    assert tally.reasons or tally.attempts[2], "no fault was met: the test proves nothing"
    struck = {name for name, count in (await cluster.fault_counts() - before).items() if "." in name and count}
    for operation in ("post", "poll", "notify", "release"):
        assert any(name.startswith(f"{READER} {operation}.") for name in struck), struck
    assert any(name.startswith(f"{HOLDER} notify.") for name in struck), struck
    cluster.end()
    await cluster.at_rest(WITHIN_S)


async def test_nothing_is_computed_into_the_blocks_of_a_read_that_hangs(cluster: FaultyCluster) -> None:
    engine = cluster.processes[READER].engine
    (question,) = [each for each in await cluster.questions(20, seed=2) if len(each.prompt_token_ids) > 200][:1]
    held, prompt = await held_prompt(cluster, 20, number=1)
    plan = {"probability": 1.0, "operations": ["post"], "kinds": ["time_out"], "stuck_s": LONG_S}
    cluster.tell_engine(READER, plan)
    # One read of the hold's record hangs before it, which does no harm: it is not waited for.
    with pytest.raises(BatonError) as caught:
        await decoded(cluster, DecodeJob("hangs", prompt, pull=held.params, stop=EngineStop(4, ignore_eos=True)))
    assert caught.value.reason is Reason.TICKET_REFUSED
    cluster.tell_engine(READER)
    load = await engine.load_now()
    assert load.quarantined_pull_count == 1
    assert load.used_block_count >= 20
    # More than the pool has beside them, at once and again: whoever got one of them would meet it in its answer.
    for _ in range(3):
        jobs = [
            DecodeJob(f"q{number}", question.prompt_token_ids, stop=EngineStop(12, ignore_eos=True))
            for number in range(POOL_BLOCK_COUNT // (len(question.prompt_token_ids) // BLOCK))
        ]
        assert await asyncio.gather(*(decoded(cluster, job) for job in jobs)) == [question.answer] * len(jobs)
        assert (await engine.load_now()).used_block_count >= 20, "given away while a read may still write to it"
    cluster.tell_engine(READER, ends_what_is_stuck=True)
    await until(lambda: _is_empty(engine))
    await cluster.processes[HOLDER].engine.release(held.handle)
    cluster.end()
    await cluster.at_rest(WITHIN_S)


async def test_a_caller_that_leaves_during_a_first_contact_that_hangs_leaves_no_block_behind(
    cluster: FaultyCluster,
) -> None:
    engine = cluster.processes[READER].engine
    held, prompt = await held_prompt(cluster, 8, number=2)
    before = (await cluster.fault_counts())[f"{READER} handshake.time_out"]
    plan = {"probability": 1.0, "operations": ["handshake"], "kinds": ["time_out"], "stuck_s": LONG_S}
    cluster.tell_engine(READER, plan, forgets_peers=True, pull_timeout_s=LONG_S)
    asking = asyncio.create_task(
        decoded(cluster, DecodeJob("left", prompt, pull=held.params, stop=EngineStop(4, ignore_eos=True)))
    )

    async def hangs() -> bool:
        return (await cluster.fault_counts())[f"{READER} handshake.time_out"] > before

    await until(hangs)
    assert (await engine.load_now()).used_block_count >= 8
    asking.cancel()
    await asyncio.wait([asking])
    await until(lambda: _is_empty(engine))
    counts = await cluster.fault_counts()
    assert counts[f"{READER} contacts under way"] == 1, "it waited for the contact's end: nothing is proven"
    cluster.end()
    answers = await cluster.questions(1, seed=3)
    assert (await cluster.ask_all(answers, concurrency=1)).wrong == []
    cluster.tell_engine(READER, ends_what_is_stuck=True)
    await cluster.contacts_over(WITHIN_S)
    cluster.end()
    await cluster.processes[HOLDER].engine.release(held.handle)
    await cluster.at_rest(WITHIN_S)


async def test_a_decode_without_room_waits_at_the_router_with_its_kv_held_and_is_answered_once_there_is_some(
    cluster: FaultyCluster,
) -> None:
    reader, holder = cluster.processes[READER], cluster.processes[HOLDER]
    prompt = tuple(3 + (index * 11) % 500 for index in range(13 * BLOCK - 8))
    answer = await cluster.answer(HOLDER, prompt, 12)
    # Reads that hang keep all but 11 blocks for as long as the test likes, and a leg in hand keeps the worker from
    # taking whatever could ever fit.
    held, long_prompt = await held_prompt(cluster, (POOL_BLOCK_COUNT - 12) // 4, number=3)
    plan = {"probability": 1.0, "operations": ["post"], "kinds": ["time_out"], "stuck_s": LONG_S}
    cluster.tell_engine(READER, plan)
    jobs = [
        DecodeJob(f"hangs{number}", long_prompt, pull=held.params, stop=EngineStop(4, ignore_eos=True))
        for number in range(4)
    ]
    hung = await asyncio.gather(*(decoded(cluster, job) for job in jobs), return_exceptions=True)
    assert all(isinstance(each, BatonError) for each in hung), hung
    # Neither a pull nor a hold ends because the machine is slow.
    cluster.tell_engine(READER, pull_timeout_s=LONG_S)
    cluster.hold_for(LONG_S)
    await holder.engine.release(held.handle)

    async def occupy(started: asyncio.Event) -> None:
        order = DecodeOrder("occupier", prompt[:BLOCK], Sampling(), EngineStop(900, ignore_eos=True))
        async with aclosing(reader.decode.decode(order)) as events:
            async for _ in events:
                started.set()

    started = asyncio.Event()
    occupying = asyncio.create_task(occupy(started))
    await asyncio.wait_for(started.wait(), WITHIN_S)
    request = RoutedRequest("roomless", prompt, len(answer), eos_token_ids=(2,), ignore_eos=True)
    asking = asyncio.create_task(cluster.ask(request, timeout_s=LONG_S))

    async def waits_for_room() -> bool:
        return cluster.admission.room_waiting_count == 1

    await until(waits_for_room)
    assert (await holder.board.audited()).held_lease_count == 1
    assert (await reader.engine.load_now()).waiting_count == 0, "it waits in the engine, where it heads the line"
    cluster.tell_engine(READER, ends_what_is_stuck=True, pull_timeout_s=LONG_S)
    heard = await asking
    assert tuple(heard.tokens) == answer
    assert heard.report is not None
    assert (heard.report.attempt_count, heard.report.transfer.pull_count) == (1, 1)
    assert heard.report.recomputed_token_count == 0
    occupying.cancel()
    await asyncio.wait([occupying])
    cluster.hold_for(LEASE_S)
    cluster.end()
    await cluster.at_rest(WITHIN_S)


async def _is_empty(engine: Any) -> bool:
    load = await engine.load_now()
    return bool(load.used_block_count == 0 and load.quarantined_pull_count == 0)


async def test_an_engine_whose_memory_the_library_does_not_take_does_not_start_and_says_so(tiny_model: Path) -> None:
    said = await start_that_meets(tiny_model, Fault.FAIL, number=2)
    assert said.startswith(Reason.ENGINE_FAILED.value)
    assert "the engine did not start" in said

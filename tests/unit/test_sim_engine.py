"""The simulated engine in virtual time: exact output, exact books, and the errors of the protocol."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from baton.leg import DecodeDone, DecodeEvent, KvAdopted, Stepped
from baton.request import EngineStop, LegFinish
from baton.testing import in_virtual_time, run_virtual
from engine.config import EngineConfig
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.protocol import DecodeJob, Engine, EngineLoad, HeldKv, Prefilled, PrefillJob
from engine.sim import PhaseDelays, SimConfig, SimEngine, SimNetwork, TokenRule, simulated_answer
from engine.sim_pace import Machine, Pace
from kvtransfer.simulated import Link, simulated_params

# Figures a reader can add up: a prompt token 1 ms, a decode step 10 ms, one block (16 tokens x 100 bytes) 16 ms.
COST = CostModel(PrefillCost(0.0, 0.001, 0.0), DecodeCost(0.010, 0.0, 0.0), kv_bytes_per_token=100)
LINK = Link(latency_s=0.002, bytes_per_s=100_000)
CONFIG = SimConfig(
    engine_id="p",
    block_token_count=16,
    block_count=64,
    max_context_token_count=512,
    max_running_count=4,
    max_batched_token_count=64,
    cost=COST,
)


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    return tuple((seed * 7919 + index * 31) % 40_000 for index in range(length))


def now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def engines(*ids: str, network: SimNetwork | None = None, **changes: Any) -> AsyncIterator[list[SimEngine]]:
    """Started engines in one network. At the end nothing may be used, held, waiting or running."""
    shared = network or SimNetwork(LINK)
    made = [SimEngine(replace(CONFIG, engine_id=each, **changes), shared) for each in ids]
    for engine in made:
        await engine.start()
    try:
        yield made
        for engine in made:
            assert engine.load() == EngineLoad(0, 0, 0, engine.config.block_count), engine
            assert engine.held_count == 0
            engine.pool.check()
    finally:
        for engine in made:
            await engine.close()


async def collect(stream: AsyncGenerator[DecodeEvent, None]) -> tuple[KvAdopted, list[int], LegFinish]:
    """Reads a decode to its end and checks the grammar ``KvAdopted Stepped* DecodeDone``."""
    async with aclosing(stream) as events:
        adopted = await anext(events)
        assert isinstance(adopted, KvAdopted)
        tokens: list[int] = []
        async for event in events:
            match event:
                case Stepped(token_ids):
                    assert token_ids
                    tokens += token_ids
                case DecodeDone(finish):
                    assert [event async for event in events] == []
                    return adopted, tokens, finish
                case _:
                    pytest.fail(f"{event} within the stream")
    pytest.fail("no DecodeDone")


def prefill_job(prompt: tuple[int, ...], **changes: Any) -> PrefillJob:
    return replace(PrefillJob("leg", prompt, stop=EngineStop(max_token_count=20)), **changes)


def decode_job(prompt: tuple[int, ...], count: int, **changes: Any) -> DecodeJob:
    return replace(DecodeJob("leg", prompt, stop=EngineStop(max_token_count=count)), **changes)


async def hold(engine: Engine, prompt: tuple[int, ...], **changes: Any) -> tuple[Prefilled, HeldKv]:
    prefilled = await engine.prefill(prefill_job(prompt, **changes))
    assert prefilled.held is not None
    return prefilled, prefilled.held


async def hand_over(source: SimEngine, target: SimEngine, prompt: tuple[int, ...], count: int) -> list[int]:
    """The whole path: prefill, pull, decode. Returns all ``count`` tokens."""
    prefilled, held = await hold(source, prompt)
    job = decode_job((*prompt, prefilled.first_token_id), count - 1, pull=held.params)
    _, tokens, _ = await collect(target.decode(job))
    return [prefilled.first_token_id, *tokens]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 200])
@in_virtual_time
async def test_a_handed_over_answer_equals_the_uninterrupted_one(length: int) -> None:
    prompt = prompt_of(length)
    expected = list(simulated_answer(prompt, 40))
    async with engines("p", "d", "local") as (source, target, local):
        assert await hand_over(source, target, prompt, 40) == expected
        _, tokens, finish = await collect(local.decode(decode_job(prompt, 40)))
        assert tokens == expected
        assert finish is LegFinish.LENGTH


@in_virtual_time
async def test_a_continuation_of_prompt_and_answer_goes_on_as_if_never_cut() -> None:
    prompt = prompt_of(50)
    expected = simulated_answer(prompt, 30)
    async with engines("p", "d") as (source, target):
        rest = await hand_over(source, target, (*prompt, *expected[:13]), 17)
        assert (*expected[:13], *rest) == expected


@in_virtual_time
async def test_every_concurrent_answer_is_its_own() -> None:
    prompts = [prompt_of(10 + 7 * index, seed=index) for index in range(20)]
    async with engines("p", "d") as (source, target):
        answers = await asyncio.gather(*(hand_over(source, target, prompt, 12) for prompt in prompts))
        assert answers == [list(simulated_answer(prompt, 12)) for prompt in prompts]


@in_virtual_time
async def test_pulling_the_kv_of_another_prompt_shows_in_the_output() -> None:
    mine, other = prompt_of(40, seed=1), prompt_of(40, seed=2)
    async with engines("p", "d") as (source, target):
        _, held = await hold(source, other)
        job = decode_job((*mine, simulated_answer(mine, 1)[0]), 5, pull=held.params)
        _, tokens, _ = await collect(target.decode(job))
        assert tokens != list(simulated_answer(mine, 6))[1:]


@in_virtual_time
async def test_the_times_of_a_handover_are_those_of_the_clock() -> None:
    prompt = prompt_of(40)
    async with engines("p", "d") as (source, target):
        prefilled, held = await hold(source, prompt)
        assert prefilled.queue_s == 0.0
        assert prefilled.compute_s == pytest.approx(0.040)
        assert held.kv_bytes == 3 * 1600
        pulling = collect(target.decode(decode_job((*prompt, prefilled.first_token_id), 4, pull=held.params)))
        adopted, tokens, _ = await pulling
        assert adopted.wait_s == 0.0
        assert adopted.transfer_s == pytest.approx(0.002 + 3 * 0.016)
        assert (adopted.transfer_bytes, adopted.descriptor_count) == (4800, 3)
        assert adopted.decode_wait_s == pytest.approx(0.0)
        assert now() == pytest.approx(0.040 + 0.050 + len(tokens) * 0.010)


@in_virtual_time
async def test_injected_delays_land_in_their_phases() -> None:
    prompt = prompt_of(32)
    delays = PhaseDelays(queue=1, prefill=2, transfer=3, decode_wait=4, decode=5)
    async with engines("p", "d", extra_delay_s=delays) as (source, target):
        prefilled, held = await hold(source, prompt)
        assert prefilled.queue_s == pytest.approx(1)
        assert prefilled.compute_s == pytest.approx(2.032)
        started = now()
        job = decode_job((*prompt, prefilled.first_token_id), 2, pull=held.params)
        adopted, _, _ = await collect(target.decode(job))
        assert adopted.wait_s == pytest.approx(1)
        assert adopted.transfer_s == pytest.approx(3.034)
        assert adopted.decode_wait_s == pytest.approx(4)
        assert now() - started == pytest.approx(1 + 3.034 + 4 + 2 * 5.010)


@in_virtual_time
async def test_a_long_prompt_is_computed_in_chunks_beside_decoding_streams() -> None:
    async with engines("e", enable_prefix_caching=False) as (engine,):
        arrivals: list[float] = []

        async def stream() -> None:
            async with aclosing(engine.decode(decode_job(prompt_of(1), 30))) as events:
                async for event in events:
                    if isinstance(event, Stepped):
                        arrivals.append(now())

        async with asyncio.TaskGroup() as group:
            group.create_task(stream())
            await asyncio.sleep(0.045)
            prefilled = await engine.prefill(prefill_job(prompt_of(200), hold_kv=False))
        gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
        # 200 tokens at 63 a step beside one decode: three full chunks and a rest of 11.
        assert [round(gap, 3) for gap in gaps if gap > 0.011] == [0.073, 0.073, 0.073, 0.021]
        assert prefilled.compute_s == pytest.approx(3 * 0.073 + 0.021)
        assert prefilled.queue_s == pytest.approx(0.005), "it waits for the step in progress"


@in_virtual_time
async def test_streams_share_steps_up_to_the_running_limit_and_the_rest_waits() -> None:
    async with engines("e") as (engine,):
        jobs = [decode_job(prompt_of(1, seed=index), 10) for index in range(6)]
        running = asyncio.gather(*(collect(engine.decode(job)) for job in jobs))
        await asyncio.sleep(0.055)
        assert (engine.load().running_count, engine.load().waiting_count) == (4, 2)
        results = await running
        assert now() == pytest.approx(0.200), "two rounds of ten steps"
        assert sorted(round(adopted.wait_s, 3) for adopted, _, _ in results) == [0, 0, 0, 0, 0.1, 0.1]


@in_virtual_time
async def test_larger_priority_is_served_first_and_equals_in_order() -> None:
    async with engines("e", max_running_count=1) as (engine,):
        finished: list[str] = []

        async def run(name: str, priority: int) -> None:
            await engine.prefill(prefill_job(prompt_of(40, seed=len(name)), priority=priority, hold_kv=False))
            finished.append(name)

        async with asyncio.TaskGroup() as group:
            for name, priority in [("a", 0), ("bb", 0), ("ccc", 5), ("dddd", -1), ("eeeee", 5)]:
                group.create_task(run(name, priority))
        assert finished == ["ccc", "eeeee", "a", "bb", "dddd"]


@in_virtual_time
async def test_a_request_waits_for_blocks_and_never_evicts_held_ones() -> None:
    async with engines("e", block_count=32) as (engine,):
        _, held = await hold(engine, prompt_of(400, seed=1))
        waiting = asyncio.create_task(hold(engine, prompt_of(400, seed=2)))
        await asyncio.sleep(5)
        assert not waiting.done()
        assert await engine.load_now() == EngineLoad(0, 1, 25, 32)
        await engine.release(held.handle)
        prefilled, second = await waiting
        assert prefilled.queue_s == pytest.approx(now() - 0.4 - prefilled.compute_s)
        await engine.release(second.handle)


@in_virtual_time
async def test_blocks_of_a_cancelled_pull_go_to_the_one_that_waits_for_them() -> None:
    async with engines("d", block_count=32, extra_delay_s=PhaseDelays(transfer=100)) as (target,):
        elsewhere = {"kind": "simulated", "engine_id": "x", "handle": "x/1", "token_count": 400, "kv_bytes": 0}
        pulling = asyncio.create_task(collect(target.decode(decode_job(prompt_of(401), 2, pull=elsewhere))))
        await asyncio.sleep(1)
        waiting = asyncio.create_task(collect(target.decode(decode_job(prompt_of(300), 2))))
        await asyncio.sleep(1)
        assert target.load().waiting_count == 2
        pulling.cancel()
        adopted, _, _ = await waiting
        assert adopted.wait_s == pytest.approx(1)


@in_virtual_time
async def test_pulled_sequences_wait_for_a_slot_and_that_time_is_decode_wait() -> None:
    prompts = [prompt_of(16, seed=index) for index in range(6)]
    async with engines("p", "d") as (source, target):
        jobs = []
        for prompt in prompts:
            prefilled, held = await hold(source, prompt)
            jobs.append(decode_job((*prompt, prefilled.first_token_id), 10, pull=held.params))
        decoding = asyncio.gather(*(collect(target.decode(job)) for job in jobs))
        await asyncio.sleep(0.05)
        assert (target.load().running_count, target.load().waiting_count) == (4, 2)
        waits = [adopted.decode_wait_s for adopted, _, _ in await decoding]
        assert [round(wait, 3) for wait in waits] == [0, 0, 0, 0, 0.1, 0.1]


@in_virtual_time
async def test_a_shared_prefix_is_found_computed_once_and_pulled_once() -> None:
    shared = prompt_of(64)
    first, second = (*shared, 1, 2, 3), (*shared, 4, 5, 6)
    async with engines("p", "d") as (source, target):
        assert await hand_over(source, target, first, 5) == list(simulated_answer(first, 5))
        prefilled, held = await hold(source, second)
        assert prefilled.cached_token_count == 64
        assert prefilled.compute_s == pytest.approx(0.003)
        adopted, tokens, _ = await collect(
            target.decode(decode_job((*second, prefilled.first_token_id), 4, pull=held.params))
        )
        assert (adopted.cached_token_count, adopted.descriptor_count) == (64, 1)
        assert [prefilled.first_token_id, *tokens] == list(simulated_answer(second, 5))


@in_virtual_time
async def test_the_answer_of_a_turn_is_cached_for_the_next() -> None:
    prompt = prompt_of(20)
    async with engines("e") as (engine,):
        _, answer, _ = await collect(engine.decode(decode_job(prompt, 60)))
        adopted, _, _ = await collect(engine.decode(decode_job((*prompt, *answer, 9, 9), 2)))
        assert adopted.cached_token_count == 64, "79 computed tokens are four full blocks"


@in_virtual_time
async def test_kv_that_is_all_in_cache_is_not_moved_and_the_source_is_told() -> None:
    prompt = prompt_of(32)
    async with engines("p", "d") as (source, target):
        await hand_over(source, target, prompt, 3)
        prefilled, held = await hold(source, prompt)
        adopted, _, _ = await collect(
            target.decode(decode_job((*prompt, prefilled.first_token_id), 2, pull=held.params))
        )
        assert (adopted.transfer_bytes, adopted.transfer_s, adopted.cached_token_count) == (0, 0.0, 32)
        assert source.held_count == 0


@in_virtual_time
async def test_release_is_idempotent_and_ignores_strangers() -> None:
    async with engines("e") as (engine,):
        _, held = await hold(engine, prompt_of(40))
        assert engine.load().used_block_count == 3
        for handle in (held.handle, held.handle, "e/999999", ""):
            await engine.release(handle)
        assert engine.load().used_block_count == 0


@in_virtual_time
async def test_the_backstop_frees_what_nobody_released() -> None:
    async with engines("e", backstop_extra_s=5) as (engine,):
        await hold(engine, prompt_of(40), lease_s=10)
        await asyncio.sleep(14)
        assert engine.held_count == 1
        await asyncio.sleep(2)
        assert engine.held_count == 0


async def lose_by_release(source: SimEngine, held: HeldKv) -> None:
    await source.release(held.handle)


async def lose_by_death(source: SimEngine, held: HeldKv) -> None:
    source.kill()


async def lose_by_close(source: SimEngine, held: HeldKv) -> None:
    await source.close()


async def lose_by_cut(source: SimEngine, held: HeldKv) -> None:
    source.network.cut_off("p")


Loss = Callable[[SimEngine, HeldKv], Awaitable[None]]


@pytest.mark.parametrize("lose", [lose_by_release, lose_by_death, lose_by_close, lose_by_cut])
@pytest.mark.parametrize("is_during_the_pull", [False, True])
def test_lost_kv_is_recomputed_reported_and_the_answer_is_the_same(lose: Loss, is_during_the_pull: bool) -> None:
    prompt = prompt_of(40)

    async def scenario() -> None:
        async with engines("p", "d") as (source, target):
            prefilled, held = await hold(source, prompt)
            job = decode_job((*prompt, prefilled.first_token_id), 9, pull=held.params)
            if not is_during_the_pull:
                await lose(source, held)
            decoding = asyncio.create_task(collect(target.decode(job)))
            if is_during_the_pull:
                await asyncio.sleep(0.025)
                await lose(source, held)
            adopted, tokens, _ = await decoding
            assert adopted.recomputed_token_count == 40
            assert adopted.transfer_s == pytest.approx(0.050 if is_during_the_pull else 0.002)
            assert adopted.decode_wait_s == pytest.approx(0.041)
            assert (adopted.transfer_bytes, adopted.descriptor_count) == (0, 0)
            assert [prefilled.first_token_id, *tokens] == list(simulated_answer(prompt, 10))
            source.network.reconnect("p")
            if source.held_count:
                await source.release(held.handle)

    run_virtual(scenario())


@in_virtual_time
async def test_a_source_in_another_process_costs_link_time_and_keeps_its_kv_for_the_ledger() -> None:
    prompt = prompt_of(40)
    async with engines("p") as (source,), engines("d", network=SimNetwork(LINK)) as (target,):
        prefilled, held = await hold(source, prompt)
        job = decode_job((*prompt, prefilled.first_token_id), 9, pull=held.params)
        adopted, tokens, _ = await collect(target.decode(job))
        assert adopted.recomputed_token_count == 0
        assert adopted.transfer_s == pytest.approx(0.050)
        assert [prefilled.first_token_id, *tokens] == list(simulated_answer(prompt, 10))
        assert source.held_count == 1
        await source.release(held.handle)


@in_virtual_time
async def test_a_network_of_one_process_takes_an_unknown_source_for_lost() -> None:
    prompt = prompt_of(40)
    alone = SimNetwork(LINK, spans_processes=False)
    async with engines("p") as (source,), engines("d", network=alone) as (target,):
        prefilled, held = await hold(source, prompt)
        job = decode_job((*prompt, prefilled.first_token_id), 3, pull=held.params)
        adopted, _, _ = await collect(target.decode(job))
        assert adopted.recomputed_token_count == 40
        await source.release(held.handle)


@in_virtual_time
async def test_stop_tokens_and_the_end_of_sequence_end_both_legs_unless_ignored() -> None:
    prompt = prompt_of(20)
    answer = simulated_answer(prompt, 10)
    rule = TokenRule(eos_when=lambda position: position == 24)
    async with engines("p", "d", tokens=rule) as (source, target):
        stop = EngineStop(10, stop_token_ids=(answer[0],))
        first = await source.prefill(prefill_job(prompt, stop=stop))
        assert (first.finish, first.held, first.first_token_id) == (LegFinish.STOP, None, answer[0])
        only = await source.prefill(prefill_job(prompt, stop=EngineStop(1)))
        assert (only.finish, only.held) == (LegFinish.LENGTH, None)
        _, tokens, finish = await collect(
            target.decode(decode_job(prompt, 10, stop=EngineStop(10, stop_token_ids=(answer[2],))))
        )
        assert (tokens, finish) == (list(answer[:3]), LegFinish.STOP)
        _, tokens, finish = await collect(target.decode(decode_job(prompt, 10)))
        assert (tokens, finish) == ([*answer[:4], 2], LegFinish.STOP)
        ignoring = EngineStop(10, ignore_eos=True)
        _, tokens, finish = await collect(target.decode(decode_job(prompt, 10, stop=ignoring)))
        assert (tokens, finish) == (list(simulated_answer(prompt, 10, rule, ignore_eos=True)), LegFinish.LENGTH)


@in_virtual_time
async def test_a_full_context_ends_the_answer() -> None:
    async with engines("e") as (engine,):
        _, tokens, finish = await collect(engine.decode(decode_job(prompt_of(500), 100)))
        assert (len(tokens), finish) == (12, LegFinish.LENGTH)
        assert tuple(tokens) == simulated_answer(prompt_of(500), 100, max_context_token_count=512)


@in_virtual_time
async def test_a_slow_consumer_gets_several_steps_at_once_and_does_not_slow_the_engine() -> None:
    async with engines("e") as (engine,), aclosing(engine.decode(decode_job(prompt_of(5), 50))) as events:
        await anext(events)
        await asyncio.sleep(60)
        assert engine.load().used_block_count == 0, "finished: nothing waits for the consumer"
        assert await anext(events) == Stepped(simulated_answer(prompt_of(5), 50))
        assert await anext(events) == DecodeDone(LegFinish.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "stop", "reason"),
    [
        ((), EngineStop(5), Reason.INVALID_REQUEST),
        ((-1,), EngineStop(5), Reason.INVALID_REQUEST),
        ((49_152,), EngineStop(5), Reason.INVALID_REQUEST),
        ((1,), EngineStop(0), Reason.INVALID_REQUEST),
        (prompt_of(512), EngineStop(5), Reason.PROMPT_TOO_LONG),
    ],
)
@in_virtual_time
async def test_bad_input_is_refused_before_it_costs_anything(
    prompt: tuple[int, ...], stop: EngineStop, reason: Reason
) -> None:
    async with engines("e") as (engine,):
        with pytest.raises(BatonError) as of_prefill:
            await engine.prefill(prefill_job(prompt, stop=stop))
        with pytest.raises(BatonError) as of_decode:
            await collect(engine.decode(decode_job(prompt, 1, stop=stop)))
        assert of_prefill.value.reason is of_decode.value.reason is reason
        assert now() == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "nixl"},
        {"engine_id": ""},
        {"handle": 5},
        {"token_count": 0},
        {"token_count": True},
        {"token_count": 41},
        {"kv_bytes": -1},
        {"more": 1},
    ],
)
@in_virtual_time
async def test_malformed_transfer_params_are_refused(change: dict[str, Any]) -> None:
    good = {"kind": "simulated", "engine_id": "p", "handle": "p/1", "token_count": 40, "kv_bytes": 4800}
    assert simulated_params(good).to_engine() == good
    async with engines("d") as (engine,):
        with pytest.raises(BatonError) as refused:
            await collect(engine.decode(decode_job(prompt_of(41), 3, pull={**good, **change})))
        assert refused.value.reason is Reason.TICKET_REFUSED


@in_virtual_time
async def test_a_full_queue_refuses() -> None:
    async with engines("e", max_waiting_count=2, max_running_count=1) as (engine,):
        first = asyncio.create_task(collect(engine.decode(decode_job(prompt_of(3), 5))))
        await asyncio.sleep(0.001)
        calls = [collect(engine.decode(decode_job(prompt_of(3), 5))) for _ in range(4)]
        results = await asyncio.gather(first, *calls, return_exceptions=True)
        refused = [each for each in results if isinstance(each, BatonError)]
        assert [each.reason for each in refused] == [Reason.QUEUE_FULL, Reason.QUEUE_FULL]


def test_a_config_that_cannot_work_is_refused_by_key() -> None:
    for change, key in [
        ({"engine_id": "a b"}, "engine_id"),
        ({"block_count": 2}, "block_count"),
        ({"max_batched_token_count": 1}, "max_batched_token_count"),
        ({"max_running_count": 0}, "max_running_count"),
    ]:
        with pytest.raises(ValueError, match=key):
            replace(CONFIG, **change)  # type: ignore[arg-type]


def test_the_twin_of_an_engine_config_has_its_limits_and_takes_overrides_by_name() -> None:
    engine = EngineConfig(kind="simulated", model_name="m", kv_cache_bytes=128 * 23_040 * 100)
    twin = SimConfig.from_engine_config(
        engine,
        engine_id="w-1",
        overrides={
            "max_waiting_count": 7,
            "tokens": {"eos_probability": 0.5},
            "extra_delay_s": {"prefill": 2.0},
            "cost": {"decode": {"base_s": 0.5}, "kv_bytes_per_token": 23_040},
        },
    )
    assert (twin.model_name, twin.block_count, twin.max_running_count) == ("m", 100, engine.max_running_count)
    assert (twin.max_waiting_count, twin.tokens.eos_probability, twin.extra_delay_s.prefill) == (7, 0.5, 2.0)
    assert twin.cost.decode.base_s == 0.5
    with pytest.raises(ValueError, match=r"cost\.decode\.speed"):
        SimConfig.from_engine_config(engine, engine_id="w", overrides={"cost": {"decode": {"speed": 1}}})


def test_the_default_costs_are_those_measured() -> None:
    from engine.cost import Chunk

    cost = CostModel()
    assert 650 <= 512 / cost.step_s([Chunk(512)], []) <= 690
    assert 440 <= 2000 / cost.step_s([Chunk(2000)], []) <= 490
    assert 260 <= 16 / cost.step_s([], [512] * 16) <= 290
    for batch in (1, 4):
        assert 0.028 <= cost.step_s([], [512] * batch) <= 0.036
    whole = cost.prefill.work_s([Chunk(1000)])
    assert cost.prefill.work_s([Chunk(300), Chunk(700, 300)]) == pytest.approx(whole)
    assert CostModel().step_s([], []) == 0.0


def test_a_model_that_ends_by_chance_ends_about_that_often_and_always_at_the_same_place() -> None:
    rule = TokenRule(eos_probability=0.1)
    lengths = [len(simulated_answer(prompt_of(9, seed=each), 1000, rule)) for each in range(300)]
    assert lengths == [len(simulated_answer(prompt_of(9, seed=each), 1000, rule)) for each in range(300)]
    assert 8 < sum(lengths) / len(lengths) < 12
    assert 2 not in simulated_answer(prompt_of(9), 20_000)


async def token_times(engine: SimEngine, prompt: tuple[int, ...], count: int) -> list[float]:
    times: list[float] = []
    async with aclosing(engine.decode(decode_job(prompt, count))) as events:
        async for event in events:
            if isinstance(event, Stepped):
                times += [now()] * len(event.token_ids)
    return times


@pytest.mark.parametrize("leg_count", [1, 3, 4])
@in_virtual_time
async def test_micro_batches_take_turns_so_that_each_leg_has_a_token_every_so_many_steps(leg_count: int) -> None:
    async with engines("d", micro_batch_count=4) as (engine,):
        legs = [token_times(engine, prompt_of(1, seed), 6) for seed in range(leg_count)]
        of_legs = await asyncio.gather(*legs)
        for times in of_legs:
            assert len(times) == 6
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            assert gaps == pytest.approx([0.040] * 5), "also where the turns of others are empty"
        moments = [{round(at, 4) for at in times} for times in of_legs]
        assert len(set.union(*moments)) == 6 * leg_count, "no two legs have a token at one moment"


@in_virtual_time
async def test_micro_batches_say_what_one_batch_says() -> None:
    prompt = prompt_of(50)
    async with engines("p", "d", micro_batch_count=3) as (source, target):
        assert await hand_over(source, target, prompt, 30) == list(simulated_answer(prompt, 30))


def test_micro_batches_and_a_pace_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="micro_batch_count: is 2; with a pace it must be 1"):
        SimEngine(replace(CONFIG, micro_batch_count=2), SimNetwork(LINK), Pace(machine=Machine()))
    with pytest.raises(ValueError, match="micro_batch_count: is 0; it must be at least 1"):
        replace(CONFIG, micro_batch_count=0)

"""However a request ends in the simulated engine - cancelled, closed, killed, hung - its blocks come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from baton.leg import KvAdopted, Stepped
from baton.request import EngineStop
from baton.testing import in_virtual_time, run_virtual
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.protocol import DecodeJob, EngineLoad, PrefillJob
from engine.sim import PhaseDelays, SimConfig, SimEngine, SimNetwork, simulated_answer
from kvtransfer.simulated import Link

PROMPT = tuple(range(100, 150))
STOP = EngineStop(max_token_count=8)
DELAYS = PhaseDelays(queue=0.01, prefill=0.01, transfer=0.01, decode_wait=0.01, decode=0.01)


async def started(network: SimNetwork, *ids: str) -> list[SimEngine]:
    made = []
    for each in ids:
        config = SimConfig(
            engine_id=each,
            block_token_count=16,
            block_count=32,
            max_context_token_count=256,
            max_running_count=2,
            max_batched_token_count=20,
            cost=CostModel(PrefillCost(0.0, 0.001, 0.0), DecodeCost(0.010, 0.0, 0.0), 100),
            extra_delay_s=DELAYS,
        )
        engine = SimEngine(config, network)
        await engine.start()
        made.append(engine)
    return made


async def request(source: SimEngine, target: SimEngine) -> list[int]:
    """One whole request, that releases what it holds, as the relay and the ledger do between them."""
    prefilled = await source.prefill(PrefillJob("leg", PROMPT, stop=STOP))
    assert prefilled.held is not None
    try:
        stop = EngineStop(STOP.max_token_count - 1)
        job = DecodeJob("leg", (*PROMPT, prefilled.first_token_id), stop=stop, pull=prefilled.held.params)
        tokens = [prefilled.first_token_id]
        async with aclosing(target.decode(job)) as events:
            async for event in events:
                if isinstance(event, Stepped):
                    tokens += event.token_ids
        return tokens
    finally:
        await asyncio.shield(source.release(prefilled.held.handle))


async def local(source: SimEngine, target: SimEngine) -> list[int]:
    tokens: list[int] = []
    async with aclosing(target.decode(DecodeJob("leg", PROMPT, stop=STOP))) as events:
        async for event in events:
            if isinstance(event, Stepped):
                tokens += event.token_ids
    return tokens


Request = Callable[[SimEngine, SimEngine], Awaitable[list[int]]]


@asynccontextmanager
async def setting(is_contended: bool) -> AsyncIterator[tuple[SimEngine, SimEngine]]:
    """Two engines, each with a request of its own beside ours or not. At the end both still work and hold nothing."""
    source, target = await started(SimNetwork(Link(0.002, 1e6)), "p", "d")
    others = [asyncio.ensure_future(local(each, each)) for each in (source, target) if is_contended]
    yield source, target
    after = [asyncio.ensure_future(local(each, each)) for each in (source, target)]
    expected = list(simulated_answer(PROMPT, 8))
    assert await asyncio.gather(*others, *after) == [expected] * (len(others) + 2)
    for engine in (source, target):
        assert engine.load() == EngineLoad(0, 0, 0, 32), engine
        assert engine.held_count == 0
        engine.pool.check()
        await engine.close()


async def moments_of(run: Request, is_contended: bool) -> list[float]:
    """Every half millisecond of the life of a request that is left alone."""
    async with setting(is_contended) as (source, target):
        task = asyncio.ensure_future(run(source, target))
        moments = [0.0]
        while not task.done():
            await asyncio.sleep(0.0005)
            moments.append(asyncio.get_running_loop().time())
        assert task.result() == list(simulated_answer(PROMPT, 8))
    return moments


@pytest.mark.parametrize("run", [request, local])
@pytest.mark.parametrize("is_contended", [False, True])
def test_cancelling_at_any_moment_gives_every_block_back(run: Request, is_contended: bool) -> None:
    async def cancelled_at(moment: float, turn_count: int) -> None:
        async with setting(is_contended) as (source, target):
            before = [engine.load().used_block_count for engine in (source, target)]
            task = asyncio.ensure_future(run(source, target))
            await asyncio.sleep(moment)
            for _ in range(turn_count):  # within one instant, each callback is a moment of its own
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not is_contended:
                if target.quarantined_count:
                    await asyncio.sleep(0.2)  # blocks that a read under way may still write to come back with its end
                assert [engine.load().used_block_count for engine in (source, target)] == before == [0, 0]

    moments = run_virtual(moments_of(run, is_contended))
    assert len(moments) > 200
    for moment in moments[::2]:
        for turn_count in (0, 1, 2, 3):
            run_virtual(cancelled_at(moment, turn_count))


@in_virtual_time
async def test_closing_a_decode_between_events_frees_and_stops_it() -> None:
    source, target = await started(SimNetwork(), "p", "d")
    events = target.decode(DecodeJob("leg", PROMPT, stop=EngineStop(100)))
    assert isinstance(await anext(events), KvAdopted)
    assert isinstance(await anext(events), Stepped)
    assert target.load().running_count == 1
    await events.aclose()
    assert target.load() == EngineLoad(0, 0, 0, 32)
    await source.close()
    await target.close()


async def failure_of(call: Awaitable[Any]) -> Reason:
    with pytest.raises(BatonError) as failed:
        await call
    return failed.value.reason


@in_virtual_time
async def test_a_killed_engine_fails_every_call_in_progress_and_to_come() -> None:
    source, target = await started(SimNetwork(), "p", "d")
    held = (await target.prefill(PrefillJob("leg", PROMPT, stop=STOP))).held
    assert held is not None
    running = [asyncio.ensure_future(local(target, target)) for _ in range(5)]
    running.append(asyncio.ensure_future(request(source, target)))
    await asyncio.sleep(0.15)
    assert target.load().running_count == 2
    target.kill()
    assert [await failure_of(task) for task in running] == [Reason.ENGINE_FAILED] * 6
    calls: list[Awaitable[Any]] = [
        target.prefill(PrefillJob("leg", PROMPT)),
        local(target, target),
        target.release(held.handle),
        target.load_now(),
        target.check_health(),
    ]
    assert [await failure_of(call) for call in calls] == [Reason.ENGINE_FAILED] * 5
    assert target.load() == EngineLoad(0, 0, 0, 32)
    assert target.held_content(held.handle) is None
    assert source.load() == EngineLoad(0, 0, 0, 32)
    await source.close()
    await target.close()


@pytest.mark.parametrize("moment", [0.005, 0.03, 0.08, 0.095, 0.105, 0.115, 0.14])
@in_virtual_time
async def test_death_ends_a_wait_at_once_in_whatever_phase(moment: float) -> None:
    source, target = await started(SimNetwork(Link(0.002, 1e6)), "p", "d")
    loop = asyncio.get_running_loop()
    for engine in (source, target):
        engine.extra_delay_s = PhaseDelays(queue=0.02, prefill=0.02, transfer=0.02, decode_wait=0.02)
    task = asyncio.ensure_future(request(source, target))
    await asyncio.sleep(moment)
    assert not task.done()
    source.kill()
    target.kill()
    assert await failure_of(task) is Reason.ENGINE_FAILED
    assert loop.time() == moment
    await source.close()
    await target.close()


@in_virtual_time
async def test_a_hung_engine_makes_no_progress_until_resumed_and_can_be_closed() -> None:
    source, target = await started(SimNetwork(), "p", "d")
    whole = asyncio.ensure_future(request(source, target))
    await asyncio.sleep(0.05)
    source.hang()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(100):
            await source.load_now()
    await source.check_health()
    assert not whole.done()
    source.resume()
    assert await whole == list(simulated_answer(PROMPT, 8))
    target.hang()
    stuck = asyncio.ensure_future(local(target, target))
    await asyncio.sleep(100)
    await target.close()
    await target.close()
    assert await failure_of(stuck) is Reason.ENGINE_FAILED
    await source.close()


@in_virtual_time
async def test_a_replaced_engine_does_not_answer_for_its_predecessor() -> None:
    network = SimNetwork()
    source, target = await started(network, "p", "d")
    prefilled = await source.prefill(PrefillJob("leg", PROMPT, stop=STOP))
    assert prefilled.held is not None
    await source.close()
    (successor,) = await started(network, "p")
    other = await successor.prefill(PrefillJob("leg", PROMPT[::-1], stop=STOP))
    assert other.held is not None
    job = DecodeJob("leg", (*PROMPT, prefilled.first_token_id), stop=EngineStop(7), pull=prefilled.held.params)
    async with aclosing(target.decode(job)) as events:
        adopted = await anext(events)
        assert isinstance(adopted, KvAdopted)
        assert adopted.recomputed_token_count == len(PROMPT)
    assert successor.held_count == 1
    await successor.close()
    await target.close()


@in_virtual_time
async def test_two_live_engines_cannot_share_an_id_and_none_starts_twice() -> None:
    network = SimNetwork()
    (engine,) = await started(network, "p")
    with pytest.raises(ValueError, match="taken"):
        await started(network, "p")
    with pytest.raises(RuntimeError, match="once"):
        await engine.start()
    await engine.close()


@in_virtual_time
async def test_a_bug_inside_the_engine_fails_its_requests_and_shows_on_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (engine,) = await started(SimNetwork(), "p")
    monkeypatch.setattr(engine.scheduler, "apply", lambda *_: 1 / 0)
    assert await failure_of(local(engine, engine)) is Reason.ENGINE_FAILED
    with pytest.raises(ZeroDivisionError):
        await engine.close()


async def test_it_works_in_real_time_too() -> None:
    source, target = await started(SimNetwork(Link(0.0, 1e12)), "p", "d")
    assert await request(source, target) == list(simulated_answer(PROMPT, 8))
    assert target.load() == source.load() == EngineLoad(0, 0, 0, 32)
    await source.close()
    await target.close()

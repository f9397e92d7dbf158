"""What the tests of real engines share: how they are configured, asked and found idle. Tests nothing itself."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patience import LEASE_S, PULL_TIMEOUT_S, WITHIN_S

from baton.leg import DecodeDone, KvAdopted, Stepped
from baton.request import EngineStop, LegFinish, TokenLogprobs
from bench.real_fleet import free_ports
from engine.config import EngineConfig, EngineIdentity
from engine.protocol import DecodeJob, HeldKv, Prefilled, PrefillJob

if TYPE_CHECKING:
    from engine.vllm_engine import VllmEngine

MODEL_PATH = Path(os.environ.get("BATON_MODEL_PATH", "~/.cache/baton/models/smollm2-135m-instruct")).expanduser()
OUTPUT_TOKEN_COUNT = 24
BLOCK = 128
TRY_COUNT = 4
"""Of what a machine that stands still for a moment may spoil."""


@dataclass(frozen=True)
class Pair:
    prefiller: VllmEngine
    decoder: VllmEngine


def engine_config(core_index: int, port: int, **changes: Any) -> EngineConfig:
    cores = sorted(os.sched_getaffinity(0))
    base = EngineConfig(
        model_path=str(MODEL_PATH),
        model_name="smollm2-135m-instruct",
        kv_cache_bytes=384 << 20,
        max_context_token_count=4096,
        max_batched_token_count=512,
        cores=(cores[core_index % len(cores)],),
        side_channel_port=port,
        pull_timeout_s=PULL_TIMEOUT_S,
    )
    return replace(base, **changes)


@asynccontextmanager
async def running_pair(*, has_met: bool = True, **changes: Any) -> AsyncIterator[Pair]:
    """``has_met``: the engines know each other. A first contact has a second, which a busy machine may not have."""
    from engine.vllm_engine import VllmEngine

    ports = free_ports(2)
    prefiller = VllmEngine(engine_config(0, ports[0], **changes), EngineIdentity("prefill-0"))
    decoder = VllmEngine(engine_config(1, ports[1], **changes), EngineIdentity("decode-0"))
    try:
        await asyncio.gather(prefiller.start(), decoder.start())
        if has_met:
            await _meet(prefiller, decoder)
            await _meet(decoder, prefiller)
        yield Pair(prefiller, decoder)
    finally:
        await asyncio.gather(prefiller.close(), decoder.close())


async def _meet(holder: VllmEngine, reader: VllmEngine) -> None:
    for _ in range(TRY_COUNT):
        ids = prompt(5)
        first = await prefilled(holder, ids, count=2)
        adopted, _, _ = await decoded(reader, continuation(ids, first, count=2))
        await holder.release(kv_of(first).handle)
        if adopted.recompute_reason is None:
            return
    raise AssertionError(f"no KV was pulled in {TRY_COUNT} attempts: {adopted.recompute_reason}")


async def becomes_true(holds: Callable[[], Awaitable[bool]], within_s: float = WITHIN_S) -> None:
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110  the engine is another process: there is no event to wait for
            await asyncio.sleep(0.01)


async def is_idle(engine: VllmEngine) -> None:
    """No request, no held KV, no used block."""

    async def idle() -> bool:
        load = await engine.load_now()
        return (load.running_count, load.waiting_count, load.used_block_count) == (0, 0, 0)

    await becomes_true(idle)


def prompt(token_count: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(f"{token_count}/{seed}")
    return tuple(rng.randrange(100, 49_000) for _ in range(token_count))


def stop(max_token_count: int, **changes: Any) -> EngineStop:
    return EngineStop(max_token_count, ignore_eos=True, **changes)


async def decoded(engine: VllmEngine, job: DecodeJob) -> tuple[KvAdopted, list[int], LegFinish]:
    """Everything a decode says, its grammar checked."""
    adopted, *steps, done = [event async for event in engine.decode(job)]
    assert isinstance(adopted, KvAdopted)
    assert isinstance(done, DecodeDone)
    tokens: list[int] = []
    for step in steps:
        assert isinstance(step, Stepped)
        tokens += step.token_ids
    return adopted, tokens, done.finish


async def decoded_with_logprobs(
    engine: VllmEngine, job: DecodeJob
) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...], LegFinish]:
    """Tokens, their logprobs and why it ended."""
    _, *steps, done = [event async for event in engine.decode(job)]
    assert isinstance(done, DecodeDone)
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for step in steps:
        assert isinstance(step, Stepped)
        tokens += step.token_ids
        logprobs += step.logprobs
    return tuple(tokens), tuple(logprobs), done.finish


async def alone(engine: VllmEngine, ids: tuple[int, ...], count: int = OUTPUT_TOKEN_COUNT) -> list[int]:
    """The oracle: what one engine says, computing everything itself from an empty cache."""
    await engine.reset_prefix_cache()
    adopted, tokens, _ = await decoded(engine, DecodeJob("oracle", ids, stop=stop(count)))
    assert adopted.cached_token_count == 0
    assert adopted.prefill_s > 0
    await engine.reset_prefix_cache()
    return tokens


async def prefilled(
    engine: VllmEngine, ids: tuple[int, ...], count: int = OUTPUT_TOKEN_COUNT, lease_s: float = LEASE_S
) -> Prefilled:
    result = await engine.prefill(PrefillJob("prefill", ids, stop=stop(count), lease_s=lease_s))
    assert result.finish is None
    assert result.held is not None
    return result


def kv_of(first: Prefilled) -> HeldKv:
    assert first.held is not None
    return first.held


def continuation(
    ids: tuple[int, ...], first: Prefilled, count: int = OUTPUT_TOKEN_COUNT, **wrong_params: Any
) -> DecodeJob:
    """The job that continues a held prefill, its pull's parameters changed as named."""
    params = {**kv_of(first).params, **wrong_params}
    return DecodeJob("decode", (*ids, first.first_token_id), stop=stop(count - 1), pull=params)


async def while_it_computes(
    engine: VllmEngine, seed: int, during: Callable[[], Awaitable[Any]], *, token_count: int = 3900
) -> None:
    """Does ``during`` while ``engine`` computes a prompt for seconds. On a machine that stood still the prompt may be
    over first; then it is done once more, with another prompt."""
    for number in range(TRY_COUNT):
        job = PrefillJob("busy", prompt(token_count, seed=seed + number), stop=stop(1))
        busy = asyncio.create_task(engine.prefill(job))

        async def it_runs() -> bool:
            return (await engine.load_now()).running_count > 0 or busy.done()  # noqa: B023  awaited in this round

        await becomes_true(it_runs)
        await during()
        was_busy = not busy.done()
        await busy
        if was_busy:
            return
    raise AssertionError(f"{TRY_COUNT} prompts were computed before what was to be done meanwhile")

"""Drives a running cluster with controlled loads, so that every step a cost depends on is seen many times.

Starts the cluster of a configuration with a scheduler that notes its steps (``bench/simulation/step_log.py``) and
asks it through the public service, as any caller would: prompts one at a time, then waves of streams that begin and
end one by one, so that batches of all sizes run with and without a prefill beside them. What is asked is seeded and
interleaved, so that a machine that drifts does not bias one part. Fits nothing.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from baton.client import BatonClient, Chunk, Finished, Started
from baton.request import Role, StopConditions
from bench.fleet_under_test import running_fleet
from bench.machine import machine_facts
from bench.oracle import model_limits
from bench.real_fleet import free_ports
from bench.simulation.disturbance import PERIOD_S, Watch
from bench.simulation.observed import Answered, Observed
from bench.simulation.steps import STEP_LOG_VARIABLE, read_steps
from fleet.config import FleetConfig

SCHEDULER = "bench.simulation.step_log.LoggedScheduler"
REQUEST_TIMEOUT_S = 240.0
SETTLE_S = 0.1
"""Between prompts asked one at a time: the engine is idle again, its holds are released."""
RESERVED_TOKEN_COUNT = 1000
"""Ids below are left out: among them are those that end an answer or mean something to a chat."""


class ProbeError(Exception):
    """The cluster did not do what was asked of it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to send ``after_s`` after the one before it in its wave."""

    prompt_token_count: int
    output_token_count: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is asked. ``alone``: lengths of prompts asked one at a time; a length as often as it stands there."""

    alone: tuple[int, ...]
    waves: tuple[tuple[Ask, ...], ...]


def effort(*, is_quick: bool, is_split: bool, seed: int, running_limit: int, token_limit: int) -> Effort:
    """``running_limit``: streams at once that the cluster computes; ``token_limit``: tokens its KV holds at once."""
    rng = random.Random(f"calibrate/{seed}")  # noqa: S311 a reproducible choice of loads
    most = token_limit * 3 // 4
    if is_quick:
        alone = [16, 64, 128, 200, 300, 512, 700] * 2 + [1500, 1500]
        waves = [_wave(rng, running_limit, 32, 400, (60, 140), most)]
    else:
        alone = [16, 16, 64, 64, 128, 200, 300, 400, 512, 512, 700, 1000, 1000, 1500, 2000, 2000, 3000, 4000]
        waves = [
            _wave(rng, running_limit, 16, 160, (60, 200), most),
            _wave(rng, running_limit, 100, 1000, (100, 260), most),
            _wave(rng, max(2, running_limit // 4), 1500, 3500, (80, 160), most),
        ]
    if not is_split:
        alone = [length for length in alone if length <= 2000][::2]
    rng.shuffle(alone)
    return Effort(tuple(length for length in alone if length < most), tuple(waves))


def _wave(
    rng: random.Random, count: int, low: int, high: int, outputs: tuple[int, int], most: int
) -> tuple[Ask, ...]:
    asks: list[Ask] = []
    total = 0
    for _ in range(count):
        ask = Ask(round(low * (high / low) ** rng.random()), rng.randint(*outputs), rng.expovariate(1 / 0.1))
        total += ask.prompt_token_count + ask.output_token_count
        if total > most:
            break
        asks.append(ask)
    return tuple(asks)


async def observe(
    config: FleetConfig,
    *,
    is_quick: bool,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    work: Effort | None = None,
) -> Observed:
    """Starts the fleet, asks (``work`` in place of ``effort``'s), stops it. Raises what a fleet that does not start,
    or a request that fails, raises."""
    machine = machine_facts()
    with tempfile.TemporaryDirectory(prefix="baton-calibrate-") as folder:
        log = Path(folder) / "steps.jsonl"
        os.environ[STEP_LOG_VARIABLE] = str(log)  # the engine processes inherit it
        began = time.monotonic()
        async with running_fleet(_logged(private(config))) as fleet:
            say(f"  ready after {time.monotonic() - began:.0f} s")
            decode = config.engines[Role.DECODE]
            decode_workers = [each for each in (await fleet.cluster()).workers if each.role == Role.DECODE.value]
            block_count = sum(each.block_count for each in decode_workers)
            if not block_count:
                raise ProbeError("no decode worker says what its KV holds")
            work = work or effort(
                is_quick=is_quick,
                is_split=config.pools[Role.PREFILL].count > 0,
                seed=seed,
                running_limit=decode.max_running_count * len(decode_workers),
                token_limit=block_count * decode.block_token_count,
            )
            vocab_size, _ = model_limits(config.model.directory)
            prompts = _Prompts(random.Random(f"prompts/{seed}"), vocab_size)  # noqa: S311
            watch = Watch()
            watching = asyncio.create_task(watch.run())
            try:
                async with fleet.client() as client:
                    answers = await _ask_all(client, work, prompts, say)
                await asyncio.sleep(PERIOD_S)  # the last span, too
            finally:
                watching.cancel()
                await asyncio.wait([watching])
        steps = read_steps(log.read_text().splitlines(), watch.samples)
        return Observed(describe(config), tuple(steps), tuple(answers), machine)


def describe(config: FleetConfig) -> str:
    return " + ".join(f"{config.pools[role].count} {role.value}" for role in Role if config.pools[role].count)


def aggregated(config: FleetConfig) -> FleetConfig:
    """The same workers, none of them for prefill alone: each computes its prompts itself."""
    prefill, decode = config.pools[Role.PREFILL], config.pools[Role.DECODE]
    pools = {
        Role.PREFILL: replace(prefill, count=0, cores=()),
        Role.DECODE: replace(decode, count=prefill.count + decode.count, cores=(*prefill.cores, *decode.cores)),
    }
    return replace(config, pools=pools)


def private(config: FleetConfig) -> FleetConfig:
    """On ports nobody uses, so that a service that runs is not in the way."""
    listen, admin, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    router = replace(config.router, listen_address=listen, admin_address=admin, metrics_address=metrics)
    pools = {role: replace(pool, port=0, metrics_port=0, side_channel_port=0) for role, pool in config.pools.items()}
    return replace(config, router=router, pools=pools)


def _logged(config: FleetConfig) -> FleetConfig:
    engines = {
        role: replace(engine, extra_args={**engine.extra_args, "scheduler_cls": SCHEDULER})
        for role, engine in config.engines.items()
    }
    return replace(config, engines=engines)


class _Prompts:
    """Prompts that share nothing, of ids that mean nothing."""

    def __init__(self, rng: random.Random, vocab_size: int) -> None:
        self._rng = rng
        self._ids = range(min(RESERVED_TOKEN_COUNT, vocab_size // 2), vocab_size)

    def of(self, token_count: int) -> list[int]:
        return self._rng.choices(self._ids, k=token_count)


async def _ask_all(
    client: BatonClient, work: Effort, prompts: _Prompts, say: Callable[[str], None]
) -> list[Answered]:
    """Prompts asked one at a time in as many rounds as there are waves, and a wave after each."""
    for length in (64, 700):  # the first of everything is slow: not looked at
        await _ask(client, prompts.of(length), 4, was_alone=False)
    answers: list[Answered] = []
    rounds = len(work.waves)
    for number, wave in enumerate(work.waves):
        began = time.monotonic()
        for length in work.alone[number::rounds]:
            await asyncio.sleep(SETTLE_S)
            answers.append(await _ask(client, prompts.of(length), 6, was_alone=True))
        say(f"  {len(work.alone[number::rounds])} prompts one at a time: {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        answers += await _ask_wave(client, wave, prompts)
        say(f"  a wave of {len(wave)} streams: {time.monotonic() - began:.0f} s")
    return answers


async def _ask_wave(client: BatonClient, wave: Sequence[Ask], prompts: _Prompts) -> list[Answered]:
    async with asyncio.TaskGroup() as group:
        tasks = []
        for ask in wave:
            await asyncio.sleep(ask.after_s)
            prompt = prompts.of(ask.prompt_token_count)
            tasks.append(group.create_task(_ask(client, prompt, ask.output_token_count, was_alone=False)))
    return [task.result() for task in tasks]


async def _ask(client: BatonClient, prompt: Sequence[int], output_token_count: int, *, was_alone: bool) -> Answered:
    generation_id = ""
    finished: Finished | None = None
    token_at: list[float] = []
    stop = StopConditions(max_output_token_count=output_token_count, ignore_eos=True)
    sent_at = time.monotonic()
    async with aclosing(client.generate(prompt, timeout=REQUEST_TIMEOUT_S, stop=stop)) as events:
        async for event in events:
            match event:
                case Started():
                    generation_id = event.generation_id
                case Chunk(token_count=token_count):
                    token_at += [time.monotonic()] * token_count
                case Finished():
                    finished = event
    if finished is None or len(token_at) != output_token_count:
        raise ProbeError(f"an answer had {len(token_at)} tokens of {output_token_count}")
    return Answered(
        generation_id=generation_id,
        prompt_token_count=len(prompt),
        was_alone=was_alone,
        sent_at=sent_at,
        token_at=tuple(token_at),
        kv_transfer_bytes=finished.phases.kv_transfer_bytes,
        cached_token_count=finished.usage.cached_prompt_token_count,
        prefill_worker_id=finished.phases.prefill_worker_id,
        decode_worker_id=finished.phases.decode_worker_id,
    )

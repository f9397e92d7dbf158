"""Real engines whose holds end before, while and after they are read: every answer must be what one engine says.

One stop: the decode engine is stopped (SIGSTOP), before its pulls are asked for or in the midst of them. Meanwhile
the prefill engine's short leases run out, or its KV is released, and other prompts are computed into the blocks.
Then the decode engine goes on (SIGCONT) and reads what is there. The control does the same with an engine that
believes whatever it reads: if none of its answers were wrong, the trials would prove nothing.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from baton.leg import KvAdopted, Stepped
from baton.request import EngineStop
from bench.tiny_model import VOCAB_SIZE
from engine.config import EngineConfig, EngineIdentity
from engine.protocol import DecodeJob, PrefillJob

if TYPE_CHECKING:
    from engine.vllm_engine import VllmEngine

BLOCK = 32
POOL_BLOCK_COUNT = 128
LEASE_S = 2.0
STOP_S = 5.0
TOKEN_COUNT = 12
LONGEST_PROMPT = 200
LATEST_STOP_S = 0.03
"""After pulls were asked for: by then most of them are over."""
PROMPT_COUNT = 20


@dataclass(slots=True)
class StopCounts:
    trial_count: int = 0
    wrong_count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why KV was not used; ``used`` where it was."""


@dataclass(frozen=True)
class Engines:
    prefiller: VllmEngine
    decoder: VllmEngine


def engine_config(model: Path, port: int, core_index: int) -> EngineConfig:
    cores = sorted(os.sched_getaffinity(0))
    block_bytes = 2 * 2 * 2 * 32 * BLOCK * 4  # layers, keys and values, heads, head size, tokens, float32
    return EngineConfig(
        model_path=str(model),
        model_name="tiny",
        dtype="float32",
        kv_cache_bytes=POOL_BLOCK_COUNT * block_bytes,
        block_token_count=BLOCK,
        max_context_token_count=1024,
        max_running_count=PROMPT_COUNT + 4,
        enable_prefix_caching=False,  # or a prompt asked twice would pull nothing
        lease_s=LEASE_S,
        cores=(cores[core_index % len(cores)],),
        side_channel_port=port,
        extra_args={"skip_tokenizer_init": True},
    )


@asynccontextmanager
async def running_engines(model: Path, first_port: int, *, is_checked: bool = True) -> AsyncIterator[Engines]:
    from bench.unchecked_connector import CONNECTOR_MODULE
    from engine.vllm_engine import VllmEngine
    from kvtransfer.connector import CONNECTOR_MODULE as CHECKED_MODULE

    prefiller = VllmEngine(engine_config(model, first_port, 0), EngineIdentity("prefill-0"))
    decoder = VllmEngine(engine_config(model, first_port + 1, 1), EngineIdentity("decode-0"))
    module = CHECKED_MODULE if is_checked else CONNECTOR_MODULE
    try:
        await prefiller.start()
        with mock.patch("kvtransfer.connector_settings.CONNECTOR_MODULE", module):
            await decoder.start()
        yield Engines(prefiller, decoder)
    finally:
        if decoder.process_id:
            with suppress(ProcessLookupError):
                os.kill(decoder.process_id, signal.SIGCONT)  # a stopped one could not be closed
        await asyncio.gather(prefiller.close(), decoder.close())


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...] = field(repr=False)
    answer: tuple[int, ...] = field(repr=False)


class Stopper:
    """Asks, stops, spoils, goes on and compares. One stop at a time."""

    def __init__(self, engines: Engines, seed: int) -> None:
        self._engines = engines
        self._rng = random.Random(seed)  # noqa: S311  reproducible trials
        self._questions: list[Question] = []

    async def prepare(self, count: int) -> None:
        for _ in range(count):
            prompt = self._prompt(self._rng.randint(2, LONGEST_PROMPT))
            _, tokens = await self._decoded(DecodeJob("oracle", prompt, stop=_stop(TOKEN_COUNT)))
            self._questions.append(Question(prompt, tuple(tokens)))
        # The first read of a pair connects; it is no trial.
        warm = self._questions[0]
        held = await self._engines.prefiller.prefill(PrefillJob("warm", warm.prompt, stop=_stop(2)))
        assert held.held is not None
        await self._decoded(DecodeJob("warm", (*warm.prompt, held.first_token_id), pull=held.held.params))
        await self._engines.prefiller.release(held.held.handle)

    async def stop_once(self, counts: StopCounts, *, in_midst: bool, by_release: bool) -> None:
        prefiller, decoder = self._engines.prefiller, self._engines.decoder
        if not in_midst:
            os.kill(decoder.process_id, signal.SIGSTOP)
        first = await asyncio.gather(
            *(
                prefiller.prefill(PrefillJob("trial", each.prompt, stop=_stop(TOKEN_COUNT), lease_s=LEASE_S))
                for each in self._questions
            )
        )
        jobs = []
        for question, one in zip(self._questions, first, strict=True):
            assert one.held is not None
            jobs.append(
                DecodeJob(
                    "trial",
                    (*question.prompt, one.first_token_id),
                    stop=_stop(TOKEN_COUNT - 1),
                    pull=one.held.params,
                )
            )
        asked = [asyncio.create_task(self._decoded(job)) for job in jobs]
        try:
            await asyncio.sleep(self._rng.uniform(0, LATEST_STOP_S) if in_midst else 0.1)
            os.kill(decoder.process_id, signal.SIGSTOP)
            go_on_at = asyncio.get_running_loop().time() + STOP_S
            if by_release:
                for one in first:
                    assert one.held is not None
                    await prefiller.release(one.held.handle)
            await self._nothing_held()
            await self._churn()
            await asyncio.sleep(max(0.0, go_on_at - asyncio.get_running_loop().time()))
        finally:
            os.kill(decoder.process_id, signal.SIGCONT)
        for question, one, task in zip(self._questions, first, asked, strict=True):
            adopted, rest = await task
            counts.trial_count += 1
            counts.wrong_count += (one.first_token_id, *rest) != question.answer
            counts.reasons[adopted.recompute_reason.value if adopted.recompute_reason else "used"] += 1

    async def _nothing_held(self) -> None:
        async with asyncio.timeout(30):
            while (await self._engines.prefiller.load_now()).used_block_count:  # noqa: ASYNC110  another process
                await asyncio.sleep(0.02)

    async def _churn(self) -> None:
        """Other prompts over every block, twice."""
        for _ in range(2):
            await asyncio.gather(
                *(
                    self._engines.prefiller.prefill(PrefillJob("churn", self._prompt(500), hold_kv=False))
                    for _ in range(POOL_BLOCK_COUNT * BLOCK // 500 + 1)
                )
            )

    async def _decoded(self, job: DecodeJob) -> tuple[KvAdopted, list[int]]:
        adopted: KvAdopted | None = None
        tokens: list[int] = []
        async for event in self._engines.decoder.decode(job):
            if isinstance(event, KvAdopted):
                adopted = event
            elif isinstance(event, Stepped):
                tokens += event.token_ids
        assert adopted is not None
        return adopted, tokens

    def _prompt(self, token_count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(3, VOCAB_SIZE) for _ in range(token_count))


def _stop(max_token_count: int) -> EngineStop:
    return replace(EngineStop(max_token_count), ignore_eos=True)


async def run_stops(
    model: Path, first_port: int, *, trial_count: int, seed: int, is_checked: bool = True
) -> StopCounts:
    """At least ``trial_count`` trials, ``PROMPT_COUNT`` a stop: before and in the midst of pulls by turns, the holds
    ended by their leases and by release by turns."""
    counts = StopCounts()
    async with running_engines(model, first_port, is_checked=is_checked) as engines:
        stopper = Stopper(engines, seed)
        await stopper.prepare(min(PROMPT_COUNT, trial_count))
        number = 0
        while counts.trial_count < trial_count:
            await stopper.stop_once(counts, in_midst=number % 2 == 1, by_release=number % 4 >= 2)
            number += 1
    return counts

"""Real engines, a tiny model, and transfers that go wrong: every answer must be what one engine alone says.

The real router and the real workers in one process, two engine processes below them. The oracle is one of these
engines computing every prompt itself, before anything is transferred. Nothing judges by the clock.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import BatonError
from baton.leg import DecodeDone, KvAdopted, Stepped
from baton.request import EngineStop, Role
from bench.real_fleet import free_ports
from bench.tiny_model import VOCAB_SIZE
from bench.virtual_cluster import Heard, VirtualCluster, WorkerProcess
from engine.config import EngineConfig, EngineIdentity
from engine.protocol import DecodeJob
from engine.sim import SimConfig
from router.answering import RoutedRequest

PULL_TIMEOUT_S = 0.5
STUCK_S = 2.0
HANG_S = 0.02
REST_POLL_S = 0.05
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Question:
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    answer: tuple[int, ...] = field(repr=False)


@dataclass(slots=True)
class Tally:
    """What many requests came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class FaultyCluster(VirtualCluster):
    """One prefill and one decode worker on real engines, in real time."""

    clock_slack_s = 60.0

    async def adopt(self, worker_id: str, role: Role, engine: Any) -> None:
        process = WorkerProcess(worker_id, role, f"e{next(self._epochs)}", engine)
        process.start_reaper()
        self.processes[worker_id] = process
        self.tell_fleet()

    async def questions(self, count: int, seed: int, *, longest: int = 400, token_count: int = 12) -> list[Question]:
        """Prompts of any length and what one engine answers by itself, one at a time."""
        rng = random.Random(seed)  # noqa: S311 reproducible questions
        engine = self.processes["prefill-0"].engine
        questions = []
        for _ in range(count):
            length = rng.choice((1, BLOCK - 1, BLOCK, BLOCK + 1, rng.randint(2, longest)))
            prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))
            stop = EngineStop(token_count, ignore_eos=True)
            tokens: list[int] = []
            async for event in engine.decode(DecodeJob("oracle", prompt, stop=stop)):
                match event:
                    case Stepped():
                        tokens += event.token_ids
                    case KvAdopted() | DecodeDone():
                        pass
            assert len(tokens) == token_count
            questions.append(Question(prompt, tuple(tokens)))
        return questions

    async def ask_all(self, questions: Sequence[Question], *, concurrency: int) -> Tally:
        tally = Tally()
        slots = asyncio.Semaphore(concurrency)

        async def one(question: Question) -> None:
            number = next(self._requests)
            request = RoutedRequest(
                f"g{number}", question.prompt_token_ids, len(question.answer), eos_token_ids=(2,), ignore_eos=True
            )
            async with slots:
                heard = await self.ask(request, timeout_s=120.0)
            _judge(tally, f"g{number}", question, heard)

        await asyncio.gather(*(one(question) for question in questions))
        return tally

    async def at_rest(self, within_s: float) -> float:
        """Seconds until nothing is used, held, quarantined, running or on its way. Raises ``AssertionError``."""
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        while True:
            left = {name: book for name, book in (await self.audit()).items() if any(book.values())}
            if not left:
                return loop.time() - began_at
            if loop.time() - began_at > within_s:
                raise AssertionError(f"not at rest after {within_s:g} s: {left}")
            await asyncio.sleep(REST_POLL_S)

    async def audit(self) -> dict[str, dict[str, int]]:
        books: dict[str, dict[str, int]] = {}
        for process in self.processes.values():
            await process.engine.check_health()
            load = await process.board.audited()
            books[process.worker_id] = {
                "legs": load.running_count + load.waiting_count,
                "leases": load.held_lease_count,
                "blocks": load.used_block_count,
            }
        books["router"] = {
            "in flight": self.relay.in_flight_count,
            "places": self.admission.in_flight_count,
            "waiting": self.admission.waiting_count,
            "releases": self.relay.releasing_count,
        }
        return books

    async def fault_counts(self) -> Counter[str]:
        """Faults that struck, in all engines: how often each operation was asked for, and how it was struck."""
        counts: Counter[str] = Counter()
        for process in self.processes.values():
            counts += Counter(await process.engine.fault_counts())
        return counts


def _judge(tally: Tally, name: str, question: Question, heard: Heard) -> None:
    if heard.completed is None:
        assert heard.error is not None
        tally.outcomes[heard.error.reason.value] += 1
        tally.wrong.append(f"{name}: {heard.error!r}")
        return
    tally.outcomes["complete"] += 1
    tally.attempts[heard.report.attempt_count] += 1
    tally.modes[heard.report.mode.value] += 1
    if (reason := heard.report.transfer.recompute_reason) is not None:
        tally.reasons[reason.value] += 1
    if tuple(heard.tokens) != question.answer:
        length = len(question.prompt_token_ids)
        first = next(i for i, (a, b) in enumerate(zip(heard.tokens, question.answer, strict=True)) if a != b)
        tally.wrong.append(f"{name}: prompt of {length} tokens, wrong from token {first}, {heard.report}")


def tiny_config(model: Path, port: int, core_index: int, faults: Mapping[str, Any] | None) -> EngineConfig:
    """``faults`` as ``EngineConfig.transfer_faults``, without the switch that allows them."""
    cores = sorted(os.sched_getaffinity(0))
    return EngineConfig(
        model_path=str(model),
        model_name="tiny",
        dtype="float32",
        kv_cache_bytes=64 << 20,
        block_token_count=BLOCK,
        max_context_token_count=1024,
        enable_prefix_caching=False,  # or a prompt asked twice would pull nothing
        pull_timeout_s=PULL_TIMEOUT_S,
        extra_args={"skip_tokenizer_init": True},
        cores=(cores[core_index % len(cores)],),
        side_channel_port=port,
        transfer_faults={"allow_faults": True, "hang_s": HANG_S, "stuck_s": STUCK_S, **faults} if faults else {},
    )


@asynccontextmanager
async def faulty_cluster(model: Path, faults: Mapping[str, Any] | None) -> AsyncIterator[FaultyCluster]:
    """``faults`` are the decode engine's."""
    from engine.vllm_engine import VllmEngine

    engines = {}
    for index, (role, port) in enumerate(zip((Role.PREFILL, Role.DECODE), free_ports(2), strict=True)):
        config = tiny_config(model, port, index, faults if role is Role.DECODE else None)
        engines[role] = VllmEngine(config, EngineIdentity(f"{role.value}-0"))
    cluster = FaultyCluster(SimConfig(engine_id="none"))
    try:
        await asyncio.gather(*(engine.start() for engine in engines.values()))
        for role, engine in engines.items():
            await cluster.adopt(f"{role.value}-0", role, engine)
        await cluster.until_ready()
        yield cluster
    finally:
        await cluster.relay.close()
        await cluster.roster.close()
        for process in cluster.processes.values():
            await process.decode.close()
            await process.prefill.close()
        await asyncio.gather(*(engine.close() for engine in engines.values()))


async def refusal_to_register(model: Path) -> str:
    """What an engine says whose memory the transfer library does not take. Raises ``AssertionError`` if it starts."""
    from engine.vllm_engine import VllmEngine

    plan = {"probability": 1.0, "operations": ["register"], "kinds": ["fail"]}
    engine = VllmEngine(tiny_config(model, free_ports(1)[0], 0, plan), EngineIdentity("decode-0"))
    try:
        await engine.start()
    except BatonError as error:
        return error.message
    finally:
        await engine.close()
    raise AssertionError("an engine started whose memory was not registered")

"""The load of the first figures: what is sent, when, and the record of each request. Never aggregates.

Two scenarios against one target:

- *alone*: requests of given prompt lengths, shuffled, one at a time (closed loop).
- *streams*: four streams run; once all flow, long prompts arrive at fixed intended times (open loop).
  What counts is how long the streams' tokens are held up.

Prompts are unique random tokens of exact length, so no prefix is ever in a cache, and the same for every system
of a round, which makes the comparison a paired one.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.children import Cpu
from bench.targets import ServerNotes, Target, TargetError, TargetEvent


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How much of each. ``alone_counts``: requests per prompt length."""

    alone_counts: Mapping[int, int]
    alone_output_token_count: int = 24
    stream_count: int = 4
    stream_prompt_token_count: int = 64
    stream_output_token_count: int = 150
    stream_run_count: int = 1
    """Repetitions: one run is one independent sample, since its streams are held up together."""
    arrival_count: int = 4
    arrival_prompt_token_count: int = 2000
    arrival_output_token_count: int = 4
    arrival_interval_s: float = 1.5
    flow_token_count: int = 10
    """Long prompts arrive once every stream has this many tokens."""
    timeout_s: float = 180.0
    settle_s: float = 0.15
    """Between two requests alone, so that work after a request's end is counted as its own."""
    idle_s: float = 3.0


@dataclass(slots=True)
class Record:
    """One request. Times in seconds from the start of its block; gaps in milliseconds.

    ``gaps_ms[i]`` lies between messages i and i+1; ``token_counts`` has the tokens of each message and is empty
    when all carried one. A failed request keeps what it got and says why in ``error``.
    """

    system: str
    block: int
    round: int
    scenario: str
    role: str
    """"warmup", "alone", "stream" or "arrival"."""
    index: int
    prompt_token_count: int
    max_token_count: int
    run: int = 0
    """Which repetition of the streams."""
    intended_at: float = 0.0
    sent_at: float = 0.0
    first_at: float | None = None
    last_at: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    cpu_s: float | None = None
    error: str | None = None
    notes: dict[str, Any] | None = None

    @property
    def ttft_s(self) -> float | None:
        """From the intended send time, so that a late generator cannot flatter the target."""
        return None if self.first_at is None else self.first_at - self.intended_at

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_at is None or self.error is not None else self.last_at - self.intended_at

    def as_json(self) -> dict[str, Any]:
        document = {
            key: value
            for key, value in asdict(self).items()
            if value not in (None, []) and (key, value) != ("run", 0)
        }
        for key in ("intended_at", "sent_at", "first_at", "last_at"):
            if key in document:
                document[key] = round(document[key], 5)
        return {"record": "request", **document}


class Block:
    """One system's turn: runs the plan and gathers records in ``records`` (also when it fails half-way)."""

    def __init__(
        self,
        target: Target,
        plan: LoadPlan,
        *,
        system: str,
        block: int,
        round_number: int,
        rng: random.Random,
        vocabulary: range,
        cpu: Callable[[], Cpu],
    ) -> None:
        self.records: list[Record] = []
        self.idle_cpu_share: float | None = None
        self.stream_cpu: Cpu | None = None
        self._target, self._plan, self._rng, self._vocabulary, self._cpu = target, plan, rng, vocabulary, cpu
        self._system, self._block, self._round = system, block, round_number
        self._start = asyncio.get_running_loop().time()

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._start

    def _prompt(self, token_count: int) -> list[int]:
        return self._rng.choices(self._vocabulary, k=token_count)

    def _record(
        self, scenario: str, role: str, index: int, prompt_token_count: int, max_token_count: int, run: int = 0
    ) -> Record:
        record = Record(
            self._system, self._block, self._round, scenario, role, index, prompt_token_count, max_token_count, run
        )
        self.records.append(record)
        return record

    async def _send(
        self,
        record: Record,
        prompt: Sequence[int],
        *,
        intended_at: float | None = None,
        flowing: Callable[[int], None] | None = None,
    ) -> None:
        record.sent_at = self._now()
        record.intended_at = record.sent_at if intended_at is None else intended_at
        arrivals: list[tuple[float, int]] = []
        token_count = 0
        stream: AsyncGenerator[TargetEvent, None] = self._target.generate(
            prompt, record.max_token_count, timeout_s=self._plan.timeout_s
        )
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    if isinstance(event, ServerNotes):
                        record.notes = event.facts
                        continue
                    arrivals.append((event.at - self._start, event.token_count))
                    token_count += event.token_count
                    if flowing is not None:
                        flowing(token_count)
        except TargetError as error:
            record.error = str(error)
        if arrivals:
            times = [at for at, _ in arrivals]
            record.first_at, record.last_at = times[0], times[-1]
            record.gaps_ms = [round((later - earlier) * 1e3, 3) for earlier, later in itertools.pairwise(times)]
            if any(count != 1 for _, count in arrivals):
                record.token_counts = [count for _, count in arrivals]

    async def warm_up(self) -> None:
        """First contacts (connection, handshake between engines, first kernels) are paid here, by rule."""
        for index, token_count in enumerate((64, max(self._plan.alone_counts), 64)):
            record = self._record("warmup", "warmup", index, token_count, 8)
            await self._send(record, self._prompt(token_count))
        await asyncio.sleep(1.0)
        before, at = self._cpu(), self._now()
        await asyncio.sleep(self._plan.idle_s)
        self.idle_cpu_share = self._cpu().since(before).total_s / (self._now() - at)

    async def alone(self) -> None:
        plan = self._plan
        lengths = [length for length, count in plan.alone_counts.items() for _ in range(count)]
        self._rng.shuffle(lengths)
        for index, length in enumerate(lengths):
            record = self._record("alone", "alone", index, length, plan.alone_output_token_count)
            prompt = self._prompt(length)
            before = self._cpu()
            await self._send(record, prompt)
            await asyncio.sleep(plan.settle_s)
            record.cpu_s = self._cpu().since(before).total_s

    async def streams(self) -> None:
        before = self._cpu()
        for run in range(self._plan.stream_run_count):
            await self._streams_once(run)
            await asyncio.sleep(self._plan.settle_s)
        self.stream_cpu = self._cpu().since(before)

    async def _streams_once(self, run: int) -> None:
        plan = self._plan
        flowing: set[int] = set()
        all_flow = asyncio.Event()

        def note(index: int, token_count: int) -> None:
            if token_count >= plan.flow_token_count:
                flowing.add(index)
                if len(flowing) == plan.stream_count:
                    all_flow.set()

        prompts = [self._prompt(plan.stream_prompt_token_count) for _ in range(plan.stream_count)]
        long_prompts = [self._prompt(plan.arrival_prompt_token_count) for _ in range(plan.arrival_count)]
        async with asyncio.TaskGroup() as group:
            streams = [
                self._send(
                    self._record("streams", "stream", index, len(prompt), plan.stream_output_token_count, run),
                    prompt,
                    flowing=functools.partial(note, index),
                )
                for index, prompt in enumerate(prompts)
            ]
            tasks = [group.create_task(stream) for stream in streams]
            waiter = group.create_task(all_flow.wait())
            # A stream that fails before it flows must not hang the block.
            done, _ = await asyncio.wait([waiter, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if waiter not in done:
                waiter.cancel()
                return
            first_at = self._now()
            for index, prompt in enumerate(long_prompts):
                intended_at = first_at + index * plan.arrival_interval_s
                await asyncio.sleep(max(0.0, intended_at - self._now()))
                record = self._record("streams", "arrival", index, len(prompt), plan.arrival_output_token_count, run)
                group.create_task(self._send(record, prompt, intended_at=intended_at))


def held_up_gaps_ms(records: Sequence[Record]) -> dict[tuple[str, int, int], list[float]]:
    """Gaps of all streams of each run (system, block, run) that ended after its first long prompt was sent."""
    first_arrival: dict[tuple[str, int, int], float] = {}
    for record in records:
        if record.role == "arrival":
            key = (record.system, record.block, record.run)
            first_arrival[key] = min(first_arrival.get(key, record.intended_at), record.intended_at)
    gaps: dict[tuple[str, int, int], list[float]] = {}
    for record in records:
        key = (record.system, record.block, record.run)
        if record.role != "stream" or key not in first_arrival or record.first_at is None:
            continue
        at = record.first_at
        kept = gaps.setdefault(key, [])
        for gap in record.gaps_ms:
            at += gap / 1e3
            if at > first_arrival[key]:
                kept.append(gap)
    return gaps

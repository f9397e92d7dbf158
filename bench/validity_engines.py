"""Real engines whose holds end before, while and after they are read: every answer must be what one engine says.

One stop serves many pulls. They are asked for, the decode engine is stopped (SIGSTOP) at some point of them
(``Moment``), the prefill engine's short leases run out or its KV is released, and other prompts are computed into
every block that was held. Then the decode engine goes on (SIGCONT), with whatever it was about to do.

The control does the same with the same engine told to believe what it reads: if none of its answers were wrong, the
trials would prove nothing. ``bench/validity_stock.py`` does it with vLLM's own connector.
"""

from __future__ import annotations

import asyncio
import enum
import math
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from baton.leg import KvAdopted, RecomputeReason, Stepped
from baton.request import EngineStop
from bench.tiny_model import VOCAB_SIZE
from engine.config import EngineConfig, EngineIdentity
from engine.protocol import DecodeJob, Prefilled, PrefillJob

if TYPE_CHECKING:
    from bench.validity_connector import StopPlan
    from engine.vllm_engine import VllmEngine

BLOCK = 32
POOL_BLOCK_COUNT = 128
LEASE_S = 2.0
STOP_S = 5.0
TOKEN_COUNT = 12
LONGEST_PROMPT = 180
LATEST_STOP_S = 0.03
"""After pulls were asked for: by then most of them are over."""
PULL_COUNT = 16
CHURN_TOKEN_COUNT = 500
CHURN_ROUND_COUNT = 6
STOPPED_WITHIN_S = 10.0
FREE_WITHIN_S = 120.0


class Moment(enum.Enum):
    """When the decode engine is stopped. The last four it does to itself (``bench/validity_connector.py``)."""

    BEFORE = "before the pulls were asked for"
    ANY = "at a random moment within 30 ms of asking"
    POSTING = "about to post one of the reads"
    QUEUED = "all reads asked for, none begun"
    TORN = "half of every read over, half not begun"
    READ = "all blocks read, no record after them"


LATE = (Moment.QUEUED, Moment.TORN)
"""Every pull of the batch has passed its first look, and reads on after the blocks were another's."""
ROUND = (
    Moment.QUEUED,
    Moment.TORN,
    Moment.QUEUED,
    Moment.READ,
    Moment.QUEUED,
    Moment.TORN,
    Moment.POSTING,
    Moment.ANY,
)
"""One after another, so that every number of stops has some of the sharpest; ``BEFORE`` comes last of every two
rounds, because nothing of it is ever read."""
EXPECTED = {"used", RecomputeReason.EXPIRED.value, RecomputeReason.STALE.value}
"""What becomes of pulls in these trials. CORRUPT would mean that the nonce let pass what only the digests caught."""


@dataclass(slots=True)
class StopCounts:
    trial_count: int = 0
    stop_count: int = 0
    reused_count: int = 0
    """Pulls all of whose blocks were computed over by other prompts before the decode engine went on."""
    late_count: int = 0
    """Reads that passed every check before them and were made, in whole or half, after that."""
    wrong_count: int = 0
    tie_count: int = 0
    """Answers that one engine gives to the prompt by itself and does not give to it among others."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why KV was not used; ``used`` where it was."""
    by_moment: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong_by_moment: Counter[str] = field(default_factory=Counter)
    forced_stop_count: int = 0
    """Stops that the engine did not come to by itself in time and was given from outside."""
    expired_notice_count: int = 0
    """Stock only: reads that the prefill engine heard of after it had given the blocks away."""

    @property
    def is_kept(self) -> bool:
        return not self.wrong_count and not self.reasons.keys() - EXPECTED

    def told(self) -> dict[str, Any]:
        """Plain values, for a record."""
        return {
            "pulls": self.trial_count,
            "stops": self.stop_count,
            "blocks_reused": self.reused_count,
            "reads_after_reuse": self.late_count,
            "wrong": self.wrong_count,
            "near_ties": self.tie_count,
            "reasons": dict(self.reasons),
            "by_moment": {f"{moment}: {reason}": count for (moment, reason), count in sorted(self.by_moment.items())},
            "wrong_by_moment": dict(self.wrong_by_moment),
            "stops_from_outside_instead": self.forced_stop_count,
            "notifications_after_expiry": self.expired_notice_count,
        }


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...] = field(repr=False)
    answer: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Engines:
    prefiller: VllmEngine
    decoder: VllmEngine
    plan: StopPlan
    """The decode engine's."""


def engine_config(
    model: Path, port: int, core_index: int, *, pool_block_count: int = POOL_BLOCK_COUNT
) -> EngineConfig:
    cores = sorted(os.sched_getaffinity(0))
    block_bytes = 2 * 2 * 2 * 32 * BLOCK * 4  # layers, keys and values, heads, head size, tokens, float32
    return EngineConfig(
        model_path=str(model),
        model_name="tiny",
        dtype="float32",
        kv_cache_bytes=pool_block_count * block_bytes,
        block_token_count=BLOCK,
        max_context_token_count=1024,
        max_running_count=PULL_COUNT + 8,
        enable_prefix_caching=False,  # or a prompt asked twice would pull nothing
        lease_s=LEASE_S,
        cores=(cores[core_index % len(cores)],),
        side_channel_port=port,
        pull_timeout_s=60.0,  # of these pulls none is late: what ends them is under test
        extra_args={"skip_tokenizer_init": True},
    )


@asynccontextmanager
async def running_engines(model: Path, first_port: int) -> AsyncIterator[Engines]:
    from bench.validity_connector import CONNECTOR_MODULE, FOLDER_VARIABLE, StopPlan
    from engine.vllm_engine import VllmEngine

    prefiller = VllmEngine(engine_config(model, first_port, 0), EngineIdentity("prefill-0"))
    # Room for every pull of a batch at once, whatever their lengths.
    decode_config = engine_config(model, first_port + 1, 1, pool_block_count=2 * POOL_BLOCK_COUNT)
    decoder = VllmEngine(decode_config, EngineIdentity("decode-0"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            with (
                mock.patch.dict(os.environ, {FOLDER_VARIABLE: folder}),
                mock.patch("kvtransfer.connector_settings.CONNECTOR_MODULE", CONNECTOR_MODULE),
            ):
                await asyncio.gather(prefiller.start(), decoder.start())
            yield Engines(prefiller, decoder, StopPlan.of(Path(folder), decoder.process_id))
        finally:
            go_on(decoder.process_id)  # a stopped one could not be closed
            await asyncio.gather(prefiller.close(), decoder.close())


def go_on(process_id: int) -> None:
    if process_id:
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGCONT)


class Asker:
    """Questions, their answers by one engine, and the two halves of an answer by two. For Baton's engines."""

    def __init__(self, engines: Any, seed: int) -> None:
        self.engines = engines
        self.lease_s = LEASE_S
        self.rng = random.Random(seed)  # noqa: S311  reproducible trials

    async def questions(self, count: int) -> list[Question]:
        """Prompts that nobody has seen, with the decode engine's own answers."""
        prompts = [self.prompt(self.rng.randint(2, LONGEST_PROMPT)) for _ in range(count)]
        return [Question(prompt, answer) for prompt, answer in zip(prompts, await self.alone(prompts), strict=True)]

    async def alone(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        jobs = [DecodeJob("alone", prompt, stop=stop_after(TOKEN_COUNT)) for prompt in prompts]
        return [tuple(tokens) for _, tokens in await asyncio.gather(*map(self.decoded, jobs))]

    async def begun(self, question: Question) -> Prefilled:
        job = PrefillJob("trial", question.prompt, stop=stop_after(TOKEN_COUNT), lease_s=self.lease_s)
        first: Prefilled = await self.engines.prefiller.prefill(job)
        assert first.held is not None
        return first

    async def ended(self, question: Question, first: Prefilled) -> tuple[str, tuple[int, ...]]:
        """What became of the pull, and the whole answer."""
        assert first.held is not None
        prompt = (*question.prompt, first.first_token_id)
        job = DecodeJob("trial", prompt, stop=stop_after(TOKEN_COUNT - 1), pull=first.held.params)
        adopted, rest = await self.decoded(job)
        reason = adopted.recompute_reason.value if adopted.recompute_reason else "used"
        return reason, (first.first_token_id, *rest)

    async def decoded(self, job: DecodeJob) -> tuple[KvAdopted, list[int]]:
        adopted: KvAdopted | None = None
        tokens: list[int] = []
        async for event in self.engines.decoder.decode(job):
            if isinstance(event, KvAdopted):
                adopted = event
            elif isinstance(event, Stepped):
                tokens += event.token_ids
        assert adopted is not None
        return adopted, tokens

    async def release(self, first: Prefilled) -> None:
        assert first.held is not None
        await self.engines.prefiller.release(first.held.handle)

    async def wait_until_free(self) -> None:
        async with asyncio.timeout(FREE_WITHIN_S):
            while (await self.engines.prefiller.load_now()).used_block_count:  # noqa: ASYNC110  another process
                await asyncio.sleep(0.02)

    async def churn(self) -> set[int]:
        """Other prompts into most of the pool at once. Returns the blocks that they were computed into."""
        count = POOL_BLOCK_COUNT * BLOCK // CHURN_TOKEN_COUNT - 1
        prompts = [Question(self.prompt(CHURN_TOKEN_COUNT), ()) for _ in range(count)]
        firsts = await asyncio.gather(*map(self.begun, prompts))
        await asyncio.gather(*map(self.release, firsts))
        await self.wait_until_free()
        return set().union(*map(held_blocks, firsts))

    def prompt(self, token_count: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(3, VOCAB_SIZE) for _ in range(token_count))


class Stopper:
    """Asks, stops, spoils, goes on and compares. One stop at a time."""

    def __init__(self, asker: Asker, *, stop_s: float = STOP_S, pull_count: int = PULL_COUNT) -> None:
        self._asker = asker
        self._engines = asker.engines
        self._stop_s = stop_s
        self._pull_count = pull_count

    async def prepare(self) -> None:
        """The first read of a pair connects; it is no trial."""
        (warm,) = await self._asker.questions(1)
        first = await self._asker.begun(warm)
        reason, answer = await self._asker.ended(warm, first)
        if (reason, answer) != ("used", warm.answer):
            raise RuntimeError(f"a pull that nothing disturbs went wrong ({reason}): there is nothing to try here")
        await self._asker.release(first)

    async def stop_once(self, counts: StopCounts, moment: Moment, *, by_release: bool = False) -> None:
        asker = self._asker
        questions = await asker.questions(self._pull_count)
        await asker.wait_until_free()
        loop = asyncio.get_running_loop()
        if self._engines.plan is not None:
            from bench.validity_connector import StopPoint

            point = StopPoint.NOWHERE if moment in (Moment.BEFORE, Moment.ANY) else StopPoint[moment.name]
            read_count = asker.rng.randint(1, self._pull_count) if moment is Moment.POSTING else self._pull_count
            self._engines.plan.order(point, read_count)  # also where it is to stop nowhere: its counts begin anew
        if moment is Moment.BEFORE:
            os.kill(self._engines.decoder.process_id, signal.SIGSTOP)
        try:
            firsts = await asyncio.gather(*map(asker.begun, questions))
            asked = [
                asyncio.create_task(asker.ended(question, first))
                for question, first in zip(questions, firsts, strict=True)
            ]
            if moment in (Moment.BEFORE, Moment.ANY):
                await asyncio.sleep(asker.rng.uniform(0, LATEST_STOP_S))
                os.kill(self._engines.decoder.process_id, signal.SIGSTOP)
            await self._wait_until_stopped(counts)
            goes_on_at = loop.time() + self._stop_s
            if by_release:
                await asyncio.gather(*map(asker.release, firsts))
            await asker.wait_until_free()
            reused: set[int] = set()
            held = [held_blocks(first) for first in firsts]
            for _ in range(CHURN_ROUND_COUNT):
                reused |= await asker.churn()
                if all(blocks <= reused for blocks in held):
                    break
            await asyncio.sleep(max(0.0, goes_on_at - loop.time()))
        finally:
            self._go_on()
        counts.stop_count += 1
        for question, blocks, task in zip(questions, held, asked, strict=True):
            reason, answer = await task
            counts.trial_count += 1
            counts.reused_count += blocks <= reused
            counts.reasons[reason] += 1
            counts.by_moment[moment.value, reason] += 1
            if answer == question.answer:
                continue
            if (await asker.alone([question.prompt])) == [answer]:
                counts.tie_count += 1
                continue
            counts.wrong_count += 1
            counts.wrong_by_moment[moment.value] += 1
        if self._engines.plan is not None:
            counts.late_count += self._engines.plan.get("late_count")

    async def _wait_until_stopped(self, counts: StopCounts) -> None:
        try:
            await self._stopped()
        except TimeoutError:
            # On a machine so busy that leases were over before all had been asked for.
            counts.forced_stop_count += 1
            os.kill(self._engines.decoder.process_id, signal.SIGSTOP)
            await self._stopped()

    async def _stopped(self) -> None:
        async with asyncio.timeout(STOPPED_WITHIN_S):
            while process_state(self._engines.decoder.process_id) != "T":  # noqa: ASYNC110  another process
                await asyncio.sleep(0.005)

    def _go_on(self) -> None:
        if self._engines.plan is not None:
            self._engines.plan.set("point", 0)
            self._engines.plan.set("goes_on", 1)
        go_on(self._engines.decoder.process_id)


def held_blocks(first: Prefilled) -> set[int]:
    """The blocks of the prefill engine that a ticket names."""
    assert first.held is not None
    return {block_id for group in first.held.params["remote_block_ids"] for block_id in group}


def process_state(process_id: int) -> str:
    """One letter, as in ``ps``: T is stopped."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def stop_after(token_count: int) -> EngineStop:
    return replace(EngineStop(token_count), ignore_eos=True)


def moments(number: int) -> Moment:
    """Of the stop of this number, from 0."""
    period = 2 * len(ROUND) + 1
    return Moment.BEFORE if number % period == period - 1 else ROUND[number % period % len(ROUND)]


async def run_stops(
    model: Path,
    first_port: int,
    *,
    trial_count: int,
    control_count: int,
    seed: int,
    limit_s: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[StopCounts, StopCounts]:
    """At least so many pulls or as many as ``limit_s`` allows, ``PULL_COUNT`` a stop, holds ended by their leases and
    every fourth time by release; then the control's, with the moments at which a reader that believes is wrong."""
    ends_at = time.monotonic() + limit_s
    counts, control = StopCounts(), StopCounts()
    async with running_engines(model, first_port) as engines:
        stopper = Stopper(Asker(engines, seed))
        await stopper.prepare()
        while counts.trial_count < trial_count and time.monotonic() < ends_at:
            number = counts.stop_count
            await stopper.stop_once(counts, moments(number), by_release=number % 4 == 2)
            say(f"stopped {counts.stop_count} times: {counts.trial_count} pulls, {dict(counts.reasons)}")
        engines.plan.set("believes", 1)
        while control.trial_count < control_count:
            kinds = (Moment.BEFORE, *LATE, Moment.POSTING)
            await stopper.stop_once(control, kinds[control.stop_count % len(kinds)])
            say(f"control, checks taken out: {control.trial_count} pulls, {control.wrong_count} wrong")
    return counts, control

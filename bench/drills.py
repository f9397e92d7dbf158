"""What is done to a fleet to see whether it keeps its promises: questions, storms of cancels, killed workers.

Each drill returns what it saw; none judges by the clock. ``bench/soak.py`` runs them at volume, ``tests/e2e`` a
sample of each.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.client import BatonClient, Chunk, Finished, Started
from baton.errors import BatonError
from baton.request import OutputOptions, Role, StopConditions
from bench.corpus import Corpus
from bench.exactness import Answer, Case, OracleAnswer, Verdict, expected, judge
from bench.fleet_under_test import Books, FleetUnderTest

ASK_TIMEOUT_S = 240.0
BOTH = OutputOptions(wants_text=True, wants_token_ids=True)


@dataclass(slots=True)
class Heard:
    """An answer as it arrived; ``error`` set when the stream failed."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None
    error: BatonError | None = None

    def take(self, chunk: Chunk) -> None:
        """Appends a chunk. Raises ``AssertionError`` for a gap or a repeat."""
        if chunk.first_token_index != len(self.token_ids):
            raise AssertionError(f"token {chunk.first_token_index} came where {len(self.token_ids)} was next")
        self.token_ids.extend(chunk.token_ids)
        self.text += chunk.text


def stop_of(case: Case) -> StopConditions:
    return StopConditions(
        max_output_token_count=case.max_token_count,
        stop_sequences=case.stop_sequences,
        stop_token_ids=case.stop_token_ids,
        ignore_eos=case.ignore_eos,
    )


async def ask(client: BatonClient, case: Case, *, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
    """One case through the service, greedy. Raises ``BatonError``."""
    heard = Heard()
    stream = client.generate(case.prompt_token_ids, timeout=timeout_s, stop=stop_of(case), output=BOTH)
    async with aclosing(stream) as events:
        async for event in events:
            match event:
                case Started():
                    pass
                case Chunk():
                    heard.take(event)
                case Finished():
                    heard.finished = event
    return answer_of(heard)


def answer_of(heard: Heard) -> Answer:
    """Raises ``AssertionError`` if the stream had no end."""
    finished = heard.finished
    assert finished is not None
    assert finished.reason is not None
    mode = finished.phases.placement_mode
    return Answer(
        tuple(heard.token_ids),
        heard.text,
        finished.reason.name,
        f"{mode.value if mode else 'unknown'}/{finished.phases.placement_reason}",
        finished.phases.recomputed_token_count,
    )


async def compare(
    client: BatonClient,
    corpus: Corpus,
    cases: Sequence[Case],
    oracle: dict[str, OracleAnswer],
    *,
    concurrency: int,
    tie_gap: float,
    eos_token_id: int,
) -> list[Verdict]:
    """Asks every case, ``concurrency`` at a time, and judges each against the oracle."""
    slots = asyncio.Semaphore(concurrency)

    async def one(case: Case) -> Verdict:
        async with slots:
            got = await ask(client, case)
        answer = oracle[case.name]
        return judge(case, expected(corpus, case, answer, eos_token_id), got, answer, tie_gap)

    return list(await asyncio.gather(*(one(case) for case in cases)))


async def baseline_of(fleet: FleetUnderTest, corpus: Corpus) -> dict[str, Books]:
    """The books at rest, after every worker was used: an engine's client makes its tasks at its first request."""
    case = Case("warm-up", corpus.prompt(40), 4)
    async with fleet.client() as client:
        for _ in range(3):
            await asyncio.gather(*(ask(client, case) for _ in range(2 * len(fleet.endpoints()))))
    await fleet.quiet_after_s(None, 60.0)
    return await fleet.books()


@dataclass(frozen=True, slots=True)
class Overrun:
    """How a request of a storm ended, and how far past its deadline (0 when before)."""

    kind: str
    outcome: str
    past_deadline_s: float


@dataclass(frozen=True, slots=True)
class StormReport:
    """``quiet_after_s``: from the last request's end until the books were at their baseline."""

    overruns: tuple[Overrun, ...]
    quiet_after_s: float


async def storm(
    fleet: FleetUnderTest,
    corpus: Corpus,
    baseline: dict[str, Books],
    *,
    count: int,
    concurrency: int,
    longest_prompt: int,
    seed: int,
    quiet_timeout_s: float,
    output_token_count: int = 64,
) -> StormReport:
    """Cancels, deadlines and disconnects at random points of ``count`` requests, then waits for rest."""
    rng = random.Random(seed)  # noqa: S311 reproducible trouble
    slots = asyncio.Semaphore(concurrency)
    plans = [
        (
            rng.choice(("cancel", "deadline", "disconnect")),
            rng.expovariate(1 / 0.8),
            round(longest_prompt ** rng.random()),
        )
        for _ in range(count)
    ]

    async def one(kind: str, after_s: float, length: int) -> Overrun:
        prompt = corpus.prompt(length)
        async with slots:
            return await _abandon(fleet, prompt, kind, max(0.01, after_s), output_token_count)

    overruns = await asyncio.gather(*(one(*plan) for plan in plans))
    quiet_after_s = await fleet.quiet_after_s(baseline, quiet_timeout_s)
    return StormReport(tuple(overruns), quiet_after_s)


async def _abandon(
    fleet: FleetUnderTest, prompt: Sequence[int], kind: str, after_s: float, output_token_count: int
) -> Overrun:
    loop = asyncio.get_running_loop()
    client = fleet.client()
    timeout_s = after_s if kind == "deadline" else ASK_TIMEOUT_S
    stop = StopConditions(max_output_token_count=output_token_count, ignore_eos=True)

    async def listen() -> str:
        async with aclosing(client.generate(prompt, timeout=timeout_s, stop=stop)) as events:
            async for _ in events:
                pass
        return "finished"

    task = asyncio.create_task(listen())
    began = loop.time()
    try:
        if kind == "deadline":
            await asyncio.wait([task])
        else:
            await asyncio.wait([task], timeout=after_s)
            if kind == "disconnect":
                await client.close()  # the transport goes; nothing says goodbye
            task.cancel()
        outcome = await _outcome(task)
    finally:
        await client.close()
    past_s = max(0.0, loop.time() - began - timeout_s)
    return Overrun(kind, outcome, past_s)


async def _outcome(task: asyncio.Task[str]) -> str:
    try:
        return await task
    except asyncio.CancelledError:
        return "cancelled"
    except BatonError as error:
        return error.reason.value


async def kill_while_streaming(
    fleet: FleetUnderTest, case: Case, *, role: Role, after_token_count: int
) -> tuple[Heard, str]:
    """Kills the worker that has the request in ``role`` once ``after_token_count`` tokens came (0: as soon as the
    request was placed; -1: before it is asked, whichever worker comes first). Returns what the client heard, and the
    id of the victim ("" if none was found)."""
    heard = Heard()
    victim = ""
    holder = ""
    if after_token_count < 0:
        victim = fleet.ids(role)[0]
        fleet.kill(victim)
    async with fleet.client() as client:
        stream = client.generate(case.prompt_token_ids, timeout=ASK_TIMEOUT_S, stop=stop_of(case), output=BOTH)
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    match event:
                        case Chunk():
                            heard.take(event)
                        case Finished():
                            heard.finished = event
                        case Started():
                            holder = await _holder(fleet, role)  # a prefill worker has it no more after its answer
                    if not victim and heard.finished is None and len(heard.token_ids) >= after_token_count:
                        victim = await _holder(fleet, role) or holder
                        if victim:
                            fleet.kill(victim)
        except BatonError as error:
            heard.error = error
    return heard, victim


async def _holder(fleet: FleetUnderTest, role: Role) -> str:
    """The worker of ``role`` that the router has a request on now; "" if none has."""
    view = await fleet.cluster()
    return next((each.worker_id for each in view.workers if each.role == role.value and each.assigned_count), "")


async def resumed_after_all_died(
    fleet: FleetUnderTest, prompt: Sequence[int], *, back_within_s: float, refused_within_s: float = 8.0
) -> tuple[BatonError, float]:
    """Kills every worker and asks: returns the refusal, and the seconds until an answer came again.

    ``refused_within_s``: the deadline of the request that is to be refused.

    Raises ``AssertionError`` if an answer came instead of the refusal, ``TimeoutError`` if none came afterwards.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    for worker_id in list(fleet.endpoints()):
        fleet.kill(worker_id)
    case = Case("after-death", tuple(prompt), 4)
    async with fleet.client() as client:
        try:
            await ask(client, case, timeout_s=refused_within_s)
        except BatonError as error:
            refused = error
        else:
            raise AssertionError("an answer came although every worker was killed")
        async with asyncio.timeout(back_within_s):
            await client.wait_until_serving(timeout=back_within_s)
            await ask(client, case)
    return refused, loop.time() - began

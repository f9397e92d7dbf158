"""Exact in every sampling mode: what a caller asks of Baton, said once more in vLLM's own words to one engine.

``python -m bench.soak modes`` asks each mode in three ways: split, computed by the decode worker alone, and split
with a decode worker killed while it streams; and compares token ids, text, ending, log probabilities and their sum
with a monolithic engine that knows nothing of Baton. float32 engines, so that another batch cannot turn a near tie.

What is asked, and what counts as the same, is in ``bench/mode_questions.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.client import BatonClient, Chunk, Finished
from baton.errors import BatonError
from baton.request import Handover, OutputOptions, Role
from bench import evidence
from bench.corpus import Corpus
from bench.exactness import TIE_GAP_FLOAT32, OracleAnswer
from bench.fleet_under_test import FleetUnderTest, running_fleet
from bench.mode_questions import (
    LOGPROB_GAP,
    PROMPT_LENGTHS,
    TOP_COUNT,
    HeardMode,
    ModeVerdict,
    Question,
    judge_mode,
    questions,
)
from bench.oracle import OraclePrompt
from bench.questions import ask_oracle_in_words
from bench.real_fleet import fleet_config
from bench.soaking import SEED, model_directory, say
from fleet.config import FleetConfig

ASK_TIMEOUT_S = 600.0
SIDE_BY_SIDE = 16
DEATH_AFTER = (2, 5, 9)
"""Tokens that half of the answers of a batch have when their worker is killed; batches take them in turn."""
KV_CACHE_BYTES = 2**30
MAX_RUNNING_COUNT = 64
RESTART_WITHIN_S = 240.0
ORACLE_CONCURRENCY = 8


async def ask_mode(client: BatonClient, question: Question, heard: HeardMode) -> HeardMode:
    """Fills ``heard`` as the answer comes, so that others can watch."""
    stream = client.generate(
        question.prompt_token_ids,
        timeout=ASK_TIMEOUT_S,
        sampling=question.mode.sampling,
        stop=question.mode.stop,
        output=OutputOptions(wants_text=True, wants_token_ids=True, top_logprob_count=TOP_COUNT),
    )
    try:
        async with aclosing(stream) as events:
            async for event in events:
                match event:
                    case Chunk():
                        heard.token_ids.extend(event.token_ids)
                        heard.text += event.text
                        heard.logprobs.extend(event.logprobs)
                    case Finished():
                        heard.finished = event
    except BatonError as error:
        heard.error = error
    return heard


async def ask_both_oracles(model: Path, prompts: Sequence[OraclePrompt], *options: str) -> dict[str, OracleAnswer]:
    """Half of the prompts of one monolithic engine, half of another just like it, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    halves = [prompts[place::2] for place in (0, 1)]
    answers = await asyncio.gather(
        *(
            ask_oracle_in_words(
                model, half, "--dtype", "float32", "--cores", str(cores[place % len(cores)]), *options
            )
            for place, half in enumerate(halves)
            if half
        )
    )
    return {name: answer for half in answers for name, answer in half.items()}


class Asking:
    """What is asked in each way, and what was said so far: it outlives an interruption."""

    def __init__(self, asked: Sequence[Question], oracle: dict[str, OracleAnswer], ends_at: float) -> None:
        self.asked = asked
        self.oracle = oracle
        self.verdicts: list[ModeVerdict] = []
        self._ends_at = ends_at

    def is_over(self, share: float = 1.0, began: float = 0.0) -> bool:
        """Whether the time for all, or ``share`` of what was left of it when a way ``began``, has passed."""
        return asyncio.get_running_loop().time() >= began + share * (self._ends_at - began)

    def judge(self, question: Question, placement: str, heard: HeardMode) -> None:
        self.verdicts.append(judge_mode(question, placement, self.oracle[question.name], heard))

    async def ask(
        self, fleet: FleetUnderTest, questions: Sequence[Question], placement: str, is_over: Callable[[], bool]
    ) -> None:
        """``SIDE_BY_SIDE`` at once; no further ones when ``is_over``."""
        slots = asyncio.Semaphore(SIDE_BY_SIDE)
        async with fleet.client() as client:

            async def one(question: Question) -> None:
                async with slots:
                    if not is_over():
                        self.judge(question, placement, await ask_mode(client, question, HeardMode()))

            await asyncio.gather(*(one(question) for question in questions))

    async def ask_with_a_death(
        self, fleet: FleetUnderTest, questions: Sequence[Question], after_token_count: int
    ) -> list[Question]:
        """All at once, and the decode worker is killed when half of the answers have ``after_token_count`` tokens.

        Its engine is stopped (SIGSTOP) until every answer has its first token, which prefill draws: prefill is the
        slower of the two here, and without this the worker would die with two or three answers in hand. Returns the
        questions that ended before their worker did.
        """
        heards = [HeardMode() for _ in questions]
        (victim,) = fleet.ids(Role.DECODE)
        victim_pid = fleet.pid(victim)
        engine_pids = children_of(victim_pid)
        async with fleet.client() as client:
            _signal(engine_pids, signal.SIGSTOP)
            try:
                tasks = [
                    asyncio.create_task(ask_mode(client, question, heard))
                    for question, heard in zip(questions, heards, strict=True)
                ]
                await _until(lambda: all(h.token_ids or t.done() for h, t in zip(heards, tasks, strict=True)))
                _signal(engine_pids, signal.SIGCONT)
                enough = (len(questions) + 1) // 2
                await _until(
                    lambda: sum(len(h.token_ids) >= after_token_count or t.done()
                                for h, t in zip(heards, tasks, strict=True)) >= enough
                )  # fmt: skip
            finally:
                _signal(engine_pids, signal.SIGCONT)  # who is stopped cannot see that its parent is gone
                fleet.kill(victim)
            for heard in heards:
                heard.count_at_death = len(heard.token_ids)
            await asyncio.gather(*tasks)
        missed = []
        for question, heard in zip(questions, heards, strict=True):
            if heard.finished is not None and heard.finished.phases.attempt_count == 1:
                missed.append(question)
            else:
                self.judge(question, "split, a death", heard)
        await fleet.until_ready(240)
        return missed


def children_of(pid: int) -> list[int]:
    """The processes that it started: of a worker, its engine and Python's helper for spawned processes."""
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def _until(holds: Callable[[], bool], within_s: float = ASK_TIMEOUT_S) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  what is watched has no event, and whoever is killed must not be told
            await asyncio.sleep(0.01)


async def settled(
    verdicts: Sequence[ModeVerdict], asked: Sequence[Question], oracle: dict[str, OracleAnswer], model: Path
) -> list[ModeVerdict]:
    """Wrong tokens looked at once more: some become ties."""
    differences = [Difference(each.question, each.index, each.came) for each in verdicts if each.index >= 0]
    gaps = await gaps_of(differences, asked, oracle, model)
    result = []
    for each in verdicts:
        gap = gaps.get(Difference(each.question, each.index, each.came), math.inf)
        if gap <= TIE_GAP_FLOAT32:
            each = replace(each, kind="tie", detail=f"{each.detail}, gap {gap:.6f}")
        result.append(each)
    return result


@dataclass(frozen=True, slots=True)
class Difference:
    """``came`` is the token at ``index`` of the answer to ``question`` where the oracle has another."""

    question: str
    index: int
    came: int


async def gaps_of(
    differences: Collection[Difference], asked: Sequence[Question], oracle: dict[str, OracleAnswer], model: Path
) -> dict[Difference, float]:
    """Nats by which the engine itself, after penalties and masks, puts the other token behind its best. Only of
    greedy answers: a drawn one has no such witness, and stays wrong."""
    by_name = {question.name: question for question in asked}
    doubtful = {each.question for each in differences if by_name[each.question].mode.sampling.is_greedy}
    if not doubtful:
        return {}
    prompts = [by_name[name].for_oracle() for name in sorted(doubtful)]
    processed = await ask_both_oracles(model, prompts, "--processed")
    gaps = {}
    for each in differences:
        if each.question not in doubtful:
            continue
        answer, end = processed.get(each.question), each.index + 1
        if answer is not None and answer.token_ids[:end] == oracle[each.question].token_ids[:end]:
            gaps[each] = dict(answer.rivals[each.index]).get(each.came, math.inf)
    return gaps


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode-prompts", type=int, default=14, help="prompts of each mode, asked in three ways")
    parser.add_argument("--mode-batch", type=int, default=50, help="requests in flight when a worker is killed")
    parser.add_argument("--mode-ways", nargs="*", default=["split", "local", "death"], help="split, local, death")
    parser.add_argument("--mode-minutes", type=float, default=30.0, help="after these, nothing more is asked")


async def run(options: argparse.Namespace) -> bool:
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + 60 * options.mode_minutes
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)  # as SIGINT does: what is known is written all the same
    model = model_directory()
    asked = questions(Corpus(model, SEED), options.mode_prompts, SEED)
    say(f"modes: asking the oracle {len(asked)} questions")
    oracle = await ask_both_oracles(
        model,
        [each.for_oracle() for each in asked],
        *("--concurrency", str(ORACLE_CONCURRENCY)),
        # No prompt in two steps: a seeded one would end a plain engine on CPU.
        *("--max-batched-tokens", str(ORACLE_CONCURRENCY * (max(PROMPT_LENGTHS) + 64))),
    )
    asking = Asking(asked, oracle, ends_at)
    ways = set(options.mode_ways)
    interrupted = "interrupted"
    try:
        if "local" in ways:
            await _local(asking, model)
        if ways & {"split", "death"}:
            await _split(asking, model, options.mode_batch, ways)
        asking.verdicts = await settled(asking.verdicts, asked, oracle, model)
        interrupted = ""
    finally:
        _write(
            asking, ways, interrupted or (f"out of its {options.mode_minutes:g} minutes" if asking.is_over() else "")
        )
        loop.remove_signal_handler(signal.SIGTERM)
    return all(each.kind != "wrong" for each in asking.verdicts)


async def _local(asking: Asking, model: Path) -> None:
    """Two decode workers that compute everything themselves: no order of events to keep, so both cores work."""
    began = asyncio.get_running_loop().time()
    with tempfile.TemporaryDirectory() as state:
        config = _config(model, Path(state), "local", prefill_cores="[[0]]", decode_cores="[[0], [1]]")
        async with running_fleet(config) as fleet:
            await asking.ask(fleet, asking.asked, "local", lambda: asking.is_over(0.4, began))
    _say_so_far(asking)


async def _split(asking: Asking, model: Path, batch_size: int, ways: Collection[str]) -> None:
    """Batch after batch: split, and at once again with a death, while prefill still has the prompts in its cache."""
    missed: list[Question] = []
    with tempfile.TemporaryDirectory() as state:
        config = _config(model, Path(state), "split", prefill_cores="[[0]]", decode_cores="[[1]]")
        async with running_fleet(config) as fleet:
            for number, start in enumerate(range(0, len(asking.asked), batch_size)):
                if asking.is_over():
                    return
                batch = asking.asked[start : start + batch_size]
                if "split" in ways:
                    await asking.ask(fleet, batch, "split", asking.is_over)
                if "death" in ways and not asking.is_over():
                    missed += await asking.ask_with_a_death(fleet, batch, DEATH_AFTER[number % len(DEATH_AFTER)])
                _say_so_far(asking)
            for start in range(0, len(missed), batch_size):  # the shortest answers: they must die at their beginning
                if asking.is_over():
                    return
                again = missed[start : start + batch_size]
                unharmed = await asking.ask_with_a_death(fleet, again, 1)
                say(f"modes: {len(unharmed)} of {len(again)} answers were whole with their first token")
                _say_so_far(asking)


def _config(model: Path, state: Path, placement: str, *, prefill_cores: str, decode_cores: str) -> FleetConfig:
    """A fleet in float32, with room for a whole batch, whose router waits while its decode worker starts again."""
    config = fleet_config(model, state, prefill_cores=prefill_cores, decode_cores=decode_cores, dtype="float32")
    engines = {
        role: replace(engine, kv_cache_bytes=KV_CACHE_BYTES, max_running_count=MAX_RUNNING_COUNT)
        for role, engine in config.engines.items()
    }
    router = replace(
        config.router, placement=placement, max_no_worker_wait_s=RESTART_WITHIN_S, max_queue_wait_s=RESTART_WITHIN_S
    )
    return replace(config, router=router, engines=engines)


def _say_so_far(asking: Asking) -> None:
    counts = Counter((each.placement, each.kind) for each in asking.verdicts)
    say("modes: " + ", ".join(f"{placement}: {count} {kind}" for (placement, kind), count in sorted(counts.items())))


WAYS = {"split": "split", "local": "local", "death": "split, a death"}


def _write(asking: Asking, ways: Collection[str], cut_short: str) -> None:
    """The page. ``cut_short``: why not everything was asked, if so."""
    asked, verdicts = asking.asked, asking.verdicts
    by_name = {question.name: question for question in asked}
    rows = []
    for name in dict.fromkeys(question.mode.name for question in asked):
        mine = [each for each in verdicts if by_name[each.question].mode.name == name]
        row: dict[str, Any] = {"mode": name}
        for placement in WAYS.values():
            kinds = Counter(each.kind for each in mine if each.placement == placement)
            row[placement] = (
                ", ".join(f"{kinds[kind]} {kind}" for kind in ("exact", "tie", "wrong") if kinds[kind]) or "–"
            )
        deaths = sorted(each.count_at_death for each in mine if each.count_at_death >= 0)
        row["tokens at the death"] = f"{deaths[0]} to {deaths[-1]}" if deaths else "–"
        rows.append(row)
    kinds = Counter(each.kind for each in verdicts)
    lengths = [len(question.prompt_token_ids) for question in asked]
    injected_count = sum(each.handover == Handover.OUTPUT_INJECTION.value for each in verdicts)
    was_asked = Counter(each.placement for each in verdicts)
    told_ways = ", ".join(
        f"{WAYS[way]}: {was_asked[WAYS[way]]} of {len(asked) if way in ways else 0}" for way in WAYS
    )
    summary = [
        f"{len(verdicts)} requests: {len(rows)} modes, prompts of {min(lengths)} to {max(lengths)} tokens, float32",
        f"judged of those meant to be asked: {told_ways}" + (f"; cut short: {cut_short}" if cut_short else ""),
        "compared with one monolithic engine asked in vLLM's own words: token ids, text, ending, log probabilities "
        f"(within {LOGPROB_GAP:g} nats), number of likeliest tokens, and the cumulative log probability",
        f"exact {kinds['exact']}, shown to be floating-point ties {kinds['tie']}, wrong {kinds['wrong']}",
        f"{sum(each.attempt_count > 1 for each in verdicts)} answers lost their decode worker to a SIGKILL and went "
        "on; one that was whole before its worker died is not among the deaths; "
        f"{injected_count} continued in an engine that did not draw their first token; "
        f"{sum(each.recomputed_token_count > 0 for each in verdicts)} found their KV unusable",
        f"positions whose rank differs although the log probability agrees: "
        f"{sum(each.rank_difference_count for each in verdicts)}",
        "promise (no difference that is not a tie): "
        + ("BROKEN" if kinds["wrong"] else "kept")
        + (", as far as asked" if cut_short else ""),
    ]
    told = [each for each in verdicts if each.kind != "exact"]
    evidence.write("modes", "Exact in every sampling mode", summary, rows, told)

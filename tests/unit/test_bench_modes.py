"""The judge of sampling modes: what it asks covers every mode, and it lets nothing pass that differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any, cast

import pytest

from baton.client import Chunk, Finished, PhaseTimings, TokenLogprob
from baton.errors import no_worker
from baton.request import (
    FinishReason,
    GenerateRequest,
    Handover,
    PlacementMode,
    Role,
    Sampling,
    StopConditions,
    StructureKind,
    TokenPrompt,
    Usage,
)
from baton.timeline import PHASES
from baton.transfer_report import TransferReport
from bench.exactness import OracleAnswer
from bench.fleet_under_test import FleetUnderTest
from bench.mode_questions import HeardMode, Mode, Question, judge_mode, modes
from bench.modes import Asking
from bench.oracle import MODE_KEYWORDS
from router.validation import ModelLimits, violations_of

IDS: dict[str, int] = {}


def encode(text: str) -> Sequence[int]:
    """A token a text."""
    return [IDS.setdefault(text, len(IDS))]


MODES = modes(encode, 7)


def test_each_field_of_sampling_and_each_kind_of_structure_is_asked_of_some_mode() -> None:
    for each in fields(Sampling):
        assert any(getattr(mode.sampling, each.name) != getattr(Sampling(), each.name) for mode in MODES), each.name
    kinds = {mode.sampling.structure.kind for mode in MODES if mode.sampling.structure is not None}
    assert kinds == set(StructureKind)
    for name in ("stop_sequences", "stop_token_ids", "ignore_eos", "min_output_token_count"):
        assert any(getattr(mode.stop, name) for mode in MODES), name


def test_each_keyword_the_oracle_knows_is_used_and_no_other() -> None:
    assert {word for mode in MODES for word in mode.words} == MODE_KEYWORDS


@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_each_mode_is_a_request_that_breaks_no_rule(mode: Mode) -> None:
    request = GenerateRequest(TokenPrompt((1,)), sampling=mode.sampling, stop=mode.stop)
    assert violations_of(request, ModelLimits("m", vocab_size=1000, max_context_token_count=100)) == []


@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_a_number_said_to_both_is_the_same_number(mode: Mode) -> None:
    for name in ("temperature", "top_p", "top_k", "min_p", "seed"):
        assert mode.words.get(name, getattr(Sampling(), name)) == getattr(mode.sampling, name)


QUESTION = Question("q", Mode("greedy", Sampling(), StopConditions(3), {}), (1, 2))
WANTED = OracleAnswer((5, 6), (), "ab", "stop", ((-0.5, 1), (-1.5, 3)))


def heard(**changes: Any) -> HeardMode:
    top = tuple((token_id, -1.0) for token_id in range(5))
    timings = PhaseTimings(
        dict.fromkeys(PHASES, 0.0), 0.0, TransferReport(), Handover.NONE, "p", "d", 2, PlacementMode.SPLIT, "split"
    )
    values: dict[str, Any] = {
        "token_ids": [5, 6],
        "text": "ab",
        "logprobs": [TokenLogprob(5, -0.5, 1, top), TokenLogprob(6, -1.5, 3, top)],
        "finished": Finished(FinishReason.STOP, None, 6, Usage(2, 2, 0), timings, -2.0),
    }
    return HeardMode(**{**values, **changes})


def test_an_equal_answer_is_exact_and_tells_its_attempts() -> None:
    verdict = judge_mode(QUESTION, "split", WANTED, heard())
    assert (verdict.kind, verdict.attempt_count, verdict.rank_difference_count) == ("exact", 2, 0)


def test_every_difference_is_seen() -> None:
    good = heard()
    finished = good.finished
    assert finished is not None
    first, second = good.logprobs
    for wrong in (
        heard(token_ids=[5, 7]),
        heard(token_ids=[5]),
        heard(text="aB"),
        heard(finished=replace(finished, reason=FinishReason.MAX_OUTPUT_TOKENS)),
        heard(finished=replace(finished, cumulative_logprob=None)),
        heard(finished=replace(finished, cumulative_logprob=-1.5)),
        heard(logprobs=[second, first]),
        heard(logprobs=[first]),
        heard(logprobs=[first, replace(second, logprob=-1.6)]),
        heard(logprobs=[first, replace(second, logprob=float("nan"))]),
        heard(logprobs=[first, replace(second, top=())]),
        heard(finished=None, error=no_worker("decode", 0)),
    ):
        assert judge_mode(QUESTION, "split", WANTED, wrong).kind == "wrong"
    assert judge_mode(QUESTION, "split", WANTED, heard(token_ids=[5, 7])).index == 1


def test_a_rank_alone_is_counted_and_not_wrong() -> None:
    first, second = heard().logprobs
    verdict = judge_mode(QUESTION, "split", WANTED, heard(logprobs=[first, replace(second, rank=4)]))
    assert (verdict.kind, verdict.rank_difference_count) == ("exact", 1)


class DoomedFleet:
    """One decode worker. Prompts of one token are answered at once; others are once it was killed, at the second
    attempt."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()
        self.asked_count = 0

    def ids(self, role: Role) -> list[str]:
        return [role.value]

    def pid(self, worker_id: str) -> int:
        return 0  # there is none, so it has no children to be stopped

    def kill(self, worker_id: str) -> None:
        self.killed.set()

    async def until_ready(self, timeout_s: float) -> None:
        assert self.killed.is_set()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[DoomedFleet]:
        yield self

    async def generate(self, prompt: Sequence[int], **_: object) -> AsyncGenerator[Chunk | Finished, None]:
        self.asked_count += 1
        said = heard()
        assert said.finished is not None
        is_at_once = len(prompt) == 1
        yield Chunk(0, "a", (5,), 1, tuple(said.logprobs[:1]))
        if not is_at_once:
            await self.killed.wait()
        yield Chunk(1, "b", (6,), 1, tuple(said.logprobs[1:]))
        phases = replace(said.finished.phases, attempt_count=1 if is_at_once else 2)
        yield replace(said.finished, phases=phases)

    def as_fleet(self) -> FleetUnderTest:
        return cast(FleetUnderTest, self)


async def test_an_answer_that_was_whole_before_its_worker_died_is_no_death() -> None:
    fleet = DoomedFleet()
    short, long = replace(QUESTION, name="short", prompt_token_ids=(1,)), QUESTION
    asking = Asking([short, long], dict.fromkeys(("short", "q"), WANTED), ends_at=float("inf"))
    assert await asking.ask_with_a_death(fleet.as_fleet(), [short, long], 1) == [short]
    (verdict,) = asking.verdicts
    assert (verdict.question, verdict.placement, verdict.kind) == ("q", "split, a death", "exact")
    assert (verdict.attempt_count, verdict.count_at_death) == (2, 1)


async def test_nothing_is_asked_when_time_is_up() -> None:
    fleet = DoomedFleet()
    asking = Asking([QUESTION], {"q": WANTED}, ends_at=0.0)
    await asking.ask(fleet.as_fleet(), [QUESTION], "split", asking.is_over)
    assert (asking.verdicts, fleet.asked_count) == ([], 0)


async def test_a_way_has_its_share_of_the_time_that_was_left() -> None:
    now = asyncio.get_running_loop().time()
    asking = Asking([], {}, ends_at=now + 100.0)
    assert not asking.is_over()
    assert not asking.is_over(0.9, began=now - 10.0)
    assert asking.is_over(0.1, began=now - 90.0)

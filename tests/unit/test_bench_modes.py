"""The judge of sampling modes: what it asks covers every mode, and it lets nothing pass that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest

from baton.client import Finished, PhaseTimings, TokenLogprob
from baton.errors import no_worker
from baton.request import (
    FinishReason,
    GenerateRequest,
    Handover,
    PlacementMode,
    Sampling,
    StopConditions,
    StructureKind,
    TokenPrompt,
    Usage,
)
from baton.timeline import PHASES
from baton.transfer_report import TransferReport
from bench.exactness import OracleAnswer
from bench.modes import HeardMode, Mode, Question, judge_mode, modes
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

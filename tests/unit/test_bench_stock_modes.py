"""Between two stock servers: what a router sends in each flow, what it can put right, and what its judge sees."""

from __future__ import annotations

from typing import Any

import pytest

from baton.request import Role, Sampling, StopConditions
from bench.exactness import OracleAnswer
from bench.mode_questions import Mode, Question
from bench.stock_modes import RefusedError, Router, Said, ends_the_engine, judge_stock

PARAMS = {"remote_engine_id": "p"}


class Servers(Router):
    """Answers each leg from a script and notes what was sent."""

    def __init__(self, *answers: Said | RefusedError) -> None:
        self._answers = list(answers)
        self._model_name = "m"
        self.sent: list[tuple[Role, dict[str, Any]]] = []

    async def _leg(self, role: Role, body: dict[str, Any], request_id: str) -> Said:
        self.sent.append((role, dict(body)))
        answer = self._answers.pop(0)
        if isinstance(answer, RefusedError):
            raise answer
        return answer


def question(**words: Any) -> Question:
    return Question("q", Mode("some", Sampling(), StopConditions(3), words), (1, 2))


def first(finish: str = "length") -> Said:
    return Said([5], "a", finish, [-0.5], PARAMS if finish == "length" else None)


REST = Said([6, 7], "bc", "length", [-1.0, -1.5])


async def test_where_decode_draws_it_gets_the_request_as_it_was_and_the_transfer() -> None:
    servers = Servers(first(), REST)
    said, refusal, is_missed = await servers.decode_draws(question(seed=7))
    (prefill, asked), (decode, continued) = servers.sent
    assert (prefill, decode) == (Role.PREFILL, Role.DECODE)
    assert (asked["max_tokens"], asked["kv_transfer_params"]["do_remote_decode"]) == (1, True)
    assert (continued["prompt"], continued["max_tokens"], continued["seed"]) == ([1, 2], 3, 7)
    assert continued["kv_transfer_params"] == PARAMS
    assert (said, refusal, is_missed) == (REST, "", False), "prefill's token is thrown away"


async def test_where_decode_draws_an_end_at_prefill_leaves_nothing_to_pull() -> None:
    servers = Servers(first("stop"), REST)
    _, _, is_missed = await servers.decode_draws(question())
    assert is_missed
    assert "kv_transfer_params" not in servers.sent[1][1]


async def test_a_least_length_that_prefill_refuses_is_told_and_left_out() -> None:
    servers = Servers(RefusedError("prefill 400: min_tokens"), first(), REST)
    said, refusal, _ = await servers.decode_draws(question(min_tokens=2))
    assert refusal == "prefill 400: min_tokens"
    assert [body.get("min_tokens") for _, body in servers.sent] == [2, None, 2], "decode is asked for it"
    assert said == REST


async def test_a_refusal_for_another_reason_stands() -> None:
    with pytest.raises(RefusedError):
        await Servers(RefusedError("prefill 400: prompt")).decode_draws(question())


async def test_where_prefill_draws_lengths_are_less_one_and_the_answers_are_joined() -> None:
    servers = Servers(first(), REST)
    said, _, _ = await servers.prefill_draws(question(min_tokens=2))
    assert servers.sent[0][1]["min_tokens"] == 1
    continued = servers.sent[1][1]
    assert (continued["prompt"], continued["max_tokens"], continued["min_tokens"]) == ([1, 2, 5], 2, 1)
    assert (said.token_ids, said.text, said.logprobs) == ([5, 6, 7], "abc", [-0.5, -1.0, -1.5])


async def test_where_prefill_draws_the_end_decode_is_not_asked() -> None:
    servers = Servers(first("stop"))
    said, _, is_missed = await servers.prefill_draws(question())
    assert (said.finish, len(servers.sent), is_missed) == ("stop", 1, False)


WANTED = OracleAnswer((5, 6), (), "ab", "length", ((-0.5, 1), (-1.0, 2)))
RIGHT = Said([5, 6], "ab", "length", [-0.5, -1.0])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (RIGHT, "exact"),
        (Said([5, 7], "ab", "length", [-0.5, -1.0]), "wrong"),
        (Said([5], "a", "length", [-0.5]), "wrong"),
        (Said([5, 6], "ab", "stop", [-0.5, -1.0]), "wrong"),
        (Said([5, 6], "aB", "length", [-0.5, -1.0]), "wrong"),
        (Said([5, 6], "ab", "length", [-0.5]), "logprobs wrong"),
        (Said([5, 6], "ab", "length", [-0.5, -1.1]), "logprobs wrong"),
        (Said([5, 6], "ab", "length", [-0.5, float("nan")]), "logprobs wrong"),
    ],
)
def test_every_difference_is_seen(said: Said, kind: str) -> None:
    assert judge_stock(question(), "decode draws", WANTED, said).kind == kind


def test_a_wrong_token_is_named_for_who_looks_whether_it_is_a_tie() -> None:
    verdict = judge_stock(question(), "decode draws", WANTED, Said([5, 9], "ab", "length", [-0.5, -1.0]))
    assert (verdict.index, verdict.came) == (1, 9)


def test_only_a_full_last_block_continued_by_a_token_is_kept_from_the_engine() -> None:
    full = Question("q", question().mode, tuple(range(256)))
    assert ends_the_engine(full, "prefill draws")
    assert not ends_the_engine(full, "decode draws")
    assert not ends_the_engine(question(), "prefill draws")

"""The judge of exactness: what is a tie, what is wrong. A judge that passes everything proves nothing."""

from __future__ import annotations

import math

import pytest

from bench.exactness import Answer, Case, OracleAnswer, judge

CASE = Case("a-case", (1, 2, 3), 3)
ORACLE = OracleAnswer((10, 11, 12), (((20, 0.5),), ((21, 0.1), (22, 0.125)), ((23, 2.0),)))
WANT = Answer((10, 11, 12), "abc", "MAX_OUTPUT_TOKENS")


@pytest.mark.parametrize(
    ("got", "kind"),
    [
        (WANT, "exact"),
        (Answer((10, 21, 99), "a??", "MAX_OUTPUT_TOKENS"), "tie"),  # what follows a tie cannot be compared
        (Answer((10, 22, 99), "a??", "MAX_OUTPUT_TOKENS"), "tie"),
        (Answer((20, 11, 12), "?bc", "MAX_OUTPUT_TOKENS"), "wrong"),
        (Answer((10, 77, 12), "a?c", "MAX_OUTPUT_TOKENS"), "wrong"),
        (Answer((10, 11), "ab", "MAX_OUTPUT_TOKENS"), "wrong"),
        (Answer((10, 11, 12), "abd", "MAX_OUTPUT_TOKENS"), "wrong"),
        (Answer((10, 11, 12), "abc", "STOP"), "wrong"),
    ],
)
def test_only_a_token_as_good_as_the_best_is_a_tie(got: Answer, kind: str) -> None:
    assert judge(CASE, WANT, got, ORACLE, 0.125).kind == kind


def test_a_token_that_is_no_rival_has_no_gap() -> None:
    verdict = judge(CASE, WANT, Answer((77,), "?", "MAX_OUTPUT_TOKENS"), ORACLE, 100.0)
    assert (verdict.kind, verdict.gap, verdict.index) == ("wrong", math.inf, 0)

"""What each wait of a request may take: every border, without a clock."""

from __future__ import annotations

import pytest

from router.budgets import CALL_SLACK_S, Budgets, SilenceLimits, queue_budget, time_allowed_s

LIMITS = SilenceLimits(prefill_timeout_s=20.0, gap_timeout_s=5.0)


@pytest.mark.parametrize(
    ("remaining_s", "allowed_s"),
    [
        (None, 300.0),  # no deadline of its own: the default
        (10.0, 9.95),  # a little earlier than the caller, so that it hears the phase from us
        (0.5, 0.475),  # at most 5 %
        (3600.0, 3599.95),
        (3600.05, 3600.0),
        (1e9, 3600.0),  # clamped
        (0.0, 0.0),
    ],
)
def test_a_deadline_is_cut_to_the_servers_and_ends_a_little_before_the_callers(
    remaining_s: float | None, allowed_s: float
) -> None:
    assert time_allowed_s(remaining_s, default_s=300.0, max_s=3600.0) == pytest.approx(allowed_s)


def test_a_default_above_the_maximum_is_cut_too() -> None:
    assert time_allowed_s(None, default_s=300.0, max_s=60.0) == 60.0


def test_a_worker_is_given_what_is_left_and_never_more() -> None:
    budgets = Budgets(deadline_at=110.0, limits=LIMITS)
    for now in (100.0, 104.0, 109.9):
        left_s = 110.0 - now
        for budget in (
            budgets.prefill(now),
            budgets.handoff(now, computes_prompt=False),
            budgets.handoff(now, computes_prompt=True),
            budgets.decode(now),
        ):
            assert budget.left_s == pytest.approx(left_s)
            assert budget.call_timeout_s <= budget.left_s


def test_a_call_outlasts_our_patience_so_that_its_own_end_never_looks_like_a_deadline() -> None:
    budget = Budgets(deadline_at=1000.0, limits=LIMITS).prefill(0.0)
    assert budget.silence_s == 20.0
    assert budget.call_timeout_s == 20.0 + CALL_SLACK_S


def test_silence_is_counted_by_what_the_worker_is_doing() -> None:
    budgets = Budgets(deadline_at=1000.0, limits=LIMITS)
    assert budgets.handoff(0.0, computes_prompt=False).silence_s == 5.0
    assert budgets.handoff(0.0, computes_prompt=True).silence_s == 20.0
    assert budgets.decode(0.0).silence_s == 5.0
    patient = Budgets(deadline_at=1000.0, limits=SilenceLimits(prefill_timeout_s=1.0, gap_timeout_s=5.0))
    assert patient.handoff(0.0, computes_prompt=True).silence_s == 5.0


def test_a_passed_deadline_leaves_nothing() -> None:
    assert Budgets(deadline_at=5.0, limits=LIMITS).decode(5.0).left_s == 0.0
    assert Budgets(deadline_at=5.0, limits=LIMITS).prefill(6.0).call_timeout_s < 0


@pytest.mark.parametrize(("left_s", "margin_s"), [(100.0, 0.25), (1.0, 0.25), (0.4, 0.1), (0.0, 0.0), (-1.0, 0.0)])
def test_a_wait_in_line_ends_with_a_word_before_the_deadline(left_s: float, margin_s: float) -> None:
    budget = queue_budget(50.0, 50.0 + left_s, max_wait_s=60.0, no_worker_s=10.0, reply_margin_s=0.25)
    assert budget.last_word_at == pytest.approx(50.0 + left_s - margin_s)
    assert (budget.no_worker_at, budget.give_up_at) == (60.0, 110.0)


@pytest.mark.parametrize("key", ["prefill_timeout_s", "gap_timeout_s"])
def test_a_limit_that_is_none_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        SilenceLimits(**{key: 0.0})

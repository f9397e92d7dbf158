"""A late pull is taken back for certain or kept in quarantine; nothing in between, and each is told once."""

from __future__ import annotations

import pytest

from kvtransfer.pull_deadlines import Late, PullDeadlines


def test_a_pull_that_ends_in_time_is_never_late() -> None:
    deadlines = PullDeadlines(10.0)
    deadlines.begin("a", 100.0)
    assert deadlines.late(109.9) == Late()
    deadlines.ended("a")
    assert deadlines.late(1e9) == Late()
    assert len(deadlines) == 0


def test_a_pull_whose_read_was_not_posted_is_taken_back_and_forgotten() -> None:
    deadlines = PullDeadlines(10.0)
    deadlines.begin("a", 100.0)
    assert deadlines.late(110.0) == Late(taken_back=("a",))
    assert deadlines.late(111.0) == Late()
    assert "a" not in deadlines
    assert deadlines.quarantined_count == 0


def test_a_pull_whose_read_was_posted_is_given_up_once_and_stays_until_the_read_is_over() -> None:
    deadlines = PullDeadlines(10.0)
    deadlines.begin("a", 100.0)
    deadlines.posted("a")
    assert deadlines.late(110.0) == Late(given_up=("a",))
    assert deadlines.late(111.0) == Late()
    assert deadlines.quarantined_count == 1
    deadlines.ended("a")
    assert deadlines.quarantined_count == 0
    assert len(deadlines) == 0


def test_the_deadline_runs_from_the_first_word_of_a_pull_not_from_its_posting() -> None:
    deadlines = PullDeadlines(10.0)
    deadlines.begin("a", 100.0)
    deadlines.begin("a", 109.0)
    deadlines.posted("a")
    assert deadlines.late(110.0).given_up == ("a",)


def test_late_pulls_are_counted_whatever_became_of_them() -> None:
    deadlines = PullDeadlines(1.0)
    for name in "abc":
        deadlines.begin(name, 0.0)
    deadlines.posted("c")
    deadlines.late(5.0)
    assert deadlines.late_count == 3
    deadlines.ended("c")
    deadlines.ended("c")
    assert len(deadlines) == 0


def test_a_pull_whose_caller_left_ends_at_once_unless_its_read_was_posted() -> None:
    deadlines = PullDeadlines(10.0)
    deadlines.begin("a", 100.0)
    deadlines.begin("b", 100.0)
    deadlines.posted("b")
    assert deadlines.withdraw("a")
    assert not deadlines.withdraw("a")
    assert not deadlines.withdraw("b"), "what is posted may still write: its blocks are nobody else's"
    assert deadlines.late(110.0) == Late(given_up=("b",))
    assert deadlines.late_count == 1


def test_what_is_not_under_way_is_not_posted_into_being() -> None:
    deadlines = PullDeadlines(1.0)
    deadlines.posted("a")
    assert "a" not in deadlines


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_that_never_comes_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="pull_timeout_s"):
        PullDeadlines(timeout_s)

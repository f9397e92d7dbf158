"""Whoever leaves, wherever the request is, leaves nothing behind: the soak's drill, a sample."""

from __future__ import annotations

from collections import Counter

from baton.testing import run_virtual
from bench.cancels import Stage, rows_of, simulated_cancels


def test_a_cancel_at_any_stage_frees_every_engine_within_a_second() -> None:
    cancels = run_virtual(simulated_cancels(150, seed=3))
    assert Counter(each.stage for each in cancels) == dict.fromkeys(Stage, 30)
    assert max(each.free_after_s for each in cancels) < 1.0
    at = {stage: {each.at for each in cancels if each.stage is stage} for stage in Stage}
    assert at[Stage.PREFILLING] == {"prefilling"}
    assert at[Stage.HELD] == {"held"}
    assert at[Stage.QUEUED] == {"ordered"}
    assert "ordered" in at[Stage.PULLING]
    assert at[Stage.DECODING] <= {"adopted", "decoding"}


def test_a_cancelled_read_keeps_its_blocks_until_it_is_over() -> None:
    cancels = run_virtual(simulated_cancels(150, seed=3))
    pulling = [each.free_after_s for each in cancels if each.stage is Stage.PULLING]
    others = [each.free_after_s for each in cancels if each.stage is Stage.HELD]
    assert max(pulling) > 5 * max(others), "a read under way was called over at once"


def test_figures_are_told_by_stage() -> None:
    rows = rows_of(run_virtual(simulated_cancels(10, seed=1)), "simulated")
    assert [row["cancelled while"] for row in rows] == [stage.value for stage in Stage]
    assert {row["cancels"] for row in rows} == {2}

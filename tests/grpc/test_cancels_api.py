"""Callers that leave over real sockets, a sample of the soak's: every engine lets go and nothing is left."""

from __future__ import annotations

import asyncio

import pytest

from bench.cancels_api import STAGES, ApiCancel, api_cancels, percentile, rows_of


def test_a_callers_cancel_reaches_the_engine_and_every_block_comes_back() -> None:
    cancels = asyncio.run(api_cancels(40, seed=5))  # raises where the workers' books do not balance
    assert len(cancels) == 40
    assert {each.stage for each in cancels} == set(STAGES)
    assert len({each.generation_id for each in cancels}) == 40
    reached = [each.abort_s for each in cancels if each.abort_s is not None]
    assert len(reached) >= 10, "few were in an engine when they were cancelled: the test shows nothing"
    assert max(reached) < 300, "no timer of 600 s did it"
    assert [row["cancelled in"] for row in rows_of(cancels)] == [*STAGES, "all"]


def test_figures_count_those_that_no_engine_had_and_those_that_were_done_apart() -> None:
    cancels = [
        ApiCancel("prefill", "a", 0.001),
        ApiCancel("prefill", "b", None),
        ApiCancel("decode", "c", 0.003),
        ApiCancel("decode", "d", None, ended_itself=True),
    ]
    rows = {row["cancelled in"]: row for row in rows_of(cancels)}
    assert rows["prefill"]["in no engine then"] == 1
    assert (rows["decode"]["aborted"], rows["decode"]["done by themselves"]) == (1, 1)
    assert rows["decode"]["in no engine then"] == 0
    assert rows["all"]["max, ms"] == "3.0"


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentiles_are_nearest_ranks(share: float, value: int) -> None:
    assert percentile([float(each) for each in range(1, 101)], share) == value

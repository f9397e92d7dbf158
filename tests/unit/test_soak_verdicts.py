"""The judges of the soak's sections can fail: each finding that forbids "kept" does so."""

from __future__ import annotations

import pytest

from bench.cancels_api import ApiCancel, judged, missing
from bench.soak_resume import judge_memory, lacking_resumes
from bench.soak_structures import verdict_of


def test_a_leg_that_was_done_by_itself_is_no_abort() -> None:
    left_at = {"g.1": (10.02, True), "g.2": (9.0, False), "other.1": (10.5, False)}
    assert judged("decode", "g", 10.0, left_at) == ApiCancel("decode", "g", None, ended_itself=True)
    cancel = judged("decode", "g", 10.0, {**left_at, "g.3": (10.03, False)})
    assert cancel.abort_s == pytest.approx(0.03)
    assert not cancel.ended_itself
    assert judged("prefill", "absent", 10.0, left_at) == ApiCancel("prefill", "absent", None)


def test_cancels_that_reach_no_engine_or_abort_nothing_are_no_proof() -> None:
    aborted, done = ApiCancel("decode", "a", 0.01), ApiCancel("decode", "b", None, ended_itself=True)
    nowhere = ApiCancel("prefill", "c", None)
    assert missing([aborted] * 80 + [done] * 5 + [nowhere] * 15) == []
    assert missing([aborted] * 60 + [nowhere] * 40) == ["only 60 of 100 had a leg in an engine"]
    assert missing([aborted] * 80 + [done] * 20) == ["only 80 of 100 that had a leg were aborted"]
    assert missing([]) == ["only 0 of 0 had a leg in an engine"]


def test_only_answers_that_were_neither_wrong_nor_cut_always_parse() -> None:
    assert verdict_of(0, 0, 0) == "kept"
    assert verdict_of(0, 3, 0) == "3 cut by the token limit, 0 wrong"
    assert verdict_of(1, 3, 0).startswith("BROKEN: 1 wrong")
    assert verdict_of(0, 0, 2).startswith("BROKEN")


def test_memory_is_judged_by_the_slope_of_the_waves_after_the_first_and_only_of_many_streams() -> None:
    mebibyte = 2**20
    flat = [{"router-0": 90 * mebibyte, "router-1": 90 * mebibyte}] * 3
    leaking = [*flat[:2], {"router-0": 90 * mebibyte, "router-1": 102 * mebibyte}]
    words, is_kept = judge_memory(flat, 1000)
    assert is_kept
    assert "1000 streams" in words
    assert words.endswith("at most 8192: kept")
    words, is_kept = judge_memory(leaking, 1000)
    assert not is_kept
    assert "router-1 +12583" in words
    words, is_kept = judge_memory(leaking, 20)
    assert is_kept
    assert words.startswith("too few to judge memory")


def test_cuts_and_restarts_that_nobody_resumed_from_are_no_proof() -> None:
    assert lacking_resumes("cuts", {"attached": 5, "continued": 9}, {"attached": 5, "continued": 5}) == []
    found = lacking_resumes("restarts", {"attached": 5}, {"continued": 50})
    assert found == ["restarts: only 0 streams were continued, 50 are the least"]

"""Many open streams on one router process, a sample: nothing dropped, nothing repeated, stalled readers and all."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from bench.open_streams import SPANS, Plan, page_of, plan_of, run


def test_two_hundred_streams_are_right_to_the_last_token_though_a_tenth_stop_reading() -> None:
    plan = Plan(
        stream_count=200,
        step_s=0.1,
        span_s=1.0,
        per_s=150.0,
        stalled_share=0.1,
        worker_count=2,
        client_count=1,
        turn_count=1,
    )
    report = asyncio.run(run(plan))
    assert report.wrong == ()
    assert (report.begun_count, report.finished_count) == (200, 200)
    assert report.is_complete
    assert report.staller_count == 20
    assert report.kept_back_count > 0, "nobody stalled"
    assert [span.name for span in report.spans] == list(SPANS)
    assert all(span.gap_count > 200 for span in report.spans)
    assert report.base_rss_bytes > 0
    page = page_of(report)
    assert "finished and right to the last token 200; wrong: none. Nothing dropped: kept" in page
    assert report.has_stalled
    assert not replace(report, kept_back_count=0).is_kept
    assert not replace(report, staller_count=10).has_stalled
    assert not replace(report, finished_count=199).is_kept
    assert page.count("| all read") == 2
    assert len(report.moves) == len(report.noises) == 1


def test_streams_long_enough_for_every_span_must_fit_their_context() -> None:
    plan, options = plan_of([])
    assert plan.stream_count == 10_000
    assert not options.write
    assert plan.token_count * plan.step_s > plan.stream_count / plan.per_s + 9 * plan.span_s
    with pytest.raises(SystemExit, match="do not fit"):
        assert plan_of(["--step-s", "0.01"])[0].token_count

"""Many open streams on one router process, a sample: nothing dropped, nothing repeated, stalled readers and all."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from bench.open_streams import ALL_READ, STALLED, Measured, Plan, Span, add_writes, itl_verdict, page_of, plan_of, run
from bench.results.statistics import Ratio


def test_a_hundred_streams_are_right_to_the_last_token_though_a_tenth_stop_reading() -> None:
    plan = Plan(
        stream_count=100,
        step_s=0.1,
        span_s=1.0,
        settle_s=0.3,
        per_s=150.0,
        worker_count=2,
        micro_batch_count=5,
        pair_count=2,
        spare_token_count=50,
    )
    report = asyncio.run(run(plan))
    assert [(wave.begun_count, wave.finished_count, wave.wrong) for wave in report.waves] == [(100, 100, ())] * 2
    assert report.is_complete
    assert report.staller_count == 10
    assert [span.name for span in report.spans] == [ALL_READ, STALLED, STALLED, ALL_READ]
    assert [span.full_count for span in report.spans] == [0, 10, 10, 0], "a stalled reader has no room for a byte"
    assert report.has_stalled
    for span in report.spans:
        assert span.gaps.seconds.size > 100
        assert span.write_gaps is not None
        assert span.stays is not None
        assert span.write_gaps.seconds.size > 100
        assert span.stays.seconds.size + span.indirect_count == span.write_gaps.seconds.size
        assert sum(unit.size for unit in span.gaps.units()) == span.gaps.seconds.size
        assert sum(span.gaps.seconds) == pytest.approx(sum(map(sum, span.gaps.units())))
    for wave in report.waves:
        assert wave.at_open.python_block_count > wave.at_end.python_block_count > report.base.python_block_count
        assert wave.at_open.rss_bytes > report.base.rss_bytes > report.base.malloc_bytes > 0
        assert wave.at_end.peak_bytes > report.base.rss_bytes
    page = page_of(report)
    assert "finished and right to the last token 100 and 100; wrong: none. Nothing dropped: kept" in page
    assert page.count("| all read |") == page.count("| a tenth stalled |") == 2
    stalled = report.spans[1]
    assert not replace(report, spans=(report.spans[0], replace(stalled, full_count=9))).has_stalled
    assert not replace(report, spans=(report.spans[0], replace(stalled, kept_back_count=0))).has_stalled
    assert not replace(report, staller_count=5).has_stalled
    assert not replace(report, waves=(report.waves[0], replace(report.waves[1], finished_count=99))).is_complete


def test_what_the_router_noted_is_dealt_out_to_the_spans_it_was_noted_in() -> None:
    plan = Plan(stream_count=100)
    nothing = Measured(np.empty(0), np.empty(0))
    report_spans = [_span(ALL_READ, 10.0, 12.0, nothing), _span(STALLED, 12.5, 14.0, nothing)]
    rows = [(9.9, 0.5, 1.0), (10.5, 0.001, 1.1), (11.0, -1.0, 1.2), (12.2, 0.5, 1.0), (13.0, 0.002, 1.3)]
    add_writes(report_spans, np.array([value for row in rows for value in row] + [14.5]))  # cut off within a row
    first, second = report_spans
    assert first.write_gaps is not None
    assert second.stays is not None
    assert first.write_gaps.seconds.tolist() == [1.1, 1.2]
    assert first.stays is not None
    assert first.stays.seconds.tolist() == [0.001]
    assert first.indirect_count == 1
    assert second.stays.seconds.tolist() == [0.002]
    assert plan.span_names[:4] == [ALL_READ, STALLED, STALLED, ALL_READ]


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.0, 0.97, 1.05), "kept"),
        (Ratio(1.04, 0.97, 1.06), "not decided: the limit is within the interval"),
        (Ratio(1.2, 1.06, 1.3), "MISSED"),
        (Ratio(1.0, None, None), "not decided: too few pairs for an interval"),
    ],
)
def test_the_verdict_is_that_of_the_whole_interval(ratio: Ratio, verdict: str) -> None:
    assert itl_verdict(ratio) == verdict


def test_streams_long_enough_for_every_span_must_fit_their_context() -> None:
    plan, options = plan_of([])
    assert plan.stream_count == 10_000
    assert not options.write
    assert plan.token_count * plan.step_s > plan.ramp_s + 2 * plan.pair_count * (plan.span_s + plan.settle_s)
    assert plan.second_token_count * plan.step_s > plan.ramp_s
    with pytest.raises(SystemExit, match="do not fit"):
        plan_of(["--step-s", "0.01"])


def _span(name: str, began_at: float, ended_at: float, gaps: Measured) -> Span:
    return Span(name, began_at, ended_at, gaps, 0, 0, 0, {}, 0.0)

"""When a run may be believed: every reason, at its border."""

from __future__ import annotations

import pytest

from bench.generator.validity import Schedule, reasons_against, schedule_of
from bench.results.records import NOT_SENT, Outcome, RequestRecord


def record(
    index: int, intended_at_s: float, lag_s: float = 0.0, outcome: Outcome = Outcome.OK, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        index=index,
        group="all",
        session_id="",
        prompt_token_count=1,
        output_token_limit=1,
        intended_at_s=intended_at_s,
        sent_at_s=intended_at_s + lag_s,
        ended_at_s=intended_at_s + 1,
        outcome=outcome,
        error=error,
    )


def reasons(records: list[RequestRecord], **changes: object) -> list[str]:
    values: dict[str, object] = {"steal_share": 0.0, **changes}
    return reasons_against(schedule_of(records, len(records)), records, **values)  # type: ignore[arg-type]


GOOD = [record(i, i * 0.1) for i in range(201)]


def test_a_run_that_kept_its_schedule_is_valid() -> None:
    assert reasons(GOOD) == []
    assert reasons(GOOD, steal_share=None) == []


def test_lag_is_told_in_percentiles() -> None:
    lags = [record(i, float(i), i / 1000) for i in range(101)]  # 0 to 100 ms
    schedule = schedule_of(lags, 120)
    assert schedule.lag_s == pytest.approx({"p50": 0.050, "p90": 0.090, "p99": 0.099, "max": 0.100})
    assert (schedule.planned_count, schedule.sent_count, schedule.not_sent_count) == (120, 101, 0)


def test_a_late_generator_makes_a_run_invalid() -> None:
    late = [record(i, i * 0.1, 0.006 if i % 50 == 0 else 0.0) for i in range(201)]  # 2.5% of them
    (reason,) = reasons(late)
    assert "Schedule lag p99 is 6.0 ms (limit 5 ms)" in reason
    seldom = [record(i, i * 0.1, 0.006 if i == 7 else 0.0) for i in range(201)]
    assert reasons(seldom) == []


def test_a_rate_below_99_percent_of_the_planned_one_makes_a_run_invalid() -> None:
    slowing = [record(i, i * 0.1, i * 0.1 * 0.02) for i in range(201)]  # by 2%
    schedule = schedule_of(slowing, 201)
    assert schedule.requested_rate_per_s == pytest.approx(10.0)
    assert schedule.achieved_rate_per_s == pytest.approx(10.0 / 1.02)
    assert any("98.0% of the planned rate" in reason for reason in reasons(slowing))
    almost = [record(i, i * 0.1, i * 0.1 * 0.009) for i in range(201)]
    assert not any("of the planned rate" in reason for reason in reasons(almost))


def test_stolen_time_makes_a_run_invalid() -> None:
    assert reasons(GOOD, steal_share=0.02) == []
    (reason,) = reasons(GOOD, steal_share=0.021)
    assert "2.1% of the machine's time" in reason


def test_an_interrupted_run_is_invalid() -> None:
    (reason,) = reasons(GOOD, is_interrupted=True)
    assert "interrupted" in reason


def test_a_run_that_sent_nothing_is_invalid() -> None:
    assert reasons([]) == ["Nothing was sent."]
    never = [record(0, 0.0, outcome=Outcome.ERROR, error=NOT_SENT)]
    assert reasons(never) == ["Nothing was sent."]


def test_a_run_in_which_nothing_succeeded_is_invalid() -> None:
    failed = [record(i, i * 0.1, outcome=Outcome.REFUSED) for i in range(201)]
    assert reasons(failed) == ["No request succeeded."]


def test_a_closed_loop_is_named_where_it_made_requests_late() -> None:
    late = [record(i, i * 0.1, 0.5) for i in range(201)]
    (reason,) = reasons(late, max_in_flight=8)
    assert reason.endswith("The loop was closed at 8 requests in flight.")


def test_turns_that_were_not_sent_are_in_no_lag_and_no_rate() -> None:
    with_unsent = [*GOOD, record(201, 500.0, outcome=Outcome.ERROR, error=NOT_SENT)]
    schedule = schedule_of(with_unsent, 202)
    assert (schedule.sent_count, schedule.not_sent_count) == (201, 1)
    assert schedule.requested_rate_per_s == pytest.approx(10.0)


def test_one_request_has_no_rate_and_is_valid() -> None:
    schedule = schedule_of([record(0, 0.0)], 1)
    assert isinstance(schedule, Schedule)
    assert (schedule.requested_rate_per_s, schedule.achieved_share) == (None, None)
    assert reasons([record(0, 0.0)]) == []

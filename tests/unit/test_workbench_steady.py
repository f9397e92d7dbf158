"""Warm-up, window and saturation by rule, on simulated queues whose truth is known."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from workbench_records import failed, queue, record

from bench.results.records import Outcome, RequestRecord
from bench.results.statistics import slope
from bench.results.steady import (
    Saturation,
    SaturationVerdict,
    Warmup,
    WarmupVerdict,
    Window,
    find_saturation,
    find_warmup,
    find_window,
    in_flight,
    mser,
    starts_unlike_the_rest,
)

NO_WARMUP = Warmup(WarmupVerdict.NONE, 0.0, 0, "")


def saturation(records: list[RequestRecord], duration_s: float = 60.0) -> Saturation:
    warmup = find_warmup(records)
    return find_saturation(records, warmup, find_window(records, warmup, duration_s))


# --- Warm-up


def test_mser_by_hand() -> None:
    # Batches of one: dropping the 10 and the 6 leaves a constant.
    assert mser([10.0, 6.0, *[1.0] * 18], batch_size=1) == (2, True)
    assert mser([1.0] * 20, batch_size=1) == (0, True)


def test_mser_is_its_formula_written_out() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.exponential(5.0, 40), rng.exponential(1.0, 160)])
    means = [float(np.mean(values[start : start + 5])) for start in range(0, 200, 5)]
    scores = []
    for d in range(len(means) // 2 + 1):
        rest = means[d:]
        centre = sum(rest) / len(rest)
        scores.append(sum((value - centre) ** 2 for value in rest) / len(rest) ** 2)
    assert mser(values) == (5 * scores.index(min(scores)), True)


def test_a_series_that_never_settles_has_no_answer() -> None:
    cut_count, settled = mser([float(value) for value in range(100)])
    assert not settled
    assert cut_count == 50


def test_a_cold_start_is_cut() -> None:
    found = [find_warmup(queue(seed, load=0.4, duration_s=120.0, cold_s=8.0)) for seed in range(20)]
    cut = [warmup for warmup in found if warmup.verdict is WarmupVerdict.CUT]
    assert len(cut) >= 18
    assert all(warmup.is_cold_start for warmup in cut)
    # 8 s at twice what it serves leave 8 s of work, which drain at 0.6 s a second: it is over after 21 s.
    assert np.median([warmup.cut_s for warmup in cut]) == pytest.approx(25.0, abs=6.0)


def test_a_run_that_starts_as_it_goes_on_is_seldom_cut() -> None:
    verdicts = Counter(find_warmup(queue(seed, load=0.7)).verdict for seed in range(60))
    assert verdicts[WarmupVerdict.NONE] >= 54


def test_an_early_burst_is_no_warmup() -> None:
    # MSER alone would drop the burst, and with it the worst of the run.
    values = [*[1.0, 1.1] * 20, *[9.0] * 10, *[1.0, 1.1] * 75]
    assert mser(values)[0] > 0
    assert not starts_unlike_the_rest(values, mser(values)[0])


def test_too_few_requests_say_nothing_of_warmup() -> None:
    found = find_warmup([record(index, at_s=float(index)) for index in range(49)])
    assert found.verdict is WarmupVerdict.CANNOT_TELL
    assert "49 requests" in found.reason
    assert find_warmup([]).cut_s == 0.0


def test_requests_without_a_token_are_cut_by_time_not_by_rule() -> None:
    slow = [record(index, at_s=float(index), ttft_s=5.0 if index < 10 else 0.1) for index in range(100)]
    lost = [failed(100 + index, at_s=index + 0.5) for index in range(4)]
    found = find_warmup([*slow, *lost])
    assert found.verdict is WarmupVerdict.CUT
    assert found.cut_s == 10.0
    assert found.cut_request_count == 14


# --- Window


def test_the_window_is_from_the_cut_to_the_end_of_the_schedule_or_the_last_turn() -> None:
    records = [record(index, at_s=float(index)) for index in range(9)]
    warmup = Warmup(WarmupVerdict.CUT, 2.0, 2, "")
    window = find_window(records, warmup, duration_s=10.0)
    assert (window.start_s, window.end_s) == (2.0, 10.0)
    assert [r.index for r in records if window.holds(r.intended_at_s)] == [*range(2, 9)]
    later = find_window([*records, failed(9, at_s=14.0)], warmup, duration_s=10.0)
    assert (later.end_s, later.schedule_end_s) == (14.0, 10.0)


def test_a_load_that_falls_off_after_the_schedule_does_not_hide_its_growth() -> None:
    grown = queue(2, load=1.8)
    tail = [record(1000 + index, at_s=60.0 + index, ttft_s=0.1) for index in range(100)]
    found = saturation([*grown, *tail])
    assert found.verdict is SaturationVerdict.SATURATED
    assert found.span.end_s == 60.0


def test_a_burst_has_the_length_of_its_answers() -> None:
    window = find_window([record(ttft_s=1.0, gaps_s=(0.5,))], NO_WARMUP, duration_s=None)
    assert (window.start_s, window.end_s) == (0.0, 1.5)
    assert find_window([], NO_WARMUP, None) == Window(0.0, 0.0)


# --- Saturation


def test_in_flight_counts_from_intended_time_to_end() -> None:
    records = [record(at_s=0.0, ttft_s=1.0, gaps_s=(1.0,)), record(at_s=1.5, ttft_s=1.0, gaps_s=())]
    assert in_flight(records, [-0.1, 0.0, 1.0, 1.5, 1.9, 2.1, 2.6]).tolist() == [0, 1, 1, 2, 2, 1, 0]


def test_a_request_that_ended_before_it_was_due_was_never_in_flight() -> None:
    # A turn whose former turn failed is recorded so.
    assert in_flight([failed(at_s=5.0, ended_at_s=1.0)], [0.0, 2.0, 6.0]).tolist() == [0, 0, 0]


def test_a_start_that_was_cut_for_being_faster_is_judged_for_growth() -> None:
    records = queue(3, load=1.5)
    faster = Warmup(WarmupVerdict.CUT, 25.0, 100, "", is_cold_start=False)
    assert find_saturation(records, faster, find_window(records, faster, 60.0)).span.start_s < 2.0
    colder = Warmup(WarmupVerdict.CUT, 25.0, 100, "", is_cold_start=True)
    assert find_saturation(records, colder, find_window(records, colder, 60.0)).span.start_s == 25.0


@pytest.mark.parametrize(
    ("load", "right", "wrong", "fewest_right", "most_wrong"),
    [
        (0.3, SaturationVerdict.STEADY, SaturationVerdict.SATURATED, 32, 2),
        (0.7, SaturationVerdict.STEADY, SaturationVerdict.SATURATED, 32, 3),
        (1.5, SaturationVerdict.SATURATED, SaturationVerdict.STEADY, 38, 1),
        (2.0, SaturationVerdict.SATURATED, SaturationVerdict.STEADY, 39, 0),
    ],
)
def test_queues_are_told_apart_by_their_growth(
    load: float, right: SaturationVerdict, wrong: SaturationVerdict, fewest_right: int, most_wrong: int
) -> None:
    verdicts = Counter(saturation(queue(seed, load=load)).verdict for seed in range(40))
    assert verdicts[right] >= fewest_right
    assert verdicts[wrong] <= most_wrong


def test_the_slopes_are_those_of_scipy_and_the_margin_no_narrower() -> None:
    records = queue(3, load=1.5)
    found = saturation(records)
    assert found.in_flight is not None
    assert found.ttft is not None
    edges = np.linspace(found.span.start_s, found.span.end_s, 21)
    times = (edges[:-1] + edges[1:]) / 2
    ttfts = [
        np.mean([r.ttft_s for r in records if low <= r.intended_at_s < high])
        for low, high in itertools.pairwise(edges)
    ]
    theirs = scipy.stats.linregress(times, ttfts)
    assert found.ttft.per_s == pytest.approx(theirs.slope)
    assert found.ttft.lower_per_s <= theirs.slope - scipy.stats.t.ppf(0.95, 18) * theirs.stderr + 1e-12
    # A queue fed 1.5 times what it serves grows by the rest: (1.5 - 1) / 0.2 requests a second.
    assert found.in_flight.per_s == pytest.approx(2.5, rel=0.35)


def test_a_cold_start_is_not_taken_for_the_opposite_of_growth() -> None:
    records = queue(5, load=1.6, cold_s=2.0)
    assert saturation(records).verdict is SaturationVerdict.SATURATED


def test_a_short_run_cannot_tell() -> None:
    found = saturation(queue(1, load=2.0, duration_s=8.0), 8.0)
    assert found.verdict is SaturationVerdict.CANNOT_TELL
    assert found.reason.startswith("too short")
    assert saturation([]).verdict is SaturationVerdict.CANNOT_TELL


def test_a_server_that_still_fills_cannot_tell() -> None:
    # Long answers: requests in flight grow for as long as the first ones run, at any load.
    records = [record(index, at_s=index * 0.2, gaps_s=(0.1,) * 300) for index in range(300)]
    found = saturation(records)
    assert found.verdict is SaturationVerdict.CANNOT_TELL
    assert "lifetimes" in found.reason


def test_a_server_that_turns_requests_away_is_saturated_however_flat_its_latency() -> None:
    refused = [failed(index, at_s=index * 0.2, outcome=Outcome.REFUSED) for index in range(2, 300, 5)]
    records = [*refused, *(record(index, at_s=index * 0.2) for index in range(300) if index % 5 != 2)]
    found = saturation(records)
    assert found.verdict is SaturationVerdict.SATURATED
    assert found.turned_away_share == pytest.approx(0.2, abs=0.01)
    assert "turned away 60 of" in found.reason


def test_one_refusal_is_no_saturation() -> None:
    records = [record(index, at_s=index * 0.2) for index in range(299)]
    records.append(failed(299, at_s=59.9, outcome=Outcome.TIMEOUT))
    assert saturation(records).verdict is SaturationVerdict.STEADY


def test_growth_of_one_alone_cannot_tell() -> None:
    # Answers get longer, so that more are in flight; first tokens come as ever.
    records = [record(index, at_s=index * 0.2, gaps_s=(0.02 * index / 10,) * 10) for index in range(300)]
    found = saturation(records)
    assert found.verdict is SaturationVerdict.CANNOT_TELL
    assert found.reason == "growing: requests in flight; not growing: TTFT"


def test_neighbouring_spans_that_have_something_in_common_widen_the_margin() -> None:
    rng = np.random.default_rng(2)
    noise = [0.0]
    for _ in range(299):
        noise.append(0.97 * noise[-1] + float(rng.normal()) * 0.02)
    records = [record(index, at_s=index * 0.2, ttft_s=1.0 + noise[index]) for index in range(300)]
    found = saturation(records)
    assert found.ttft is not None
    edges = np.linspace(found.span.start_s, found.span.end_s, 21)
    times = (edges[:-1] + edges[1:]) / 2
    means = [
        np.mean([r.ttft_s for r in records if low <= r.intended_at_s < high])
        for low, high in itertools.pairwise(edges)
    ]
    plain = slope(times, np.array(means))
    assert found.ttft.per_s == pytest.approx(plain.per_s, rel=0.02)
    assert found.ttft.lower_per_s < plain.lower_bound() - 0.3 * plain.standard_error

"""Arrival processes: exact where they are exact, and of the right distribution where they are random."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.traffic.pacers import (
    Constant,
    Gamma,
    Pacer,
    Poisson,
    Ramp,
    Replay,
    Steps,
    Users,
    Weibull,
    detect_bin_s,
    parse_pacer,
)

EVERY_SPELLING = (
    "constant:2",
    "poisson:2.5",
    "gamma:2.5,cv=4",
    "weibull:2,shape=0.6",
    "ramp:1..8",
    "steps:1x30,2.5x30",
    "users:2x30,8x30,every=10",
)


class UnitGaps(random.Random):
    """Every exponential gap is its mean."""

    def expovariate(self, lambd: float = 1.0) -> float:
        return 1 / lambd


def gaps_of(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_constant_times_are_exact_and_do_not_drift() -> None:
    assert Constant(2).times_s(2.0, random.Random(0)) == [0.0, 0.5, 1.0, 1.5]
    assert Constant(3).times_s(1000.0, random.Random(0)) == [i / 3 for i in range(3000)]


def name_of(value: object) -> str:
    """The same in every process: that of a distribution of scipy's would be an address."""
    return repr(value) if isinstance(value, Poisson | Gamma | Weibull) else "scipy's"


@pytest.mark.parametrize(
    ("pacer", "gap_cdf"),
    [
        (Poisson(2.5), stats.expon(scale=1 / 2.5).cdf),
        (Gamma(2.5, cv=0.5), stats.gamma(4.0, scale=1 / (2.5 * 4)).cdf),
        (Gamma(2.5, cv=4.0), stats.gamma(1 / 16, scale=16 / 2.5).cdf),
        (Weibull(2.0, shape=0.6), stats.weibull_min(0.6, scale=0.5 / math.gamma(1 + 1 / 0.6)).cdf),
        (Weibull(2.0, shape=3.0), stats.weibull_min(3.0, scale=0.5 / math.gamma(1 + 1 / 3)).cdf),
    ],
    ids=name_of,
)
def test_gaps_have_the_named_distribution(pacer: Pacer, gap_cdf: Callable[[float], float]) -> None:
    gaps = gaps_of(pacer.times_s(4000.0, random.Random(1)))
    assert len(gaps) > 3000
    # Times of a run as floats cannot tell gaps below this apart from 0, and 15% of those of a CV of 4 are.
    least = 1e-9
    seen = [gap for gap in gaps if gap > least]
    share = 1 - float(gap_cdf(least))
    assert stats.binomtest(len(seen), len(gaps), share).pvalue > 0.01
    assert stats.kstest(seen, lambda x: (gap_cdf(x) - gap_cdf(least)) / share).pvalue > 0.01


@pytest.mark.parametrize(
    ("pacer", "gap"),
    [
        (Gamma(2.0, cv=3.0), stats.gamma(1 / 9, scale=9 / 2)),
        (Gamma(2.0, cv=0.3), stats.gamma(1 / 0.09, scale=0.09 / 2)),
        (Weibull(2.0, shape=0.5), stats.weibull_min(0.5, scale=0.25)),
    ],
    ids=name_of,
)
def test_a_renewal_process_begins_in_equilibrium(pacer: Pacer, gap: stats.rv_continuous) -> None:
    """The first arrival has the residual life: CDF(x) = integral of (1 - F) up to x, over the mean gap (here 0.5)."""
    firsts = [pacer.times_s(400.0, random.Random(seed))[0] for seed in range(400)]
    grid = np.concatenate([[0.0], np.geomspace(1e-9, 400.0, 20_000)])
    survival = gap.sf(grid)
    residual = np.concatenate([[0.0], np.cumsum((survival[1:] + survival[:-1]) / 2 * np.diff(grid)) / 0.5])
    assert residual[-1] == pytest.approx(1.0, abs=0.01)
    assert stats.kstest(firsts, lambda x: np.interp(x, grid, residual)).pvalue > 0.01


@pytest.mark.parametrize(
    "pacer", [Poisson(2.0), Gamma(2.0, cv=4.0), Gamma(2.0, cv=0.25), Weibull(2.0, shape=0.5)], ids=repr
)
def test_the_mean_rate_holds_over_a_short_window_too(pacer: Pacer) -> None:
    # A renewal process with a whole gap first would be off by (CV² - 1) / 2: 7.5 of 40 for a CV of 4.
    counts = [len(pacer.times_s(20.0, random.Random(seed))) for seed in range(1500)]
    error = statistics.stdev(counts) / math.sqrt(len(counts))
    assert abs(statistics.fmean(counts) - 40) < 3.5 * error
    assert error < 1.0


@pytest.mark.parametrize("cv", [0.2, 1.0, 2.0])
def test_gamma_gaps_have_the_cv_that_was_asked_for(cv: float) -> None:
    gaps = gaps_of(Gamma(5.0, cv=cv).times_s(20_000.0, random.Random(3)))
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05)
    assert len(gaps) / 20_000 == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("shape", [0.4, 1.0, 2.5])
def test_weibulls_cv_is_that_of_scipy(shape: float) -> None:
    independent = stats.weibull_min(shape)
    assert Weibull(1.0, shape).cv == pytest.approx(independent.std() / independent.mean())


def test_a_ramp_places_arrivals_where_the_integral_of_its_rate_says() -> None:
    # From 0 to 2 in 4 s the integral is t² / 4: it reaches 1, 2 and 3 at 2, √8 and √12.
    up = Ramp(0, 2).times_s(4.0, UnitGaps())
    assert up == pytest.approx([2.0, math.sqrt(8), math.sqrt(12)])
    # Falling from 2 to 0 it is 2 t - t² / 4, which is the same backwards.
    down = Ramp(2, 0).times_s(4.0, UnitGaps())
    assert down == pytest.approx([4 - math.sqrt(12), 4 - math.sqrt(8), 2.0])
    # Level: every 1 / rate.
    assert Ramp(2, 2).times_s(2.0, UnitGaps()) == pytest.approx([0.5, 1.0, 1.5])


@pytest.mark.parametrize(("first", "last"), [(1.0, 8.0), (8.0, 1.0), (0.0, 5.0), (5.0, 0.0)])
def test_a_ramps_arrivals_are_even_in_the_integral_of_its_rate(first: float, last: float) -> None:
    duration_s = 500.0
    times = np.array(Ramp(first, last).times_s(duration_s, random.Random(4)))
    total = (first + last) / 2 * duration_s
    assert abs(len(times) - total) < 4 * math.sqrt(total)
    integral = first * times + (last - first) / duration_s * times**2 / 2
    assert stats.kstest(integral / total, "uniform").pvalue > 0.01


def test_steps_keep_the_rate_of_each_stage() -> None:
    assert Steps(((1, 2.0), (0, 1.0), (2, 2.0))).times_s(5.0, UnitGaps()) == pytest.approx([1.0, 3.5, 4.0, 4.5])
    times = np.array(Steps(((2, 1000.0), (0, 500.0), (8, 1000.0))).times_s(2500.0, random.Random(5)))
    assert abs(np.sum(times < 1000) - 2000) < 4 * math.sqrt(2000)
    assert np.sum((times >= 1000) & (times < 1500)) == 0
    assert abs(np.sum(times >= 1500) - 8000) < 4 * math.sqrt(8000)


def test_every_user_starts_a_session_in_every_period_whatever_the_server_does() -> None:
    times = Users(((3, 40.0), (10, 40.0), (2, 20.0)), every_s=10.0).times_s(100.0, random.Random(6))
    per_period = [sum(10 * k <= at_s < 10 * (k + 1) for at_s in times) for k in range(10)]
    assert per_period == [3, 3, 3, 3, 10, 10, 10, 10, 2, 2]
    # Those of the first stage that stay keep their clocks.
    first = {round(at_s % 10, 6) for at_s in times if at_s < 40}
    last = {round(at_s % 10, 6) for at_s in times if at_s >= 80}
    assert len(last) == 2
    assert last < first


def test_users_that_come_back_have_joined_anew() -> None:
    times = Users(((1, 10.0), (0, 10.0), (1, 10.0)), every_s=5.0).times_s(30.0, random.Random(7))
    assert [sum(begin <= at_s < begin + 10 for at_s in times) for begin in (0, 10, 20)] == [2, 0, 2]


@pytest.mark.parametrize("spelling", EVERY_SPELLING)
def test_times_ascend_within_the_duration_and_come_again_with_the_seed(spelling: str) -> None:
    pacer = parse_pacer(spelling)
    times = pacer.times_s(60.0, random.Random("seed"))
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 60
    assert times == pacer.times_s(60.0, random.Random("seed"))
    if spelling != "constant:2":
        assert times != pacer.times_s(60.0, random.Random("another seed"))


@pytest.mark.parametrize(
    "spelling", ["constant:2", "poisson:2.5", "gamma:2.5,cv=4", "weibull:2,shape=0.6", "steps:1x30,2x30"]
)
def test_a_longer_run_begins_with_the_shorter_one(spelling: str) -> None:
    pacer = parse_pacer(spelling)
    long = pacer.times_s(60.0, random.Random(8))
    assert pacer.times_s(20.0, random.Random(8)) == [at_s for at_s in long if at_s < 20]


@pytest.mark.parametrize("spelling", EVERY_SPELLING)
def test_facts_are_json_and_spell_the_pacer_again(spelling: str) -> None:
    pacer = parse_pacer(spelling)
    facts = json.loads(json.dumps(pacer.facts()))
    assert facts["spelling"] == spelling
    assert parse_pacer(str(facts["spelling"])) == pacer
    assert facts["name"] == spelling.partition(":")[0]


@given(st.floats(1e-6, 1e6), st.floats(0.01, 100))
def test_a_spelling_loses_no_digit(rate: float, cv: float) -> None:
    for pacer in (Gamma(rate, cv), Ramp(rate, cv), Steps(((rate, cv), (cv, rate))), Users(((3, rate),), every_s=cv)):
        assert parse_pacer(str(pacer.facts()["spelling"])) == pacer


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("regular:2", "no pacer is called 'regular'"),
        ("poisson", "parameters are missing"),
        ("poisson:", "parameters are missing"),
        ("poisson:fast", "'fast' is not a number"),
        ("poisson:0", "rate 0 is not above 0"),
        ("poisson:nan", "not a finite number"),
        ("constant:inf", "not a finite number"),
        ("gamma:2", "'cv' is missing"),
        ("gamma:2,cw=3", "'cw' is not one of its parameters"),
        ("gamma:2,cv=3,cv=4", "'cv' is given twice"),
        ("gamma:2,3,cv=4", "one rate is needed"),
        ("gamma:2,cv=0", "cv 0 is not above 0"),
        ("weibull:2,shape=0.01", "shape 0.01 is not within"),
        ("ramp:1-8", "two rates are needed"),
        ("ramp:-1..8", "first rate -1 is not 0 or more"),
        ("ramp:0..0", "no arrivals"),
        ("steps:1x10,2", "stage '2' has no length"),
        ("steps:1x0", "length 0 is not above 0"),
        ("steps:0x10", "all stages are 0"),
        ("users:1x10", "'every' is missing"),
        ("users:1.5x10,every=3", "whole numbers"),
        ("users:-1x10,every=3", "not 0 or more"),
    ],
)
def test_a_spelling_that_cannot_be_read_says_why_and_what_is_expected(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"expected|there are") as caught:
        parse_pacer(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("spelling", ["steps:1x10,2x10", "users:1x10,2x10,every=5"])
def test_stages_that_end_before_the_run_are_an_error_and_later_ones_are_cut(spelling: str) -> None:
    pacer = parse_pacer(spelling)
    assert pacer.natural_duration_s == 20
    with pytest.raises(ValueError, match="last 20 s, and the run 21 s"):
        pacer.times_s(21.0, random.Random(0))
    assert max(pacer.times_s(15.0, random.Random(0))) < 15


@pytest.mark.parametrize(
    "spelling", ["constant:20", "poisson:20", "gamma:20,cv=3", "ramp:10..30", "weibull:20,shape=2"]
)
def test_more_arrivals_than_a_plan_holds_are_refused_before_they_are_made(spelling: str) -> None:
    with pytest.raises(ValueError, match="more than a plan may have"):
        parse_pacer(spelling).times_s(100_000.0, random.Random(0))


# ---- replay


COARSE = (0.0, 0.0, 0.0, 3.0, 3.0, 6.001, 9.0, 9.0, 9.0, 9.0)


def test_replayed_arrivals_are_spread_within_their_bins_in_the_order_of_the_trace() -> None:
    spread = Replay(COARSE, bin_s=3.0).spread_s(random.Random(1))
    assert spread == sorted(spread)
    assert len(set(spread)) == len(spread)
    for recorded_s, at_s in zip(COARSE, spread, strict=True):
        assert recorded_s <= at_s < recorded_s + 3.0


def test_no_arrival_passes_one_that_was_recorded_after_it() -> None:
    """Where a clock ticks early its bin is shorter."""
    spread = Replay((0.0,) * 50 + (1.0,) * 50, bin_s=3.0).spread_s(random.Random(1))
    assert max(spread[:50]) < 1.0
    assert 3.0 < max(spread[50:]) < 4.0


@given(
    ticks=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_no_spread_leaves_its_bin_or_changes_the_order(ticks: list[tuple[int, int]], seed: int) -> None:
    recorded = tuple(sorted(tick * 3.0 for tick, count in ticks for _ in range(count)))
    spread = Replay(recorded, bin_s=3.0).spread_s(random.Random(seed))
    assert spread == sorted(spread)
    assert all(0 <= at_s - (then - recorded[0]) <= 3.0 for then, at_s in zip(recorded, spread, strict=True))


def test_the_spread_within_a_bin_is_even() -> None:
    spread = Replay((0.0,) * 3000, bin_s=3.0).spread_s(random.Random(2))
    assert stats.kstest(spread, stats.uniform(0, 3).cdf).pvalue > 0.01


def test_without_a_bin_times_are_as_recorded_from_the_first() -> None:
    replay = Replay((5.0, 5.5, 9.0))
    assert replay.times_s(100.0, random.Random(0)) == [0.0, 0.5, 4.0]
    # Nothing recorded is lost at the end: the last arrival stands for a mean gap, too.
    assert replay.natural_duration_s == 6.0
    assert replay.times_s(6.0, random.Random(0)) == [0.0, 0.5, 4.0]


def test_a_rate_scale_compresses_time_and_keeps_the_shape() -> None:
    normal = Replay((0.0, 1.0, 1.5, 4.0)).times_s(100.0, random.Random(0))
    fast = Replay((0.0, 1.0, 1.5, 4.0), rate_scale=2.0)
    assert fast.times_s(100.0, random.Random(0)) == [at_s / 2 for at_s in normal]
    assert fast.natural_duration_s == Replay((0.0, 1.0, 1.5, 4.0)).natural_duration_s / 2


def test_slices_of_one_seed_put_together_are_the_whole() -> None:
    whole = Replay(COARSE, bin_s=3.0).arrivals(100.0, random.Random(3))
    first = Replay(COARSE, bin_s=3.0, end_s=4.5).arrivals(100.0, random.Random(3))
    second = Replay(COARSE, bin_s=3.0, start_s=4.5).arrivals(100.0, random.Random(3))
    assert [row for row, _ in [*first, *second]] == list(range(len(COARSE)))
    together = [at_s for _, at_s in first] + [at_s + 4.5 for _, at_s in second]
    assert together == pytest.approx([at_s for _, at_s in whole])
    assert Replay(COARSE, bin_s=3.0, start_s=4.5, end_s=6.0, rate_scale=3).natural_duration_s == 0.5


def test_a_share_is_kept_at_random() -> None:
    rows = [row for row, _ in Replay(tuple(map(float, range(4000))), keep_share=0.25).arrivals(9e9, random.Random(4))]
    assert abs(len(rows) - 1000) < 4 * math.sqrt(750)
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Replay(()), "without arrivals"),
        (lambda: Replay((1.0, 0.5)), "ascend"),
        (lambda: Replay((0.0, 1.0), start_s=2.0, end_s=2.0), "empty"),
        (lambda: Replay((0.0, 1.0), bin_s=-1.0), "bin -1"),
        (lambda: Replay((0.0, 1.0), rate_scale=0.0), "rate scale 0"),
        (lambda: Replay((0.0, 1.0), keep_share=1.5), "keep share 1.5"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused(make: Callable[[], Replay], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_tick_of_a_coarse_clock_is_found_and_a_fine_one_has_none() -> None:
    ticking = [tick * 3.0 + wobble for tick, wobble in itertools.product(range(200), (0.0,) * 8)]
    assert detect_bin_s(ticking) == 3.0
    wobbling = sorted((tick * 3.0 + (tick % 3 - 1) * 0.001) for tick in range(200) for _ in range(8))
    assert detect_bin_s(wobbling) == pytest.approx(3.0, abs=0.002)
    assert detect_bin_s(Poisson(3.0).times_s(500.0, random.Random(1))) == 0.0
    # Many at one instant, at instants that are no clock's: bursts, and they stay bursts.
    bursts = [at_s for at_s in Poisson(0.3).times_s(500.0, random.Random(1)) for _ in range(5)]
    assert detect_bin_s(bursts) == 0.0
    assert detect_bin_s([1.0]) == detect_bin_s([1.0, 1.0]) == 0.0

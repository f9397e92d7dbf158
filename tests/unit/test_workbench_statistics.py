"""Statistics against hand-computed values and independent implementations (numpy, scipy.stats)."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.results.statistics import (
    Interval,
    Mean,
    Percentile,
    bootstrap_ratio,
    clopper_pearson_interval,
    draw_pairs,
    expanded_confidence,
    is_enough_for_percentile,
    mean,
    needed_for_percentile,
    p50,
    p99,
    paired_ratio,
    percentile,
    percentile_interval,
    share_difference_interval,
    slope,
    stretches,
    wilson_interval,
)

finite = st.floats(-1e6, 1e6)
samples = st.lists(finite, min_size=1, max_size=60)


# --- One sample


def test_a_percentile_is_linear_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([10.0, 20.0], 90) == pytest.approx(19.0)
    assert percentile([7.0], 99) == 7.0
    assert p99([float(value) for value in range(1, 102)]) == 100.0


@given(samples, st.floats(0.0, 100.0))
def test_a_percentile_is_type_7_of_hyndman_and_fan(values: list[float], percent: float) -> None:
    # Written out again, since "the default of numpy" is what the code calls.
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    expected = ranked[low] + (place - low) * (ranked[high] - ranked[low])
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(samples, st.floats(0.0, 100.0), st.randoms(use_true_random=False))
def test_a_percentile_lies_within_the_values_and_knows_no_order(
    values: list[float], percent: float, rng: random.Random
) -> None:
    found = percentile(values, percent)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9
    shuffled = values.copy()
    rng.shuffle(shuffled)
    assert percentile(shuffled, percent) == found


@given(samples, st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_percentiles_rise(values: list[float], one: float, other: float) -> None:
    assert percentile(values, min(one, other)) <= percentile(values, max(one, other)) + 1e-9


def test_nothing_has_no_percentile_and_no_mean() -> None:
    with pytest.raises(ValueError, match="nothing"):
        p50([])
    with pytest.raises(ValueError, match="nothing"):
        mean([])


def test_a_mean_is_summed_exactly() -> None:
    assert mean([1e16, 1.0, -1e16]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0])
@pytest.mark.parametrize("n", [20, 100, 1000])
def test_bounds_of_a_percentile_by_rank_are_those_of_scipy(percent: float, n: int) -> None:
    values = np.random.default_rng(n).exponential(size=n)
    found = percentile_interval(values, percent)
    theirs = scipy.stats.quantile_test(values, p=percent / 100).confidence_interval(0.95)
    for mine, other in ((found.low, theirs.low), (found.high, theirs.high)):
        assert mine == (pytest.approx(other) if math.isfinite(other) else None)


def test_a_p99_has_no_upper_bound_below_368_values() -> None:
    # 0.99^n <= 0.025 from n = 367.03 on.
    assert percentile_interval([float(value) for value in range(367)], 99.0).high is None
    assert percentile_interval([float(value) for value in range(368)], 99.0).high == 367.0
    assert percentile_interval([], 99.0) == Interval(None, None)


def test_bounds_by_rank_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    truth = math.log(2)
    held = 0
    for _ in range(400):
        found = percentile_interval(rng.exponential(size=60), 50.0)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert held >= 0.93 * 400


# --- Shares and counts


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (1, 1), (3, 1000), (999, 1000)])
def test_intervals_of_shares_are_those_of_scipy(count: int, total: int) -> None:
    test = scipy.stats.binomtest(count, total)
    for found, method in (
        (wilson_interval(count, total), "wilson"),
        (clopper_pearson_interval(count, total), "exact"),
    ):
        theirs = test.proportion_ci(0.95, method=method)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_wilson_interval_by_hand() -> None:
    # 8 of 10: (0.8 + 1.96^2/20 +- 1.96 sqrt(0.016 + 1.96^2/400)) / (1 + 1.96^2/10)
    found = wilson_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(st.integers(0, 200), st.integers(0, 200))
def test_intervals_of_shares_hold_the_share_and_are_mirrored(count: int, rest: int) -> None:
    total = count + rest
    for interval in (wilson_interval, clopper_pearson_interval):
        found, mirrored = interval(count, total), interval(rest, total)
        if total == 0:
            assert found == Interval(None, None)
            continue
        assert found.low is not None
        assert found.high is not None
        assert 0.0 <= found.low <= count / total <= found.high <= 1.0
        assert mirrored.low == pytest.approx(1.0 - found.high, abs=1e-12)


def test_a_difference_of_shares_is_that_of_newcombe() -> None:
    # Newcombe (1998), table II, method 10, contrasts (a) 56/70 - 48/80 and (f) 10/10 - 0/10 reversed.
    found = share_difference_interval(48, 80, 56, 70)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    found = share_difference_interval(0, 10, 10, 10)
    assert (found.low, found.high) == pytest.approx((0.6075, 1.0), abs=1e-4)
    assert share_difference_interval(0, 0, 1, 2) == Interval(None, None)


def test_the_early_stopping_table() -> None:
    assert [needed_for_percentile(count) for count in (0, 1, 5, 10, 20)] == [459, 662, 1307, 2010, 3304]
    assert [needed_for_percentile(count, percent=99.9) for count in (0, 1, 5, 10, 20)] == [
        *(4603, 6636, 13105, 20140, 33097)
    ]
    assert not is_enough_for_percentile(458)
    assert is_enough_for_percentile(459)
    assert needed_for_percentile(0, percent=95.0) == 90


@pytest.mark.parametrize("count", [0, 3, 17])
@pytest.mark.parametrize("percent", [50.0, 97.0])
def test_the_number_needed_is_the_smallest(count: int, percent: float) -> None:
    needed = needed_for_percentile(count, percent=percent)
    tail = 1 - percent / 100
    assert scipy.stats.binom.cdf(count, needed, tail) <= 0.01 < scipy.stats.binom.cdf(count, needed - 1, tail)


# --- Bootstrap

ONE = {0: [[1.0]] * 3}
"""A ratio to it is the statistic itself."""


def test_a_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(5).exponential(size=80)
    found = bootstrap_ratio({0: [[value] for value in values.tolist()]}, ONE, mean, random.Random(1))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_a_ratio_of_medians_agrees_with_scipy() -> None:
    rng = np.random.default_rng(6)
    peer, base = rng.exponential(2.0, 150), rng.exponential(1.0, 120)
    found = bootstrap_ratio(
        {0: [[value] for value in peer.tolist()]}, {0: [[value] for value in base.tolist()]}, p50, random.Random(1)
    )
    theirs = scipy.stats.bootstrap(
        (peer, base),
        lambda one, other, axis: np.median(one, axis=axis) / np.median(other, axis=axis),
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert found.value == pytest.approx(float(np.median(peer) / np.median(base)))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=6), min_size=3, max_size=12),
    st.sampled_from([Mean(), Percentile(0.0), Percentile(50.0), Percentile(99.0), Percentile(100.0)]),
    st.integers(0, 2**32),
)
def test_the_fast_way_of_a_resample_is_the_statistic_of_its_values(
    units: list[list[float]], statistic: Mean | Percentile, seed: int
) -> None:
    # The same statistic, hidden from the fast way, sees every value of the resample.
    fast = draw_pairs([(units, units)], [statistic], random.Random(seed), resample_count=50)
    hidden = [lambda values: statistic(values)]
    slow = draw_pairs([(units, units)], hidden, random.Random(seed), resample_count=50)
    assert fast.a == pytest.approx(slow.a)
    assert fast.a_resamples == pytest.approx(slow.a_resamples)
    assert fast.b_resamples == pytest.approx(slow.b_resamples)


def test_gaps_of_one_request_are_drawn_together() -> None:
    # One slow request of four: by request the ratio must range widely; by gap it would look sharp.
    peer, base = {0: [[10.0] * 100] * 3 + [[1000.0] * 100]}, {0: [[10.0] * 100] * 4}
    found = bootstrap_ratio(peer, base, mean, random.Random(4))
    assert found.low == pytest.approx(1.0)
    assert found.high is not None
    assert found.high > 60.0


def test_units_are_drawn_within_their_block() -> None:
    # Two blocks of constant values: mixing units across blocks would give the mean a width.
    blocks = {0: [[1.0]] * 10, 1: [[3.0]] * 10}
    found = bootstrap_ratio(blocks, ONE, mean, random.Random(1))
    assert (found.low, found.high) == (2.0, 2.0)


def test_drift_that_both_of_a_pair_share_does_not_widen_the_interval() -> None:
    rng = random.Random(7)
    drifts = [1.0 + index for index in range(10)]
    a = {index: [[drift * rng.uniform(0.95, 1.05)] for _ in range(20)] for index, drift in enumerate(drifts)}
    b = {index: [[2 * drift * rng.uniform(0.95, 1.05)] for _ in range(20)] for index, drift in enumerate(drifts)}
    found = paired_ratio(b, a, mean, random.Random(1))
    assert found.low is not None
    assert found.high is not None
    assert 1.95 < found.low < 2.0 < found.high < 2.05
    # Paired wrongly, the drift is a difference between runs.
    crossed = paired_ratio({9 - index: units for index, units in b.items()}, a, mean, random.Random(1))
    assert crossed.low is not None
    assert crossed.low < 1.5


def test_a_difference_between_runs_widens_the_interval_of_pairs() -> None:
    # A's runs differ by a factor that no request within one shows.
    a = {index: [[1.0 + 0.5 * (index % 2)]] * 20 for index in range(10)}
    b = {index: [[1.0]] * 20 for index in range(10)}
    found = paired_ratio(b, a, mean, random.Random(1))
    assert found.value == pytest.approx(0.8)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.75
    assert found.high > 0.85


def test_few_units_widen_the_interval_as_students_t_says() -> None:
    # Hesterberg (2015), expanded percentiles: Phi(-sqrt(n/(n-1)) t).
    for n in (5, 10, 40):
        t = scipy.stats.t.ppf(0.975, n - 1)
        tail = scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)
        assert expanded_confidence(n) == pytest.approx(1 - 2 * tail)
    assert expanded_confidence(100_000) == pytest.approx(0.95, abs=1e-4)


def test_few_pairs_hold_the_truth_as_often_as_they_say() -> None:
    # Ten pairs of runs whose means differ at random; equal systems. Without the widening, 88 to 90%.
    rng = random.Random(3)
    held = 0
    for _ in range(60):
        pairs = [
            tuple([[rng.gauss(level, 0.1)] for _ in range(9)] for level in (rng.gauss(2, 0.3), rng.gauss(2, 0.3)))
            for _ in range(10)
        ]
        ratio = draw_pairs([(pair[0], pair[1]) for pair in pairs], [mean], rng, resample_count=400).ratio(0)
        held += not ratio.is_claim
    assert held >= 55


def test_two_units_are_too_few_for_an_interval() -> None:
    assert bootstrap_ratio({0: [[1.0], [2.0]]}, {0: [[1.0]] * 3}, p50, random.Random(1)).low is None
    drawn = draw_pairs([([[1.0]], [[2.0]])], [mean], random.Random(1))
    assert drawn.ratio(0).value == 2.0
    assert drawn.ratio(0).low is None
    assert drawn.difference(0) == Interval(None, None)


def test_a_ratio_to_nothing_or_to_zero_says_so() -> None:
    assert math.isnan(draw_pairs([([], [[1.0]] * 4)], [mean], random.Random(1)).ratio(0).value)
    zero = draw_pairs([([[0.0]] * 4, [[1.0]] * 4)], [mean], random.Random(1)).ratio(0)
    assert zero.value == math.inf
    assert (zero.low, zero.high) == (None, None)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio({0: [[1.0]]}, {}, mean, random.Random(1))


def test_a_seed_gives_the_same_interval_again() -> None:
    units = {0: [[math.sqrt(value)] for value in range(30)]}
    one, other, third = (bootstrap_ratio(units, ONE, mean, random.Random(seed)) for seed in (1, 1, 2))
    assert one == other
    assert one != third


def test_stretches_keep_every_value_in_order() -> None:
    joined = stretches([[float(value), -float(value)] for value in range(10)])
    assert [value for stretch in joined for value in stretch] == [
        signed for value in range(10) for signed in (float(value), -float(value))
    ]
    assert [len(stretch) for stretch in joined] == [6, 6, 6, 2]
    assert stretches([]) == []


# --- Slopes


def test_a_slope_and_its_margin_are_those_of_scipy() -> None:
    rng = np.random.default_rng(8)
    times = rng.uniform(0, 50, 40)
    values = 0.3 * times + rng.normal(size=40)
    found, theirs = slope(times, values), scipy.stats.linregress(times, values)
    assert found.per_s == pytest.approx(theirs.slope)
    assert found.standard_error == pytest.approx(theirs.stderr)
    assert found.intercept == pytest.approx(theirs.intercept)
    assert found.lower_bound() == pytest.approx(theirs.slope - scipy.stats.t.ppf(0.95, 38) * theirs.stderr)
    # One-sided: the slope is above 0 with 95% when scipy's one-sided p-value is below 5%.
    one_sided = scipy.stats.linregress(times, values, alternative="greater").pvalue
    assert (found.lower_bound() > 0) == (one_sided < 0.05)


def test_a_slope_by_hand() -> None:
    found = slope([0.0, 1.0, 2.0], [0.0, 1.0, 5.0])
    assert found.per_s == pytest.approx(2.5)
    assert found.standard_error == pytest.approx(math.sqrt(1.5 / 1 / 2))


def test_a_slope_needs_three_points_at_different_times() -> None:
    with pytest.raises(ValueError, match="three points"):
        slope([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="different times"):
        slope([1.0, 1.0, 1.0], [0.0, 1.0, 2.0])

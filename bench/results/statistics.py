"""The statistics of every table: percentiles, bootstrap intervals by independent units, shares, how many are enough.

Pure. Formulas and their sources stand in docs/workbench/statistics.md. Two rules run through it: the unit that is
resampled is a whole request (or a whole run), because the gaps of one request are not independent; and a figure that
too few observations carry says so instead of giving an interval.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Values = NDArray[np.float64]
Samples = Sequence[Sequence[float]]
"""One inner sequence per independent unit (request, or run of the streams)."""
Blocks = Mapping[int, Samples]
"""Units by block (of an ABBA order: one visit of one system)."""
Statistic = Callable[[Sequence[float]], float]
Pair = tuple[Samples, Samples]
"""One block of an interleaved measurement: the units of A and those of B, taken one after the other."""

RESAMPLE_COUNT = 2000
FEWEST_UNITS = 3
"""Fewer give no interval."""
CONFIDENCE = 0.95
WORK_LIMIT = 400_000_000
"""Values looked at by one bootstrap; larger inputs get fewer resamples, never fewer than 200."""


# --- One sample


def percentile(values: Sequence[float] | Values, percent: float) -> float:
    """Linear between the two nearest ranks, at (n - 1) * percent / 100 from the lowest: type 7 of Hyndman and Fan
    (1996), the default of numpy. Raises ``ValueError`` for no values."""
    if len(values) == 0:
        raise ValueError("a percentile of nothing")
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


@dataclass(frozen=True, slots=True)
class Percentile:
    """A percentile as a statistic that the bootstrap knows a fast way for."""

    percent: float

    def __call__(self, values: Sequence[float]) -> float:
        return percentile(values, self.percent)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean as a statistic that the bootstrap knows a fast way for."""

    def __call__(self, values: Sequence[float]) -> float:
        if len(values) == 0:
            raise ValueError("a mean of nothing")
        return math.fsum(values) / len(values)


p50 = Percentile(50.0)
p99 = Percentile(99.0)
mean = Mean()


@dataclass(frozen=True, slots=True)
class Interval:
    """Of ``CONFIDENCE`` unless said otherwise. None: the data do not bound it on that side."""

    low: float | None
    high: float | None


def percentile_interval(
    values: Sequence[float] | Values, percent: float, *, confidence: float = CONFIDENCE
) -> Interval:
    """Bounds of the true percentile from ranks alone, whatever the distribution; for independent values.

    The number of values below it is binomial(n, percent/100); each bound misses with (1 - confidence)/2 at most. A
    bound is None where even the outermost value does not carry it: p99 has no upper bound below 368 values at 95%.
    """
    _check_share(confidence, "confidence")
    ranked = np.sort(np.asarray(values, dtype=np.float64))
    n, p, tail = ranked.size, percent / 100.0, (1.0 - confidence) / 2.0
    if not 0.0 < p < 1.0:
        raise ValueError("a percentile between 0 and 100 has an interval")
    if n == 0:
        return Interval(None, None)
    below = special.bdtr(np.arange(n + 1), n, p)  # P(at most k values are below the percentile), k = 0..n
    # x(r) (r from 1) lies above the percentile with P(fewer than r are below it) = below[r - 1].
    carried_low = np.flatnonzero(below[:n] <= tail)
    carried_high = np.flatnonzero(1.0 - below[:n] <= tail)
    return Interval(
        low=float(ranked[carried_low[-1]]) if carried_low.size else None,
        high=float(ranked[carried_high[0]]) if carried_high.size else None,
    )


# --- Shares and counts


def wilson_interval(count: int, total: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Of a share; Wilson (1927), without continuity correction. Good coverage also near 0 and 1 and for few."""
    _check_count(count, total)
    _check_share(confidence, "confidence")
    if total == 0:
        return Interval(None, None)
    z = float(special.ndtri((1.0 + confidence) / 2.0))
    share = count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At the ends the bound is exact, but rounding may put it a hair inside.
    return Interval(
        0.0 if count == 0 else max(0.0, centre - half),
        1.0 if count == total else min(1.0, centre + half),
    )


def clopper_pearson_interval(count: int, total: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Of a share; the exact one of Clopper and Pearson (1934), never too narrow: for claims about failures."""
    _check_count(count, total)
    _check_share(confidence, "confidence")
    if total == 0:
        return Interval(None, None)
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if count == 0 else float(special.betaincinv(count, total - count + 1, tail))
    high = 1.0 if count == total else float(special.betaincinv(count + 1, total - count, 1.0 - tail))
    return Interval(low, high)


def share_difference_interval(
    a_count: int, a_total: int, b_count: int, b_total: int, *, confidence: float = CONFIDENCE
) -> Interval:
    """Of share B - share A of independent samples; Newcombe (1998), method 10, from both Wilson intervals. Has width
    also where both shares are 0 or both 1, which no resampling gives."""
    a = wilson_interval(a_count, a_total, confidence=confidence)
    b = wilson_interval(b_count, b_total, confidence=confidence)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Interval(None, None)
    a_share, b_share = a_count / a_total, b_count / b_total
    difference = b_share - a_share
    return Interval(
        max(-1.0, difference - math.hypot(b_share - b.low, a.high - a_share)),
        min(1.0, difference + math.hypot(b.high - b_share, a_share - a.low)),
    )


def needed_for_percentile(violation_count: int, *, percent: float = 99.0, confidence: float = 0.99) -> int:
    """How many requests it takes, ``violation_count`` of them above a bound, to assert that the percentile is within
    it: the smallest n with P(at most that many above | n, share 1 - percent/100) <= 1 - confidence. The early
    stopping of MLPerf inference, tolerance 0: 459 for p99 without one."""
    if violation_count < 0:
        raise ValueError("a count of violations is 0 or more")
    if not 0.0 < percent < 100.0:
        raise ValueError("a percentile lies between 0 and 100")
    _check_share(confidence, "confidence")
    above = 1.0 - percent / 100.0

    def is_enough(n: int) -> bool:
        return float(special.bdtr(violation_count, n, above)) <= 1.0 - confidence

    low, high = violation_count, violation_count + 1
    while not is_enough(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def is_enough_for_percentile(request_count: int, *, percent: float = 99.0) -> bool:
    """Whether so many requests could assert the percentile at all (with no violation, at 99% confidence)."""
    return request_count >= needed_for_percentile(0, percent=percent)


# --- Bootstrap


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two systems, with its 95% interval; None bounds: too few units to say."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_claim(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low is not None and self.high is not None and (self.low > 1.0 or self.high < 1.0)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}x (n too small)"
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]{'' if self.is_claim else ' (no claim)'}"


def pooled(blocks: Blocks) -> list[float]:
    return [value for units in blocks.values() for unit in units for value in unit]


class _Ranked:
    """Units of one system, sorted once, so that a resample needs no sorting: unit i drawn w times gives each of its
    values the weight w."""

    def __init__(self, blocks: Sequence[Samples]) -> None:
        units = [np.asarray(unit, dtype=np.float64) for block in blocks for unit in block]
        self._block_sizes = np.array([len(block) for block in blocks], dtype=np.int64)
        self._block_starts = np.cumsum(self._block_sizes) - self._block_sizes
        self.unit_count = len(units)
        values = np.concatenate(units) if units else np.empty(0)
        owners = np.repeat(np.arange(len(units)), [unit.size for unit in units])
        order = np.argsort(values, kind="stable")
        self.values: Values = values[order]
        self._owners = owners[order]
        self._sums = np.array([unit.sum() for unit in units])
        self._sizes = np.array([unit.size for unit in units], dtype=np.float64)

    def draw(self, rng: np.random.Generator, block_weights: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """How often each unit is drawn: within each block as many as it has, for every time the block was drawn."""
        counts = self._block_sizes if block_weights is None else self._block_sizes * block_weights
        blocks = np.repeat(np.arange(self._block_sizes.size), counts)
        within = (rng.random(blocks.size) * self._block_sizes[blocks]).astype(np.int64)
        return np.bincount(self._block_starts[blocks] + within, minlength=self.unit_count)

    def of(self, statistics: Sequence[Statistic], weights: NDArray[np.int64]) -> list[float]:
        """Each statistic of the resample; NaN where it has no values."""
        found: list[float] = []
        cumulated: NDArray[np.int64] | None = None
        for statistic in statistics:
            if isinstance(statistic, Mean):
                size = float(self._sizes @ weights)
                found.append(float(self._sums @ weights) / size if size else math.nan)
                continue
            if cumulated is None:
                cumulated = np.cumsum(weights[self._owners])
            total = int(cumulated[-1]) if cumulated.size else 0
            if total == 0:
                found.append(math.nan)
            elif isinstance(statistic, Percentile):
                place = (total - 1) * statistic.percent / 100.0
                ranks = np.array([math.floor(place), min(math.floor(place) + 1, total - 1)])
                low, high = self.values[np.searchsorted(cumulated, ranks, side="right")]
                found.append(float(low + (high - low) * (place - math.floor(place))))
            else:
                found.append(statistic(np.repeat(self.values, weights[self._owners]).tolist()))
        return found


def bootstrap_ratio(peer: Blocks, base: Blocks, statistic: Statistic, rng: random.Random) -> Ratio:
    """``statistic(peer) / statistic(base)`` over pooled values, 95% interval by resampling units within blocks, of
    both systems independently: for units that are independent, such as requests sent one by one. Raises
    ``ValueError`` when a system has no value."""
    value = statistic(pooled(peer)) / statistic(pooled(base))
    ranked = _Ranked(list(peer.values())), _Ranked(list(base.values()))
    if min(each.unit_count for each in ranked) < FEWEST_UNITS:
        return Ratio(value, None, None)
    generator = np.random.default_rng(rng.getrandbits(64))
    drawn = []
    for _ in range(_resample_count(*ranked)):
        above, below = (each.of([statistic], each.draw(generator, None))[0] for each in ranked)
        drawn.append(_divided(above, below))
    interval = _interval(np.array(drawn), CONFIDENCE)
    return Ratio(value, interval.low, interval.high)


def stretches(units: Samples) -> list[list[float]]:
    """Neighbours in time joined, about sqrt(n) of them to a stretch, in the order given: units for ``draw_pairs``.

    Requests that queue behind each other are no more independent than the gaps of one. Resampled one by one, two runs
    of the same simulated queue differ "significantly" in half of all cases at half load, and in 80% at 80% load; by
    stretches in 9% and 40% (docs/workbench/statistics.md).
    """
    length = max(1, round(math.sqrt(len(units))))
    return [
        [value for unit in units[start : start + length] for value in unit] for start in range(0, len(units), length)
    ]


def draw_pairs(
    pairs: Sequence[Pair],
    statistics: Sequence[Statistic],
    rng: random.Random,
    *,
    resample_count: int = RESAMPLE_COUNT,
) -> Drawn:
    """Statistics of the pooled values of A and of B, and of resamples of both, from interleaved pairs of runs.

    Two pairs or more are resampled as pairs, so that drift, which both of a pair share, does not widen an interval,
    and differences between runs do; within each drawn pair whole units are resampled (both levels with replacement:
    rather too wide than too narrow, Davison and Hinkley 1997, 3.8). One pair can only resample its units: what is
    drawn knows nothing of what the next run would give. Units should be ``stretches``.
    """
    sides = _Ranked([pair[0] for pair in pairs]), _Ranked([pair[1] for pair in pairs])
    whole = [side.of(statistics, np.ones(side.unit_count, dtype=np.int64)) for side in sides]
    empty = np.empty((0, len(statistics)))
    if min(side.unit_count for side in sides) < FEWEST_UNITS:
        return Drawn(whole[0], whole[1], empty, empty, 0)
    generator = np.random.default_rng(rng.getrandbits(64))
    drawn: list[list[list[float]]] = []
    for _ in range(_resample_count(*sides, wanted=resample_count)):
        picked: NDArray[np.int64] | None = None
        if len(pairs) > 1:
            picked = np.bincount(generator.integers(0, len(pairs), len(pairs)), minlength=len(pairs))
        drawn.append([side.of(statistics, side.draw(generator, picked)) for side in sides])
    resamples = np.array(drawn)
    independent_count = len(pairs) if len(pairs) > 1 else min(side.unit_count for side in sides)
    return Drawn(whole[0], whole[1], resamples[:, 0, :], resamples[:, 1, :], independent_count)


def paired_ratio(peer: Blocks, base: Blocks, statistic: Statistic, rng: random.Random) -> Ratio:
    """``statistic(peer) / statistic(base)`` from as many blocks of both, the i-th (by number) of both being a pair;
    units in order of time. Wider than ``bootstrap_ratio``, and right where requests queue: see ``draw_pairs``. Raises
    ``ValueError`` for unequal numbers of blocks or no values."""
    if len(peer) != len(base):
        raise ValueError(f"{len(peer)} and {len(base)} blocks cannot be paired")
    if not pooled(peer) or not pooled(base):
        raise ValueError("a ratio of nothing")
    pairs = [(stretches(base[b]), stretches(peer[p])) for b, p in zip(sorted(base), sorted(peer), strict=True)]
    return draw_pairs(pairs, [statistic], rng).ratio(0)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Of A and of B: each statistic, and a row of them for each resample (no rows: too few units)."""

    a: list[float]
    b: list[float]
    a_resamples: Values
    b_resamples: Values
    independent_count: int
    """Of what was resampled: pairs, or the units of the one pair. Intervals are widened by it."""

    def ratio(self, place: int, *, confidence: float = CONFIDENCE) -> Ratio:
        """B over A of the statistic at that place. NaN value: a system has no values, or A has 0."""
        value = _divided(self.b[place], self.a[place])
        columns = zip(self.b_resamples[:, place], self.a_resamples[:, place], strict=True)
        widened = expanded_confidence(self.independent_count, confidence)
        found = _interval(np.array([_divided(above, below) for above, below in columns]), widened)
        return Ratio(value, found.low, found.high)

    def difference(self, place: int, *, confidence: float = CONFIDENCE) -> Interval:
        """Of B - A of the statistic at that place."""
        widened = expanded_confidence(self.independent_count, confidence)
        return _interval(self.b_resamples[:, place] - self.a_resamples[:, place], widened)


def expanded_confidence(n: int, confidence: float = CONFIDENCE) -> float:
    """The percentiles to read from a bootstrap of ``n`` units for an interval that covers as often as it says: from
    few units a bootstrap is too narrow, by sqrt((n - 1) / n) and by what Student's t is wider than the normal
    ("expanded percentile interval", Hesterberg 2015)."""
    if n < 2:
        return confidence
    t = float(special.stdtrit(n - 1, (1.0 + confidence) / 2.0))
    return 1.0 - 2.0 * float(special.ndtr(-math.sqrt(n / (n - 1)) * t))


def _resample_count(*ranked: _Ranked, wanted: int = RESAMPLE_COUNT) -> int:
    size = sum(each.values.size + each.unit_count for each in ranked)
    return min(wanted, max(200, WORK_LIMIT // max(1, size)))


def _divided(above: float, below: float) -> float:
    if math.isnan(above) or math.isnan(below):
        return math.nan
    if below == 0.0:
        return math.nan if above == 0.0 else math.copysign(math.inf, above)
    return above / below


def _interval(drawn: NDArray[Any], confidence: float) -> Interval:
    """None bounds when more than one resample in a hundred had no value at all: then the rest is a biased choice."""
    kept = drawn[~np.isnan(drawn)]
    if kept.size == 0 or kept.size < 0.99 * drawn.size:
        return Interval(None, None)
    tail = (1.0 - confidence) / 2.0
    # Ranks, not interpolation: between a finite value and infinity there is no number.
    ranked = np.sort(kept)
    low = float(ranked[math.floor((kept.size - 1) * tail)])
    high = float(ranked[math.ceil((kept.size - 1) * (1.0 - tail))])
    return Interval(low, high) if math.isfinite(low) and math.isfinite(high) else Interval(None, None)


# --- Slopes


@dataclass(frozen=True, slots=True)
class Slope:
    """A line through points, least squares; the one-sided margin is that of Student's t."""

    per_s: float
    standard_error: float
    intercept: float
    point_count: int

    def lower_bound(self, confidence: float = CONFIDENCE) -> float:
        """The slope is above this with that confidence (one-sided; independent errors)."""
        return self.per_s - float(special.stdtrit(self.point_count - 2, confidence)) * self.standard_error

    def upper_bound(self, confidence: float = CONFIDENCE) -> float:
        return self.per_s + float(special.stdtrit(self.point_count - 2, confidence)) * self.standard_error


def slope(times_s: Sequence[float] | Values, values: Sequence[float] | Values) -> Slope:
    """Raises ``ValueError`` below three points or when all are at one time."""
    x, y = np.asarray(times_s, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.size != y.size:
        raise ValueError("a slope needs one value a time")
    if x.size < 3:
        raise ValueError("a slope with a margin needs three points or more")
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(dx @ dx)
    if spread == 0.0:
        raise ValueError("a slope needs points at different times")
    per_s = float(dx @ dy) / spread
    left_over = dy - per_s * dx
    error = math.sqrt(float(left_over @ left_over) / (x.size - 2) / spread)
    return Slope(per_s, error, float(y.mean() - per_s * x.mean()), int(x.size))


def _check_count(count: int, total: int) -> None:
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no count")


def _check_share(share: float, name: str) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name} lies between 0 and 1")

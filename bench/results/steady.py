"""Which part of a run is steady, and whether the server kept up: by rules that are printed, never by eye.

Pure. Three rules, each of which can say "cannot tell":

- Warm-up: MSER-5 on the TTFTs in order of intended time (White 1997; Franklin and White 2008), at most half the run,
  where the first requests are unlike the rest.
- Window: from the end of warm-up to the last intended time, or the end of the arrival schedule if that is later.
  However late its answers end, they count; the time after it (the drain) counts for no rate.
- Saturation: requests in flight *and* TTFT both grow over the window, each slope above 0 by a one-sided t margin of
  95%, and the growth matters; or the server turns requests away.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.results.records import Outcome, RequestRecord
from bench.results.statistics import CONFIDENCE, Slope, Values, percentile, slope, wilson_interval

BATCH_SIZE = 5
FEWEST_BATCHES = 10
"""Below 50 TTFTs no warm-up is looked for."""
MATERIAL_START = 0.05
"""Of the mean: a start that is off by less needs no cut."""
SHORTEST_WINDOW_S = 10.0
FEWEST_REQUESTS = 20
LIFETIMES = 3.0
"""A span shorter than so many median lifetimes of a request shows how the server fills, not a trend."""
BIN_COUNT = 20
"""Points of the slopes: means over equal spans of the window. Single requests follow each other too closely to be
independent, and would make the margin far too narrow."""
MATERIAL_GROWTH = 0.25
"""Growth over the window, in mean levels, below which a slope is of no consequence. A backlog that grows from nothing
has 2, one seen from its middle on has 0.67."""
TURNED_AWAY_SHARE = 0.01
"""A server whose share of refused and timed-out requests is above this, with confidence, does not keep up."""


class WarmupVerdict(enum.StrEnum):
    NONE = "none"
    CUT = "cut"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Warmup:
    """What the rule says of the start of a run."""

    verdict: WarmupVerdict
    cut_s: float
    """The window starts here; 0 unless something was cut."""
    cut_request_count: int
    reason: str
    is_cold_start: bool = False
    """What was cut was slower than the rest, not faster (which is the filling of queues, or growth)."""


def mser(values: Sequence[float] | Values, *, batch_size: int = BATCH_SIZE) -> tuple[int, bool]:
    """How many values to drop from the start, and whether that is an answer.

    Means of batches z_1..z_m; the cut d, in batches, at most m/2, with the smallest
    sum((z_i - mean of z_{d+1}..z_m)^2, i > d) / (m - d)^2. A smallest value right at the limit is no answer: the
    series had not settled by its half. Raises ``ValueError`` below ``FEWEST_BATCHES`` batches.
    """
    means = _batch_means(values, batch_size)
    limit = means.size // 2
    scores = np.empty(limit + 1)
    for d in range(limit + 1):
        rest = means[d:]
        scores[d] = float(np.square(rest - rest.mean()).sum()) / rest.size**2
    # The first of those that only rounding tells apart.
    best = int(np.flatnonzero(scores <= scores.min() + 1e-12 * scores.max())[0])
    return best * batch_size, best < limit


def starts_unlike_the_rest(values: Sequence[float] | Values, cut_count: int, *, batch_size: int = BATCH_SIZE) -> bool:
    """Whether the first batch lies outside the middle 95% of the batches after the cut, and off their mean by
    ``MATERIAL_START``.

    MSER alone proposes a cut in a third of all series that have no transient (of M/M/1 waiting times): it also drops
    a burst that happens to be early. A run that starts as it goes on has no warm-up.
    """
    means = _batch_means(values, batch_size)
    rest = means[cut_count // batch_size :]
    low, high = np.percentile(rest, [2.5, 97.5])
    is_off = abs(means[0] - rest.mean()) > MATERIAL_START * rest.mean()
    return bool(is_off and not low <= means[0] <= high)


def _batch_means(values: Sequence[float] | Values, batch_size: int) -> Values:
    series = np.asarray(values, dtype=np.float64)
    m = series.size // batch_size
    if m < FEWEST_BATCHES:
        raise ValueError(f"MSER needs {FEWEST_BATCHES * batch_size} values or more")
    means: Values = series[: m * batch_size].reshape(m, batch_size).mean(axis=1)
    return means


def find_warmup(records: Sequence[RequestRecord]) -> Warmup:
    """Requests without a first token are passed over: they say nothing of how warm the server was."""
    told = sorted(
        ((record.intended_at_s, ttft) for record in records if (ttft := record.ttft_s) is not None),
        key=lambda pair: pair[0],
    )
    if len(told) < FEWEST_BATCHES * BATCH_SIZE:
        reason = f"{len(told)} requests with a first token; the rule needs {FEWEST_BATCHES * BATCH_SIZE}"
        return Warmup(WarmupVerdict.CANNOT_TELL, 0.0, 0, f"too short: {reason}")
    # Times are known to the microsecond; what is below it would be taken for a difference where all else is equal.
    ttfts = [round(ttft, 6) for _, ttft in told]
    cut_count, settled = mser(ttfts)
    if cut_count == 0:
        return Warmup(WarmupVerdict.NONE, 0.0, 0, "MSER-5 finds none")
    if not starts_unlike_the_rest(ttfts, cut_count):
        return Warmup(WarmupVerdict.NONE, 0.0, 0, "its first requests are like the rest")
    if not settled:
        return Warmup(WarmupVerdict.CANNOT_TELL, 0.0, 0, "TTFT had not settled by half of the run: nothing cut")
    cut_s = told[cut_count][0]
    cut_request_count = sum(1 for record in records if record.intended_at_s < cut_s)
    is_cold = float(np.mean(ttfts[:BATCH_SIZE])) > float(np.mean(ttfts[cut_count:]))
    reason = f"MSER-5 on TTFT by intended time: the start is {'slower' if is_cold else 'faster'} than the rest"
    return Warmup(WarmupVerdict.CUT, cut_s, cut_request_count, reason, is_cold)


@dataclass(frozen=True, slots=True)
class Window:
    """The steady part, in seconds of the run. A request is in it by its intended time, both ends included."""

    start_s: float
    end_s: float
    schedule_end_s: float | None = None
    """Of the arrivals. Where turns of sessions are due after it, the load falls off from there on, which must not
    hide that it grew before."""

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def holds(self, at_s: float) -> bool:
        # Recorded times are rounded to microseconds.
        return self.start_s - 1e-6 <= at_s <= self.end_s + 1e-6


def find_window(records: Sequence[RequestRecord], warmup: Warmup, duration_s: float | None) -> Window:
    """``duration_s``: length of the arrival schedule. A schedule without length (everything due at once, or unknown)
    lasts until the last end, since a rate needs a time."""
    last_intended_s = max((record.intended_at_s for record in records), default=0.0)
    schedule_s = duration_s if duration_s is not None and duration_s > 0 else None
    # Turns of sessions are due after the schedule's end; left out, half of a workload would hide its failures.
    end_s = max(last_intended_s, schedule_s or 0.0)
    if end_s <= warmup.cut_s:
        end_s = max((record.ended_at_s for record in records), default=0.0)
    return Window(warmup.cut_s, max(end_s, warmup.cut_s), schedule_s)


def in_flight(records: Sequence[RequestRecord], times_s: Sequence[float] | Values) -> Values:
    """How many requests are between their intended time and their end at each of the times."""
    starts = np.sort([record.intended_at_s for record in records])
    ends = np.sort([max(record.ended_at_s, record.intended_at_s) for record in records])
    at = np.asarray(times_s, dtype=np.float64)
    found: Values = (np.searchsorted(starts, at, side="right") - np.searchsorted(ends, at, side="right")).astype(
        np.float64
    )
    return found


class SaturationVerdict(enum.StrEnum):
    SATURATED = "saturated"
    STEADY = "steady"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one series over the window."""

    per_s: float
    lower_per_s: float
    """The slope is above this, one-sided, at 95%."""
    upper_per_s: float
    share: float
    """Growth over the window / mean level."""

    @property
    def is_growing(self) -> bool:
        return self.lower_per_s > 0 and self.share >= MATERIAL_GROWTH


@dataclass(frozen=True, slots=True)
class Saturation:
    verdict: SaturationVerdict
    reason: str
    span: Window
    """What was judged."""
    in_flight: Growth | None = None
    ttft: Growth | None = None
    turned_away_share: float | None = None
    """Refused or timed out, of the window's requests."""


def find_saturation(records: Sequence[RequestRecord], warmup: Warmup, window: Window) -> Saturation:
    """``records``: all of the run. Judged is the time from the first lifetime of a request on (until then the server
    fills, overloaded or not) and after a cold start, to the end of the schedule. A start cut for being *faster* than
    the rest is judged too: that is what growth looks like."""
    end_s = window.end_s if window.schedule_end_s is None else min(window.end_s, window.schedule_end_s)
    due = sorted((r for r in records if r.intended_at_s <= end_s + 1e-6), key=lambda r: r.intended_at_s)
    lifetime_s = _lifetime_s(due)
    start_s = max(due[0].intended_at_s + lifetime_s if due else 0.0, warmup.cut_s if warmup.is_cold_start else 0.0)
    span = Window(min(start_s, end_s), end_s)
    chosen = [r for r in due if span.holds(r.intended_at_s)]
    told = [(r.intended_at_s, first_s) for r in chosen if (first_s := r.ttft_s) is not None]
    away_count = sum(1 for r in chosen if r.outcome in (Outcome.REFUSED, Outcome.TIMEOUT))
    away_share = away_count / len(chosen) if chosen else None
    away_low = wilson_interval(away_count, len(chosen)).low
    short: str | None = None
    if span.length_s < LIFETIMES * lifetime_s:
        lifetimes = f"{LIFETIMES:.0f} lifetimes of a request ({lifetime_s:.1f} s)"
        short = f"after the first, {span.length_s:.1f} s are left to judge, fewer than {lifetimes}"
    elif span.length_s < SHORTEST_WINDOW_S:
        short = f"{span.length_s:.1f} s to judge; the rule needs {SHORTEST_WINDOW_S:.0f} s"
    elif len(told) < FEWEST_REQUESTS:
        short = f"{len(told)} requests with a first token to judge; the rule needs {FEWEST_REQUESTS}"
    flying, ttft = _growths(records, told, span) if short is None else (None, None)
    if away_low is not None and away_low > TURNED_AWAY_SHARE:
        verdict = SaturationVerdict.SATURATED
        reason = f"it turned away {away_count} of {len(chosen)} requests (refused or timed out)"
    elif short is not None:
        verdict, reason = SaturationVerdict.CANNOT_TELL, f"too short: {short}"
    elif flying is None or ttft is None:
        verdict, reason = SaturationVerdict.CANNOT_TELL, "too short: too few spans have a request"
    elif flying.is_growing and ttft.is_growing:
        verdict, reason = SaturationVerdict.SATURATED, "requests in flight and TTFT both grow"
    elif flying.is_growing or ttft.is_growing:
        grows, rests = ("requests in flight", "TTFT") if flying.is_growing else ("TTFT", "requests in flight")
        verdict, reason = SaturationVerdict.CANNOT_TELL, f"growing: {grows}; not growing: {rests}"
    else:
        verdict, reason = SaturationVerdict.STEADY, "neither requests in flight nor TTFT grow"
    return Saturation(verdict, reason, span, flying, ttft, away_share)


def _lifetime_s(records: Sequence[RequestRecord]) -> float:
    """Of a request that does not queue: the shortest TTFT of the run and the median time from first token to end,
    neither of which a backlog stretches."""
    answered = [(ttft, r.ended_at_s - r.message_at_s[0]) for r in records if (ttft := r.ttft_s) is not None]
    if not answered:
        return 0.0
    shortest_s = min(ttft for ttft, _ in answered)
    return max(0.0, shortest_s) + max(0.0, percentile([rest for _, rest in answered], 50.0))


def _growths(
    records: Sequence[RequestRecord], told: Sequence[tuple[float, float]], window: Window
) -> tuple[Growth | None, Growth | None]:
    edges = np.linspace(window.start_s, window.end_s, BIN_COUNT + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    # Ten looks a span are the mean over it for all that matters.
    looks = window.start_s + (np.arange(BIN_COUNT * 10) + 0.5) * window.length_s / (BIN_COUNT * 10)
    flying = in_flight(records, looks).reshape(BIN_COUNT, 10).mean(axis=1)
    times = np.array([at_s for at_s, _ in told])
    ttfts = np.array([ttft for _, ttft in told])
    places = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, BIN_COUNT - 1)
    counts = np.bincount(places, minlength=BIN_COUNT)
    filled = counts > 0
    ttft_means = np.bincount(places, weights=ttfts, minlength=BIN_COUNT)[filled] / counts[filled]
    return _growth(centres, flying, window), _growth(centres[filled], ttft_means, window)


def _growth(times_s: Values, values: Values, window: Window) -> Growth | None:
    if values.size < BIN_COUNT // 2:
        return None
    line = slope(times_s, values)
    error = line.standard_error * _widening(times_s, values, line)
    wide = Slope(line.per_s, error, line.intercept, line.point_count)
    level = float(np.mean(values))
    share = line.per_s * window.length_s / level if level > 0 else 0.0
    return Growth(line.per_s, wide.lower_bound(CONFIDENCE), wide.upper_bound(CONFIDENCE), share)


def _widening(times_s: Values, values: Values, line: Slope) -> float:
    """Factor of the standard error for what neighbouring spans still have in common: sqrt((1 + r) / (1 - r)) with the
    lag-1 autocorrelation r of the residuals, its bias in short series (Kendall 1954) taken back; never below 1 (the
    effective sample size of an AR(1) series)."""
    left_over = values - (line.intercept + line.per_s * times_s)
    spread = float(left_over @ left_over)
    if spread <= 0.0:
        return 1.0
    r = float(left_over[:-1] @ left_over[1:]) / spread
    r = min(0.95, max(0.0, r + (1.0 + 4.0 * r) / values.size))
    return math.sqrt((1.0 + r) / (1.0 - r))

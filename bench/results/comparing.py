"""Two systems compared: metric by metric a ratio with its interval, and a verdict that can say "no difference".

Pure. B is held against A: a ratio is B / A. Runs are paired in order, as an interleaved (ABBA) measurement gives
them; both of a pair are judged from the later end of warm-up on. A verdict is a claim only with ``PAIRS_FOR_A_CLAIM``
pairs and nothing against the runs: what one pair shows may be the hour it was taken in.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.results.records import Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.results.slo import PRESETS, Slo, meets
from bench.results.statistics import (
    RESAMPLE_COUNT,
    Drawn,
    Interval,
    Mean,
    Pair,
    Percentile,
    Ratio,
    Samples,
    Statistic,
    draw_pairs,
    needed_for_percentile,
    share_difference_interval,
    stretches,
)
from bench.results.steady import Window, find_warmup, find_window
from bench.results.summary import GAP_METRICS, REQUEST_METRICS, validity

MARGIN = 0.02
"""Equivalence: an interval wholly within this share of 1 is no difference that matters."""
SHARE_MARGIN = 0.02
"""The same of differences of shares."""
PAIRS_FOR_A_CLAIM = 10
NO_WIDTH = 1e-9
"""Of an interval: what rounding leaves where every resample gives the same."""
FEWEST_REQUESTS_OF_GAPS = 20
"""A percentile of gaps takes as many gaps as one of requests takes requests, and gaps of so many requests: the
interval knows how they hang together, but not from a handful."""
STATISTICS: Mapping[str, Mean | Percentile] = {
    "mean": Mean(),
    "p50": Percentile(50.0),
    "p95": Percentile(95.0),
    "p99": Percentile(99.0),
}
LATENCIES = ("ttft_s", "service_ttft_s", "itl_message_s", "itl_token_s", "tpot_s", "e2e_s", "longest_gap_s")
THROUGHPUTS = ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s")
PER_WORKER = "_per_worker"
METRICS = (
    *(f"{name}.{word}" for name in LATENCIES for word in STATISTICS),
    *THROUGHPUTS,
    *(name + PER_WORKER for name in THROUGHPUTS),
    *(f"goodput.{name}" for name in PRESETS),
    "success",
)


class ComparisonError(Exception):
    """What was given cannot be compared; says why and what to do."""


class Verdict(enum.StrEnum):
    A_BETTER = "A better"
    B_BETTER = "B better"
    NO_DIFFERENCE = "no difference"
    """The interval lies within the margin: there is none that matters."""
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric of both."""

    name: str
    a: float | None
    b: float | None
    ratio: float | None
    """B / A; None for shares, which have a difference, and where A has 0."""
    difference: float | None
    """B - A, of shares."""
    low: float | None
    """Of ratio or difference, 95%."""
    high: float | None
    a_request_count: int
    """Requests that gave a value."""
    b_request_count: int
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All metrics, and what speaks against believing them."""

    a_label: str
    b_label: str
    pair_count: int
    windows: Sequence[Window]
    """Of each pair."""
    results: Sequence[MetricResult]
    warnings: Sequence[str]
    seed: int
    margin: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_claim(self) -> bool:
        """Whether the verdicts that decide may be quoted."""
        return self.pair_count >= PAIRS_FOR_A_CLAIM and not self.warnings

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a_label,
            "b": self.b_label,
            "pair_count": self.pair_count,
            "is_claim": self.is_claim,
            "margin": self.margin,
            "seed": self.seed,
            "windows": [{"start_s": window.start_s, "end_s": window.end_s} for window in self.windows],
            "warnings": list(self.warnings),
            "metrics": {
                result.name: {
                    "a": result.a,
                    "b": result.b,
                    "ratio": result.ratio,
                    "difference": result.difference,
                    "low": result.low,
                    "high": result.high,
                    "a_request_count": result.a_request_count,
                    "b_request_count": result.b_request_count,
                    "verdict": result.verdict.value,
                    "note": result.note or None,
                }
                for result in self.results
            },
        }


@dataclass(frozen=True, slots=True)
class _Side:
    """One run of a pair: what of it is compared."""

    data: RunData
    records: Sequence[RequestRecord]
    """Due in the window of the pair."""
    window: Window
    worker_count: int | None


def compare(
    a: Sequence[RunData],
    b: Sequence[RunData],
    *,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    margin: float = MARGIN,
    resample_count: int = RESAMPLE_COUNT,
) -> Comparison:
    """``a`` and ``b``: runs of the two systems, the i-th of both being a pair. ``metrics``: of ``METRICS``; a name
    without its statistic means all of them (``ttft_s``, ``goodput``). Raises ``ComparisonError``."""
    chosen = _chosen(metrics)
    if not a or len(a) != len(b):
        raise ComparisonError(f"{len(a)} runs of A and {len(b)} of B cannot be paired: give as many of each")
    pairs = [_pair(one, other) for one, other in zip(a, b, strict=True)]
    results: list[MetricResult] = []

    def draw(name: str, pairs: Sequence[Pair], statistics: Sequence[Statistic]) -> Drawn:
        # By name, so that an interval does not depend on what else was asked for.
        rng = random.Random(f"{seed} {name}")  # noqa: S311 resampling, no secret
        return draw_pairs(pairs, statistics, rng, resample_count=resample_count)

    for name in LATENCIES:
        words = [word for word in STATISTICS if f"{name}.{word}" in chosen]
        if words:
            results += _latency(name, words, pairs, draw, margin)
    for name in (*THROUGHPUTS, *(name + PER_WORKER for name in THROUGHPUTS)):
        if name in chosen:
            found = _throughput(name, pairs, draw, margin)
            results += [found] if found is not None else []
    for name in chosen:
        if name == "success":
            results.append(_share(name, pairs, _is_ok, draw))
        elif name.startswith("goodput."):
            slo = PRESETS[name.removeprefix("goodput.")]
            results.append(_goodput(name, slo, pairs, draw))
    return Comparison(
        a_label=_label(a, "A"),
        b_label=_label(b, "B"),
        pair_count=len(pairs),
        windows=[side.window for side, _ in pairs],
        results=results,
        warnings=_warnings(a, b, pairs),
        seed=seed,
        margin=margin,
    )


def _chosen(metrics: Sequence[str]) -> list[str]:
    chosen: list[str] = []
    for wanted in metrics:
        found = [name for name in METRICS if name == wanted or name.startswith(wanted + ".")]
        if not found:
            heads = dict.fromkeys(name.split(".")[0] for name in METRICS)
            raise ComparisonError(f"there is no metric {wanted!r}; there are {', '.join(heads)}")
        chosen += [name for name in found if name not in chosen]
    return chosen


def _pair(a: RunData, b: RunData) -> tuple[_Side, _Side]:
    own = [_own_window(data) for data in (a, b)]
    start_s = max(window.start_s for window in own)
    if start_s >= min(window.end_s for window in own):
        # Nothing in common, as of two bursts: each by its own.
        return _side(a, own[0]), _side(b, own[1])
    # Only the start is shared: turns of sessions are due later where the turns before took longer, and count.
    return _side(a, Window(start_s, own[0].end_s)), _side(b, Window(start_s, own[1].end_s))


def _own_window(data: RunData) -> Window:
    plan = data.facts.get("plan")
    duration_s = plan.get("duration_s") if isinstance(plan, Mapping) else None
    known_s = float(duration_s) if isinstance(duration_s, int | float) else None
    return find_window(data.records, find_warmup(data.records), known_s)


def _side(data: RunData, window: Window) -> _Side:
    counts = data.facts.get("worker_counts")
    total = sum(n for n in counts.values() if isinstance(n, int)) if isinstance(counts, Mapping) else 0
    records = [record for record in data.records if window.holds(record.intended_at_s)]
    records.sort(key=lambda record: (record.intended_at_s, record.index))
    return _Side(data, records, window, total or None)


# --- Metrics

Draw = Callable[[str, Sequence[Pair], Sequence[Statistic]], Drawn]
"""``draw_pairs`` for the metric of that name."""


def _latency(
    name: str, words: Sequence[str], pairs: Sequence[tuple[_Side, _Side]], draw: Draw, margin: float
) -> list[MetricResult]:
    def units(side: _Side) -> Samples:
        if name in GAP_METRICS:
            return [gaps.tolist() for record in side.records if (gaps := GAP_METRICS[name](record)).size]
        of_record = REQUEST_METRICS[name]
        return [[value] for record in side.records if (value := of_record(record)) is not None]

    both, counts = _joined([(units(a), units(b)) for a, b in pairs])
    value_counts = [sum(len(unit) for pair in both for unit in pair[place]) for place in (0, 1)]
    drawn = draw(name, both, [STATISTICS[word] for word in words])
    results = []
    for place, word in enumerate(words):
        statistic = STATISTICS[word]
        ratio = drawn.ratio(place)
        verdict, note = _of_ratio(ratio, margin, lower_is_better=True)
        needed = needed_for_percentile(0, percent=statistic.percent) if isinstance(statistic, Percentile) else 0
        short = f"{min(value_counts)} values are too few for a {word}: it takes {needed}" * (
            min(value_counts) < needed
        )
        if name in GAP_METRICS and min(counts) < FEWEST_REQUESTS_OF_GAPS:
            short = f"the gaps of {min(counts)} requests are too few: it takes {FEWEST_REQUESTS_OF_GAPS} requests"
        if short and verdict is not Verdict.CANNOT_TELL:
            verdict, note = Verdict.CANNOT_TELL, short
        results.append(_result(f"{name}.{word}", drawn.a[place], drawn.b[place], ratio, counts, verdict, note))
    return results


def _throughput(name: str, pairs: Sequence[tuple[_Side, _Side]], draw: Draw, margin: float) -> MetricResult | None:
    """Of requests due in the window; each is worth what it gave over the window's length, times the number of
    requests, so that the mean of the units is the throughput (of several runs: weighted by their requests). None for
    throughput per worker where the number of workers is unknown."""
    plain = name.removesuffix(PER_WORKER)
    is_per_worker = name != plain
    if is_per_worker and any(side.worker_count is None for pair in pairs for side in pair):
        return None

    def worth(record: RequestRecord) -> float:
        match plain:
            case "requests_per_s":
                return 1.0 if record.outcome is Outcome.OK else 0.0
            case "input_tokens_per_s":
                return float(record.prompt_token_count) if record.message_at_s else 0.0
            case _:
                return float(record.output_token_count)

    def units(side: _Side) -> Samples:
        # A server that lags behind answers later, not less: its time runs until the last of them has ended.
        end_s = max([side.window.end_s, *(record.ended_at_s for record in side.records)])
        length_s = max(end_s - side.window.start_s, 1e-6) * ((side.worker_count or 1) if is_per_worker else 1)
        return [[worth(record) * len(side.records) / length_s] for record in side.records]

    both, counts = _joined([(units(a), units(b)) for a, b in pairs])
    drawn = draw(name, both, [Mean()])
    ratio = drawn.ratio(0)
    verdict, note = _of_ratio(ratio, margin, lower_is_better=False)
    if len(pairs) == 1 and ratio.low is not None and ratio.high is not None and ratio.high - ratio.low < NO_WIDTH:
        # All requests were worth the same: resampling them knows nothing of what the next run would give.
        verdict, note = Verdict.CANNOT_TELL, "the interval of one pair has no width: it takes more pairs"
    return _result(name, drawn.a[0], drawn.b[0], ratio, counts, verdict, note)


def _goodput(name: str, slo: Slo, pairs: Sequence[tuple[_Side, _Side]], draw: Draw) -> MetricResult:
    def is_good(record: RequestRecord, side: _Side) -> bool:
        scale = side.data.facts.get("slo_scale")
        return meets(record, slo.scaled(float(scale)) if isinstance(scale, int | float) and scale > 0 else slo)

    return _share(name, pairs, is_good, draw)


def _is_ok(record: RequestRecord, side: _Side) -> bool:
    return record.outcome is Outcome.OK


def _share(
    name: str,
    pairs: Sequence[tuple[_Side, _Side]],
    is_counted: Callable[[RequestRecord, _Side], bool],
    draw: Draw,
) -> MetricResult:
    """All requests in the denominator. The wider of two intervals on each side: by resampling pairs, which knows the
    differences between runs, and Newcombe's, which has width where every request of both is good."""
    units: list[Pair] = [
        ([[float(is_counted(r, a))] for r in a.records], [[float(is_counted(r, b))] for r in b.records])
        for a, b in pairs
    ]
    both, totals = _joined(units)
    if min(totals) == 0:
        return MetricResult(
            name, None, None, None, None, None, None, totals[0], totals[1], Verdict.CANNOT_TELL, "no requests"
        )
    counts = [int(sum(unit[0] for pair in units for unit in pair[place])) for place in (0, 1)]
    drawn = draw(name, both, [Mean()]).difference(0)
    score = share_difference_interval(counts[0], totals[0], counts[1], totals[1])
    interval = Interval(_outer(min, drawn.low, score.low), _outer(max, drawn.high, score.high))
    a, b = counts[0] / totals[0], counts[1] / totals[1]
    verdict, note = _of_difference(interval)
    return MetricResult(name, a, b, None, b - a, interval.low, interval.high, totals[0], totals[1], verdict, note)


def _joined(pairs: Sequence[Pair]) -> tuple[list[Pair], list[int]]:
    """Units as stretches of the run's time, and how many requests there were of A and of B."""
    counts = [sum(len(pair[place]) for pair in pairs) for place in (0, 1)]
    return [(stretches(a), stretches(b)) for a, b in pairs], counts


def _outer(choose: Callable[[float, float], float], one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return choose(one, other)


def _of_ratio(ratio: Ratio, margin: float, *, lower_is_better: bool) -> tuple[Verdict, str]:
    if math.isnan(ratio.value):
        return Verdict.CANNOT_TELL, "no values"
    if ratio.low is None or ratio.high is None:
        return Verdict.CANNOT_TELL, "too few requests for an interval"
    if ratio.low >= 1.0 / (1.0 + margin) and ratio.high <= 1.0 + margin:
        return Verdict.NO_DIFFERENCE, ""
    if ratio.is_claim:
        return (Verdict.B_BETTER if (ratio.high < 1.0) == lower_is_better else Verdict.A_BETTER), ""
    return Verdict.CANNOT_TELL, "the interval includes 1 and is wider than the margin"


def _of_difference(interval: Interval) -> tuple[Verdict, str]:
    if interval.low is None or interval.high is None:
        return Verdict.CANNOT_TELL, "too few requests for an interval"
    if interval.low >= -SHARE_MARGIN and interval.high <= SHARE_MARGIN:
        return Verdict.NO_DIFFERENCE, ""
    if interval.low > 0.0 or interval.high < 0.0:
        return (Verdict.B_BETTER if interval.low > 0.0 else Verdict.A_BETTER), ""
    return Verdict.CANNOT_TELL, "the interval includes 0 and is wider than the margin"


def _result(
    name: str, a: float, b: float, ratio: Ratio, counts: Sequence[int], verdict: Verdict, note: str
) -> MetricResult:
    def known(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else value

    return MetricResult(
        name=name,
        a=known(a),
        b=known(b),
        ratio=known(ratio.value),
        difference=None,
        low=known(ratio.low),
        high=known(ratio.high),
        a_request_count=counts[0],
        b_request_count=counts[1],
        verdict=verdict,
        note=note,
    )


# --- What speaks against it


def _warnings(a: Sequence[RunData], b: Sequence[RunData], pairs: Sequence[tuple[_Side, _Side]]) -> list[str]:
    found: list[str] = []
    for side, runs in (("A", a), ("B", b)):
        for place, data in enumerate(runs, start=1):
            found_of = validity(data)
            if not found_of["valid"]:
                found.append(f"run {place} of {side} is invalid: {'; '.join(found_of['reasons'])}")
        apart = list(dict.fromkeys(name for data in runs[1:] for name in _differing(runs[0], data, "plan")))
        if apart := [name for name in apart if name not in OF_THE_SEED]:
            found.append(f"the runs of {side} are of different plans, and no repetitions: {', '.join(apart)} differ")
    for place, (one, other) in enumerate(zip(a, b, strict=True), start=1):
        where = f"pair {place}: " if len(a) > 1 else ""
        for title, differing in (
            ("the plans differ", _differing(one, other, "plan")),
            ("the machines differ", _differing(one, other, "machine", MACHINE_FACTS)),
        ):
            if differing:
                found.append(f"{where}{title} in {', '.join(differing)}")
        found += [
            f"{where}{title} differ: {one.facts.get(key)!r} and {other.facts.get(key)!r}"
            for key, title in (
                ("model", "the models"),
                ("kind", "the kinds"),
                ("slo_scale", "the SLO scales"),
            )
            if one.facts.get(key) != other.facts.get(key)
        ]
    found += _of_pairs(pairs)
    return list(dict.fromkeys(found))


OF_THE_SEED = frozenset(
    (
        *("seed", "request_count", "session_count", "arrival_count", "groups", "cut"),
        "prefix_hit_share_infinite_cache",
    )
)
"""Facts of a plan that another seed changes: repetitions may differ in them."""
MACHINE_FACTS = ("cpu_model", "core_count", "memory_gib", "kernel", "gpu")
"""What makes two machines two; load and time of day always differ."""


def _differing(a: RunData, b: RunData, key: str, names: Sequence[str] | None = None) -> list[str]:
    one, other = a.facts.get(key), b.facts.get(key)
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return [] if one == other else [key]
    every = dict.fromkeys([*one, *other]) if names is None else names
    return [name for name in every if one.get(name) != other.get(name)]


def _of_pairs(pairs: Sequence[tuple[_Side, _Side]]) -> list[str]:
    found = []
    for side, place in (("A", 0), ("B", 1)):
        labels = {str(pair[place].data.facts.get("label")) for pair in pairs}
        if len(labels) > 1:
            found.append(f"the runs of {side} have several labels: {', '.join(sorted(labels))}")
    workers = [sorted({pair[place].worker_count or 0 for pair in pairs}) for place in (0, 1)]
    if workers[0] != workers[1] and 0 not in (*workers[0], *workers[1]):
        found.append(f"unequal numbers of workers: {workers[0]} and {workers[1]}; read the figures per worker")
    failed = [
        float(np.mean([float(r.outcome is not Outcome.OK) for pair in pairs for r in pair[place].records] or [0.0]))
        for place in (0, 1)
    ]
    if abs(failed[0] - failed[1]) > SHARE_MARGIN:
        found.append(
            f"{failed[0]:.1%} of A's and {failed[1]:.1%} of B's requests did not end OK: latencies compare those "
            "that were answered; read goodput and success first"
        )
    return found


def _label(runs: Sequence[RunData], fallback: str) -> str:
    labels = dict.fromkeys(str(data.facts.get("label") or fallback) for data in runs)
    return ", ".join(labels)

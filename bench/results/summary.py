"""What a run says, as one JSON object: the figures that reports, comparisons and programs read.

Pure. ``summarise`` takes any run, also one without requests or with nothing but failures, and never raises on it:
what cannot be said is null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.results.records import Outcome, RequestRecord, was_sent
from bench.results.run_data import RunData
from bench.results.slo import PRESETS, Goodput, Slo, goodput
from bench.results.statistics import (
    Values,
    clopper_pearson_interval,
    is_enough_for_percentile,
    needed_for_percentile,
    percentile_interval,
)
from bench.results.steady import Growth, Saturation, Window, find_saturation, find_warmup, find_window

SCHEMA = 1
LAG_LIMIT_S = 0.005
"""A run whose p99 of the schedule lag is above it measured its generator."""
ACHIEVED_LIMIT = 0.99
SHORTEST_RATE_S = 1.0
"""Over less than this, one late request decides a rate."""
DEMAND_WINDOW_COUNT = 20
PERCENTS = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}

Json = dict[str, Any]
OfRecord = Callable[[RequestRecord], float | None]

REQUEST_METRICS: Mapping[str, OfRecord] = {
    "ttft_s": lambda record: record.ttft_s,
    "service_ttft_s": lambda record: record.service_ttft_s,
    "tpot_s": lambda record: record.tpot_s,
    "e2e_s": lambda record: record.e2e_s,
    "normalised_s": lambda record: normalised_latency_s(record),
    "longest_gap_s": lambda record: max(record.message_gaps_s, default=None),
}
"""One value a request, or none."""
GAP_METRICS: Mapping[str, Callable[[RequestRecord], Values]] = {
    "itl_message_s": lambda record: message_gaps(record),
    "itl_token_s": lambda record: token_gaps(record),
}
"""Several values a request."""


def normalised_latency_s(record: RequestRecord) -> float | None:
    """E2E / output tokens (Yu et al. 2022, Orca); None unless the answer is complete."""
    end_to_end_s = record.e2e_s
    count = record.output_token_count
    return None if end_to_end_s is None or count < 1 else end_to_end_s / count


def message_gaps(record: RequestRecord) -> Values:
    """Between messages, seconds: what a reader sees."""
    return np.diff(np.asarray(record.message_at_s, dtype=np.float64))


def token_gaps(record: RequestRecord) -> Values:
    """Between tokens, seconds; those that came in one message have a gap of 0. In no order."""
    together = record.output_token_count - len(record.message_at_s)
    return np.concatenate([message_gaps(record), np.zeros(max(0, together))])


def summarise(data: RunData, *, slo: Slo | None = None) -> Json:
    """The summary. ``slo``: one more to judge by, already scaled; it comes first under ``goodput``.

    Seconds, tokens, bytes; shares from 0 to 1; null where nothing can be said. A *distribution* is ``{"n", "mean",
    "p50", "p90", "p95", "p99", "max", "p99_low", "p99_high", "is_enough_for_p99"}``: ``n`` values; the p99's bounds
    by ranks, at 95%, for metrics with one value a request; whether so many requests can carry a p99 at all (459).

    - ``schema``, ``label``, ``kind``, ``workload``
    - ``validity``: ``valid``, ``reasons`` (the generator's and ours)
    - ``window``: ``start_s``, ``end_s``, ``duration_s``, ``request_count``, ``before_count`` (warm-up),
      ``after_schedule_count`` (of ``request_count``, turns of sessions due after the schedule's end). All below is of
      requests due in it, unless it says otherwise
    - ``warmup``: ``verdict`` (none, cut, cannot tell), ``cut_s``, ``cut_request_count``, ``reason``
    - ``saturation``: ``verdict`` (saturated, steady, cannot tell), ``reason``, ``start_s`` and ``end_s`` of what was
      judged, ``in_flight`` and ``ttft``
      (``per_s``, ``lower_per_s``, ``upper_per_s``, ``share``: growth over the window in mean levels),
      ``turned_away_share``
    - ``requests``: ``planned_count``, ``count``, ``outcomes`` by outcome (``count``, ``share``, ``low``, ``high``:
      Clopper-Pearson 95%), of the whole run; ``window_outcomes`` the same of the window; ``errors``: the ten
      most frequent words of targets, with counts
    - ``rate``: ``requested_per_s``, ``achieved_per_s`` (by real send times), ``achieved_share``, of the whole run's
      requests that were sent
    - ``lag_s``: distribution of the schedule lag of the same, ``limit_s``
    - ``throughput``: ``requests_per_s`` (OK, ended in the window), ``input_tokens_per_s`` (prompts whose first token
      came in it), ``output_tokens_per_s`` (tokens that came in it, of any request); ``per_worker`` (null when worker
      counts are unknown): ``worker_count``, the three per worker, ``roles``: for each role ``worker_count`` and what
      it produces per worker (prefill: input; decode: output; others: both)
    - ``latency``: distributions ``ttft_s`` (from the intended time), ``service_ttft_s`` (from sending),
      ``itl_message_s``, ``itl_token_s``, ``tpot_s``, ``e2e_s``, ``normalised_s`` (E2E per output token),
      ``longest_gap_s``; each with ``missing_count``: requests of the window without a value
    - ``phases``: distributions by phase, of requests whose server told them
    - ``goodput``: by SLO: ``ttft_s``, ``tpot_s``, ``tail_itl_s``, ``tail_percent``, ``scale``, ``share``, ``low`` and
      ``high`` (Wilson 95%), ``good_count``, ``total_count``, ``good_requests_per_s``, ``good_tokens_per_s``,
      ``failed_by``, ``failed_only_by``, ``failed_most_by``
    - ``groups``: by group: ``request_count``, ``outcomes``, ``latency``, ``goodput`` share by SLO
    - ``cache``: ``prompt_token_count`` and ``cached_prompt_token_count`` of requests whose server told, ``share``
    - ``kv_transfer``: ``request_count``, ``bytes``, ``bytes_per_s`` (of the window)
    - ``placements``: counts by placement; ``attempts``: counts by number of attempts (as text)
    - ``demand``: ``window_s``, ``windows`` of the whole schedule: ``at_s``, ``prefill_tokens_per_s`` (due, less what
      was cached), ``decode_tokens_per_s`` (asked for), ``prefill_to_decode``
    - ``sample_size``: ``request_count``, ``needed_for_p99``, ``is_enough_for_p99``, ``warning`` or null
    """
    facts = data.facts
    plan = facts.get("plan") if isinstance(facts.get("plan"), Mapping) else {}
    assert isinstance(plan, Mapping)
    duration_s = _positive(plan.get("duration_s"))
    records = sorted(data.records, key=lambda record: (record.intended_at_s, record.index))
    warmup = find_warmup(records)
    window = find_window(records, warmup, duration_s)
    chosen = [record for record in records if window.holds(record.intended_at_s)]
    scale = _positive(facts.get("slo_scale")) or 1.0
    slos = [*([slo] if slo else []), *(preset.scaled(scale) for preset in PRESETS.values())]
    lag = distribution(_lags(records), by_request=True)
    rate = _rate(records)
    return {
        "schema": SCHEMA,
        "label": facts.get("label"),
        "kind": facts.get("kind"),
        "workload": plan.get("workload"),
        "validity": validity(data),
        "window": {
            "start_s": window.start_s,
            "end_s": window.end_s,
            "duration_s": window.length_s,
            "request_count": len(chosen),
            "before_count": sum(1 for record in records if record.intended_at_s < window.start_s - 1e-6),
            "after_schedule_count": sum(
                1 for r in chosen if r.intended_at_s > (window.schedule_end_s or window.end_s)
            ),
        },
        "warmup": {
            "verdict": warmup.verdict.value,
            "cut_s": warmup.cut_s,
            "cut_request_count": warmup.cut_request_count,
            "reason": warmup.reason,
        },
        "saturation": _saturation(find_saturation(records, warmup, window)),
        "requests": {
            "planned_count": plan.get("request_count"),
            "count": len(records),
            "outcomes": _outcomes(records),
            "window_outcomes": _outcomes(chosen),
            "errors": dict(Counter(record.error for record in records if record.error).most_common(10)),
        },
        "rate": rate,
        "lag_s": {**lag, "limit_s": LAG_LIMIT_S},
        "throughput": _throughput(records, window, facts.get("worker_counts")),
        "latency": _latency(chosen),
        "phases": _phases(chosen),
        "goodput": {each.name: _goodput(goodput(chosen, each, window.length_s)) for each in slos},
        "groups": _groups(chosen, slos, window),
        "cache": _cache(chosen),
        "kv_transfer": _kv_transfer(chosen, window),
        "placements": dict(Counter(record.placement for record in chosen if record.placement).most_common()),
        "attempts": {
            str(count): times
            for count, times in sorted(
                Counter(record.attempt_count for record in chosen if record.attempt_count is not None).items()
            )
        },
        "demand": _demand(records, duration_s),
        "sample_size": _sample_size(len(chosen)),
    }


def distribution(values: Sequence[float] | Values, *, by_request: bool, request_count: int | None = None) -> Json:
    """See ``summarise``. ``by_request``: one value a request, so that ranks give bounds of the p99.
    ``request_count``: how many requests the values are of, where it is not one each."""
    found = np.asarray(values, dtype=np.float64)
    n = int(found.size)
    empty: Json = dict.fromkeys(("mean", *PERCENTS, "max", "p99_low", "p99_high"))
    enough = is_enough_for_percentile(n if request_count is None else request_count)
    if n == 0:
        return {"n": 0, **empty, "is_enough_for_p99": False}
    bounds = percentile_interval(found, 99.0) if by_request else None
    points = np.percentile(found, list(PERCENTS.values())).tolist()
    return {
        "n": n,
        "mean": float(found.mean()),
        **dict(zip(PERCENTS, points, strict=True)),
        "max": float(found.max()),
        "p99_low": bounds.low if bounds else None,
        "p99_high": bounds.high if bounds else None,
        "is_enough_for_p99": enough,
    }


def _latency(records: Sequence[RequestRecord]) -> Json:
    found: Json = {}
    for name, of_record in REQUEST_METRICS.items():
        values = [value for record in records if (value := of_record(record)) is not None]
        found[name] = {
            **distribution(values, by_request=True),
            "missing_count": len(records) - len(values),
        }
    for name, gaps_of in GAP_METRICS.items():
        units = [gaps for record in records if (gaps := gaps_of(record)).size]
        pooled = np.concatenate(units) if units else np.empty(0)
        found[name] = {
            **distribution(pooled, by_request=False, request_count=len(units)),
            "missing_count": len(records) - len(units),
        }
    return found


def _phases(records: Iterable[RequestRecord]) -> Json:
    by_phase: dict[str, list[float]] = {}
    for record in records:
        for phase, seconds in (record.phases_s or {}).items():
            by_phase.setdefault(phase, []).append(seconds)
    return {phase: distribution(values, by_request=True) for phase, values in by_phase.items()}


def _outcomes(records: Sequence[RequestRecord]) -> Json:
    counts = Counter(record.outcome for record in records)
    found: Json = {}
    for outcome in Outcome:
        interval = clopper_pearson_interval(counts[outcome], len(records))
        found[outcome.value] = {
            "count": counts[outcome],
            "share": counts[outcome] / len(records) if records else None,
            "low": interval.low,
            "high": interval.high,
        }
    return found


def _lags(records: Iterable[RequestRecord]) -> list[float]:
    """Of what was sent: a turn that never was has no lag, and the 0 in its record would hide that of others."""
    return [record.lag_s for record in records if was_sent(record)]


def _rate(records: Iterable[RequestRecord]) -> Json:
    """Between the first and the last request that was sent, intended and sent: n requests have n - 1 intervals.
    ``records`` by intended time."""
    records = [record for record in records if was_sent(record)]
    nothing: Json = {"requested_per_s": None, "achieved_per_s": None, "achieved_share": None}
    if len(records) < 2:
        return nothing
    intended_s = records[-1].intended_at_s - records[0].intended_at_s
    sent = [record.sent_at_s for record in records]
    sent_s = max(sent) - min(sent)
    if intended_s < SHORTEST_RATE_S or sent_s <= 0:
        return nothing
    intervals = len(records) - 1
    return {
        "requested_per_s": intervals / intended_s,
        "achieved_per_s": intervals / sent_s,
        "achieved_share": min(1.0, intended_s / sent_s),
    }


def _throughput(records: Sequence[RequestRecord], window: Window, worker_counts: object) -> Json:
    names = ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s")
    length_s = window.length_s
    if length_s <= 0:
        return {**dict.fromkeys(names), "per_worker": None}
    ended = sum(1 for r in records if r.outcome is Outcome.OK and window.holds(r.ended_at_s))
    read = sum(r.prompt_token_count for r in records if r.message_at_s and window.holds(r.message_at_s[0]))
    written = 0
    for record in records:
        if record.message_at_s:
            at = np.asarray(record.message_at_s)
            inside = (at >= window.start_s - 1e-6) & (at <= window.end_s + 1e-6)
            written += int(np.asarray(record.message_token_counts)[inside].sum())
    whole = dict(zip(names, (ended / length_s, read / length_s, written / length_s), strict=True))
    return {**whole, "per_worker": _per_worker(whole, worker_counts)}


def _per_worker(whole: Mapping[str, float], worker_counts: object) -> Json | None:
    """Input tokens are divided by the workers that read prompts, output tokens by those that write, and beside it all
    by all: dividing only by a role flatters whoever has many of the other."""
    if not isinstance(worker_counts, Mapping):
        return None
    counts = {str(role): count for role, count in worker_counts.items() if isinstance(count, int) and count > 0}
    total = sum(counts.values())
    if total == 0:
        return None
    produces = {"prefill": ("input_tokens_per_s",), "decode": ("output_tokens_per_s",)}
    both = ("input_tokens_per_s", "output_tokens_per_s")
    return {
        "worker_count": total,
        **{name: value / total for name, value in whole.items()},
        "roles": {
            role: {"worker_count": count, **{name: whole[name] / count for name in produces.get(role, both)}}
            for role, count in counts.items()
        },
    }


def _goodput(found: Goodput) -> Json:
    return {
        "ttft_s": found.slo.ttft_s,
        "tpot_s": found.slo.tpot_s,
        "tail_itl_s": found.slo.tail_itl_s,
        "tail_percent": found.slo.tail_percent,
        "scale": found.slo.scale,
        "share": found.share,
        "low": found.interval.low,
        "high": found.interval.high,
        "good_count": found.good_count,
        "total_count": found.total_count,
        "good_requests_per_s": found.good_requests_per_s,
        "good_tokens_per_s": found.good_tokens_per_s,
        "failed_by": dict(found.failed_by),
        "failed_only_by": dict(found.failed_only_by),
        "failed_most_by": found.failed_most_by,
    }


def _groups(records: Sequence[RequestRecord], slos: Sequence[Slo], window: Window) -> Json:
    by_group: dict[str, list[RequestRecord]] = {}
    for record in records:
        by_group.setdefault(record.group, []).append(record)
    return {
        group: {
            "request_count": len(members),
            "outcomes": _outcomes(members),
            "latency": _latency(members),
            "goodput": {slo.name: goodput(members, slo, window.length_s).share for slo in slos},
        }
        for group, members in sorted(by_group.items())
    }


def _cache(records: Iterable[RequestRecord]) -> Json:
    told = [(r.prompt_token_count, r.cached_prompt_token_count) for r in records]
    pairs = [(asked, cached) for asked, cached in told if cached is not None]
    asked_count, cached_count = sum(asked for asked, _ in pairs), sum(cached for _, cached in pairs)
    return {
        "prompt_token_count": asked_count,
        "cached_prompt_token_count": cached_count,
        "share": cached_count / asked_count if asked_count else None,
    }


def _kv_transfer(records: Iterable[RequestRecord], window: Window) -> Json:
    moved = [record.kv_transfer_bytes for record in records if record.kv_transfer_bytes is not None]
    return {
        "request_count": sum(1 for kv_bytes in moved if kv_bytes > 0),
        "bytes": sum(moved) if moved else None,
        "bytes_per_s": sum(moved) / window.length_s if moved and window.length_s > 0 else None,
    }


def _demand(records: Sequence[RequestRecord], duration_s: float | None) -> Json:
    end_s = max((record.intended_at_s for record in records), default=0.0)
    if not records or end_s <= 0:
        return {"window_s": None, "windows": []}
    window_s = max(duration_s or 0.0, end_s) / DEMAND_WINDOW_COUNT
    places = [min(int(max(0.0, r.intended_at_s) / window_s), DEMAND_WINDOW_COUNT - 1) for r in records]
    prefill = np.bincount(
        places,
        weights=[max(0, r.prompt_token_count - (r.cached_prompt_token_count or 0)) for r in records],
        minlength=DEMAND_WINDOW_COUNT,
    )
    decode = np.bincount(places, weights=[r.output_token_limit for r in records], minlength=DEMAND_WINDOW_COUNT)
    return {
        "window_s": window_s,
        "windows": [
            {
                "at_s": place * window_s,
                "prefill_tokens_per_s": float(prefill[place]) / window_s,
                "decode_tokens_per_s": float(decode[place]) / window_s,
                "prefill_to_decode": float(prefill[place] / decode[place]) if decode[place] else None,
            }
            for place in range(DEMAND_WINDOW_COUNT)
        ],
    }


def _saturation(found: Saturation) -> Json:
    def growth(of: Growth | None) -> Json | None:
        if of is None:
            return None
        return {
            "per_s": of.per_s,
            "lower_per_s": of.lower_per_s,
            "upper_per_s": of.upper_per_s,
            "share": of.share,
        }

    return {
        "verdict": found.verdict.value,
        "reason": found.reason,
        "start_s": found.span.start_s,
        "end_s": found.span.end_s,
        "in_flight": growth(found.in_flight),
        "ttft": growth(found.ttft),
        "turned_away_share": found.turned_away_share,
    }


def validity(data: RunData) -> Json:
    """``valid`` and ``reasons``: the generator's verdict where it gave one, our own of lag and rate where not; and
    always whether all is here."""
    plan = data.facts.get("plan")
    planned = plan.get("request_count") if isinstance(plan, Mapping) else None
    told = data.facts.get("invalid_reasons")
    reasons = [str(reason) for reason in told] if isinstance(told, list | tuple) else []
    if data.facts.get("valid") is False and not reasons:
        reasons.append("the generator says so")
    if not data.is_complete or data.cut_off_line_count:
        reasons.append("the run was cut off: its end is missing")
    if isinstance(planned, int) and planned != len(data.records):
        reasons.append(f"{len(data.records)} of {planned} planned requests have a record")
    if "valid" not in data.facts:
        reasons += _against_the_schedule(data.records)
    return {"valid": not reasons, "reasons": reasons}


def _against_the_schedule(records: Sequence[RequestRecord]) -> list[str]:
    reasons = []
    lag_s = distribution(_lags(records), by_request=True)["p99"]
    if lag_s is not None and lag_s > LAG_LIMIT_S:
        reasons.append(f"schedule lag p99 {lag_s * 1e3:.2f} ms, limit {LAG_LIMIT_S * 1e3:.0f} ms")
    share = _rate(sorted(records, key=lambda record: record.intended_at_s))["achieved_share"]
    if share is not None and share < ACHIEVED_LIMIT:
        reasons.append(f"achieved {share:.1%} of the requested rate, limit {ACHIEVED_LIMIT:.0%}")
    return reasons


def _sample_size(request_count: int) -> Json:
    needed = needed_for_percentile(0)
    enough = request_count >= needed
    return {
        "request_count": request_count,
        "needed_for_p99": needed,
        "is_enough_for_p99": enough,
        "warning": None if enough else f"{request_count} requests are too few for a p99: it takes {needed} or more",
    }


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None

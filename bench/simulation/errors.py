"""How far off a simulated run is: errors by metric with their signs, worst configurations first. Pure.

An error is simulated / measured - 1; of goodput, the difference of shares. Compared are the very requests that the
measured run's own rules call steady, in both. A goal is claimed only if the mean of |error| over the configurations
is within it; what misses stays in the table, and its claim is withheld.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from bench.results.records import Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.results.slo import PRESETS, meets
from bench.results.steady import find_warmup, find_window

SCHEMA = 1
FEWEST_CONFIGURATIONS = 12
"""Valid ones that a claim needs."""
GOODPUT_SLO = "chatbot"
GOALS = {"ttft_mean": 0.05, "ttft_p99": 0.10, "itl_mean": 0.02, "e2e_mean": 0.03}
TITLES = {
    "ttft_mean": "TTFT mean",
    "ttft_p99": "TTFT p99",
    "itl_mean": "ITL mean",
    "itl_p99": "ITL p99",
    "e2e_mean": "E2E mean",
    "goodput": "goodput",
}


def metrics_of(records: Sequence[RequestRecord], slo_scale: float, compared: Set[int]) -> dict[str, float | None]:
    """Seconds, of the requests ``compared``, and a share of all; None where there is nothing to take it of."""
    slo = PRESETS[GOODPUT_SLO].scaled(slo_scale)
    chosen = [record for record in records if record.index in compared]
    ttfts = [value for record in chosen if (value := record.ttft_s) is not None]
    gaps = [gap for record in chosen for gap in record.token_gaps_s]
    e2es = [value for record in chosen if (value := record.e2e_s) is not None]
    return {
        "ttft_mean": _mean(ttfts),
        "ttft_p99": float(np.percentile(ttfts, 99)) if ttfts else None,
        "itl_mean": _mean(gaps),
        "itl_p99": float(np.percentile(gaps, 99)) if gaps else None,
        "e2e_mean": _mean(e2es),
        "goodput": sum(meets(record, slo) for record in records) / len(records) if records else None,
    }


def steady_indices(measured: RunData) -> set[int]:
    """The requests that count, by the rules that a report of the measured run cuts by."""
    records = sorted(measured.records, key=lambda record: (record.intended_at_s, record.index))
    plan = measured.facts.get("plan")
    duration_s = plan.get("duration_s") if isinstance(plan, Mapping) else None
    window = find_window(records, find_warmup(records), duration_s if isinstance(duration_s, int | float) else None)
    return {record.index for record in records if window.holds(record.intended_at_s)}


def error_of(metric: str, measured: float | None, simulated: float | None) -> float | None:
    """With its sign; None where either is missing, or nothing was measured to divide by."""
    if measured is None or simulated is None:
        return None
    if metric == "goodput":
        return simulated - measured
    return simulated / measured - 1 if measured > 0 else None


def errors_of(pairs: Sequence[tuple[str, RunData, RunData]]) -> dict[str, Any]:
    """(name, measured, simulated) of each configuration -> what the page is made of. Fit for JSON.

    ``configurations``: worst first, by the largest error in units of its goal. ``metrics``: by metric ``mape``,
    ``bias`` (mean error), ``worst``, ``within_goal_count``, ``count``, ``pearson_r``, ``goal``, ``claim``. Invalid
    runs are shown and not counted, for what they measured is not the server's time alone;
    ``metrics_with_invalid_runs`` counts them and claims nothing.
    """
    rows = []
    for name, measured, simulated in pairs:
        indices = steady_indices(measured)
        chosen = [[record for record in run.records if record.index in indices] for run in (measured, simulated)]
        # Latencies of the answers that both completed: those of one alone are of other requests. Outcomes that differ
        # are in goodput, and stand below the table.
        complete = [{record.index for record in records if record.outcome is Outcome.OK} for records in chosen]
        both = complete[0] & complete[1]
        slo_scale = float(measured.facts.get("slo_scale") or 1.0)
        real, ours = (metrics_of(records, slo_scale, both) for records in chosen)
        rows.append(
            {
                "name": name,
                "is_valid": bool(measured.facts.get("valid")),
                "invalid_reasons": list(measured.facts.get("invalid_reasons") or ()),
                "request_count": len(indices),
                "outcomes": [_outcomes(records) for records in chosen],
                "measured": real,
                "simulated": ours,
                "errors": {metric: error_of(metric, real[metric], ours[metric]) for metric in TITLES},
            }
        )
    rows.sort(key=_badness, reverse=True)
    valid = [row for row in rows if row["is_valid"]]
    return {
        "schema": SCHEMA,
        "configurations": rows,
        "metrics": {metric: _summary(metric, valid) for metric in TITLES},
        "metrics_with_invalid_runs": {metric: _summary(metric, rows, may_claim=False) for metric in TITLES},
    }


def _badness(row: Mapping[str, Any]) -> float:
    """The worst is one without an error to tell: it could not be compared."""
    errors = [(row["errors"][metric], goal) for metric, goal in GOALS.items()]
    return max(math.inf if error is None else abs(error) / goal for error, goal in errors)


def _summary(metric: str, rows: Sequence[Mapping[str, Any]], *, may_claim: bool = True) -> dict[str, Any]:
    known = [row for row in rows if row["errors"][metric] is not None]
    errors = np.asarray([row["errors"][metric] for row in known])
    goal = GOALS.get(metric)
    if not len(errors):
        return {"count": 0, "goal": goal, "claim": "withheld: no valid run has it"}
    mape = float(np.abs(errors).mean())
    claim = "no goal"
    if goal is not None:
        claim = "met on the mean" if mape <= goal else "withheld: missed"
        if claim.startswith("met") and len(known) < len(rows):
            claim = f"withheld: {len(rows) - len(known)} valid runs do not have it"
        elif claim.startswith("met") and len(known) < FEWEST_CONFIGURATIONS:
            claim = f"withheld: {len(known)} configurations, {FEWEST_CONFIGURATIONS} are needed"
    if not may_claim:
        claim = "none"
    return {
        "count": len(errors),
        "mape": mape,
        "bias": float(errors.mean()),
        "worst": float(errors[int(np.abs(errors).argmax())]),
        "within_goal_count": None if goal is None else int((np.abs(errors) <= goal).sum()),
        "pearson_r": _pearson(*([row[kind][metric] for row in known] for kind in ("measured", "simulated"))),
        "goal": goal,
        "claim": claim,
    }


def _pearson(measured: Sequence[float], simulated: Sequence[float]) -> float | None:
    if len(measured) < 3 or np.std(measured) == 0 or np.std(simulated) == 0:
        return None
    return float(np.corrcoef(measured, simulated)[0, 1])


def _outcomes(records: Sequence[RequestRecord]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        counts[record.outcome.value] = counts.get(record.outcome.value, 0) + 1
    return counts


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def render_errors(result: Mapping[str, Any]) -> str:
    """Tables of Markdown: by metric, and by configuration."""
    lines = _by_metric(result["metrics"])
    if not all(row["is_valid"] for row in result["configurations"]):
        lines += [
            "",
            "With the invalid runs, which claims nothing:",
            "",
            *_by_metric(result["metrics_with_invalid_runs"]),
        ]
    lines += [
        "",
        "| configuration, worst first | requests | " + " | ".join(TITLES.values()) + " |",
        "|---|---:|" + "---:|" * len(TITLES),
    ]
    for row in result["configurations"]:
        name = row["name"] if row["is_valid"] else f"{row['name']} (invalid, not counted)"
        cells = [_cell(metric, row) for metric in TITLES]
        lines.append(f"| {name} | {row['request_count']} | {' | '.join(cells)} |")
    differing = [row for row in result["configurations"] if row["outcomes"][0] != row["outcomes"][1]]
    if differing:
        lines += ["", "Outcomes differ:", ""]
        lines += [
            f"- {row['name']}: measured {_words(row['outcomes'][0])}, simulated {_words(row['outcomes'][1])}"
            for row in differing
        ]
    return "\n".join(lines)


def _by_metric(metrics: Mapping[str, Any]) -> list[str]:
    lines = [
        "| metric | goal | mean of absolute errors | bias | worst | within the goal | Pearson r | claim |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for metric, summary in metrics.items():
        goal = "" if summary["goal"] is None else f"{summary['goal']:.0%}"
        if not summary["count"]:
            lines.append(f"| {TITLES[metric]} | {goal} | | | | | | {summary['claim']} |")
            continue
        within, r = summary["within_goal_count"], summary["pearson_r"]
        share = "" if within is None else f"{within} of {summary['count']}"
        lines.append(
            f"| {TITLES[metric]} | {goal} | {_percent(metric, summary['mape'], signed=False)} "
            f"| {_percent(metric, summary['bias'])} | {_percent(metric, summary['worst'])} "
            f"| {share} | {'' if r is None else f'{r:.3f}'} "
            f"| {summary['claim']} |"
        )
    return lines


def _cell(metric: str, row: Mapping[str, Any]) -> str:
    real, error = row["measured"][metric], row["errors"][metric]
    if real is None or error is None:
        return ""
    if metric == "goodput":
        value = f"{real:.0%}"
    else:
        value = f"{real * 1e3:,.0f} ms" if real >= 0.1 else f"{real * 1e3:.1f} ms"
    return f"{value} {_percent(metric, error)}"


def _percent(metric: str, value: float, *, signed: bool = True) -> str:
    sign = "+" if signed else ""
    return f"{value * 100:{sign}.1f} points" if metric == "goodput" else f"{value * 100:{sign}.1f}%"


def _words(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))

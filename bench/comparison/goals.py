"""The goals of the comparison, set before it was run, and what was measured of each. Misses stay misses. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.comparison import tables
from bench.comparison.tables import BASE, CellRun
from bench.results.slo import PRESETS

GAP_GOAL_S = 0.06


@dataclass(frozen=True, slots=True)
class GoalLine:
    what: str
    measured: str
    goal: str
    verdict: str
    """"met", "missed", or why there is none."""


def goal_lines(runs: Sequence[CellRun], titles: Mapping[str, str], seed: int) -> list[GoalLine]:
    """Every goal, in order; one whose system was not asked says so. Loads with remarks decide nothing."""
    runs = [run for run in runs if not run.remarks]
    streams = [run for run in runs if run.group == "streams"]
    alone = [run for run in runs if run.group == "alone"]
    lines = [_gap(streams)]
    for system, least in (("vllm-2core", 35.0), ("vllm-2core-chunk-128", 4.0)):
        lines.append(_at_least(streams, system, tables.STREAM_GAP_P99, least, "gap p99 of the streams", titles, seed))
    ttft_2000 = tables.alone_measures((2000,))[0]
    for system in ("stock-router", "stock-router-tuned"):
        lines.append(_at_least(alone, system, ttft_2000, 3.0, "idle TTFT at 2,000 tokens", titles, seed))
        lines.append(_at_least(alone, system, tables.ITL_P50, 2.0, "idle ITL p50", titles, seed))
        lines.append(
            _at_least(streams, system, tables.LONG_TTFT, 3.0, "TTFT of long prompts beside streams", titles, seed)
        )
    crowd = [run for run in runs if run.group == "crowd"]
    lines += _against_naive(crowd, titles)
    lines.append(_loss(streams, titles))
    return lines


def _gap(runs: Sequence[CellRun]) -> GoalLine:
    what, goal = "Baton 1P+1D: gap p99 of the streams", f"at most {GAP_GOAL_S * 1e3:.0f} ms"
    found = tables.value(runs, BASE, tables.STREAM_GAP_P99)
    if found is None:
        return GoalLine(what, "—", goal, "no valid load")
    return GoalLine(what, f"{found * 1e3:.0f} ms", goal, "met" if found <= GAP_GOAL_S else "missed")


def _at_least(
    runs: Sequence[CellRun],
    system: str,
    measure: tables.Measure,
    least: float,
    what: str,
    titles: Mapping[str, str],
    seed: int,
) -> GoalLine:
    line = f"{what}: {titles.get(system, system)} / Baton"
    pairs = tables.shared_runs(runs, system)
    found = tables.ratio(runs, system, measure, seed)
    goal = f"at least {least:g}x"
    if found is None:
        return GoalLine(line, "—", goal, "no valid load that both were asked")
    missing = tables.unanswered_count(base for base, _ in pairs)
    if missing:
        return GoalLine(line, str(found), goal, f"withheld: Baton left {missing} unanswered")
    bound = "≥ " if tables.unanswered_count(peer for _, peer in pairs) else ""
    if found.value < least:
        return GoalLine(line, f"{bound}{found}", goal, "missed")
    if found.low is None:
        verdict = "met by too few for an interval"
    else:
        # Met by the figure alone is said as such: the interval decides what may be claimed.
        verdict = "met" if found.low >= least else "met, but the interval reaches below"
    return GoalLine(line, f"{bound}{found}", goal, verdict)


def _against_naive(runs: Sequence[CellRun], titles: Mapping[str, str]) -> list[GoalLine]:
    name = titles.get("naive", "naive")
    chat = PRESETS["chatbot"]
    lines = []
    for what, of in (
        ("answers a second", tables.answer_rate),
        (f"goodput ({chat.name} SLO)", lambda runs, system: tables.good_rate(runs, system, chat)),
    ):
        line, goal = f"{what}, eight callers: Baton / {name}", "at least 10x"
        shared = [run for pair in tables.shared_runs(runs, "naive") for run in pair]
        mine, theirs = of(shared, BASE), of(shared, "naive")
        if math.isnan(mine) or math.isnan(theirs):
            lines.append(GoalLine(line, "—", goal, "no valid load that both were asked"))
        elif theirs == 0:
            lines.append(
                GoalLine(line, f"{mine:.2f} against none", goal, "met" if mine > 0 else "no ratio of nothing")
            )
        else:
            met = "met" if mine >= 10.0 * theirs else "missed"
            lines.append(GoalLine(line, f"{mine:.2f} / {theirs:.2f} = {mine / theirs:.1f}x", goal, met))
    return lines


def _loss(runs: Sequence[CellRun], titles: Mapping[str, str]) -> GoalLine:
    """Not a goal but a debt: one core prefills where the one server uses two."""
    what = f"TTFT of long prompts beside streams: Baton / {titles.get('vllm-2core', 'vllm-2core')}"
    pairs = tables.shared_runs(runs, "vllm-2core")
    shared = [run for pair in pairs for run in pair]
    mine = tables.value(shared, BASE, tables.LONG_TTFT)
    theirs = tables.value(shared, "vllm-2core", tables.LONG_TTFT)
    if mine is None or theirs is None:
        return GoalLine(what, "—", "the price: up to 2x", "no valid load that both were asked")
    price = mine / theirs
    measured = f"{mine:.2f} s / {theirs:.2f} s = {price:.2f}x"
    if missing := tables.unanswered_count(base for base, _ in pairs):
        return GoalLine(what, measured, "the price: up to 2x", f"more: Baton left {missing} unanswered")
    return GoalLine(what, measured, "the price: up to 2x", "within it" if price <= 2.0 else "more than it")


def goals_table(lines: Sequence[GoalLine]) -> str:
    rows = ["| | measured | goal | |", "|---|---:|---:|---|"]
    rows += [f"| {line.what} | {line.measured} | {line.goal} | {line.verdict} |" for line in lines]
    return "\n".join(rows)

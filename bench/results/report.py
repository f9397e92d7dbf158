"""The report: one HTML file of one run, of a sweep of rates, of several systems.

``render`` is pure. Runs with one label are one system and make one line where rates differ; the curves of several
runs lie in one plot where their rates agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.results import report_plots as plots
from bench.results.report_page import Details, Panel, Part, Section, Table, page, pretty
from bench.results.report_plots import Plot, Style
from bench.results.report_view import RunView
from bench.results.run_data import RunData
from bench.results.slo import PRESETS
from bench.results.summary import LAG_LIMIT_S

POINTS_OF_ALL = 12_000
"""Points of a curve times runs: more runs get fewer points each, so that the page stays light."""
MOST_POINTS, FEWEST_POINTS = 600, 100
FACTS_CHARACTERS = 40_000
DETAILED_RUNS = 60
"""Further runs are in tables and sweeps, without plots of their own."""

DASH = "–"


def render(runs: Sequence[RunData], *, title: str | None = None) -> str:
    """The page, about 5 MB and some ten kilobytes a run. Raises ``ValueError`` without runs."""
    if not runs:
        raise ValueError("a report needs at least one run")
    workloads = {str(_plan(run.facts).get("workload") or "unnamed") for run in runs}
    views = [RunView.of(place + 1, run, shows_workload=len(workloads) > 1) for place, run in enumerate(runs)]
    style = Style.of(views)
    point_limit = min(MOST_POINTS, max(FEWEST_POINTS, POINTS_OF_ALL // len(views)))
    sections = [Section("Summary", [Panel("", _summary_tables(views))], intro=_summary_intro(views))]
    if len(views) > 1:
        sections.append(_against_rates(views, style))
    sections += [_distributions(views, style, point_limit), _one_run(views, style, point_limit), _environment(views)]
    names = list(dict.fromkeys(view.line_name for view in views))
    return page(
        title or _title(views),
        subtitle=f"{_count(len(views), 'run')} of {', '.join(names)}; workload {', '.join(sorted(workloads))}",
        badges=_badges(views),
        warnings=_warnings(views),
        sections=sections,
        footer="Made by baton bench. Everything is in this file: it fetches nothing. Every latency counts from the "
        "time at which a request was meant to be sent; requests that failed are in every denominator.",
    )


# Head


def _title(views: Sequence[RunView]) -> str:
    systems = list(dict.fromkeys(view.system for view in views))
    if len(views) == 1:
        return views[0].name
    return f"{' / '.join(systems)}: {', '.join(dict.fromkeys(view.workload for view in views))}"


def _badges(views: Sequence[RunView]) -> list[tuple[str, str]]:
    simulated = sum(view.is_simulated for view in views)
    invalid = sum(not view.is_valid for view in views)
    badges = []
    if simulated:
        badges.append(
            ("simulated", "SIMULATED" if simulated == len(views) else f"{simulated} of {len(views)} SIMULATED")
        )
    if invalid:
        badges.append(("bad", "INVALID" if len(views) == 1 else f"{invalid} of {len(views)} INVALID"))
    else:
        badges.append(("good", "valid"))
    return badges


def _warnings(views: Sequence[RunView]) -> list[tuple[str, Sequence[str]]]:
    if len(views) == 1:
        view = views[0]
        return (
            [] if view.is_valid else [("This run is invalid: do not quote it", view.summary["validity"]["reasons"])]
        )
    reasons = [
        f"run {view.number} ({view.name}): {'; '.join(view.summary['validity']['reasons'])}"
        for view in views
        if not view.is_valid
    ]
    return [("These runs are invalid: do not quote them", reasons)] if reasons else []


# Summary


def _summary_intro(views: Sequence[RunView]) -> str:
    slo = views[0].summary["goodput"][next(iter(PRESETS))]
    scales = sorted({float(view.facts.get("slo_scale") or 1.0) for view in views})
    scaled = "" if scales == [1.0] else f" SLOs are scaled by {', '.join(f'{scale:g}' for scale in scales)}."
    return (
        "Of the requests due in the measured window (warm-up cut by rule). ITL: every gap between two messages. "
        "A request is good when it ended well and met all three bounds of the SLO: TTFT, TPOT and its own "
        + ("longest gap." if slo["tail_percent"] == 100 else f"p{slo['tail_percent']:g} gap.")
        + scaled
    )


def _summary_tables(views: Sequence[RunView]) -> list[Part]:
    figures = Table(
        (
            *(
                "run",
                "requests/s offered",
                "measured requests",
                "OK",
                "TTFT p50 ms",
                "TTFT p99 ms",
                "ITL p50 ms",
                "ITL p99 ms",
            ),
            *(
                "TPOT p50 ms",
                "TPOT p99 ms",
                "E2E p50 ms",
                "E2E p99 ms",
                "output tokens/s",
                "input tokens/s",
                "load",
                "valid",
            ),
        ),
        [_figures_row(view) for view in views],
        caption="p99 in brackets: fewer requests than a p99 needs (459).",
    )
    slos = list(views[0].summary["goodput"])
    goodput = Table(
        ("run", *(_slo_head(name, views) for name in slos)),
        [[_head(view), *(_goodput_cell(view, name) for name in slos)] for view in views],
        caption="Goodput: share of requests that met the SLO [95% interval], and good requests/s.",
    )
    return [figures, goodput]


def _head(view: RunView) -> str:
    return f"{view.number}. {view.name}"


def _figures_row(view: RunView) -> list[str]:
    summary = view.summary
    is_enough = summary["sample_size"]["is_enough_for_p99"]

    def ms(metric: str, statistic: str) -> str:
        text = figure(view.latency_ms(metric, statistic))
        return f"({text})" if statistic == "p99" and not is_enough and text != DASH else text

    share = summary["requests"]["window_outcomes"]["ok"]["share"]
    saturation = summary["saturation"]["verdict"]
    ok = DASH if share is None else percent(share)
    return [
        _head(view),
        figure(view.offered_per_s),
        str(summary["window"]["request_count"]),
        ok if share is None or share >= 0.99 else f"!{ok}",
        *(ms(metric, statistic) for metric in ("ttft", "itl_message", "tpot", "e2e") for statistic in ("p50", "p99")),
        figure(summary["throughput"]["output_tokens_per_s"]),
        figure(summary["throughput"]["input_tokens_per_s"]),
        f"!{saturation}" if saturation == "saturated" else str(saturation),
        "yes" if view.is_valid else "!NO",
    ]


def _slo_head(name: str, views: Sequence[RunView]) -> str:
    bounds = {
        (one["ttft_s"], one["tpot_s"], one["tail_itl_s"]) for one in (view.summary["goodput"][name] for view in views)
    }
    if len(bounds) > 1:
        return name
    ttft_s, tpot_s, tail_s = bounds.pop()
    return f"{name} (TTFT {ttft_s * 1e3:g}, TPOT {tpot_s * 1e3:g}, gap {tail_s * 1e3:g} ms)"


def _goodput_cell(view: RunView, name: str) -> str:
    one = view.summary["goodput"][name]
    if one["share"] is None:
        return DASH
    cell = f"{percent(one['share'])} [{percent(one['low'])}, {percent(one['high'])}]"
    return f"{cell}, {figure(one['good_requests_per_s'])}/s"


# Sweeps


def _against_rates(views: Sequence[RunView], style: Style) -> Section:
    def of(metric: str, statistic: str) -> Any:
        return lambda view: view.latency_ms(metric, statistic)

    panels = []
    for name in views[0].summary["goodput"]:
        bounds = views[0].summary["goodput"][name]
        is_one = len({view.summary["goodput"][name]["ttft_s"] for view in views}) == 1

        def limit(
            key: str, label: str, *, bounds: Mapping[str, Any] = bounds, is_one: bool = is_one
        ) -> list[dict[str, Any]]:
            # Runs that are scaled differently have no line in common.
            return [plots.horizontal_line(bounds[key] * 1000.0, label)] if is_one else []

        parts: list[Part] = [
            plots.against_rate(
                views,
                style,
                title="TTFT against rate",
                caption="Solid: p50, dotted: p99. A line joins the median of the runs at each rate; thin crosses are "
                "invalid runs; dashes and hollow markers, simulated ones.",
                is_log=True,
                y_title="ms",
                curves={"p50": of("ttft", "p50"), "p99": of("ttft", "p99")},
                shapes=limit("ttft_s", f"SLO {name}: TTFT"),
            ),
            plots.against_rate(
                views,
                style,
                title="TPOT against rate",
                caption="Solid: p50, dotted: p99. TPOT is a mean over an answer: it hides stalls.",
                y_title="ms",
                curves={"p50": of("tpot", "p50"), "p99": of("tpot", "p99")},
                shapes=limit("tpot_s", f"SLO {name}: TPOT"),
            ),
            plots.against_rate(
                views,
                style,
                title="Longest gap of an answer against rate",
                caption="What a reader sees stall. Solid: of the median answer, dotted: of the p99.",
                is_log=True,
                y_title="ms",
                curves={"p50": of("longest_gap", "p50"), "p99": of("longest_gap", "p99")},
                shapes=limit("tail_itl_s", f"SLO {name}: gap"),
            ),
            plots.against_rate(
                views,
                style,
                title="Goodput against rate",
                caption=f"Requests/s that met {name}. The thin dotted line is what was offered.",
                y_title="good requests/s",
                curves={"goodput": lambda view, name=name: view.goodput(name, "good_requests_per_s")},
                with_offered=True,
                switches=(),
            ),
            plots.against_rate(
                views,
                style,
                title="Share within the SLO against rate",
                caption=f"Of all requests, however they ended. The line at {plots.ATTAINMENT_GOAL:.0%} is where the "
                "highest rate within the SLO is usually read off.",
                y_title="share",
                curves={"share": lambda view, name=name: view.goodput(name, "share")},
                shapes=[
                    plots.horizontal_line(
                        plots.ATTAINMENT_GOAL, f"SLO {name}: {plots.ATTAINMENT_GOAL:.0%} of requests"
                    )
                ],
                y_more={"range": [0, 1.03], "tickformat": ".0%"},
                switches=(),
            ),
            plots.against_rate(
                views,
                style,
                title="ITL against rate",
                caption="Gaps between messages of all answers together. Solid: p50, dotted: p99.",
                is_log=True,
                y_title="ms",
                curves={"p50": of("itl_message", "p50"), "p99": of("itl_message", "p99")},
            ),
            plots.against_rate(
                views,
                style,
                title="E2E against rate",
                caption="Solid: p50, dotted: p99; of complete answers.",
                is_log=True,
                y_title="ms",
                curves={"p50": of("e2e", "p50"), "p99": of("e2e", "p99")},
            ),
            plots.against_rate(
                views,
                style,
                title="Output tokens/s against rate",
                caption="All tokens that came in the window, of good and bad answers.",
                y_title="output tokens/s",
                curves={"output": lambda view: view.output_tokens_per_s},
                switches=(),
            ),
        ]
        panels.append(Panel(f"SLO {name}", parts))
    # The front is of no SLO, so it is there once, after the choice.
    for place, panel in enumerate(panels):
        panels[place] = Panel(panel.name, [*panel.parts, plots.pareto(views, style)])
    return Section(
        "Against rate",
        panels,
        choice="SLO",
        intro="How each system bears load: from left to right more requests are offered, whether or not it keeps up.",
    )


# Distributions

CURVES = (
    (
        "TTFT",
        "ttft",
        "From the intended time to the first token. A curve that ends below 100% had requests without one.",
    ),
    (
        "ITL",
        "itl",
        "Every gap of every answer. Solid: between messages, as a reader sees them; dotted: between tokens, where "
        "those of one message have a gap of 0.",
    ),
    ("Longest gap of an answer", "longest_gap", "The worst stall in each answer, which goodput judges."),
    ("TPOT", "tpot", "(last token - first token) / (tokens - 1) of complete answers: a mean, which hides stalls."),
    ("E2E", "e2e", "From the intended time to the last token of complete answers."),
)
"""Title, metric, and what it is."""


def _distributions(views: Sequence[RunView], style: Style, point_limit: int) -> Section:
    groups: dict[tuple[str, float], list[RunView]] = {}
    for view in sorted(views, key=lambda view: (view.workload, view.rate_key)):
        groups.setdefault((view.workload, view.rate_key), []).append(view)
    panels = []
    for (workload, _), members in groups.items():
        name = members[0].rate_name + (f", {workload}" if members[0].shows_workload else "")

        def cdf(title: str, of: str, caption: str, members: Sequence[RunView] = members) -> Plot:
            return plots.distribution(members, style, title=title, caption=caption, of=of, point_limit=point_limit)

        panels.append(Panel(name, [cdf(title, metric, caption) for title, metric, caption in CURVES]))
    # Where most systems meet; among those, in the middle of the rates.
    most = max(len({view.system for view in members}) for members in groups.values())
    candidates = [i for i, members in enumerate(groups.values()) if len({view.system for view in members}) == most]
    return Section("Distributions", panels, choice="offered rate", shown=candidates[(len(candidates) - 1) // 2])


# One run


def _one_run(views: Sequence[RunView], style: Style, point_limit: int) -> Section:
    panels = []
    for view in views[:DETAILED_RUNS]:
        mean, tail = plots.waterfall(view)
        panels.append(
            Panel(
                _head(view),
                [
                    plots.timeline(view, point_limit=point_limit),
                    mean,
                    tail,
                    plots.demand(view),
                    plots.outcomes(view),
                    plots.schedule_lag(view, style, point_limit=point_limit),
                    _run_table(view),
                ],
            )
        )
    left = len(views) - len(panels)
    intro = (
        f"Plots of the first {DETAILED_RUNS} runs; {left} more are in the tables and sweeps above." if left else ""
    )
    return Section("One run" if len(views) == 1 else "Each run", panels, choice="run", intro=intro)


def _run_table(view: RunView) -> Table:
    summary = view.summary
    lag, rate, service = summary["lag_s"], summary["rate"], summary["latency"]["service_ttft_s"]
    cached, moved, size = summary["cache"], summary["kv_transfer"], summary["sample_size"]
    errors = "; ".join(f"{count} x {words}" for words, count in summary["requests"]["errors"].items())
    schedule = f"requested {figure(rate['requested_per_s'])}/s, achieved {figure(rate['achieved_per_s'])}/s; lag "
    schedule += f"p50 {_ms(lag['p50'])}, p99 {_ms(lag['p99'])}, max {_ms(lag['max'])} ms"
    kv_moved = DASH
    if moved["bytes"] is not None:
        kv_moved = f"{moved['bytes'] / 1e6:,.4g} MB in {_count(moved['request_count'], 'request')}"
    rows = [
        ("warm-up", f"{summary['warmup']['verdict']}: {summary['warmup']['reason']}"),
        ("load", f"{summary['saturation']['verdict']}: {summary['saturation']['reason']}"),
        ("schedule", f"{schedule} (limit of p99 {LAG_LIMIT_S * 1e3:g} ms)"),
        ("TTFT from sending", f"p50 {_ms(service['p50'])}, p99 {_ms(service['p99'])} ms"),
        ("prefix cache", DASH if cached["share"] is None else f"{percent(cached['share'])} of prompt tokens"),
        ("KV moved", kv_moved),
        ("placements", _pairs(summary["placements"])),
        ("attempts", _pairs(summary["attempts"])),
        ("per worker", _per_worker(summary["throughput"]["per_worker"])),
        ("sample size", size["warning"] or f"{_count(size['request_count'], 'request')}: enough for a p99"),
        ("errors", errors or "none"),
    ]
    return Table(("rule or figure", "what it says"), rows, caption="Rules and further figures", is_text=True)


def _per_worker(per_worker: Mapping[str, Any] | None) -> str:
    if per_worker is None:
        return DASH
    parts = [f"output tokens/s {figure(per_worker['output_tokens_per_s'])} by all {per_worker['worker_count']}"]
    for role, one in per_worker["roles"].items():
        parts += [
            f"{name.split('_')[0]} tokens/s {figure(one[name])} by each of {one['worker_count']} ({role})"
            for name in ("input_tokens_per_s", "output_tokens_per_s")
            if name in one
        ]
    return "; ".join(parts)


# Environment


def _environment(views: Sequence[RunView]) -> Section:
    flattened = [_flat(view.facts) for view in views]
    keys = list(dict.fromkeys(key for one in flattened for key in one))
    same = {key: flattened[0].get(key, DASH) for key in keys if len({one.get(key, DASH) for one in flattened}) == 1}
    parts: list[Part] = []
    if same:
        parts.append(
            Table(
                ("fact", "value"),
                list(same.items()),
                caption="Environment, seeds, plan" + (": the same in all runs" if len(views) > 1 else ""),
                is_text=True,
            )
        )
    rest = [key for key in keys if key not in same]
    if rest:
        shown = views[:DETAILED_RUNS]
        parts.append(
            Table(
                ("fact", *(_head(view) for view in shown)),
                [(key, *(one.get(key, DASH) for one in flattened[: len(shown)])) for key in rest],
                caption="What differs between the runs",
                is_text=True,
            )
        )
    budget = max(2_000, FACTS_CHARACTERS * 10 // max(10, len(views)))
    for view in views[:DETAILED_RUNS]:
        whole = {"facts": dict(view.facts), "summary": dict(view.summary)}
        parts.append(Details(f"Facts and summary of {_head(view)}, as JSON", pretty(whole, character_limit=budget)))
    return Section("Environment", [Panel("", parts)])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as lines: ``machine.cpu``; long lists and texts are cut (the JSON below has more of them)."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            # A leading "!" is the table's mark for a bad cell.
            found[f"{prefix}{key}"] = (text if len(text) <= 300 else f"{text[:300]} ...").lstrip("!")
    return found


# Words


def figure(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def percent(share: float) -> str:
    """Never rounded to what it is not: 100% is all of them, 0% is none."""
    if 0.9995 <= share < 1.0:
        return ">99.9%"
    if 0.0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}"


def _ms(seconds: float | None) -> str:
    return DASH if seconds is None else figure(seconds * 1000.0)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or DASH


def _plan(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    plan = facts.get("plan")
    return plan if isinstance(plan, Mapping) else {}

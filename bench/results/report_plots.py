"""The plots of a report, as plotly.js takes them: plain dicts of data and layout.

Pure. A system has one colour on every plot (of a palette that colour-blind readers can tell apart, with a
marker of its own besides); phases of a request have another palette. What is simulated is dashed and has hollow
markers. Text that comes from a run is escaped here, because plotly reads a little HTML in every text.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.results import report_data as reduce
from bench.results.records import Outcome, RequestRecord, was_sent
from bench.results.report_view import LAG_LIMIT_MS, RunView
from bench.results.summary import REQUEST_METRICS

SYSTEM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Okabe and Ito (2008), less black and yellow, which one of the themes swallows; then a violet and a grey."""
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PHASE_COLOURS = ("#bbbbbb", "#4477aa", "#ee6677", "#ccbb44", "#aa3377", "#66ccee", "#228833")
"""Tol's bright scheme (2021)."""
OUTCOME_COLOURS = {
    Outcome.OK: "#009e73",
    Outcome.REFUSED: "#e69f00",
    Outcome.ERROR: "#d55e00",
    Outcome.INCOMPLETE: "#cc79a7",
    Outcome.TIMEOUT: "#0072b2",
    Outcome.CANCELLED: "#999999",
}
SLO_COLOUR = "#d4202f"
ATTAINMENT_GOAL = 0.9
"""The share of requests within the SLO at which published goodput comparisons read off the highest rate."""

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Switch:
    """A button over a plot that flips one key of its layout (``layout.xaxis.type``), or of the trace at a place in
    its data (``data.5.visible``), between two values.
    """

    label: str
    key: str
    off: object
    on: object


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: what plotly draws, and what is said about it."""

    title: str
    caption: str
    data: Sequence[Trace]
    layout: Mapping[str, Any]
    height_px: int = 360
    switches: Sequence[Switch] = ()
    empty: str = ""
    """Why there is nothing to draw; then ``data`` is empty."""
    is_wide: bool = False
    """Over the whole width of the page."""


@dataclass(slots=True)
class Style:
    """Which system has which colour, marker and dash: the same on all plots of a page."""

    systems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, views: Iterable[RunView]) -> Style:
        return cls(list(dict.fromkeys(view.system for view in views)))

    def colour(self, system: str) -> str:
        return SYSTEM_COLOURS[self.systems.index(system) % len(SYSTEM_COLOURS)]

    def marker(self, view: RunView) -> str:
        symbol = MARKERS[self.systems.index(view.system) % len(MARKERS)]
        return f"{symbol}-open" if view.is_simulated else symbol


def text(value: object) -> str:
    """A run's text in a plot: shown as it is, never read as plotly's HTML."""
    return html.escape(str(value), quote=False)


def axis(title: str, **more: object) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def layout(x: Mapping[str, Any], y: Mapping[str, Any], **more: object) -> dict[str, Any]:
    return {"xaxis": dict(x), "yaxis": dict(y), **more}


def horizontal_line(y: float, label: str, *, colour: str = SLO_COLOUR, at: str = "y") -> dict[str, Any]:
    """A dashed line over the whole width, its name above its right end, as a shape."""
    return {
        "type": "line",
        "name": label,
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "yref": at,
        "y0": y,
        "y1": y,
        "line": {"color": colour, "width": 1.5, "dash": "dash"},
        "label": {
            "text": text(label),
            "textposition": "end",
            "yanchor": "bottom",
            "font": {"color": colour, "size": 11},
        },
    }


LOG_X = Switch("log axis", "layout.xaxis.type", "linear", "log")
LOG_Y = Switch("log axis", "layout.yaxis.type", "linear", "log")


# Distributions


def distribution(
    views: Sequence[RunView], style: Style, *, title: str, caption: str, of: str, point_limit: int
) -> Plot:
    """CDFs of one metric (``of``: ttft, tpot, e2e, longest_gap or itl), a line a run."""
    data: list[Trace] = []
    cut = 0
    for order, view in enumerate(views):
        records = view.measured
        curves: list[tuple[str, Any, int]]
        if of == "itl":
            by_message, by_token = (reduce.gaps_ms(records, f"itl_{unit}_s") for unit in ("message", "token"))
            curves = [("messages", by_message, len(by_message))]
            # One token a message: the same curve, drawn once.
            if len(by_token) != len(by_message):
                curves.append(("tokens", by_token, len(by_token)))
        else:
            values = reduce.milliseconds(REQUEST_METRICS[f"{of}_s"](record) for record in records)
            # An answer of one token was never to have a gap: it is no missing value.
            has_gaps = of in ("tpot", "longest_gap")
            total = sum(record.output_token_limit > 1 or not has_gaps for record in records)
            curves = [("", values, total)]
        for what, values, total in curves:
            x, y = reduce.cdf(values, total_count=total, point_limit=point_limit)
            if not x:
                continue
            cut += len(values) > len(x)
            repeated = sum(one.name == view.name for one in views[:order])
            name = view.name + (f" ({repeated + 1})" if repeated else "")
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": text(f"{name}, {what}" if len(curves) > 1 else name),
                    "x": x,
                    "y": y,
                    "line": {
                        "color": style.colour(view.system),
                        "shape": "hv",
                        "width": 2,
                        "dash": "dot" if what == "tokens" else "dash" if view.is_simulated else "solid",
                    },
                    "hovertemplate": "%{y:.1%} within %{x:.4~g} ms",
                }
            )
    if cut:
        caption += f" Curves of more than {point_limit} values are thinned, densest at the tail."
    return Plot(
        title,
        caption,
        data,
        layout(
            axis("ms", type="log" if of == "itl" else "linear", rangemode="tozero"),
            axis("share", range=[0, 1.01], tickformat=".0%"),
        ),
        switches=(LOG_X,),
        empty="" if data else "No request came far enough to have a value.",
    )


# Against rate


@dataclass(frozen=True, slots=True)
class Line:
    """A system's runs of one workload in order of rate."""

    system: str
    views: Sequence[RunView]

    @property
    def name(self) -> str:
        return self.views[0].line_name


def lines(views: Sequence[RunView]) -> list[Line]:
    found: dict[tuple[str, str], list[RunView]] = {}
    for view in views:
        found.setdefault((view.system, view.line_name), []).append(view)
    return [Line(key[0], sorted(found[key], key=lambda v: v.offered_per_s)) for key in found]


def against_rate(
    views: Sequence[RunView],
    style: Style,
    *,
    title: str,
    caption: str,
    y_title: str,
    curves: Mapping[str, Any],
    shapes: Sequence[Mapping[str, Any]] = (),
    y_more: Mapping[str, object] | None = None,
    with_offered: bool = False,
    is_log: bool = False,
    switches: Sequence[Switch] = (LOG_Y,),
) -> Plot:
    """A line a system through the median of its runs at each rate, and a marker for every run.

    ``curves`` names one or two functions of a run; the second is drawn dotted.
    """
    data: list[Trace] = []
    for line in lines(views):
        for number, (curve, value_of) in enumerate(curves.items()):
            points = [(view, value_of(view)) for view in line.views]
            points = [(view, value) for view, value in points if value is not None]
            if not points:
                continue
            by_rate: dict[float, list[tuple[float, float]]] = {}
            for view, value in points:
                by_rate.setdefault(view.rate_key, []).append((view.offered_per_s, value))
            colour = style.colour(line.system)
            dashes = ("dash", "dashdot") if points[0][0].is_simulated else ("solid", "dot")
            shared: Trace = {
                "type": "scatter",
                "name": text(f"{line.name}, {curve}" if len(curves) > 1 else line.name),
                "legendgroup": f"{line.name} {number}",
            }
            stroke = {"color": colour, "width": 2, "dash": dashes[min(number, 1)]}
            marks = {
                "color": colour,
                "size": 9 if number == 0 else 7,
                "symbol": [style.marker(view) if view.is_valid else "x-thin-open" for view, _ in points],
                "line": {"width": 1.5, "color": colour},
            }
            at = {
                "x": reduce.shorts(view.offered_per_s for view, _ in points),
                "y": reduce.shorts(value for _, value in points),
                "hovertemplate": "%{x:.4~g} requests/s: %{y:.4~g}",
            }
            if len(by_rate) == len(points):
                data.append({**shared, **at, "mode": "lines+markers", "line": stroke, "marker": marks})
                continue
            middle = [np.median(at_rate, axis=0).tolist() for at_rate in by_rate.values()]
            medians = {
                "x": reduce.shorts(offered for offered, _ in middle),
                "y": reduce.shorts(value for _, value in middle),
            }
            data.append({**shared, **medians, "mode": "lines", "line": stroke, "hoverinfo": "skip"})
            data.append({**shared, **at, "mode": "markers", "marker": marks, "showlegend": False})
    if data and "range" not in (y_more or {}):
        # An axis ends at its highest line, and what is written above that would be cut off.
        data += [
            {
                "type": "scatter",
                "mode": "markers",
                "name": "room",
                "x": [reduce.short(max(view.offered_per_s for view in views))],
                "y": [reduce.short(shape["y0"] * (1.3 if is_log else 1.1))],
                "marker": {"opacity": 0, "size": 1},
                "showlegend": False,
                "hoverinfo": "skip",
            }
            for shape in shapes
        ]
    if with_offered and data:
        top = max(view.offered_per_s for view in views)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "offered",
                "x": [0, reduce.short(top)],
                "y": [0, reduce.short(top)],
                "line": {"color": "#888888", "width": 1, "dash": "dot"},
                "hoverinfo": "skip",
            }
        )
    return Plot(
        title,
        caption,
        data,
        layout(
            axis("offered requests/s", rangemode="tozero"),
            axis(y_title, rangemode="tozero", type="log" if is_log else "linear", **(y_more or {})),
            shapes=list(shapes),
        ),
        switches=switches,
        empty="" if data else "No run has this figure.",
    )


def pareto(views: Sequence[RunView], style: Style) -> Plot:
    """Output tokens/s of one user against those of all, a point a run; the front over all systems as a line."""
    data: list[Trace] = []
    everything: list[tuple[float, float]] = []
    only_simulated = all(view.is_simulated for view in views)
    for line in lines(views):
        points = [
            (view, view.tokens_per_s_per_user, view.output_tokens_per_s)
            for view in line.views
            if view.tokens_per_s_per_user is not None and view.output_tokens_per_s is not None
        ]
        if not points:
            continue
        everything += [
            (user, total)
            for view, user, total in points
            if user is not None and total is not None and view.is_valid and view.is_simulated == only_simulated
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": text(line.name),
                "x": reduce.shorts(user or 0.0 for _, user, _ in points),
                "y": reduce.shorts(total or 0.0 for _, _, total in points),
                "text": [f"{view.offered_per_s:.4g} requests/s" for view, _, _ in points],
                "line": {"color": style.colour(line.system), "width": 1},
                "marker": {
                    "color": style.colour(line.system),
                    "size": 9,
                    "symbol": [style.marker(view) for view, _, _ in points],
                },
                "hovertemplate": "%{text}: %{x:.4~g} tokens/s per user, %{y:.4~g} overall",
            }
        )
    front = [everything[index] for index in reduce.pareto_front(everything)]
    if len(front) > 1:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Pareto front",
                "x": reduce.shorts(user for user, _ in front),
                "y": reduce.shorts(total for _, total in front),
                "line": {"color": "#888888", "width": 6},
                "opacity": 0.35,
                "hoverinfo": "skip",
            }
        )
    return Plot(
        "Pareto front",
        "What one user gets (1 / median TPOT) against what all get together, a point a run. Up and to the right is "
        "better; the broad grey line joins the valid measured runs that no other beats in both.",
        data,
        layout(
            axis("output tokens/s per user", rangemode="tozero"), axis("output tokens/s overall", rangemode="tozero")
        ),
        height_px=420,
        empty="" if data else "No run has both figures.",
    )


# One run


def waterfall(view: RunView) -> tuple[Plot, Plot]:
    """Where the time of requests went: means, which add up, and each phase's p99, which do not."""
    bars = reduce.phase_bars(view.measured)
    names = list(bars[0].mean_ms) if bars else []
    rows = [f"{bar.name} (n={bar.request_count})" for bar in bars][::-1]
    untold = sum(not record.phases_s for record in view.measured)
    means: list[Trace] = []
    tails: list[Trace] = []
    for number, phase in enumerate(names):
        colour = PHASE_COLOURS[number % len(PHASE_COLOURS)]
        base: Trace = {"type": "bar", "orientation": "h", "name": text(phase), "y": [text(row) for row in rows]}
        means.append(
            {
                **base,
                "x": reduce.shorts(bar.mean_ms[phase] for bar in reversed(bars)),
                "marker": {"color": colour},
                "hovertemplate": "%{x:.4~g} ms",
            }
        )
        tails.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(phase),
                "y": [text(row) for row in rows],
                # A phase that takes no time at all has no place on a logarithmic axis.
                "x": [reduce.short(bar.p99_ms[phase]) if bar.p99_ms[phase] > 0 else None for bar in reversed(bars)],
                "marker": {"color": colour, "size": 13, "symbol": MARKERS[number % len(MARKERS)]},
                "hovertemplate": "p99 %{x:.4~g} ms",
            }
        )
    note = f" {untold} requests are not in it: their server did not say." if untold and bars else ""
    empty = "" if bars else "The target did not say where the time of requests went."
    height = 170 + 46 * max(1, len(rows))
    y = {"automargin": True, "type": "category"}
    return (
        Plot(
            "Where the time went: mean",
            "Mean time in each phase, by length of the prompt; the phases of a request add up to its whole time at "
            "the server. A click on a phase in the legend leaves it out." + note,
            means,
            layout(axis("ms"), y, barmode="stack", legend={"traceorder": "normal"}),
            height_px=height,
            empty=empty,
            switches=[
                Switch("without decode", f"data.{place}.visible", "true", "legendonly")
                for place, phase in enumerate(names)
                if phase == "decode"
            ],
        ),
        Plot(
            "Where the time went: p99 of each phase",
            "Each phase by itself. These are not one request's, and do not add up.",
            tails,
            layout(axis("ms", type="log"), y),
            height_px=height,
            empty=empty,
            switches=(LOG_X,),
        ),
    )


def timeline(view: RunView, *, point_limit: int) -> Plot:
    """Running, waiting and KV of every server, arrivals and TTFT: five strips over one time axis."""
    strips: list[tuple[str, list[Trace]]] = [
        (title, []) for title in ("running", "waiting", "KV used", "arrivals/s", "TTFT ms")
    ]
    thinned = False
    for number, (source, samples) in enumerate(reduce.series_by_source(view.samples).items()):
        times = [sample.at_s for sample in samples]
        for strip, values in enumerate(
            (
                [sample.running_count for sample in samples],
                [sample.waiting_count for sample in samples],
                [sample.kv_used_share for sample in samples],
            )
        ):
            x, y = reduce.with_peaks(times, values, point_limit=point_limit)
            thinned |= len(x) < len(times)
            strips[strip][1].append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": text(source),
                    "legendgroup": f"source {number}",
                    "showlegend": strip == 0,
                    "x": x,
                    "y": y,
                    "line": {
                        "color": SYSTEM_COLOURS[number % len(SYSTEM_COLOURS)],
                        "dash": DASHES[number // len(SYSTEM_COLOURS) % len(DASHES)],
                        "shape": "hv",
                        "width": 1.5,
                    },
                }
            )
    length_s, starts, counts = reduce.arrivals(view.records, duration_s=view.duration_s, bin_limit=150)
    strips[3][1].append(
        {
            "type": "bar",
            "name": "arrivals",
            "showlegend": False,
            "x": [reduce.short(start_s + length_s / 2) for start_s in starts],
            "y": reduce.shorts(count / length_s for count in counts),
            "width": length_s,
            "marker": {"color": "#7f7f7f"},
        }
    )
    answered = sorted(
        (record.intended_at_s, record.ttft_s * 1000.0) for record in view.records if record.ttft_s is not None
    )
    x, y = reduce.with_peaks([at for at, _ in answered], [ttft for _, ttft in answered], point_limit=point_limit * 2)
    thinned |= len(x) < len(answered)
    strips[4][1].append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "TTFT",
            "showlegend": False,
            "x": x,
            "y": y,
            "marker": {"color": "#0072b2", "size": 4, "opacity": 0.7},
            "hovertemplate": "%{y:.4~g} ms",
        }
    )
    lost = [record for record in view.records if record.ttft_s is None]
    if lost:
        x = reduce.shorts(sorted(record.intended_at_s for record in lost))[: point_limit * 2]
        strips[4][1].append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "no token ever",
                "x": x,
                "y": [0] * len(x),
                "marker": {"color": SLO_COLOUR, "size": 7, "symbol": "x"},
                "hovertemplate": "no token ever",
            }
        )
    # A target that says nothing of itself leaves no empty strips.
    strips = [strip for strip in strips if strip[1]]
    data: list[Trace] = []
    shape: dict[str, Any] = {"xaxis": axis("s from the start of the run", anchor=f"y{len(strips)}", domain=[0, 1])}
    gap = 0.035
    height = (1.0 - gap * (len(strips) - 1)) / len(strips)
    for number, (title, traces) in enumerate(strips):
        top = 1.0 - number * (height + gap)
        suffix = "" if number == 0 else str(number + 1)
        shape[f"yaxis{suffix}"] = axis(
            title,
            domain=[reduce.short(max(0.0, top - height)), reduce.short(top)],
            rangemode="tozero",
            tickformat=".0%" if title.startswith("KV") else "",
            nticks=4,
        )
        data += [{**trace, "xaxis": "x", "yaxis": f"y{suffix}"} for trace in traces]
    start_s, end_s = view.window
    shade = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below"}
    shapes: list[dict[str, Any]] = [
        {**shade, "name": "window", "x0": start_s, "x1": end_s, "fillcolor": "#009e73", "opacity": 0.09}
    ]
    if start_s > 0:
        shapes.append({**shade, "name": "warm-up", "x0": 0, "x1": start_s, "fillcolor": "#888888", "opacity": 0.22})
    return Plot(
        "Timeline",
        f"Every server, and what came to it. Green: the measured window ({start_s:.4g} s to {end_s:.4g} s); grey: "
        "warm-up, cut by rule. A TTFT is drawn at its intended send time."
        + (" Long series are thinned so that every peak stays." if thinned else "")
        + ("" if view.samples else " No server was sampled."),
        data,
        {**shape, "shapes": shapes, "bargap": 0, "hovermode": "closest"},
        height_px=150 * len(strips) + 80,
        is_wide=True,
    )


def schedule_lag(view: RunView, style: Style, *, point_limit: int) -> Plot:
    """How late the generator itself was."""
    lags = np.asarray([record.lag_s for record in view.records if was_sent(record)]) * 1000.0
    x, y = reduce.cdf(lags, total_count=len(lags), point_limit=point_limit)
    p99 = float(np.percentile(lags, 99)) if len(lags) else 0.0
    bound = {
        "type": "line",
        "name": "bound",
        "xref": "x",
        "x0": LAG_LIMIT_MS,
        "x1": LAG_LIMIT_MS,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": SLO_COLOUR, "width": 1.5, "dash": "dash"},
        "label": {
            "text": f"limit {LAG_LIMIT_MS:g} ms ",
            "font": {"color": SLO_COLOUR, "size": 11},
            "textposition": "middle",
            "textangle": 0,
            "xanchor": "right",
        },
    }
    return Plot(
        "Schedule lag",
        f"How late the generator sent, against its plan: p99 {p99:.3g} ms. Beyond {LAG_LIMIT_MS:g} ms at p99 a run "
        "is invalid. Latencies count from the intended time all the same.",
        [
            {
                "type": "scatter",
                "mode": "lines",
                "name": "lag",
                "showlegend": False,
                "x": x,
                "y": y,
                "line": {"color": style.colour(view.system), "shape": "hv", "width": 2},
                "hovertemplate": "%{y:.1%} within %{x:.4~g} ms",
            }
        ]
        if x
        else [],
        layout(
            axis("ms", rangemode="tozero"),
            axis("share of requests", range=[0, 1.01], tickformat=".0%"),
            shapes=[bound],
        ),
        height_px=300,
        switches=(LOG_X,),
        empty="" if x else "No request was sent.",
    )


def outcomes(view: RunView) -> Plot:
    """How requests ended, by group."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in view.records:
        groups.setdefault(record.group, []).append(record)
    rows = sorted(groups)[:30][::-1]
    data: list[Trace] = []
    for outcome in Outcome:
        counts = [sum(record.outcome is outcome for record in groups[group]) for group in rows]
        if any(counts):
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": outcome.value,
                    "y": [text(f"{group} ") for group in rows],
                    "x": counts,
                    "text": [str(count) if count else "" for count in counts],
                    "marker": {"color": OUTCOME_COLOURS[outcome]},
                    "hovertemplate": "%{x} requests",
                }
            )
    return Plot(
        "Outcomes",
        "How requests ended, in each part of the workload. All of them are in every share and in goodput's "
        "denominator.",
        data,
        layout(
            axis("requests"),
            {"automargin": True, "type": "category"},
            barmode="stack",
            legend={"traceorder": "normal"},
        ),
        height_px=170 + 40 * len(rows),
        empty="" if data else "No request was recorded.",
    )


def demand(view: RunView) -> Plot:
    """What each slice of time asked of prefill and of decode, and their ratio."""
    length_s = float(view.summary["demand"]["window_s"] or 0.0)
    slices = view.summary["demand"]["windows"]
    middles = [reduce.short(one["at_s"] + length_s / 2) for one in slices]

    def bars(name: str, key: str, colour: str, offset: float) -> Trace:
        return {
            "type": "bar",
            "name": name,
            "x": middles,
            "y": reduce.shorts(one[key] for one in slices),
            "width": reduce.short(length_s * 0.4),
            "offset": reduce.short(offset * length_s),
            "marker": {"color": colour},
            "hovertemplate": "%{y:.4~g} tokens/s",
        }

    data: list[Trace] = []
    if slices:
        data = [
            bars("prompt tokens/s", "prefill_tokens_per_s", "#4477aa", -0.42),
            bars("output tokens/s", "decode_tokens_per_s", "#66ccee", 0.02),
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "prompt : output",
                "x": middles,
                "y": [None if (ratio := one["prefill_to_decode"]) is None else reduce.short(ratio) for one in slices],
                "xaxis": "x",
                "yaxis": "y2",
                "line": {"color": "#aa3377", "width": 2},
                "marker": {"size": 6},
                "hovertemplate": "%{y:.3~g} prompt tokens for one of output",
            },
        ]
    return Plot(
        "Demand of prefill and decode",
        f"Tokens asked for in each {length_s:.3g} s by intended send time (prompt tokens less those found in a "
        "prefix cache, where the target said so), and their ratio. Prefill workers wanted for each decode worker = "
        "this ratio x (output tokens/s of a decode worker) / (prompt tokens/s of a prefill worker).",
        data,
        layout(
            axis("s from the start of the run", rangemode="tozero", anchor="y2"),
            axis("tokens/s", rangemode="tozero", domain=[0.42, 1.0]),
            yaxis2=axis("prompt : output", rangemode="tozero", domain=[0.0, 0.34], nticks=4),
        ),
        height_px=440,
        is_wide=True,
        empty="" if data else "No request was planned.",
    )

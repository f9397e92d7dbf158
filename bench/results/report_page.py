"""The page around the plots: one HTML text that needs nothing else, ever.

Pure. Whatever comes from a run passes ``escaped`` or lies in a JSON block where no ``<`` occurs, and a Content
Security Policy in the page lets only our two scripts run (by their hashes) and lets nothing be fetched: a hostile
label would have to beat both.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.offline

from bench.results.report_plots import Plot

ASSETS = Path(__file__).with_name("report_assets")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first cell of a row is its head. A cell that starts with ``!`` is set as bad."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    is_text: bool = False
    """Words, not figures: to the left, on several lines where they are long."""


@dataclass(frozen=True, slots=True)
class Details:
    """Something long that is folded away: JSON as text."""

    summary: str
    body: str


Part = Plot | Table | Details


@dataclass(frozen=True, slots=True)
class Panel:
    """What is shown together. A section with several shows one at a time."""

    name: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    panels: Sequence[Panel]
    choice: str = ""
    """What the panels are the choice of, such as "SLO"."""
    intro: str = ""
    shown: int = 0
    """Which panel is shown first."""


@dataclass(slots=True)
class _Plots:
    """Plots by the id of their element, as they are put on the page."""

    found: dict[str, Plot] = field(default_factory=dict)

    def add(self, plot: Plot) -> str:
        name = f"plot-{len(self.found) + 1}"
        self.found[name] = plot
        return name


def escaped(value: object) -> str:
    return html.escape(str(value), quote=True)


def json_block(value: object) -> str:
    """JSON for a script element: no ``<``, so nothing in it can end the element; no line separators of JavaScript."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def plotly_js() -> str:
    """The library, with line ends as a browser's parser leaves them: the policy's hash is of what it sees."""
    text: str = plotly.offline.get_plotlyjs()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in text.lower():
        raise ValueError("this version of plotly.js cannot be inlined: it has the end of a script element in it")
    return text


@functools.cache
def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def source_hash(text: str) -> str:
    """As a Content Security Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def policy(scripts: Iterable[str]) -> str:
    """Nothing may be fetched or sent; only these scripts run; plotly sets styles and makes pictures for saving."""
    allowed = " ".join(f"'{source_hash(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def page(
    title: str,
    *,
    subtitle: str,
    badges: Sequence[tuple[str, str]],
    warnings: Sequence[tuple[str, Sequence[str]]],
    sections: Sequence[Section],
    footer: str,
) -> str:
    """``badges``: (class, text) pairs beside the title. ``warnings``: headline and reasons, in red above all."""
    plots = _Plots()
    body = "".join(_section(number, section, plots) for number, section in enumerate(sections))
    library, own = plotly_js(), asset("report.js")
    contents = "".join(
        f'<a href="#section-{number}">{escaped(section.title)}</a>' for number, section in enumerate(sections)
    )
    marks = "".join(f'<span class="badge {escaped(kind)}">{escaped(words)}</span>' for kind, words in badges)
    alarms = "".join(
        f'<div class="alarm" role="alert"><strong>{escaped(headline)}</strong><ul>'
        + "".join(f"<li>{escaped(reason)}</li>" for reason in reasons)
        + "</ul></div>"
        for headline, reasons in warnings
    )
    data = {name: {"data": plot.data, "layout": plot.layout} for name, plot in plots.found.items()}
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy((library, own))}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n',
            f"<title>{escaped(title)}</title>\n<style>{asset('report.css')}</style>\n</head>\n<body>\n",
            f'<header><div class="head"><h1>{escaped(title)}</h1>{marks}',
            '<button id="theme" type="button">light / dark</button></div>',
            f'<p class="subtitle">{escaped(subtitle)}</p>{alarms}<nav>{contents}</nav></header>\n',
            "<noscript><p class='alarm'>Plots need JavaScript (nothing is fetched).</p></noscript>",
            f"<main>{body}</main>\n<footer><p>{escaped(footer)}</p></footer>\n",
            f'<script type="application/json" id="plots">{json_block(data)}</script>\n',
            f"<script>{library}</script>\n<script>{own}</script>\n</body>\n</html>\n",
        )
    )


def _section(number: int, section: Section, plots: _Plots) -> str:
    head = f'<section id="section-{number}"><h2>{escaped(section.title)}</h2>'
    if section.intro:
        head += f'<p class="intro">{escaped(section.intro)}</p>'
    if len(section.panels) > 1:
        options = "".join(
            f'<option value="{index}"{" selected" if index == section.shown else ""}>{escaped(panel.name)}</option>'
            for index, panel in enumerate(section.panels)
        )
        head += (
            f'<p class="choice"><label>{escaped(section.choice)} <select data-section="{number}" autocomplete="off">'
            f"{options}</select></label></p>"
        )
    for index, panel in enumerate(section.panels):
        is_hidden = index != section.shown
        head += (
            f'<div class="panel" data-panel="{number}-{index}"{" hidden" if is_hidden else ""}>'
            + (f'<h3 class="panel-name">{escaped(panel.name)}</h3>' if panel.name and len(section.panels) > 1 else "")
            + '<div class="grid">'
            + "".join(_part(part, plots) for part in panel.parts)
            + "</div></div>"
        )
    return head + "</section>\n"


def _part(part: Part, plots: _Plots) -> str:
    match part:
        case Table():
            return _table(part)
        case Details():
            head = f'<details class="wide"><summary>{escaped(part.summary)}</summary>'
            return f"{head}<pre>{escaped(part.body)}</pre></details>"
        case Plot():
            return _plot(part, plots)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escaped(cell)}</th>'
            if place == 0
            else f'<td class="bad">{escaped(cell[1:])}</td>'
            if cell.startswith("!")
            else f"<td>{escaped(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    caption = f'<p class="caption">{escaped(table.caption)}</p>' if table.caption else ""
    kind = "table text" if table.is_text else "table"
    return (
        f'<div class="wide">{caption}<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _plot(plot: Plot, plots: _Plots) -> str:
    wide = " wide" if plot.is_wide else ""
    head = f'<figure class="{wide.strip()}"><div class="plot-head"><h4>{escaped(plot.title)}</h4>'
    if plot.empty:
        return f'{head}</div><p class="empty">{escaped(plot.empty)}</p></figure>'
    name = plots.add(plot)
    head += "".join(
        f'<button type="button" data-plot="{name}" data-key="{escaped(switch.key)}" data-off="{escaped(switch.off)}" '
        f'data-on="{escaped(switch.on)}">{escaped(switch.label)}</button>'
        for switch in plot.switches
    )
    return (
        f'{head}</div><div class="plot" id="{name}" style="height:{int(plot.height_px)}px"></div>'
        f"<figcaption>{escaped(plot.caption)}</figcaption></figure>"
    )


def pretty(value: Mapping[str, Any], *, character_limit: int) -> str:
    """JSON for people; cut, and saying so, when it is longer than a page should carry."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str, ensure_ascii=False)
    if len(text) <= character_limit:
        return text
    return text[:character_limit] + f"\n... cut here: {len(text)} characters in all; run.json has them"

"""The page of ``bench.router_cost``: a table, the verdict on each goal, and the machine-readable twin."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine_facts

DOCS = Path(__file__).resolve().parent.parent / "docs"
NATURAL_GOAL, REQUEST_GOAL = 1.3, 1.25
SATURATED_GOAL_US, TTFT_GOAL_MS = 10.0, 1.0
QUIET_SHARE = 0.05
"""Of the machine, taken by others: up to here its figures stand by themselves."""
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"

Turns = Sequence[dict[str, Any]]


def median(turns: Turns, key: str, **where: Any) -> float:
    """Of the turns that are as ``where`` says. Raises ``ValueError`` if there is none."""
    found = [turn[key] for turn in turns if all(turn[name] == value for name, value in where.items())]
    if not found:
        raise ValueError(f"no turn with {where}")
    return float(statistics.median(found))


def stream_rows(streams: Turns) -> list[list[str]]:
    rows = []
    for count, pace in dict.fromkeys((turn["stream_count"], turn["pace"]) for turn in streams):
        us = {
            system: 1e6
            * median(streams, "cpu_s", stream_count=count, pace=pace, system=system)
            / median(streams, "token_count", stream_count=count, pace=pace, system=system)
            for system in ("send", "relay", "router")
        }
        router: dict[str, Any] = {"stream_count": count, "pace": pace, "system": "router"}
        merged = median(streams, "token_count", **router) / median(streams, "message_count", **router)
        rate = median(streams, "token_count", **router) / median(streams, "window_s", **router)
        if pace == "saturated":
            goal, is_met = f"at most {SATURATED_GOAL_US:g} us", us["router"] <= SATURATED_GOAL_US
        else:
            goal, is_met = f"at most {NATURAL_GOAL:g}x sending", us["router"] <= NATURAL_GOAL * us["send"]
        rows.append(
            [
                str(count),
                pace,
                *(f"{us[system]:.1f}" for system in ("send", "relay", "router")),
                f"{us['router'] / us['send']:.2f}x",
                f"{merged:.1f}",
                f"{rate:,.0f}",
                f"{goal}: {said(is_met)}",
            ]
        )
    return rows


def request_rows(requests: Turns) -> list[list[str]]:
    rows = []
    for tokens, at_once in dict.fromkeys((turn["output_token_count"], turn["at_once"]) for turn in requests):
        which = {"output_token_count": tokens, "at_once": at_once}
        us = {
            system: 1e6
            * median(requests, "cpu_s", system=system, **which)
            / median(requests, "request_count", system=system, **which)
            for system in ("relay", "router")
        }
        ttft_ms = {system: 1000 * median(requests, "ttft_p50_s", system=system, **which) for system in us}
        worker_ms = 1000 * median(requests, "worker_p50_s", system="router", **which)
        to_worker_ms, to_bare_ms = ttft_ms["router"] - worker_ms, ttft_ms["router"] - ttft_ms["relay"]
        cost = said(us["router"] <= REQUEST_GOAL * us["relay"])
        if at_once == 1:
            to_bare, to_worker = said(to_bare_ms <= TTFT_GOAL_MS), said(to_worker_ms <= TTFT_GOAL_MS)
            ttft = f"to the bare calls {to_bare}, to the worker {to_worker}"
        else:
            ttft = "not asked under load"
        rows.append(
            [
                str(tokens),
                str(at_once),
                f"{us['relay']:.0f}",
                f"{us['router']:.0f}",
                f"{us['router'] / us['relay']:.2f}x",
                f"{ttft_ms['relay']:.2f}",
                f"{ttft_ms['router']:.2f}",
                f"{to_bare_ms:.2f}",
                f"{to_worker_ms:.2f}",
                f"at most {REQUEST_GOAL:g}x: {cost}; TTFT at most {TTFT_GOAL_MS:g} ms added: {ttft}",
            ]
        )
    return rows


def said(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def verdict(streams: Turns, requests: Turns) -> list[str]:
    """What the run says of each goal, in words that are made anew with each run."""
    lines = ["**Verdict of this run.**", ""]
    for count, pace, _, _, router, ratio, _, _, goal in stream_rows(streams):
        lines.append(f"- {count} streams, {pace}: {router} us a token, {ratio} the sending floor. Goal: {goal}.")
    for tokens, at_once, bare, router, ratio, _, ttft, _, _, goal in request_rows(requests):
        what = f"{router} us against {bare} of the bare calls, {ratio}; TTFT {ttft} ms"
        lines.append(
            f"- Requests of {tokens} token{'' if tokens == '1' else 's'}, {at_once} at once: {what}. Goal: {goal}."
        )
    shares = [turn["others_share"] for turn in streams]
    shared = f"Others took {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the machine while streams ran"
    is_quiet = max(shares) <= QUIET_SHARE
    return [
        *lines,
        "",
        f"{shared}: {'a quiet machine' if is_quiet else 'NOT a quiet machine, so ratios alone count'}.",
        "",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def measured(streams: Turns, requests: Turns, facts: dict[str, Any]) -> str:
    """``facts``: of the machine, when it was measured."""
    what = f"{facts['cpu_model']}, {facts['core_count']} cores, grpcio {facts['packages']['grpcio']}"
    lines = [f"{facts['at']}, {what}, commit {facts['commit']}.", "", *verdict(streams, requests)]
    lines += ["CPU microseconds per streamed token:", ""]
    heads = ["streams", "pace", "send", "relay", "router", "router/send", "tokens/message", "tokens/s", "goal"]
    lines += table(heads, stream_rows(streams))
    if requests:
        lines += ["CPU microseconds per request, and time to first token in ms:", ""]
        heads = [
            "tokens",
            "at once",
            "bare calls",
            "router",
            "ratio",
            "bare TTFT",
            "TTFT",
            "added to bare",
            "added to worker",
        ]
        lines += table([*heads, "goal"], request_rows(requests))
    return "\n".join(lines)


def write_page(streams: Turns, requests: Turns, *, docs: Path = DOCS) -> list[Path]:
    """Replaces what was measured in ``benchmarks/router-cost.md``, whose words are people's, and the twin."""
    page, twin = docs / "benchmarks" / "router-cost.md", docs / "evidence" / "router-cost.json"
    text = page.read_text() if page.is_file() else f"# The router's cost\n\n{BEGIN}{END}"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    facts = machine_facts()
    page.write_text(f"{before}{BEGIN}\n{measured(streams, requests, facts)}\n{END}{after}")
    turns = {"machine": facts, "streams": list(streams), "requests": list(requests)}
    twin.write_text(json.dumps(turns, indent=1) + "\n")
    return [page, twin]

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
                f"{goal}: {'met' if is_met else 'MISSED'}",
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
        added_ms = ttft_ms["router"] - worker_ms
        cost = "met" if us["router"] <= REQUEST_GOAL * us["relay"] else "MISSED"
        ttft = ("met" if added_ms <= TTFT_GOAL_MS else "MISSED") if at_once == 1 else "not asked under load"
        rows.append(
            [
                str(tokens),
                str(at_once),
                f"{us['relay']:.0f}",
                f"{us['router']:.0f}",
                f"{us['router'] / us['relay']:.2f}x",
                f"{ttft_ms['relay']:.2f}",
                f"{ttft_ms['router']:.2f}",
                f"{added_ms:.2f}",
                f"at most {REQUEST_GOAL:g}x: {cost}; TTFT at most {TTFT_GOAL_MS:g} ms: {ttft}",
            ]
        )
    return rows


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def measured(streams: Turns, requests: Turns) -> str:
    facts = machine_facts()
    what = f"{facts['cpu_model']}, {facts['core_count']} cores, grpcio {facts['packages']['grpcio']}"
    lines = [f"{facts['at']}, {what}, commit {facts['commit']}.", "", "CPU microseconds per streamed token:", ""]
    heads = ["streams", "pace", "send", "relay", "router", "router/send", "tokens/message", "tokens/s", "goal"]
    lines += table(heads, stream_rows(streams))
    if requests:
        lines += ["CPU microseconds per request, and time to first token in ms:", ""]
        heads = ["tokens", "at once", "bare calls", "router", "ratio", "bare TTFT", "TTFT", "added to worker", "goal"]
        lines += table(heads, request_rows(requests))
    return "\n".join(lines)


def write_page(streams: Turns, requests: Turns, *, docs: Path = DOCS) -> list[Path]:
    """Replaces what was measured in ``benchmarks/router-cost.md``, whose words are people's, and the twin."""
    page, twin = docs / "benchmarks" / "router-cost.md", docs / "evidence" / "router-cost.json"
    text = page.read_text() if page.is_file() else f"# The router's cost\n\n{BEGIN}{END}"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{measured(streams, requests)}\n{END}{after}")
    turns = {"machine": machine_facts(), "streams": list(streams), "requests": list(requests)}
    twin.write_text(json.dumps(turns, indent=1) + "\n")
    return [page, twin]

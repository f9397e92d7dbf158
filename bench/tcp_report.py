"""The section of the transfer report on TCP between namespaces. Pure: raw records in, markdown out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.results.statistics import Ratio, bootstrap_ratio, p50
from bench.tcp_pairs import LAYOUTS, STREAM

Record = Mapping[str, Any]

GOAL = 0.60
"""Of what one raw TCP stream moves on the same wire."""
_TITLES = {"baton": "Baton", "stock-tuned": "stock, tuned"}
_PREFACE = (
    "Between two network namespaces joined by a bridge, holder and reader on a core of their own, with the "
    "environment Baton gives its engines and `UCX_TLS=tcp`. The raw stream is a plain socket that sends and receives "
    "the same bytes from and into pools of the same size; of several buffers and sizes of a call, the one whose "
    "median is best for that many bytes. “The read alone” leaves out the step that finds it and the proof of what "
    "was read."
)


def tcp_section(documents: Sequence[Record], seed: int) -> list[str]:
    """Paragraphs; none when there is no such record."""
    reads = [document for document in documents if document["record"] == "tcp read"]
    if not reads:
        return []
    head = ("moved", "by", "median", "bandwidth", "n", "of the raw stream's bandwidth", "of it, the read alone")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for byte_count in sorted({record["byte_count"] for record in reads}):
        lines += ["| " + " | ".join(row) + " |" for row in _rows(reads, byte_count, seed)]
    idle = [
        f"{_TITLES[document['path']]} "
        + ", ".join(f"{end} {share:.3f}" for end, share in document["cpu_share"].items())
        for document in documents
        if document["record"] == "tcp idle" and document["path"] in _TITLES
    ]
    parts = ["## TCP between two namespaces", _PREFACE, "\n".join(lines)]
    return [*parts, f"Idle, in cores: {'; '.join(idle)}."] if idle else parts


def _rows(reads: Sequence[Record], byte_count: int, seed: int) -> list[list[str]]:
    def chosen(path: str, layout: str) -> list[Record]:
        return [r for r in reads if (r["path"], r["layout"], r["byte_count"]) == (path, layout, byte_count)]

    kinds = sorted({record["layout"] for record in reads if record["path"] == STREAM})
    stream = min((chosen(STREAM, kind) for kind in kinds), key=lambda records: p50([_elapsed(r) for r in records]))
    rows = [[*_measured(f"one raw stream, {stream[0]['layout']}", byte_count, stream), "", ""]]
    for path, title in _TITLES.items():
        for layout in LAYOUTS:
            records = chosen(path, layout)
            if not records:
                continue
            whole = _ratio(stream, records, _elapsed, seed)
            said = _interval(whole)
            if path == "baton":
                said += f"; goal ≥ {GOAL:.2f}: **{_verdict(whole)}**"
            alone = _interval(_ratio(stream, records, _wire, seed)) if all(map(_wire, records)) else "—"
            rows.append([*_measured(f"{title}, {layout}", byte_count, records), said, alone])
    return rows


def _measured(title: str, byte_count: int, records: Sequence[Record]) -> list[str]:
    median_s = p50([_elapsed(record) for record in records])
    return [
        f"{byte_count / 2**20:.1f} MiB",
        title,
        f"{median_s * 1e3:.1f} ms",
        f"{byte_count / median_s / 1e9:.2f} GB/s",
        str(len(records)),
    ]


def _ratio(
    stream: Sequence[Record], records: Sequence[Record], time_s: Callable[[Record], float], seed: int
) -> Ratio:
    """Bandwidth over the raw stream's: times the other way round."""
    peers = {0: [[_elapsed(record)] for record in stream]}
    ours = {0: [[time_s(record)] for record in records]}
    return bootstrap_ratio(peers, ours, p50, random.Random(seed))  # noqa: S311 resampling, no secret


def _elapsed(record: Record) -> float:
    return float(record["elapsed_s"])


def _wire(record: Record) -> float:
    return float(record["wire_s"])


def _interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]")


def _verdict(ratio: Ratio) -> str:
    if ratio.value < GOAL:
        return "missed"
    return "surely met" if ratio.low is not None and ratio.low >= GOAL else "met"

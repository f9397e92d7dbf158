"""From raw records to a table: percentiles, ratios to Baton with bootstrap intervals, markdown. Pure.

A ratio is peer / Baton: above 1, Baton is the faster or the cheaper. Its interval comes from resampling whole
requests within each block (of the streams: whole runs), because the gaps of one request are not independent,
nor are those of streams that share an engine step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.load import Record, held_up_gaps_ms

Samples = Sequence[Sequence[float]]
"""One inner sequence per independent unit (request, or run of the streams)."""
Blocks = Mapping[int, Samples]
"""Units by block."""
Statistic = Callable[[Sequence[float]], float]

RESAMPLE_COUNT = 2000
BASE = "baton"


@dataclass(frozen=True, slots=True)
class Ratio:
    """peer / Baton with its 95% interval; None bounds: too few units to say."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_claim(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low is not None and self.high is not None and (self.low > 1.0 or self.high < 1.0)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}x (n too small)"
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]{'' if self.is_claim else ' (no claim)'}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. Raises ``ValueError`` for no values."""
    if not values:
        raise ValueError("a percentile of nothing")
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def p50(values: Sequence[float]) -> float:
    return percentile(values, 50.0)


def p99(values: Sequence[float]) -> float:
    return percentile(values, 99.0)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def pooled(blocks: Blocks) -> list[float]:
    return [value for units in blocks.values() for unit in units for value in unit]


def bootstrap_ratio(peer: Blocks, base: Blocks, statistic: Statistic, rng: random.Random) -> Ratio:
    """``statistic(peer) / statistic(base)`` over pooled values, interval by resampling units within blocks."""
    value = statistic(pooled(peer)) / statistic(pooled(base))
    if min(_unit_count(peer), _unit_count(base)) < 3:
        return Ratio(value, None, None)
    drawn = sorted(statistic(_resampled(peer, rng)) / statistic(_resampled(base, rng)) for _ in range(RESAMPLE_COUNT))
    return Ratio(value, percentile(drawn, 2.5), percentile(drawn, 97.5))


def _unit_count(blocks: Blocks) -> int:
    return sum(len(units) for units in blocks.values())


def _resampled(blocks: Blocks, rng: random.Random) -> list[float]:
    return [value for units in blocks.values() for unit in rng.choices(units, k=len(units)) for value in unit]


def by_block(records: Sequence[Record], value: Callable[[Record], Sequence[float]]) -> dict[int, list[list[float]]]:
    """Values of good requests as units by block; requests without a value are left out."""
    blocks: dict[int, list[list[float]]] = {}
    for record in records:
        unit = list(value(record)) if record.error is None else []
        if unit:
            blocks.setdefault(record.block, []).append(unit)
    return blocks


def _optional(value: float | None) -> list[float]:
    return [] if value is None else [value]


@dataclass(frozen=True, slots=True)
class Measure:
    """One column of the alone table."""

    title: str
    value: Callable[[Record], Sequence[float]]
    statistics: Mapping[str, Statistic]
    scale: float
    unit: str


ALONE_MEASURES = (
    Measure("TTFT", lambda r: _optional(r.ttft_s), {"p50": p50, "p99": p99}, 1e3, "ms"),
    Measure("first to second token", lambda r: r.gaps_ms[:1], {"p50": p50, "p99": p99}, 1.0, "ms"),
    Measure("ITL", lambda r: r.gaps_ms, {"p50": p50, "p99": p99}, 1.0, "ms"),
    Measure("end to end", lambda r: _optional(r.e2e_s), {"p50": p50}, 1e3, "ms"),
    Measure("CPU per request", lambda r: _optional(r.cpu_s), {"mean": mean}, 1.0, "s"),
)


def alone_tables(records: Sequence[Record], titles: Mapping[str, str], seed: int) -> str:
    """A markdown table per prompt length."""
    alone = [record for record in records if record.role == "alone"]
    parts: list[str] = []
    for length in sorted({record.prompt_token_count for record in alone}):
        chosen = [record for record in alone if record.prompt_token_count == length]
        systems = [name for name in titles if any(record.system == name for record in chosen)]
        counts = {name: sum(1 for record in chosen if record.system == name) for name in systems}
        failed = {name: sum(1 for r in chosen if r.system == name and r.error is not None) for name in systems}
        lines = [f"### {length}-token prompts", ""]
        lines.append("| | " + " | ".join(f"{titles[name]} (n={counts[name]})" for name in systems) + " |")
        lines.append("|---|" + "---:|" * len(systems))
        for measure in ALONE_MEASURES:
            blocks = {name: by_block([r for r in chosen if r.system == name], measure.value) for name in systems}
            for word, statistic in measure.statistics.items():
                cells = [_cell(name, blocks, statistic, measure, seed) for name in systems]
                lines.append(f"| {measure.title} {word} | " + " | ".join(cells) + " |")
        lines.append("| failed | " + " | ".join(str(failed[name]) for name in systems) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(name: str, blocks: Mapping[str, Blocks], statistic: Statistic, measure: Measure, seed: int) -> str:
    mine = pooled(blocks[name])
    if not mine:
        return "—"
    value = f"{statistic(mine) * measure.scale:.{2 if measure.unit == 's' else 1}f} {measure.unit}"
    base = blocks.get(BASE)
    if name == BASE or not base or not pooled(base) or statistic(pooled(base)) == 0:
        return value
    ratio = bootstrap_ratio(blocks[name], base, statistic, random.Random(seed))  # noqa: S311 resampling, no secret
    return f"{value}; {ratio}"


def stream_table(records: Sequence[Record], titles: Mapping[str, str], cpu_s: Mapping[str, float], seed: int) -> str:
    """The streams while long prompts arrive. ``cpu_s``: CPU seconds of the scenario per system, summed."""
    gaps = held_up_gaps_ms(records)
    systems = [name for name in titles if any(key[0] == name for key in gaps)]
    blocks: dict[str, dict[int, list[list[float]]]] = {name: {} for name in systems}
    for (system, block, _), unit in gaps.items():
        if unit:
            blocks[system].setdefault(block, []).append(unit)
    lines = ["| | " + " | ".join(titles[name] for name in systems) + " |", "|---|" + "---:|" * len(systems)]

    def row(title: str, cell: Callable[[str], str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cell(name) for name in systems) + " |")

    def with_ratio(name: str, statistic: Statistic) -> str:
        if not pooled(blocks[name]):
            return "—"
        value = f"{statistic(pooled(blocks[name])):.1f} ms"
        if name == BASE or not blocks.get(BASE):
            return value
        rng = random.Random(seed)  # noqa: S311 resampling, no secret
        return f"{value}; {bootstrap_ratio(blocks[name], blocks[BASE], statistic, rng)}"

    def arrivals(name: str) -> list[float]:
        return [
            r.ttft_s
            for r in records
            if r.role == "arrival" and r.system == name and r.error is None and r.ttft_s is not None
        ]

    def of_role(name: str, *roles: str) -> list[Record]:
        return [r for r in records if r.system == name and r.role in roles]

    row("runs, gaps", lambda n: f"{_unit_count(blocks[n])}, {len(pooled(blocks[n]))}")
    row("ITL p50", lambda n: with_ratio(n, p50))
    row("ITL p99", lambda n: with_ratio(n, p99))
    row("longest gap", lambda n: f"{max(pooled(blocks[n]), default=math.nan):.0f} ms")
    row("TTFT of the long prompts, mean", lambda n: f"{mean(found):.2f} s" if (found := arrivals(n)) else "—")
    row("TTFT of the long prompts, worst", lambda n: f"{max(found):.2f} s" if (found := arrivals(n)) else "—")
    row("CPU per block", lambda n: f"{cpu_s[n]:.1f} s" if n in cpu_s else "—")
    row("failed", lambda n: str(sum(1 for r in of_role(n, "stream", "arrival") if r.error is not None)))
    return "\n".join(lines)


def phase_table(records: Sequence[Record]) -> str:
    """Baton's own account: median of each phase, its server's words. Empty when it gave none."""
    told = [r for r in records if r.role in ("alone", "arrival") and r.error is None and r.notes is not None]
    if not told:
        return ""
    groups = [
        (f"{n} tokens", [r for r in told if r.role == "alone" and r.prompt_token_count == n])
        for n in sorted({r.prompt_token_count for r in told if r.role == "alone"})
    ]
    groups.append(("long prompts beside streams", [r for r in told if r.role == "arrival"]))
    phases = list(_phases(told[0]))
    lines = ["| | n | " + " | ".join(phases) + " | KV moved | split |", "|---|---:|" + "---:|" * (len(phases) + 2)]
    for title, group in groups:
        if not group:
            continue
        cells = [f"{p50([_phases(r)[phase] for r in group]):.1f} ms" for phase in phases]
        moved = p50([float((r.notes or {}).get("kv_transfer_bytes", 0)) for r in group]) / 2**20
        split_count = sum(1 for r in group if str((r.notes or {}).get("placement", "")).startswith("split/"))
        row = [title, str(len(group)), *cells, f"{moved:.1f} MiB", f"{split_count} of {len(group)}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _phases(record: Record) -> Mapping[str, float]:
    phases: Mapping[str, float] = (record.notes or {}).get("phases_ms", {})
    return phases

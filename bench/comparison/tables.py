"""From the records of all systems to the tables of the comparison: markdown out. Pure.

A ratio is peer / Baton 1P+1D: above 1, Baton is the faster. Its 95% interval comes from resampling turns in pairs,
and in them stretches of neighbouring requests (of the streams: whole runs): neither the gaps of one request are
independent, nor requests that queue, nor streams that share an engine step. A system that had fewer turns than Baton
is resampled by requests within its turns, which is too narrow where they queue. A percentile of fewer values than it
needs is near their maximum: the counts stand beside.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.results.records import Outcome, RequestRecord
from bench.results.slo import PRESETS, Slo, meets
from bench.results.statistics import Ratio, bootstrap_ratio, mean, p50, p99, paired_ratio, pooled

BASE = "baton"
Units = dict[int, list[list[float]]]
"""By block: one list of values for each independent unit."""
Statistic = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRun:
    """One cell asked of one system in one block."""

    system: str
    block: int
    cell: str
    group: str
    """The cell without its repetition."""
    records: Sequence[RequestRecord]
    span_s: float
    """From the first intended time to the last end."""
    cpu_s: float
    """Of all processes of the system."""
    facts: Mapping[str, object] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    """Why its figures deserve less trust: a late generator, a machine that others used."""

    @property
    def ok(self) -> list[RequestRecord]:
        return [record for record in self.records if record.outcome is Outcome.OK]


@dataclass(frozen=True, slots=True)
class Measure:
    """One row. ``values``: a run's values as independent units; smaller is better."""

    title: str
    values: Callable[[CellRun], list[list[float]]]
    statistic: Statistic
    scale: float = 1e3
    unit: str = "ms"
    digits: int = 0


def _by_request(value: Callable[[RequestRecord], float | None]) -> Callable[[CellRun], list[list[float]]]:
    def values(run: CellRun) -> list[list[float]]:
        return [[found] for record in run.records if (found := value(record)) is not None]

    return values


def _gaps(run: CellRun) -> list[list[float]]:
    """Of every answer, those cut short among them: a stall counts whether or not the end came."""
    return [gaps for record in run.records if (gaps := record.message_gaps_s)]


def held_up_gaps(run: CellRun) -> list[list[float]]:
    """Of the streams: gaps that ended after the first long prompt was due. All streams of a run are one unit."""
    arrivals = [record.intended_at_s for record in run.records if record.group == "arrival"]
    if not arrivals:
        return []
    gaps: list[float] = []
    for record in run.records:
        if record.group == "stream":
            ends = record.message_at_s[1:]
            gaps += [gap for gap, end in zip(record.message_gaps_s, ends, strict=True) if end > min(arrivals)]
    return [gaps] if gaps else []


def _ttft_of(group: str) -> Callable[[CellRun], list[list[float]]]:
    return _by_request(lambda record: record.ttft_s if record.group == group else None)


TTFT_P50 = Measure("TTFT p50", _by_request(lambda r: r.ttft_s), p50)
TTFT_P99 = Measure("TTFT p99", _by_request(lambda r: r.ttft_s), p99)
ITL_P50 = Measure("ITL p50", _gaps, p50, digits=1)
ITL_P99 = Measure("ITL p99", _gaps, p99, digits=1)
E2E_P50 = Measure("end to end p50", _by_request(lambda r: r.e2e_s), p50)
OPEN_LOOP = (TTFT_P50, TTFT_P99, ITL_P50, ITL_P99, E2E_P50)
STREAM_GAP_P99 = Measure("streams: gap p99", held_up_gaps, p99)
STREAM_GAP_MAX = Measure("streams: longest gap", held_up_gaps, max)
LONG_TTFT = Measure("long prompts: TTFT mean", _ttft_of("arrival"), mean)
STREAMS = (Measure("streams: gap p50", held_up_gaps, p50, digits=1), STREAM_GAP_P99, STREAM_GAP_MAX, LONG_TTFT)


def alone_measures(lengths: Sequence[int]) -> tuple[Measure, ...]:
    at = [Measure(f"TTFT p50, {length:,} tokens", _by_request(_ttft_at(length)), p50) for length in lengths]
    return (*at, ITL_P50, ITL_P99)


def _ttft_at(length: int) -> Callable[[RequestRecord], float | None]:
    return lambda record: record.ttft_s if record.prompt_token_count == length else None


def units(runs: Sequence[CellRun], measure: Measure) -> Units:
    blocks: Units = {}
    for run in runs:
        found = measure.values(run)
        if found:
            blocks.setdefault(run.block, []).extend(found)
    return blocks


def ratio(runs: Sequence[CellRun], system: str, measure: Measure, seed: int, base: str = BASE) -> Ratio | None:
    """``system`` / ``base``; None where one of them has no value."""
    mine = units([run for run in runs if run.system == system], measure)
    theirs = units([run for run in runs if run.system == base], measure)
    if not pooled(mine) or not pooled(theirs) or measure.statistic(pooled(theirs)) == 0:
        return None
    resampled = paired_ratio if len(mine) == len(theirs) > 1 else bootstrap_ratio
    return resampled(mine, theirs, measure.statistic, random.Random(seed))  # noqa: S311 resampling, no secret


def value(runs: Sequence[CellRun], system: str, measure: Measure) -> float | None:
    found = pooled(units([run for run in runs if run.system == system], measure))
    return measure.statistic(found) if found else None


def table(runs: Sequence[CellRun], titles: Mapping[str, str], measures: Sequence[Measure], seed: int) -> str:
    """Rows are measures, columns the systems that were asked."""
    systems = [name for name in titles if any(run.system == name for run in runs)]
    lines = ["| | " + " | ".join(titles[name] for name in systems) + " |", "|---|" + "---:|" * len(systems)]

    def row(title: str, cell: Callable[[str], str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cell(name) for name in systems) + " |")

    row("requests, answered", lambda name: _answered(runs, name))
    for measure in measures:
        row(measure.title, lambda name, measure=measure: _cell(runs, name, measure, seed))  # type: ignore[misc]
    row("answers a second", lambda name: f"{_rate(runs, name, lambda run: len(run.ok)):.2f}")
    row("tokens a second", lambda name: f"{_rate(runs, name, _token_count):.0f}")
    row("CPU per answer", lambda name: _cpu(runs, name))
    return "\n".join(lines)


def _cell(runs: Sequence[CellRun], name: str, measure: Measure, seed: int) -> str:
    found = value(runs, name, measure)
    if found is None:
        return "—"
    text = f"{found * measure.scale:,.{measure.digits}f} {measure.unit}"
    if name == BASE:
        return text
    against = ratio(runs, name, measure, seed)
    return text if against is None else f"{text}; {against}"


def _of(runs: Sequence[CellRun], name: str) -> list[CellRun]:
    return [run for run in runs if run.system == name]


def _answered(runs: Sequence[CellRun], name: str) -> str:
    mine = _of(runs, name)
    asked = sum(len(run.records) for run in mine)
    return f"{asked}, {sum(len(run.ok) for run in mine) / asked:.0%}" if asked else "—"


def _token_count(run: CellRun) -> float:
    return sum(record.output_token_count for record in run.ok)


def _rate(runs: Sequence[CellRun], name: str, count: Callable[[CellRun], float]) -> float:
    mine = _of(runs, name)
    span_s = sum(run.span_s for run in mine)
    return sum(count(run) for run in mine) / span_s if span_s else math.nan


def answer_rate(runs: Sequence[CellRun], name: str) -> float:
    """Complete answers a second of the time it took."""
    return _rate(runs, name, lambda run: len(run.ok))


def _cpu(runs: Sequence[CellRun], name: str) -> str:
    mine = _of(runs, name)
    answered = sum(len(run.ok) for run in mine)
    return f"{sum(run.cpu_s for run in mine) / answered:.2f} s" if answered else "—"


def good_share(runs: Sequence[CellRun], name: str, slo: Slo) -> float | None:
    """Share of all requests asked, refused and failed ones among them, that met the SLO; None if none was asked."""
    records = [record for run in _of(runs, name) for record in run.records]
    return sum(meets(record, slo) for record in records) / len(records) if records else None


def good_rate(runs: Sequence[CellRun], name: str, slo: Slo) -> float:
    """Requests a second that met the SLO."""
    return _rate(runs, name, lambda run: sum(meets(record, slo) for record in run.records))


def goodput_table(
    runs: Sequence[CellRun], groups: Sequence[str], titles: Mapping[str, str], factors: Sequence[float]
) -> str:
    """Share of requests that met each preset, by load: every SLO as it is and eased by the factors."""
    systems = [name for name in titles if any(run.system == name for run in runs)]
    lines = [
        "| load | SLO | " + " | ".join(titles[name] for name in systems) + " |",
        "|---|---|" + "---:|" * len(systems),
    ]
    for group in groups:
        chosen = [run for run in runs if run.group == group]
        for slo in PRESETS.values():
            cells = []
            for name in systems:
                shares = [good_share(chosen, name, slo.scaled(factor)) for factor in factors]
                cells.append(" / ".join("—" if share is None else f"{share:.0%}" for share in shares))
            lines.append(f"| {group} | {slo.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

"""From the records of all systems to the tables of the comparison: markdown out. Pure.

A ratio is peer / Baton 1P+1D: above 1, Baton is the faster. Compared are the passes and loads that both were asked,
and each such load of both is a pair. The 95% interval comes from resampling the pairs, and in them stretches of
neighbouring requests (of the streams: whole runs): neither the gaps of one request are independent, nor requests that
queue, nor streams that share an engine step. One pair can only resample its stretches, and knows nothing of what the
next run would give; a claim by our own rule takes ten pairs.

A request that was given up without a token counts with the time that it had waited, and an answer that was cut off
with the gap that was still open: both are lower bounds, marked with "≥". Who answers only the easy half of a load
does not look fast.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.results.records import Outcome, RequestRecord, was_sent
from bench.results.slo import PRESETS, Slo, meets
from bench.results.statistics import Ratio, draw_pairs, mean, p50, p99, stretches

BASE = "baton"
Statistic = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRun:
    """One cell asked of one system in one block."""

    system: str
    block: int
    pass_number: int
    """Loads of one pass and name have the same requests."""
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


def _waits(record: RequestRecord) -> float | None:
    """TTFT, or how long it was waited for in vain; None for a turn that was never sent."""
    if not was_sent(record):
        return None
    return record.ended_at_s - record.intended_at_s if record.ttft_s is None else record.ttft_s


def _end_to_end(record: RequestRecord) -> float | None:
    if not was_sent(record):
        return None
    return record.ended_at_s - record.intended_at_s if record.e2e_s is None else record.e2e_s


def _gaps_of(record: RequestRecord) -> list[tuple[float, float]]:
    """(end, length) of each gap between messages; of an answer that was cut off, the one still open, too."""
    times = list(record.message_at_s)
    if times and record.outcome in (Outcome.TIMEOUT, Outcome.INCOMPLETE, Outcome.ERROR):
        times.append(record.ended_at_s)
    return [(later, later - earlier) for earlier, later in itertools.pairwise(times)]


def _by_request(value: Callable[[RequestRecord], float | None]) -> Callable[[CellRun], list[list[float]]]:
    def values(run: CellRun) -> list[list[float]]:
        return [[found] for record in run.records if (found := value(record)) is not None]

    return values


def _gaps(run: CellRun) -> list[list[float]]:
    """Of every answer, those cut short among them."""
    return [[gap for _, gap in gaps] for record in run.records if (gaps := _gaps_of(record))]


def held_up_gaps(run: CellRun) -> list[list[float]]:
    """Of the streams: gaps that ended after the first long prompt was due. All streams of a run are one unit."""
    arrivals = [record.intended_at_s for record in run.records if record.group == "arrival"]
    if not arrivals:
        return []
    gaps = [
        gap
        for record in run.records
        if record.group == "stream"
        for end, gap in _gaps_of(record)
        if end > min(arrivals)
    ]
    return [gaps] if gaps else []


def _ttft_of(group: str) -> Callable[[CellRun], list[list[float]]]:
    return _by_request(lambda record: _waits(record) if record.group == group else None)


TTFT_P50 = Measure("TTFT p50", _by_request(_waits), p50)
TTFT_P99 = Measure("TTFT p99", _by_request(_waits), p99)
ITL_P50 = Measure("ITL p50", _gaps, p50, digits=1)
ITL_P99 = Measure("ITL p99", _gaps, p99, digits=1)
E2E_P50 = Measure("end to end p50", _by_request(_end_to_end), p50)
OPEN_LOOP = (TTFT_P50, TTFT_P99, ITL_P50, ITL_P99, E2E_P50)
STREAM_GAP_P99 = Measure("streams: gap p99", held_up_gaps, p99)
STREAM_GAP_MAX = Measure("streams: longest gap", held_up_gaps, max)
LONG_TTFT = Measure("long prompts: TTFT mean", _ttft_of("arrival"), mean)
STREAMS = (Measure("streams: gap p50", held_up_gaps, p50, digits=1), STREAM_GAP_P99, STREAM_GAP_MAX, LONG_TTFT)


def alone_measures(lengths: Sequence[int]) -> tuple[Measure, ...]:
    at = [Measure(f"TTFT p50, {length:,} tokens", _by_request(_ttft_at(length)), p50) for length in lengths]
    return (*at, ITL_P50, ITL_P99)


def _ttft_at(length: int) -> Callable[[RequestRecord], float | None]:
    return lambda record: _waits(record) if record.prompt_token_count == length else None


def shared_runs(runs: Sequence[CellRun], system: str, base: str = BASE) -> list[tuple[CellRun, CellRun]]:
    """(base's, system's) of each pass and load that both were asked."""
    bases = {(run.pass_number, run.cell): run for run in runs if run.system == base}
    return [
        (bases[key], run) for run in runs if run.system == system and (key := (run.pass_number, run.cell)) in bases
    ]


def unanswered_count(runs: Iterable[CellRun]) -> int:
    return sum(len(run.records) - len(run.ok) for run in runs)


def ratio(runs: Sequence[CellRun], system: str, measure: Measure, seed: int, base: str = BASE) -> Ratio | None:
    """``system`` / ``base`` over what both were asked; None where one of them has no value."""
    pairs = []
    for theirs, mine in shared_runs(runs, system, base):
        pair = measure.values(theirs), measure.values(mine)
        if all(pair):
            pairs.append((stretches(pair[0]), stretches(pair[1])))
    if not pairs:
        return None
    found = draw_pairs(pairs, [measure.statistic], random.Random(seed)).ratio(0)  # noqa: S311 resampling, no secret
    return found if math.isfinite(found.value) else None


def value(runs: Iterable[CellRun], system: str, measure: Measure) -> float | None:
    found = [each for run in runs if run.system == system for unit in measure.values(run) for each in unit]
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
    row("last answer after the last arrival", lambda name: _drain(runs, name))
    row("CPU per answer", lambda name: _cpu(runs, name))
    return "\n".join(lines)


def _cell(runs: Sequence[CellRun], name: str, measure: Measure, seed: int) -> str:
    found = value(runs, name, measure)
    if found is None:
        return "—"
    bound = "≥ " if unanswered_count(_of(runs, name)) else ""
    text = f"{bound}{found * measure.scale:,.{measure.digits}f} {measure.unit}"
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


def _drain(runs: Sequence[CellRun], name: str) -> str:
    """How long a system still works when nothing more comes: what grows with the rate is a queue."""
    drains_s = [
        max(record.ended_at_s for record in run.records) - max(record.intended_at_s for record in run.records)
        for run in _of(runs, name)
        if run.records
    ]
    return f"{mean(drains_s):.1f} s" if drains_s else "—"


def cpu_per_answer_s(runs: Iterable[CellRun]) -> float | None:
    listed = list(runs)
    answered = sum(len(run.ok) for run in listed)
    return sum(run.cpu_s for run in listed) / answered if answered else None


def _cpu(runs: Sequence[CellRun], name: str) -> str:
    """With its ratio to Baton's over what both were asked; there are too few loads for an interval."""
    mine = cpu_per_answer_s(_of(runs, name))
    if mine is None:
        return "—"
    pairs = shared_runs(runs, name)
    theirs, same = cpu_per_answer_s(base for base, _ in pairs), cpu_per_answer_s(run for _, run in pairs)
    if name == BASE or theirs is None or same is None:
        return f"{mine:.2f} s"
    return f"{mine:.2f} s; {same / theirs:.2f}x"


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

"""What the plots of a report are made of: few enough points that a page of any run stays light, none of them made up.

Pure. Everything here thins: a curve of a million values is drawn from some hundred of them, chosen so that what a
reader looks for (the tail, the peaks) is among them, exactly. Numbers of tables never come from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.results.records import RequestRecord, TimelineSample
from bench.results.summary import GAP_METRICS

Floats = npt.NDArray[np.float64]

PHASES = ("queue", "prefill", "handoff_wait", "kv_transfer", "decode_wait", "decode")
"""In the order of time; what a target names otherwise follows in its own order."""

PROMPT_CLASS_EDGES = (128, 512, 2048, 8192)
"""Upper bounds in tokens, inclusive, of the prompt-length classes; the last class has none."""


def short(value: float) -> float:
    """Five significant digits: what a plot can show."""
    return float(f"{value:.5g}") if math.isfinite(value) else value


def shorts(values: Iterable[float]) -> list[float]:
    return [short(float(value)) for value in values]


def cdf(values: Sequence[float] | Floats, *, total_count: int, point_limit: int) -> tuple[list[float], list[float]]:
    """The empirical distribution: values ascending, and the share (0 to 1) of ``total_count`` at or below each.

    ``total_count`` may be more than there are values: what never came (an error's first token) counts, and the curve
    ends below 1. Of more values than ``point_limit`` half the points are spread over all ranks and half lie ever
    denser towards the largest, so that p99.9 is a real value and not drawn between two others.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    if count == 0:
        return [], []
    if count <= point_limit:
        ranks = np.arange(1, count + 1)
    else:
        half = max(2, point_limit // 2)
        spread = np.linspace(1, count, half)
        tail = count + 1 - np.geomspace(1, count, half)
        ranks = np.unique(np.clip(np.rint(np.concatenate([spread, tail])), 1, count).astype(np.int64))
    x = ordered[ranks - 1]
    return [short(float(x[0])), *shorts(x)], [0.0, *shorts(ranks / max(total_count, count))]


def with_peaks(x: Sequence[float], y: Sequence[float], *, point_limit: int) -> tuple[list[float], list[float]]:
    """A series in order of ``x`` with at most about ``point_limit`` points: the least and the greatest of each of
    equal runs of points, so that no peak is lost.
    """
    count = len(x)
    if count <= point_limit:
        return shorts(x), shorts(y)
    values = np.asarray(y, dtype=np.float64)
    kept: set[int] = {0, count - 1}
    for piece in np.array_split(np.arange(count), max(1, point_limit // 2)):
        kept.add(int(piece[np.argmin(values[piece])]))
        kept.add(int(piece[np.argmax(values[piece])]))
    chosen = sorted(kept)
    return shorts(x[i] for i in chosen), shorts(y[i] for i in chosen)


def gaps_ms(records: Iterable[RequestRecord], metric: str) -> Floats:
    """Every gap of all requests; ``metric`` is one of ``GAP_METRICS``."""
    gaps = [GAP_METRICS[metric](record) for record in records]
    return np.concatenate(gaps) * 1000.0 if gaps else np.zeros(0)


def milliseconds(values: Iterable[float | None]) -> Floats:
    """Seconds to ms; None, what never came, is left out."""
    return np.asarray([value for value in values if value is not None], dtype=np.float64) * 1000.0


@dataclass(frozen=True, slots=True)
class PhaseBar:
    """One prompt-length class: how long its requests were in each phase."""

    name: str
    request_count: int
    mean_ms: Mapping[str, float]
    p99_ms: Mapping[str, float]
    """Each phase by itself: they do not add up to the p99 of the whole."""


def prompt_class(prompt_token_count: int) -> int:
    """Index of the prompt-length class."""
    return sum(prompt_token_count > edge for edge in PROMPT_CLASS_EDGES)


def prompt_class_name(index: int) -> str:
    if index == len(PROMPT_CLASS_EDGES):
        return f"over {PROMPT_CLASS_EDGES[-1]} tokens"
    lowest = PROMPT_CLASS_EDGES[index - 1] + 1 if index else 1
    return f"{lowest} to {PROMPT_CLASS_EDGES[index]} tokens"


def phase_names(records: Iterable[RequestRecord]) -> list[str]:
    """The phases that occur: ours in the order of time, then others by name."""
    seen = {name for record in records for name in record.phases_s or ()}
    return [name for name in PHASES if name in seen] + sorted(seen - set(PHASES))


def phase_bars(records: Sequence[RequestRecord]) -> list[PhaseBar]:
    """By prompt-length class, shortest first, then all; of the requests whose server said where their time went."""
    told = [record for record in records if record.phases_s]
    names = phase_names(told)

    def bar(name: str, chosen: Sequence[RequestRecord]) -> PhaseBar:
        by_phase = {
            phase: np.asarray([(record.phases_s or {}).get(phase, 0.0) for record in chosen]) * 1000.0
            for phase in names
        }
        return PhaseBar(
            name,
            len(chosen),
            {phase: float(values.mean()) for phase, values in by_phase.items()},
            {phase: float(np.percentile(values, 99)) for phase, values in by_phase.items()},
        )

    classes: dict[int, list[RequestRecord]] = {}
    for record in told:
        classes.setdefault(prompt_class(record.prompt_token_count), []).append(record)
    bars = [bar(prompt_class_name(index), classes[index]) for index in sorted(classes)]
    return [*bars, bar("all", told)] if len(bars) > 1 else bars


def arrivals(
    records: Sequence[RequestRecord], *, duration_s: float, bin_limit: int
) -> tuple[float, list[float], list[int]]:
    """Requests by intended send time: the bins' length (1, 2, 5, 10, ... seconds, so that there are at most
    ``bin_limit`` and one), their starts, and the counts of all of them, empty ones too.
    """
    end_s = max([duration_s, *(record.intended_at_s for record in records)], default=0.0)
    length_s = round_up(end_s / bin_limit)
    counts = [0] * (int(end_s / length_s + 1e-9) + 1)
    for record in records:
        counts[min(len(counts) - 1, max(0, int(record.intended_at_s / length_s)))] += 1
    return length_s, [short(place * length_s) for place in range(len(counts))], counts


def round_up(value: float) -> float:
    """The next of ..., 1, 2, 5, 10, 20, 50, ... that is at least ``value``; never less than 0.1."""
    value = max(value, 0.1)
    unit = 10.0 ** math.floor(math.log10(value))
    return next(short(step * unit) for step in (1.0, 2.0, 5.0, 10.0) if step * unit >= value * (1 - 1e-9))


def series_by_source(samples: Iterable[TimelineSample]) -> dict[str, list[TimelineSample]]:
    """The samples of each server, in order of time; servers by name."""
    found: dict[str, list[TimelineSample]] = {}
    for sample in samples:
        found.setdefault(sample.source, []).append(sample)
    return {source: sorted(found[source], key=lambda sample: sample.at_s) for source in sorted(found)}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (more is better), by the first, descending."""
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front

"""A run as it is kept: what was planned and where, every request, every look at the servers. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.results.records import RequestRecord, TimelineSample


@dataclass(slots=True)
class RunData:
    """Everything that summaries, reports and comparisons are made from."""

    facts: dict[str, Any]
    """Fit for JSON: kind, label, target, plan, machine, model, started_at, worker_counts, valid, invalid_reasons,
    slo_scale. Any of them may be missing."""
    records: list[RequestRecord]
    samples: list[TimelineSample] = field(default_factory=list)
    is_complete: bool = True
    """False: the writer never closed the run, so the end of it is missing."""
    cut_off_line_count: int = 0
    """Last lines that were only partly written and could not be read."""

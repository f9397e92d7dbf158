"""Whether a run may be believed. Pure: facts of a run in, reasons against it out.

A run that fails here is kept, and marked: its numbers say something of the generator or the machine, not of the
target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.results.records import Outcome, RequestRecord, was_sent

MAX_LAG_P99_S = 5e-3
MIN_ACHIEVED_SHARE = 0.99
MAX_STEAL_SHARE = 0.02
LAG_QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How well the plan was kept. None where nothing was sent."""

    planned_count: int
    sent_count: int
    not_sent_count: int
    """Turns of sessions whose former turn failed: the target's doing, not the generator's."""
    lag_s: Mapping[str, float] | None
    """By "p50", "p90", "p99" and "max": time of sending minus intended time."""
    requested_rate_per_s: float | None
    """Requests that were sent, over the span of their intended times."""
    achieved_rate_per_s: float | None
    """The same, over the span of the times at which they were sent."""

    @property
    def achieved_share(self) -> float | None:
        if self.requested_rate_per_s is None or self.achieved_rate_per_s is None:
            return None
        return self.achieved_rate_per_s / self.requested_rate_per_s

    def as_json(self) -> dict[str, object]:
        return {
            "planned_count": self.planned_count,
            "sent_count": self.sent_count,
            "not_sent_count": self.not_sent_count,
            "lag_s": None if self.lag_s is None else dict(self.lag_s),
            "requested_rate_per_s": self.requested_rate_per_s,
            "achieved_rate_per_s": self.achieved_rate_per_s,
            "achieved_share": self.achieved_share,
        }


def schedule_of(records: Sequence[RequestRecord], planned_count: int) -> Schedule:
    sent = [record for record in records if was_sent(record)]
    lags = {}
    if sent:
        values = np.quantile([record.lag_s for record in sent], LAG_QUANTILES)
        lags = dict(zip(("p50", "p90", "p99", "max"), map(float, values), strict=True))
    return Schedule(
        planned_count=planned_count,
        sent_count=len(sent),
        not_sent_count=len(records) - len(sent),
        lag_s=lags or None,
        requested_rate_per_s=_rate([record.intended_at_s for record in sent]),
        achieved_rate_per_s=_rate([record.sent_at_s for record in sent]),
    )


def _rate(times_s: Sequence[float]) -> float | None:
    """Of n events, n - 1 over the span from first to last; None for fewer than two or no span."""
    if len(times_s) < 2 or (span_s := max(times_s) - min(times_s)) <= 0:
        return None
    return (len(times_s) - 1) / span_s


def reasons_against(
    schedule: Schedule,
    records: Sequence[RequestRecord],
    *,
    steal_share: float | None,
    is_interrupted: bool = False,
    max_in_flight: int | None = None,
) -> list[str]:
    """Why the run is invalid, a sentence each; empty: it is valid. ``steal_share``: of the machine's time over the
    run, None where it cannot be read (and virtual time has none)."""
    reasons = []
    if is_interrupted:
        reasons.append("The run was interrupted: what it has is not what was planned.")
    if schedule.sent_count == 0 or schedule.lag_s is None:
        reasons.append("Nothing was sent.")
        return reasons
    bound = "" if max_in_flight is None else f" The loop was closed at {max_in_flight} requests in flight."
    if (lag_s := schedule.lag_s["p99"]) > MAX_LAG_P99_S:
        reasons.append(
            f"Schedule lag p99 is {lag_s * 1e3:.1f} ms (limit {MAX_LAG_P99_S * 1e3:g} ms): "
            f"requests were not sent when they were meant to be.{bound}"
        )
    if (share := schedule.achieved_share) is not None and share < MIN_ACHIEVED_SHARE:
        reasons.append(
            f"{share:.1%} of the planned rate was achieved (limit {MIN_ACHIEVED_SHARE:.0%}): "
            f"{schedule.achieved_rate_per_s:.3g} of {schedule.requested_rate_per_s:.3g} requests/s.{bound}"
        )
    if steal_share is not None and steal_share > MAX_STEAL_SHARE:
        reasons.append(
            f"The hypervisor took {steal_share:.1%} of the machine's time (limit {MAX_STEAL_SHARE:.0%}): "
            "the machine measured was not the machine."
        )
    if not any(record.outcome is Outcome.OK for record in records):
        reasons.append("No request succeeded.")
    return reasons

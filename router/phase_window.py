"""The phases of the last requests, for ``baton top``: a bounded window and its percentiles.

Prometheus owns history; this owns the recent past, in constant memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from baton.timeline import PHASES, PhaseDurations

TIME_TO_FIRST_TOKEN = "time_to_first_token"  # noqa: S105  # a name of a statistic
INTER_TOKEN_LATENCY = "inter_token_latency"  # noqa: S105
END_TO_END = "end_to_end"
NAMES = (*(phase.value for phase in PHASES), TIME_TO_FIRST_TOKEN, INTER_TOKEN_LATENCY, END_TO_END)


@dataclass(frozen=True, slots=True)
class PhaseStatistics:
    """Percentiles of one phase over the window, seconds; 0 without samples."""

    name: str
    sample_count: int
    p50_s: float
    p95_s: float


class PhaseWindow:
    """Samples of at most ``max_sample_count`` per name, none older than ``max_age_s``."""

    def __init__(self, *, max_sample_count: int = 512, max_age_s: float = 300.0) -> None:
        self._max_age_s = max_age_s
        # The mutable state: per name, (when, seconds), oldest first.
        self._samples: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=max_sample_count) for name in NAMES
        }

    def finished(self, durations: PhaseDurations, now: float) -> None:
        """A request ended well."""
        for phase in PHASES:
            self._samples[phase.value].append((now, durations[phase]))
        if durations.time_to_first_token_s is not None:
            self._samples[TIME_TO_FIRST_TOKEN].append((now, durations.time_to_first_token_s))
        self._samples[END_TO_END].append((now, durations.total_s))

    def gap(self, gap_s: float, now: float) -> None:
        """Tokens left ``gap_s`` after the tokens before them."""
        self._samples[INTER_TOKEN_LATENCY].append((now, gap_s))

    def statistics(self, now: float) -> list[PhaseStatistics]:
        """In the order of ``NAMES``. Forgets what is too old."""
        result = []
        for name, samples in self._samples.items():
            while samples and now - samples[0][0] > self._max_age_s:
                samples.popleft()
            values = sorted(seconds for _, seconds in samples)
            result.append(PhaseStatistics(name, len(values), _percentile(values, 0.5), _percentile(values, 0.95)))
        return result


def _percentile(ordered: list[float], fraction: float) -> float:
    """Linear between the neighbours."""
    if not ordered:
        return 0.0
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

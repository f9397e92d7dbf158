"""The phases and transfers of the last requests, for ``baton top``: a bounded window, percentiles and rates.

Prometheus owns history; this owns the recent past, in constant memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from baton.timeline import PHASES, Phase
from router.answering import PhaseReport

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


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    """What one worker pulled over the window."""

    kv_bytes_per_s: float = 0.0
    """Per second of the phase KV_TRANSFER; 0 where it pulled nothing."""
    recomputed_share: float = 0.0
    """Of the prompt tokens of what it decoded."""


@dataclass(frozen=True, slots=True)
class _Pulled:
    at: float
    kv_bytes: int
    transfer_s: float
    recomputed_token_count: int
    prompt_token_count: int


class PhaseWindow:
    """Samples of at most ``max_sample_count`` per name, none older than ``max_age_s``."""

    def __init__(self, *, max_sample_count: int = 512, max_age_s: float = 300.0) -> None:
        self._max_sample_count = max_sample_count
        self._max_age_s = max_age_s
        # The mutable state: per name, (when, seconds), and per worker what it pulled; oldest first.
        self._pulled: dict[str, deque[_Pulled]] = {}
        self._samples: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=max_sample_count) for name in NAMES
        }

    def finished(self, report: PhaseReport, prompt_token_count: int, now: float) -> None:
        """A request ended well."""
        durations, transfer = report.durations, report.transfer
        if report.decode_worker_id:
            pulled = self._pulled.setdefault(report.decode_worker_id, deque(maxlen=self._max_sample_count))
            recomputed = min(transfer.recomputed_token_count, prompt_token_count)
            pulled.append(
                _Pulled(now, transfer.kv_bytes, durations[Phase.KV_TRANSFER], recomputed, prompt_token_count)
            )
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

    def transfers(self, now: float) -> dict[str, TransferStatistics]:
        """Of each worker that decoded something in the window. Forgets what is too old."""
        for worker_id, pulled in list(self._pulled.items()):
            while pulled and now - pulled[0].at > self._max_age_s:
                pulled.popleft()
            if not pulled:
                del self._pulled[worker_id]  # a worker that is gone leaves nothing behind
        return {worker_id: _transfer_statistics(pulled) for worker_id, pulled in self._pulled.items()}


def _transfer_statistics(pulled: Iterable[_Pulled]) -> TransferStatistics:
    samples = list(pulled)
    transfer_s = sum(each.transfer_s for each in samples if each.kv_bytes)
    prompt_token_count = sum(each.prompt_token_count for each in samples)
    return TransferStatistics(
        kv_bytes_per_s=sum(each.kv_bytes for each in samples) / transfer_s if transfer_s > 0 else 0.0,
        recomputed_share=sum(each.recomputed_token_count for each in samples) / max(1, prompt_token_count),
    )


def _percentile(ordered: list[float], fraction: float) -> float:
    """Linear between the neighbours."""
    if not ordered:
        return 0.0
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

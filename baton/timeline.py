"""Where the time of one request went: an account in which every instant belongs to exactly one phase.

Pure: times are passed in (the event loop's clock, seconds). Because exactly one phase runs at any
instant, the phases add up to the whole by construction; what a worker measured on its own clock is
carved out of the router's span by ``carve``, never added to it, so clock skew cannot break the sum.

    queue | prefill | handoff_wait | kv_transfer | decode_wait | decode
    ^received                                                          ^closed
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Phase(enum.Enum):
    QUEUE = "queue"
    PREFILL = "prefill"
    HANDOFF_WAIT = "handoff_wait"
    KV_TRANSFER = "kv_transfer"
    DECODE_WAIT = "decode_wait"
    DECODE = "decode"

    __hash__ = object.__hash__  # by identity, as they compare: the enumeration's own is a call for each look-up


PHASES: tuple[Phase, ...] = tuple(Phase)


@dataclass(frozen=True, slots=True)
class PhaseDurations:
    """Seconds per phase, and the two moments that are not phases."""

    seconds: dict[Phase, float]
    total_s: float
    time_to_first_token_s: float | None

    def __getitem__(self, phase: Phase) -> float:
        return self.seconds[phase]


class Timeline:
    """Accumulates phases. One owner: the relay of the request."""

    def __init__(self, received_at: float) -> None:
        self.received_at = received_at
        self._phase = Phase.QUEUE
        self._since = received_at
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._first_token_at: float | None = None
        self._closed_at: float | None = None

    @property
    def phase(self) -> Phase:
        """The phase that is running now."""
        return self._phase

    def enter(self, phase: Phase, now: float) -> None:
        """Ends the running phase and starts ``phase``; entering the running phase again is harmless."""
        self._seconds[self._phase] += max(0.0, now - self._since)
        self._phase, self._since = phase, max(now, self._since)

    def enter_carved(self, phase: Phase, now: float, spans: Sequence[tuple[Phase, float]]) -> None:
        """Ends the running phase and starts ``phase``, splitting the time since the last mark.

        ``spans`` are (phase, seconds) a worker measured *within* the running span. Each takes its seconds
        from the span, in order, until the span is used up; the rest stays with the running phase.
        """
        left = max(0.0, now - self._since)
        for carved, span_s in spans:
            share = min(max(0.0, span_s), left)
            self._seconds[carved] += share
            left -= share
        self._seconds[self._phase] += left
        self._phase, self._since = phase, max(now, self._since)

    def first_token(self, now: float) -> None:
        """The first token leaves the router. Only the first call counts."""
        if self._first_token_at is None:
            self._first_token_at = now

    def close(self, now: float) -> None:
        """The last message leaves. Only the first call counts."""
        if self._closed_at is None:
            self.enter(self._phase, now)
            self._closed_at = now

    def durations(self) -> PhaseDurations:
        """The account so far; complete once closed."""
        end = self._since if self._closed_at is None else self._closed_at
        ttft = None if self._first_token_at is None else self._first_token_at - self.received_at
        return PhaseDurations(dict(self._seconds), end - self.received_at, ttft)

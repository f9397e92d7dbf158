"""The record of one request, and of one look at the servers: what every number of a report is made from.

Pure data. Times are seconds from the start of the run, on one clock. Latencies count from the intended time; the
service time, from the time of sending, stands beside them, so that lag of the generator is seen and not hidden.
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, field

NOT_SENT = "not sent: the turn before failed"
NOT_SENT_LEFT = "not sent: the caller left at the turn before"


class Outcome(enum.StrEnum):
    """How a request ended. Every one of them counts in every denominator."""

    OK = "ok"
    REFUSED = "refused"
    """Turned away before any token: overloaded, no worker, too long."""
    ERROR = "error"
    """Failed otherwise, before or after tokens."""
    INCOMPLETE = "incomplete"
    """The stream ended by itself with fewer (or more) tokens than asked for."""
    TIMEOUT = "timeout"
    """The generator's own deadline passed."""
    CANCELLED = "cancelled"
    """The plan said that the caller leaves."""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. Lists have one entry a message that had tokens, in order."""

    index: int
    group: str
    session_id: str
    prompt_token_count: int
    output_token_limit: int
    intended_at_s: float
    sent_at_s: float
    """When it was really sent; minus ``intended_at_s``: the schedule lag."""
    message_at_s: list[float] = field(default_factory=list)
    message_token_counts: list[int] = field(default_factory=list)
    ended_at_s: float
    """When its stream ended, however it did."""
    outcome: Outcome
    error: str | None = None
    """Why it is not OK, in the target's words; never text of prompt or answer."""
    phases_s: dict[str, float] | None = None
    kv_transfer_bytes: int | None = None
    placement: str | None = None
    attempt_count: int | None = None
    prefill_worker_id: str | None = None
    decode_worker_id: str | None = None
    cached_prompt_token_count: int | None = None

    @property
    def output_token_count(self) -> int:
        return sum(self.message_token_counts)

    @property
    def lag_s(self) -> float:
        return self.sent_at_s - self.intended_at_s

    @property
    def ttft_s(self) -> float | None:
        """From the intended time to the first token."""
        return self.message_at_s[0] - self.intended_at_s if self.message_at_s else None

    @property
    def service_ttft_s(self) -> float | None:
        """From the time of sending: what the server is to blame for, and what closed loops report."""
        return self.message_at_s[0] - self.sent_at_s if self.message_at_s else None

    @property
    def e2e_s(self) -> float | None:
        """From the intended time to the last token; None unless the answer is complete."""
        return (
            self.message_at_s[-1] - self.intended_at_s if self.outcome is Outcome.OK and self.message_at_s else None
        )

    @property
    def message_gaps_s(self) -> list[float]:
        """Between messages: what a reader sees. One fewer than messages."""
        return [later - earlier for earlier, later in itertools.pairwise(self.message_at_s)]

    @property
    def token_gaps_s(self) -> list[float]:
        """Between tokens: tokens of one message came together, so all but its first have a gap of 0."""
        gaps: list[float] = []
        for gap, count in zip(self.message_gaps_s, self.message_token_counts[1:], strict=True):
            gaps += [gap, *[0.0] * (count - 1)]
        first = self.message_token_counts[0] if self.message_token_counts else 1
        return [0.0] * (first - 1) + gaps

    @property
    def tpot_s(self) -> float | None:
        """(last token - first token) / (tokens - 1); None for fewer than two tokens or an incomplete answer."""
        if self.outcome is not Outcome.OK or self.output_token_count < 2:
            return None
        return (self.message_at_s[-1] - self.message_at_s[0]) / (self.output_token_count - 1)


def was_sent(record: RequestRecord) -> bool:
    """Whether the request was sent at all; turns after a failed one were not. Their times are made up: they count
    as failures, and say nothing of the schedule."""
    return record.error not in (NOT_SENT, NOT_SENT_LEFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSample:
    """One look at one server during a run."""

    at_s: float
    source: str
    """A worker's id, or the name of the server."""
    running_count: float
    waiting_count: float
    kv_used_share: float
    """0 to 1 of the KV memory."""

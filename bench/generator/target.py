"""What the generator talks to, whatever it is: one request in, a stream of timed events out.

A target never decides when to send and never aggregates. Its clock is the running loop's, so that a target may live
in virtual time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from bench.results.records import Outcome
from bench.traffic.plan import PlannedRequest


class TargetError(Exception):
    """The target refused or broke a request, or the caller's time was up. Never has prompt or output text."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Tokens:
    """``token_count`` tokens that arrived in one message, at loop time ``at_s``."""

    at_s: float
    token_count: int


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server itself said of the request; last, and only from targets that say anything."""

    phases_s: Mapping[str, float] | None = None
    """Seconds by phase (queue, prefill, handoff_wait, kv_transfer, decode_wait, decode)."""
    kv_transfer_bytes: int | None = None
    placement: str | None = None
    attempt_count: int | None = None
    prefill_worker_id: str | None = None
    decode_worker_id: str | None = None
    prompt_token_count: int | None = None
    """As the server counted it."""
    cached_prompt_token_count: int | None = None


TargetEvent = Tokens | ServerFacts


class Target(Protocol):
    """A system under load."""

    def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        """Streams one answer. Raises ``TargetError``, also when fewer or more tokens came than were asked for.

        Closing the generator early cancels the request at the target.
        """
        ...

    async def close(self) -> None:
        """Closes its connections."""
        ...

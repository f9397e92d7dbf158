"""From a prepared request to the events its caller gets: the relay, and the stages after it, put together.

    relay.run -> (each sample: thinking and tool calls parsed) -> (samples together) -> events

Every stage takes and gives ``router.answering.RelayEvent``s, and closes what it reads from when it is closed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from router.answering import Answer, RelayEvent, RoutedRequest
from router.intake import Intake, Prepared


class Relay(Protocol):
    """What this needs of ``relay.Relay``."""

    def run(
        self, request: RoutedRequest, answer: Answer, deadline_at: float, *, received_at: float
    ) -> AsyncGenerator[RelayEvent, None]: ...


class Pipeline:
    """One per process; stateless."""

    def __init__(self, relay: Relay, intake: Intake) -> None:
        self._relay = relay
        self._intake = intake

    def run(self, prepared: Prepared) -> AsyncGenerator[RelayEvent, None]:
        """``Admitted PromptPart* Piece* Completed``, or a raised ``BatonError``. Consume with ``aclosing``: closing
        it ends everything that the request has running."""
        return self._relay.run(
            prepared.routed,
            self._intake.answer(prepared),
            prepared.deadline_at,
            received_at=prepared.received_at,
        )

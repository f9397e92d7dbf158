"""From a prepared request to the events its caller gets: the relay, and the stages after it, put together.

    relay.run -> (each sample: thinking and tool calls parsed) -> (samples together) -> events

Every stage takes and gives ``router.answering.RelayEvent``s, and closes what it reads from when it is closed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Protocol

from router.answering import Answer, RelayEvent, RoutedRequest
from router.beginning import (
    Beginning,
    end_only,
    how_it_ended,
    no_tail_yet,
    read_again,
    with_beginning,
    without_beginning,
)
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
        if prepared.beginnings:
            return self._go_on(prepared, prepared.beginnings[0])
        return self._relay.run(
            prepared.routed,
            self._intake.answer(prepared),
            prepared.deadline_at,
            received_at=prepared.received_at,
        )

    def _go_on(self, prepared: Prepared, beginning: Beginning) -> AsyncGenerator[RelayEvent, None]:
        """Raises INVALID_REQUEST for a beginning that cannot be one of this answer."""
        answer = self._intake.answer(prepared)
        read = read_again(answer, beginning)
        how = how_it_ended(prepared.routed, read)
        if how is not None:
            events = end_only(prepared.routed, answer, read, how, prepared.received_at)
        elif beginning.has_tail:
            raise no_tail_yet()
        else:
            routed = replace(prepared.routed, emitted_token_ids=beginning.token_ids)
            events = self._relay.run(routed, answer, prepared.deadline_at, received_at=prepared.received_at)
        return without_beginning(with_beginning(events, read), beginning)

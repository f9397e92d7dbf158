"""From a prepared request to the events its caller gets: the relay, and the stages after it, put together.

    relay.run -> (each sample: thinking and tool calls parsed) -> (samples together) -> events

Every stage takes and gives ``router.answering.RelayEvent``s, and closes what it reads from when it is closed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Protocol

from router.answer_parsing import AnswerParsing
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

    def __init__(self, relay: Relay, intake: Intake, parsing: AnswerParsing | None = None) -> None:
        self._relay = relay
        self._intake = intake
        self._parsing = parsing

    def run(self, prepared: Prepared) -> AsyncGenerator[RelayEvent, None]:
        """``Admitted PromptPart* Piece* Completed``, or a raised ``BatonError``. Consume with ``aclosing``: closing
        it ends everything that the request has running."""
        if prepared.beginnings:
            return self._go_on(prepared, prepared.beginnings[0])
        answer = self._intake.answer(prepared)
        events = self._relay.run(prepared.routed, answer, prepared.deadline_at, received_at=prepared.received_at)
        return self._parsed(events, answer, prepared)

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
        events = self._parsed(with_beginning(events, read), answer, prepared)
        return without_beginning(events, beginning)

    def _parsed(
        self, events: AsyncGenerator[RelayEvent, None], answer: Answer, prepared: Prepared, sample_index: int = 0
    ) -> AsyncGenerator[RelayEvent, None]:
        """One answer's events with thinking and calls apart; as they are, where the request asks for neither."""
        if prepared.plan is None or self._parsing is None:
            return events
        return self._parsing.run(
            events,
            prepared.plan,
            answer,
            prepared.routed,
            deadline_at=prepared.deadline_at,
            sample_index=sample_index,
        )

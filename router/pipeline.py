"""From a prepared request to the events its caller gets: the relay, and the stages after it, put together.

    relay.run -> (each sample: thinking and tool calls parsed) -> (samples together) -> (the prompt) -> events

Every stage takes and gives ``router.answering.RelayEvent``s, and closes what it reads from when it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Protocol

from baton.errors import deadline_exceeded
from baton.timeline import Phase
from router.answering import Answer, RelayEvent, RoutedRequest
from router.chats.answer_parsing import AnswerParsing
from router.intake import Intake, Prepared
from router.resuming.beginning import (
    Beginning,
    ReadAgain,
    end_only,
    how_it_ended,
    no_tail_yet,
    read_again,
    with_beginning,
    without_beginning,
)
from router.samples.fan_out import fan_out
from router.samples.prompt_echo import with_prompt
from router.samples.sample_group import SampleGroup, Seat


class Relay(Protocol):
    """What this needs of ``relay.Relay``."""

    def run(
        self,
        request: RoutedRequest,
        answer: Answer,
        deadline_at: float,
        *,
        received_at: float,
        seat: Seat | None = None,
    ) -> AsyncGenerator[RelayEvent, None]: ...

    def samples(self, sample_count: int) -> SampleGroup: ...


class Pipeline:
    """One per process; stateless."""

    def __init__(self, relay: Relay, intake: Intake, parsing: AnswerParsing | None = None) -> None:
        self._relay = relay
        self._intake = intake
        self._parsing = parsing

    def run(self, prepared: Prepared) -> AsyncGenerator[RelayEvent, None]:
        """``Admitted PromptPart* Piece* Completed``, or a raised ``BatonError``. Consume with ``aclosing``: closing
        it ends everything that the request has running."""
        count = prepared.request.sample_count
        if count == 1:
            events = self._sample(prepared, prepared.routed)
        else:
            events = fan_out(
                prepared.routed,
                self._relay.samples(count),
                lambda request, seat: self._sample(prepared, request, seat),
            )
        return self._with_prompt(events, prepared)

    async def read_again(self, prepared: Prepared, beginnings: Sequence[Beginning]) -> Prepared:
        """With what the caller has of each sample: ``run``, once, goes on from there. Raises INVALID_REQUEST for what
        cannot be the beginning of these answers, and DEADLINE_EXCEEDED."""
        read = []
        try:
            async with asyncio.timeout_at(prepared.deadline_at):
                for beginning in beginnings:
                    await asyncio.sleep(0)  # others' turn
                    answer = self._intake.answer(prepared)
                    piece = await read_again(answer, beginning)
                    ended = how_it_ended(prepared.routed, piece)
                    if ended is None and beginning.has_tail:
                        raise no_tail_yet()
                    read.append(ReadAgain(beginning, answer, piece, ended))
        except TimeoutError:
            raise deadline_exceeded(Phase.QUEUE.value, 0) from None
        return replace(prepared, beginnings=tuple(read))

    def _sample(
        self, prepared: Prepared, request: RoutedRequest, seat: Seat | None = None
    ) -> AsyncGenerator[RelayEvent, None]:
        """One answer."""
        if prepared.beginnings:
            return self._go_on(prepared, request, seat)
        answer = self._intake.answer(prepared)
        return self._parsed(self._relayed(prepared, request, answer, seat), answer, prepared, request, seat)

    def _go_on(
        self, prepared: Prepared, request: RoutedRequest, seat: Seat | None
    ) -> AsyncGenerator[RelayEvent, None]:
        read = prepared.beginnings[_index(seat)]
        answer = read.answer
        if read.ended is not None:
            events = end_only(request, answer, read.piece, read.ended, prepared.received_at)
        else:
            routed = replace(request, emitted_token_ids=read.beginning.token_ids)
            events = self._relayed(prepared, routed, answer, seat)
        events = self._parsed(with_beginning(events, read.piece), answer, prepared, request, seat)
        return without_beginning(events, read.beginning)

    def _relayed(
        self, prepared: Prepared, request: RoutedRequest, answer: Answer, seat: Seat | None
    ) -> AsyncGenerator[RelayEvent, None]:
        return self._relay.run(request, answer, prepared.deadline_at, received_at=prepared.received_at, seat=seat)

    def _parsed(
        self,
        events: AsyncGenerator[RelayEvent, None],
        answer: Answer,
        prepared: Prepared,
        request: RoutedRequest,
        seat: Seat | None,
    ) -> AsyncGenerator[RelayEvent, None]:
        """One answer's events with thinking and calls apart; as they are, where the request asks for neither."""
        if prepared.plan is None or self._parsing is None:
            return events
        return self._parsing.run(
            events,
            prepared.plan,
            answer,
            request,
            deadline_at=prepared.deadline_at,
            sample_index=_index(seat),
        )

    def _with_prompt(
        self, events: AsyncGenerator[RelayEvent, None], prepared: Prepared
    ) -> AsyncGenerator[RelayEvent, None]:
        output, routed = prepared.request.output, prepared.routed
        if not output.echo_prompt and routed.prompt_logprob_count is None:
            return events
        is_spelled = output.echo_prompt and output.wants_text
        return with_prompt(
            events,
            routed.prompt_token_ids,
            is_brought=routed.prompt_logprob_count is not None,
            detokenizer=self._intake.prompt_detokenizer() if is_spelled else None,
        )


def _index(seat: Seat | None) -> int:
    return 0 if seat is None else seat.sample_index

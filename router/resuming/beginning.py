"""An answer whose beginning its caller has already: how it goes on, or ends, elsewhere than where it began.

Stages for the pipeline. The tokens are the caller's word, and become nothing but the beginning of the caller's own
answer. Text is made of them once more, and dropped: what was held back when the connection was cut comes out with the
tokens that follow, exactly as it would have.

    relay.run, from the beginning on -> with_beginning -> (parsing) -> without_beginning -> what the caller lacks
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from baton.errors import FieldViolation, invalid_request
from baton.request import FinishReason, Handover, PlacementMode, Usage
from baton.timeline import Timeline
from baton.transfer_report import TransferReport
from router.answering import Admitted, Answer, Completed, PhaseReport, Piece, RelayEvent, RoutedRequest

ALREADY_ENDED = "already_ended"
"""The placement reason of an answer of which the caller lacked nothing but its end."""


SLICE_TOKEN_COUNT = 1000
"""Tokens read again at a stretch: some milliseconds."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a caller has of one answer."""

    token_ids: tuple[int, ...] = field(repr=False)
    has_tail: bool
    """Also the text that was held back to the answer's end: only the end itself is lacking."""

    @property
    def next_index(self) -> int:
        return len(self.token_ids) + self.has_tail


@dataclass(frozen=True, slots=True)
class ReadAgain:
    """A beginning, and the answer that has seen it."""

    beginning: Beginning
    answer: Answer
    piece: Piece
    """All of the beginning."""
    ended: FinishReason | None
    """How, if the beginning is the whole answer."""


async def read_again(answer: Answer, beginning: Beginning) -> Piece:
    """The beginning as one piece; ``answer`` has then seen it. Raises INVALID_REQUEST for tokens after the answer's
    end. Others get their turn meanwhile: to look for stop sequences in a whole context takes most of a second."""
    token_ids = beginning.token_ids
    texts = []
    matched = None
    for first in range(0, len(token_ids), SLICE_TOKEN_COUNT):
        if first:
            await asyncio.sleep(0)
        part = token_ids[first : first + SLICE_TOKEN_COUNT]
        piece = answer.push(part)
        if piece.token_count < len(part):
            raise _after_the_end(first + piece.token_count)
        texts.append(piece.text)
        matched = piece.matched_stop_sequence
    return Piece(0, token_ids, "".join(texts), matched)


def how_it_ended(request: RoutedRequest, beginning: Piece) -> FinishReason | None:
    """If the beginning is the whole answer."""
    token_ids = beginning.token_ids
    if beginning.matched_stop_sequence is not None or (token_ids and token_ids[-1] in request.end_token_ids):
        return FinishReason.STOP
    if len(token_ids) >= request.max_output_token_count:
        return FinishReason.CONTEXT_FULL if request.is_context_bound else FinishReason.MAX_OUTPUT_TOKENS
    return None


def check_beginning(request: RoutedRequest, beginning: Beginning) -> None:
    """Raises INVALID_REQUEST for more tokens than the answer may have, and for any after its end."""
    count = len(beginning.token_ids)
    if count > request.max_output_token_count:
        raise _after_the_end(request.max_output_token_count)
    end_token_ids = request.end_token_ids  # a set that is made anew each time
    before_last = beginning.token_ids[:-1]
    if not end_token_ids.isdisjoint(before_last):
        raise _after_the_end(1 + next(index for index, each in enumerate(before_last) if each in end_token_ids))


def no_tail_yet() -> Exception:
    """For a caller who says that it has the text held back to the end of an answer that has not ended."""
    return invalid_request(
        [
            FieldViolation(
                "next_token_index",
                "counts one more than the continuation's tokens, for a last chunk without tokens; but these tokens "
                "do not end the answer. Give as many as the chunks had",
            )
        ]
    )


async def end_only(
    request: RoutedRequest, answer: Answer, beginning: Piece, reason: FinishReason, received_at: float
) -> AsyncGenerator[RelayEvent, None]:
    """The end of an answer whose tokens are all in ``beginning``: nothing is computed."""
    yield Admitted(request.generation_id)
    tail = answer.flush()
    matched = beginning.matched_stop_sequence or tail.matched_stop_sequence
    if tail.text:
        yield tail
    timeline = Timeline(received_at)
    timeline.close(asyncio.get_running_loop().time())
    ends_with_token = reason is FinishReason.STOP and matched is None
    yield Completed(
        reason=FinishReason.STOP if matched is not None else reason,
        matched_stop_sequence=matched,
        matched_stop_token_id=beginning.token_ids[-1] if ends_with_token else None,
        usage=Usage(len(request.prompt_token_ids), len(beginning.token_ids), 0),
        report=PhaseReport(
            durations=timeline.durations(),
            transfer=TransferReport(),
            handover=Handover.NONE,
            prefill_worker_id="",
            decode_worker_id="",
            attempt_count=0,
            mode=PlacementMode.LOCAL,
            placement_reason=ALREADY_ENDED,
        ),
    )


async def with_beginning(
    events: AsyncGenerator[RelayEvent, None], beginning: Piece
) -> AsyncGenerator[RelayEvent, None]:
    """Puts it ahead of the pieces, for stages that must see the whole answer."""
    async with aclosing(events):
        async for event in events:
            yield event
            if isinstance(event, Admitted) and beginning.token_ids:
                yield beginning


async def without_beginning(
    events: AsyncGenerator[RelayEvent, None], beginning: Beginning
) -> AsyncGenerator[RelayEvent, None]:
    """Drops what the caller has. The logprobs of the beginning are not known here, so their sum is not told."""
    count = len(beginning.token_ids)
    async with aclosing(events):
        async for event in events:
            match event:
                case Piece() if event.first_token_index < count or (beginning.has_tail and not event.token_ids):
                    continue
                case Completed():
                    yield replace(event, cumulative_logprob=None)
                case _:
                    yield event


def _after_the_end(count: int) -> Exception:
    return invalid_request(
        [
            FieldViolation(
                "continuation.samples",
                f"goes on after the answer's end, which is at token {count}; send what was received",
            )
        ]
    )

"""One call's stream, on its way to the caller: events in, messages written, nothing kept.

Owns the writes of a call and their deadline; decides nothing. What came before (samples, parsing, resuming) shows
only as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from baton.errors import deadline_exceeded, reader_too_slow
from baton.request import OutputOptions
from baton.timeline import Phase
from router.answering import Admitted, Completed, Piece, PromptPart, Reader, RelayEvent
from router.begun_write import BegunWrite
from router.phase_window import PhaseWindow
from router.relay_run import RelayRun
from router.service_events import chunk_to_proto, finished_to_proto, prompt_to_proto

WRITE_GRACE_S = 0.25
"""A write that is still waiting for a caller to read so long after the deadline is given up."""

UNREAD_GRACE_S = 10.0
"""Of a caller for whom more was kept than may be: each message that is left must be taken within so long, or the rest
is dropped, with the call's place."""

UNREAD_LOOK_COUNT = 4
"""In that time: a write that hangs is given up a quarter of it late at most."""


class StreamWriter:
    """``write_all`` once per call."""

    def __init__(
        self,
        context: Any,
        *,
        response: Any,
        started: Any,
        output: OutputOptions,
        window: PhaseWindow,
        deadline_at: float,
        reader: Reader | None = None,
    ) -> None:
        """``reader``: of the answer, told when it is too slow. ``response``: the class of this stream's messages.
        ``started``: the message that says it was admitted."""
        self._context = context
        self._response = response
        self._started = started
        self._output = output
        self._window = window
        self._deadline_at = deadline_at
        # The mutable state: what was written, when, and whether a write waits.
        self._plain = response()
        self._written_token_count = 0
        self._last_tokens_at: float | None = None
        self._limit: asyncio.Timeout | None = None
        self._write_under_way = BegunWrite()
        self._is_grace_over = False
        self._reader = reader or Reader()
        self._begun_count = 0
        self._too_slow: tuple[int, int] | None = None
        self._is_dropped = False
        self._unread_timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None

    async def write_all(self, events: AsyncGenerator[RelayEvent, None]) -> None:
        """Raises what ``events`` raises, DEADLINE_EXCEEDED and READER_TOO_SLOW for a caller that does not read, and
        whatever gRPC raises for one that is gone. ``events`` is closed in any case."""
        loop = asyncio.get_running_loop()
        # One timer for all the writes: one for each would cost more than to make its message.
        timer = loop.call_at(self._deadline_at + WRITE_GRACE_S, self._grace_passed)
        self._reader.on_too_slow = self._reader_too_slow
        try:
            # aclosing: leaving in any way, a failed write included, ends what makes the events before this call ends.
            async with asyncio.timeout(None) as self._limit, aclosing(events):
                if isinstance(events, RelayRun):
                    events.deliver_to(self._take_piece)
                try:
                    async for event in events:
                        if isinstance(event, Piece):
                            if event.token_ids or event.tool_calls or self._tells_text(event):
                                await self._write(self._chunk(event, loop.time()))
                                self._written_token_count += len(event.token_ids)
                        else:
                            await self._write(self._message(event, loop.time()))
                except Exception:
                    # The status comes after the write under way: where that is given up, gRPC sends neither, and the
                    # caller waits for its deadline. A bug has a status, too. Bounded by the timer above.
                    await self._write_under_way.settle()
                    raise
                await self._write_under_way.settle()
        except TimeoutError:
            if self._limit is None or not self._limit.expired():
                raise
            if self._is_dropped and self._too_slow is not None:
                raise reader_too_slow(*self._too_slow, self._written_token_count) from None
            raise deadline_exceeded(Phase.DECODE.value, self._written_token_count) from None
        finally:
            timer.cancel()
            self._reader.on_too_slow = None
            if self._unread_timer is not None:
                self._unread_timer.cancel()
            self._write_under_way.close()

    def _tells_text(self, piece: Piece) -> bool:
        """Text that was held back to the answer's end is of no use to who asked for token ids alone."""
        return bool(piece.text or piece.reasoning_text) and self._output.wants_text

    async def _write(self, message: Any) -> None:
        if self._is_grace_over:
            self._give_up()
        if self._failure is not None:
            raise self._failure
        await self._write_under_way.settle()
        self._begun_count += 1
        self._write_under_way.begin(self._context.write(message))

    def _take_piece(self, piece: Piece, now: float) -> bool:
        """The direct line of the relay's run: written here and now, unless the write before is not over."""
        try:
            if self._is_grace_over or self._failure is not None or not self._write_under_way.try_settle():
                return False
            self._write_under_way.begin(self._context.write(self._chunk(piece, now)))
        except Exception as error:
            self._failure = error  # our own task is to raise it, which the piece, on its usual way, will wake
            return False
        self._written_token_count += len(piece.token_ids)
        return True

    def _grace_passed(self) -> None:
        # A caller without a deadline of its own that does not read would keep the call, and its place among the
        # calls there may be, for ever: what the relay has to say of the deadline, it would not hear.
        self._is_grace_over = True
        if self._write_under_way.is_under_way:
            self._give_up()

    def _reader_too_slow(self, unread_bytes: int, limit_bytes: int) -> None:
        if self._too_slow is None:
            self._too_slow = (unread_bytes, limit_bytes)
            self._look_later(still_count=0)

    def _look_later(self, still_count: int) -> None:
        """``still_count``: looks in a row that found the same write under way."""
        loop = asyncio.get_running_loop()
        self._unread_timer = loop.call_later(
            UNREAD_GRACE_S / UNREAD_LOOK_COUNT, self._look_at_progress, self._begun_count, still_count
        )

    def _look_at_progress(self, begun_count: int, still_count: int) -> None:
        is_still = self._begun_count == begun_count and self._write_under_way.is_under_way
        still_count = still_count + 1 if is_still else 0
        if still_count < UNREAD_LOOK_COUNT:
            self._look_later(still_count)
            return
        self._is_dropped = True
        self._give_up()

    def _give_up(self) -> None:
        assert self._limit is not None
        self._limit.reschedule(asyncio.get_running_loop().time())

    def _chunk(self, piece: Piece, now: float) -> Any:
        token_ids = piece.token_ids
        if token_ids:
            if self._last_tokens_at is not None:
                self._window.gap(now - self._last_tokens_at, now)
            self._last_tokens_at = now
        if piece.logprobs or piece.reasoning_text or piece.tool_calls or self._output.wants_token_ids:
            return chunk_to_proto(piece, self._output, response=self._response)
        # The same message again: gRPC serialises it before anything else runs.
        message = self._plain
        chunk = message.chunk
        chunk.first_token_index = piece.first_token_index
        chunk.text = piece.text
        chunk.token_count = len(token_ids)
        chunk.sample_index = piece.sample_index
        return message

    def _message(self, event: Admitted | PromptPart | Completed, now: float) -> Any:
        match event:
            case Admitted():
                return self._started
            case PromptPart():
                return prompt_to_proto(event, self._output)
            case Completed():
                self._window.finished(event.report, event.usage.prompt_token_count, now)
                return finished_to_proto(event, response=self._response)

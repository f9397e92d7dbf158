"""One call's stream, on its way to the caller: events in, messages written, nothing kept.

Owns the writes of a call and their deadline; decides nothing. What came before (samples, parsing, resuming) shows
only as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from baton.errors import deadline_exceeded
from baton.request import OutputOptions
from baton.timeline import Phase
from router.answering import Admitted, Completed, Piece, PromptPart, RelayEvent
from router.phase_window import PhaseWindow
from router.service_events import chunk_to_proto, finished_to_proto, prompt_to_proto

WRITE_GRACE_S = 0.25
"""A write that is still waiting for a caller to read so long after the deadline is given up."""


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
    ) -> None:
        """``response``: the class of this stream's messages. ``started``: the message that says it was admitted."""
        self._context = context
        self._response = response
        self._started = started
        self._output = output
        self._window = window
        self._deadline_at = deadline_at
        self._written_token_count = 0

    async def write_all(self, events: AsyncGenerator[RelayEvent, None]) -> None:
        """Raises what ``events`` raises, DEADLINE_EXCEEDED for a caller that does not read, and whatever gRPC raises
        for one that is gone. ``events`` is closed in any case."""
        loop = asyncio.get_running_loop()
        last_tokens_at: float | None = None
        # aclosing: leaving in any way, a failed write included, ends what makes the events before this call ends.
        async with aclosing(events):
            async for event in events:
                match event:
                    case Piece():
                        if not (event.token_ids or event.text or event.reasoning_text or event.tool_calls):
                            continue
                        now = loop.time()
                        if event.token_ids:
                            if last_tokens_at is not None:
                                self._window.gap(now - last_tokens_at, now)
                            last_tokens_at = now
                        await self._write(chunk_to_proto(event, self._output, response=self._response))
                        self._written_token_count += event.token_count
                    case PromptPart():
                        await self._write(prompt_to_proto(event, self._output))
                    case Admitted():
                        await self._write(self._started)
                    case Completed():
                        self._window.finished(event.report, event.usage.prompt_token_count, loop.time())
                        await self._write(finished_to_proto(event, response=self._response))

    async def _write(self, message: Any) -> None:
        # A caller without a deadline of its own that does not read would keep the call, and its place among the
        # calls there may be, for ever: what the relay has to say of the deadline, it would not hear.
        try:
            async with asyncio.timeout_at(self._deadline_at + WRITE_GRACE_S):
                await self._context.write(message)
        except TimeoutError:
            raise deadline_exceeded(Phase.DECODE.value, self._written_token_count) from None

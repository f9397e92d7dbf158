"""What one request has to say and its caller has not taken yet.

Owns the pieces between relay and caller. They are never held back, and merged while they wait: a caller who keeps up
gets every piece as it is made, one who does not gets fewer and larger ones. So decode never waits for a slow reader;
what piles up is the answer itself, bounded by the request's own ``max_output_token_count``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from baton.errors import BatonError
from baton.leg import PromptLogprobs
from router.answering import Admitted, Piece
from router.handoff_words import Finish


class Outbox:
    """One writer, one reader, one loop."""

    def __init__(self, max_chunk_token_count: int) -> None:
        self._max_chunk_token_count = max_chunk_token_count
        self._items: deque[Admitted | PromptLogprobs | Piece] = deque()
        self._end: Finish | BatonError | None = None
        self._reader: asyncio.Future[None] | None = None
        self.line: Callable[[Piece], bool] | None = None
        """Whom a piece may be handed to where the reader waits and nothing else does; see ``relay_run``."""

    def put(self, item: Admitted | PromptLogprobs | Piece) -> None:
        if self._items:
            last = self._items[-1]
            if isinstance(item, Piece) and isinstance(last, Piece) and self._fits(last, item):
                self._items[-1] = _merged(last, item)
                return
        reader = self._reader
        if reader is None:
            self._items.append(item)
            return
        if self.line is not None and isinstance(item, Piece) and not reader.done() and self.line(item):
            return
        self._items.append(item)
        self._wake()

    def end(self, end: Finish | BatonError) -> None:
        """After what is there. Only the first end counts."""
        if self._end is None:
            self._end = end
            self._wake()

    async def take(self) -> Admitted | PromptLogprobs | Piece | Finish:
        """The next item, or the end. Raises the end if it is an error."""
        while not self._items and self._end is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._items:
            return self._items.popleft()
        assert self._end is not None
        if isinstance(self._end, BatonError):
            raise self._end
        return self._end

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _fits(self, last: Piece, item: Piece) -> bool:
        # Text without tokens stays by itself: a caller who was cut off says by its index whether it has it.
        is_open = last.matched_stop_sequence is None and bool(item.token_ids)
        return is_open and last.token_count + item.token_count <= self._max_chunk_token_count


def _merged(first: Piece, second: Piece) -> Piece:
    return Piece(
        first.first_token_index,
        first.token_ids + second.token_ids,
        first.text + second.text,
        second.matched_stop_sequence,
        first.logprobs + second.logprobs,
    )

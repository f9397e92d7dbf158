"""What one request has to say and its caller has not taken yet.

Owns the pieces between relay and caller. They are never held back, and merged while they wait: a caller who keeps up
gets every piece as it is made, one who does not gets fewer and larger ones. So decode never waits for a slow reader;
what piles up is the answer itself, up to a bound in bytes: past it the answer ends with READER_TOO_SLOW, after what
is there, and the engine's work with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

from baton.errors import BatonError, reader_too_slow
from baton.leg import PromptLogprobs
from router.answering import Admitted, Piece
from router.handoff_words import Finish
from router.piece_size import content_bytes, size_bytes

DEFAULT_MAX_BYTES = 16 * 1024 * 1024


class Outbox:
    """One writer, one reader, one loop."""

    def __init__(
        self,
        max_chunk_token_count: int,
        max_bytes: int = DEFAULT_MAX_BYTES,
        on_given_up: Callable[[int, int], None] = lambda unread_bytes, limit_bytes: None,
    ) -> None:
        """``max_bytes``: of pieces, by ``piece_size``; one is kept whatever its size. ``on_given_up``: raises
        nothing."""
        self._max_chunk_token_count = max_chunk_token_count
        self._max_bytes = max_bytes
        self._sizes: deque[int] = deque()  # of each item, in their order
        self._used_bytes = 0
        self._on_given_up = on_given_up
        self.is_given_up = False
        """Its reader is too slow: nothing more is kept, and whoever computes for it should stop."""
        self._items: deque[Admitted | PromptLogprobs | Piece] = deque()
        self._rest: list[Piece] = []
        """What goes along with the last item: joined when that is taken or another follows, so that each token is
        copied once however many wait."""
        self._rest_token_count = 0
        self._end: Finish | BatonError | None = None
        self._reader: asyncio.Future[None] | None = None
        self.line: Callable[[Piece], bool] | None = None
        """Whom a piece may be handed to where the reader waits and nothing else does; see ``relay_run``."""

    def put(self, item: Admitted | PromptLogprobs | Piece) -> None:
        if self._items:
            last = self._items[-1]
            if isinstance(item, Piece) and isinstance(last, Piece) and self._fits(last, item):
                if self._has_room(item, size := content_bytes(item)):
                    self._rest.append(item)
                    self._rest_token_count += item.token_count
                    self._sizes[-1] += size
                return
        reader = self._reader
        if reader is None:
            self._keep(item)
            return
        if self.line is not None and isinstance(item, Piece) and not reader.done() and self.line(item):
            return
        self._keep(item)
        self._wake()

    def _keep(self, item: Admitted | PromptLogprobs | Piece) -> None:
        size = size_bytes(item) if isinstance(item, Piece) else 0  # what is told of the prompt is as long as that
        if not isinstance(item, Piece) or self._has_room(item, size):
            self._join()
            self._items.append(item)
            self._sizes.append(size)

    def _has_room(self, piece: Piece, size: int) -> bool:
        """Counts it in; or False, from then on: a gap in what is kept would be worse than its end."""
        if self.is_given_up:
            return False
        if self._used_bytes and self._used_bytes + size > self._max_bytes:
            self.is_given_up = True
            self.end(reader_too_slow(self._used_bytes, self._max_bytes, piece.first_token_index))
            self._on_given_up(self._used_bytes, self._max_bytes)
            return False
        self._used_bytes += size
        return True

    @property
    def failure(self) -> BatonError | None:
        """The end, where it is one."""
        return self._end if isinstance(self._end, BatonError) else None

    @property
    def has_end(self) -> bool:
        return self._end is not None

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
            if len(self._items) == 1:
                self._join()
            self._used_bytes -= self._sizes.popleft()
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
        newest = self._rest[-1] if self._rest else last
        is_open = newest.matched_stop_sequence is None and bool(item.token_ids)
        count = last.token_count + self._rest_token_count + item.token_count
        return is_open and count <= self._max_chunk_token_count

    def _join(self) -> None:
        if self._rest:
            last = self._items[-1]
            assert isinstance(last, Piece), "something goes along with it"
            self._items[-1] = _joined([last, *self._rest])
            self._rest.clear()
            self._rest_token_count = 0


def _joined(parts: Sequence[Piece]) -> Piece:
    return Piece(
        parts[0].first_token_index,
        tuple(chain.from_iterable(part.token_ids for part in parts)),
        "".join(part.text for part in parts),
        parts[-1].matched_stop_sequence,
        tuple(chain.from_iterable(part.logprobs for part in parts)),
    )

"""The last part of an answer, kept for a caller who may come again: pieces as they were made, bounded in bytes and
tokens.

Pure. Owns what may still be read and from where. It is also what a reader reads from: one who keeps up gets every
piece as it is made, one who does not gets fewer and larger ones, so decode never waits for a reader and memory never
grows with one.

    index        0      3      7   8                    12
    pieces              | 3..6 | 7 | 8 9 10 11          | tail (no token: the text held back to the end)
                        ^ oldest   ^ a reader may begin   ^ 12: all but the tail        13: the tail, too
                          kept       at every border

A reader begins at the border of a piece: what was merged for it is a union of pieces, so wherever it was cut off is
one. A piece without tokens would have no place in that count, hence there is at most one for each sample, the last:
any other is kept until it can go along with tokens.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from baton.errors import BatonError, FieldViolation, invalid_request, resume_too_late
from router.answering import Completed, Piece
from router.piece_size import size_bytes

MAX_LOOK_COUNT = 4096
"""Pieces that one ``take`` looks at: a millisecond, for everybody else waits."""

GUARANTEED_TOKEN_COUNT = 64
"""The newest of each window, which are its own however full the house is: a reader who keeps up is never too late."""


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """Of one generation. The newest piece is kept whatever its size, and the newest tokens whatever theirs."""

    max_bytes: int
    max_token_count: int
    guaranteed_token_count: int = GUARANTEED_TOKEN_COUNT


@dataclass(slots=True)
class SharedBytes:
    """What all windows together hold. Over ``max_bytes``, ``make_room`` is asked, and a window that still grows keeps
    no more than what each is guaranteed: ``max_bytes`` and that of each window are the bound."""

    max_bytes: int
    used_bytes: int = 0
    make_room: Callable[[int], None] = field(default=lambda target_bytes: None, repr=False)
    """Brings ``used_bytes`` down to what it is given, if it can. May look at every window."""
    _until_asked_bytes: int = 0

    def take(self, size_bytes: int) -> None:
        """So much more is held. Asks for room where there is none; not for every token, since it looks at all."""
        self.used_bytes += size_bytes
        self._until_asked_bytes -= size_bytes
        if self.used_bytes > self.max_bytes and self._until_asked_bytes <= 0:
            self.make_room(self.max_bytes - self.max_bytes // 16)
            self._until_asked_bytes = self.max_bytes // 64


@dataclass(slots=True)
class Cursor:
    """Where one reader is. Made by the window."""

    position: int
    next_indices: list[int]
    """Of each sample: the first token that the reader does not have."""


@dataclass(slots=True)
class _Sample:
    first_index: int
    """The oldest that is kept, or the next to come."""
    next_index: int
    """The next to come; one more once the tail came."""
    has_tail: bool = False
    held: Piece | None = None
    """Without tokens, so it waits for some, or for the end."""


@dataclass(slots=True)
class ReplayWindow:
    """One generation's. ``put`` each piece, ``end`` once."""

    limits: WindowLimits
    shared: SharedBytes
    max_chunk_token_count: int
    """No piece that is read has more tokens."""
    first_indices: Sequence[int] = (0,)
    """Of each sample: where what comes begins; not 0 for an answer that goes on from elsewhere."""
    last: Completed | BatonError | None = None
    """How it ended."""
    used_bytes: int = 0
    token_count: int = 0
    _pieces: deque[tuple[Piece, int]] = field(default_factory=deque, repr=False)
    _dropped_count: int = 0
    _samples: list[_Sample] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._samples = [_Sample(index, index) for index in self.first_indices]

    # Writing

    def put(self, piece: Piece) -> None:
        """The next of its sample. Raises ``ValueError`` for a gap or a repeat: a bug of the writer."""
        sample = self._samples[piece.sample_index]
        if piece.first_token_index != sample.next_index:
            raise ValueError(f"a piece begins at {piece.first_token_index}, {sample.next_index} is next")
        if sample.held is not None:
            piece, sample.held = joined((sample.held, piece)), None
        if not piece.token_ids:
            if piece.text or piece.reasoning_text or piece.tool_calls or piece.matched_stop_sequence:
                sample.held = piece
            return
        sample.next_index += piece.token_count
        self._add(piece)

    def end(self, last: Completed | BatonError) -> None:
        """Only the first end counts. A failed answer has no tail: whoever goes on with it makes that text again."""
        if self.last is not None:
            return
        for sample in self._samples:
            held, sample.held = sample.held, None
            if held is not None and isinstance(last, Completed):
                sample.next_index += 1
                sample.has_tail = True
                self._add(held)
        self.last = last

    def trim(self, target_bytes: int) -> None:
        """Lets go of the oldest down to so many bytes, or to what it is guaranteed."""
        while self.used_bytes > target_bytes and self.has_more_than_guaranteed:
            self._drop_oldest()

    def clear(self) -> None:
        """Lets go of everything; nothing can be read any more."""
        while self._pieces:
            self._drop_oldest()

    # Reading

    def cursor(self, next_indices: Sequence[int]) -> Cursor:
        """A reader that has everything before ``next_indices``. Raises RESUME_TOO_LATE, or INVALID_REQUEST for an
        index that is no border."""
        if len(next_indices) != len(self._samples):
            raise invalid_request(
                [
                    FieldViolation(
                        "next_token_indices",
                        f"says {len(next_indices)} samples; the request asked for {len(self._samples)}",
                    )
                ]
            )
        for number, index in enumerate(next_indices):
            sample = self._samples[number]
            if index < sample.first_index:
                raise resume_too_late(index, sample.first_index)
            if index != sample.next_index and not self._is_border(number, index):
                name = "next_token_index" if len(self._samples) == 1 else f"next_token_indices[{number}]"
                raise invalid_request([FieldViolation(name, _no_border(index, sample.next_index))])
        return Cursor(self._dropped_count, list(next_indices))

    def take(self, cursor: Cursor) -> Piece | None:
        """What is next for this reader: pieces of one sample that were waiting, together. None: nothing now, or
        nothing so far while it ``is_behind``. Raises RESUME_TOO_LATE for a reader that is too slow."""
        if cursor.position < self._dropped_count:
            self._check_not_too_late(cursor)
            cursor.position = self._dropped_count
        parts: list[Piece] = []
        token_count = 0
        last_look = cursor.position + MAX_LOOK_COUNT
        while self.is_behind(cursor) and cursor.position < last_look:
            piece = self._pieces[cursor.position - self._dropped_count][0]
            if not _has(cursor, piece):
                token_count += piece.token_count
                if parts and not self._fits(parts[-1], piece, token_count):
                    break
                parts.append(piece)
                cursor.next_indices[piece.sample_index] += piece.token_count or 1
            cursor.position += 1
        return joined(parts) if parts else None

    def is_behind(self, cursor: Cursor) -> bool:
        """Whether there are pieces that this reader has not been at: after ``take`` said None, too, since that looks
        at so many only."""
        return cursor.position - self._dropped_count < len(self._pieces)

    @property
    def has_more_than_guaranteed(self) -> bool:
        least = self.limits.guaranteed_token_count
        return len(self._pieces) > 1 and self.token_count - self._pieces[0][0].token_count >= least

    def token_count_before(self, cursor: Cursor) -> int:
        """What this reader has, of all samples: a tail has an index, and is no token."""
        return sum(
            index - (sample.has_tail and index >= sample.next_index)
            for index, sample in zip(cursor.next_indices, self._samples, strict=True)
        )

    def has_all(self, cursor: Cursor) -> bool:
        return all(
            index >= sample.next_index for index, sample in zip(cursor.next_indices, self._samples, strict=True)
        )

    # Parts

    def _add(self, piece: Piece) -> None:
        size = size_bytes(piece)
        self._pieces.append((piece, size))
        self.used_bytes += size
        self.token_count += piece.token_count
        self.shared.take(size)
        while self._is_over() and self.has_more_than_guaranteed:
            self._drop_oldest()

    def _is_over(self) -> bool:
        is_over = self.used_bytes > self.limits.max_bytes or self.token_count > self.limits.max_token_count
        return is_over or self.shared.used_bytes > self.shared.max_bytes

    def _drop_oldest(self) -> None:
        piece, size = self._pieces.popleft()
        self._dropped_count += 1
        self.used_bytes -= size
        self.shared.used_bytes -= size
        self.token_count -= piece.token_count
        self._samples[piece.sample_index].first_index = piece.first_token_index + (piece.token_count or 1)

    def _is_border(self, sample_index: int, index: int) -> bool:
        return any(
            piece.sample_index == sample_index and piece.first_token_index == index for piece, _ in self._pieces
        )

    def _check_not_too_late(self, cursor: Cursor) -> None:
        for index, sample in zip(cursor.next_indices, self._samples, strict=True):
            if index < sample.first_index:
                raise resume_too_late(index, sample.first_index)

    def _fits(self, newest: Piece, piece: Piece, token_count: int) -> bool:
        return (
            newest.sample_index == piece.sample_index
            and bool(piece.token_ids)  # the tail stays by itself: its place is after all tokens
            and newest.matched_stop_sequence is None
            and token_count <= self.max_chunk_token_count
        )


def trim_largest(windows: Iterable[ReplayWindow], shared: SharedBytes, target_bytes: int) -> None:
    """Until ``shared`` holds no more than ``target_bytes``, or each window no more than it is guaranteed."""
    largest = [(-each.used_bytes, number, each) for number, each in enumerate(windows)]
    heapq.heapify(largest)
    while largest and (too_many_bytes := shared.used_bytes - target_bytes) > 0:
        _, number, window = heapq.heappop(largest)
        # By halves: not one to nothing while the next keeps all, and not a look at all of them for each piece.
        window.trim(max(window.used_bytes // 2, window.used_bytes - too_many_bytes))
        if window.has_more_than_guaranteed:
            heapq.heappush(largest, (-window.used_bytes, number, window))


def joined(parts: Sequence[Piece]) -> Piece:
    """Pieces of a sample that follow one another, as one: in a time that is linear in what they say."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
        text="".join(part.text for part in parts),
        matched_stop_sequence=next(
            (part.matched_stop_sequence for part in parts if part.matched_stop_sequence), None
        ),
        logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
        reasoning_text="".join(part.reasoning_text for part in parts),
        tool_calls=tuple(chain.from_iterable(part.tool_calls for part in parts)),
    )


def _has(cursor: Cursor, piece: Piece) -> bool:
    return piece.first_token_index < cursor.next_indices[piece.sample_index]


def _no_border(index: int, next_index: int) -> str:
    if index > next_index:
        return f"is {index}; the answer has no more than {next_index} so far"
    return (
        f"is {index}, in the middle of a chunk; give the last chunk's first_token_index plus its token_count, plus "
        "one if it had no token"
    )

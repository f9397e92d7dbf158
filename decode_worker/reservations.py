"""Which of an engine's KV blocks are promised to decodes in hand: the book, and nothing but the book.

An order that does not fit is refused here, before the engine or a byte of KV knows of it. So the router can place it
elsewhere, or keep its KV held and let it wait in turn; inside the engine it would head a line that nobody passes.
Pure: the engine's own count of used blocks is passed in, no I/O, no time.

    reserve --> pending: free by the engine's count, and spoken for
                   | settle: the KV is in place, so the engine counts these blocks itself
                   v
                settled --> release, however the leg ends, from either state; exactly once

It errs on both sides, and neither lasts. Blocks that the engine finds in its prefix cache are counted as wanted, and
those of a pull under way twice, in the book and by the engine: an order may be refused that would have fit. What was
settled may not be in the engine's last report yet: an order may be taken that has to wait there. A worker without
another decode in hand takes whatever could ever fit, so a refusal never stands while nothing is there to end.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.blocks import block_count_for
from engine.protocol import EngineInfo


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Not now."""

    wanted_block_count: int
    free_block_count: int
    """Free by the engine's count, less what is promised; never below 0."""


@dataclass(frozen=True, slots=True)
class NeverFits:
    """Not with everything else gone, either."""

    wanted_block_count: int
    block_count: int
    """All there are."""


@dataclass(eq=False, slots=True)
class Reservation:
    """One leg's. Its owner is whoever asked for it, and gives it back by ``BlockBook.release``."""

    block_count: int
    is_pending: bool = True


class BlockBook:
    """Reservations against one engine's blocks."""

    def __init__(self, block_count: int) -> None:
        if block_count < 1:
            raise ValueError(f"block_count is {block_count}; an engine has at least 1")
        self.block_count = block_count
        self._open: set[Reservation] = set()

    def __len__(self) -> int:
        """Legs in hand, settled ones included."""
        return len(self._open)

    def __repr__(self) -> str:
        return f"<BlockBook {len(self)} legs, {self.reserved_block_count} of {self.block_count} blocks promised>"

    @property
    def reserved_block_count(self) -> int:
        """Promised and not known to be in the engine's count."""
        return sum(each.block_count for each in self._open if each.is_pending)

    def reserve(
        self, wanted_block_count: int, used_block_count: int, *, may_wait: bool = False
    ) -> Reservation | NoRoom | NeverFits:
        """``used_block_count`` by the engine's last word. ``may_wait``: taken though there is no room now, because
        nothing is held for it elsewhere; what is promised to it still counts against others."""
        if wanted_block_count > self.block_count:
            return NeverFits(wanted_block_count, self.block_count)
        free_block_count = max(0, self.block_count - used_block_count - self.reserved_block_count)
        if wanted_block_count > free_block_count and self._open and not may_wait:
            return NoRoom(wanted_block_count, free_block_count)
        reservation = Reservation(wanted_block_count)
        self._open.add(reservation)
        return reservation

    def settle(self, reservation: Reservation) -> None:
        """The engine has the blocks and counts them. Idempotent."""
        reservation.is_pending = False

    def release(self, reservation: Reservation) -> None:
        """The leg has ended. Idempotent."""
        self._open.discard(reservation)


def wanted_block_count(prompt_token_count: int, max_output_token_count: int, info: EngineInfo) -> int:
    """Blocks that a decode must get to begin: for its prompt, of which all but the last token is pulled, and for the
    first token it adds; or for its whole answer, where the engine sets that aside."""
    ahead_count = max_output_token_count - 1
    if not info.sets_answers_aside:
        ahead_count = min(1, ahead_count)
    token_count = min(prompt_token_count + ahead_count, info.max_context_token_count)
    return block_count_for(token_count, info.block_token_count)

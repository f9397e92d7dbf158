"""Hold records: the proof that KV which was read is still the KV that was held. Pure, over a writable buffer.

An engine keeps a small table that its peers may read with one-sided reads. Holding a prefill's KV claims a record:

    word 0    nonce: random, never 0 while the KV is held, 0 once it may be overwritten
    word 1    how many digests the record will have: the hold's block count, or 0 where digests are off
    word 2..  one digest per block, in the prompt's order; 0 while not computed

The order is everything. The holder zeroes the nonce BEFORE the blocks can be anybody else's, and the reader reads the
blocks FIRST and the record AFTERWARDS: a nonce that is still there then says that no block was reused before the read
of the blocks had ended. No clock is compared and no notice is sent. Words are eight bytes, little-endian and aligned,
so each is seen old or new and never half.
"""

from __future__ import annotations

import enum
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.transfer_params import MAX_SLOT_COUNT

__all__ = ["HEAD_WORD_COUNT", "WORD_BYTES", "Finding", "Hold", "HoldTable", "PeerTable", "findings", "record_words"]

Words = NDArray[np.uint64]

WORD_BYTES = 8
HEAD_WORD_COUNT = 2
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Hold:
    """One claim of one record. A record is claimed again later, under another nonce."""

    slot: int
    nonce: int


def record_words(max_block_count: int) -> int:
    """Words of a record with room for the digests of ``max_block_count`` blocks."""
    return HEAD_WORD_COUNT + max_block_count


class HoldTable:
    """The holder's side. Its slots are its bound: a claim beyond them fails. Thread-safe."""

    def __init__(
        self,
        memory: Any,
        *,
        slot_count: int,
        max_block_count: int,
        mint: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        """``memory``: a writable, aligned buffer of exactly the table's size. Zeroed here: nothing is held."""
        words = np.frombuffer(memory, dtype="<u8")
        if len(words) != slot_count * record_words(max_block_count) or not words.flags.writeable:
            raise ValueError("memory: give a writable buffer of slot_count records")
        if words.ctypes.data % WORD_BYTES:
            raise ValueError("memory: is not aligned to eight bytes, so a reader could see half a word")
        self.slot_count = slot_count
        self.max_block_count = max_block_count
        self._words = words.reshape(slot_count, record_words(max_block_count))
        self._words[:] = 0
        self._mint = mint
        self._lock = threading.Lock()
        # First in, first out: a slot rests as long as possible before it means something else.
        self._free = deque(range(slot_count))

    def __repr__(self) -> str:
        return f"<HoldTable [{self.held_count} of {self.slot_count} held]>"

    @property
    def held_count(self) -> int:
        return self.slot_count - len(self._free)

    def claim(self, block_count: int, *, with_digests: bool) -> Hold | None:
        """A record for KV of ``block_count`` blocks that is complete and will not change. None: no record is free."""
        if not 1 <= block_count <= self.max_block_count:
            raise ValueError(f"{block_count} blocks; a record has room for 1 to {self.max_block_count}")
        with self._lock:
            if not self._free:
                return None
            slot = self._free.popleft()
            while not (nonce := self._mint()):
                pass
            record = self._words[slot]
            record[1:] = 0
            record[1] = block_count if with_digests else 0
            record[0] = nonce  # last: who sees the nonce sees this hold's record and not what was there before
        return Hold(slot, nonce)

    def write_digests(self, hold: Hold, first: int, digests: Sequence[int]) -> bool:
        """Publishes the digests of blocks ``first`` and following. False: the hold has ended, nothing was written."""
        start = HEAD_WORD_COUNT + first
        with self._lock:
            if not self._is_held(hold):
                return False  # the record may be another hold's by now
            self._words[hold.slot, start : start + len(digests)] = digests
        return True

    def is_held(self, hold: Hold) -> bool:
        with self._lock:
            return self._is_held(hold)

    def revoke(self, hold: Hold) -> bool:
        """Call before the blocks can be reused. False: had ended already."""
        with self._lock:
            if not self._is_held(hold):
                return False
            self._words[hold.slot, 0] = 0
            self._free.append(hold.slot)
        return True

    def revoke_all(self) -> None:
        with self._lock:
            for slot in np.flatnonzero(self._words[:, 0]):
                self._words[slot, 0] = 0
                self._free.append(int(slot))

    def _is_held(self, hold: Hold) -> bool:
        return bool(self._words[hold.slot, 0] == hold.nonce)


class Finding(enum.Enum):
    """What a record says to who has read blocks and then the record."""

    GONE = "gone"
    """Another nonce, or none: the blocks may have been overwritten before the read ended."""
    UNLIKE = "unlike"
    """The nonce, but of a hold of another size: not the record that was minted."""
    WAIT = "wait"
    """The hold stands; digests that are needed are still being computed."""
    HELD = "held"
    """The hold stands, and no digests will come."""
    READY = "ready"
    """The hold stands and the digests needed are there."""


def findings(record: Words, *, nonce: int, block_count: int, first: int) -> Finding:
    """``record``: its words as they were read; ``first``: the position from which on blocks were read."""
    if int(record[0]) != nonce or not nonce:
        return Finding.GONE
    if not record[1]:
        return Finding.HELD
    if int(record[1]) != block_count:
        return Finding.UNLIKE
    needed = record[HEAD_WORD_COUNT + first : HEAD_WORD_COUNT + block_count]
    return Finding.READY if len(needed) == block_count - first and bool(needed.all()) else Finding.WAIT


@dataclass(frozen=True, slots=True)
class PeerTable:
    """Where a peer's table is, as the peer itself said when it was met. Raises ``ValueError``."""

    address: int
    slot_count: int
    record_bytes: int

    def __post_init__(self) -> None:
        if not 0 < self.address < 1 << 63 or self.address % WORD_BYTES:
            raise ValueError("the peer keeps no hold records, or gave them an impossible address")
        if not 1 <= self.slot_count <= MAX_SLOT_COUNT:
            raise ValueError(f"a hold table of {self.slot_count} records")
        if (
            self.record_bytes % WORD_BYTES
            or not record_words(1) * WORD_BYTES <= self.record_bytes <= MAX_RECORD_BYTES
        ):
            raise ValueError(f"hold records of {self.record_bytes} bytes")

    def place(self, slot: int, word_count: int) -> tuple[int, int]:
        """Address and size of the first ``word_count`` words of a record. Whatever a ticket says, never beyond."""
        if not 0 <= slot < self.slot_count or not 1 <= word_count * WORD_BYTES <= self.record_bytes:
            raise ValueError("the ticket names a hold record outside the peer's table")
        return self.address + slot * self.record_bytes, word_count * WORD_BYTES

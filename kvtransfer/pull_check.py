"""The reader's side of validity: whether what a pull brought may become tokens. No vllm and no clock.

One check per pull. ``begin`` looks at the hold record before the blocks are read, so that nothing is pulled for a
hold that has ended. ``step``, called once per engine step after all blocks have arrived, reads the record again and
judges. Only that second look proves anything (``kvtransfer/holds.py`` has the argument).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.leg import RecomputeReason
from kvtransfer.digest import BlockMemory
from kvtransfer.holds import HEAD_WORD_COUNT, Finding, Hold, Words, findings, record_words

__all__ = ["DIGEST_TIMEOUT_S", "PullCheck", "RecordRead", "RecordReader"]

DIGEST_TIMEOUT_S = 1.0
"""How long a reader waits for digests that the holder still computes: a hundred times what 45 MB take."""


class RecordRead(Protocol):
    def poll(self) -> Words | None:
        """The words once they are here; None before. Raises ``OSError`` when the read failed."""

    def close(self) -> None:
        """Lets go of the read and of the memory it writes to, once that is safe. Idempotent."""


class RecordReader(Protocol):
    @property
    def max_word_count(self) -> int:
        """Of one read."""

    def post(self, slot: int, word_count: int) -> RecordRead | None:
        """Begins to read the head of a peer's record. None: too many reads under way; ask again. Raises
        ``ValueError`` for a record outside the peer's table and ``OSError`` when nothing can be read from it."""


@dataclass(slots=True)
class PullCheck:
    """Ends with ``is_valid`` True or False; then ``reason`` says why not. ``close`` it, however it ended."""

    reader: RecordReader
    hold: Hold
    block_count: int
    """Blocks of the hold."""
    pulled_block_ids: Sequence[int]
    """Where the last of those blocks were read to, in order."""
    memory: BlockMemory | None
    """Where they can be hashed; None: digests are not looked at."""
    is_valid: bool | None = None
    reason: RecomputeReason | None = None
    _before: RecordRead | None = None
    _after: RecordRead | None = None
    _arrived_at: float | None = None

    def begin(self) -> bool:
        """False: the hold has ended already, so there is nothing to read; ``reason`` is set."""
        try:
            self._before = self.reader.post(self.hold.slot, HEAD_WORD_COUNT)
            words = self._before.poll() if self._before is not None else None
        except (ValueError, OSError):
            self._fail(RecomputeReason.FAILED)
            return False
        if words is not None and int(words[0]) != self.hold.nonce:
            self._fail(RecomputeReason.EXPIRED)
            return False
        return True

    def step(self, now: float) -> bool | None:
        """Judges, or None: not yet. Never waits. ``now`` in seconds, of any one clock. To be called only once every
        read of blocks has ended."""
        if self.is_valid is None:
            if self._arrived_at is None:
                self._arrived_at = now
            try:
                self._judge(now)
            except (ValueError, OSError):
                self._fail(RecomputeReason.FAILED)
        return self.is_valid

    def close(self) -> None:
        for read in (self._before, self._after):
            if read is not None:
                read.close()
        self._before = self._after = None

    def _judge(self, now: float) -> None:
        if self._after is None:
            words = HEAD_WORD_COUNT if self.memory is None else record_words(self.block_count)
            words = min(words, self.reader.max_word_count)
            self._after = self.reader.post(self.hold.slot, words)
        record = self._after.poll() if self._after is not None else None
        if record is not None:
            first = self.block_count - len(self.pulled_block_ids)
            found = findings(record, nonce=self.hold.nonce, block_count=self.block_count, first=first)
            if found is Finding.GONE:
                self._fail(self._why_gone())
            elif found is Finding.UNLIKE:
                self._fail(RecomputeReason.CORRUPT)
            elif found is Finding.HELD or self.memory is None:
                self.is_valid = True
            elif found is Finding.READY:
                self.is_valid = self._digests_match(self.memory, record, first)
                if not self.is_valid:
                    self.reason = RecomputeReason.CORRUPT
            else:
                # Still being computed: read again in the next step.
                assert self._after is not None
                self._after.close()
                self._after = None
        assert self._arrived_at is not None
        if self.is_valid is None and now - self._arrived_at >= DIGEST_TIMEOUT_S:
            self._fail(RecomputeReason.TIMED_OUT)

    def _why_gone(self) -> RecomputeReason:
        words = self._before.poll() if self._before is not None else None
        had_ended = words is not None and int(words[0]) != self.hold.nonce
        return RecomputeReason.EXPIRED if had_ended else RecomputeReason.STALE

    def _digests_match(self, memory: BlockMemory, record: Words, first: int) -> bool:
        # The record is copied by value here: one comparison per block, and the first that differs ends it.
        for position, block_id in enumerate(self.pulled_block_ids, first):
            digest = memory.digest(block_id, nonce=self.hold.nonce, position=position)
            if digest != int(record[HEAD_WORD_COUNT + position]):
                return False
        return True

    def _fail(self, reason: RecomputeReason) -> None:
        self.is_valid, self.reason = False, reason

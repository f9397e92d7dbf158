"""The block layer by itself, without a model: damage that must be found, and clean transfers that must pass.

Everything that decides is what engines run: ``HoldTable``, ``HoldKeeper``, ``BlockMemory``, ``PullCheck``. Only the
copy differs: here within one process; ``bench/validity_nixl.py`` does it between two with NIXL.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from baton.leg import RecomputeReason
from kvtransfer.digest import BlockMemory
from kvtransfer.hold_keeper import HoldKeeper
from kvtransfer.holds import Hold, HoldTable, Words, record_words
from kvtransfer.pull_check import PullCheck

Bytes = NDArray[np.uint8]

REGION_COUNT = 4
BLOCK_BYTES = 1024
POOL_BLOCK_COUNT = 64
MAX_BLOCK_COUNT = 8
KINDS = ("flipped bit", "swapped blocks", "truncated", "foreign block", "stale", "expired", "another hold's record")
DEADLINE_S = 5.0


@dataclass(slots=True)
class Counts:
    """What a run of trials came to."""

    clean_count: int = 0
    false_alarms: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    harmful: Counter[str] = field(default_factory=Counter)
    """Of the damaged: how many would have put wrong bytes to use, had nobody looked."""


class Pool:
    """Blocks of KV as an engine lays them out, and buffers over them."""

    def __init__(self, rng: np.random.Generator) -> None:
        shape = (REGION_COUNT, POOL_BLOCK_COUNT, BLOCK_BYTES)
        self.bytes: Bytes = rng.integers(0, 256, shape, dtype=np.uint8)
        flat = [memoryview(region.reshape(-1)) for region in self.bytes]
        self.memory = BlockMemory(flat, [BLOCK_BYTES] * REGION_COUNT, [BLOCK_BYTES] * REGION_COUNT)


class LocalRead:
    def __init__(self, words: Words) -> None:
        self._words = words

    def poll(self) -> Words | None:
        return self._words

    def close(self) -> None:
        """Nothing to let go of."""


class LocalReader:
    """Reads a table in this process."""

    max_word_count = record_words(MAX_BLOCK_COUNT)

    def __init__(self, words: Words) -> None:
        self._words = words

    def post(self, slot: int, word_count: int) -> LocalRead:
        return LocalRead(self._words[slot, :word_count].copy())


class BlockLayer:
    """A holder and a reader."""

    def __init__(self, seed: int, slot_count: int = 16) -> None:
        self.rng = np.random.default_rng(seed)
        self.here = Pool(self.rng)
        self.there = Pool(self.rng)
        words = np.zeros(slot_count * record_words(MAX_BLOCK_COUNT), dtype="<u8")
        table = HoldTable(words, slot_count=slot_count, max_block_count=MAX_BLOCK_COUNT)
        self.keeper = HoldKeeper(table, self.there.memory)
        self._reader = LocalReader(words.reshape(slot_count, -1))
        self._number = 0

    def close(self) -> None:
        self.keeper.close()

    def trial(self, counts: Counts, damage: str | None) -> None:
        rng = self.rng
        count = int(rng.integers(2 if damage == "swapped blocks" else 1, MAX_BLOCK_COUNT + 1))
        held_ids = [int(each) for each in rng.choice(POOL_BLOCK_COUNT, count, replace=False)]
        # Now and then the reader has the first blocks already, and pulls the rest.
        pulled_count = count if damage == "swapped blocks" else int(rng.integers(1, count + 1))
        local_ids = [int(each) for each in rng.choice(POOL_BLOCK_COUNT, pulled_count, replace=False)]
        sources = held_ids[count - pulled_count :]
        self._number += 1
        name = str(self._number)
        self._fill(held_ids)
        hold = self.keeper.hold(name, held_ids)
        assert hold is not None
        truth = self.there.bytes[:, sources].copy()
        if damage == "expired":
            self.keeper.let_go(name)
            self._fill(held_ids)
        check = PullCheck(
            self._reader,
            self._wrong(hold, held_ids) if damage == "another hold's record" else hold,
            block_count=count,
            pulled_block_ids=local_ids,
            memory=self.here.memory,
        )
        if check.begin():
            self._copy(damage, name, held_ids, sources, local_ids)
            ends_at = time.monotonic() + DEADLINE_S
            while check.step(time.monotonic()) is None:
                assert time.monotonic() < ends_at, "a check never ends"
                time.sleep(0)
        check.close()
        self.keeper.let_go(name)
        self.keeper.let_go(name + "'")
        if check.reason is RecomputeReason.EXPIRED:
            self.here.bytes[:, local_ids] = self.there.bytes[:, sources]  # what a reader that does not look would get
        is_same = bool((self.here.bytes[:, local_ids] == truth).all())
        if damage is None:
            counts.clean_count += 1
            if check.reason is not None:
                counts.false_alarms[check.reason.value] += 1
            else:
                assert is_same, "the bench itself copied wrongly"
            return
        counts.damaged[damage] += 1
        counts.harmful[damage] += not is_same
        counts.reasons[damage, check.reason.value if check.reason else "used"] += 1
        if check.reason is None:
            counts.missed[damage] += 1

    def _fill(self, block_ids: Sequence[int]) -> None:
        self.there.bytes[:, block_ids] = self.rng.integers(
            0, 256, (REGION_COUNT, len(block_ids), BLOCK_BYTES), dtype=np.uint8
        )

    def _wrong(self, hold: Hold, held_ids: Sequence[int]) -> Hold:
        """The right slot's neighbour: another request's hold of the same size."""
        other = self.keeper.hold(f"{self._number}'", held_ids)
        assert other is not None
        return Hold(other.slot, hold.nonce)

    def _copy(
        self, damage: str | None, name: str, held_ids: list[int], sources: list[int], local_ids: list[int]
    ) -> None:
        rng = self.rng
        here, there = self.here.bytes, self.there.bytes
        at = int(rng.integers(len(local_ids)))
        if damage == "stale":
            # Freed, and overwritten in part, while it is read.
            here[:, local_ids[:at]] = there[:, sources[:at]]
            self.keeper.let_go(name)
            self._fill(held_ids)
            here[:, local_ids[at:]] = there[:, sources[at:]]
            return
        if damage == "truncated":
            kept = int(rng.integers(BLOCK_BYTES))
            region = int(rng.integers(REGION_COUNT))
            rest = rng.integers(0, 256, BLOCK_BYTES - kept, dtype=np.uint8)
            if (rest == there[region, sources[at], kept:]).all():
                rest[0] ^= 1  # what lay there before must not be what was to come
            here[:, local_ids] = there[:, sources]
            here[region, local_ids[at], kept:] = rest
            return
        here[:, local_ids] = there[:, sources]
        if damage == "flipped bit":
            here[int(rng.integers(REGION_COUNT)), local_ids[at], int(rng.integers(BLOCK_BYTES))] ^= np.uint8(
                1 << int(rng.integers(8))
            )
        elif damage == "swapped blocks":
            one, other = rng.choice(len(local_ids), 2, replace=False)
            here[:, [local_ids[one], local_ids[other]]] = here[:, [local_ids[other], local_ids[one]]]
        elif damage == "foreign block":
            strangers = [each for each in range(POOL_BLOCK_COUNT) if each not in held_ids]
            here[:, local_ids[at]] = there[:, int(rng.choice(strangers))]


def run_blocks(*, damaged_count: int, clean_count: int, seed: int) -> Counts:
    """``damaged_count`` trials spread over ``KINDS``, among ``clean_count`` clean ones."""
    counts = Counts()
    layer = BlockLayer(seed)
    total = damaged_count + clean_count
    # Evenly among each other, so that damage has clean transfers before and after it.
    try:
        made = 0
        for number in range(total):
            is_damaged = (number + 1) * damaged_count // total > made
            layer.trial(counts, KINDS[made % len(KINDS)] if is_damaged else None)
            made += is_damaged
    finally:
        layer.close()
    assert (sum(counts.damaged.values()), counts.clean_count) == (damaged_count, clean_count)
    return counts


EXPECTED_REASONS = {
    "flipped bit": {RecomputeReason.CORRUPT.value},
    "swapped blocks": {RecomputeReason.CORRUPT.value},
    "truncated": {RecomputeReason.CORRUPT.value},
    "foreign block": {RecomputeReason.CORRUPT.value},
    "stale": {RecomputeReason.STALE.value},
    "expired": {RecomputeReason.EXPIRED.value},
    "another hold's record": {RecomputeReason.EXPIRED.value},
}
"""What a reader should say of each kind."""

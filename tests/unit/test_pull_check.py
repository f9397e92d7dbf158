"""The reader's check: begin, then step by step to a verdict, whatever the record says when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from baton.leg import RecomputeReason
from kvtransfer.digest import BlockMemory
from kvtransfer.holds import HEAD_WORD_COUNT, Hold, HoldTable, Words, record_words
from kvtransfer.pull_check import DIGEST_TIMEOUT_S, PullCheck

BLOCK_BYTES = 64
BLOCKS = (4, 1, 6)


class Read:
    def __init__(self, look: Callable[[], Words], *, delay: int, is_broken: bool) -> None:
        self._look = look
        self._delay = delay
        self._is_broken = is_broken
        self._words: Words | None = None
        self.is_open = True

    def poll(self) -> Words | None:
        if self._is_broken:
            raise OSError("broken")
        if self._words is None and self._delay == 0:
            self._words = self._look()
        self._delay = max(0, self._delay - 1)
        return self._words

    def close(self) -> None:
        self.is_open = False


@dataclass
class Reader:
    """Reads a table in this process, after as many polls as ``delays`` says, one number per read."""

    words: Words
    delays: list[int] = field(default_factory=list)
    broken_reads: set[int] = field(default_factory=set)
    busy_posts: set[int] = field(default_factory=set)
    max_word_count: int = 100
    reads: list[Read] = field(default_factory=list)
    post_count: int = 0

    def post(self, slot: int, word_count: int) -> Read | None:
        if slot >= len(self.words):
            raise ValueError("outside")
        self.post_count += 1
        if self.post_count in self.busy_posts:
            return None
        number = len(self.reads)
        delay = self.delays[number] if number < len(self.delays) else 0
        read = Read(lambda: self.words[slot, :word_count].copy(), delay=delay, is_broken=number in self.broken_reads)
        self.reads.append(read)
        return read


class Scene:
    """A hold of three blocks, the same blocks read to other places, and a check of them."""

    def __init__(self, *, with_digests: bool = True, publish: bool = True, skip: int = 0, **reader: Any) -> None:
        words = np.zeros(2 * record_words(8), dtype="<u8")
        self.table = HoldTable(words, slot_count=2, max_block_count=8)
        self.content = bytearray(np.random.default_rng(0).bytes(BLOCK_BYTES * 8))
        self.arrived = bytearray(BLOCK_BYTES * 16)
        self.held_memory = BlockMemory([memoryview(self.content)], [BLOCK_BYTES], [BLOCK_BYTES])
        hold = self.table.claim(len(BLOCKS), with_digests=with_digests)
        assert hold is not None
        self.hold = hold
        if publish and with_digests:
            self.publish()
        self.local = [9, 12, 10][skip:]
        for here, there in zip(self.local, BLOCKS[skip:], strict=True):
            self.arrived[here * BLOCK_BYTES : (here + 1) * BLOCK_BYTES] = self.content[
                there * BLOCK_BYTES : (there + 1) * BLOCK_BYTES
            ]
        self.reader = Reader(words.reshape(2, -1), **reader)
        self.memory: BlockMemory | None = BlockMemory([memoryview(self.arrived)], [BLOCK_BYTES], [BLOCK_BYTES])

    def publish(self) -> None:
        digests = [
            self.held_memory.digest(block, nonce=self.hold.nonce, position=at) for at, block in enumerate(BLOCKS)
        ]
        self.table.write_digests(self.hold, 0, digests)

    def check(self, **changes: Any) -> PullCheck:
        return PullCheck(
            self.reader,
            changes.get("hold", self.hold),
            block_count=changes.get("block_count", len(BLOCKS)),
            pulled_block_ids=self.local,
            memory=self.memory,
        )


def verdict(check: PullCheck, *, between: Callable[[], object] = lambda: None) -> RecomputeReason | None:
    """Begin, what happens while the blocks are read, and one step; None: valid."""
    if check.begin():
        between()
        assert check.step(0.0) is not None
    assert check.is_valid == (check.reason is None)
    return check.reason


def test_what_was_held_and_came_is_valid() -> None:
    assert verdict(Scene().check()) is None


def test_only_what_was_pulled_is_looked_at() -> None:
    scene = Scene(skip=2)
    assert verdict(scene.check()) is None


def test_without_digests_the_hold_is_enough() -> None:
    scene = Scene(with_digests=False)
    scene.arrived[9 * BLOCK_BYTES] ^= 1
    assert verdict(scene.check()) is None


def test_a_reader_without_digests_still_looks_at_the_hold() -> None:
    scene = Scene()
    scene.memory = None
    assert verdict(scene.check()) is None
    scene.table.revoke(scene.hold)
    assert verdict(scene.check()) is RecomputeReason.EXPIRED


def test_a_hold_that_had_ended_costs_no_read_of_blocks() -> None:
    scene = Scene()
    scene.table.revoke(scene.hold)
    check = scene.check()
    assert not check.begin()
    assert check.reason is RecomputeReason.EXPIRED


def test_a_hold_that_ends_while_the_blocks_are_read_makes_them_stale() -> None:
    scene = Scene()
    assert verdict(scene.check(), between=lambda: scene.table.revoke(scene.hold)) is RecomputeReason.STALE


def test_a_slot_claimed_again_meanwhile_is_stale_too() -> None:
    scene = Scene()

    def changes_hands() -> None:
        scene.table.revoke(scene.hold)
        assert scene.table.claim(1, with_digests=True)
        assert scene.table.claim(3, with_digests=True)

    assert verdict(scene.check(), between=changes_hands) is RecomputeReason.STALE


def test_a_first_look_that_comes_late_still_tells_expired_from_stale() -> None:
    scene = Scene(delays=[2, 0])
    scene.table.revoke(scene.hold)
    check = scene.check()
    assert check.begin()  # not known yet, so the blocks are read
    reasons = [check.step(float(at)) for at in range(2)]
    assert reasons[-1] is False
    assert check.reason in (RecomputeReason.EXPIRED, RecomputeReason.STALE)


@pytest.mark.parametrize("at", [0, 1, BLOCK_BYTES - 1])
@pytest.mark.parametrize("block", [9, 12, 10])
def test_a_flipped_bit_anywhere_is_corrupt(at: int, block: int) -> None:
    scene = Scene()
    scene.arrived[block * BLOCK_BYTES + at] ^= 0x10
    assert verdict(scene.check()) is RecomputeReason.CORRUPT


def test_blocks_in_another_order_are_corrupt() -> None:
    scene = Scene()
    scene.local.reverse()
    assert verdict(scene.check()) is RecomputeReason.CORRUPT


def test_a_ticket_that_names_another_number_of_blocks_is_corrupt() -> None:
    scene = Scene()
    assert verdict(scene.check(block_count=4)) is RecomputeReason.CORRUPT


def test_a_record_outside_the_peers_table_fails() -> None:
    scene = Scene()
    assert verdict(scene.check(hold=Hold(7, scene.hold.nonce))) is RecomputeReason.FAILED


@pytest.mark.parametrize("number", [0, 1])
def test_a_record_that_cannot_be_read_fails(number: int) -> None:
    scene = Scene(broken_reads={number})
    assert verdict(scene.check()) is RecomputeReason.FAILED


def test_digests_that_come_late_are_waited_for_a_step_at_a_time() -> None:
    scene = Scene(publish=False)
    check = scene.check()
    assert check.begin()
    assert check.step(0.0) is None
    assert check.step(0.5) is None
    scene.publish()
    assert check.step(0.6) is True
    assert scene.reader.post_count == 4  # one look before, one a step


def test_digests_that_never_come_are_given_up() -> None:
    scene = Scene(publish=False)
    check = scene.check()
    assert check.begin()
    assert check.step(10.0) is None
    assert check.step(10.0 + DIGEST_TIMEOUT_S - 0.01) is None
    assert check.step(10.0 + DIGEST_TIMEOUT_S) is False
    assert check.reason is RecomputeReason.TIMED_OUT


def test_a_hold_that_ends_while_digests_are_waited_for_is_stale() -> None:
    scene = Scene(publish=False)
    check = scene.check()
    assert check.begin()
    assert check.step(0.0) is None
    scene.table.revoke(scene.hold)
    assert check.step(0.1) is False
    assert check.reason is RecomputeReason.STALE


def test_a_record_read_too_short_by_a_smaller_table_is_never_believed() -> None:
    scene = Scene(max_word_count=HEAD_WORD_COUNT + 1)
    check = scene.check()
    assert check.begin()
    assert check.step(0.0) is None
    assert check.step(DIGEST_TIMEOUT_S) is False


def test_too_many_reads_under_way_delay_the_verdict_only() -> None:
    scene = Scene(busy_posts={2, 3})
    check = scene.check()
    assert check.begin()
    assert [check.step(0.0), check.step(0.1), check.step(0.2)] == [None, None, True]


def test_closing_closes_every_read() -> None:
    scene = Scene(delays=[9, 9])
    check = scene.check()
    assert check.begin()
    assert check.step(0.0) is None
    check.close()
    check.close()
    assert [read.is_open for read in scene.reader.reads] == [False, False]


def test_a_verdict_stands() -> None:
    scene = Scene()
    check = scene.check()
    assert check.begin()
    assert check.step(0.0) is True
    scene.table.revoke(scene.hold)
    assert check.step(1.0) is True

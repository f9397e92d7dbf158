"""The keeper: promises made, digests computed beside, promises ended before blocks go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvtransfer.digest import BlockMemory
from kvtransfer.hold_keeper import HoldKeeper
from kvtransfer.holds import HEAD_WORD_COUNT, Hold, HoldTable, Words, record_words

BLOCK_BYTES = 64
BLOCK_COUNT = 16


class SlowMemory(BlockMemory):
    """Computes a digest when told to."""

    def __init__(self) -> None:
        content = bytes(range(256)) * (BLOCK_BYTES * BLOCK_COUNT // 256)
        super().__init__([memoryview(content)], [BLOCK_BYTES], [BLOCK_BYTES])
        self.may_go_on = threading.Event()
        self.is_asked = threading.Event()

    def digest(self, block_id: int, *, nonce: int, position: int) -> int:
        self.is_asked.set()
        assert self.may_go_on.wait(60)
        return super().digest(block_id, nonce=nonce, position=position)


def kept(memory: BlockMemory | None, slot_count: int = 2) -> tuple[HoldKeeper, Words]:
    words = np.zeros(slot_count * record_words(4), dtype="<u8")
    keeper = HoldKeeper(HoldTable(words, slot_count=slot_count, max_block_count=4), memory)
    return keeper, words.reshape(slot_count, -1)


def becomes_true(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.001)


def made(keeper: HoldKeeper, name: str, block_ids: tuple[int, ...]) -> Hold:
    hold = keeper.hold(name, block_ids)
    assert hold is not None
    return hold


def test_digests_come_after_the_promise_and_in_the_prompts_order() -> None:
    memory = SlowMemory()
    keeper, words = kept(memory)
    hold = made(keeper, "one", (5, 3, 9))
    assert list(words[hold.slot]) == [hold.nonce, 3, 0, 0, 0, 0]
    memory.may_go_on.set()
    becomes_true(lambda: bool(words[hold.slot][HEAD_WORD_COUNT + 2]))
    expected = [memory.digest(block, nonce=hold.nonce, position=at) for at, block in enumerate((5, 3, 9))]
    assert list(words[hold.slot][HEAD_WORD_COUNT:]) == [*expected, 0]
    keeper.close()


def test_a_promise_ends_by_name_and_once() -> None:
    keeper, words = kept(None)
    hold = made(keeper, "one", (1,))
    assert words[hold.slot][1] == 0
    assert keeper.let_go("one")
    assert words[hold.slot][0] == 0
    assert not keeper.let_go("one")
    assert not keeper.let_go("never heard of")
    keeper.close()


def test_digests_of_an_ended_hold_are_thrown_away() -> None:
    memory = SlowMemory()
    keeper, words = kept(memory, slot_count=1)
    made(keeper, "one", (1, 2))
    assert memory.is_asked.wait(60)
    keeper.let_go("one")
    other = made(keeper, "other", (3,))
    memory.may_go_on.set()
    becomes_true(lambda: bool(words[0][HEAD_WORD_COUNT]))
    assert words[0][HEAD_WORD_COUNT] == memory.digest(3, nonce=other.nonce, position=0)
    assert words[0][HEAD_WORD_COUNT + 1] == 0
    keeper.close()


def test_without_a_free_record_nothing_is_promised() -> None:
    keeper, _ = kept(None, slot_count=1)
    made(keeper, "one", (1,))
    assert keeper.hold("two", (2,)) is None
    assert keeper.held_count == 1
    keeper.let_go("one")
    made(keeper, "two", (2,))
    keeper.close()


def test_a_queue_of_digests_that_is_full_refuses_the_promise() -> None:
    memory = SlowMemory()
    keeper, words = kept(memory, slot_count=1)
    made(keeper, "0", (1,))
    assert memory.is_asked.wait(60)
    for number in range(1, 3):  # the queue has room for twice the records
        keeper.let_go(str(number - 1))
        made(keeper, str(number), (1,))
    keeper.let_go("2")
    assert keeper.hold("3", (1,)) is None
    assert not words[:, 0].any()
    memory.may_go_on.set()
    keeper.close()


@pytest.mark.parametrize("is_busy", [False, True])
def test_closing_ends_every_promise_and_the_thread(is_busy: bool) -> None:
    memory = SlowMemory()
    keeper, words = kept(memory)
    if is_busy:
        made(keeper, "one", (1, 2, 3))
        made(keeper, "two", (4,))
        assert memory.is_asked.wait(60)
    closing = threading.Thread(target=keeper.close)
    closing.start()
    becomes_true(lambda: not words[:, 0].any())
    memory.may_go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert "baton-digests" not in {each.name for each in threading.enumerate()}
    keeper.close()

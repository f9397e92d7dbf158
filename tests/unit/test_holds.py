"""Hold records: claimed, published, revoked, and what a reader makes of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvtransfer.holds import HEAD_WORD_COUNT, Finding, Hold, HoldTable, PeerTable, Words, findings, record_words

MAX_BLOCKS = 5
WORDS = record_words(MAX_BLOCKS)


def table(slot_count: int = 3) -> tuple[HoldTable, Words]:
    memory = np.ones(slot_count * WORDS, dtype="<u8")
    nonces = itertools.count(100)
    made = HoldTable(memory, slot_count=slot_count, max_block_count=MAX_BLOCKS, mint=lambda: next(nonces))
    return made, memory.reshape(slot_count, WORDS)


def found(record: Words, hold: Hold, *, block_count: int = 3, first: int = 0) -> Finding:
    return findings(record, nonce=hold.nonce, block_count=block_count, first=first)


def claimed(holds: HoldTable, block_count: int = 3, *, with_digests: bool = True) -> Hold:
    hold = holds.claim(block_count, with_digests=with_digests)
    assert hold is not None
    return hold


def test_a_new_table_holds_nothing_whatever_the_memory_was() -> None:
    _, words = table()
    assert not words.any()
    assert found(words[0], Hold(0, 1)) is Finding.GONE


def test_a_hold_is_seen_until_it_is_revoked() -> None:
    holds, words = table()
    hold = claimed(holds)
    assert found(words[hold.slot], hold) is Finding.WAIT
    assert holds.write_digests(hold, 0, [11, 12])
    assert found(words[hold.slot], hold) is Finding.WAIT
    assert holds.write_digests(hold, 2, [13])
    assert found(words[hold.slot], hold) is Finding.READY
    assert list(words[hold.slot][HEAD_WORD_COUNT : HEAD_WORD_COUNT + 3]) == [11, 12, 13]
    assert holds.revoke(hold)
    assert found(words[hold.slot], hold) is Finding.GONE
    assert not holds.revoke(hold)


def test_only_the_digests_of_what_was_read_are_waited_for() -> None:
    holds, words = table()
    hold = claimed(holds)
    holds.write_digests(hold, 2, [13])
    assert found(words[hold.slot], hold, first=2) is Finding.READY
    assert found(words[hold.slot], hold, first=1) is Finding.WAIT


def test_without_digests_the_nonce_alone_speaks() -> None:
    holds, words = table()
    hold = claimed(holds, with_digests=False)
    assert found(words[hold.slot], hold) is Finding.HELD


def test_a_record_of_another_size_is_not_the_one_that_was_minted() -> None:
    holds, words = table()
    hold = claimed(holds, 4)
    assert found(words[hold.slot], hold, block_count=3) is Finding.UNLIKE


def test_a_record_that_was_read_too_short_never_passes() -> None:
    holds, words = table()
    hold = claimed(holds)
    holds.write_digests(hold, 0, [11, 12, 13])
    assert found(words[hold.slot][: HEAD_WORD_COUNT + 2], hold) is Finding.WAIT


def test_no_nonce_is_never_a_match() -> None:
    _, words = table()
    assert findings(words[0], nonce=0, block_count=1, first=0) is Finding.GONE


def test_the_record_is_whole_before_its_nonce_is_there() -> None:
    """A reader that sees the nonce must not see what the record said before."""
    holds, words = table(slot_count=1)
    old = claimed(holds)
    holds.write_digests(old, 0, [11, 12, 13])
    holds.revoke(old)
    new = claimed(holds)
    assert new.slot == old.slot
    assert list(words[0]) == [new.nonce, 3, 0, 0, 0, 0, 0]


def test_what_is_computed_late_is_not_written_into_anothers_record() -> None:
    holds, words = table(slot_count=1)
    old = claimed(holds)
    holds.revoke(old)
    assert not holds.write_digests(old, 0, [11])
    new = claimed(holds)
    assert not holds.write_digests(old, 0, [11])
    assert not holds.revoke(old)
    assert holds.is_held(new)
    assert found(words[0], new) is Finding.WAIT


def test_a_full_table_refuses_and_goes_on_when_one_is_revoked() -> None:
    holds, _ = table(slot_count=2)
    one, other = claimed(holds), claimed(holds)
    assert holds.claim(1, with_digests=True) is None
    assert repr(holds) == "<HoldTable [2 of 2 held]>"
    holds.revoke(other)
    assert claimed(holds).slot == other.slot
    assert holds.is_held(one)


def test_a_slot_rests_as_long_as_possible() -> None:
    holds, _ = table(slot_count=3)
    slots = []
    for _ in range(6):
        hold = claimed(holds)
        slots.append(hold.slot)
        holds.revoke(hold)
    assert slots == [0, 1, 2, 0, 1, 2]


def test_all_can_be_revoked_at_once() -> None:
    holds, words = table()
    every = [claimed(holds) for _ in range(3)]
    holds.revoke_all()
    assert not words[:, 0].any()
    assert not any(holds.is_held(hold) for hold in every)
    assert holds.held_count == 0


def test_zero_is_never_a_nonce() -> None:
    memory = np.zeros(WORDS, dtype="<u8")
    drawn = iter([0, 0, 7])
    holds = HoldTable(memory, slot_count=1, max_block_count=MAX_BLOCKS, mint=lambda: next(drawn))
    assert claimed(holds).nonce == 7


def test_nonces_are_drawn_from_all_of_64_bits() -> None:
    memory = np.zeros(200 * WORDS, dtype="<u8")
    holds = HoldTable(memory, slot_count=200, max_block_count=MAX_BLOCKS)
    nonces = {claimed(holds).nonce for _ in range(200)}
    assert len(nonces) == 200
    assert max(nonces) > 1 << 60


@pytest.mark.parametrize("block_count", [0, MAX_BLOCKS + 1])
def test_a_hold_that_no_record_has_room_for_is_a_bug(block_count: int) -> None:
    holds, _ = table()
    with pytest.raises(ValueError, match="room for 1 to 5"):
        holds.claim(block_count, with_digests=True)


def test_memory_that_cannot_be_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="writable buffer"):
        HoldTable(np.zeros(WORDS + 1, dtype="<u8"), slot_count=1, max_block_count=MAX_BLOCKS)
    with pytest.raises(ValueError, match="writable buffer"):
        HoldTable(bytes(8 * WORDS), slot_count=1, max_block_count=MAX_BLOCKS)
    skewed = np.zeros(8 * WORDS + 8, dtype=np.uint8)[1 : 8 * WORDS + 1]
    with pytest.raises(ValueError, match="aligned"):
        HoldTable(skewed, slot_count=1, max_block_count=MAX_BLOCKS)


def test_whatever_a_ticket_says_nothing_is_read_outside_the_peers_table() -> None:
    peer = PeerTable(address=4096, slot_count=10, record_bytes=8 * WORDS)
    assert peer.place(0, 2) == (4096, 16)
    assert peer.place(9, WORDS) == (4096 + 9 * 8 * WORDS, 8 * WORDS)
    for slot, word_count in ((-1, 2), (10, 2), (0, 0), (0, WORDS + 1), (1 << 40, 2)):
        with pytest.raises(ValueError, match="outside the peer's table"):
            peer.place(slot, word_count)


@pytest.mark.parametrize(
    ("address", "slot_count", "record_bytes"),
    [
        (0, 10, 64),
        (4097, 10, 64),
        (1 << 63, 10, 64),
        (4096, 0, 64),
        (4096, 1 << 17, 64),
        (4096, 10, 63),
        (4096, 10, 16),
        (4096, 10, 1 << 21),
    ],
)
def test_a_peer_whose_table_is_impossible_is_refused(address: int, slot_count: int, record_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"hold (records|table)"):
        PeerTable(address, slot_count, record_bytes)

"""A block's digest changes with any of its bytes, its place and its hold."""

from __future__ import annotations

import random

import pytest

from kvtransfer.digest import BlockMemory, block_seed

BLOCK_BYTES = 96
STRIDE = 128
BLOCK_COUNT = 6
NONCE = 0x1234_5678_9ABC_DEF0


def regions(seed: int = 0) -> list[bytearray]:
    size = (BLOCK_COUNT - 1) * STRIDE + BLOCK_BYTES
    return [bytearray(random.Random(f"{seed}/{index}").randbytes(size)) for index in range(3)]


def memory(contents: list[bytearray]) -> BlockMemory:
    return BlockMemory([memoryview(each) for each in contents], [BLOCK_BYTES] * 3, [STRIDE] * 3)


def test_equal_bytes_have_equal_digests_wherever_they_lie() -> None:
    here, there = regions(), regions()
    for region in there:
        region[4 * STRIDE : 4 * STRIDE + BLOCK_BYTES] = region[STRIDE : STRIDE + BLOCK_BYTES]
    one = memory(here).digest(1, nonce=NONCE, position=7)
    assert one == memory(there).digest(4, nonce=NONCE, position=7)
    assert one != 0


def test_any_flipped_bit_of_any_region_shows() -> None:
    contents = regions()
    blocks = memory(contents)
    clean = blocks.digest(2, nonce=NONCE, position=0)
    for region in contents:
        for offset in range(2 * STRIDE, 2 * STRIDE + BLOCK_BYTES):
            region[offset] ^= 1 << offset % 8
            assert blocks.digest(2, nonce=NONCE, position=0) != clean
            region[offset] ^= 1 << offset % 8
    assert blocks.digest(2, nonce=NONCE, position=0) == clean


def test_what_lies_between_blocks_does_not_count() -> None:
    contents = regions()
    blocks = memory(contents)
    clean = blocks.digest(2, nonce=NONCE, position=0)
    contents[0][2 * STRIDE + BLOCK_BYTES] ^= 1
    contents[0][2 * STRIDE - 1] ^= 1
    assert blocks.digest(2, nonce=NONCE, position=0) == clean


def test_the_same_bytes_elsewhere_in_the_prompt_or_of_another_hold_have_another_digest() -> None:
    blocks = memory(regions())
    digests = {
        blocks.digest(3, nonce=nonce, position=position) for nonce in (NONCE, NONCE + 1) for position in range(50)
    }
    assert len(digests) == 100


def test_seeds_of_neighbouring_positions_and_nonces_do_not_meet() -> None:
    seeds = {block_seed(nonce, position) for nonce in range(200) for position in range(200)}
    assert len(seeds) == 200 * 200
    assert all(0 <= seed < 1 << 64 for seed in (*seeds, block_seed((1 << 64) - 1, 1 << 20)))


def test_a_block_outside_the_memory_is_not_read() -> None:
    blocks = memory(regions())
    assert blocks.block_count == BLOCK_COUNT
    for block_id in (-1, BLOCK_COUNT):
        with pytest.raises(ValueError, match="is not one of 6"):
            blocks.digest(block_id, nonce=NONCE, position=0)


def test_memory_that_cannot_be_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot lie"):
        BlockMemory([memoryview(b"x" * 100)], [20], [10])
    with pytest.raises(ValueError, match="each region"):
        BlockMemory([memoryview(b"x" * 100)], [20, 20], [20])
    with pytest.raises(ValueError, match="flat buffer"):
        BlockMemory([memoryview(bytearray(64)).cast("Q")], [8], [8])

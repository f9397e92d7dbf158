"""The order of a transfer's descriptors: what can be merged is named in a row, and nothing goes elsewhere."""

from __future__ import annotations

import random

from kvtransfer.block_order import DescriptorIds, in_memory_order


def run_count(here: list[int], there: list[int]) -> int:
    """Descriptors that are left once neighbours on both sides are merged."""
    pairs = list(zip(here, there, strict=True))
    return sum(1 for i, (a, b) in enumerate(pairs) if i == 0 or pairs[i - 1] != (a - 1, b - 1))


def test_blocks_that_both_pools_gave_out_backwards_are_one_run() -> None:
    here, there = in_memory_order([9, 8, 7, 6], [24, 23, 22, 21])
    assert (here.tolist(), there.tolist()) == ([6, 7, 8, 9], [21, 22, 23, 24])
    assert run_count(here.tolist(), there.tolist()) == 1


def test_every_block_still_goes_where_it_went() -> None:
    rng = random.Random(5)
    for _ in range(100):
        count = rng.randrange(1, 60)
        here, there = rng.sample(range(500), count), rng.sample(range(500), count)
        ordered_here, ordered_there = in_memory_order(here, there)
        assert set(zip(here, there, strict=True)) == set(
            zip(ordered_here.tolist(), ordered_there.tolist(), strict=True)
        )
        assert run_count(ordered_here.tolist(), ordered_there.tolist()) <= run_count(here, there)


def test_nothing_to_move_is_nothing() -> None:
    here, there = in_memory_order([], [])
    assert here.size == there.size == 0


def test_descriptors_are_numbered_region_after_region_whatever_sizes_were_asked_about_before() -> None:
    ids = DescriptorIds()
    for counts in ((10, 10, 10), (10, 4, 7), (3,), (10, 10, 10)):
        expected = [sum(counts[:region]) + block for region in range(len(counts)) for block in (2, 0, 1)]
        assert list(ids.of(list(counts), [2, 0, 1])) == expected


def test_what_is_remembered_of_peers_pools_is_bounded() -> None:
    ids = DescriptorIds()
    for number in range(3 * DescriptorIds.MAX_KNOWN_COUNT):
        assert list(ids.of([number + 1, 5], [0])) == [0, number + 1]
    assert len(ids._firsts) <= DescriptorIds.MAX_KNOWN_COUNT

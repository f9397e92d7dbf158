"""The block pool against its rules, and against a model too dumb to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.blocks import BlockHash, BlockPool, BlockTable, OutOfBlocks, block_count_for, chain_hashes


def fill(pool: BlockPool, token_ids: list[int]) -> BlockTable:
    """Allocates for ``token_ids`` and publishes its full blocks, as a finished prefill does."""
    hashes = chain_hashes(token_ids, pool.block_token_count)
    table = pool.allocate(hashes, block_count_for(len(token_ids), pool.block_token_count))
    for index, block_hash in enumerate(hashes):
        table.publish(index, block_hash)
    return table


def test_hashes_cover_full_blocks_only_and_everything_before_them() -> None:
    tokens = list(range(10))
    assert len(chain_hashes(tokens, 4)) == 2
    assert chain_hashes(tokens, 4)[:1] == chain_hashes(tokens[:4], 4)
    changed_early = [99, *tokens[1:]]
    assert set(chain_hashes(tokens, 4)).isdisjoint(chain_hashes(changed_early, 4))
    swapped = chain_hashes(tokens[4:8] + tokens[:4], 4)
    assert set(chain_hashes(tokens, 4)).isdisjoint(swapped)


def test_a_chain_continues_from_its_parent() -> None:
    tokens = list(range(12))
    whole = chain_hashes(tokens, 4)
    assert chain_hashes(tokens[8:], 4, parent=whole[1]) == whole[2:]


def test_a_salt_keeps_equal_prompts_apart() -> None:
    assert set(chain_hashes([1] * 8, 4, salt=b"a")).isdisjoint(chain_hashes([1] * 8, 4, salt=b"b"))


def test_a_freed_prefix_is_found_again_and_shared() -> None:
    pool = BlockPool(8, 4)
    first = fill(pool, list(range(10)))
    first.free()
    assert (pool.used_block_count, pool.cached_block_count) == (0, 2)
    again = pool.allocate(chain_hashes(list(range(8)), 4), 3)
    other = pool.allocate(chain_hashes(list(range(8)), 4), 2)
    assert again.cached_block_count == other.cached_block_count == 2
    assert again.block_ids[:2] == other.block_ids == first.block_ids[:2]
    assert pool.used_block_count == 3
    again.free()
    assert pool.used_block_count == 2, "the other sequence still holds the prefix"


def test_the_least_recently_freed_prefix_is_forgotten_first_and_its_tail_before_its_head() -> None:
    pool = BlockPool(4, 2)
    old, young = fill(pool, [1, 1, 1, 1]), fill(pool, [2, 2, 2, 2])
    old.free()
    young.free()
    pool.allocate((), 1)
    assert pool.match(chain_hashes([1, 1, 1, 1], 2)) == 1
    assert pool.match(chain_hashes([2, 2, 2, 2], 2)) == 2
    pool.allocate((), 2)
    assert pool.match(chain_hashes([1, 1, 1, 1], 2)) == 0
    assert pool.match(chain_hashes([2, 2, 2, 2], 2)) == 1


def test_held_blocks_are_never_taken() -> None:
    pool = BlockPool(4, 2)
    held = fill(pool, [1] * 6)
    assert not pool.can_allocate((), 2)
    with pytest.raises(OutOfBlocks):
        pool.allocate((), 2)
    assert pool.used_block_count == 3
    assert set(pool.allocate((), 1).block_ids).isdisjoint(held.block_ids)


def test_a_found_idle_block_is_not_counted_as_free_as_well() -> None:
    pool = BlockPool(2, 2)
    fill(pool, [1, 1, 2, 2]).free()
    assert not pool.can_allocate(chain_hashes([1, 1], 2), 3)
    assert pool.can_allocate(chain_hashes([1, 1], 2), 2)


def test_freeing_twice_is_harmless_even_after_others_took_the_blocks() -> None:
    pool = BlockPool(2, 2)
    table = pool.allocate((), 2)
    table.free()
    other = pool.allocate((), 2)
    table.free()
    assert pool.used_block_count == len(other.block_ids) == 2


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    fill(pool, [1, 1]).free()
    assert pool.match(chain_hashes([1, 1], 2)) == 0


class DumbPool:
    """The same rules written without any structure: a list of blocks, searched."""

    def __init__(self, block_count: int) -> None:
        self.references = [0] * block_count
        self.hashes: list[BlockHash | None] = [None] * block_count
        self.freed_at = [0] * block_count
        self.clock = 0

    def found(self, hashes: tuple[BlockHash, ...], block_count: int) -> list[int]:
        out: list[int] = []
        for wanted in hashes[:block_count]:
            if wanted not in self.hashes:
                break
            out.append(self.hashes.index(wanted))
        return out

    def can_allocate(self, hashes: tuple[BlockHash, ...], block_count: int) -> bool:
        found = self.found(hashes, block_count)
        free = [b for b, count in enumerate(self.references) if count == 0 and b not in found]
        return len(free) >= block_count - len(found)

    def adopt(self, table: BlockTable, hashes: tuple[BlockHash, ...]) -> None:
        """Checks each block the real pool chose, and takes it."""
        found = self.found(hashes, len(table.block_ids))
        assert list(table.block_ids[: len(found)]) == found
        assert table.cached_block_count == len(found)
        for block_id in found:
            self.references[block_id] += 1
        for block_id in table.block_ids[len(found) :]:
            assert self.references[block_id] == 0, "took a block somebody uses"
            free = [b for b, count in enumerate(self.references) if count == 0]
            blank = [b for b in free if self.hashes[b] is None]
            if blank:
                assert block_id in blank
            else:
                assert block_id == min(free, key=lambda b: self.freed_at[b]), "not the oldest"
            self.references[block_id], self.hashes[block_id] = 1, None

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        if block_hash not in self.hashes:
            self.hashes[block_id] = block_hash

    def free(self, table: BlockTable) -> None:
        for block_id in reversed(table.block_ids):
            self.references[block_id] -= 1
            self.clock += 1
            self.freed_at[block_id] = self.clock


class PoolAgainstModel(RuleBasedStateMachine):
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.model = BlockPool(7, 2), DumbPool(7)

    @rule(
        target=tables,
        tokens=st.lists(st.integers(0, 1), max_size=9),
        more=st.integers(0, 2),
        computed=st.integers(0, 9),
    )
    def allocate(self, tokens: list[int], more: int, computed: int) -> BlockTable:
        hashes = chain_hashes(tokens, 2)
        count = block_count_for(len(tokens), 2) + more
        assert self.pool.match(hashes) == len(self.model.found(hashes, len(hashes)))
        possible = self.model.can_allocate(hashes, count)
        assert self.pool.can_allocate(hashes, count) == possible
        if not possible:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(hashes, count)
            return self.pool.allocate((), 0)
        table = self.pool.allocate(hashes, count)
        self.model.adopt(table, hashes)
        for index in range(table.cached_block_count, min(computed, len(hashes))):
            table.publish(index, hashes[index])
            self.model.publish(table.block_ids[index], hashes[index])
        return table

    @rule(table=consumes(tables))
    def free(self, table: BlockTable) -> None:
        self.model.free(table)
        table.free()
        table.free()

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        assert self.pool.used_block_count == sum(count > 0 for count in self.model.references)
        assert self.pool.cached_block_count == sum(known is not None for known in self.model.hashes)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)

"""The KV blocks of one engine: who holds them, which of them can be reused, which are forgotten first.

Owns every block id from 0 to ``block_count - 1`` and the prefix cache over them. A block is in exactly
one of three states, and these three collections are all the mutable state there is:

    blank    free, content worthless                      taken first
    idle     free, content cached under its hash (LRU)    taken next, oldest first, and then forgotten
    used     referenced by one or more ``BlockTable``s    never taken: a held prefill stays whole

Only full blocks are cached. A block's hash covers its tokens, all tokens before it and an optional salt, so
equal hashes mean equal prefixes. Never computes anything, never waits, knows no request.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockHash = bytes
HASH_BYTES = 16


class OutOfBlocks(Exception):
    """``allocate`` was called without asking ``can_allocate``: a bug of the caller."""


def block_count_for(token_count: int, block_token_count: int) -> int:
    """Blocks that ``token_count`` tokens fill or begin."""
    return -(-token_count // block_token_count)


def chain_hashes(
    token_ids: Sequence[int],
    block_token_count: int,
    *,
    salt: bytes = b"",
    parent: BlockHash | None = None,
) -> tuple[BlockHash, ...]:
    """The hashes of the full blocks of ``token_ids``; a partial block at the end has none.

    ``parent`` continues a chain: ``token_ids`` then start where the parent's block ended. The salt belongs
    to the root of a chain and keeps tenants apart who must not see each other's timing.
    """
    last = parent if parent is not None else hashlib.blake2b(salt, digest_size=HASH_BYTES).digest()
    hashes = []
    for end in range(block_token_count, len(token_ids) + 1, block_token_count):
        tokens = array("Q", token_ids[end - block_token_count : end]).tobytes()
        last = hashlib.blake2b(last + tokens, digest_size=HASH_BYTES).digest()
        hashes.append(last)
    return tuple(hashes)


class BlockTable:
    """The blocks of one sequence, in order. Free it exactly when the sequence ends; twice is harmless."""

    __slots__ = ("_pool", "block_ids", "cached_block_count", "is_freed")

    def __init__(self, pool: BlockPool, block_ids: tuple[int, ...], cached_block_count: int) -> None:
        self._pool = pool
        self.block_ids = block_ids
        self.cached_block_count = cached_block_count
        """Leading blocks whose content was in the cache."""
        self.is_freed = False

    def publish(self, index: int, block_hash: BlockHash) -> None:
        """The block at ``index`` is full and computed: others may reuse it from now on."""
        if self.is_freed:
            raise OutOfBlocks("publish after free")
        self._pool._publish(self.block_ids[index], block_hash)

    def free(self) -> None:
        if not self.is_freed:
            self.is_freed = True
            self._pool._free(self.block_ids)

    def __repr__(self) -> str:
        state = "freed" if self.is_freed else f"{self.cached_block_count} from cache"
        return f"<BlockTable {len(self.block_ids)} blocks, {state}>"


class BlockPool:
    """A bounded pool of reference-counted blocks with a prefix cache."""

    def __init__(self, block_count: int, block_token_count: int, *, enable_prefix_caching: bool = True) -> None:
        if block_count < 1 or block_token_count < 1:
            raise ValueError(f"a pool needs blocks: got {block_count} of {block_token_count} tokens")
        self.block_count = block_count
        self.block_token_count = block_token_count
        self.enable_prefix_caching = enable_prefix_caching
        self._blank: list[int] = list(range(block_count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._ref_counts: dict[int, int] = {}
        self._block_by_hash: dict[BlockHash, int] = {}
        self._hash_by_block: dict[int, BlockHash] = {}

    @property
    def free_block_count(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def used_block_count(self) -> int:
        return len(self._ref_counts)

    @property
    def cached_block_count(self) -> int:
        """Blocks that a new sequence could find by hash, used or idle."""
        return len(self._block_by_hash)

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes are in the cache. Changes nothing, not even the LRU order."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._block_by_hash:
                return index
        return len(hashes)

    def can_allocate(self, hashes: Sequence[BlockHash], block_count: int) -> bool:
        """Whether ``allocate`` with the same arguments succeeds now."""
        found = self._found(hashes, block_count)
        idle_found_count = sum(block_id in self._idle for block_id in found)
        # Reusing an idle block takes it from the free ones too.
        return block_count - len(found) <= self.free_block_count - idle_found_count

    def allocate(self, hashes: Sequence[BlockHash], block_count: int) -> BlockTable:
        """``block_count`` blocks, the leading ones out of the cache as far as ``hashes`` are found there.

        Raises ``OutOfBlocks`` and changes nothing if there are not enough.
        """
        if not self.can_allocate(hashes, block_count):
            raise OutOfBlocks(f"{block_count} blocks wanted, {self.free_block_count} free")
        found = self._found(hashes, block_count)
        for block_id in found:  # BEFORE anything is evicted: an idle block that is found must not be
            self._ref_counts[block_id] = self._ref_counts.get(block_id, 0) + 1
            self._idle.pop(block_id, None)
        fresh = [self._take() for _ in range(block_count - len(found))]
        for block_id in fresh:
            self._ref_counts[block_id] = 1
        return BlockTable(self, (*found, *fresh), len(found))

    def check(self) -> None:
        """Raises ``AssertionError`` unless every block is in exactly one state and the cache agrees."""
        blank, idle, used = set(self._blank), set(self._idle), set(self._ref_counts)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert len(blank) + len(idle) + len(used) == len(blank | idle | used), "a block is in two states"
        assert blank | idle | used == set(range(self.block_count)), "a block is lost"
        assert all(count > 0 for count in self._ref_counts.values()), "a used block nobody refers to"
        assert {b: h for h, b in self._block_by_hash.items()} == self._hash_by_block, "the cache disagrees"
        assert idle <= set(self._hash_by_block), "an idle block without a hash"
        assert not blank & set(self._hash_by_block), "a blank block with a hash"

    def __repr__(self) -> str:
        return (
            f"<BlockPool {self.used_block_count} used, {len(self._idle)} idle, {len(self._blank)} blank "
            f"of {self.block_count} x {self.block_token_count} tokens>"
        )

    def _found(self, hashes: Sequence[BlockHash], block_count: int) -> list[int]:
        limited = hashes[:block_count]
        return [self._block_by_hash[block_hash] for block_hash in limited[: self.match(limited)]]

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        block_id, _ = self._idle.popitem(last=False)
        del self._block_by_hash[self._hash_by_block.pop(block_id)]
        return block_id

    def _publish(self, block_id: int, block_hash: BlockHash) -> None:
        # Two sequences may compute the same block at the same time: the first one is the cached one.
        if self.enable_prefix_caching and block_hash not in self._block_by_hash:
            known = self._hash_by_block.get(block_id)
            assert known is None, "a block's content never changes while it is used"
            self._block_by_hash[block_hash] = block_id
            self._hash_by_block[block_id] = block_hash

    def _free(self, block_ids: Sequence[int]) -> None:
        # Last block first: of a chain, the tail is forgotten before the head it is worthless without.
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            del self._ref_counts[block_id]
            if block_id in self._hash_by_block:
                self._idle[block_id] = None
            else:
                self._blank.append(block_id)

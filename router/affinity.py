"""Who is believed to have which prefix in cache: a bounded index of guesses.

Fed by what was placed. A wrong guess costs a cache miss, never a wrong token: engines look in their own caches by
their own keys. Owns no time and no worker; never holds token ids, only hashes of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from router.cluster_view import WorkerIdentity


@dataclass(frozen=True, slots=True)
class AffinityLimits:
    block_token_count: int = 128
    """Tokens that share one entry of the index."""
    max_prompt_block_count: int = 256
    """Only so much of a prompt's beginning is indexed."""
    max_entry_count: int = 65_536
    """Blocks known; the least recently seen go first."""
    max_workers_per_entry: int = 4
    max_session_count: int = 16_384


class PrefixIndex:
    """Least recently used, in both of its tables."""

    def __init__(self, limits: AffinityLimits = AffinityLimits()) -> None:
        self._limits = limits
        # The mutable state: workers by hash of a prefix, and by session; newest last, everywhere.
        self._blocks: OrderedDict[int, tuple[WorkerIdentity, ...]] = OrderedDict()
        self._sessions: OrderedDict[str, frozenset[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        return f"<PrefixIndex [{len(self._blocks)} blocks, {len(self._sessions)} sessions]>"

    def chain(self, prompt_token_ids: Sequence[int], tenant: str = "") -> tuple[int, ...]:
        """One hash per whole block of the prompt, each of everything up to its end, and of whose it is: engines
        share a prefix within a tenant only, so another tenant's worker is no better than any."""
        size = self._limits.block_token_count
        count = min(len(prompt_token_ids) // size, self._limits.max_prompt_block_count)
        hashes = []
        so_far = hash(tenant)
        for start in range(0, count * size, size):
            so_far = hash((so_far, tuple(prompt_token_ids[start : start + size])))
            hashes.append(so_far)
        return tuple(hashes)

    def cached_token_counts(self, chain: Sequence[int]) -> dict[WorkerIdentity, int]:
        """Prompt tokens that each worker is believed to have: only workers that have a beginning of it."""
        counts: dict[WorkerIdentity, int] = {}
        holders: set[WorkerIdentity] | None = None
        for index, each in enumerate(chain, start=1):
            here = set(self._blocks.get(each, ()))
            holders = here if holders is None else holders & here
            if not holders:
                break
            counts.update(dict.fromkeys(holders, index * self._limits.block_token_count))
        return counts

    def session_worker_ids(self, session_id: str) -> frozenset[str]:
        return self._sessions.get(session_id, frozenset()) if session_id else frozenset()

    def note(self, chain: Sequence[int], session_id: str, workers: Sequence[WorkerIdentity]) -> None:
        """This prompt goes to these workers."""
        for each in reversed(chain):  # the beginning is touched last, so that it is evicted last
            known = tuple(w for w in self._blocks.pop(each, ()) if w not in workers)
            self._blocks[each] = (*known, *workers)[-self._limits.max_workers_per_entry :]
        if session_id:
            self._sessions.pop(session_id, None)
            self._sessions[session_id] = frozenset(worker.worker_id for worker in workers)
        while len(self._blocks) > self._limits.max_entry_count:
            self._blocks.popitem(last=False)
        while len(self._sessions) > self._limits.max_session_count:
            self._sessions.popitem(last=False)

    def forget(self, worker: WorkerIdentity) -> None:
        """The process is gone, and its cache with it. Its id may come back; sessions return to it then."""
        for key in [key for key, workers in self._blocks.items() if worker in workers]:
            left = tuple(w for w in self._blocks[key] if w != worker)
            if left:
                self._blocks[key] = left
            else:
                del self._blocks[key]

"""The holder's side of validity: claims a record when a prefill's KV is held, and revokes it before its blocks go.

Owns one thread, which computes digests beside the engine's; everything else is called by the engine's own thread.
No vllm: the blocks are buffers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress

from kvtransfer.digest import BlockMemory
from kvtransfer.holds import Hold, HoldTable

__all__ = ["HoldKeeper"]


MAX_HOLD_COUNT = 1024
"""Prefills that one engine holds at once, at most. A prefill worker's ledger is smaller, so it is full first."""


class HoldKeeper:
    """``memory`` None: digests are off, and a record has its nonce only."""

    def __init__(self, table: HoldTable, memory: BlockMemory | None) -> None:
        self._table = table
        self._memory = memory
        self._holds: dict[str, Hold] = {}
        # Revoked holds stay in the queue until the thread comes by; hence more room than there are records.
        self._to_digest: queue.Queue[tuple[Hold, Sequence[int]] | None] = queue.Queue(2 * table.slot_count)
        self._thread: threading.Thread | None = None
        self._is_closing = False
        if memory is not None:
            self._thread = threading.Thread(target=self._digest_all, name="baton-digests", daemon=True)
            self._thread.start()

    def __repr__(self) -> str:
        return f"<HoldKeeper [{len(self._holds)} held | {self._to_digest.qsize()} to digest]>"

    @property
    def held_count(self) -> int:
        return len(self._holds)

    def hold(self, request_id: str, block_ids: Sequence[int]) -> Hold | None:
        """Promises readers that these blocks stay as they are. None: no record is free, so nothing may be handed
        out. The blocks are complete when this is called."""
        assert request_id not in self._holds, "a request is held once"
        hold = self._table.claim(len(block_ids), with_digests=self._memory is not None)
        if hold is None:
            return None
        if self._memory is not None:
            try:
                self._to_digest.put_nowait((hold, tuple(block_ids)))
            except queue.Full:
                self._table.revoke(hold)
                return None
        self._holds[request_id] = hold
        return hold

    def let_go(self, request_id: str) -> bool:
        """Ends the promise. Call before the blocks can be reused; unknown requests are ignored."""
        hold = self._holds.pop(request_id, None)
        return hold is not None and self._table.revoke(hold)

    def close(self) -> None:
        """Ends every promise, then the thread: it reads the blocks, so their memory must outlive it. Idempotent."""
        self._holds.clear()
        self._table.revoke_all()
        self._is_closing = True
        if self._thread is not None:
            with suppress(queue.Full):  # then it is not waiting, and looks at the flag between two blocks
                self._to_digest.put_nowait(None)
            self._thread.join()  # at most one block's digest away
            self._thread = None

    def _digest_all(self) -> None:
        while not self._is_closing and (task := self._to_digest.get()) is not None:
            self._digest(*task)

    def _digest(self, hold: Hold, block_ids: Sequence[int]) -> None:
        assert self._memory is not None
        for position, block_id in enumerate(block_ids):
            # Once a hold has ended its blocks may change under the hash: what comes out is then not written.
            if self._is_closing or not self._table.is_held(hold):
                return
            digest = self._memory.digest(block_id, nonce=hold.nonce, position=position)
            if not self._table.write_digests(hold, position, [digest]):
                return

"""Hold records over NIXL: the table that peers read here, and the reads of theirs. Owns that memory and no other.

The table's coordinates travel in the agent metadata of vLLM's handshake, so a ticket can name a record and never an
address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlAgentMetadata

from kvtransfer.holds import WORD_BYTES, PeerTable, Words, record_words

__all__ = ["AgentMetadata", "NixlRecordReader", "RecordMemory", "RecordReads"]

MAX_READ_COUNT = 256
"""Record reads under way at once; a pull beyond them is checked in a later step."""

_DRAM = "DRAM"


@dataclass
class AgentMetadata(NixlAgentMetadata):  # type: ignore[misc]
    """What an engine tells a peer about itself, with its hold table. 0: it has none."""

    hold_table_address: int = 0
    hold_slot_count: int = 0
    hold_record_bytes: int = 0


class RecordMemory:
    """Memory of one engine, registered with its agent: its own table, and a landing place per read of a peer's."""

    def __init__(self, agent: Any, *, slot_count: int, max_block_count: int) -> None:
        self._agent = agent
        self.words_per_record = record_words(max_block_count)
        self.table = np.zeros(slot_count * self.words_per_record, dtype="<u8")
        self.landing = np.zeros((MAX_READ_COUNT, self.words_per_record), dtype="<u8")
        ranges = [(memory.ctypes.data, memory.nbytes, 0, "") for memory in (self.table, self.landing)]
        self.landing_address = int(self.landing.ctypes.data)
        self._registered = agent.get_reg_descs(ranges, _DRAM)
        agent.register_memory(self._registered)

    def close(self) -> None:
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


class RecordReads:
    """The reads of peers' records. A landing place is used again only when nothing can write to it any more."""

    def __init__(self, agent: Any, memory: RecordMemory) -> None:
        self._agent = agent
        self._memory = memory
        self._free = list(range(MAX_READ_COUNT))  # the latest first: its memory is in the caches
        self._stuck: list[tuple[Any, int]] = []

    @property
    def max_word_count(self) -> int:
        return self._memory.words_per_record

    def post(self, table: PeerTable, agent_name: str, slot: int, word_count: int) -> NixlRecordRead | None:
        address, size = table.place(slot, word_count)
        if word_count > self.max_word_count:
            raise ValueError("the hold has more blocks than a prompt can have here")
        self._unstick()
        if not self._free:
            return None
        place = self._free.pop()
        words = self._memory.landing[place, :word_count]
        words[:] = 0
        here_address = self._memory.landing_address + place * self._memory.words_per_record * WORD_BYTES
        handle = None
        try:
            here = self._agent.get_xfer_descs([(here_address, size, 0)], _DRAM)
            there = self._agent.get_xfer_descs([(address, size, 0)], _DRAM)
            handle = self._agent.initialize_xfer("READ", here, there, agent_name)
            state = self._agent.transfer(handle)
        except Exception as error:  # NIXL raises types of its own
            self.end(handle, place)
            raise OSError(f"the hold record could not be read: {type(error).__name__}") from error
        return NixlRecordRead(self, handle, place, words, state)

    def state(self, handle: Any) -> str:
        try:
            return str(self._agent.check_xfer_state(handle))
        except Exception as error:  # NIXL raises types of its own
            raise OSError(f"a read of a hold record failed: {type(error).__name__}") from error

    def end(self, handle: Any, place: int) -> None:
        try:
            if handle is not None:
                self._agent.release_xfer_handle(handle)
        except Exception:  # it cannot be cancelled: NIXL may still write to the place
            self._stuck.append((handle, place))
        else:
            self._free.append(place)

    def _unstick(self) -> None:
        stuck, self._stuck = self._stuck, []
        for handle, place in stuck:
            self.end(handle, place)


class NixlRecordRead:
    """See ``kvtransfer.pull_check.RecordRead``."""

    def __init__(self, reads: RecordReads, handle: Any, place: int, words: Words, state: str) -> None:
        self._reads = reads
        self._handle = handle
        self._place: int | None = place
        self._words = words
        self._state = state
        self._result: Words | None = None

    def poll(self) -> Words | None:
        if self._result is None and self._place is not None:
            if self._state == "PROC":
                self._state = self._reads.state(self._handle)
            if self._state not in ("DONE", "PROC"):
                raise OSError("a read of a hold record failed")
            if self._state == "DONE":
                self._result = self._words.copy()  # the landing place is another read's afterwards
                self.close()
        return self._result

    def close(self) -> None:
        if self._place is not None:
            place, self._place = self._place, None
            self._reads.end(self._handle, place)


class NixlRecordReader:
    """The reads of one peer's table. See ``kvtransfer.pull_check.RecordReader``."""

    def __init__(self, reads: RecordReads, table: PeerTable, agent_name: str) -> None:
        self._reads = reads
        self._table = table
        self._agent_name = agent_name
        self.max_word_count = min(reads.max_word_count, table.record_bytes // WORD_BYTES)

    def post(self, slot: int, word_count: int) -> NixlRecordRead | None:
        return self._reads.post(self._table, self._agent_name, slot, word_count)

"""The block layer between two processes with real NIXL agents and real hold records, without a model.

Three kinds of trial: clean transfers; damage done in the holder's memory after its digests, or by reading other
blocks; and races, in which the holder ends the hold and overwrites the blocks at a random moment around the read.
Races are judged by the nonce alone, digests aside: what passes must be what was held, byte for byte.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.digest import BlockMemory
from kvtransfer.hold_keeper import HoldKeeper
from kvtransfer.holds import Hold, HoldTable, PeerTable, record_words
from kvtransfer.pull_check import PullCheck

REGION_COUNT = 4
BLOCK_BYTES = 64 * 1024
POOL_BLOCK_COUNT = 32
MAX_BLOCK_COUNT = 8
SLOT_COUNT = 16
LONGEST_DELAY_S = 0.001
DEADLINE_S = 10.0


@dataclass(slots=True)
class NixlCounts:
    clean_count: int = 0
    false_alarms: Counter[str] = field(default_factory=Counter)
    damaged_count: int = 0
    missed_count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the damaged."""
    race_count: int = 0
    race_reasons: Counter[str] = field(default_factory=Counter)
    race_overwritten_count: int = 0
    """Reads of races that brought other bytes than were held: wrong answers, had nobody looked."""
    race_missed_count: int = 0
    """Of those, how many passed."""
    check_s: list[float] = field(default_factory=list)


class End:
    """An agent, a pool of blocks and hold records, all registered: what each process has."""

    def __init__(self, name: str) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        from kvtransfer.connector_records import RecordMemory

        self.agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, num_threads=0))
        self.records = RecordMemory(self.agent, slot_count=SLOT_COUNT, max_block_count=MAX_BLOCK_COUNT)
        self.pool: NDArray[np.uint8] = np.zeros((REGION_COUNT, POOL_BLOCK_COUNT, BLOCK_BYTES), dtype=np.uint8)
        place = [(self.pool.ctypes.data, self.pool.nbytes, 0, "")]
        self.agent.register_memory(self.agent.get_reg_descs(place, "DRAM"))
        flat = [memoryview(region.reshape(-1)) for region in self.pool]
        self.memory = BlockMemory(flat, [BLOCK_BYTES] * REGION_COUNT, [BLOCK_BYTES] * REGION_COUNT)


def content(seed: int, block_count: int) -> NDArray[np.uint8]:
    """What a hold's blocks say: both ends can make it, so that nothing needs to be compared over the pipe."""
    words = np.random.default_rng(seed).integers(0, 1 << 63, (REGION_COUNT, block_count, BLOCK_BYTES // 8))
    return words.view(np.uint8).reshape(REGION_COUNT, block_count, BLOCK_BYTES)


def hold_for_peer(pipe: Connection) -> None:
    """The holder's process: obeys until the pipe closes."""
    end = End("holder")
    table = HoldTable(end.records.table, slot_count=SLOT_COUNT, max_block_count=MAX_BLOCK_COUNT)
    keeper = HoldKeeper(table, end.memory)
    rng = np.random.default_rng(0)
    metadata = end.agent.get_agent_metadata()
    pipe.send_bytes(metadata if isinstance(metadata, bytes) else metadata.encode("latin-1"))
    coordinates = {
        "pool": end.pool.ctypes.data,
        "table": end.records.table.ctypes.data,
        "record_bytes": 8 * record_words(MAX_BLOCK_COUNT),
    }
    pipe.send_bytes(json.dumps(coordinates).encode())
    block_ids: list[int] = []
    ending: threading.Thread | None = None

    def end_hold(after_s: float, ids: Sequence[int]) -> None:
        time.sleep(after_s)
        keeper.let_go("one")
        end.pool[:, ids] ^= 0xFF

    while True:
        try:
            while not pipe.poll(0.001):
                end.agent.get_new_notifs()  # a pair's first read needs its owner's progress, as from an engine's step
            order = json.loads(pipe.recv_bytes())
        except EOFError:
            break
        if ending is not None:
            ending.join()
            ending = None
        if order["do"] == "hold":
            keeper.let_go("one")
            count = order["count"]
            block_ids = [int(each) for each in rng.choice(POOL_BLOCK_COUNT, count, replace=False)]
            end.pool[:, block_ids] = content(order["seed"], count)
            hold = keeper.hold("one", block_ids)
            assert hold is not None
            if order["damage"]:
                words = end.records.table.reshape(SLOT_COUNT, -1)[hold.slot, 2 : 2 + count]
                while not words.all():
                    time.sleep(0.0001)
                at = block_ids[int(rng.integers(count))]
                end.pool[int(rng.integers(REGION_COUNT)), at, int(rng.integers(BLOCK_BYTES))] ^= np.uint8(
                    1 << int(rng.integers(8))
                )
            answer = {"slot": hold.slot, "nonce": hold.nonce, "block_ids": block_ids}
            if order["race"]:
                delay_s = float(rng.uniform(0, LONGEST_DELAY_S))
                ending = threading.Thread(target=end_hold, args=(delay_s, list(block_ids)))
                ending.start()
            pipe.send_bytes(json.dumps(answer).encode())
    if ending is not None:
        ending.join()
    keeper.close()


class NixlLayer:
    """The reader's end, in this process, and the holder's in one of its own."""

    def __init__(self, pipe: Connection) -> None:
        from kvtransfer.connector_records import NixlRecordReader, RecordReads

        self._pipe = pipe
        self._end = End("reader")
        agent = self._end.agent
        self._peer = agent.add_remote_agent(pipe.recv_bytes())
        told = json.loads(pipe.recv_bytes())
        self._pool_address = told["pool"]
        self._reader = NixlRecordReader(
            RecordReads(agent, self._end.records),
            PeerTable(told["table"], SLOT_COUNT, told["record_bytes"]),
            self._peer if isinstance(self._peer, str) else self._peer.decode(),
        )
        self._rng = np.random.default_rng(1)
        self._seed = 0

    def trial(self, counts: NixlCounts, kind: str) -> None:
        """``kind``: clean, flipped, foreign or race."""
        rng, end = self._rng, self._end
        self._seed += 1
        count = int(rng.integers(1, MAX_BLOCK_COUNT + 1))
        order = {
            "do": "hold",
            "count": count,
            "seed": self._seed,
            "damage": kind == "flipped",
            "race": kind == "race",
        }
        self._pipe.send_bytes(json.dumps(order).encode())
        told = json.loads(self._pipe.recv_bytes())
        pulled_count = count if kind == "flipped" else int(rng.integers(1, count + 1))
        sources = told["block_ids"][count - pulled_count :]
        if kind == "foreign":
            strangers = [each for each in range(POOL_BLOCK_COUNT) if each not in told["block_ids"]]
            sources[int(rng.integers(pulled_count))] = int(rng.choice(strangers))
        local_ids = [int(each) for each in rng.choice(POOL_BLOCK_COUNT, pulled_count, replace=False)]
        end.pool[:, local_ids] = 0
        memory = None if kind == "race" else end.memory
        check = PullCheck(
            self._reader,
            Hold(told["slot"], told["nonce"]),
            block_count=count,
            pulled_block_ids=local_ids,
            memory=memory,
        )
        is_read = check.begin()
        if is_read:
            self._read(sources, local_ids)
            began_at = time.perf_counter()
            self._until_judged(check)
            counts.check_s.append(time.perf_counter() - began_at)
        check.close()
        truth = content(self._seed, count)[:, count - pulled_count :]
        is_same = bool((end.pool[:, local_ids] == truth).all())
        reason = check.reason.value if check.reason else "used"
        if kind == "clean":
            counts.clean_count += 1
            assert is_same, "a clean read brought other bytes than were held"
            if check.reason is not None:
                counts.false_alarms[reason] += 1
        elif kind == "race":
            counts.race_count += 1
            counts.race_reasons[reason] += 1
            counts.race_overwritten_count += is_read and not is_same
            counts.race_missed_count += check.reason is None and not is_same
        else:
            counts.damaged_count += 1
            counts.reasons[f"{kind}: {reason}"] += 1
            counts.missed_count += check.reason is None

    def _read(self, sources: Sequence[int], local_ids: Sequence[int]) -> None:
        agent = self._end.agent

        def places(base: int, block_ids: Sequence[int]) -> list[tuple[int, int, int]]:
            return [
                (base + (region * POOL_BLOCK_COUNT + block_id) * BLOCK_BYTES, BLOCK_BYTES, 0)
                for region in range(REGION_COUNT)
                for block_id in block_ids
            ]

        here = agent.get_xfer_descs(places(self._end.pool.ctypes.data, local_ids), "DRAM")
        there = agent.get_xfer_descs(places(self._pool_address, sources), "DRAM")
        handle = agent.initialize_xfer("READ", here, there, self._peer)
        state = agent.transfer(handle)
        ends_at = time.monotonic() + DEADLINE_S
        while state == "PROC":
            assert time.monotonic() < ends_at, "a read never ends"
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        agent.release_xfer_handle(handle)

    def _until_judged(self, check: PullCheck) -> None:
        ends_at = time.monotonic() + DEADLINE_S
        while check.step(time.monotonic()) is None:
            assert time.monotonic() < ends_at, "a check never ends"
            time.sleep(0.0001)


@contextmanager
def nixl_layer() -> Iterator[NixlLayer]:
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=hold_for_peer, args=(theirs,), daemon=True)
    holder.start()
    theirs.close()
    try:
        yield NixlLayer(ours)
    finally:
        ours.close()
        holder.join(10)
        if holder.is_alive():
            holder.kill()
            holder.join()


def run_nixl(*, clean_count: int, damaged_count: int, race_count: int) -> NixlCounts:
    counts = NixlCounts()
    kinds = ["clean"] * clean_count + ["flipped", "foreign"] * (damaged_count // 2) + ["race"] * race_count
    order = np.random.default_rng(2).permutation(len(kinds))
    with nixl_layer() as layer:
        for index in order:
            layer.trial(counts, kinds[index])
    return counts

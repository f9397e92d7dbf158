"""Baton's connector with faults that are told anew while the engine runs, and peers that it forgets.

For ``bench/real_faults.py``, and for nothing else: engines start slowly, and one pair of them is to meet every kind
of fault. An engine gets it by module path, in place of ``kvtransfer.connector``, and faults still need its
configuration to allow them. What it is to meet stands in a file of its own, known to whoever starts the engine.

A pair of engines has one first contact in its life. So that there are many, an engine can be told to forget its peers
whenever it reads from none, as it does with peers that were replaced.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtransfer import connector
from kvtransfer.connector_worker import PullWorker
from kvtransfer.faults import Fault, FaultDice, FaultPlan, Operation

FOLDER_VARIABLE = "BATON_BENCH_FAULT_PLANS"
"""Environment: a folder with a file for each engine, by its worker's id."""
NOTHING = FaultPlan(allow_faults=True, probability=0.0)
SLEEP_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a file says."""

    faults: dict[str, Any]
    pull_timeout_s: float
    forgets_peers: bool = False
    ends_what_is_stuck: bool = False
    """Reads and first contacts that were to be stuck for longer may end now."""


class ToldDice(FaultDice):
    """Draws by what the file says now."""

    def __init__(self, path: Path) -> None:
        super().__init__(NOTHING)
        self.contact_count: Callable[[], int] = lambda: 0
        """Says how many first contacts are under way."""
        self._path = path
        self._looking = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self.look()

    def draw(self, operation: Operation) -> Fault | None:
        self.look()
        return super().draw(operation)

    def sleep(self, span_s: float) -> None:
        """In place of ``time.sleep`` where a fault takes its time: what is stuck may end before."""
        ends_at = time.monotonic() + span_s
        while (left_s := ends_at - time.monotonic()) > 0 and not self.told.ends_what_is_stuck:
            time.sleep(min(SLEEP_S, left_s))
            self.look()

    def look(self) -> None:
        with self._looking:
            found = os.stat(self._path)
            if self._seen == (found.st_ino, found.st_mtime_ns):
                return
            self._seen = (found.st_ino, found.st_mtime_ns)
            self.told = Told(**json.loads(self._path.read_text()))
            self.follow(FaultPlan.of(self.told.faults))

    def counts(self) -> dict[str, int]:
        return super().counts() | {"contacts under way": self.contact_count()}


class ToldWorker(PullWorker):
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.dice = ToldDice(Path(os.environ[FOLDER_VARIABLE]) / engine_id.rpartition("-")[0])
        self._answering_count = 0
        self.dice.contact_count = lambda: len(self._handshake_futures) + self._answering_count
        self._faulty_agent = self.nixl_wrapper._agent
        self._faulty_agent.dice = self.dice
        self._faulty_agent._sleep = self.dice.sleep
        self._faulty_agent.notify_pause_s = 0.0

    def open_side_channel(self) -> None:
        super().open_side_channel()
        listener: Any = self._listener
        welcome = listener._answer

        def answer(request: bytes) -> bytes:
            """In the listener's thread. As the holder of the KV, this engine meets faults of the handshake here."""
            self._answering_count += 1
            try:
                self._faulty_agent._strike(Operation.HANDSHAKE)
                said: bytes = welcome(request)
                return said
            finally:
                self._answering_count -= 1

        listener._answer = answer

    def start_load_kv(self, metadata: Any) -> None:
        self.dice.look()
        told = self.dice.told
        self.deadlines.timeout_s = told.pull_timeout_s
        if told.ends_what_is_stuck:
            self._faulty_agent._stuck_until.clear()
        if told.forgets_peers and not self._recving_metadata and not self._handshake_futures:
            for engine_id in list(self._remote_agents):
                self._cleanup_remote_engine(engine_id, log_eviction=False)
        super().start_load_kv(metadata)


connector.PullWorker = ToldWorker  # type: ignore[attr-defined]
NixlConnector = connector.NixlConnector
CONNECTOR_MODULE = "bench.faulty_connector"

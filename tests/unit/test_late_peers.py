"""Pulls from a peer whose first contact was too slow: nothing is kept of what nobody reports. vLLM is a stand-in."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import kvtransfer

NIXL = "vllm.distributed.kv_transfer.kv_connector.v1"
PEER = "late-peer"


class StockWorker:
    """As much of vLLM's pull worker as a pull touches that is never posted."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        self._remote_agents: dict[str, Any] = {}
        self._handshake_futures = {PEER: object()}
        self._recving_metadata: dict[str, Any] = {}
        self._recv_failures: set[str] = set()

    def start_load_kv(self, metadata: Any) -> None:
        for request_id, meta in metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                self._recving_metadata[request_id] = meta
            self._read_blocks_for_req(request_id, meta)

    def _read_blocks_for_req(self, request_id: str, meta: Any) -> None:
        """The handshake is under way: it waits."""

    def _handle_failed_transfer(self, request_id: str, handle: Any, failed: set[str], **named: Any) -> bool:
        failed.add(request_id)
        return True

    def get_transfer_results(self) -> Any:
        done, self._recv_failures = self._recv_failures & self._recving_metadata.keys(), set()
        for request_id in done:
            del self._recving_metadata[request_id]
        return types.SimpleNamespace(finished_sending=set(), finished_recving=done, failed_recving=set(done))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    def module(name: str, **content: Any) -> None:
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)

    module(f"{NIXL}.base", KVConnectorTransferResults=object)
    module(f"{NIXL}.nixl.metadata", NixlConnectorMetadata=object, ReqMeta=object)
    module(f"{NIXL}.nixl.pull_worker", NixlPullConnectorWorker=StockWorker)
    # Under a name of its own: what other tests import must rest on the real one.
    path = Path(kvtransfer.__file__).with_name("connector_deadlines.py")
    spec = importlib.util.spec_from_file_location("connector_deadlines_on_stand_ins", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    settings = types.SimpleNamespace(get_from_extra_config=lambda key, default: default)
    worker = loaded.PunctualWorker(types.SimpleNamespace(kv_transfer_config=settings), "here", None)
    worker._late_peers.add(PEER)
    return worker


def asked_for(request_id: str, *, awaiting_kvs: bool) -> Any:
    meta = types.SimpleNamespace(awaiting_kvs=awaiting_kvs, remote=types.SimpleNamespace(engine_id=PEER))
    return types.SimpleNamespace(reqs_to_recv={request_id: meta})


def test_a_pull_from_a_late_peer_is_taken_back_at_once_and_known_as_late_when_it_is_reported(worker: Any) -> None:
    worker.start_load_kv(asked_for("waits", awaiting_kvs=True))
    assert worker.get_transfer_results().failed_recving == {"waits"}
    assert worker.was_taken_back("waits")
    assert (len(worker.deadlines), worker._taken_back) == (0, set())


def test_of_a_request_that_awaits_nothing_from_a_late_peer_nothing_is_kept(worker: Any) -> None:
    """Its caller left before it had its turn, or all of its prompt was cached: vLLM asks for a notice, and never
    reports it."""
    worker.start_load_kv(asked_for("awaits-nothing", awaiting_kvs=False))
    assert worker.get_transfer_results().finished_recving == set()
    assert (len(worker.deadlines), worker._taken_back) == (0, set())

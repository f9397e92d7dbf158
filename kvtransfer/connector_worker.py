"""The worker side of the KV connector: posts reads, watches them, holds and frees what peers read here.

Lives in the engine process and is called once per engine step. What vLLM's NIXL pull worker does stays its
own; this adds a release by name, a record per pull, an expiry that the reader checks, and it undoes three
habits: a spinning progress thread and a stolen CPU affinity, which cost a small machine most of its compute, and
notices, for which a reader waits until the prefill engine has a moment.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta

from kvtransfer.connector_deadlines import PunctualWorker
from kvtransfer.connector_faults import faulty
from kvtransfer.connector_peers import Peers
from kvtransfer.connector_telemetry import PullRecord, PullStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

PROGRESS_THREAD_KEY = "baton_enable_progress_thread"
EXPIRY_MARGIN_S = 0.05
"""Taken off a peer's expiry: the two clocks are compared over one round trip of the handshake."""

_agent_config_lock = threading.Lock()


def external_id(request_id: str) -> str:
    """vLLM's internal id is the caller's plus a dash and eight random characters."""
    return request_id[:-9]


class SilentAgent:
    """A NIXL agent that sends no notices: neither with a read that it is done, nor heartbeats.

    A read is done only when its notice was taken in, which takes a step of the memory's owner: while that computes a
    prompt, seconds. The bytes themselves are copied by the reader, within milliseconds and without the owner. Baton
    needs no notice: the router releases held KV by name when it was adopted, and extends leases itself.
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def make_prepped_xfer(self, *args: Any, notif_msg: bytes = b"", **named: Any) -> Any:
        return self._agent.make_prepped_xfer(*args, **named)

    def send_notif(self, agent_name: str, notif_msg: bytes) -> None:
        """Does nothing, on purpose."""


class PullWorker(Peers, PunctualWorker):
    nixl_wrapper: Any

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        transfer_config = vllm_config.kv_transfer_config
        enable_progress_thread = bool(transfer_config.get_from_extra_config(PROGRESS_THREAD_KEY, False))
        affinity = os.sched_getaffinity(0)
        try:
            with _agents_made_with(enable_prog_thread=enable_progress_thread):
                super().__init__(vllm_config, engine_id, kv_cache_config)
        finally:
            # The stock constructor moves this thread, which is also the one that computes, to the last
            # core of the machine: every engine on the host would share it.
            os.sched_setaffinity(0, affinity)
        self.nixl_wrapper = SilentAgent(faulty(self.nixl_wrapper, transfer_config.kv_connector_extra_config))
        self.xfer_stats = PullStats()
        self._release_wanted: set[str] = set()
        self._pull_started: dict[str, float] = {}
        self._pull_results: dict[str, tuple[int, int, float, float]] = {}

    # -- holding -------------------------------------------------------------------------------

    @property
    def held_count(self) -> int:
        """Finished prefills whose blocks wait for a reader, a release or their expiry."""
        return len(self._reqs_to_send)

    def release_held(self, handle: str) -> int:
        """Frees, in the step that follows, what was prefilled under this external id. Unknown: nothing.

        A prefill that has finished but whose lease has not reached this side yet is released as soon as it does.
        """
        wanted = {r for r in self._reqs_to_process if external_id(r) == handle}
        self._release_wanted |= wanted
        return len(wanted)

    def _release_now(self) -> set[str]:
        freed: set[str] = self._release_wanted & self._reqs_to_send.keys()
        for request_id in freed:
            del self._reqs_to_send[request_id]
            self._reqs_to_process.discard(request_id)
            self.consumer_notification_counts_by_req.pop(request_id, None)
            self.expected_consumer_notifications_by_req.pop(request_id, None)
        # What a reader's notice or an abort has taken out meanwhile needs no release any more.
        self._release_wanted &= self._reqs_to_process
        return freed

    # -- pulling -------------------------------------------------------------------------------

    def given_up(self, request_id: str) -> None:
        self.xfer_stats.record_given_up(request_id)

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        now = time.monotonic()
        for request_id, meta in metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                self._pull_started[request_id] = now
        super().start_load_kv(metadata)

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        if self._is_expired(meta):
            # Same path as a failed transfer: reported as received and failed, hence recomputed.
            self.xfer_stats.record_kv_expired_req()
            self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)
            return
        super()._read_blocks_for_req(req_id, meta)

    def _is_expired(self, meta: ReqMeta) -> bool:
        """Whether the peer may have reused the blocks by now. Unknown peers are asked only after the handshake."""
        if meta.remote is None or meta.remote.blocks_expiry_time is None or not any(meta.local_block_ids):
            return False
        offset = self._engine_clock_offset.get(meta.remote.engine_id)
        if offset is None:
            return False
        return bool(time.perf_counter() + EXPIRY_MARGIN_S >= meta.remote.blocks_expiry_time - offset)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """One request at a time, so that vLLM's measurements can be told apart by request."""
        done: set[str] = set()
        failed: set[str] = set()
        for request_id in list(transfers):
            mark = len(self.xfer_stats.data["bytes_transferred"])
            alone = {request_id: transfers[request_id]}
            done_now, failed_now = super()._pop_done_transfers(alone)
            done |= done_now
            failed |= failed_now
            self._note_measurements(request_id, mark)
            if request_id in alone:
                transfers[request_id] = alone[request_id]
                continue
            del transfers[request_id]
            meta = self._recving_metadata.get(request_id)
            if meta is not None and self._is_expired(meta):
                # The read ended after the peer was free to overwrite the blocks: not provably valid.
                self.xfer_stats.record_kv_expired_req()
                failed.add(request_id)
        return done, failed

    def _note_measurements(self, request_id: str, mark: int) -> None:
        data = self.xfer_stats.data
        byte_count, descriptor_count, post_s, wire_s = self._pull_results.get(request_id, (0, 0, 0.0, 0.0))
        self._pull_results[request_id] = (
            byte_count + sum(data["bytes_transferred"][mark:]),
            descriptor_count + sum(data["num_descriptors"][mark:]),
            post_s + sum(data["post_duration"][mark:]),
            wire_s + sum(data["transfer_duration"][mark:]),
        )

    def get_transfer_results(self) -> KVConnectorTransferResults:
        block_counts = {r: sum(map(len, m.local_block_ids)) for r, m in self._recving_metadata.items()}
        results = super().get_transfer_results()
        results.finished_sending |= self._release_now()
        now = time.monotonic()
        for request_id in results.finished_recving:
            byte_count, descriptor_count, post_s, wire_s = self._pull_results.pop(request_id, (0, 0, 0.0, 0.0))
            self.xfer_stats.record_pull(
                PullRecord(
                    request_id=request_id,
                    is_ok=request_id not in results.failed_recving,
                    started_at=self._pull_started.pop(request_id, now),
                    in_place_at=now,
                    transfer_bytes=byte_count,
                    descriptor_count=descriptor_count,
                    post_s=post_s,
                    wire_s=wire_s,
                    block_count=block_counts.get(request_id, 0),
                )
            )
        return results


@contextmanager
def _agents_made_with(**overrides: Any) -> Iterator[None]:
    """vLLM fixes the agent's configuration in its constructor; this is the one place that changes it."""
    with _agent_config_lock:
        stock = base_worker.nixl_agent_config
        if stock is None:
            raise RuntimeError("NIXL is not installed: install the package `nixl`")
        base_worker.nixl_agent_config = functools.partial(stock, **overrides)
        try:
            yield
        finally:
            base_worker.nixl_agent_config = stock

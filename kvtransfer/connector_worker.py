"""The worker side of the KV connector: posts reads, watches them, holds and frees what peers read here.

Lives in the engine process and is called once per engine step. What vLLM's NIXL pull worker does stays its own; this
adds a release by name, a record per pull and the proof that what was pulled is what was held, and it undoes three
habits: a spinning progress thread and a stolen CPU affinity, which cost a small machine most of its compute, and
notices, for which a reader waits until the prefill engine has a moment.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta

from baton.leg import RecomputeReason
from kvtransfer.block_order import DescriptorIds, in_memory_order
from kvtransfer.connector_deadlines import PunctualWorker, naming_what_is_refused
from kvtransfer.connector_faults import faulty
from kvtransfer.connector_holds import HOLDS_ATTRIBUTE
from kvtransfer.connector_peers import Peers
from kvtransfer.connector_records import AgentMetadata, NixlRecordReader, RecordMemory, RecordReads
from kvtransfer.connector_telemetry import PullRecord, PullStats
from kvtransfer.digest import BlockMemory
from kvtransfer.hold_keeper import MAX_HOLD_COUNT, HoldKeeper
from kvtransfer.holds import Hold, HoldTable, PeerTable
from kvtransfer.huge_pages import use_huge_pages
from kvtransfer.pull_check import PullCheck

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

PROGRESS_THREAD_KEY = "baton_enable_progress_thread"
DIGESTS_KEY = "baton_enable_kv_digests"
FORGOTTEN_PEER_COUNT = 256

# vLLM makes and decodes the metadata of its handshake by this name; ours is the same with the hold table added.
base_worker.NixlAgentMetadata = AgentMetadata

logger = logging.getLogger(__name__)

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

    def make_prepped_xfer(
        self, operation: str, here: Any, local: Any, there: Any, remote: Any, notif_msg: bytes = b"", **named: Any
    ) -> Any:
        local, remote = in_memory_order(local, remote)
        return self._agent.make_prepped_xfer(operation, here, local, there, remote, **named)

    def send_notif(self, agent_name: str, notif_msg: bytes) -> None:
        """Does nothing, on purpose."""


class PullWorker(Peers, PunctualWorker):
    nixl_wrapper: Any
    keeper: HoldKeeper
    """From ``register_kv_caches`` on."""

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
        self._pull_holds: dict[str, Hold] = {}
        self._checks: dict[str, PullCheck] = {}
        # Requests whose blocks have arrived, since when; how long the proof took; and why there was none.
        self._arrived: dict[str, float] = {}
        self._verify_s: dict[str, float] = {}
        self._reasons: dict[str, RecomputeReason] = {}
        self._peer_tables: dict[str, PeerTable] = {}
        self._descriptor_ids = DescriptorIds()
        self._enable_digests = bool(transfer_config.get_from_extra_config(DIGESTS_KEY, False))
        self._block_memory: BlockMemory | None = None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        slot_count = min(self.num_blocks, MAX_HOLD_COUNT)  # each hold has a block that no other has
        group_count = len(self.kv_cache_config.transfer_groups)
        block_count = -(-self.model_config.max_model_len // self.block_size) * group_count
        storages = [cache.untyped_storage() for cache in kv_caches.values()]
        for address, storage in {storage.data_ptr(): storage for storage in storages}.items():
            if storage.device.type == "cpu":
                use_huge_pages(address, storage.nbytes())  # BEFORE it is registered, which may pin it
        # Before the stock part, which fixes what the agent tells peers about the memory they may read.
        with naming_what_is_refused("the memory of hold records"):
            self._records = RecordMemory(self.nixl_wrapper, slot_count=slot_count, max_block_count=block_count)
        self._record_reads = RecordReads(self.nixl_wrapper, self._records)
        table = HoldTable(self._records.table, slot_count=slot_count, max_block_count=block_count)
        super().register_kv_caches(kv_caches)
        if self._enable_digests:
            self._block_memory = self._as_buffers()
        self.keeper = HoldKeeper(table, self._block_memory)
        payload = self.xfer_handshake_metadata
        metadata = msgspec.msgpack.Decoder(AgentMetadata).decode(payload.agent_metadata_bytes)
        metadata.hold_table_address = self._records.table.ctypes.data
        metadata.hold_slot_count = slot_count
        metadata.hold_record_bytes = self._records.table.nbytes // slot_count
        payload.agent_metadata_bytes = msgspec.msgpack.Encoder().encode(metadata)

    def _as_buffers(self) -> BlockMemory:
        """The KV as buffers, its regions in the order in which a peer's are matched with them."""
        is_plain = (
            len(self.kv_cache_config.transfer_groups) == 1
            and set(self.region_mem_types) == {"DRAM"}
            and self._physical_blocks_per_logical_kv_block == 1
            and not self.use_host_buffer
            and not self._has_mamba
        )
        if not is_plain:
            raise RuntimeError(
                "digests need one group of plain KV blocks in main memory: set enable_kv_digests = false"
            )
        regions = []
        for index, base in enumerate(self.kv_caches_base_addr[self.engine_id][self.tp_rank]):
            storage = self.device_kv_caches[self.region_names[index]].untyped_storage()
            size = (self.num_blocks - 1) * self.block_stride_per_layer[index] + self.block_len_per_layer[index]
            flat = torch.empty(0, dtype=torch.uint8).set_(storage, base - storage.data_ptr(), (size,), (1,))
            regions.append(memoryview(flat.numpy()))  # keeps the storage alive
        return BlockMemory(regions, self.block_len_per_layer, self.block_stride_per_layer)

    def shutdown(self) -> None:
        if hasattr(self, "keeper"):
            self.keeper.close()  # first: nothing of ours may be believed once its memory goes
            for check in self._checks.values():
                check.close()
            self._checks.clear()
        super().shutdown()
        if hasattr(self, "_records"):
            self._records.close()

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
        holds = getattr(metadata, HOLDS_ATTRIBUTE, {})
        for request_id, meta in metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                self._pull_started[request_id] = now
                if request_id in holds:
                    self._pull_holds[request_id] = holds[request_id]
        super().start_load_kv(metadata)

    def add_remote_agent(self, nixl_agent_meta: AgentMetadata, *rest: Any, **named: Any) -> str:
        """In the handshake's own thread. A peer that keeps no hold records cannot be believed, so it is refused."""
        table = PeerTable(
            nixl_agent_meta.hold_table_address, nixl_agent_meta.hold_slot_count, nixl_agent_meta.hold_record_bytes
        )
        name: str = super().add_remote_agent(nixl_agent_meta, *rest, **named)
        # Of peers forgotten since. Not of the latest: a handshake of another thread may be about to become known.
        for engine_id in list(self._peer_tables)[:-FORGOTTEN_PEER_COUNT]:
            if engine_id not in self._remote_agents:
                del self._peer_tables[engine_id]
        self._peer_tables[nixl_agent_meta.engine_id] = table
        return name

    def _read_blocks(self, *args: Any, **named: Any) -> bool:
        request_id = named["request_id"]
        meta = self._recving_metadata.get(request_id)
        if meta is not None and any(meta.local_block_ids) and request_id not in self._checks:
            check = self._checks[request_id] = self._check_of(request_id, meta)
            if not check.begin():
                # Same path as a failed transfer: reported as received and failed, hence recomputed.
                self._note_reason(request_id, check)
                self._handle_failed_transfer(request_id, None, self._recv_failures, record_failed_transfer=False)
                return False
        return super()._read_blocks(*args, **named)

    def _compute_desc_ids(
        self, block_ids: Any, dst_num_blocks: int, block_size_ratio: float | None, **named: Any
    ) -> Any:
        """vLLM's, in the plain case by a shorter way: one group of blocks, of one size on both sides."""
        counts, groups = named.get("region_num_blocks"), named.get("region_group_ids")
        is_plain = (
            len(block_ids) == 1
            and block_size_ratio in (None, 1)
            and counts
            and groups
            and len(counts) == len(groups)
            and named.get("uses_region_group_mapping") is False
            and not self._transfer_layer_group_ids
            and not self._has_mamba
        )
        if not is_plain:
            return super()._compute_desc_ids(
                block_ids=block_ids, dst_num_blocks=dst_num_blocks, block_size_ratio=block_size_ratio, **named
            )
        assert counts is not None
        return self._descriptor_ids.of(counts, block_ids[0])

    def _check_of(self, request_id: str, meta: ReqMeta) -> PullCheck:
        assert meta.remote is not None
        engine_id = meta.remote.engine_id
        ((_, agent_name),) = self._remote_agents[engine_id].items()
        peer = self.transfer_topo.get_engine_info(engine_id)
        is_alike = peer.remote_block_size == self.block_size and peer.remote_physical_blocks_per_logical == 1
        return PullCheck(
            NixlRecordReader(self._record_reads, self._peer_tables[engine_id], agent_name),
            # A pull that names no hold proves nothing: no record has this nonce.
            self._pull_holds.get(request_id, Hold(0, 0)),
            block_count=sum(map(len, meta.remote.block_ids)),
            pulled_block_ids=[block_id for group in meta.local_block_ids for block_id in group],
            memory=self._block_memory if is_alike else None,
        )

    def _note_reason(self, request_id: str, check: PullCheck) -> None:
        assert check.reason is not None
        self._reasons[request_id] = check.reason
        if check.reason in (RecomputeReason.EXPIRED, RecomputeReason.STALE):
            self.xfer_stats.record_kv_expired_req()
        logger.warning("pull of %s is not used (%s): computed instead", request_id, check.reason.value)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """One request at a time, so that vLLM's measurements can be told apart by request; and done only when judged.

        A request stays in ``transfers`` until no read can write to its blocks any more, whatever became of it: only
        then is it reported, and only then does the scheduler compute into them.
        """
        done: set[str] = set()
        failed: set[str] = set()
        for request_id in list(transfers):
            if request_id not in self._arrived:
                mark = len(self.xfer_stats.data["bytes_transferred"])
                alone = {request_id: transfers[request_id]}
                _, failed_now = super()._pop_done_transfers(alone)
                failed |= failed_now
                self._note_measurements(request_id, mark)
                transfers[request_id] = alone.get(request_id, [])
                if transfers[request_id]:
                    continue
                self._arrived[request_id] = time.monotonic()
            is_valid = self._verdict(request_id, has_failed=request_id in failed or request_id in self._recv_failures)
            if is_valid is None:
                continue
            del transfers[request_id]
            done.add(request_id)
            if not is_valid:
                failed.add(request_id)
        return done, failed

    def _verdict(self, request_id: str, *, has_failed: bool) -> bool | None:
        """Whether what arrived may be used; None while that is not known."""
        check = self._checks.get(request_id)
        if has_failed or check is None:
            return not has_failed
        is_valid = check.step(time.monotonic())
        if is_valid is not None:
            self._verify_s[request_id] = time.monotonic() - self._arrived[request_id]
            if not is_valid:
                self._note_reason(request_id, check)
        return is_valid

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
        for request_id in results.finished_sending:
            # Released, expired or read by a stock peer: the scheduler frees the blocks when it is told so.
            self.keeper.let_go(request_id)
        now = time.monotonic()
        for request_id in results.finished_recving:
            is_ok = request_id not in results.failed_recving
            record = self._record_of(request_id, is_ok=is_ok, block_count=block_counts.get(request_id, 0), now=now)
            self.xfer_stats.record_pull(record)
        return results

    def _record_of(self, request_id: str, *, is_ok: bool, block_count: int, now: float) -> PullRecord:
        """What happened to a pull; everything else that was kept of it is forgotten here."""
        byte_count, descriptor_count, post_s, wire_s = self._pull_results.pop(request_id, (0, 0, 0.0, 0.0))
        reason = self._reasons.pop(request_id, RecomputeReason.FAILED)
        if self.was_taken_back(request_id):
            reason = RecomputeReason.TIMED_OUT
        self._pull_holds.pop(request_id, None)
        self._arrived.pop(request_id, None)
        if (check := self._checks.pop(request_id, None)) is not None:
            check.close()
        return PullRecord(
            request_id=request_id,
            is_ok=is_ok,
            started_at=self._pull_started.pop(request_id, now),
            in_place_at=now,
            transfer_bytes=byte_count,
            descriptor_count=descriptor_count,
            post_s=post_s,
            wire_s=wire_s,
            block_count=block_count,
            verify_s=self._verify_s.pop(request_id, 0.0),
            reason="" if is_ok else reason.value,
        )


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

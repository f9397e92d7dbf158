"""The layer between vLLM's pull worker and ours that lets no pull, and no error of the library, go on for ever.

Every pull has a deadline from the moment it is asked for, first contact included (``pull_deadlines.py`` decides what
may be done about a late one). Errors that the stock worker would let end the engine process are counted as what they
are: a notice not heard, a peer not yet forgotten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from kvtransfer.pull_deadlines import PULL_TIMEOUT_KEY, PullDeadlines

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

DEFAULT_PULL_TIMEOUT_S = 10.0


@contextmanager
def naming_what_is_refused(memory: str) -> Iterator[None]:
    """Around a registration: whoever reads the log of an engine that did not start finds which memory it was."""
    try:
        yield
    except Exception as error:
        logger.error(
            "the transfer library did not take %s (%s: %s): without it this engine could not exchange KV, so it does "
            "not start",
            memory,
            type(error).__name__,
            error,
        )
        raise


class PunctualWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """All of it runs in the engine's thread."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        transfer_config = vllm_config.kv_transfer_config
        timeout_s = float(transfer_config.get_from_extra_config(PULL_TIMEOUT_KEY, DEFAULT_PULL_TIMEOUT_S))
        self.deadlines = PullDeadlines(timeout_s)
        # The mutable state: pulls taken back and not yet reported, and peers whose first contact was too slow.
        self._taken_back: set[str] = set()
        self._late_peers: set[str] = set()

    def given_up(self, request_id: str) -> None:
        """A pull that cannot be taken back is late: its request must be ended from outside. For a subclass."""

    def was_taken_back(self, request_id: str) -> bool:
        """Whether this pull failed because it was late; asked once, when it is reported."""
        if request_id in self._taken_back:
            self._taken_back.discard(request_id)
            return True
        return False

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        with naming_what_is_refused("the KV memory"):
            super().register_kv_caches(kv_caches)

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        now = time.monotonic()
        for request_id, meta in metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                self.deadlines.begin(request_id, now)
        super().start_load_kv(metadata)

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        assert meta.remote is not None
        engine_id = meta.remote.engine_id
        if meta.awaiting_kvs and req_id not in self.deadlines:
            return  # its first contact came about after it had been taken back: its blocks are being computed
        if engine_id in self._late_peers:
            if engine_id not in self._remote_agents and engine_id in self._handshake_futures:
                # The next requests need not wait as long as the one that found out. Who awaits nothing is never
                # reported, so nothing may be noted of it: its caller left, or all of its prompt was cached here.
                if meta.awaiting_kvs:
                    self._take_back(req_id)
                return
            self._late_peers.discard(engine_id)
        super()._read_blocks_for_req(req_id, meta)

    def _read_blocks(self, *args: Any, **named: Any) -> bool:
        self.deadlines.posted(named["request_id"])
        return bool(super()._read_blocks(*args, **named))

    def _take_back(self, request_id: str) -> None:
        self.deadlines.ended(request_id)
        self._taken_back.add(request_id)
        self._handle_failed_transfer(request_id, None, self._recv_failures, record_failed_transfer=False)

    def caller_left(self, request_id: str) -> None:
        """Its blocks need not wait for a first contact that hangs: the next step reports it and frees them. When the
        contact comes about after all, the pull is not known any more and nothing is read."""
        if self.deadlines.withdraw(request_id):
            self._handle_failed_transfer(request_id, None, self._recv_failures, record_failed_transfer=False)

    def get_transfer_results(self) -> KVConnectorTransferResults:
        late = self.deadlines.late(time.monotonic())
        for request_id in late.taken_back:
            logger.warning("pull of %s not begun within %g s: computed instead", request_id, self.deadlines.timeout_s)
            if (meta := self._recving_metadata.get(request_id)) is not None and meta.remote is not None:
                self._late_peers.add(meta.remote.engine_id)
            self._take_back(request_id)
        for request_id in late.given_up:
            logger.error(
                "pull of %s not over within %g s: given up; its blocks stay in quarantine until it is",
                request_id,
                self.deadlines.timeout_s,
            )
            self.given_up(request_id)
        results = super().get_transfer_results()
        for request_id in results.finished_recving:
            self.deadlines.ended(request_id)
        return results

    def _get_new_notifs(self) -> set[str]:
        try:
            return set(super()._get_new_notifs())
        except Exception as error:
            # What it would have said is not needed (see ``SilentAgent``); the engine is.
            logger.warning("notices could not be read: %s", type(error).__name__)
            return set()

    def _cleanup_remote_engine(self, engine_id: str, *, log_eviction: bool = True) -> None:
        try:
            super()._cleanup_remote_engine(engine_id, log_eviction=log_eviction)
        except Exception as error:
            logger.warning("peer %s is not forgotten yet: %s", engine_id, type(error).__name__)

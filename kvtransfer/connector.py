"""Baton's KV connector: vLLM's NIXL pull connector with a first token that travels outside the KV.

vLLM loads the class by module path and makes one instance per side in the engine process. The class must be
called ``NixlConnector``: vLLM compares connector names in several places. Parameters of a pull are checked
before they get here (``kvtransfer/ticket.py``): a malformed one would end the engine process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector

from kvtransfer.connector_holds import HoldingScheduler, guard_frees
from kvtransfer.connector_parent import become_engine_process
from kvtransfer.connector_telemetry import PullStats
from kvtransfer.connector_worker import PullWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

CONNECTOR = "NixlConnector"
CONNECTOR_MODULE = "kvtransfer.connector"

_scheduler_side: NixlConnector | None = None


class NixlConnector(NixlPullConnector):  # type: ignore[misc]
    block_pool: BlockPool
    """Scheduler side only: who owns which block."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        become_engine_process()
        # Not the direct parent's constructor: that one would make the stock sides.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            global _scheduler_side
            # The worker side is there first, in this process: the executor sees to both.
            self._keeper = get_kv_transfer_group().connector_worker.keeper
            self.connector_scheduler = HoldingScheduler(vllm_config, self.engine_id, kv_cache_config, self._keeper)
            _scheduler_side = self
        else:
            self.connector_worker = PullWorker(vllm_config, self.engine_id, kv_cache_config)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        guard_frees(kv_cache_manager, self._keeper)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self.block_pool = gpu_block_pool

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PullStats:
        return PullStats(data=data) if data is not None else PullStats()


def scheduler_side() -> NixlConnector:
    """The instance that the engine's scheduler uses; there is one engine per process."""
    assert _scheduler_side is not None, "asked before the engine's scheduler exists"
    return _scheduler_side

"""The scheduler side of hold records: every held prefill has one before its ticket exists, and none outlives it.

Scheduler and worker of an engine are objects of one process and are called by one thread: both use the same keeper.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.request import Request

from kvtransfer.connector_scheduler import PullScheduler
from kvtransfer.hold_keeper import HoldKeeper
from kvtransfer.holds import Hold

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

HOLDS_ATTRIBUTE = "baton_holds"
"""On a step's metadata: the hold each pull rests on, by request id. vLLM's own copy of the parameters drops it."""
SLOT_PARAM = "hold_slot"
NONCE_PARAM = "hold_nonce"


class HoldingScheduler(PullScheduler):
    def __init__(
        self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig, keeper: HoldKeeper
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._keeper = keeper

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        get_kv_transfer_group().connector_worker.caller_left(request.request_id)  # only if it was still to be pulled
        is_held, peer_params = super().request_finished(request, block_ids)
        if not is_held or peer_params is None:
            return is_held, peer_params
        # The step that computed the last block is over, and nothing writes to a finished request's blocks.
        hold = self._keeper.hold(
            request.request_id, [block_id for group in peer_params["remote_block_ids"] for block_id in group]
        )
        if hold is None:
            # A ticket without a record could not be believed: the prefill is answered with an error instead.
            logger.warning("no hold record is free (%r): a prefill is not held", self._keeper)
            self._reqs_need_send.pop(request.request_id, None)
            self._reqs_not_processed.add(request.request_id)
            return False, None
        return True, {**peer_params, SLOT_PARAM: hold.slot, NONCE_PARAM: hold.nonce}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        holds = {}
        for request_id, (request, *_) in self._reqs_need_recv.items():
            params = request.kv_transfer_params or {}
            if SLOT_PARAM in params and NONCE_PARAM in params:
                holds[request_id] = Hold(params[SLOT_PARAM], params[NONCE_PARAM])
        metadata = super().build_connector_meta(scheduler_output)
        setattr(metadata, HOLDS_ATTRIBUTE, holds)
        return metadata


def guard_frees(manager: KVCacheManager, keeper: HoldKeeper) -> None:
    """Ends a request's hold wherever its blocks go free, whatever freed them.

    The worker side ends holds itself, on release, expiry and shutdown; these two methods are all that a way unknown
    to us, of this vLLM or a later one, would have to come through.
    """
    for name in ("free", "pop_blocks_for_free"):
        freeing = getattr(manager, name)

        def revoke_and_free(request: Request, *args: Any, freeing: Any = freeing, **named: Any) -> Any:
            if keeper.let_go(request.request_id):
                logger.error("blocks of %s went free by a way that did not end its hold", request.request_id)
            return freeing(request, *args, **named)

        setattr(manager, name, revoke_and_free)

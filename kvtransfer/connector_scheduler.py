"""The scheduler side of the KV connector: how much of a prompt a peer's KV covers, and what a prefill leaves.

Lives in the engine process. Decides counts and block lists; moves no bytes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

SIDE_CHANNEL_HOST_KEY = "baton_side_channel_host"
SIDE_CHANNEL_PORT_KEY = "baton_side_channel_port"
LEASE_PARAM = "baton_lease_s"
"""In the prefill's own parameters: how long the engine keeps the KV if nobody says anything."""


class PullScheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        # From the configuration, not the environment, which engines of one process would share.
        settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.side_channel_host: str = settings[SIDE_CHANNEL_HOST_KEY]
        self.side_channel_port: int = settings[SIDE_CHANNEL_PORT_KEY]

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """The peer's KV covers the prefilled prompt; the request's prompt is that plus the first token.

        vLLM would claim KV for every prompt token, the first token's included, which the peer never computed:
        a wrong token, or an assertion that ends the engine where the prompt fills its last block exactly.
        """
        params = request.kv_transfer_params
        if params is None or not params.get("do_remote_prefill"):
            return 0, False
        covered = min(int(params["remote_num_tokens"]), request.num_tokens - 1)
        missing = covered - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return super().request_finished(request, block_ids)  # type: ignore[no-any-return]
        if request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            # The first token ended the answer, or the prefill was aborted: no peer will come for the KV.
            self._reqs_not_processed.add(request.request_id)
            self._reqs_need_save.pop(request.request_id, None)
            return False, None
        is_held, peer_params = super().request_finished(request, block_ids)
        if not is_held or peer_params is None:
            return is_held, peer_params
        lease_s = max(float(params.get(LEASE_PARAM, 0.0)), float(self._kv_lease_duration))
        expires_at = time.perf_counter() + lease_s
        self._reqs_need_send[request.request_id] = expires_at
        # With overlapping steps vLLM counts one token more than the prompt; the KV that is certain is the prompt's.
        prompt_token_count = request.num_prompt_tokens
        block_count = cdiv(prompt_token_count, self.block_size)
        if len(peer_params["remote_block_ids"]) == 1:
            peer_params["remote_block_ids"] = tuple(g[:block_count] for g in peer_params["remote_block_ids"])
        peer_params["remote_num_tokens"] = prompt_token_count
        peer_params["remote_blocks_expiry_time"] = expires_at
        return True, peer_params

"""The scheduler side of the KV connector: how much of a prompt a peer's KV covers, and what a prefill leaves.

Lives in the engine process. Decides counts and block lists; moves no bytes.

A request that goes on with an answer begun elsewhere gets the tokens emitted so far as its *output* as soon as it
arrives, so that lengths, penalties, seeds and structure are what they would be in the engine that began. The model
runner's half of this is in ``kvtransfer/connector_runner.py``. Nothing here may raise: it would end the engine.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.utils.math_utils import cdiv
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request, RequestStatus

from kvtransfer.emitted_tokens import STRUCTURE_FAILED, emitted_token_ids

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

SIDE_CHANNEL_HOST_KEY = "baton_side_channel_host"
SIDE_CHANNEL_PORT_KEY = "baton_side_channel_port"
_LOGGERS_THAT_QUOTE = (
    "vllm.v1.structured_output",
    "vllm.v1.structured_output.backend_guidance",
    "vllm.v1.core.sched.scheduler",
)
"""They write the schemas and tokens of a request that failed; that it failed is its caller's to hear."""
LEASE_PARAM = "baton_lease_s"
"""In the prefill's own parameters: how long the engine keeps the KV if nobody says anything."""


class PullScheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        for name in _LOGGERS_THAT_QUOTE:
            logging.getLogger(name).addFilter(_is_without_structure)
        # From the configuration, not the environment, which engines of one process would share.
        settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.side_channel_host: str = settings[SIDE_CHANNEL_HOST_KEY]
        self.side_channel_port: int = settings[SIDE_CHANNEL_PORT_KEY]
        # Requests that began with output, by id: how many tokens of it, and whether their grammar has seen them.
        self._emitted_counts: dict[str, int] = {}
        self._grammar_is_behind: set[str] = set()
        self.answers_pulls_only = False
        """While set, a request that has nothing to pull is told to ask later (``connector_steps.py``)."""

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        """In place of vLLM's listener, which answers anybody. Ours is the worker side's, in this same process."""
        get_kv_transfer_group().connector_worker.open_side_channel()

    def on_new_request(self, request: Request) -> None:
        """Called once, when the request joins the queue and before anything looks at its length."""
        super().on_new_request(request)
        emitted = [] if request.sampling_params is None else emitted_token_ids(request.sampling_params.extra_args)
        if not emitted:
            return
        request.append_output_token_ids(emitted)
        self._emitted_counts[request.request_id] = len(emitted)
        if request.use_structured_output:
            self._grammar_is_behind.add(request.request_id)
        # The scheduler asserts that no more is cached than the prompt, which a warm cache breaks here.
        request.prefill_stats = _StatsOfAContinuation()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The peer's KV covers what was prefilled; the request has that and one token more.

        Called for every request, and again for one that had no room or whose pull failed. Its grammar is compiled by
        then, and no token of it has been sampled.

        vLLM would claim KV for every prompt token, the first token's included, which the peer never computed:
        a wrong token, or an assertion that ends the engine where the prompt fills its last block exactly.
        """
        if not self._grammar_caught_up(request):
            return None, False
        params = request.kv_transfer_params
        missing = 0
        if params is not None and params.get("do_remote_prefill"):
            covered = min(int(params["remote_num_tokens"]), request.num_tokens - 1)
            missing = max(0, covered - num_computed_tokens)
        if self.answers_pulls_only and not missing:
            return None, False
        if isinstance(request.prefill_stats, _StatsOfAContinuation):
            request.prefill_stats.set(request.num_tokens, num_computed_tokens, missing)
        return missing, missing > 0

    def _grammar_caught_up(self, request: Request) -> bool:
        """The grammar sees the tokens emitted so far exactly once. False: they do not match it, and the request is
        failed, alone, as one whose grammar did not compile."""
        if request.request_id not in self._grammar_is_behind:
            return True
        self._grammar_is_behind.discard(request.request_id)
        structured = request.structured_output_request
        # One by one, as they were drawn: what comes after an end is not the grammar's.
        if all(structured.grammar.accept_tokens(request.request_id, [each]) for each in request.output_token_ids):
            return True
        structured._grammar = ValueError("the emitted tokens do not match the grammar")
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        return False

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        emitted_count = self._emitted_counts.pop(request.request_id, 0)
        self._grammar_is_behind.discard(request.request_id)
        told = {STRUCTURE_FAILED: True} if _has_lost_its_structure(request) else None
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            is_kept, _ = super().request_finished(request, block_ids)
            return is_kept, told
        if request.status != RequestStatus.FINISHED_LENGTH_CAPPED or told is not None:
            # The first token ended the answer, or the prefill was aborted: no peer will come for the KV.
            self._reqs_not_processed.add(request.request_id)
            self._reqs_need_save.pop(request.request_id, None)
            return False, told
        is_held, peer_params = super().request_finished(request, block_ids)
        if not is_held or peer_params is None:
            return is_held, peer_params
        lease_s = float(params.get(LEASE_PARAM) or self._kv_lease_duration)
        self._reqs_need_send[request.request_id] = time.perf_counter() + lease_s
        # With overlapping steps vLLM counts one token more; the KV that is certain is what the request came with.
        token_count = request.num_prompt_tokens + emitted_count
        block_count = cdiv(token_count, self.block_size)
        if len(peer_params["remote_block_ids"]) == 1:
            peer_params["remote_block_ids"] = tuple(g[:block_count] for g in peer_params["remote_block_ids"])
        peer_params["remote_num_tokens"] = token_count
        return True, peer_params


def _has_lost_its_structure(request: Request) -> bool:
    """The grammar's limits on its own work were reached. It then lets an answer end anywhere, as if it were whole."""
    if request.structured_output_request is None:
        return False
    matcher = getattr(request.structured_output_request.grammar, "ll_matcher", None)
    return matcher is not None and bool(matcher.get_error())


def _is_without_structure(record: logging.LogRecord) -> bool:
    return not any(word in record.msg for word in ("grammar", "LLMatcher")) if isinstance(record.msg, str) else True


class _StatsOfAContinuation(PrefillStats):  # type: ignore[misc]
    """False, and so passed over by the scheduler, which would count the prompt alone; filled in by the connector."""

    def __bool__(self) -> bool:
        return False

"""vLLM's scheduler with a first part of each step that only pulls. Owns no state between steps.

vLLM posts a read after the forward pass of the step that gave the request its blocks, and computes the request in
the step after: a request whose KV is there in a millisecond waits for a step of all the others. Here a step with
pulls to begin runs vLLM's scheduling twice. The first pass sees nothing but those pulls, so it only gives them
blocks and parks them. They are handed to the worker side at once, which on a CPU has them in place and judged when it
returns. The second pass is the ordinary one and finds them as it finds any request whose KV has arrived.

A read that is not over by then (first contact, TCP, digests still to come, a hang) is left to the ordinary steps,
exactly as vLLM would: parked, polled, never computed into while it may still write.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from kvtransfer.connector import NixlConnector
from kvtransfer.early_pulls import EarlyPulls, Waiting, early_pulls

SCHEDULER = "kvtransfer.connector_steps.PullFirstScheduler"
BEFORE_EVERY_TURN = -2
"""As the number of the last step: in the next one, the turn of no running request has come."""

logger = logging.getLogger(__name__)


class PullFirstScheduler(Scheduler):  # type: ignore[misc]
    # vLLM's, which we set aside for a pass.
    waiting: RequestQueue
    kv_holding_waiting: RequestQueue
    deferred_waiting: set[Request]
    finished_req_ids: set[str]
    reset_preempted_req_ids: set[str]
    prev_step_scheduled_req_ids: set[str]

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._reserved_block_count = 0
        self._worker_side: Any = None
        if (obstacle := _obstacle(self)) is None:
            self._worker_side = get_kv_transfer_group()
        else:
            logger.warning("pulls begin after the forward pass, as vLLM has it: %s", obstacle)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._worker_side is not None and self.waiting and self._pause_state == PauseState.UNPAUSED:
            pulls = self._early_pulls()
            if pulls.request_ids:
                self._pull(self._begin(pulls))
        return super().schedule(throttle_prefills)

    def _early_pulls(self) -> EarlyPulls:
        taken = len(self.running) + self.num_waiting_for_streaming_input + len(self.kv_holding_waiting)
        place_count = self.max_num_active_reqs - taken
        if place_count <= 0 or not any(map(_is_pull, self.waiting)):
            return EarlyPulls()
        group_count = len(self.kv_cache_config.kv_cache_groups)
        waiting = (
            Waiting(each.request_id, _is_pull(each), cdiv(each.num_tokens, self.block_size) * group_count)
            for each in self.waiting
        )
        return early_pulls(
            waiting,
            place_count=place_count,
            free_block_count=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            running_block_count=len(self.running) * group_count,  # a step of decode starts at most one in each
        )

    def _begin(self, pulls: EarlyPulls) -> SchedulerOutput:
        """vLLM's own pass over these requests alone. Gives out blocks; schedules nothing."""
        with self._alone(set(pulls.request_ids)):
            self._reserved_block_count = pulls.reserved_block_count
            try:
                output = super().schedule()
            finally:
                self._reserved_block_count = 0
        assert not output.num_scheduled_tokens, "a pass for pulls alone scheduled tokens"
        return output

    def _inflight_prefill_reserved_blocks(self) -> int:
        return int(super()._inflight_prefill_reserved_blocks()) + self._reserved_block_count

    @contextmanager
    def _alone(self, request_ids: set[str]) -> Iterator[None]:
        """While it lasts, the scheduler sees no waiting request but these, and of the running ones their number.

        What a pass says once (requests finished or preempted since the last one) is kept from this pass, for the
        worker learns it from the next; what a pass remembers of itself is as if this one had not been.
        """
        in_order, holding, deferred = list(self.waiting), self.kv_holding_waiting, set(self.deferred_waiting)
        kept = {name: getattr(self, name) for name in _OF_THE_ORDINARY_PASS}
        finished, preempted = self.finished_req_ids, self.reset_preempted_req_ids
        matcher = self.connector.connector_scheduler
        self.waiting = create_request_queue(self.policy)
        for each in in_order:
            if each.request_id in request_ids:
                self.waiting.add_request(each)
        self.kv_holding_waiting = create_request_queue(self.policy)
        self.current_step = BEFORE_EVERY_TURN
        self.prev_step_scheduled_req_ids = set()
        self.finished_req_ids, self.reset_preempted_req_ids = set(), set()
        matcher.answers_pulls_only = True
        try:
            yield
        finally:
            matcher.answers_pulls_only = False
            begun = dict.fromkeys(self.kv_holding_waiting)
            self.waiting, self.kv_holding_waiting = create_request_queue(self.policy), holding
            for each in in_order:
                if each not in begun:
                    self.waiting.add_request(each)
            holding.prepend_requests(reversed(begun))
            self.deferred_waiting = deferred.union(begun)
            self.finished_req_ids, self.reset_preempted_req_ids = finished, preempted
            for name, value in kept.items():
                setattr(self, name, value)

    def _pull(self, output: SchedulerOutput) -> None:
        """What a step's end does about transfers, in its order. Measurements stay with the worker side and go out
        with the ordinary step's."""
        worker_side = self._worker_side
        worker_side.bind_connector_metadata(output.kv_connector_metadata)
        try:
            worker_side.start_load_kv(None)
            results = worker_side.get_transfer_results(output.finished_req_ids)
            invalid_block_ids = worker_side.get_block_ids_with_load_errors()
        finally:
            worker_side.clear_connector_metadata()
        if results.failed_recving:
            self._handle_failed_recving(results.failed_recving)
        if invalid_block_ids:
            self._handle_invalid_blocks(invalid_block_ids, {})
        self._update_from_kv_xfer_finished(
            KVConnectorOutput(finished_sending=results.finished_sending, finished_recving=results.finished_recving)
        )


_OF_THE_ORDINARY_PASS = ("current_step", "prev_step_scheduled_req_ids", "prefill_capacity_bound")


def _is_pull(request: Request) -> bool:
    """A pull that has not begun. Not one that may not use what is cached: vLLM would compute it."""
    params = request.kv_transfer_params
    return bool(
        params
        and params.get("do_remote_prefill")
        and request.num_computed_tokens == 0
        and request.status != RequestStatus.WAITING_FOR_STREAMING_REQ
        and not request.skip_reading_prefix_cache
    )


def _obstacle(scheduler: Scheduler) -> str | None:
    """Why this engine's pulls must begin where vLLM has them begin; None: they need not."""
    config = scheduler.vllm_config
    if not isinstance(scheduler.connector, NixlConnector):
        return "there is no connector of Baton's"
    if not has_kv_transfer_group() or not isinstance(get_kv_transfer_group(), NixlConnector):
        return "the worker side is in another process"
    if config.device_config.device_type != "cpu":
        return "the KV is in a device's memory, where reads are not over at once"
    if config.max_concurrent_batches > 1:
        return "steps overlap"
    if scheduler.parallel_config.data_parallel_size > 1:
        return "steps are balanced between engines"
    # What a pass gives out beside blocks and tokens would have to be carried to the next one.
    extras = (
        scheduler.has_mamba_layers,
        scheduler.needs_kv_cache_zeroing,
        scheduler.max_num_encoder_input_tokens,
        scheduler.num_spec_tokens,
        scheduler.lora_config,
        scheduler.aux_output_connector,
        scheduler.ec_connector,
        scheduler.hash_block_size != scheduler.block_size,
        not scheduler.recompute_kv_load_failures,
    )
    return "the model or its configuration needs more than blocks of KV" if any(extras) else None

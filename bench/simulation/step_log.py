"""Baton's scheduler, noting of each engine step what it computed and when. For calibration and for observation.

Named in an engine's ``extra_args.scheduler_cls``, so that it runs in the real worker's engine process. A JSON line a
step to the file named in the environment; a few microseconds each. Which line belongs to which engine, its id says.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bench.simulation.steps import STEP_LOG_VARIABLE
from kvtransfer.connector_steps import PullFirstScheduler


class _Ordinary(Scheduler):  # type: ignore[misc]
    """The pass that computes; of the two of a step with pulls the second."""

    began_at = 0.0
    cpu_at_s = 0.0

    def schedule(self, *args: Any, **named: Any) -> Any:
        self.began_at, self.cpu_at_s = time.monotonic(), time.process_time()
        return super().schedule(*args, **named)


class LoggedScheduler(PullFirstScheduler, _Ordinary):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._log = os.open(os.environ[STEP_LOG_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._engine_id = self.vllm_config.kv_transfer_config.engine_id
        self._added_at: dict[str, float] = {}
        self._line: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        self._added_at[request.request_id] = time.monotonic()
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        entered_at = time.monotonic()
        output = super().schedule(throttle_prefills)
        if output.total_num_scheduled_tokens:
            self._line = {
                "engine_id": self._engine_id,
                "entered_at": round(entered_at, 6),
                "began_at": round(self.began_at, 6),
                "requests": [self._part(each, count) for each, count in output.num_scheduled_tokens.items()],
            }
        for request_id in output.finished_req_ids:
            self._added_at.pop(request_id, None)  # ended before it was ever scheduled
        return output

    def _part(self, request_id: str, new_token_count: int) -> list[Any]:
        """Id, new tokens, tokens before them, whether it has a token of this step, when it was queued (once)."""
        request = self.requests[request_id]
        computed = request.num_computed_tokens  # of this step, too, by now
        added_at = self._added_at.pop(request_id, None)
        return [
            request_id,
            new_token_count,
            computed - new_token_count,
            computed >= request.num_tokens,
            None if added_at is None else round(added_at, 6),
        ]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = super().update_from_output(scheduler_output, model_runner_output)
        if scheduler_output.total_num_scheduled_tokens:
            used_s = time.process_time() - self.cpu_at_s
            line = {**self._line, "ended_at": round(time.monotonic(), 6), "cpu_s": round(used_s, 6)}
            os.write(self._log, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        return result

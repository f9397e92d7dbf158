"""Schedulers that note when each engine step that computed something began and ended. For benchmarks.

The one place where Baton's engines and stock vLLM's can be read by the same clock: both take a scheduler by name
(``extra_args.scheduler_cls``, ``--scheduler-cls``). Appends a JSON line a step to the file named in the environment.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bench.cores import CLOCK_VARIABLE


class ClockedScheduler(Scheduler):  # type: ignore[misc]
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        path = os.environ[CLOCK_VARIABLE]
        self._clock = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._began_at = 0.0

    def schedule(self, *args: Any, **named: Any) -> Any:
        began_at = time.monotonic()
        output = super().schedule(*args, **named)
        self._began_at = began_at
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = super().update_from_output(scheduler_output, model_runner_output)
        if scheduler_output.total_num_scheduled_tokens:
            step = {
                "pid": os.getpid(),
                "began_at": round(self._began_at, 6),
                "ended_at": round(time.monotonic(), 6),
                "token_count": scheduler_output.total_num_scheduled_tokens,
            }
            os.write(self._clock, json.dumps(step).encode() + b"\n")
        return result

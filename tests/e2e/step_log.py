"""Baton's scheduler with a line for every step: what was computed in it, what waited. For tests of real engines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtransfer.connector_steps import PullFirstScheduler

LOG_VARIABLE = "BATON_TEST_STEP_LOG"
"""The file; engine processes inherit it."""
LOGGED_SCHEDULER = "step_log.LoggedScheduler"


@dataclass(frozen=True, slots=True)
class Step:
    token_counts: dict[str, int]
    """Computed, by vLLM's internal request id."""
    waiting: tuple[str, ...]
    """Not computed: internal request ids."""


class LoggedScheduler(PullFirstScheduler):
    def schedule(self, *args: Any, **named: Any) -> Any:
        output = super().schedule(*args, **named)
        waiting = [each.request_id for queue in (self.waiting, self.kv_holding_waiting) for each in queue]
        line = {"pid": os.getpid(), "token_counts": output.num_scheduled_tokens, "waiting": waiting}
        with Path(os.environ[LOG_VARIABLE]).open("a") as log:
            log.write(json.dumps(line) + "\n")
        return output


def steps_of(log: Path, process_id: int) -> list[Step]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [Step(each["token_counts"], tuple(each["waiting"])) for each in lines if each["pid"] == process_id]

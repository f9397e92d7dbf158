"""The step clock for Baton's own scheduler. Not in ``step_clock.py``: what peers load must import none of ours."""

from __future__ import annotations

from bench.step_clock import ClockedScheduler
from kvtransfer.connector_steps import PullFirstScheduler


class ClockedPullFirst(PullFirstScheduler, ClockedScheduler):
    """The clock is the inner one: a step begins once its pulls are over, so that they count as handoff."""

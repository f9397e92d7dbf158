"""What the engine process says about itself, received in the worker process. Keeps the latest; computes nothing.

vLLM sends its scheduler's statistics with every step's output, and the pull records inside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from kvtransfer.connector_telemetry import PullRecord, given_up_pulls, pull_records
from kvtransfer.connector_worker import external_id


class Reports:
    """The engine's last word on its load, and the pulls that somebody waits for."""

    def __init__(self) -> None:
        self.running_count = 0
        self.waiting_count = 0
        self.kv_usage = 0.0
        """Share of the blocks in use, 0 to 1."""
        self._pulls: dict[str, PullRecord | None] = {}
        self._on_given_up: dict[str, Callable[[], None]] = {}
        self._quarantined: set[str] = set()

    def attach(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """The factory vLLM asks for."""
        return _Logger(self)

    @property
    def quarantined_pull_count(self) -> int:
        """Pulls given up that may still write to their blocks, which nobody else gets meanwhile."""
        return len(self._quarantined)

    def expect_pull(self, request_id: str, on_given_up: Callable[[], None] = lambda: None) -> None:
        """Keep the record of this request, by its external id, until it is taken. ``on_given_up`` is called if the
        pull is late and cannot be taken back: nothing will come of the request, so end it."""
        self._pulls[request_id] = None
        self._on_given_up[request_id] = on_given_up

    def take_pull(self, request_id: str) -> PullRecord | None:
        """The record, if there was a pull. It is here when the first token reaches who asked: of one message, vLLM's
        client deals with tokens and statistics before anybody else has a turn."""
        self._on_given_up.pop(request_id, None)
        return self._pulls.pop(request_id, None)

    def note(self, scheduler_stats: Any) -> None:
        self.running_count = scheduler_stats.num_running_reqs
        self.waiting_count = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.kv_usage = scheduler_stats.kv_cache_usage
        for internal_id in given_up_pulls(scheduler_stats.kv_connector_stats):
            self._quarantined.add(internal_id)
            if (on_given_up := self._on_given_up.pop(external_id(internal_id), None)) is not None:
                on_given_up()
        for record in pull_records(scheduler_stats.kv_connector_stats):
            self._quarantined.discard(record.request_id)
            request_id = external_id(record.request_id)
            if request_id in self._pulls:
                self._pulls[request_id] = record


class _Logger(StatLoggerBase):  # type: ignore[misc]
    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **named: Any) -> None:
        if scheduler_stats is not None:
            self._reports.note(scheduler_stats)

    def log_engine_initialized(self) -> None:
        pass

"""Records of requests for tests of results: made by hand, or of a simulated queue."""

from __future__ import annotations

import random
from typing import Any

from bench.results.records import Outcome, RequestRecord


def record(
    index: int = 0,
    *,
    at_s: float = 0.0,
    ttft_s: float = 0.1,
    gaps_s: tuple[float, ...] = (0.02, 0.02),
    outcome: Outcome = Outcome.OK,
    **more: Any,
) -> RequestRecord:
    """A request with one token a message; its gaps follow its first token."""
    message_at_s = [round(at_s + ttft_s + sum(gaps_s[:count]), 6) for count in range(len(gaps_s) + 1)]
    values: dict[str, Any] = {
        "group": "all",
        "session_id": "",
        "prompt_token_count": 100,
        "output_token_limit": len(message_at_s),
        "intended_at_s": at_s,
        "sent_at_s": at_s,
        "message_at_s": message_at_s,
        "message_token_counts": [1] * len(message_at_s),
        "ended_at_s": message_at_s[-1],
    }
    return RequestRecord(index=index, outcome=outcome, **(values | more))


def failed(index: int = 0, *, at_s: float = 0.0, outcome: Outcome = Outcome.ERROR, **more: Any) -> RequestRecord:
    """A request that gave no token."""
    ended: dict[str, Any] = {"message_at_s": [], "message_token_counts": [], "ended_at_s": at_s + 0.01, "error": "no"}
    return record(index, at_s=at_s, outcome=outcome, **(ended | more))


def queue(
    seed: int,
    *,
    load: float,
    service_s: float = 0.2,
    duration_s: float = 60.0,
    cold_s: float = 0.0,
    cold_factor: float = 5.0,
    gaps_s: tuple[float, ...] = (0.02, 0.02),
) -> list[RequestRecord]:
    """An M/M/1 queue: Poisson arrivals at ``load`` / ``service_s``, exponential times to first token of mean
    ``service_s``, one at a time in order; for arrivals before ``cold_s`` they take ``cold_factor`` as long."""
    rng = random.Random(seed)
    found: list[RequestRecord] = []
    at_s = free_s = 0.0
    while (at_s := at_s + rng.expovariate(load / service_s)) <= duration_s:
        takes_s = rng.expovariate(1 / service_s) * (cold_factor if at_s < cold_s else 1.0)
        free_s = max(at_s, free_s) + takes_s
        found.append(record(len(found), at_s=at_s, ttft_s=free_s - at_s, gaps_s=gaps_s))
    return found

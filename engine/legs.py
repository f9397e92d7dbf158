"""The legs a worker has in hand: bounded, countable, drainable. And what a leg's order must be before an engine
sees it: an engine that is handed nonsense may die and take every other request with it.

Owns counts, not work: entering and leaving is all it knows. Never computes and never queues; what does not fit
is refused, because waiting is the router's business.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from baton.errors import FieldViolation, draining, invalid_request, prompt_too_long, queue_full
from baton.request import EngineStop, Sampling
from engine.protocol import EngineInfo

MAX_STOP_TOKEN_COUNT = 1024
MAX_TEMPERATURE = 100.0
RETRY_AFTER_S = 0.25

_LEG_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_MAX_SEED = (1 << 63) - 1


class Legs:
    """Counts the legs in hand and says when there are none. One per worker object, used on one loop."""

    def __init__(self, max_count: int, on_change: Callable[[], None]) -> None:
        if max_count < 1:
            raise ValueError(f"max_leg_count is {max_count}; a worker needs room for at least 1")
        self.max_count = max_count
        self.is_draining = False
        self._on_change = on_change
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        return self._count

    @contextmanager
    def entered(self) -> Iterator[None]:
        """One leg, in hand while the block runs. Raises DRAINING, or QUEUE_FULL when there is no room."""
        if self.is_draining:
            raise draining()
        if self._count >= self.max_count:
            raise queue_full(self._count, self.max_count, RETRY_AFTER_S)
        self._count += 1
        self._idle.clear()
        self._on_change()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()
            self._on_change()

    def close_door(self) -> None:
        """Takes no more legs. Those in hand go on."""
        if not self.is_draining:
            self.is_draining = True
            self._on_change()

    async def wait_idle(self) -> None:
        await self._idle.wait()


def check_order(
    leg_id: str,
    prompt_token_ids: tuple[int, ...],
    sampling: Sampling,
    stop: EngineStop,
    info: EngineInfo,
    more: list[FieldViolation] | None = None,
) -> None:
    """Raises INVALID_REQUEST with every broken rule, and those in ``more``, or PROMPT_TOO_LONG."""
    context = info.max_context_token_count
    if len(prompt_token_ids) > context - 1:
        raise prompt_too_long(len(prompt_token_ids), context - 1)
    violations = list(more or ())
    if not _LEG_ID.fullmatch(leg_id):
        violations.append(FieldViolation("leg_id", "must be 1 to 128 letters, digits or any of _ . : / -"))
    if not prompt_token_ids:
        violations.append(FieldViolation("prompt_token_ids", "is empty"))
    elif min(prompt_token_ids) < 0 or max(prompt_token_ids) >= info.vocab_size:
        violations.append(FieldViolation("prompt_token_ids", f"has an id not within 0 to {info.vocab_size - 1}"))
    violations += _sampling_violations(sampling)
    violations += _stop_violations(stop, len(prompt_token_ids), info)
    if violations:
        raise invalid_request(violations)


def _sampling_violations(sampling: Sampling) -> Iterator[FieldViolation]:
    # Written as "not (within)", so that NaN is refused.
    if not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        yield FieldViolation("sampling.temperature", f"must be within 0 to {MAX_TEMPERATURE:g}")
    if not 0 < sampling.top_p <= 1:
        yield FieldViolation("sampling.top_p", "must be above 0 and at most 1")
    if sampling.top_k < 0:
        yield FieldViolation("sampling.top_k", "must not be negative; 0 keeps all")
    if not 0 <= sampling.min_p <= 1:
        yield FieldViolation("sampling.min_p", "must be within 0 to 1")
    if sampling.seed is not None and not 0 <= sampling.seed <= _MAX_SEED:
        yield FieldViolation("sampling.seed", f"must be within 0 to {_MAX_SEED}")


def _stop_violations(stop: EngineStop, prompt_token_count: int, info: EngineInfo) -> Iterator[FieldViolation]:
    if stop.max_token_count < 1:
        yield FieldViolation("stop.max_token_count", "must be at least 1")
    elif prompt_token_count + stop.max_token_count > info.max_context_token_count:
        yield FieldViolation(
            "stop.max_token_count",
            f"is {stop.max_token_count}, with a prompt of {prompt_token_count} more than the context of "
            f"{info.max_context_token_count}",
        )
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_COUNT:
        yield FieldViolation("stop.stop_token_ids", f"has more than {MAX_STOP_TOKEN_COUNT} ids")
    elif stop.stop_token_ids and not 0 <= min(stop.stop_token_ids) <= max(stop.stop_token_ids) < info.vocab_size:
        yield FieldViolation("stop.stop_token_ids", f"has an id not within 0 to {info.vocab_size - 1}")


def is_duration(seconds: float, most_s: float) -> bool:
    """Positive, finite and at most ``most_s``."""
    return math.isfinite(seconds) and 0 < seconds <= most_s

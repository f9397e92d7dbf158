"""The legs a worker has in hand: bounded, countable, drainable. And what a leg's order must be before an engine
sees it: an engine that is handed nonsense may die and take every other request with it.

Owns counts, not work: entering and leaving is all it knows. Never computes and never queues; what does not fit
is refused, because waiting is the router's business.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from baton.errors import FieldViolation, draining, invalid_request, prompt_too_long, queue_full
from baton.leg import DecodeOrder, PrefillOrder
from baton.request import (
    MAX_BAD_SEQUENCE_COUNT,
    MAX_BAD_SEQUENCE_LENGTH,
    MAX_BIAS,
    MAX_BIAS_COUNT,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TENANT_BYTES,
    MAX_TOP_LOGPROB_COUNT,
    MIN_REPETITION_PENALTY,
    EngineStop,
    Sampling,
)
from baton.structures import structure_problem
from engine.protocol import EngineInfo

MAX_STOP_TOKEN_COUNT = 1024
MAX_TEMPERATURE = 2.0
RETRY_AFTER_S = 0.25

MAX_LEG_ID_CHARS = 128
_LEG_ID = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_LEG_ID_CHARS}}}")
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
    order: PrefillOrder | DecodeOrder, info: EngineInfo, more: list[FieldViolation] | None = None
) -> None:
    """Raises INVALID_REQUEST with every broken rule, and those in ``more``, or PROMPT_TOO_LONG."""
    prompt_token_ids = order.prompt_token_ids
    context = info.max_context_token_count
    if len(prompt_token_ids) > context - 1:
        raise prompt_too_long(len(prompt_token_ids), context - 1)
    violations = list(more or ())
    if not _LEG_ID.fullmatch(order.leg_id):
        violations.append(FieldViolation("leg_id", "must be 1 to 128 letters, digits or any of _ . : / -"))
    if not prompt_token_ids:
        violations.append(FieldViolation("prompt_token_ids", "is empty"))
    elif not _are_ids(prompt_token_ids, info):
        violations.append(FieldViolation("prompt_token_ids", f"has an id not within 0 to {info.vocab_size - 1}"))
    if not 0 <= order.output_token_count <= max(0, len(prompt_token_ids) - 1):
        violations.append(FieldViolation("output_token_count", "must leave at least one token of prompt"))
    if order.top_logprob_count is not None and not 0 <= order.top_logprob_count <= MAX_TOP_LOGPROB_COUNT:
        violations.append(FieldViolation("top_logprob_count", f"must be within 0 to {MAX_TOP_LOGPROB_COUNT}"))
    if isinstance(order, PrefillOrder) and order.prompt_logprob_count is not None:
        violations += _prompt_logprob_violations(order.prompt_logprob_count, order.output_token_count)
    if len(order.tenant.encode()) > MAX_TENANT_BYTES:
        violations.append(FieldViolation("tenant", f"has more than {MAX_TENANT_BYTES} bytes"))
    violations += sampling_violations(order.sampling, info)
    violations += _stop_violations(order.stop, len(prompt_token_ids), info)
    if violations:
        raise invalid_request(violations)


def _prompt_logprob_violations(count: int, output_token_count: int) -> Iterator[FieldViolation]:
    if not 0 <= count <= MAX_TOP_LOGPROB_COUNT:
        yield FieldViolation("prompt_logprob_count", f"must be within 0 to {MAX_TOP_LOGPROB_COUNT}")
    if output_token_count:
        yield FieldViolation("prompt_logprob_count", "is set for a prompt of which a part was generated")


def _are_ids(token_ids: Collection[int], info: EngineInfo) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < info.vocab_size)


def sampling_violations(sampling: Sampling, info: EngineInfo) -> Iterator[FieldViolation]:
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
    for name in ("presence_penalty", "frequency_penalty"):
        if not -MAX_PENALTY <= getattr(sampling, name) <= MAX_PENALTY:
            yield FieldViolation(f"sampling.{name}", f"must be within {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    if not MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
        yield FieldViolation(
            "sampling.repetition_penalty",
            f"must be within {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}",
        )
    yield from _token_list_violations(sampling, info)
    if sampling.structure is not None:
        problem = structure_problem(sampling.structure)
        if problem is not None:
            yield FieldViolation("sampling.structure", problem)


def _token_list_violations(sampling: Sampling, info: EngineInfo) -> Iterator[FieldViolation]:
    not_ids = f"has an id not within 0 to {info.vocab_size - 1}"
    biased = [token_id for token_id, _ in sampling.logit_bias]
    if len(biased) > MAX_BIAS_COUNT:
        yield FieldViolation("sampling.logit_bias", f"has more than {MAX_BIAS_COUNT} tokens")
    elif not _are_ids(biased, info):
        yield FieldViolation("sampling.logit_bias", not_ids)
    elif len(set(biased)) != len(biased):
        yield FieldViolation("sampling.logit_bias", "names a token twice")
    elif not all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in sampling.logit_bias):
        yield FieldViolation("sampling.logit_bias", f"has a bias not within {-MAX_BIAS:g} to {MAX_BIAS:g}")
    if len(sampling.allowed_token_ids) > info.vocab_size:
        yield FieldViolation("sampling.allowed_token_ids", "has more ids than there are tokens")
    elif not _are_ids(sampling.allowed_token_ids, info):
        yield FieldViolation("sampling.allowed_token_ids", not_ids)
    elif sampling.allowed_token_ids and all(
        (each,) in sampling.bad_token_sequences for each in sampling.allowed_token_ids
    ):
        # An engine that may say nothing says anything.
        yield FieldViolation("sampling.allowed_token_ids", "are all forbidden by bad_token_sequences")
    bad = sampling.bad_token_sequences
    if len(bad) > MAX_BAD_SEQUENCE_COUNT:
        yield FieldViolation("sampling.bad_token_sequences", f"has more than {MAX_BAD_SEQUENCE_COUNT} sequences")
    elif not all(1 <= len(each) <= MAX_BAD_SEQUENCE_LENGTH for each in bad):
        yield FieldViolation(
            "sampling.bad_token_sequences", f"has a sequence not of 1 to {MAX_BAD_SEQUENCE_LENGTH} tokens"
        )
    elif not all(_are_ids(each, info) for each in bad):
        yield FieldViolation("sampling.bad_token_sequences", not_ids)


def _stop_violations(stop: EngineStop, prompt_token_count: int, info: EngineInfo) -> Iterator[FieldViolation]:
    if stop.max_token_count < 1:
        yield FieldViolation("stop.max_token_count", "must be at least 1")
    elif prompt_token_count + stop.max_token_count > info.max_context_token_count:
        yield FieldViolation(
            "stop.max_token_count",
            f"is {stop.max_token_count}, with a prompt of {prompt_token_count} more than the context of "
            f"{info.max_context_token_count}",
        )
    if not 0 <= stop.min_token_count <= info.max_context_token_count:
        yield FieldViolation("stop.min_token_count", f"must be within 0 to {info.max_context_token_count}")
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_COUNT:
        yield FieldViolation("stop.stop_token_ids", f"has more than {MAX_STOP_TOKEN_COUNT} ids")
    elif not _are_ids(stop.stop_token_ids, info):
        yield FieldViolation("stop.stop_token_ids", f"has an id not within 0 to {info.vocab_size - 1}")


def is_duration(seconds: float, most_s: float) -> bool:
    """Positive, finite and at most ``most_s``."""
    return math.isfinite(seconds) and 0 < seconds <= most_s

"""The account of how a decode began, made of times and counts measured elsewhere. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from baton.leg import KvAdopted, RecomputeReason
from engine.protocol import DecodeJob


class Pull(Protocol):
    """What is read of a pull's record (``kvtransfer.connector_telemetry.PullRecord``)."""

    @property
    def is_ok(self) -> bool: ...
    @property
    def started_at(self) -> float: ...
    @property
    def in_place_at(self) -> float: ...
    @property
    def transfer_bytes(self) -> int: ...
    @property
    def descriptor_count(self) -> int: ...
    @property
    def block_count(self) -> int: ...
    @property
    def post_s(self) -> float: ...
    @property
    def wire_s(self) -> float: ...
    @property
    def verify_s(self) -> float: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class StartTimes:
    """Seconds of CLOCK_MONOTONIC, which is the engine's clock and the event loop's."""

    arrived_at: float
    scheduled_at: float
    """The start of the step that computed the first token asked for."""
    first_token_at: float


def kv_adopted(
    job: DecodeJob,
    times: StartTimes,
    *,
    told_at: float,
    cached_token_count: int,
    block_token_count: int,
    pull: Pull | None,
    is_with_tokens: bool,
) -> KvAdopted:
    """``cached_token_count``: prompt tokens the engine had not to compute, pulled ones included.
    ``pull`` None: nothing was read from a peer."""
    first_step_s = max(0.0, told_at - times.scheduled_at)  # told with the step's tokens
    if job.pull is None:
        return KvAdopted(
            wait_s=max(0.0, times.scheduled_at - times.arrived_at),
            transfer_s=0.0,
            decode_wait_s=0.0,
            transfer_bytes=0,
            descriptor_count=0,
            recomputed_token_count=0,
            prefill_s=max(0.0, times.first_token_at - times.scheduled_at),
            cached_token_count=cached_token_count,
            is_with_tokens=is_with_tokens,
        )
    covered_token_count = len(job.prompt_token_ids) - 1
    if pull is None:
        # All of it was in this engine's own prefix cache, and the peer was told so.
        return KvAdopted(
            wait_s=max(0.0, times.scheduled_at - times.arrived_at),
            transfer_s=0.0,
            decode_wait_s=0.0,
            transfer_bytes=0,
            descriptor_count=0,
            recomputed_token_count=0,
            prefill_s=0.0,
            cached_token_count=min(cached_token_count, covered_token_count),
            first_step_s=first_step_s,
            is_with_tokens=is_with_tokens,
        )
    block_count = -(-covered_token_count // block_token_count)
    # Only whole blocks are in a prefix cache, so what was not missing is a multiple of their size.
    local_token_count = max(0, block_count - pull.block_count) * block_token_count
    if not pull.is_ok:
        local_token_count = min(cached_token_count, covered_token_count)
    return KvAdopted(
        wait_s=max(0.0, pull.started_at - times.arrived_at),
        transfer_s=pull.in_place_at - pull.started_at,
        decode_wait_s=max(0.0, times.scheduled_at - pull.in_place_at),
        transfer_bytes=pull.transfer_bytes if pull.is_ok else 0,
        descriptor_count=pull.descriptor_count if pull.is_ok else 0,
        recomputed_token_count=0 if pull.is_ok else covered_token_count - local_token_count,
        prefill_s=0.0,
        cached_token_count=local_token_count,
        first_step_s=first_step_s,
        recompute_reason=None if pull.is_ok else RecomputeReason(pull.reason),
        pull_count=1,
        post_s=pull.post_s,
        wire_s=pull.wire_s,
        verify_s=pull.verify_s,
        is_with_tokens=is_with_tokens,
    )

"""What happened to each pull, from the engine process to the worker process. Owns the shape; measures nothing.

vLLM's own statistics carry no request ids. Ours ride in the same message, one entry per pulled request, and
that message is the one with the request's first token, or an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

PULLS_KEY = "baton_pulls"
GIVEN_UP_KEY = "baton_given_up"


@dataclass(frozen=True, slots=True)
class PullRecord:
    """One request's pull. Times are CLOCK_MONOTONIC seconds of the host, durations seconds."""

    request_id: str
    """vLLM's internal id."""
    is_ok: bool
    """False: nothing of it may be used; the engine computes the prompt instead."""
    started_at: float
    """When the read was asked for (a first contact with the peer comes after it)."""
    in_place_at: float
    transfer_bytes: int
    descriptor_count: int
    post_s: float
    wire_s: float
    block_count: int
    """Blocks that were missing here."""
    verify_s: float = 0.0
    """From the last byte's arrival to the verdict, waiting for the holder's digests included."""
    reason: str = ""
    """Why not, where it is not ok: a ``baton.leg.RecomputeReason``'s value."""


_VALUES = attrgetter(*(each.name for each in fields(PullRecord)))
"""Without ``astuple``'s deep copies, which took longer than reading a hold record."""


def pull_records(kv_connector_stats: Mapping[str, Any] | None) -> list[PullRecord]:
    """The records in a statistics message as the worker process receives it."""
    if not kv_connector_stats:
        return []
    return [PullRecord(*fields) for fields in kv_connector_stats.get(PULLS_KEY, ())]


def given_up_pulls(kv_connector_stats: Mapping[str, Any] | None) -> list[str]:
    """Requests, by vLLM's internal id, whose pull is late and cannot be taken back: somebody must end them."""
    return list(kv_connector_stats.get(GIVEN_UP_KEY, ())) if kv_connector_stats else []


class PullStats(NixlKVConnectorStats):  # type: ignore[misc]
    """vLLM's transfer statistics plus our records."""

    def reset(self) -> None:
        super().reset()
        self.data[PULLS_KEY] = []
        self.data[GIVEN_UP_KEY] = []

    def record_pull(self, record: PullRecord) -> None:
        # A plain list of plain values: that is what survives the trip between the processes.
        self.data[PULLS_KEY].append(list(_VALUES(record)))

    def record_given_up(self, request_id: str) -> None:
        self.data[GIVEN_UP_KEY].append(request_id)

    def is_empty(self) -> bool:
        return super().is_empty() and not self.data[PULLS_KEY] and not self.data[GIVEN_UP_KEY]

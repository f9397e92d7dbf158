"""The cluster as the router sees it at one moment: values that policies read.

A snapshot, made by ``Roster.view()`` and never changed. It mixes what workers report of themselves with what this
router has placed on them and they may not know of yet.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.leg import WorkerInfo, WorkerLoad
from baton.request import Role


@dataclass(frozen=True, slots=True, order=True)
class WorkerIdentity:
    """A worker process: the id is the fleet's and survives restarts, the epoch is new with each process."""

    worker_id: str
    epoch: str

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.epoch[:8]}"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker the fleet told the router of."""

    worker_id: str
    address: str
    """host:port of its internal API."""
    role: Role
    epoch: str = ""
    """Of the process the fleet knows; empty when it does not say. The worker's own word counts."""


class Health(enum.Enum):
    CONNECTING = "connecting"
    """Not heard of yet."""
    READY = "ready"
    SUSPECT = "suspect"
    """Silent for longer than it should be: gets nothing new, and what it has goes on."""
    DRAINING = "draining"
    """Finishes what it has."""
    LOST = "lost"
    """Gone, or silent for so long that what it had was started elsewhere."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """What this router has on one worker. A request counts until its last token."""

    prefill_count: int = 0
    prefill_token_count: int = 0
    """Prompt tokens of those prefills that have not been answered yet."""
    decode_count: int = 0
    """From placement on, so that decode capacity is there before prefill is spent."""
    decode_token_count: int = 0
    """Tokens those decodes are expected to keep in cache."""
    held_count: int = 0
    """Requests whose KV it holds, or is being told to let go: no load, but it must stay within reach."""

    @property
    def request_count(self) -> int:
        return self.prefill_count + self.decode_count


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at one moment."""

    identity: WorkerIdentity
    address: str
    role: Role
    health: Health
    info: WorkerInfo | None = None
    """Known once connected."""
    load: WorkerLoad | None = None
    """The last report."""
    assigned: Assigned = Assigned()

    @property
    def worker_id(self) -> str:
        return self.identity.worker_id

    @property
    def is_ready(self) -> bool:
        return self.health is Health.READY and self.info is not None


@dataclass(frozen=True, slots=True)
class ClusterView:
    workers: tuple[WorkerView, ...]

    def ready(self, role: Role | None = None) -> list[WorkerView]:
        """Workers that may get new requests, of one role or of any."""
        return [w for w in self.workers if w.is_ready and (role is None or w.role is role)]

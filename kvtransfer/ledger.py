"""Who holds KV on a prefill worker, and until when: the books, and nothing but the books.

Each lease leaves exactly once: released, or expired. The ledger says which handles to let go of; the worker
performs it. Pure: the time is passed in (seconds, one monotonic clock), no I/O, no tasks.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """One request's KV, held."""

    ticket_id: str
    handle: str
    """Names the KV in ``Engine.release``."""
    kv_bytes: int
    granted_at: float
    expires_at: float
    """The lease is over at this instant, not after it."""


class Ledger:
    """Open leases, at most ``max_lease_count``, none older than ``max_hold_s`` however often extended."""

    def __init__(self, *, max_lease_count: int, max_hold_s: float) -> None:
        if max_lease_count < 1:
            raise ValueError(f"max_lease_count is {max_lease_count}; a ledger needs room for at least 1")
        if not max_hold_s > 0:
            raise ValueError(f"max_hold_s is {max_hold_s}; it must be positive")
        self.max_lease_count = max_lease_count
        self.max_hold_s = max_hold_s
        # The mutable state: open leases by ticket, and a heap of (expires_at, ticket_id) in which entries of
        # leases that ended or moved are stale and skipped.
        self._leases: dict[str, Lease] = {}
        self._by_expiry: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def __repr__(self) -> str:
        return f"<Ledger [{len(self)} of {self.max_lease_count} leases | {self.held_bytes} bytes]>"

    @property
    def held_bytes(self) -> int:
        return sum(lease.kv_bytes for lease in self._leases.values())

    @property
    def next_expiry_at(self) -> float | None:
        """When ``expire`` will next have something to say; None while nothing is held."""
        self._drop_stale()
        return self._by_expiry[0][0] if self._by_expiry else None

    def can_grant(self, reserved_count: int = 0) -> bool:
        """Whether a lease fits beside those held and ``reserved_count`` that are being worked towards."""
        return len(self._leases) + reserved_count < self.max_lease_count

    def grant(self, now: float, ticket_id: str, handle: str, lease_s: float, kv_bytes: int = 0) -> Lease:
        """Opens a lease. Raises ``ValueError`` for a known ticket, a full ledger or a lease out of range: bugs."""
        if ticket_id in self._leases:
            raise ValueError(f"ticket {ticket_id} has a lease already")
        if not self.can_grant():
            raise ValueError(f"the ledger is full ({self.max_lease_count} leases); ask can_grant first")
        if not 0 < lease_s <= self.max_hold_s:
            raise ValueError(f"lease_s is {lease_s}; it must be positive and at most {self.max_hold_s}")
        lease = Lease(ticket_id, handle, kv_bytes, now, now + lease_s)
        self._put(lease)
        return lease

    def extend(self, now: float, ticket_id: str, lease_s: float) -> bool:
        """Starts the lease anew, up to the longest hold. False: it has ended, though perhaps not yet been swept."""
        lease = self._leases.get(ticket_id)
        if lease is None or lease.expires_at <= now:
            return False
        expires_at = min(now + lease_s, lease.granted_at + self.max_hold_s)
        self._put(Lease(ticket_id, lease.handle, lease.kv_bytes, lease.granted_at, expires_at))
        return True

    def release(self, ticket_id: str) -> Lease | None:
        """Closes a lease; the caller lets go of its handle. None: unknown or closed already."""
        return self._leases.pop(ticket_id, None)

    def expire(self, now: float) -> list[Lease]:
        """Closes every lease that is over, oldest first; the caller lets go of their handles."""
        expired: list[Lease] = []
        while True:
            self._drop_stale()
            if not self._by_expiry or self._by_expiry[0][0] > now:
                return expired
            _, ticket_id = heapq.heappop(self._by_expiry)
            expired.append(self._leases.pop(ticket_id))

    def close(self) -> list[Lease]:
        """Closes every lease, whatever its time; the caller lets go of their handles."""
        leases = list(self._leases.values())
        self._leases.clear()
        self._by_expiry.clear()
        return leases

    def _put(self, lease: Lease) -> None:
        self._leases[lease.ticket_id] = lease
        heapq.heappush(self._by_expiry, (lease.expires_at, lease.ticket_id))
        # Stale entries are normally dropped as they come to the top; extensions in a loop could outrun that.
        if len(self._by_expiry) > 4 * self.max_lease_count + 16:
            self._by_expiry = [(one.expires_at, one.ticket_id) for one in self._leases.values()]
            heapq.heapify(self._by_expiry)

    def _drop_stale(self) -> None:
        while self._by_expiry:
            expires_at, ticket_id = self._by_expiry[0]
            lease = self._leases.get(ticket_id)
            if lease is not None and lease.expires_at == expires_at:
                return
            heapq.heappop(self._by_expiry)

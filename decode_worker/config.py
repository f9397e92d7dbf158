"""What one decode worker takes on. Frozen, checked on construction, buildable from a TOML table."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtransfer.transfer_params import TransferLimits


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Raises ``ValueError`` naming the key and the fix."""

    max_leg_count: int = 256
    """Decodes in hand at once, running or waiting in the engine."""
    max_seen_ticket_count: int = 65_536
    """Used tickets remembered. More than a worker decodes within the longest lease."""
    allowed_prefill_workers: tuple[str, ...] | None = None
    """Whose tickets are accepted; None: those of every worker that has the cluster's secret."""
    transfer: TransferLimits = field(default_factory=TransferLimits)
    """What a ticket may make the engine do, and the hosts it may make it dial."""

    def __post_init__(self) -> None:
        for key in ("max_leg_count", "max_seen_ticket_count"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key}: is {value!r}; give a whole number of at least 1")
        if self.allowed_prefill_workers is not None:
            names = tuple(self.allowed_prefill_workers)
            if not names or not all(isinstance(name, str) and name for name in names):
                raise ValueError("allowed_prefill_workers: give a list of worker ids, or leave it out to allow all")
            object.__setattr__(self, "allowed_prefill_workers", names)
        object.__setattr__(self, "transfer", TransferLimits.of(self.transfer))

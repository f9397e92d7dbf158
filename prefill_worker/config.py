"""What one prefill worker takes on. Frozen, checked on construction, buildable from a TOML table."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.legs import is_duration
from kvtransfer.transfer_params import TransferLimits


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """Raises ``ValueError`` naming the key and the fix."""

    max_leg_count: int = 64
    """Prefills in hand at once, running or waiting in the engine."""
    max_held_count: int = 256
    """Requests whose KV is held at once. A prefill is refused if its KV might find no place here."""
    max_hold_s: float = 3600.0
    """Longest lease, and longest time KV is held however often its lease is extended. The router asks for what its
    ``lease_s`` says; this bounds what it may ask for."""
    release_timeout_s: float = 30.0
    """Longest wait for the engine to take note of a release; then its own backstop must free the KV."""
    transfer: TransferLimits = field(default_factory=TransferLimits)
    """The engine's own parameters are checked as a puller would, so that a bad one fails here and early."""

    def __post_init__(self) -> None:
        for key in ("max_leg_count", "max_held_count"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key}: is {value!r}; give a whole number of at least 1")
        for key in ("max_hold_s", "release_timeout_s"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not is_duration(value, 3600):
                raise ValueError(f"{key}: is {value!r}; give above 0 and at most 3600 seconds")
        object.__setattr__(self, "transfer", TransferLimits.of(self.transfer))

"""What one request cost in KV transfer: summed over its attempts, told to its caller, the log and Prometheus alike.

Pure. A worker says ``KvAdopted`` once per decode; this adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.leg import KvAdopted, RecomputeReason


@dataclass(frozen=True, slots=True)
class TransferReport:
    """All zero where nothing was to be pulled."""

    kv_bytes: int = 0
    descriptor_count: int = 0
    """Memory regions read, as the transfer library counts."""
    pull_count: int = 0
    """Pulls tried."""
    post_s: float = 0.0
    """Preparing and posting the reads."""
    wire_s: float = 0.0
    """Bytes moving, by the transfer library's own count."""
    verify_s: float = 0.0
    """Making sure that what came is what was held."""
    recomputed_token_count: int = 0
    """Prompt tokens a decode worker computed itself because their KV could not be used."""
    recompute_reason: RecomputeReason | None = None
    """Of the last that were."""

    @property
    def wire_bytes_per_s(self) -> float | None:
        """The bandwidth of the wire; None where nothing moved."""
        return self.kv_bytes / self.wire_s if self.wire_s > 0 else None

    def plus(self, kv: KvAdopted) -> TransferReport:
        return TransferReport(
            kv_bytes=self.kv_bytes + kv.transfer_bytes,
            descriptor_count=self.descriptor_count + kv.descriptor_count,
            pull_count=self.pull_count + kv.pull_count,
            post_s=self.post_s + kv.post_s,
            wire_s=self.wire_s + kv.wire_s,
            verify_s=self.verify_s + kv.verify_s,
            recomputed_token_count=self.recomputed_token_count + kv.recomputed_token_count,
            recompute_reason=kv.recompute_reason or self.recompute_reason,
        )

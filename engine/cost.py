"""How long an engine's step takes, as three small formulas.

Owns the formulas and their calibrated defaults. Pure: sizes in, seconds out. The defaults describe the default
model (135M parameters, bfloat16, 30 layers, 3 KV heads of 64) in vLLM 0.32 on one core of a 2-core CPU machine, eager
mode; they are fitted to figures measured there and given beside each. `baton bench calibrate` fits those of another
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvtransfer.simulated import Link

__all__ = ["Chunk", "CostModel", "DecodeCost", "Link", "PrefillCost"]


def _refuse_negative(costs: Any) -> None:
    for each in fields(costs):
        value = getattr(costs, each.name)
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{type(costs).__name__}.{each.name} must be 0 or more, got {value}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a prompt in one step: ``new_token_count`` tokens after ``context_token_count`` computed ones."""

    new_token_count: int
    context_token_count: int = 0


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """a + b * sum(n) + c * sum(n^2), where n^2 of a chunk after a context k counts (k + n)^2 - k^2, so that
    a prompt costs the same quadratic work however it is cut.

    Defaults: 512 tokens in 0.76 s (measured 650 to 690 tokens/s), 2,000 in 4.3 s (measured 440 to 490).
    """

    base_s: float = 0.012
    per_token_s: float = 1.23e-3
    per_token_squared_s: float = 4.7e-7

    def __post_init__(self) -> None:
        _refuse_negative(self)

    def work_s(self, chunks: Sequence[Chunk]) -> float:
        """Without the base."""
        linear = sum(chunk.new_token_count for chunk in chunks)
        squared = sum(c.new_token_count * (c.new_token_count + 2 * c.context_token_count) for c in chunks)
        return self.per_token_s * linear + self.per_token_squared_s * squared


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """a + b * sum(context) + c * batch + d * max(0, batch - knee).

    Up to the knee the weights' way from memory is what takes the time, and a further sequence is nearly free; beyond
    it every sequence has to be computed. Without a knee (d = 0) this is the plain a + b * sum(context) + c * batch.

    Defaults: 29 to 35 ms for 1 to 4 sequences of 512 tokens (measured 28 to 35), 16 sequences at 278 tokens/s
    (measured 260 to 290). The share of the context is not measured apart; 1 microsecond per token is 23 KB at
    memory speed.
    """

    base_s: float = 0.027
    per_context_token_s: float = 1.0e-6
    per_sequence_s: float = 1.4e-3
    per_sequence_beyond_knee_s: float = 0.0
    knee_sequence_count: int = 0

    def __post_init__(self) -> None:
        _refuse_negative(self)

    def work_s(self, context_token_counts: Sequence[int]) -> float:
        """Without the base."""
        count = len(context_token_counts)
        return (
            self.per_context_token_s * sum(context_token_counts)
            + self.per_sequence_s * count
            + self.per_sequence_beyond_knee_s * max(0, count - self.knee_sequence_count)
        )


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of a step that may mix prompt chunks and decoding sequences, and the size of KV."""

    prefill: PrefillCost = PrefillCost()
    decode: DecodeCost = DecodeCost()
    kv_bytes_per_token: int = 23_040
    """2 * 30 layers * 3 heads * 64 * 2 bytes = 22.5 KiB."""

    def __post_init__(self) -> None:
        _refuse_negative(self)

    def step_s(self, chunks: Sequence[Chunk], context_token_counts: Sequence[int]) -> float:
        """Seconds of one step; 0 for an empty one. The weights are read once, so a mixed step pays one base."""
        if not chunks and not context_token_counts:
            return 0.0
        base_s = max(self.prefill.base_s if chunks else 0.0, self.decode.base_s if context_token_counts else 0.0)
        return base_s + self.prefill.work_s(chunks) + self.decode.work_s(context_token_counts)

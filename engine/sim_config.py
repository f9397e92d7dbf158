"""What a simulated engine is told: sizes, costs, what its model says, and the delays a test injects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.config import EngineConfig
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.sim_tokens import TokenRule

_ENGINE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class PhaseDelays:
    """Seconds added to the phases of every request, to slow an engine down or to see where time is counted."""

    queue: float = 0.0
    """Before a request joins the engine's queue."""
    prefill: float = 0.0
    """To each step that completes a prompt; everything else in that step waits too."""
    transfer: float = 0.0
    decode_wait: float = 0.0
    """Between KV in place and the earliest first step."""
    decode: float = 0.0
    """To each step with a decoding sequence."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) >= 0:
                raise ValueError(f"extra_delay_s.{each.name} must be 0 or more, got {getattr(self, each.name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """One simulated engine. Raises ``ValueError`` naming the key and the fix."""

    engine_id: str
    """Unique in its network, and new with each start: it names the source in transfer parameters."""
    model_name: str = "simulated"
    block_token_count: int = 128
    block_count: int = 512
    max_context_token_count: int = 8192
    max_running_count: int = 16
    max_batched_token_count: int = 2048
    """Tokens of one step: a longer prompt is computed in chunks of this size."""
    micro_batch_count: int = 1
    """Running sequences are dealt out to so many batches that take turns, one a step, as under pipeline parallelism:
    a sequence has a token every so many steps, and not all of them at one moment. Not together with a ``Pace``."""
    max_waiting_count: int = 1024
    """Requests beyond these are refused with QUEUE_FULL."""
    enable_prefix_caching: bool = True
    cost: CostModel = CostModel()
    tokens: TokenRule = TokenRule()
    extra_delay_s: PhaseDelays = PhaseDelays()
    pull_timeout_s: float = 10.0
    """As of ``EngineConfig``."""
    start_s: float = 0.0
    """How long loading the model takes."""
    backstop_extra_s: float = 60.0
    """Held KV that nobody releases is freed this long after its lease; the ledger is the real owner."""

    def __post_init__(self) -> None:
        if not _ENGINE_ID.fullmatch(self.engine_id):
            raise ValueError("engine_id: must be 1 to 128 letters, digits or _ . : -, as in transfer parameters")
        for key in (
            "block_token_count",
            "block_count",
            "max_context_token_count",
            "max_running_count",
            "micro_batch_count",
            "max_waiting_count",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: is {getattr(self, key)}; it must be at least 1")
        if self.max_batched_token_count < self.max_running_count:
            raise ValueError(
                f"max_batched_token_count: is {self.max_batched_token_count}; every running sequence needs a "
                f"token of it, so give at least max_running_count ({self.max_running_count})"
            )
        capacity = self.block_count * self.block_token_count
        if capacity < self.max_context_token_count:
            raise ValueError(
                f"block_count: {self.block_count} blocks hold {capacity} tokens, less than max_context_token_count "
                f"({self.max_context_token_count}); a request could wait for ever"
            )
        if not self.start_s >= 0 or not self.backstop_extra_s >= 0:
            raise ValueError("start_s and backstop_extra_s must be 0 or more")

    @classmethod
    def from_engine_config(
        cls, engine: EngineConfig, *, engine_id: str, overrides: Mapping[str, Any] | None = None
    ) -> SimConfig:
        """The simulated twin of ``engine``: same limits, blocks from ``kv_cache_bytes``.

        ``overrides`` are arguments of this class by name, with tables for the nested ones, as a deployment file
        has them: ``{"tokens": {"eos_probability": 0.01}, "cost": {"decode": {"base_s": 0.01}}}``. An unknown key
        is a ``ValueError``.
        """
        given = dict(overrides or {})
        _refuse_unknown("", given, cls)
        cost = _cost(given.pop("cost", {}))
        block_bytes = cost.kv_bytes_per_token * engine.block_token_count
        values: dict[str, Any] = {
            "engine_id": engine_id,
            "model_name": engine.model_name,
            "block_token_count": engine.block_token_count,
            "block_count": engine.kv_cache_bytes // block_bytes if block_bytes else 1,
            "max_context_token_count": engine.max_context_token_count,
            "max_running_count": engine.max_running_count,
            "max_batched_token_count": engine.max_batched_token_count,
            "enable_prefix_caching": engine.enable_prefix_caching,
            "cost": cost,
            "pull_timeout_s": engine.pull_timeout_s,
        }
        values["tokens"] = _table("tokens", given.pop("tokens", {}), TokenRule)
        values["extra_delay_s"] = _table("extra_delay_s", given.pop("extra_delay_s", {}), PhaseDelays)
        return cls(**{**values, **given})


def _cost(value: Any) -> CostModel:
    if isinstance(value, CostModel):
        return value
    table = dict(value)
    _refuse_unknown("cost", table, CostModel)
    nested = {"prefill": PrefillCost, "decode": DecodeCost}
    return CostModel(
        **{key: _table(f"cost.{key}", each, nested[key]) if key in nested else each for key, each in table.items()}
    )


def _table(name: str, value: Any, kind: type[Any]) -> Any:
    if isinstance(value, kind):
        return value
    _refuse_unknown(name, value, kind)
    return kind(**value)


def _refuse_unknown(name: str, table: Mapping[str, Any], kind: type[Any]) -> None:
    known = {each.name for each in fields(kind)}
    for key in table:
        if key not in known:
            where = f"{name}.{key}" if name else key
            raise ValueError(f"{where}: is not known; known here: {', '.join(sorted(known))}")

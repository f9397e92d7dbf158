"""Seam 1: the thing that computes. vLLM and the simulator are the two that satisfy it.

An engine takes token ids and gives token ids. It can do both phases. It owns its KV blocks: a prefill
whose KV is held keeps them until ``release`` or until the peer has pulled them; everything else is freed
when the call ends, however it ends (return, exception, cancellation).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.leg import DecodeDone, DecodeEvent, Introduced, KvAdopted, PromptLogprobs, Stepped
from baton.request import EngineStop, LegFinish, Sampling, TokenLogprobs
from kvtransfer.peer import PeerAddress

__all__ = [
    "DecodeDone",
    "DecodeEvent",
    "DecodeJob",
    "Engine",
    "EngineInfo",
    "EngineLoad",
    "HeldKv",
    "KvAdopted",
    "PrefillJob",
    "Prefilled",
    "Stepped",
]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while the process lives."""

    name: str
    """For people: "vllm 0.32.0" or "simulated"."""
    model: str
    max_context_token_count: int
    block_token_count: int
    block_count: int
    max_running_count: int
    kv_bytes_per_token: int
    vocab_size: int
    sets_answers_aside: bool = False
    """A request begins only once it has the blocks of its whole answer, and is never preempted."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot, as the engine itself counts."""

    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    quarantined_pull_count: int = 0
    """Pulls given up whose reads may still write: their blocks are in use, by nobody."""


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """A prompt to compute. ``hold_kv`` False: answer with the first token and keep nothing."""

    leg_id: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    sampling: Sampling = Sampling()
    stop: EngineStop = EngineStop(max_token_count=1)
    priority: int = 0
    hold_kv: bool = True
    lease_s: float = 30.0
    """How long the engine's own backstop must keep the KV at least; the ledger is the real owner."""
    output_token_count: int = 0
    """How many of the last ``prompt_token_ids`` are output of this answer already (see ``baton.leg``)."""
    top_logprob_count: int | None = None
    tenant: str = ""
    """Prefixes are cached and shared within a tenant only."""
    prompt_logprob_count: int | None = None
    """See ``baton.leg.PrefillOrder``."""


@dataclass(frozen=True, slots=True)
class HeldKv:
    """KV held by an engine after a prefill. ``handle`` names it in ``release``; ``params`` is what a peer
    needs to pull it: a flat, JSON-able mapping made by this engine's transfer layer and checked, field by
    field, by the puller's."""

    handle: str
    kv_bytes: int
    params: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill's result. ``held`` is None when ``finish`` is set, or when nothing was to be held."""

    first_token_id: int
    finish: LegFinish | None
    held: HeldKv | None
    queue_s: float
    compute_s: float
    cached_token_count: int
    first_logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """A request to continue. With ``pull``, the prompt is the prefilled prompt plus its first token, and the
    KV of all but the last token is pulled. Without, the engine computes the prompt itself."""

    leg_id: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    sampling: Sampling = Sampling()
    stop: EngineStop = EngineStop(max_token_count=1)
    priority: int = 0
    pull: dict[str, Any] | None = field(default=None, repr=False)
    output_token_count: int = 0
    """How many of the last ``prompt_token_ids`` are output of this answer already (see ``baton.leg``)."""
    top_logprob_count: int | None = None
    tenant: str = ""
    """Prefixes are cached and shared within a tenant only."""


class Engine(Protocol):
    """Prefill, decode, release, load. Errors: ``BatonError`` with ENGINE_FAILED when the engine is gone or a
    request failed inside it, TICKET_REFUSED when ``pull`` params do not pass validation."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def transfer_peer(self) -> PeerAddress | None:
        """Where other engines reach this one's KV, once started; None: they need no introduction."""

    async def introduce(self, peers: Sequence[PeerAddress]) -> list[Introduced]:
        """Meets other engines and reads a little from each, so that no request pays for the first contact.

        One result for each, in order, within seconds whatever the peers do; one that cannot be met is no error."""

    async def start(self) -> None:
        """Loads the model. Idempotent only in that it is called once."""

    async def prefill(self, job: PrefillJob) -> Prefilled:
        """Cancelling the awaiting task aborts the computation and frees its blocks."""

    def decode(self, job: DecodeJob) -> AsyncGenerator[DecodeEvent, None]:
        """``KvAdopted Stepped* DecodeDone``. Closing the generator aborts and frees."""

    async def release(self, handle: str) -> None:
        """Frees held KV. Idempotent; unknown handles are ignored. Returns once the engine took note."""

    def load(self) -> EngineLoad: ...

    async def load_now(self) -> EngineLoad:
        """Like ``load`` but asks the engine instead of the last report: for tests and ``baton top``."""

    async def check_health(self) -> None:
        """Raises ``BatonError`` ENGINE_FAILED if the engine is dead."""

    async def close(self) -> None:
        """Stops everything this engine started. Idempotent."""

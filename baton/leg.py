"""The words between router and workers: a request is two legs, and these are what each is asked and answers.

Engines speak the same events, so a decode's stream passes from engine to router unchanged.
"""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.request import EngineStop, LegFinish, Role, Sampling, TokenLogprobs


class PromptLogprobs:
    """How likely each token of a prompt was, packed: 12 bytes a token and 12 for each of its likeliest.

    A sequence with one entry for each token; None for the prompt's very first, which has nothing before it.
    """

    __slots__ = ("logprobs", "ranks", "top_count", "top_logprobs", "top_token_ids")

    def __init__(self, top_count: int) -> None:
        self.top_count = top_count
        self.logprobs = array("d")
        self.ranks = array("i")
        """1 is the likeliest; 0 for the very first token."""
        self.top_token_ids = array("i")
        """``top_count`` for each token, likeliest first; zeros for the very first, as in ``top_logprobs``."""
        self.top_logprobs = array("d")

    def extend(
        self,
        logprobs: Iterable[float],
        ranks: Iterable[int],
        top_token_ids: Iterable[int],
        top_logprobs: Iterable[float],
    ) -> None:
        """More tokens. Raises ``ValueError`` unless the lists fit together."""
        self.logprobs.extend(logprobs)
        self.ranks.extend(ranks)
        self.top_token_ids.extend(top_token_ids)
        self.top_logprobs.extend(top_logprobs)
        count = len(self.logprobs)
        if not (
            len(self.ranks) == count and len(self.top_token_ids) == len(self.top_logprobs) == count * self.top_count
        ):
            raise ValueError("logprobs, ranks and likeliest tokens of a prompt are not of the same tokens")

    def append_first(self) -> None:
        """The prompt's very first token."""
        self.extend((0.0,), (0,), (0,) * self.top_count, (0.0,) * self.top_count)

    def append(self, each: TokenLogprobs) -> None:
        """Raises ``ValueError`` unless it has ``top_count`` likeliest."""
        top_ids, top_logprobs = [token_id for token_id, _ in each.top], [logprob for _, logprob in each.top]
        self.extend((each.logprob,), (each.rank,), top_ids, top_logprobs)

    def __len__(self) -> int:
        return len(self.logprobs)

    def __getitem__(self, index: int) -> TokenLogprobs | None:
        rank = self.ranks[index]
        if rank == 0:
            return None
        start, stop = index * self.top_count, (index + 1) * self.top_count
        top = zip(self.top_token_ids[start:stop], self.top_logprobs[start:stop], strict=True)
        return TokenLogprobs(self.logprobs[index], rank, tuple(top))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptLogprobs) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return f"<PromptLogprobs of {len(self)} tokens, with {self.top_count} likeliest>"


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """Compute this prompt and hold its KV for ``lease_s`` from the moment it is ready."""

    leg_id: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    stop: EngineStop
    """Of the whole answer: with ``max_token_count`` 1 the first token is the last and nothing is held."""
    lease_s: float
    priority: int = 0
    output_token_count: int = 0
    """How many of the last ``prompt_token_ids`` were generated for this answer already: to penalties, minimum
    length, seed and structure they are output, not prompt."""
    top_logprob_count: int | None = None
    """See ``baton.request.OutputOptions``."""
    tenant: str = ""
    prompt_logprob_count: int | None = None
    """Of the prompt's tokens, as ``top_logprob_count`` is of those drawn. Only of a prompt of which nothing was
    generated; it is then computed whole, without the prefix cache."""


@dataclass(frozen=True, slots=True)
class PrefillReply:
    """The first token and, unless it was also the last, a sealed ticket for the KV."""

    first_token_id: int
    finish: LegFinish | None
    ticket: bytes = field(repr=False)
    """Empty when ``finish`` is set."""
    ticket_id: str
    queue_s: float
    compute_s: float
    cached_token_count: int
    kv_bytes: int
    first_logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = field(default=None, repr=False)
    """One of each token of the prompt, if they were asked for."""


@dataclass(frozen=True, slots=True)
class DecodeOrder:
    """Continue. With a ticket, ``prompt_token_ids`` is the prefilled prompt plus prefill's first token."""

    leg_id: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    stop: EngineStop
    ticket: bytes = field(default=b"", repr=False)
    priority: int = 0
    output_token_count: int = 0
    """How many of the last ``prompt_token_ids`` were generated for this answer already: to penalties, minimum
    length, seed and structure they are output, not prompt."""
    top_logprob_count: int | None = None
    """See ``baton.request.OutputOptions``."""
    tenant: str = ""


class RecomputeReason(enum.Enum):
    """Why KV that was to be pulled could not be used."""

    FAILED = "failed"
    """Handshake, post or read failed: the peer is gone, unreachable or refused."""
    TIMED_OUT = "timed_out"
    EXPIRED = "expired"
    """The hold had ended before the read began."""
    STALE = "stale"
    """The hold ended while it was read: the blocks may have been another request's by then."""
    CORRUPT = "corrupt"
    """What arrived is not what was held."""


@dataclass(frozen=True, slots=True)
class KvAdopted:
    """The KV is in place on the decode engine. Comes once, before the first ``Stepped``."""

    wait_s: float
    """From arrival to the start of the pull; without a ticket, the time in the engine's queue."""
    transfer_s: float
    """Pulling. 0 without a ticket or when all was in cache."""
    decode_wait_s: float
    """From KV in place to the start of the first decode step."""
    transfer_bytes: int
    descriptor_count: int
    recomputed_token_count: int
    """Prompt tokens computed here although their KV was to be pulled; 0 when all went well."""
    prefill_s: float
    """Time computing the prompt here when nothing was to be pulled; otherwise 0."""
    cached_token_count: int
    """Prompt tokens found in this engine's own prefix cache."""
    first_step_s: float = 0.0
    """From the start of the first decode step to this event's leaving: 0 where it is told at the step's start,
    the step's time where it comes with the step's tokens."""
    recompute_reason: RecomputeReason | None = None
    """Why what was to be pulled was computed instead; None when it was not."""
    pull_count: int = 0
    """Pulls tried: 0 where all was in this engine's own cache."""
    post_s: float = 0.0
    """Of the transfer: preparing and posting the reads."""
    wire_s: float = 0.0
    """Of the transfer: bytes moving, by the transfer library's own count."""
    verify_s: float = 0.0
    """Of the transfer: making sure that what came is what was held."""
    is_with_tokens: bool = False
    """The first ``Stepped`` is the next event, without a wait: whoever passes them on does so in one message."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Tokens of one or more engine steps, in order."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Empty, or one of each token."""


@dataclass(frozen=True, slots=True)
class DecodeDone:
    """The last event of a decode."""

    finish: LegFinish


DecodeEvent = KvAdopted | Stepped | DecodeDone


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Identity and limits of a worker process."""

    worker_id: str
    epoch: str
    """New with each process start."""
    role: Role
    model: str
    max_context_token_count: int
    block_token_count: int
    block_count: int
    max_running_count: int
    kv_bytes_per_token: int
    engine: str
    vocab_size: int
    transfer_peer: bytes = field(default=b"", repr=False)
    """Where other engines reach this worker's, sealed by it; empty: its engine needs no introductions."""


@dataclass(frozen=True, slots=True)
class Introduced:
    """What became of introducing a worker's engine to another one's."""

    worker_id: str
    """Of the peer, as is the epoch."""
    epoch: str
    problem: str
    """Why the two engines cannot exchange KV; empty: they can."""
    duration_s: float


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """The load of a worker at one moment, as the worker itself counts."""

    epoch: str
    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    held_lease_count: int
    is_draining: bool
    quarantined_pull_count: int = 0
    """Pulls given up whose reads may still write to their blocks."""
    reserved_block_count: int = 0
    """Promised to decodes in hand that are not known to have them: free by the engine's count, but spoken for."""
    no_room_count: int = 0
    """Decodes refused for want of room since the process began."""


_TOKEN_BYTES = 4
_UINT32 = next(code for code in "IL" if array(code).itemsize == _TOKEN_BYTES)


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as the wire carries them: little-endian uint32, four bytes each.

    Raises ``ValueError`` for an id outside uint32.
    """
    try:
        packed = array(_UINT32, token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError("a token id is not within 0 to 4294967295") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(data: bytes) -> tuple[int, ...]:
    """The inverse of ``pack_token_ids``. Raises ``ValueError`` when ``data`` is not whole tokens."""
    if len(data) % _TOKEN_BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of {_TOKEN_BYTES}-byte token ids")
    packed = array(_UINT32)
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)

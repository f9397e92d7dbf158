"""The words between the relay and whoever answers a caller: what is asked, what comes back, piece by piece.

Values and one Protocol; no behaviour but that a reader is told. The relay yields ``Admitted PromptPart* Piece*
Completed``; a failure is a raised ``BatonError``, never an event. Text is made by an ``Answer``, which the caller of
the relay brings. The stages between relay and caller (samples put together, thinking and tool calls parsed, a window
to resume from) take and give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton.request import (
    FinishReason,
    Handover,
    PlacementMode,
    Sampling,
    TokenLogprobs,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from baton.timeline import PhaseDurations
from baton.transfer_report import TransferReport

DEFAULT_CHUNK_TOKEN_COUNT = 64


class Reader:
    """Where whoever writes an answer hears that its reader is too slow: more is kept than may be, and nothing is
    computed any more."""

    __slots__ = ("on_too_slow",)

    def __init__(self) -> None:
        self.on_too_slow: Callable[[int, int], None] | None = None
        """Takes the bytes kept and the bytes that may be; raises nothing."""

    def too_slow(self, unread_bytes: int, limit_bytes: int) -> None:
        if self.on_too_slow is not None:
            self.on_too_slow(unread_bytes, limit_bytes)


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """One request, checked and tokenised: what the router routes."""

    generation_id: str
    """Minted by the router; letters, digits and ``_ . : / -``, at most 96 bytes (leg ids are made from it)."""
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    max_output_token_count: int
    """At least 1, and no more than the context has left."""
    sampling: Sampling = Sampling()
    stop_token_ids: tuple[int, ...] = ()
    """The caller's own; the engine stops at them and at the model's end-of-sequence tokens."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end-of-sequence tokens; they end nothing when ``ignore_eos``."""
    ignore_eos: bool = False
    is_context_bound: bool = False
    """``max_output_token_count`` is what the context had left, less than the caller asked for (or the caller
    asked for no limit): reaching it is CONTEXT_FULL, not MAX_OUTPUT_TOKENS."""
    max_chunk_token_count: int = DEFAULT_CHUNK_TOKEN_COUNT
    """No ``Piece`` has more tokens than this."""
    priority: int = 0
    session_id: str = ""
    correlation_id: str = ""
    min_output_token_count: int = 0
    """Of the whole answer: no end or stop token is drawn before."""
    top_logprob_count: int | None = None
    """See ``baton.request.OutputOptions``."""
    tenant: str = ""
    """Prefixes are cached and handed over within a tenant only."""
    emitted_token_ids: tuple[int, ...] = field(default=(), repr=False)
    """The beginning of this answer, which the caller has already: the answer goes on after it, and every count
    (``max_output_token_count``, indices) is of the whole. ``Answer`` must have seen them."""
    prompt_logprob_count: int | None = None
    """See ``baton.request.OutputOptions``; the relay then yields ``PromptPart``s."""
    reader: Reader = field(default_factory=Reader, compare=False, repr=False)
    """The same of all samples."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Every token that ends the answer."""
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else self.eos_token_ids)


@dataclass(slots=True)
class Piece:
    """Tokens, and the text that they completed. Pieces are contiguous: no gap, no repeat, no reorder. Nobody changes
    one; it is not frozen because there is one for each token, and that would be the dearest thing about it."""

    first_token_index: int
    """Index in the answer, from 0, of the first of ``token_ids``."""
    token_ids: tuple[int, ...] = field(repr=False)
    text: str = field(repr=False)
    matched_stop_sequence: str | None = field(repr=False)
    """Set on the piece whose last token completed a stop sequence: the last tokens of the answer."""
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)
    """One of each of ``token_ids``, if they were asked for; otherwise none. Whoever made the tokens into a piece
    knows nothing of them: they are put beside the tokens that the piece has."""
    sample_index: int = 0
    """Which of several answers to one prompt; ``first_token_index`` counts within it."""
    reasoning_text: str = field(default="", repr=False)
    tool_calls: tuple[ToolCallDelta, ...] = field(default=(), repr=False)

    @property
    def token_count(self) -> int:
        return len(self.token_ids)


class Answer(Protocol):
    """Turns the tokens of one answer into pieces. Synchronous, and used by one relay task only."""

    def push(self, token_ids: tuple[int, ...]) -> Piece:
        """The next tokens. Holds back text that may begin a stop sequence or an unfinished character; on a match
        the piece ends with the token that completed it and with the text before it. The piece has the first of these
        tokens, all of them unless it matched."""

    def flush(self) -> Piece:
        """At the end: the text held back, with no token."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request has its place. First, once."""

    generation_id: str


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens of the prompt as the model read it, and how likely they were. Before any ``Piece``."""

    first_token_index: int
    token_ids: tuple[int, ...] = field(repr=False)
    text: str = field(default="", repr=False)
    logprobs: tuple[TokenLogprobs | None, ...] = field(default=(), repr=False)
    """Empty, or one of each token; None for the prompt's very first, which has nothing before it."""


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """Where the time of one request went, and who served it."""

    durations: PhaseDurations
    transfer: TransferReport
    handover: Handover
    prefill_worker_id: str
    """Prefilled last; empty when no worker did."""
    decode_worker_id: str
    """Decoded last; empty when no decode was needed."""
    attempt_count: int
    mode: PlacementMode
    placement_reason: str

    @property
    def kv_transfer_bytes(self) -> int:
        return self.transfer.kv_bytes

    @property
    def recomputed_token_count(self) -> int:
        return self.transfer.recomputed_token_count


@dataclass(frozen=True, slots=True)
class Completed:
    """The answer is complete. Last, once."""

    reason: FinishReason
    matched_stop_sequence: str | None = field(repr=False)
    matched_stop_token_id: int | None
    usage: Usage
    report: PhaseReport
    cumulative_logprob: float | None = None
    """Of the tokens of the answer, if logprobs were asked for."""
    tool_calls: tuple[ToolCall, ...] = field(default=(), repr=False)
    """Those of the answer, whole."""
    samples: tuple[SampleCompleted, ...] = ()
    """Where several answers were asked for: all of them, in order; what is above is then the first's, but for
    ``usage``, which counts all."""


@dataclass(frozen=True, slots=True)
class SampleCompleted:
    """How one of several answers ended."""

    sample_index: int
    reason: FinishReason
    matched_stop_sequence: str | None = field(repr=False)
    matched_stop_token_id: int | None
    output_token_count: int
    cumulative_logprob: float | None = None
    tool_calls: tuple[ToolCall, ...] = field(default=(), repr=False)


RelayEvent = Admitted | PromptPart | Piece | Completed

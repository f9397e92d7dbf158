"""What the handoff is told and what it says: facts in the past tense, actions in the imperative. Values only.

Those made with every token are not frozen: that would be the dearest thing about them. Nobody changes them either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.errors import BatonError
from baton.leg import DecodeOrder, KvAdopted, PrefillOrder, PrefillReply, PromptLogprobs
from baton.request import FinishReason, LegFinish, TokenLogprobs
from router.cluster_view import WorkerIdentity
from router.placement import Placement

# Facts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    attempt: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class PlacementFailed:
    attempt: int
    error: BatonError


@dataclass(frozen=True, slots=True)
class PrefillDone:
    leg: int
    reply: PrefillReply


@dataclass(frozen=True, slots=True)
class Adopted:
    """The KV is in place on the decode worker: pulled, recomputed or, without a ticket, computed."""

    leg: int
    kv: KvAdopted


@dataclass(slots=True)
class TokensArrived:
    leg: int
    first_index: int
    """Of the first of these tokens among the leg's own, from 0."""
    token_ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)
    """Empty, or one of each token."""


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    leg: int
    token_count: int
    """Tokens the leg brought in all."""
    finish: LegFinish


@dataclass(frozen=True, slots=True)
class LegFailed:
    leg: int
    error: BatonError


@dataclass(frozen=True, slots=True)
class RoomFound:
    """A decode worker that has room for the leg that was refused for want of it."""

    leg: int
    decode: WorkerIdentity


@dataclass(frozen=True, slots=True)
class RoomFailed:
    leg: int
    error: BatonError


@dataclass(frozen=True, slots=True)
class WorkerLost:
    worker: WorkerIdentity


@dataclass(slots=True)
class Emitted:
    token_count: int
    """Tokens of the answer so far, these included."""


@dataclass(frozen=True, slots=True)
class StopMatched:
    token_count: int
    """Tokens of the answer, up to the one that completed the stop sequence."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    pass


@dataclass(frozen=True, slots=True)
class ClientGone:
    pass


Fact = (
    Placed
    | PlacementFailed
    | PrefillDone
    | Adopted
    | TokensArrived
    | DecodeEnded
    | LegFailed
    | RoomFound
    | RoomFailed
    | WorkerLost
    | Emitted
    | StopMatched
    | DeadlinePassed
    | ClientGone
)

# Actions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Give back the present place, if there is one, and find another. Answered by Placed or PlacementFailed."""

    attempt: int
    excluded: frozenset[WorkerIdentity] = frozenset()
    needs_recompute: bool = False


@dataclass(frozen=True, slots=True)
class StartPrefill:
    leg: int
    worker: WorkerIdentity
    order: PrefillOrder


@dataclass(frozen=True, slots=True)
class StartDecode:
    leg: int
    worker: WorkerIdentity
    order: DecodeOrder


@dataclass(frozen=True, slots=True)
class FindRoom:
    """Keep the place and the KV, and find a decode worker with room for the refused leg, as soon as there is one.
    Answered by RoomFound or RoomFailed."""

    leg: int
    wanted_block_count: int
    refused_by: WorkerIdentity
    barred: frozenset[WorkerIdentity]
    """Where it must not go: who holds its KV, and who could never have room."""
    otherwise: BatonError | None
    """What to fail with at once if no decode worker could ever have room; None: those that could are waited for."""


@dataclass(frozen=True, slots=True)
class CancelLeg:
    leg: int


@dataclass(frozen=True, slots=True)
class KeepLease:
    """Extend the lease in time until ReleaseKv of the same ticket."""

    worker: WorkerIdentity
    ticket_id: str


@dataclass(frozen=True, slots=True)
class ReleaseKv:
    worker: WorkerIdentity
    ticket_id: str


@dataclass(slots=True)
class Emit:
    first_index: int
    """Of the first of these tokens in the answer, from 0."""
    token_ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)
    """Empty, or one of each token."""


@dataclass(frozen=True, slots=True)
class TellPrompt:
    """How likely the prompt's tokens were: once, before the first token."""

    logprobs: PromptLogprobs = field(repr=False)


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    matched_stop_token_id: int | None
    output_token_count: int


@dataclass(frozen=True, slots=True)
class Fail:
    error: BatonError


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody listens any more: end without a word."""


Action = (
    Place
    | StartPrefill
    | StartDecode
    | FindRoom
    | CancelLeg
    | KeepLease
    | ReleaseKv
    | TellPrompt
    | Emit
    | Finish
    | Fail
    | Abandon
)

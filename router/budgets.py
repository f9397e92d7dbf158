"""How long each part of a request may take: the limit of every wait, from the call's deadline and the configuration.

Pure: times are passed in (the event loop's clock, seconds). Nothing of a request waits without a budget from here. It
ends with the request's deadline (DEADLINE_EXCEEDED, which names the phase), or with silence of whoever computes: then
the leg is lost, and moved while attempts are left, else STALLED.

    |<------------------------- deadline: the caller's, cut to the server's maximum ------------------------->|
    | queue                 | prefill             | handoff                 | decode: between two tokens      |
    | max_queue_wait_s,     | prefill_timeout_s   | gap_timeout_s; where    | gap_timeout_s                   |
    | max_no_worker_wait_s, |                     | the prompt is computed  |                                 |
    | ends before the       |                     | there, too,             |                                 |
    | deadline to say why   |                     | prefill_timeout_s       |                                 |

Phases share the deadline instead of owning parts of it: what one leaves, the next one has, and a slow prefill that
would still have made it is not cut off for the sake of a plan. A limit is about silence alone: it begins again with
each attempt and each token.
"""

from __future__ import annotations

from dataclasses import dataclass

_MARGIN_SHARE, _MARGIN_MAX_S = 0.05, 0.05
"""We stop this much before the caller's deadline (5 %, at most 50 ms), so that the caller learns from us in which
phase the time ran out instead of only that it did."""
CALL_SLACK_S = 1.0
"""A call to a worker may last this much longer than we wait for its answer: a worker that ends it by itself says
DEADLINE_EXCEEDED, which means the request's deadline and must not be what a limit of ours ends in."""


@dataclass(frozen=True, slots=True)
class SilenceLimits:
    """How long whoever computes may say nothing. Raises ``ValueError`` naming the key."""

    prefill_timeout_s: float = 120.0
    """Until a prompt is computed, the wait in the engine's queue included."""
    gap_timeout_s: float = 60.0
    """Between two signs of a decode; the first of them is that its KV is in place."""

    def __post_init__(self) -> None:
        for key in ("prefill_timeout_s", "gap_timeout_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be positive")


@dataclass(frozen=True, slots=True)
class Budget:
    """Of one wait for a worker, in seconds."""

    silence_s: float
    """Past it the worker has stalled."""
    left_s: float
    """Until the deadline, and what a stream to the worker is given as its timeout. Not positive: it has passed."""

    @property
    def call_timeout_s(self) -> float:
        """What a unary call to the worker is given: it stops by itself if our cancel never arrives."""
        return min(self.silence_s + CALL_SLACK_S, self.left_s)


@dataclass(frozen=True, slots=True)
class Budgets:
    """Of one request. ``deadline_at`` is the loop's time."""

    deadline_at: float
    limits: SilenceLimits

    def prefill(self, now: float) -> Budget:
        return Budget(self.limits.prefill_timeout_s, self.deadline_at - now)

    def handoff(self, now: float, *, computes_prompt: bool) -> Budget:
        """From a decode's order to its first sign. ``computes_prompt``: it brings no KV along."""
        limits = self.limits
        silence_s = max(limits.prefill_timeout_s, limits.gap_timeout_s) if computes_prompt else limits.gap_timeout_s
        return Budget(silence_s, self.deadline_at - now)

    def decode(self, now: float) -> Budget:
        """From one sign of a decode to the next."""
        return Budget(self.limits.gap_timeout_s, self.deadline_at - now)


@dataclass(frozen=True, slots=True)
class QueueBudget:
    """When a wait for a place is looked at again; the loop's times."""

    no_worker_at: float
    """Where no worker is ready at all: NO_WORKER."""
    last_word_at: float
    """Just before the deadline: a wait that was in vain still says why."""
    give_up_at: float
    """Whoever still waits has waited too long: QUEUE_FULL."""


def queue_budget(
    now: float, deadline_at: float, *, max_wait_s: float, no_worker_s: float, reply_margin_s: float
) -> QueueBudget:
    left_s = max(0.0, deadline_at - now)
    return QueueBudget(
        no_worker_at=now + no_worker_s,
        last_word_at=deadline_at - min(reply_margin_s, left_s / 4),
        give_up_at=now + max_wait_s,
    )


def time_allowed_s(remaining_s: float | None, *, default_s: float, max_s: float) -> float:
    """How long the server works on a call. ``remaining_s``: what the caller's own deadline leaves; None: it has none.
    At most ``max_s``."""
    if remaining_s is None:
        return min(default_s, max_s)
    margin_s = min(_MARGIN_MAX_S, remaining_s * _MARGIN_SHARE)
    return min(remaining_s - margin_s, max_s)

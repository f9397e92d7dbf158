"""Every way a Baton call fails, as one small family of exceptions.

An error has a reason (the machine's word), a message (what happened and what to do), metadata fit to
be shown to the caller, and the gRPC status it maps to. ``baton/status.py`` carries them over the wire
and back. Messages and metadata never contain prompt or output text.

Callers catch the class of what they can do something about; ``BatonError(...)`` makes the right one:

    InvalidRequest (PromptTooLong)  correct the request        Unavailable       retry
    ModelNotFound                   ask for another            Overloaded        retry after ``retry_after_s``
    Unauthenticated, NotPermitted   bring the right key        Interrupted       start over: tokens came already
    DeadlineExceeded                allow more time, or less   ResumeFailed      start over
    HandshakeFailed                 make TLS right             InternalError     tell us
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast


class Reason(enum.Enum):
    """Machine-readable reasons; the names and metadata are documented in ``errors.proto``."""

    INVALID_REQUEST = "INVALID_REQUEST"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    QUEUE_FULL = "QUEUE_FULL"
    NO_WORKER = "NO_WORKER"
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    DRAINING = "DRAINING"
    TICKET_REFUSED = "TICKET_REFUSED"
    ENGINE_FAILED = "ENGINE_FAILED"
    NO_ROOM = "NO_ROOM"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESUME_UNKNOWN = "RESUME_UNKNOWN"
    RESUME_DENIED = "RESUME_DENIED"
    RESUME_TOO_LATE = "RESUME_TOO_LATE"
    ATTACHED_ELSEWHERE = "ATTACHED_ELSEWHERE"
    TOO_MANY_RESUMABLE = "TOO_MANY_RESUMABLE"
    STALLED = "STALLED"
    READER_TOO_SLOW = "READER_TOO_SLOW"
    INTERNAL = "INTERNAL"


class StatusName(enum.Enum):
    """The gRPC status codes Baton uses, by name, so that nothing here imports grpc."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    ABORTED = "ABORTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One broken rule of a request: which field, and what it should be."""

    field: str
    description: str


class BatonError(Exception):
    """A failed call. ``status`` says what the caller may do; ``reason`` says why.

    Made by this name, it is of the subclass that fits reason and status. ``retry_after_s``: when a retry may succeed,
    if the server said so; None: it did not.
    """

    reason: Reason
    status: StatusName
    message: str
    metadata: dict[str, str]
    violations: tuple[FieldViolation, ...]
    retry_after_s: float | None

    def __new__(cls, reason: Reason, status: StatusName, *_: object, **__: object) -> Self:
        if cls is not BatonError:
            return super().__new__(cls)
        made = super().__new__(class_of(reason, status))
        return cast("Self", made)  # a subclass, of which this is the base

    def __init__(
        self,
        reason: Reason,
        status: StatusName,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @property
    def is_retryable(self) -> bool:
        """The same call may be sent again as it is: nothing of an answer came, and it was refused for a time only."""
        return self.status in (StatusName.UNAVAILABLE, StatusName.RESOURCE_EXHAUSTED)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status.value}/{self.reason.value}: {self.message}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also to another process, are whole."""
        what = (self.reason, self.status, self.message, self.metadata, self.violations, self.retry_after_s)
        return (_again, (type(self), *what))


class InvalidRequest(BatonError):
    """The request breaks a rule of the API; ``violations`` has every broken one. Sent again, it fails again."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the model's context, or no worker's KV cache."""


class ModelNotFound(BatonError):
    """No such model is served here; ``metadata["available"]`` names those that are."""


class Overloaded(BatonError):
    """Refused because too much is under way. Retry after ``retry_after_s``."""


class Unavailable(BatonError):
    """Nothing of an answer came: no worker, a server that drains, a lost connection. Retry."""


class HandshakeFailed(Unavailable):
    """No TLS with the server: its certificate is not trusted, expired or for another name, or it speaks none. The
    message says what to check, ``metadata["tls"]`` which of them it was. Sent again, the call fails again."""

    @property
    def is_retryable(self) -> bool:
        return False


class Interrupted(BatonError):
    """The answer broke off after ``metadata["emitted_token_count"]`` tokens. Start over, or let the client resume."""


class DeadlineExceeded(BatonError):
    """The time allowed was over; ``metadata["phase"]`` says in which phase, if the server could say it."""


class Unauthenticated(BatonError):
    """The server asks for an API key, and this is none it knows."""


class NotPermitted(BatonError):
    """The API key is good, but not for this."""


class ResumeFailed(BatonError):
    """The generation cannot be gone on with: unknown, another's, too late, or read by another call. Start over."""


class InternalError(BatonError):
    """A bug in Baton, or a server that does not speak this API."""


_CLASS_OF_REASON: dict[Reason, type[BatonError]] = {
    Reason.INVALID_REQUEST: InvalidRequest,
    Reason.PROMPT_TOO_LONG: PromptTooLong,
    Reason.MODEL_NOT_FOUND: ModelNotFound,
    Reason.DEADLINE_EXCEEDED: DeadlineExceeded,
    Reason.UNAUTHENTICATED: Unauthenticated,
    Reason.PERMISSION_DENIED: NotPermitted,
    Reason.RESUME_UNKNOWN: ResumeFailed,
    Reason.RESUME_DENIED: ResumeFailed,
    Reason.RESUME_TOO_LATE: ResumeFailed,
    Reason.ATTACHED_ELSEWHERE: ResumeFailed,
}
_CLASS_OF_STATUS: dict[StatusName, type[BatonError]] = {
    StatusName.UNAVAILABLE: Unavailable,
    StatusName.RESOURCE_EXHAUSTED: Overloaded,
    StatusName.ABORTED: Interrupted,
    StatusName.INTERNAL: InternalError,
}


def class_of(reason: Reason, status: StatusName) -> type[BatonError]:
    """The status decides where one reason has two (before the first token, and after it)."""
    return _CLASS_OF_REASON.get(reason) or _CLASS_OF_STATUS.get(status, BatonError)


def _again(
    kind: type[BatonError],
    reason: Reason,
    status: StatusName,
    message: str,
    metadata: dict[str, str],
    violations: tuple[FieldViolation, ...],
    retry_after_s: float | None,
) -> BatonError:
    return kind(reason, status, message, metadata=metadata, violations=violations, retry_after_s=retry_after_s)


def invalid_request(violations: Sequence[FieldViolation]) -> BatonError:
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return BatonError(
        Reason.INVALID_REQUEST,
        StatusName.INVALID_ARGUMENT,
        f"{first.field}: {first.description}{more}",
        violations=violations,
    )


def prompt_too_long(
    prompt_token_count: int, max_prompt_token_count: int, *, is_lower_bound: bool = False
) -> BatonError:
    """``is_lower_bound``: the prompt was so long that nobody counted it to the end."""
    count = f"at least {prompt_token_count}" if is_lower_bound else str(prompt_token_count)
    description = (
        f"has {count} tokens; at most {max_prompt_token_count} fit the model's context "
        "with one token of output. Shorten the prompt."
    )
    return BatonError(
        Reason.PROMPT_TOO_LONG,
        StatusName.INVALID_ARGUMENT,
        f"prompt: {description}",
        metadata={
            "prompt_token_count": str(prompt_token_count),
            "max_prompt_token_count": str(max_prompt_token_count),
        },
        violations=[FieldViolation("prompt", description)],
    )


def cache_too_small(prompt_token_count: int, wanted_block_count: int, block_count: int) -> BatonError:
    """PROMPT_TOO_LONG, said by a decode worker of its own KV cache: a larger one might take it."""
    description = (
        f"has {prompt_token_count} tokens and needs {wanted_block_count} KV blocks to be decoded; the worker has "
        f"{block_count}. Shorten the prompt, or give workers more KV memory."
    )
    return BatonError(
        Reason.PROMPT_TOO_LONG,
        StatusName.INVALID_ARGUMENT,
        f"prompt: {description}",
        metadata={
            "prompt_token_count": str(prompt_token_count),
            "wanted_block_count": str(wanted_block_count),
            "block_count": str(block_count),
        },
        violations=[FieldViolation("prompt", description)],
    )


def no_room(wanted_block_count: int, free_block_count: int, retry_after_s: float) -> BatonError:
    return BatonError(
        Reason.NO_ROOM,
        StatusName.RESOURCE_EXHAUSTED,
        f"{wanted_block_count} KV blocks are wanted and {free_block_count} are free; place it elsewhere, or later",
        metadata={"wanted_block_count": str(wanted_block_count), "free_block_count": str(free_block_count)},
        retry_after_s=retry_after_s,
    )


def model_not_found(model: str, available: Sequence[str]) -> BatonError:
    names = ", ".join(available)
    return BatonError(
        Reason.MODEL_NOT_FOUND,
        StatusName.NOT_FOUND,
        f"model {model!r} is not served here; served: {names}",
        metadata={"model": model, "available": names},
    )


def queue_full(queued_count: int, queue_limit: int, retry_after_s: float) -> BatonError:
    return BatonError(
        Reason.QUEUE_FULL,
        StatusName.RESOURCE_EXHAUSTED,
        f"{queued_count} requests are waiting already (limit {queue_limit}); retry in about {retry_after_s:.1f} s",
        metadata={"queued_count": str(queued_count), "queue_limit": str(queue_limit)},
        retry_after_s=retry_after_s,
    )


def too_many_calls(call_count: int, limit: int, retry_after_s: float) -> BatonError:
    """The same reason as a full queue, and the same cure."""
    return BatonError(
        Reason.QUEUE_FULL,
        StatusName.RESOURCE_EXHAUSTED,
        f"{call_count} calls run already (limit {limit}); retry in about {retry_after_s:.1f} s",
        metadata={"queued_count": str(call_count), "queue_limit": str(limit)},
        retry_after_s=retry_after_s,
    )


def no_worker(role: str, worker_count: int) -> BatonError:
    return BatonError(
        Reason.NO_WORKER,
        StatusName.UNAVAILABLE,
        f"no {role} worker is ready; the fleet restarts lost workers, so retry shortly",
        metadata={"role": role, "worker_count": str(worker_count)},
        retry_after_s=1.0,
    )


def attempts_exhausted(attempt_count: int, emitted_token_count: int, phase: str, last: str) -> BatonError:
    status = StatusName.UNAVAILABLE if emitted_token_count == 0 else StatusName.ABORTED
    advice = "retry" if emitted_token_count == 0 else "start over"
    return BatonError(
        Reason.ATTEMPTS_EXHAUSTED,
        status,
        f"gave up after {attempt_count} attempts, in {phase}: {last}; {advice}",
        metadata={
            "attempt_count": str(attempt_count),
            "emitted_token_count": str(emitted_token_count),
            "phase": phase,
        },
    )


def told_of_a_leg(error: BatonError) -> str:
    """What a caller may hear of an error inside: of a broken connection no addresses, which are the operator's."""
    return "the connection to a worker was lost" if "transport" in error.metadata else error.message


def deadline_exceeded(phase: str, emitted_token_count: int) -> BatonError:
    return BatonError(
        Reason.DEADLINE_EXCEEDED,
        StatusName.DEADLINE_EXCEEDED,
        f"the deadline passed in phase {phase} after {emitted_token_count} tokens",
        metadata={"phase": phase, "emitted_token_count": str(emitted_token_count)},
    )


def draining(emitted_token_count: int = 0, *, advice: str = "start over") -> BatonError:
    """``advice``: what the caller of an answer that was cut off after these tokens is to do."""
    if emitted_token_count == 0:
        return BatonError(Reason.DRAINING, StatusName.UNAVAILABLE, "this server is shutting down; retry elsewhere")
    return BatonError(
        Reason.DRAINING,
        StatusName.ABORTED,
        f"the router is shutting down, after {emitted_token_count} tokens; {advice}",
        metadata={"emitted_token_count": str(emitted_token_count)},
    )


def ticket_refused(check: str, detail: str = "") -> BatonError:
    return BatonError(
        Reason.TICKET_REFUSED,
        StatusName.FAILED_PRECONDITION,
        f"KV ticket refused: {check}{': ' + detail if detail else ''}",
        metadata={"check": check},
    )


def engine_failed(worker_id: str, detail: str) -> BatonError:
    return BatonError(
        Reason.ENGINE_FAILED,
        StatusName.UNAVAILABLE,
        f"worker {worker_id}: {detail}",
        metadata={"worker_id": worker_id},
    )


def unauthenticated() -> BatonError:
    return BatonError(
        Reason.UNAUTHENTICATED,
        StatusName.UNAUTHENTICATED,
        "this method is internal: present the cluster's secret",
    )


def no_api_key() -> BatonError:
    return BatonError(
        Reason.UNAUTHENTICATED,
        StatusName.UNAUTHENTICATED,
        "this server asks for an API key: send the metadata `authorization: Bearer KEY` with a key it knows",
    )


def permission_denied(detail: str) -> BatonError:
    return BatonError(Reason.PERMISSION_DENIED, StatusName.PERMISSION_DENIED, detail)


def resume_unknown() -> BatonError:
    return BatonError(
        Reason.RESUME_UNKNOWN,
        StatusName.NOT_FOUND,
        "no generation of this resume token is here: its grace is over, it was cancelled, or its router is gone; "
        "send the continuation along, or start over",
    )


def resume_denied() -> BatonError:
    """One text for every cause: it must not tell a stranger which tokens exist."""
    return BatonError(
        Reason.RESUME_DENIED,
        StatusName.PERMISSION_DENIED,
        "the resume token is not valid for this caller; use it with the API key, tenant and request it was made for",
    )


def resume_too_late(next_token_index: int, first_token_index: int) -> BatonError:
    return BatonError(
        Reason.RESUME_TOO_LATE,
        StatusName.OUT_OF_RANGE,
        f"token {next_token_index} has left the replay window, which begins at {first_token_index}; send the "
        "continuation along, or start over",
        metadata={"next_token_index": str(next_token_index), "first_token_index": str(first_token_index)},
    )


def attached_elsewhere() -> BatonError:
    return BatonError(
        Reason.ATTACHED_ELSEWHERE,
        StatusName.ABORTED,
        "another call attached to this generation and reads it now; a generation has one reader",
    )


def too_many_resumable(kept_count: int, limit: int, retry_after_s: float) -> BatonError:
    return BatonError(
        Reason.TOO_MANY_RESUMABLE,
        StatusName.RESOURCE_EXHAUSTED,
        f"{kept_count} resumable generations are kept already (limit {limit}); retry in about {retry_after_s:.1f} s, "
        "or leave `resume` out",
        metadata={"kept_count": str(kept_count), "limit": str(limit)},
        retry_after_s=retry_after_s,
    )


def reader_too_slow(unread_bytes: int, limit_bytes: int, emitted_token_count: int) -> BatonError:
    return BatonError(
        Reason.READER_TOO_SLOW,
        StatusName.ABORTED,
        f"the answer was not read: {unread_bytes} bytes of it waited (limit {limit_bytes}), and it ends after "
        f"{emitted_token_count} tokens; start over and read as it comes, or ask for fewer log probabilities",
        metadata={
            "unread_bytes": str(unread_bytes),
            "limit_bytes": str(limit_bytes),
            "emitted_token_count": str(emitted_token_count),
        },
    )


def stalled(phase: str, gap_s: float, emitted_token_count: int) -> BatonError:
    is_untouched = emitted_token_count == 0
    return BatonError(
        Reason.STALLED,
        StatusName.UNAVAILABLE if is_untouched else StatusName.ABORTED,
        f"no progress in phase {phase} for {gap_s:g} s, after {emitted_token_count} tokens; "
        f"{'retry' if is_untouched else 'start over'}",
        metadata={"phase": phase, "gap_s": f"{gap_s:g}", "emitted_token_count": str(emitted_token_count)},
    )


def internal(detail: str, generation_id: str = "") -> BatonError:
    return BatonError(
        Reason.INTERNAL,
        StatusName.INTERNAL,
        f"a bug in Baton: {detail}",
        metadata={"generation_id": generation_id} if generation_id else {},
    )

"""Where resumable generations are opened, found again, and gone on with from what their caller has.

Owns the order of the checks: seal, caller, time, then whether the generation is here, then whether the continuation
is of the request that the token was made for. No protobuf and no sockets: ``service.py`` is the edge.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from baton.errors import BatonError, FieldViolation, Reason, draining, invalid_request, resume_denied, resume_unknown
from baton.metrics import RouterMetrics
from baton.request import GenerateRequest
from router.answering import RelayEvent
from router.callers import Caller
from router.intake import Intake, Prepared
from router.pipeline import Pipeline
from router.resuming.beginning import Beginning, check_beginning
from router.resuming.resumables import About, Resumable, Resumables
from router.resuming.resume_token import ResumeClaim, open_claim, seal_claim
from router.validation import ModelLimits
from router.wall_clock import Now


@dataclass(frozen=True, slots=True)
class Continuation:
    """A request, and what its caller has of the answers."""

    request: GenerateRequest
    violations: tuple[FieldViolation, ...]
    """Found while the message was read."""
    digest: str
    samples: tuple[tuple[int, ...], ...] = field(repr=False)


class ResumeDesk:
    """One per router."""

    def __init__(
        self,
        *,
        resumables: Resumables,
        intake: Intake,
        pipeline: Pipeline,
        metrics: RouterMetrics,
        secret: bytes,
        now: Now,
    ) -> None:
        self.resumables = resumables
        self._intake = intake
        self._pipeline = pipeline
        self._metrics = metrics
        self._secret = secret
        self._now = now

    def claim(self, token: str, caller: Caller) -> ResumeClaim:
        """Raises RESUME_DENIED for a token that is not this caller's, with one text for every cause."""
        claim = open_claim(token, self._secret)
        if claim.identity != caller.identity:
            raise resume_denied()
        return claim

    def open(self, prepared: Prepared, caller: Caller, digest: str) -> Resumable:
        """Begins a generation. Raises TOO_MANY_RESUMABLE."""
        return self._open(prepared, caller.identity, digest)

    def cancel(self, claim: ResumeClaim) -> bool:
        return self.resumables.cancel(claim.generation_id)

    def find(
        self, claim: ResumeClaim, next_indices: Sequence[int], continuation: Continuation | None
    ) -> Resumable | None:
        """The generation, if it is here and can be read from there. One that failed, or whose window has moved on,
        is left for the continuation, if there is one. Raises INVALID_REQUEST."""
        found = self.resumables.find(claim.generation_id)
        if found is None or claim.is_over(self._now()):
            return None
        if continuation is not None:
            if found.could_continue:
                return None
            try:
                found.window.cursor(next_indices)
            except BatonError as error:
                if error.reason is not Reason.RESUME_TOO_LATE:
                    raise
                return None
        self._metrics.resumes.labels("attached").inc()
        return found

    async def go_on(
        self,
        claim: ResumeClaim,
        caller: Caller,
        continuation: Continuation | None,
        next_indices: Sequence[int],
        *,
        received_at: float,
        is_draining: bool,
    ) -> Resumable:
        """What is not here, computed on from what the caller has. Raises RESUME_UNKNOWN, RESUME_DENIED, DRAINING, and
        what a new request may meet."""
        now = self._now()
        if is_draining:
            raise draining()
        if continuation is None or claim.is_over(now):
            raise resume_unknown()
        if continuation.digest != claim.request_digest:
            raise resume_denied()
        beginnings = _beginnings(continuation, next_indices)
        deadline_at = received_at + max(0.0, claim.deadline_at - now)
        prepared = await self._intake.prepare(
            replace(continuation.request, tenant=caller.tenant),
            continuation.violations,
            deadline_at=deadline_at,
            received_at=received_at,
        )
        await _check_vocabulary(beginnings, self._intake.limits())
        for each in beginnings:
            check_beginning(prepared.routed, each)
            await asyncio.sleep(0)  # others' turn: each may be as long as the context
        prepared = await self._pipeline.read_again(prepared, beginnings)
        resumable = self._open(
            prepared,
            claim.identity,
            claim.request_digest,
            formerly=claim.generation_id,
            first_indices=[each.next_index for each in beginnings],
        )
        self._metrics.resumes.labels("continued").inc()
        return resumable

    def _open(
        self,
        prepared: Prepared,
        identity: str,
        digest: str,
        *,
        formerly: str = "",
        first_indices: Sequence[int] | None = None,
    ) -> Resumable:
        asked = prepared.request.resume
        assert asked is not None, "only a request that asked for it is resumable"
        grace_s = self.resumables.limits.grace_s(asked.grace_s)
        now = self._now()
        deadline_at = now + prepared.deadline_at - asyncio.get_running_loop().time()
        token = seal_claim(
            ResumeClaim(
                generation_id=prepared.routed.generation_id,
                identity=identity,
                request_digest=digest,
                issued_at=now,
                deadline_at=deadline_at,
                expires_at=deadline_at + grace_s,
            ),
            self._secret,
        )
        about = About(
            generation_id=prepared.routed.generation_id,
            identity=identity,
            output=prepared.request.output,
            model=prepared.model,
            prompt_token_count=len(prepared.routed.prompt_token_ids),
            deadline_at=prepared.deadline_at,
            grace_s=grace_s,
            resume_token=token,
            formerly=formerly,
        )

        def events() -> AsyncGenerator[RelayEvent, None]:
            return self._pipeline.run(prepared)

        return self.resumables.open(about, events, first_indices=first_indices or [0] * prepared.request.sample_count)


def _beginnings(continuation: Continuation, next_indices: Sequence[int]) -> tuple[Beginning, ...]:
    """What the caller has of each sample. Raises INVALID_REQUEST where it contradicts itself."""
    count = continuation.request.sample_count
    if not continuation.request.output.wants_token_ids:
        raise _invalid("continuation.request.output.content", "has no token ids, so nobody knows them; ask for BOTH")
    # Left out, they are what a caller has of answers that had not begun.
    samples = continuation.samples or ((),) * count
    if len(samples) != count or len(next_indices) != count:
        raise _invalid(
            "continuation.samples",
            f"has {len(samples)} of {count} samples, next indices {len(next_indices)}; give all",
        )
    beginnings = []
    for number, (token_ids, index) in enumerate(zip(samples, next_indices, strict=True)):
        if not len(token_ids) <= index <= len(token_ids) + 1:
            raise _invalid(
                f"continuation.samples[{number}].ids",
                f"has {len(token_ids)} tokens, and {index} is the next; send all that were received",
            )
        beginnings.append(Beginning(token_ids, has_tail=index > len(token_ids)))
    return tuple(beginnings)


async def _check_vocabulary(beginnings: Sequence[Beginning], limits: ModelLimits) -> None:
    """Raises INVALID_REQUEST for tokens that are none of the model's."""
    violations = []
    for number, each in enumerate(beginnings):
        await asyncio.sleep(0)  # others' turn
        ids = each.token_ids
        if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
            index = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < limits.vocab_size)
            violations.append(
                FieldViolation(
                    f"continuation.samples[{number}].ids",
                    f"is {ids[index]} at index {index}; must be 0 to {limits.vocab_size - 1}, a token id of "
                    f"{limits.model}; send what was received",
                )
            )
    if violations:
        raise invalid_request(violations)


def _invalid(field_name: str, description: str) -> Exception:
    return invalid_request([FieldViolation(field_name, description)])

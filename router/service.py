"""GenerationService on gRPC: takes a call, has its request prepared, and has what comes back written.

Thin. Owns the order of a call's steps, its deadline and its errors; never decides where anything runs. No header is
sent before the relay has admitted the request, so that a refusal travels as trailers only and gRPC's own retry may
repeat it. The log line of a request is the relay's.

    intake: check, encode -> pipeline: Admitted, Piece ..., Completed -> stream_writer: Started, Chunk ..., Finished
                                     '-- resumable: a task of its own fills a window that calls read from
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from baton.errors import BatonError, Reason, draining, internal, too_many_calls
from baton.metrics import RouterMetrics, outcome_of
from baton.status import PUSHBACK_KEY, to_rpc_status
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from router.budgets import time_allowed_s
from router.call_places import ROOM_S
from router.callers import AUTHORIZATION_KEY, Caller, Callers
from router.intake import Intake, Prepared
from router.phase_window import PhaseWindow
from router.pipeline import Pipeline
from router.resuming.resumables import About, Resumable
from router.resuming.resume_desk import ResumeDesk
from router.resuming.service_resuming import continuation_from_proto, next_indices_of, request_digest
from router.service_events import started_to_proto
from router.service_lengths import check_continuation_lengths, check_lengths
from router.service_messages import request_from_proto
from router.stream_writer import StreamWriter

SERVICE_NAME = "baton.v1.GenerationService"

_GOODBYE_S = 0.5
"""How long the status of a refused call may wait for the caller to read what is before it."""

logger = logging.getLogger("baton.router")

_generation_id: ContextVar[str] = ContextVar("generation_id", default="")
"""Of the call that this task serves, once it has one: what a caller quotes to us when something broke."""


class GenerationService(pb_grpc.GenerationServiceServicer):
    """One per process. ``begin_drain`` makes it refuse; ``wait_idle`` says when the last call has ended."""

    def __init__(
        self,
        *,
        intake: Intake,
        pipeline: Pipeline,
        metrics: RouterMetrics,
        window: PhaseWindow,
        callers: Callers,
        desk: ResumeDesk,
        default_deadline_s: float,
        max_deadline_s: float,
        max_call_count: int,
    ) -> None:
        """``max_call_count``: that run here at once, cancels apart, which make room; further ones get QUEUE_FULL."""
        self._intake = intake
        self._pipeline = pipeline
        self._metrics = metrics
        self._window = window
        self._callers = callers
        self._desk = desk
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self._max_call_count = max_call_count
        # The mutable state: calls that run, those whose status is not sent besides, and whether new ones may.
        self.call_count = 0
        self.open_count = 0
        self.ended_count = 0
        self.failed_count = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        await self._counted(self._generate, request, context)

    async def ResumeGenerate(self, request: pb.ResumeGenerateRequest, context: Any) -> None:
        await self._counted(self._resume, request, context)

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Any
    ) -> pb.CancelGenerationResponse | None:
        was_running = False

        async def cancel(message: pb.CancelGenerationRequest, context: Any, received_at: float) -> None:
            nonlocal was_running
            caller = caller_of(self._callers, context, message.tenant)
            was_running = self._desk.cancel(self._desk.claim(message.resume_token, caller))

        if not await self._counted(cancel, request, context, makes_room=True):
            return None  # the call has its status already
        return pb.CancelGenerationResponse(was_running=was_running)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def begin_drain(self) -> None:
        """From now on new calls get DRAINING; those that run go on, and what runs here may be attached to."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no call runs and each has its status. Bound it with a timeout."""
        await self._idle.wait()

    async def refuse_unread(self, context: Any, error: BatonError) -> None:
        """Ends a call that came as no message."""
        with self._until_status():
            self._ended(is_ok=False)
            await refuse(context, error)

    async def _counted(
        self,
        serve: Callable[[Any, Any, float], Awaitable[None]],
        request: Any,
        context: Any,
        *,
        makes_room: bool = False,
    ) -> bool:
        """Runs one call and ends it with its status, whatever happens. Whether it went well."""
        with self._until_status():
            failure = await self._failure_of(serve, request, context, makes_room)
            if failure is not None:
                await refuse(context, _named(failure))
            return failure is None

    async def _failure_of(
        self, serve: Callable[[Any, Any, float], Awaitable[None]], request: Any, context: Any, makes_room: bool
    ) -> BatonError | None:
        """Runs one call."""
        received_at = asyncio.get_running_loop().time()
        _generation_id.set("")
        if self.call_count >= self._max_call_count and not makes_room:
            # Counted here, and not by gRPC: to it a call is open until its caller has read the end, if ever.
            error = too_many_calls(self.call_count, self._max_call_count, ROOM_S)
            self._metrics.request_ended(outcome_of(error))
            self._ended(is_ok=False)
            return error
        self.call_count += 1
        failure: BatonError | None = None
        is_ok = False
        try:
            await serve(request, context, received_at)
            is_ok = True
        except BatonError as error:
            failure = error
        except Exception as error:
            # A write to a caller who is gone raises whatever gRPC pleases; that is no bug of ours.
            if not context.done() and not isinstance(error, grpc.aio.BaseError):
                logger.exception("a bug in Baton, met by %s", _generation_id.get() or "a call without a generation")
            failure = internal(type(error).__name__)
        finally:
            self.call_count -= 1
            self._ended(is_ok=is_ok)
        return failure

    @contextmanager
    def _until_status(self) -> Iterator[None]:
        """A call, until its status is sent: a router that stops waits for no less."""
        self.open_count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.open_count -= 1
            if self.open_count == 0:
                self._idle.set()

    def _ended(self, *, is_ok: bool) -> None:
        self.ended_count += 1
        self.failed_count += not is_ok

    async def _generate(self, message: pb.GenerateRequest, context: Any, received_at: float) -> None:
        deadline_at = received_at + self._time_allowed_s(context)
        if self._is_draining:
            error = draining()
            self._metrics.request_ended(outcome_of(error))
            raise error
        try:
            caller = caller_of(self._callers, context, message.tenant)
            check_lengths(message, self._intake.limits)
        except BatonError as error:
            self._metrics.request_ended(outcome_of(error))
            raise
        request, violations = request_from_proto(message)
        if caller.tenant != request.tenant:
            request = replace(request, tenant=caller.tenant)
        prepared = await self._intake.prepare(request, violations, deadline_at=deadline_at, received_at=received_at)
        _generation_id.set(prepared.routed.generation_id)
        if request.resume is not None:
            resumable = self._open(prepared, caller, message)
            events = resumable.read([0] * request.sample_count)
            started = _started(resumable.about, prepared.time_allowed_s, pb.GenerateResponse)
        else:
            events = self._pipeline.run(prepared)
            started = started_to_proto(
                prepared.routed.generation_id,
                prepared.model,
                len(prepared.routed.prompt_token_ids),
                time_allowed_s=prepared.time_allowed_s,
            )
        writer = StreamWriter(
            context,
            response=pb.GenerateResponse,
            started=started,
            output=request.output,
            window=self._window,
            deadline_at=deadline_at,
            reader=prepared.routed.reader if request.resume is None else None,
        )
        await writer.write_all(events)

    def _open(self, prepared: Prepared, caller: Caller, message: pb.GenerateRequest) -> Resumable:
        try:
            return self._desk.open(prepared, caller, request_digest(message))
        except BatonError as error:
            self._metrics.request_ended(outcome_of(error))
            raise

    async def _resume(self, message: pb.ResumeGenerateRequest, context: Any, received_at: float) -> None:
        until = received_at + self._time_allowed_s(context)
        caller = caller_of(self._callers, context, message.tenant)
        claim = self._desk.claim(message.resume_token, caller)
        check_continuation_lengths(message, self._intake.limits)
        next_indices = next_indices_of(message)
        continuation = continuation_from_proto(message)
        resumable = self._desk.find(claim, next_indices, continuation)
        if resumable is None:
            resumable = await self._desk.go_on(
                claim,
                caller,
                continuation,
                next_indices,
                received_at=received_at,
                is_draining=self._is_draining,
            )
        about = resumable.about
        # What has ended is only read: its own deadline, which may be past, cuts nothing off.
        ends_at = min(until, about.deadline_at) if resumable.window.last is None else until
        _generation_id.set(about.generation_id)
        writer = StreamWriter(
            context,
            response=pb.ResumeGenerateResponse,
            started=_started(about, ends_at - received_at, pb.ResumeGenerateResponse),
            output=about.output,
            window=self._window,
            deadline_at=until,
        )
        await writer.write_all(resumable.read(next_indices, until=until))

    def _time_allowed_s(self, context: Any) -> float:
        return time_allowed_s(
            context.time_remaining(), default_s=self._default_deadline_s, max_s=self._max_deadline_s
        )


def check_key(callers: Callers, context: Any) -> None:
    """For calls that are of no tenant. Raises UNAUTHENTICATED."""
    caller_of(callers, context, "")


def caller_of(callers: Callers, context: Any, tenant: str) -> Caller:
    """Raises UNAUTHENTICATED and PERMISSION_DENIED."""
    if not callers.asks_for_keys:
        return callers.identify(None, tenant)
    metadata = context.invocation_metadata() or ()
    authorization = next((value for key, value in metadata if key == AUTHORIZATION_KEY), None)
    return callers.identify(authorization if isinstance(authorization, str) else None, tenant)


def _started(about: About, time_allowed_s: float, response: Any) -> Any:
    return started_to_proto(
        about.generation_id,
        about.model,
        about.prompt_token_count,
        time_allowed_s=time_allowed_s,
        resume_token=about.resume_token,
        resume_grace_s=about.grace_s,
        response=response,
    )


def _named(error: BatonError) -> BatonError:
    """INTERNAL with the id of this call's generation, if it has one, by which we find it in our log."""
    generation_id = _generation_id.get()
    if error.reason is Reason.INTERNAL and generation_id:
        error.metadata.setdefault("generation_id", generation_id)
    return error


async def refuse(context: Any, error: BatonError) -> None:
    """Ends the call with ``error``. A caller who would have to wait past its deadline before it may retry is told
    not to (push-back -1): otherwise gRPC would sit out the rest of the deadline and hide our reason behind it."""
    code, text, trailers = to_rpc_status(error)
    remaining_s: float | None = context.time_remaining()
    if error.retry_after_s is not None and remaining_s is not None and error.retry_after_s >= remaining_s:
        trailers = tuple((key, "-1" if key == PUSHBACK_KEY else value) for key, value in trailers)
    try:
        async with asyncio.timeout(_GOODBYE_S):
            await context.abort(code, text, trailers)
    except TimeoutError:
        return  # gRPC keeps the status behind what the caller does not read; the call is over for us
    except grpc.aio.InternalError:
        # Nobody is there any more, as far as gRPC lets us know: it says the same of a write given up half-way, which
        # ``StreamWriter`` therefore leaves behind for a caller who does not read only.
        logger.debug("the status %s (%s) reached nobody", code.name, error.reason.value)

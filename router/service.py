"""GenerationService on gRPC: checks, tokenises, hands over to the relay, and writes what comes back.

Thin. Owns the order of a call's steps, its deadline and its errors; never decides where anything runs. No header is
sent before the relay has admitted the request, so that a refusal travels as trailers only and gRPC's own retry may
repeat it. The log line of a request is the relay's.

    check -> encode -> relay.run: Admitted -> Started | Piece -> Chunk | Completed -> Finished
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import grpc
import grpc.aio

from baton.errors import BatonError, deadline_exceeded, draining, internal
from baton.metrics import RouterMetrics, outcome_of
from baton.request import GenerateRequest
from baton.status import PUSHBACK_KEY, to_rpc_status
from baton.timeline import Phase
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from router.answer import TextAnswer
from router.answering import Admitted, Answer, Completed, Piece, RelayEvent, RoutedRequest
from router.phase_window import PhaseWindow
from router.prompt_encoder import PromptEncoder
from router.service_messages import chunk_to_proto, finished_to_proto, request_from_proto, started_to_proto
from router.tokenizer import Tokenizer
from router.validation import ModelLimits, check, resolved_output_token_count

SERVICE_NAME = "baton.v1.GenerationService"

_MARGIN_SHARE, _MARGIN_MAX_S = 0.05, 0.05
"""We stop this much before the caller's deadline (5 %, at most 50 ms), so that the caller learns from us in which
phase the time ran out instead of only that it did."""
_WRITE_GRACE_S = 0.25
"""A write that is still waiting for a caller to read so long after the deadline is given up."""
_GOODBYE_S = 0.5
"""How long the status of a refused call may wait for the caller to read what is before it."""

logger = logging.getLogger("baton.router")


class Relay(Protocol):
    """What this needs of ``relay.Relay``."""

    def run(
        self, request: RoutedRequest, answer: Answer, deadline_at: float, *, received_at: float
    ) -> AsyncGenerator[RelayEvent, None]: ...


class GenerationService(pb_grpc.GenerationServiceServicer):
    """One per process. ``begin_drain`` makes it refuse; ``wait_idle`` says when the last call has ended."""

    def __init__(
        self,
        *,
        relay: Relay,
        tokenizer: Tokenizer,
        encoder: PromptEncoder,
        limits: Callable[[], ModelLimits],
        metrics: RouterMetrics,
        window: PhaseWindow,
        default_deadline_s: float,
        max_deadline_s: float,
        new_id: Callable[[], str] = lambda: f"gen-{secrets.token_hex(12)}",
    ) -> None:
        """``limits``: asked for each request, since the workers' context may be smaller than the model's."""
        self._relay = relay
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._limits = limits
        self._metrics = metrics
        self._window = window
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self._new_id = new_id
        # The mutable state: calls that run, and whether new ones may.
        self.call_count = 0
        self.ended_count = 0
        self.failed_count = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        received_at = asyncio.get_running_loop().time()
        self.call_count += 1
        self._idle.clear()
        failure: BatonError | None = None
        is_ok = False
        try:
            await self._generate(request, context, received_at)
            is_ok = True
        except BatonError as error:
            failure = error
        except Exception as error:
            # A write to a caller who is gone raises whatever gRPC pleases; that is no bug of ours.
            if not context.done() and not isinstance(error, grpc.aio.BaseError):
                logger.exception("a bug in Baton")
            failure = internal(type(error).__name__)
        finally:
            self.call_count -= 1
            self.ended_count += 1
            self.failed_count += not is_ok
            if self.call_count == 0:
                self._idle.set()
        if failure is not None:
            await _refuse(context, failure)

    def begin_drain(self) -> None:
        """From now on new calls get DRAINING; those that run go on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no call runs. Bound it with a timeout."""
        await self._idle.wait()

    async def _generate(self, message: pb.GenerateRequest, context: Any, received_at: float) -> None:
        deadline_at = received_at + self._time_allowed_s(context)
        try:
            if self._is_draining:
                raise draining()
            request, violations = request_from_proto(message)
            limits = self._limits()
            check(request, limits, violations)
            try:
                async with asyncio.timeout_at(deadline_at):
                    prompt_token_ids = await self._encoder.encode(request.prompt, limits)
            except TimeoutError:
                raise deadline_exceeded("queue", 0) from None
        except BatonError as error:
            # The relay accounts for what it took on; what never reached it is accounted for here.
            self._metrics.request_ended(outcome_of(error))
            raise
        routed = self._routed(request, prompt_token_ids, limits)
        answer = TextAnswer(
            self._tokenizer,
            request.output,
            stop_sequences=request.stop.stop_sequences,
            silent_token_ids=routed.end_token_ids,
            min_token_count=routed.min_output_token_count,
        )
        await self._stream(request, routed, answer, limits.model, deadline_at, received_at, context)

    async def _stream(
        self,
        request: GenerateRequest,
        routed: RoutedRequest,
        answer: TextAnswer,
        model: str,
        deadline_at: float,
        received_at: float,
        context: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        last_tokens_at: float | None = None
        written_token_count = 0

        async def write(message: Any) -> None:
            # A caller without a deadline of its own that does not read would keep the call, and its place among the
            # calls there may be, for ever: what the relay has to say of the deadline, it would not hear.
            try:
                async with asyncio.timeout_at(deadline_at + _WRITE_GRACE_S):
                    await context.write(message)
            except TimeoutError:
                raise deadline_exceeded(Phase.DECODE.value, written_token_count) from None

        # aclosing: leaving in any way, a failed write included, ends the relay's legs before this call ends.
        async with aclosing(self._relay.run(routed, answer, deadline_at, received_at=received_at)) as events:
            async for event in events:
                match event:
                    case Admitted():
                        await write(started_to_proto(routed.generation_id, model, len(routed.prompt_token_ids)))
                    case Piece():
                        if not event.token_ids and not event.text:
                            continue
                        now = loop.time()
                        if event.token_ids:
                            if last_tokens_at is not None:
                                self._window.gap(now - last_tokens_at, now)
                            last_tokens_at = now
                        await write(
                            chunk_to_proto(
                                event.first_token_index, event.token_ids, event.text, request.output, event.logprobs
                            )
                        )
                        written_token_count += event.token_count
                    case Completed():
                        self._window.finished(event.report, event.usage.prompt_token_count, loop.time())
                        await write(
                            finished_to_proto(
                                event.reason,
                                event.matched_stop_sequence,
                                event.matched_stop_token_id,
                                event.usage,
                                event.report,
                                event.cumulative_logprob,
                            )
                        )

    def _routed(
        self, request: GenerateRequest, prompt_token_ids: tuple[int, ...], limits: ModelLimits
    ) -> RoutedRequest:
        asked = request.stop.max_output_token_count
        max_output = resolved_output_token_count(asked, len(prompt_token_ids), limits)
        return RoutedRequest(
            generation_id=self._new_id(),
            prompt_token_ids=prompt_token_ids,
            max_output_token_count=max_output,
            sampling=request.sampling,
            stop_token_ids=request.stop.stop_token_ids,
            eos_token_ids=self._tokenizer.eos_token_ids,
            ignore_eos=request.stop.ignore_eos,
            is_context_bound=asked is None or asked > max_output,
            max_chunk_token_count=request.output.max_chunk_token_count,
            priority=request.priority,
            session_id=request.session_id,
            correlation_id=request.correlation_id,
            # An answer that the context cuts short has its end there, whatever was to be its least.
            min_output_token_count=min(request.stop.min_output_token_count, max_output),
            top_logprob_count=request.output.top_logprob_count,
            tenant=request.tenant,
        )

    def _time_allowed_s(self, context: Any) -> float:
        remaining_s: float | None = context.time_remaining()
        if remaining_s is None:
            return self._default_deadline_s
        margin_s = min(_MARGIN_MAX_S, remaining_s * _MARGIN_SHARE)
        return min(remaining_s - margin_s, self._max_deadline_s)


async def _refuse(context: Any, error: BatonError) -> None:
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
        return  # nobody is there any more

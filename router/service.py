"""GenerationService on gRPC: takes a call, has its request prepared, and has what comes back written.

Thin. Owns the order of a call's steps, its deadline and its errors; never decides where anything runs. No header is
sent before the relay has admitted the request, so that a refusal travels as trailers only and gRPC's own retry may
repeat it. The log line of a request is the relay's.

    intake: check, encode -> pipeline: Admitted, Piece ..., Completed -> stream_writer: Started, Chunk ..., Finished
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from baton.errors import BatonError, draining, internal
from baton.metrics import RouterMetrics, outcome_of
from baton.status import PUSHBACK_KEY, to_rpc_status
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from router.budgets import time_allowed_s
from router.intake import Intake
from router.phase_window import PhaseWindow
from router.pipeline import Pipeline
from router.service_events import started_to_proto
from router.service_messages import request_from_proto
from router.stream_writer import StreamWriter

SERVICE_NAME = "baton.v1.GenerationService"

_GOODBYE_S = 0.5
"""How long the status of a refused call may wait for the caller to read what is before it."""

logger = logging.getLogger("baton.router")


class GenerationService(pb_grpc.GenerationServiceServicer):
    """One per process. ``begin_drain`` makes it refuse; ``wait_idle`` says when the last call has ended."""

    def __init__(
        self,
        *,
        intake: Intake,
        pipeline: Pipeline,
        metrics: RouterMetrics,
        window: PhaseWindow,
        default_deadline_s: float,
        max_deadline_s: float,
    ) -> None:
        self._intake = intake
        self._pipeline = pipeline
        self._metrics = metrics
        self._window = window
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        # The mutable state: calls that run, and whether new ones may.
        self.call_count = 0
        self.ended_count = 0
        self.failed_count = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        await self._counted(self._generate, request, context)

    def begin_drain(self) -> None:
        """From now on new calls get DRAINING; those that run go on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no call runs. Bound it with a timeout."""
        await self._idle.wait()

    async def _counted(self, serve: Callable[[Any, Any, float], Awaitable[None]], request: Any, context: Any) -> None:
        """Runs one call and ends it with its status, whatever happens."""
        received_at = asyncio.get_running_loop().time()
        self.call_count += 1
        self._idle.clear()
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
                logger.exception("a bug in Baton")
            failure = internal(type(error).__name__)
        finally:
            self.call_count -= 1
            self.ended_count += 1
            self.failed_count += not is_ok
            if self.call_count == 0:
                self._idle.set()
        if failure is not None:
            await refuse(context, failure)

    async def _generate(self, message: pb.GenerateRequest, context: Any, received_at: float) -> None:
        deadline_at = received_at + self._time_allowed_s(context)
        if self._is_draining:
            error = draining()
            self._metrics.request_ended(outcome_of(error))
            raise error
        request, violations = request_from_proto(message)
        prepared = await self._intake.prepare(request, violations, deadline_at=deadline_at, received_at=received_at)
        routed = prepared.routed
        writer = StreamWriter(
            context,
            response=pb.GenerateResponse,
            started=started_to_proto(
                routed.generation_id,
                prepared.model,
                len(routed.prompt_token_ids),
                time_allowed_s=prepared.time_allowed_s,
            ),
            output=request.output,
            window=self._window,
            deadline_at=deadline_at,
        )
        await writer.write_all(self._pipeline.run(prepared))

    def _time_allowed_s(self, context: Any) -> float:
        return time_allowed_s(
            context.time_remaining(), default_s=self._default_deadline_s, max_s=self._max_deadline_s
        )


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
        return  # nobody is there any more

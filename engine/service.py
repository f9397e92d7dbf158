"""WorkerService on the wire, and how every worker service answers errors.

Protobuf stops here. Owns no state: identity and load come from the worker process, whose host attaches this.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from baton.errors import BatonError, FieldViolation, deadline_exceeded, internal, invalid_request
from baton.leg import WorkerInfo, WorkerLoad
from baton.request import Role
from baton.status import abort
from baton.worker.v1 import worker_pb2, worker_pb2_grpc
from engine.introductions import Introductions
from engine.legs import is_duration
from engine.load_board import LoadBoard
from engine.protocol import EngineInfo

logger = logging.getLogger(__name__)

SERVICE = "baton.worker.v1.WorkerService"

DEFAULT_INTERVAL_MS = 250
MIN_INTERVAL_MS = 20
MAX_INTERVAL_MS = 10_000
MAX_DRAIN_S = 3600.0
MAX_CALL_S = 3600.0
"""For callers that set no deadline."""
MIN_REPORT_GAP_S = 0.005
"""Changes closer than this share a report: a burst of arrivals is not a burst of messages."""


@asynccontextmanager
async def answering(context: Any, phase: str, *, max_s: float | None = MAX_CALL_S) -> AsyncIterator[None]:
    """Runs a handler's body: within the caller's deadline and ``max_s``; failures leave as rich statuses.

    A peer that left while we wrote to it (grpc.aio raises ``InternalError``, not a cancellation) is no error:
    the body's ``finally`` blocks have run, and there is nobody to answer.
    """
    limits_s = [limit_s for limit_s in (context.time_remaining(), max_s) if limit_s is not None]
    try:
        async with failing_as_ours(phase, min(limits_s, default=None)):
            yield
    except BatonError as error:
        await abort(context, error)
    except grpc.aio.InternalError:
        logger.info("the caller of a %s left while we wrote to it", phase)


@asynccontextmanager
async def failing_as_ours(phase: str, limit_s: float | None) -> AsyncIterator[None]:
    """Runs a body within ``limit_s``; whatever fails leaves as a ``BatonError``, but for gRPC's own words."""
    try:
        async with asyncio.timeout(limit_s) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise _bug(phase, error) from None
        raise deadline_exceeded(phase, 0) from None
    except (BatonError, grpc.aio.AbortError, grpc.aio.InternalError):
        raise
    except Exception as error:
        raise _bug(phase, error) from None


def _bug(phase: str, error: Exception) -> BatonError:
    # The frames, not the text: the text of a foreign exception may quote a prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a %s handler raised %s:\n%s", phase, type(error).__name__, frames)
    return internal(f"a {phase} handler raised {type(error).__name__}")


def worker_info(
    engine: EngineInfo, *, worker_id: str, epoch: str, role: Role, transfer_peer: bytes = b""
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        model=engine.model,
        max_context_token_count=engine.max_context_token_count,
        block_token_count=engine.block_token_count,
        block_count=engine.block_count,
        max_running_count=engine.max_running_count,
        kv_bytes_per_token=engine.kv_bytes_per_token,
        engine=engine.name,
        vocab_size=engine.vocab_size,
        transfer_peer=transfer_peer,
    )


def info_to_proto(info: WorkerInfo) -> worker_pb2.GetWorkerInfoResponse:
    return worker_pb2.GetWorkerInfoResponse(
        worker_id=info.worker_id,
        epoch=info.epoch,
        role=info.role.value,
        model=info.model,
        max_context_token_count=info.max_context_token_count,
        block_token_count=info.block_token_count,
        block_count=info.block_count,
        max_running_count=info.max_running_count,
        kv_bytes_per_token=info.kv_bytes_per_token,
        engine=info.engine,
        vocab_size=info.vocab_size,
        transfer_peer=info.transfer_peer,
    )


def load_to_proto(load: WorkerLoad) -> worker_pb2.WatchLoadResponse:
    return worker_pb2.WatchLoadResponse(
        epoch=load.epoch,
        running_count=load.running_count,
        waiting_count=load.waiting_count,
        used_block_count=load.used_block_count,
        block_count=load.block_count,
        held_lease_count=load.held_lease_count,
        quarantined_pull_count=load.quarantined_pull_count,
        reserved_block_count=load.reserved_block_count,
        no_room_count=load.no_room_count,
        is_draining=load.is_draining,
    )


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Identity, load, introductions and drain of one worker process."""

    def __init__(self, info: WorkerInfo, board: LoadBoard, introductions: Introductions) -> None:
        self._info = info
        self._board = board
        self._introductions = introductions

    async def GetWorkerInfo(self, request: Any, context: Any) -> worker_pb2.GetWorkerInfoResponse:
        return info_to_proto(self._info)

    async def WatchLoad(self, request: Any, context: Any) -> None:
        # As long as the caller listens; a connection that died without a word is found by keepalive pings.
        async with answering(context, "watch", max_s=None):
            interval_ms = request.interval_ms or DEFAULT_INTERVAL_MS
            if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
                what = f"must be within {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}, or 0 for {DEFAULT_INTERVAL_MS}"
                raise invalid_request([FieldViolation("interval_ms", what)])
            while True:
                version = self._board.version  # BEFORE the counts are read: a change in between is told next
                await context.write(load_to_proto(self._board.current()))
                await asyncio.sleep(MIN_REPORT_GAP_S)
                await self._board.wait_past(version, interval_ms / 1000 - MIN_REPORT_GAP_S)

    async def GetLoad(self, request: Any, context: Any) -> worker_pb2.GetLoadResponse:
        async with answering(context, "load"):
            load = await self._board.audited()
            names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
            return worker_pb2.GetLoadResponse(load=load_to_proto(load), task_counts=names)

    async def Introduce(self, request: Any, context: Any) -> worker_pb2.IntroduceResponse:
        async with answering(context, "introduce"):
            results = await self._introductions.introduce(request.transfer_peers)
            return worker_pb2.IntroduceResponse(
                introduced=[
                    worker_pb2.Introduced(
                        worker_id=each.worker_id, epoch=each.epoch, problem=each.problem, duration_s=each.duration_s
                    )
                    for each in results
                ]
            )

    async def Drain(self, request: Any, context: Any) -> worker_pb2.DrainResponse:
        async with answering(context, "drain"):
            if not is_duration(request.timeout_s, MAX_DRAIN_S):
                what = f"must be above 0 and at most {MAX_DRAIN_S:g}"
                raise invalid_request([FieldViolation("timeout_s", what)])
            return worker_pb2.DrainResponse(remaining_count=await self._board.drain(request.timeout_s))


def add_worker_service(
    server: grpc.aio.Server, info: WorkerInfo, board: LoadBoard, introductions: Introductions
) -> str:
    """Attaches the service and returns its full name, which the host reports health under."""
    add = worker_pb2_grpc.add_WorkerServiceServicer_to_server
    add(WorkerServicer(info, board, introductions), server)  # type: ignore[no-untyped-call]  # generated
    return SERVICE

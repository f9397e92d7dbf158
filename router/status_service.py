"""StatusService on gRPC: what ``baton top`` shows, without addresses of workers.

Thin: roster and window to protobuf. All watchers are shown the same picture, which is made at most every
``MIN_INTERVAL_S``: many of them cost no more than one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from baton.errors import BatonError, FieldViolation, invalid_request
from baton.request import Role
from baton.status import abort
from baton.v1 import status_pb2 as pb
from baton.v1 import status_pb2_grpc as pb_grpc
from router.admin_service import Counts
from router.call_places import CallPlaces
from router.cluster_view import ClusterView, Health, WorkerView
from router.phase_window import PhaseWindow, TransferStatistics

SERVICE_NAME = "baton.v1.StatusService"

DEFAULT_INTERVAL_S, MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 0.1, 60.0

_ROLES = {Role.PREFILL: pb.WORKER_ROLE_PREFILL, Role.DECODE: pb.WORKER_ROLE_DECODE}
_HEALTHS = {
    Health.READY: pb.WORKER_HEALTH_READY,
    Health.CONNECTING: pb.WORKER_HEALTH_CONNECTING,
    Health.SUSPECT: pb.WORKER_HEALTH_SUSPECT,
    Health.DRAINING: pb.WORKER_HEALTH_DRAINING,
    Health.LOST: pb.WORKER_HEALTH_LOST,
}


class Roster(Protocol):
    """What this needs of ``roster.Roster``."""

    def view(self) -> ClusterView: ...


class StatusService(pb_grpc.StatusServiceServicer):
    """One per process. Owns the last picture and when it was made."""

    def __init__(
        self,
        *,
        roster: Roster,
        window: PhaseWindow,
        counts: Callable[[], Counts],
        authorise: Callable[[Any], None],
        max_watcher_count: int,
    ) -> None:
        """``authorise``: given the call's context; raises UNAUTHENTICATED for a caller without a key where keys are
        asked for; asked again before each picture. ``max_watcher_count``: further ones get QUEUE_FULL."""
        self._roster = roster
        self._window = window
        self._counts = counts
        self._authorise = authorise
        self._places = CallPlaces(max_watcher_count)
        self._made_at = -MIN_INTERVAL_S
        self._picture = pb.WatchStatusResponse()

    async def WatchStatus(self, request: pb.WatchStatusRequest, context: Any) -> None:
        try:
            self._authorise(context)
            interval_s = _interval_s(request)
            with self._places.one():
                while True:  # until the caller leaves: then the write or the sleep raises
                    await context.write(self._current(asyncio.get_running_loop().time()))
                    await asyncio.sleep(interval_s)
                    self._authorise(context)  # a key may be taken out while it watches, and watching has no end
        except BatonError as error:
            await abort(context, error)

    def _current(self, now: float) -> pb.WatchStatusResponse:
        if not 0 <= now - self._made_at < MIN_INTERVAL_S:
            self._made_at, self._picture = now, self._made(now)
        return self._picture

    def _made(self, now: float) -> pb.WatchStatusResponse:
        counts = self._counts()
        workers = sorted(self._roster.view().workers, key=lambda worker: worker.worker_id)
        transfers = self._window.transfers(now)
        picture = pb.WatchStatusResponse(
            is_serving=counts.is_serving,
            in_flight_count=counts.in_flight_count,
            queued_count=counts.queued_count,
            finished_count=counts.finished_count,
            failed_count=counts.failed_count,
            workers=[_worker_to_proto(worker, transfers.get(worker.worker_id)) for worker in workers],
        )
        for phase in self._window.statistics(now):
            entry = picture.phases.add(name=phase.name, sample_count=phase.sample_count)
            entry.p50.FromNanoseconds(round(phase.p50_s * 1e9))
            entry.p95.FromNanoseconds(round(phase.p95_s * 1e9))
        return picture


def _interval_s(request: pb.WatchStatusRequest) -> float:
    """Raises INVALID_REQUEST."""
    if not request.HasField("interval"):
        return DEFAULT_INTERVAL_S
    interval_s = request.interval.seconds + request.interval.nanos / 1e9
    if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
        bound = f"{MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} s, or absent for {DEFAULT_INTERVAL_S:g} s"
        raise invalid_request([FieldViolation("interval", f"is {interval_s!r} s; must be {bound}")])
    return interval_s


def _worker_to_proto(worker: WorkerView, transfer: TransferStatistics | None) -> pb.WorkerStatus:
    status = pb.WorkerStatus(
        worker_id=worker.worker_id,
        role=_ROLES[worker.role],
        health=_HEALTHS[worker.health],
        assigned_count=worker.assigned.request_count,
    )
    if transfer is not None:
        status.kv_bytes_per_s = transfer.kv_bytes_per_s
        status.recomputed_share = transfer.recomputed_share
    if worker.info is not None:
        status.block_count = worker.info.block_count
    if worker.load is not None:
        status.running_count = worker.load.running_count
        status.waiting_count = worker.load.waiting_count
        status.used_block_count = worker.load.used_block_count
        status.block_count = worker.load.block_count
        status.held_lease_count = worker.load.held_lease_count
        status.no_room_count = worker.load.no_room_count
        status.quarantined_pull_count = worker.load.quarantined_pull_count
    return status

"""ClusterService on gRPC: what the fleet tells the router, and what whoever steers it is shown.

Thin: protobuf to the roster and back. Watching is open to whoever reaches the admin address (loopback by default);
every change needs the cluster's token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from baton.admin.v1 import cluster_pb2 as pb
from baton.admin.v1 import cluster_pb2_grpc as pb_grpc
from baton.errors import BatonError, FieldViolation, invalid_request, unauthenticated
from baton.request import Role
from baton.secret import TOKEN_KEY, is_cluster_token
from baton.status import abort
from router.cluster_view import ClusterView, WorkerSpec, WorkerView
from router.phase_window import PhaseWindow, TransferStatistics

SERVICE_NAME = "baton.admin.v1.ClusterService"

MAX_WORKER_COUNT = 1024
MAX_WORKER_ID_BYTES = 128
DEFAULT_INTERVAL_MS, MIN_INTERVAL_MS, MAX_INTERVAL_MS = 1000, 100, 60_000

_ROLES = {role.value: role for role in Role}


class Roster(Protocol):
    """What this needs of ``roster.Roster``."""

    def view(self) -> ClusterView: ...

    def set_workers(self, specs: Iterable[WorkerSpec]) -> None: ...

    def drain(self, worker_id: str) -> int: ...

    def set_role(self, worker_id: str, role: Role) -> None: ...


@dataclass(frozen=True, slots=True)
class Counts:
    """The router's own numbers at one moment."""

    queued_count: int
    in_flight_count: int
    finished_count: int
    failed_count: int
    is_serving: bool


class AdminService(pb_grpc.ClusterServiceServicer):
    """One per process. Stateless: the roster and the window keep what there is."""

    def __init__(self, *, roster: Roster, window: PhaseWindow, counts: Callable[[], Counts], secret: bytes) -> None:
        self._roster = roster
        self._window = window
        self._counts = counts
        self._secret = secret

    async def WatchCluster(self, request: pb.WatchClusterRequest, context: Any) -> None:
        interval_ms = request.interval_ms or DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            bound = (
                f"is {interval_ms}; must be {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}, or 0 for {DEFAULT_INTERVAL_MS}"
            )
            await abort(context, invalid_request([FieldViolation("interval_ms", bound)]))
        loop = asyncio.get_running_loop()
        while True:  # until the caller leaves: then the write or the sleep raises
            await context.write(self._snapshot(loop.time()))
            await asyncio.sleep(interval_ms / 1000)

    async def SetWorkers(self, request: pb.SetWorkersRequest, context: Any) -> pb.SetWorkersResponse:
        await self._require_token(context)
        try:
            self._roster.set_workers(_specs_from_proto(request))
        except BatonError as error:
            await abort(context, error)
        return pb.SetWorkersResponse()

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Any) -> pb.DrainWorkerResponse:
        await self._require_token(context)
        try:
            self._require_known(request.worker_id)
            assigned_count = self._roster.drain(request.worker_id)
        except BatonError as error:
            await abort(context, error)
        return pb.DrainWorkerResponse(assigned_count=assigned_count)

    async def SetWorkerRole(self, request: pb.SetWorkerRoleRequest, context: Any) -> pb.SetWorkerRoleResponse:
        await self._require_token(context)
        try:
            self._require_known(request.worker_id)
            self._roster.set_role(request.worker_id, _role_from_proto("role", request.role))
        except BatonError as error:
            await abort(context, error)
        return pb.SetWorkerRoleResponse()

    async def _require_token(self, context: Any) -> None:
        tokens = [value for key, value in context.invocation_metadata() or () if key == TOKEN_KEY]
        if len(tokens) != 1 or not is_cluster_token(self._secret, tokens[0]):
            await abort(context, unauthenticated())

    def _require_known(self, worker_id: str) -> None:
        """Raises INVALID_REQUEST for a worker that the roster does not name."""
        known = [worker.worker_id for worker in self._roster.view().workers]
        if worker_id not in known:
            names = ", ".join(known) or "none"
            raise invalid_request([FieldViolation("worker_id", f"names no worker of this router; known: {names}")])

    def _snapshot(self, now: float) -> pb.WatchClusterResponse:
        counts = self._counts()
        workers = sorted(self._roster.view().workers, key=lambda worker: worker.worker_id)
        transfers = self._window.transfers(now)
        return pb.WatchClusterResponse(
            workers=[_worker_to_proto(worker, transfers.get(worker.worker_id)) for worker in workers],
            queued_count=counts.queued_count,
            in_flight_count=counts.in_flight_count,
            finished_count=counts.finished_count,
            failed_count=counts.failed_count,
            is_serving=counts.is_serving,
            phases=[
                pb.PhaseStats(
                    name=phase.name,
                    sample_count=phase.sample_count,
                    p50_ms=phase.p50_s * 1e3,
                    p95_ms=phase.p95_s * 1e3,
                )
                for phase in self._window.statistics(now)
            ],
        )


def _worker_to_proto(worker: WorkerView, transfer: TransferStatistics | None) -> pb.WorkerState:
    state = pb.WorkerState(
        worker_id=worker.worker_id,
        role=worker.role.value,
        address=worker.address,
        health=worker.health.value,
        assigned_count=worker.assigned.request_count,
        epoch=worker.identity.epoch,
    )
    if transfer is not None:
        state.kv_bytes_per_s = transfer.kv_bytes_per_s
        state.recomputed_share = transfer.recomputed_share
    if worker.info is not None:
        state.block_count = worker.info.block_count
    if worker.load is not None:
        state.running_count = worker.load.running_count
        state.waiting_count = worker.load.waiting_count
        state.used_block_count = worker.load.used_block_count
        state.block_count = worker.load.block_count
        state.held_lease_count = worker.load.held_lease_count
        state.no_room_count = worker.load.no_room_count
    return state


def _specs_from_proto(request: pb.SetWorkersRequest) -> list[WorkerSpec]:
    """Raises INVALID_REQUEST: a half-understood roster must not replace a good one."""
    violations: list[FieldViolation] = []
    specs: list[WorkerSpec] = []
    seen: set[str] = set()
    if len(request.workers) > MAX_WORKER_COUNT:
        count = len(request.workers)
        raise invalid_request([FieldViolation("workers", f"has {count} entries; at most {MAX_WORKER_COUNT}")])
    for index, worker in enumerate(request.workers):
        field = f"workers[{index}]"
        if not 1 <= len(worker.worker_id.encode()) <= MAX_WORKER_ID_BYTES:
            violations.append(FieldViolation(f"{field}.worker_id", f"must have 1 to {MAX_WORKER_ID_BYTES} bytes"))
        if worker.worker_id in seen:
            violations.append(FieldViolation(f"{field}.worker_id", "is in the set twice; ids are unique"))
        seen.add(worker.worker_id)
        host, _, port = worker.address.rpartition(":")
        if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
            violations.append(FieldViolation(f"{field}.address", "must be host:port"))
        try:
            role = _role_from_proto(f"{field}.role", worker.role)
        except BatonError as error:
            violations.extend(error.violations)
            continue
        specs.append(WorkerSpec(worker.worker_id, worker.address, role, worker.epoch))
    if violations:
        raise invalid_request(violations)
    return specs


def _role_from_proto(field: str, name: str) -> Role:
    if name not in _ROLES:
        raise invalid_request([FieldViolation(field, 'must be "prefill" or "decode"')])
    return _ROLES[name]

"""Watches and steers a running Baton through its admin address, for scripts; ``baton top`` asks the public one.

Watching needs nothing; draining and changing roles need the cluster's secret.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from baton.admin.v1 import cluster_pb2 as pb
from baton.admin.v1 import cluster_pb2_grpc as pb_grpc
from baton.client import channel_options
from baton.request import Role
from baton.secret import TOKEN_KEY, cluster_token
from baton.status import from_rpc_error

DEFAULT_ADMIN_ADDRESS = "127.0.0.1:50052"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it."""

    worker_id: str
    role: str
    address: str
    health: str
    assigned_count: int
    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    held_lease_count: int
    epoch: str
    kv_bytes_per_s: float = 0.0
    """Of KV pulled, per second of pulling, over the last requests it decoded; 0: it pulled none."""
    recomputed_share: float = 0.0
    """Of those requests' prompt tokens, the share computed again because their KV could not be used."""
    no_room_count: int = 0
    """Decodes it refused for want of KV blocks, since its process began."""


@dataclass(frozen=True, slots=True)
class PhaseView:
    """One phase over the recent window, milliseconds."""

    name: str
    sample_count: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster at one moment."""

    workers: tuple[WorkerView, ...]
    phases: tuple[PhaseView, ...]
    queued_count: int
    in_flight_count: int
    finished_count: int
    failed_count: int
    is_serving: bool


class AdminClient:
    """A client of one router's ClusterService. Failures are ``BatonError``."""

    def __init__(self, address: str = DEFAULT_ADMIN_ADDRESS, *, secret: bytes | None = None) -> None:
        self.address = address
        self._metadata = ((TOKEN_KEY, cluster_token(secret)),) if secret is not None else ()
        self._channel = grpc.aio.insecure_channel(address, options=channel_options(address))
        self._stub = pb_grpc.ClusterServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def watch(self, *, interval_s: float = 1.0) -> AsyncGenerator[ClusterView, None]:
        """A snapshot at once and then every ``interval_s``, until closed."""
        call = self._stub.WatchCluster(pb.WatchClusterRequest(interval_ms=round(interval_s * 1000)))
        try:
            async for response in call:
                yield _view(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self.address) from None
        finally:
            call.cancel()

    async def drain_worker(self, worker_id: str, *, timeout: float) -> int:
        """Takes a worker out of placement; returns how many requests are still on it."""
        request = pb.DrainWorkerRequest(worker_id=worker_id)
        try:
            reply = await self._stub.DrainWorker(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self.address) from None
        return int(reply.assigned_count)

    async def set_worker_role(self, worker_id: str, role: Role, *, timeout: float) -> None:
        """Makes the router place the other phase on a worker."""
        request = pb.SetWorkerRoleRequest(worker_id=worker_id, role=role.value)
        try:
            await self._stub.SetWorkerRole(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self.address) from None

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _view(response: pb.WatchClusterResponse) -> ClusterView:
    return ClusterView(
        workers=tuple(
            WorkerView(
                worker_id=worker.worker_id,
                role=worker.role,
                address=worker.address,
                health=worker.health,
                assigned_count=worker.assigned_count,
                running_count=worker.running_count,
                waiting_count=worker.waiting_count,
                used_block_count=worker.used_block_count,
                block_count=worker.block_count,
                held_lease_count=worker.held_lease_count,
                epoch=worker.epoch,
                kv_bytes_per_s=worker.kv_bytes_per_s,
                recomputed_share=worker.recomputed_share,
                no_room_count=worker.no_room_count,
            )
            for worker in response.workers
        ),
        phases=tuple(PhaseView(p.name, p.sample_count, p.p50_ms, p.p95_ms) for p in response.phases),
        queued_count=response.queued_count,
        in_flight_count=response.in_flight_count,
        finished_count=response.finished_count,
        failed_count=response.failed_count,
        is_serving=response.is_serving,
    )

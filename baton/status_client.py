"""Watches how a Baton is doing over its public API: for ``baton top`` and for scripts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from baton.channels import DEFAULT_ADDRESS, call_metadata, channel_options
from baton.request import Role
from baton.status import from_rpc_error
from baton.tls import Tls, transport_of
from baton.v1 import status_pb2 as pb
from baton.v1 import status_pb2_grpc as pb_grpc

_ROLES = {pb.WORKER_ROLE_PREFILL: Role.PREFILL.value, pb.WORKER_ROLE_DECODE: Role.DECODE.value}
_HEALTHS = {
    pb.WORKER_HEALTH_READY: "ready",
    pb.WORKER_HEALTH_CONNECTING: "connecting",
    pb.WORKER_HEALTH_SUSPECT: "suspect",
    pb.WORKER_HEALTH_DRAINING: "draining",
    pb.WORKER_HEALTH_LOST: "lost",
}
_UNKNOWN = "unknown"
"""A value of a newer server."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the router sees it."""

    worker_id: str
    role: str
    """``prefill``, ``decode`` or ``unknown``."""
    health: str
    """``ready``, ``connecting``, ``suspect``, ``draining``, ``lost`` or ``unknown``."""
    assigned_count: int
    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    """0: not known yet."""
    held_lease_count: int
    kv_bytes_per_s: float = 0.0
    """Of KV pulled, per second of pulling, over the last requests it decoded; 0: it pulled none."""
    recomputed_share: float = 0.0
    """Of those requests' prompt tokens, the share computed again because their KV could not be used."""
    no_room_count: int = 0
    """Decodes it refused for want of KV blocks, since its process began."""
    quarantined_pull_count: int = 0
    """Pulls it gave up whose blocks stay in use by nobody until the transfer library says that the read is over."""


@dataclass(frozen=True, slots=True)
class PhaseStatus:
    """One phase over the last requests, seconds; 0 without samples."""

    name: str
    sample_count: int
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A Baton at one moment."""

    is_serving: bool
    in_flight_count: int
    queued_count: int
    finished_count: int
    failed_count: int
    workers: tuple[WorkerStatus, ...]
    phases: tuple[PhaseStatus, ...]


class StatusClient:
    """A client of one router's StatusService. Failures are ``BatonError``."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | bool | None = None,
        allow_plaintext_api_key: bool = False,
    ) -> None:
        """As ``BatonClient``. Must be made inside the event loop that uses it."""
        self.address = address
        self._metadata = call_metadata(api_key)
        transport = transport_of(
            [address],
            tls=tls,
            credentials=None,
            api_key=api_key,
            allow_plaintext_api_key=allow_plaintext_api_key,
        )
        self._security = transport.security
        options = [*transport.options, *channel_options(address)]
        if transport.credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, transport.credentials, options=options)
        self._stub = pb_grpc.StatusServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def watch(
        self, *, interval_s: float = 1.0, timeout: float | None = None
    ) -> AsyncGenerator[ServiceStatus, None]:
        """The status at once and then every ``interval_s``, until closed or for ``timeout`` seconds."""
        request = pb.WatchStatusRequest()
        request.interval.FromNanoseconds(round(interval_s * 1e9))
        call = self._stub.WatchStatus(request, timeout=timeout, metadata=self._metadata)
        try:
            async for response in call:
                yield _status(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self.address, security=self._security) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Cancels what is open. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<StatusClient {self.address}>"


def _status(response: pb.WatchStatusResponse) -> ServiceStatus:
    return ServiceStatus(
        is_serving=response.is_serving,
        in_flight_count=response.in_flight_count,
        queued_count=response.queued_count,
        finished_count=response.finished_count,
        failed_count=response.failed_count,
        workers=tuple(
            WorkerStatus(
                worker_id=worker.worker_id,
                role=_ROLES.get(worker.role, _UNKNOWN),
                health=_HEALTHS.get(worker.health, _UNKNOWN),
                assigned_count=worker.assigned_count,
                running_count=worker.running_count,
                waiting_count=worker.waiting_count,
                used_block_count=worker.used_block_count,
                block_count=worker.block_count,
                held_lease_count=worker.held_lease_count,
                kv_bytes_per_s=worker.kv_bytes_per_s,
                recomputed_share=worker.recomputed_share,
                no_room_count=worker.no_room_count,
                quarantined_pull_count=worker.quarantined_pull_count,
            )
            for worker in response.workers
        ),
        phases=tuple(
            PhaseStatus(
                phase.name, phase.sample_count, phase.p50.ToNanoseconds() / 1e9, phase.p95.ToNanoseconds() / 1e9
            )
            for phase in response.phases
        ),
    )

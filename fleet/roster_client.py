"""Tells the router who its workers are, over its admin API. Protobuf and gRPC stop here.

Owns one channel. Never decides who is in the roster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from baton.admin.v1 import cluster_pb2, cluster_pb2_grpc
from baton.secret import TOKEN_KEY, cluster_token
from baton.status import from_rpc_error

PUBLISH_TIMEOUT_S = 2.0


class RosterClient:
    """``publish`` sends the whole set; the router forgets all others."""

    def __init__(self, admin_address: str, secret: bytes) -> None:
        self._admin_address = admin_address
        self._channel = grpc.aio.insecure_channel(
            admin_address,
            options=[("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)],
        )
        self._stub = cluster_pb2_grpc.ClusterServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = ((TOKEN_KEY, cluster_token(secret)),)

    async def publish(self, roster: Sequence[Mapping[str, Any]]) -> None:
        """Raises ``BatonError`` when the router does not take it within the timeout."""
        request = cluster_pb2.SetWorkersRequest(
            workers=[
                cluster_pb2.WorkerSpec(
                    worker_id=each["worker_id"], address=each["address"], role=each["role"], epoch=each["epoch"]
                )
                for each in roster
            ]
        )
        try:
            await self._stub.SetWorkers(request, metadata=self._metadata, timeout=PUBLISH_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=f"the router at {self._admin_address}") from None

    async def close(self) -> None:
        await self._channel.close()

"""grpc.health.v1 of the router: SERVING exactly while a ready worker could be given a request.

Owns the status of every service name and the task that follows the roster. A full cluster still serves (requests
queue); a cluster without a ready worker, and a router that drains, do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from baton.errors import BatonError
from baton.status import abort
from router.call_places import CallPlaces

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _Servicer(health_aio.HealthServicer):  # type: ignore[misc]
    def __init__(self, max_watcher_count: int) -> None:
        super().__init__()
        self._places = CallPlaces(max_watcher_count)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        try:
            with self._places.one():
                await super().Watch(request, context)
        except BatonError as error:
            await abort(context, error)


class RouterHealth:
    """``run`` follows ``can_place`` until cancelled, woken by ``changed``; ``drain`` flips for good."""

    def __init__(
        self, service_names: Sequence[str], can_place: Callable[[], bool], *, max_watcher_count: int = 4096
    ) -> None:
        """``max_watcher_count``: of each server; further ones get QUEUE_FULL."""
        self._names = ("", *service_names)
        self._max_watcher_count = max_watcher_count
        self._can_place = can_place
        self._servicers: list[health_aio.HealthServicer] = []
        self._is_serving = False
        self._is_draining = False
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """``can_place`` may answer otherwise than before."""
        self._changed.set()

    @property
    def is_serving(self) -> bool:
        return not self._is_draining and self._can_place()

    async def attach(self, server: grpc.aio.Server) -> None:
        """Serves the health protocol on ``server``. NOT_SERVING until ``run`` says otherwise."""
        servicer = _Servicer(self._max_watcher_count)
        self._servicers.append(servicer)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        for name in self._names:
            await servicer.set(name, _NOT_SERVING)

    async def run(self) -> None:
        """Never returns."""
        while True:
            self._changed.clear()
            await self._follow()
            await self._changed.wait()

    async def drain(self) -> None:
        """NOT_SERVING from now on, whatever the roster says."""
        self._is_draining = True
        await self._follow()

    async def _follow(self) -> None:
        is_serving = self.is_serving
        if is_serving == self._is_serving:
            return
        self._is_serving = is_serving
        for servicer in self._servicers:
            for name in self._names:
                # What holds by now: while watchers are told, a drain may come.
                await servicer.set(name, _SERVING if self._is_serving else _NOT_SERVING)

"""The router's public services in virtual time, message in and messages out: every instant of a call is exact.

A helper of the conformance tests. Sockets cannot be placed on a clock that jumps; so the real services are given
their calls by a stand-in for gRPC's context, in front of the real relay, workers and simulated engines.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio
from raw_calls import Outcome
from sim_cluster import CONTEXT, MODEL, SECRET, SimCluster, SimWorker, make_worker

from baton.leg import WorkerLoad
from baton.request import Role
from engine.sim import SimNetwork
from kvtransfer.simulated import Link
from router.cluster_view import WorkerSpec
from router.config import RouterConfig
from router.server import RouterServer
from router.tiny_model import write_tiny_model

LINK = Link(latency_s=0.001, bytes_per_s=0.7e9)


class Context:
    """What a service needs of ``grpc.aio.ServicerContext``. Keeps what was written, and when."""

    def __init__(
        self,
        *,
        timeout: float | None,
        metadata: Sequence[tuple[str, str]] = (),
        on_write: Callable[[Any], float] = lambda _: 0.0,
    ) -> None:
        """``on_write``: for how many seconds the caller does not read on after this message."""
        self._until = None if timeout is None else now() + timeout
        self._metadata = tuple(metadata)
        self._on_write = on_write
        self.written: list[tuple[float, Any]] = []
        self.status: tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]] | None = None

    def time_remaining(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - now())

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def done(self) -> bool:
        return self.status is not None

    async def write(self, message: Any) -> None:
        copy = type(message)()
        copy.CopyFrom(message)  # a service may fill the same message again
        self.written.append((now(), copy))
        if (pause_s := self._on_write(copy)) > 0:
            await asyncio.sleep(pause_s)

    async def abort(self, code: grpc.StatusCode, text: str, trailers: Any = ()) -> NoReturn:
        self.status = (code, text, tuple(trailers))
        raise grpc.aio.AbortError

    def outcome(self) -> Outcome:
        code, text, trailers = self.status or (grpc.StatusCode.OK, "", ())
        return Outcome(code, text, [message for _, message in self.written], dict(trailers), bool(self.written))


class VirtualCluster(SimCluster):
    """Without an endpoint; called by ``call``. ``silent``: workers that live, work, and report nothing."""

    def __init__(self, config: RouterConfig, server: RouterServer, workers: dict[str, SimWorker]) -> None:
        super().__init__(config, server, workers)
        self.silent: set[str] = set()

    async def call(
        self,
        method: str,
        request: Any,
        *,
        context: Context | None = None,
        timeout: float | None = 100.0,
        **options: Any,
    ) -> Outcome:
        """One call of any public method, to its end."""
        context = context or Context(timeout=timeout, **options)
        service: Any = next(
            each
            for each in (self.server.generation, self.server.models, self.server.status)
            if hasattr(type(each), method)
        )
        try:
            reply = await getattr(service, method)(request, context)
        except grpc.aio.AbortError:
            reply = None
        if reply is not None:
            context.written.append((now(), reply))
        return context.outcome()

    async def generate(self, request: Any, **options: Any) -> Outcome:
        return await self.call("Generate", request, **options)


@asynccontextmanager
async def virtual_cluster(
    directory: Path,
    *,
    prefill_count: int = 1,
    decode_count: int = 1,
    sim: dict[str, Any] | None = None,
    network: SimNetwork | None = None,
    is_balanced: bool = True,
    **config: Any,
) -> AsyncIterator[VirtualCluster]:
    """As ``sim_cluster``. ``is_balanced``: whether nothing may be left when it closes."""
    write_tiny_model(directory, max_context_token_count=CONTEXT)
    router_config = RouterConfig(
        **{"model_name": MODEL, "model_dir": str(directory), "load_interval_s": 0.05, "lease_s": 600.0, **config}
    )
    network = network or SimNetwork(LINK)
    workers: dict[str, SimWorker] = {}
    tasks: list[asyncio.Task[None]] = []

    def connect(spec: WorkerSpec) -> Any:
        client: Any = workers[spec.worker_id].client()
        watch_load = client.watch_load

        async def watched(interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
            async with aclosing(watch_load(interval_s)) as loads:
                async for load in loads:
                    while spec.worker_id in cluster.silent:  # noqa: ASYNC110  # a test's own word
                        await asyncio.sleep(interval_s)
                    yield load

        client.watch_load = watched
        return client

    try:
        for role, count in ((Role.PREFILL, prefill_count), (Role.DECODE, decode_count)):
            for index in range(count):
                worker = await make_worker(f"{role.value}-{index}", role, network, sim or {})
                workers[worker.worker_id] = worker
                tasks.append(asyncio.create_task(worker.prefill.run()))
        server = RouterServer(
            router_config,
            secret=SECRET,
            connect=connect,
            rng=random.Random(1),  # the same ties, broken the same way, each time
        )
        cluster = VirtualCluster(router_config, server, workers)
        try:
            cluster.set_workers(*workers)
            await cluster.until(lambda: len(server.roster.view().ready()) == len(workers), "all workers ready")
            yield cluster
            if is_balanced:
                await cluster.until_balanced()
        finally:
            await server.close()
    finally:
        for worker in workers.values():
            await worker.decode.close()
            await worker.prefill.close()
            await worker.engine.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def now() -> float:
    return asyncio.get_running_loop().time()

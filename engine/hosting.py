"""The process side of a worker: a gRPC server on loopback, health, /metrics, and the order of start and stop.

Owns the sockets and nothing behind them. Which phases a process serves is its composer's choice (the fleet's
worker process, or a stand-alone ``python -m prefill_worker``): it passes in what to attach.

    start  engine -> parts -> server -> ready        stop  not ready -> drain -> server -> parts -> engine
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from prometheus_client import CollectorRegistry, start_http_server

from baton.errors import BatonError, engine_failed, unauthenticated
from baton.secret import TOKEN_KEY, checked_secret, is_cluster_token
from baton.status import abort
from engine.load_board import LoadBoard, WorkerPart
from engine.protocol import Engine

logger = logging.getLogger(__name__)

Attach = Callable[[grpc.aio.Server], str]
"""Adds one service to the server and returns its full name."""

HEALTH_TIMEOUT_S = 30.0
"""Far above what an answer takes: an engine that is merely busy must not be taken for dead."""

_HEALTH_PREFIX = "/grpc.health.v1.Health/"


class HostingError(Exception):
    """The process cannot serve as configured; the message says what to change."""


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Where a worker process listens and how much it takes in."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port; see ``WorkerHost.address``."""
    metrics_port: int = 0
    """On loopback, whatever ``host`` is. 0: any free port."""
    max_message_bytes: int = 1 << 20
    """A prompt of 131,072 tokens is half of this, the largest ticket a fifth. Larger messages are refused."""
    max_call_count: int = 1024
    """Calls in progress, streams included; more are refused by the server itself."""
    drain_s: float = 30.0
    """How long stopping waits for legs and leases before it ends them."""
    grace_s: float = 2.0
    """How long, after that, calls may take to say goodbye."""
    health_interval_s: float = 1.0
    """How often the engine is asked whether it lives."""

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("host: is empty; give an address to listen on, such as 127.0.0.1")
        for key in ("port", "metrics_port"):
            if not _is_whole(getattr(self, key), 0) or getattr(self, key) > 65_535:
                raise ValueError(f"{key}: is {getattr(self, key)!r}; give 0 (any free port) to 65535")
        for key, least in (("max_message_bytes", 4096), ("max_call_count", 1)):
            if not _is_whole(getattr(self, key), least):
                raise ValueError(f"{key}: is {getattr(self, key)!r}; give a whole number of at least {least}")
        for key in ("drain_s", "grace_s", "health_interval_s"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 < value <= 3600:
                raise ValueError(f"{key}: is {value!r}; give above 0 and at most 3600 seconds")


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


@dataclass(frozen=True, slots=True)
class WorkerEndpoint:
    """Where a started worker listens."""

    worker_id: str
    epoch: str
    address: str
    """host:port of its gRPC services."""
    metrics_address: str


class ClusterTokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the cluster's token, before their message is read. Health checks need none."""

    def __init__(self, secret: bytes) -> None:
        self._secret = checked_secret(secret)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        details: Any = handler_call_details
        if handler is None or details.method.startswith(_HEALTH_PREFIX):
            return handler
        tokens = [value for key, value in details.invocation_metadata or () if key == TOKEN_KEY]
        if len(tokens) == 1 and is_cluster_token(self._secret, tokens[0]):
            return handler
        return _refusing_like(handler)


def _refusing_like(handler: Any) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await abort(context, unauthenticated())

    if handler.request_streaming:
        kind = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
    else:
        kind = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
    return kind(refuse)  # without a deserializer: what an outsider sent is not parsed


class WorkerHost:
    """The sockets of one worker process. ``start`` once; ``stop`` is idempotent."""

    def __init__(
        self, config: HostConfig, *, secret: bytes, registry: CollectorRegistry, attach: Sequence[Attach]
    ) -> None:
        self._config = config
        self._registry = registry
        self._attach = tuple(attach)
        self._interceptor = ClusterTokenInterceptor(secret)
        self._health = health_aio.HealthServicer()
        self._service_names: list[str] = []
        self._server: grpc.aio.Server | None = None
        self._metrics_server: tuple[Any, Any] | None = None
        self.port = 0
        self.metrics_port = 0

    def __repr__(self) -> str:
        return f"<WorkerHost {self.address} serving {', '.join(self._service_names) or 'nothing yet'}>"

    @property
    def address(self) -> str:
        return _joined(self._config.host, self.port)

    @property
    def metrics_address(self) -> str:
        return _joined("127.0.0.1", self.metrics_port)

    async def start(self) -> None:
        """Listens, and reports SERVING. Raises ``HostingError`` when a port is taken."""
        config = self._config
        server = grpc.aio.server(
            interceptors=[self._interceptor],
            maximum_concurrent_rpcs=config.max_call_count,
            options=_server_options(config),
        )
        self._server = server
        try:
            self._service_names = [attach(server) for attach in self._attach]
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            with _port_in_use(config.host, config.port, "port"):
                self.port = server.add_insecure_port(_joined(config.host, config.port))
                if self.port == 0:
                    raise RuntimeError("not bound")
            with _port_in_use("127.0.0.1", config.metrics_port, "metrics_port"):
                self._metrics_server = start_http_server(
                    config.metrics_port, addr="127.0.0.1", registry=self._registry
                )
                self.metrics_port = self._metrics_server[0].server_port
            await server.start()
            await self.report(is_serving=True)
        except BaseException:
            await self.stop(0)
            raise

    async def report(self, *, is_serving: bool) -> None:
        """What grpc.health.v1 says of the process and of each of its services."""
        served = health_pb2.HealthCheckResponse.SERVING
        status = served if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Not serving first, then no new calls; those in progress are cancelled after ``grace_s``. Idempotent."""
        await self._health.enter_graceful_shutdown()
        try:
            if self._server is not None:
                await self._server.stop(grace_s)
        finally:
            metrics_server, self._metrics_server = self._metrics_server, None
            if metrics_server is not None:
                await asyncio.to_thread(_close_metrics, *metrics_server)


def _close_metrics(http_server: Any, thread: Any) -> None:
    http_server.shutdown()  # returns once its loop noticed, half a second at most
    http_server.server_close()
    thread.join()


def _server_options(config: HostConfig) -> list[tuple[str, int]]:
    return [
        # Without this a second worker could bind the same port, and the kernel would deal calls to either.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        # Prefill of a long prompt is silence: the router may ping through it, every 10 s if it likes.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 9_000),
        ("grpc.http2.max_ping_strikes", 2),
        # And a router whose machine vanished is noticed, so that its legs end.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def _port_in_use(host: str, port: int, key: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise HostingError(
            f"cannot listen on {_joined(host, port)}: the port is in use or the address is not of this machine. "
            f"Stop the process that has it (ss -ltnp 'sport = :{port}'), or set {key} to another port or to 0"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def run_worker_host(
    engine: Engine,
    parts: Sequence[WorkerPart],
    board: LoadBoard,
    host: WorkerHost,
    config: HostConfig,
    *,
    worker_id: str,
    stop: asyncio.Event,
    on_ready: Callable[[WorkerEndpoint], None] = lambda _: None,
) -> None:
    """Serves a *started* engine until ``stop`` is set, then drains; closes server, parts and engine however it ends.

    Raises ``HostingError`` when it cannot listen, and ENGINE_FAILED when the engine dies: a worker without an
    engine must not look alive, and whoever runs it starts it anew.
    """
    background: list[asyncio.Task[None]] = []
    try:
        background += [asyncio.create_task(part.run(), name=f"{part!r}.run") for part in parts]
        await host.start()
        endpoint = WorkerEndpoint(worker_id, board.epoch, host.address, host.metrics_address)
        if not is_loopback(config.host):
            logger.warning("listening beyond this machine, on %s: internal calls are not encrypted", host.address)
        on_ready(endpoint)
        background.append(asyncio.create_task(_mirror_drain(board, host), name="health mirrors drain"))
        await _until_stop_or_death(engine, board, config.health_interval_s, stop)
        await host.report(is_serving=False)
        left_count = await board.drain(config.drain_s)
        if left_count:
            logger.warning("%d legs or leases were left after draining for %g s", left_count, config.drain_s)
    finally:
        # Shielded: a second signal cancels us, and still no engine may outlive its worker.
        await asyncio.shield(_close(engine, parts, host, background, config.grace_s))


async def start_unless_stopped(engine: Engine, stop: asyncio.Event) -> bool:
    """Starts ``engine``. False: told to stop while the model was loading. The engine is closed unless it started."""
    starting = asyncio.create_task(engine.start(), name="engine start")
    stopping = asyncio.create_task(stop.wait(), name="stop while starting")
    is_started = False
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            is_started = True
        return is_started
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        if not is_started:
            await asyncio.shield(engine.close())


async def _until_stop_or_death(engine: Engine, board: LoadBoard, interval_s: float, stop: asyncio.Event) -> None:
    while True:
        try:
            async with asyncio.timeout(interval_s):
                await stop.wait()
                return
        except TimeoutError:
            await _check_health(engine)
            board.current()  # refreshes /metrics


async def _check_health(engine: Engine) -> None:
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            await engine.check_health()
    except TimeoutError:
        raise engine_failed("", f"the engine did not say in {HEALTH_TIMEOUT_S:g} s whether it lives") from None


async def _mirror_drain(board: LoadBoard, host: WorkerHost) -> None:
    while not board.is_draining:
        await board.wait_past(board.version, 60.0)
    await host.report(is_serving=False)


async def _close(
    engine: Engine,
    parts: Sequence[WorkerPart],
    host: WorkerHost,
    background: Sequence[asyncio.Task[None]],
    grace_s: float,
) -> None:
    # Each step whatever became of the one before; the engine last, since the parts release into it.
    await _attempt("server", host.stop(grace_s))
    for part in parts:
        await _attempt(repr(part), part.close())
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await _attempt("engine", engine.close())


async def _attempt(what: str, closing: Awaitable[None]) -> None:
    try:
        await closing
    except Exception as error:
        why = error.message if isinstance(error, BatonError) else type(error).__name__
        logger.error("closing %s failed: %s", what, why)


def stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT sets ``stop``; the second cancels the calling task: no more draining."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def on_signal() -> None:
        if stop.is_set():
            task.cancel()
        else:
            logger.info("stopping: taking no more work; a second signal stops at once")
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

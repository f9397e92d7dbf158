"""The router process put together: sockets, services, relay and roster, and the order of start and stop.

Owns every long-lived object of the process and nothing of what they decide.

    start  tokenizer -> roster -> services -> sockets -> ready
    stop   health flips -> new calls refused, clients told to go -> running calls finish -> sockets -> roster
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from baton.admin.v1 import cluster_pb2_grpc
from baton.channels import is_loopback_address
from baton.metrics import RouterMetrics
from baton.tls import TlsFilesError
from baton.v1 import generation_pb2_grpc, model_pb2_grpc, status_pb2_grpc
from router import admin_service, model_service, service, status_service
from router.admin_service import AdminService, Counts
from router.admission import Admission, AdmissionLimits
from router.callers import ApiKeysError, Callers
from router.chats.answer_parsing import AnswerParsing
from router.chats.chat_template import ChatTemplate
from router.chats.parser_child import ParserStartError, parsers_of
from router.config import RouterConfig
from router.flight import FlightLimits
from router.goodbyes import say_goodbyes
from router.grpc_worker_client import GrpcWorkerClient
from router.health import RouterHealth
from router.intake import Intake
from router.introductions import Introductions
from router.key_file import KeyFile
from router.model_card import Capabilities, ModelCard
from router.model_service import ModelService
from router.phase_window import PhaseWindow
from router.pipeline import Pipeline
from router.placement import PlacementPolicy
from router.prompt_encoder import PromptEncoder, abilities_of
from router.relay import Relay
from router.resuming.replay_window import WindowLimits
from router.resuming.resumables import Resumables, ResumeLimits
from router.resuming.resume_desk import ResumeDesk
from router.roster import Roster, RosterLimits
from router.service import GenerationService
from router.service_parsing import RefusesUnreadable
from router.status_service import StatusService
from router.tls_files import TlsFiles
from router.tokenizer import Tokenizer, TokenizerError, read_json_object
from router.validation import ModelLimits
from router.wall_clock import wall_clock
from router.worker_client import Connect

PUBLIC_SERVICE_NAMES = (service.SERVICE_NAME, model_service.SERVICE_NAME, status_service.SERVICE_NAME)
HEALTH_SERVICE_NAME = "grpc.health.v1.Health"

FAREWELL_S = 0.25
"""How long connections to which all was said may take to hear that they are over (one round trip; then this is
over, too). Cut without it, gRPC tells them of an error, and a Python client prints that to its user's terminal. Who
watches only (status, health) is cut after it."""

OPEN_CALLS_PER_RUNNING = 4
"""gRPC counts a call until its caller has read its end or is gone, we until our part is over. So gRPC's own limit is
this many times ours: callers who never read keep its places, and no place of those who do."""

OTHER_KIND_COUNT = 3
"""Kinds of calls beside generations, each with room for as many at once, which it bounds itself: ModelService's, who
watches the status, who watches the health. So none of them takes a generation's place."""

logger = logging.getLogger("baton.router")


class ServerError(Exception):
    """The router cannot serve as configured; the message says what to change."""


@dataclass(frozen=True, slots=True)
class RouterEndpoint:
    """Where a started router listens."""

    address: str
    admin_address: str
    metrics_address: str


async def run_router(
    config: RouterConfig,
    *,
    secret: bytes,
    stop: asyncio.Event,
    hurry: asyncio.Event | None = None,
    on_ready: Callable[[RouterEndpoint], None] = lambda _: None,
) -> None:
    """Serves until ``stop`` is set, then drains for at most ``config.drain_grace_s``, or until ``hurry`` is set.

    Raises ``ServerError`` when the model directory cannot be used or a port cannot be had.
    """
    server = RouterServer(config, secret=secret)
    try:
        on_ready(await server.start())
        await stop.wait()
        await server.drain(hurry or asyncio.Event())
    finally:
        await asyncio.shield(server.close())


class RouterServer:
    """One router. ``start`` once; ``close`` is idempotent and ends everything that ``start`` began."""

    def __init__(
        self, config: RouterConfig, *, secret: bytes, connect: Connect | None = None, rng: random.Random | None = None
    ) -> None:
        """Reads the model directory. Raises ``ServerError``. Must run inside the event loop that will serve.
        ``connect``: how to reach a worker; gRPC unless a test says otherwise."""
        self.config = config
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.window = PhaseWindow()
        self._tokenizer, self._template, self._limits = load_model(config)
        self.roster = Roster(
            connect or connect_by_grpc(secret),
            RosterLimits(
                load_interval_s=config.load_interval_s,
                silence_s=config.worker_silence_s,
                lost_s=2 * config.worker_silence_s,
            ),
        )
        self.introductions = Introductions(self.roster, on_result=self.metrics.introduced)
        self.admission = Admission(
            self.roster,
            limits=AdmissionLimits(
                queue_limit=config.queue_limit,
                max_in_flight_count=config.max_in_flight_count,
                max_wait_s=config.max_queue_wait_s,
                no_worker_s=config.max_no_worker_wait_s,
            ),
            policy=PlacementPolicy(mode=config.placement, local_prompt_token_count=config.local_prompt_token_count),
            rng=rng or random.Random(),  # noqa: S311  # breaks ties between workers
        )
        self.relay = Relay(
            self.roster,
            self.admission,
            limits=FlightLimits(
                max_attempt_count=config.max_attempt_count,
                lease_s=config.lease_s,
                prefill_timeout_s=config.prefill_timeout_s,
                gap_timeout_s=config.gap_timeout_s,
                max_unread_bytes=config.max_unread_bytes,
            ),
            metrics=self.metrics,
        )
        self.chat_abilities = abilities_of(
            self._template,
            tool_parser=config.tool_parser,
            reasoning_parser=config.reasoning_parser,
            template_argument_names=config.template_arguments,
        )
        encoder = PromptEncoder(self._tokenizer, self._template, self.chat_abilities)
        self.parsers = parsers_of(config)
        parsing = None if self.parsers is None else AnswerParsing(self.parsers, self.chat_abilities)
        intake = Intake(
            tokenizer=self._tokenizer,
            encoder=encoder,
            limits=self.limits,
            metrics=self.metrics,
            parsing=parsing,
        )
        pipeline = Pipeline(self.relay, intake, parsing)
        self._key_file = open_api_keys(config)
        callers = self._callers = Callers(None if self._key_file is None else self._key_file.keys)
        self.resumables = Resumables(
            ResumeLimits(
                window=WindowLimits(config.resume_window_bytes, config.resume_window_token_count),
                max_count=config.max_resumable_count,
                total_bytes=config.resume_total_bytes,
                default_grace_s=config.resume_grace_s,
                max_grace_s=config.max_resume_grace_s,
            ),
            on_abandoned=self.metrics.abandoned.inc,
            phase_of=self.relay.phase_of,
        )
        self.metrics.resumable.set_function(lambda: self.resumables.kept_count)
        self.metrics.detached.set_function(lambda: self.resumables.detached_count)
        self.metrics.replay_bytes.set_function(lambda: self.resumables.used_bytes)
        self.generation = GenerationService(
            intake=intake,
            pipeline=pipeline,
            metrics=self.metrics,
            window=self.window,
            callers=callers,
            desk=ResumeDesk(
                resumables=self.resumables,
                intake=intake,
                pipeline=pipeline,
                metrics=self.metrics,
                secret=secret,
                now=wall_clock,
            ),
            default_deadline_s=config.default_deadline_s,
            max_deadline_s=config.max_deadline_s,
            max_call_count=config.max_concurrent_call_count,
        )
        self.models = ModelService(
            tokenizer=self._tokenizer,
            encoder=encoder,
            card=self.model_card,
            authorise=lambda context: service.check_key(callers, context),
            max_call_count=config.max_concurrent_call_count,
        )
        names = [*PUBLIC_SERVICE_NAMES, admin_service.SERVICE_NAME]
        self.health = RouterHealth(
            names, lambda: self.relay.could_serve, max_watcher_count=config.max_concurrent_call_count
        )
        self.roster.on_readiness(self.health.changed)
        self._admin = AdminService(roster=self.roster, window=self.window, counts=self.counts, secret=secret)
        self.status = StatusService(
            roster=self.roster,
            window=self.window,
            counts=self.counts,
            authorise=lambda context: service.check_key(callers, context),
            max_watcher_count=config.max_concurrent_call_count,
        )
        # What runs: servers, the HTTP server of /metrics and its thread, background tasks.
        self._servers: list[grpc.aio.Server] = []
        self._public: grpc.aio.Server | None = None
        self._metrics_server: tuple[Any, Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<RouterServer {self.config.model_name} [{self.generation.call_count} calls]>"

    def limits(self) -> ModelLimits:
        """The model's, cut to the smallest context of the ready workers: any of them may be chosen."""
        contexts = [w.info.max_context_token_count for w in self.roster.view().ready() if w.info is not None]
        smallest = min(contexts, default=self._limits.max_context_token_count)
        if smallest >= self._limits.max_context_token_count:
            return self._limits
        return replace(self._limits, max_context_token_count=smallest)

    def model_card(self) -> ModelCard:
        """What callers are told of the model now."""
        return ModelCard(
            self.limits(),
            special_tokens=tuple(self._tokenizer.special_tokens.items()),
            chat_template="" if self._template is None else self._template.source,
            capabilities=Capabilities(
                has_chat=self.chat_abilities.has_chat,
                has_tools=self.chat_abilities.has_tools,
                tool_parser=self.chat_abilities.tool_parser,
                reasoning_parser=self.chat_abilities.reasoning_parser,
                template_argument_names=tuple(self.chat_abilities.template_argument_names),
                has_resume=self.config.max_resumable_count > 0,
            ),
        )

    def counts(self) -> Counts:
        return Counts(
            queued_count=self.relay.queued_count,
            in_flight_count=self.generation.call_count,
            finished_count=self.generation.ended_count,
            failed_count=self.generation.failed_count,
            is_serving=self.health.is_serving,
        )

    async def start(self) -> RouterEndpoint:
        """Listens. Raises ``ServerError``, naming the port and its key, when one is taken, the TLS file that cannot
        be used, or the parser that cannot be had."""
        config = self.config
        credentials = load_credentials(config)
        if self.parsers is not None:  # BEFORE anybody can call: they take seconds to come
            try:
                await self.parsers.start()
            except ParserStartError as error:
                raise ServerError(str(error)) from error
        public = self._public = self._server(*public_options(config))
        counted = RefusesUnreadable(public, self.generation.refuse_unread)
        readable = RefusesUnreadable(public, service.refuse)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.generation, counted)  # type: ignore[no-untyped-call]
        model_pb2_grpc.add_ModelServiceServicer_to_server(self.models, readable)  # type: ignore[no-untyped-call]
        status_pb2_grpc.add_StatusServiceServicer_to_server(self.status, readable)  # type: ignore[no-untyped-call]
        await self.health.attach(public)
        admin = self._server()
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self._admin, admin)  # type: ignore[no-untyped-call]
        await self.health.attach(admin)
        if config.enable_reflection:
            reflection.enable_server_reflection(
                [*PUBLIC_SERVICE_NAMES, HEALTH_SERVICE_NAME, reflection.SERVICE_NAME],
                public,
            )
            reflection.enable_server_reflection(
                [admin_service.SERVICE_NAME, HEALTH_SERVICE_NAME, reflection.SERVICE_NAME], admin
            )
        address = _bind(public, config.listen_address, "listen_address", credentials)
        admin_address = _bind(admin, config.admin_address, "admin_address")
        metrics_address = self._start_metrics()
        plaintext = [config.admin_address, config.metrics_address]
        for each in plaintext if credentials else [config.listen_address, *plaintext]:
            if not is_loopback_address(each):
                logger.warning("listening beyond this machine, on %s: calls are not encrypted", each)
        self._tasks.append(asyncio.create_task(self.health.run(), name="health follows the roster"))
        if self._key_file is not None:
            follow = self._key_file.follow(self._callers.take)
            self._tasks.append(asyncio.create_task(follow, name="API keys follow their file"))
        await public.start()
        await admin.start()
        return RouterEndpoint(address, admin_address, metrics_address)

    async def drain(self, hurry: asyncio.Event) -> None:
        """Health flips before anything else, and whoever watches it has ``drain_notice_s`` to turn away while calls
        are still served. Then no connection is taken any more, every client is told to connect anew (GOAWAY: its next
        call goes elsewhere) and what comes all the same gets DRAINING. What runs may finish, for ``drain_grace_s``
        from the beginning at most, or until ``hurry`` is set. Nobody waits where nothing runs."""
        config = self.config
        ends_at = asyncio.get_running_loop().time() + config.drain_grace_s
        await self.health.drain()
        await self._until_idle(hurry, min(config.drain_notice_s, config.drain_grace_s))
        self.generation.begin_drain()
        self.models.begin_drain()
        if self._public is not None:
            # LATER than what is left is ended here, so that its callers hear why.
            goodbye = self._public.stop(config.stop_grace_s)
            self._tasks.append(asyncio.create_task(goodbye, name="clients are told to go"))
        await self._until_idle(hurry, ends_at - asyncio.get_running_loop().time())
        if count := self._call_count:
            logger.warning("%d calls were still open after draining and are ended", count)

    async def _until_idle(self, hurry: asyncio.Event, limit_s: float) -> None:
        waits = [asyncio.create_task(self._wait_idle()), asyncio.create_task(hurry.wait())]
        try:
            await asyncio.wait(waits, timeout=max(0.0, limit_s), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def close(self) -> None:
        """Ends everything. Idempotent."""
        # BEFORE calls are cancelled, which tells their callers nothing; who can go on elsewhere hears that first.
        self.generation.begin_drain()
        self.models.begin_drain()
        await say_goodbyes([*self.resumables.goodbyes(), *self.relay.goodbyes()], lambda: self._call_count)
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.stop(FAREWELL_S) for server in servers))
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.resumables.close()
        await self.relay.close()
        if self.parsers is not None:
            await self.parsers.close()
        await self.introductions.close()
        await self.roster.close()
        metrics_server, self._metrics_server = self._metrics_server, None
        if metrics_server is not None:
            http_server, thread = metrics_server
            await asyncio.to_thread(http_server.shutdown)
            http_server.server_close()
            await asyncio.to_thread(thread.join)
        self._tokenizer.close()

    @property
    def _call_count(self) -> int:
        """Of whom there is one until its status is sent."""
        return self.generation.open_count + self.models.call_count

    async def _wait_idle(self) -> None:
        await self.generation.wait_idle()
        await self.models.wait_idle()

    def _server(self, *options: tuple[str, int]) -> grpc.aio.Server:
        config = self.config
        server = grpc.aio.server(
            maximum_concurrent_rpcs=(OPEN_CALLS_PER_RUNNING + OTHER_KIND_COUNT) * config.max_concurrent_call_count,
            options=[
                # Without this a second router could bind the same port, and the kernel would deal calls to either.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_metadata_size", 16 * 1024),
                # Prefill of a long prompt is silence: clients may ping through it.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * config.min_ping_interval_s)),
                # And a client whose machine vanished is noticed, so that its requests end.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                *options,
            ],
        )
        self._servers.append(server)
        return server

    def _start_metrics(self) -> str:
        host, port = _split(self.config.metrics_address)
        with _listening(self.config.metrics_address, "metrics_address"):
            self._metrics_server = start_http_server(port, addr=host, registry=self.registry)
        return _joined(host, self._metrics_server[0].server_port)


def public_options(config: RouterConfig) -> list[tuple[str, int]]:
    """What the public port has beside what both ports have: how much one connection may ask, and how old it gets."""
    options = [
        ("grpc.max_concurrent_streams", config.max_connection_call_count),
        # Of calls that we have not come to yet, gRPC cancels all beyond 1,000 to 3,000, and all that wait for 30 s:
        # CANCELLED, which says nothing and which nobody retries. They wait for us instead, at most until a deadline.
        ("grpc.server.max_pending_requests", max(1000, config.max_concurrent_call_count)),
        ("grpc.server.max_pending_requests_hard_limit", max(3000, 2 * config.max_concurrent_call_count)),
        ("grpc.server_max_unrequested_time_in_server", math.ceil(config.max_deadline_s)),
    ]
    if config.max_connection_age_s:
        options += [
            ("grpc.max_connection_age_ms", round(1000 * config.max_connection_age_s)),
            ("grpc.max_connection_age_grace_ms", round(1000 * config.max_connection_age_grace_s)),
        ]
    return options


def open_api_keys(config: RouterConfig) -> KeyFile | None:
    """None: the configuration names none. Raises ``ServerError``."""
    if not config.api_keys_path:
        return None
    try:
        return KeyFile(Path(config.api_keys_path).expanduser())
    except ApiKeysError as error:
        raise ServerError(f"api_keys_path: {error}") from error


def load_credentials(config: RouterConfig) -> grpc.ServerCredentials | None:
    """None: the public port is plaintext. Raises ``ServerError``."""
    try:
        files = TlsFiles.of(config)
        return None if files is None else files.credentials()
    except TlsFilesError as error:
        raise ServerError(str(error)) from error


def connect_by_grpc(secret: bytes) -> Connect:
    """How the router reaches its workers."""
    return lambda spec: GrpcWorkerClient(spec.address, secret)


def load_model(config: RouterConfig) -> tuple[Tokenizer, ChatTemplate | None, ModelLimits]:
    """What the router needs of a model: no weights. Raises ``ServerError``, naming key and file."""
    model_dir = Path(config.model_dir).expanduser()
    try:
        tokenizer = Tokenizer.load(model_dir)
        override = Path(config.chat_template_path).expanduser() if config.chat_template_path else None
        template = ChatTemplate.load(model_dir, override)
        context = read_json_object(model_dir / "config.json").get("max_position_embeddings")
    except TokenizerError as error:
        raise ServerError(f"model_dir: {error}. Prepare the model, or set model_dir to where it is.") from error
    context_token_count = config.max_context_token_count
    if context_token_count is None:
        if not isinstance(context, int):
            raise ServerError(
                f"{model_dir / 'config.json'} does not say max_position_embeddings; set max_context_token_count"
            )
        context_token_count = context
    limits = ModelLimits(config.model_name, tokenizer.vocab_size, context_token_count, tokenizer.eos_token_ids)
    return tokenizer, template, limits


def _bind(server: grpc.aio.Server, address: str, key: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Binds and returns the address with its real port."""
    host, _ = _split(address)
    with _listening(address, key):
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        if port == 0:
            raise RuntimeError("not bound")
    return _joined(host, port)


@contextmanager
def _listening(address: str, key: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        _, port = _split(address)
        raise ServerError(
            f"{key}: cannot listen on {address}: the port is in use, or the address is not of this machine. Stop the "
            f"process that has it (ss -ltnp 'sport = :{port}'), or set {key} to another port"
        ) from error


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def endpoint_line(endpoint: RouterEndpoint) -> str:
    """One JSON line that says where the router listens, for whoever started it."""
    return json.dumps(
        {
            "address": endpoint.address,
            "admin_address": endpoint.admin_address,
            "metrics_address": endpoint.metrics_address,
        }
    )

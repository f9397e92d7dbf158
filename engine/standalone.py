"""A worker process on its own, without a fleet: reads its file, builds its engine, serves one phase.

For running a single phase by hand or under another supervisor; a whole cluster is the fleet's. Owns the reading
of that file and the exit status; which phase is served is the caller's (``prefill_worker``, ``decode_worker``).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import secrets
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from baton import event_loop
from baton.errors import BatonError
from baton.log_lines import log_to_stderr
from baton.metrics import WorkerMetrics
from baton.request import Role
from baton.secret import secret_from_environment, side_channel_key
from engine.config import EngineConfig, EngineIdentity
from engine.hosting import (
    Attach,
    HostConfig,
    HostingError,
    WorkerEndpoint,
    WorkerHost,
    run_worker_host,
    start_unless_stopped,
    stop_on_signals,
)
from engine.introductions import Introductions
from engine.load_board import LoadBoard, WorkerPart
from engine.protocol import Engine
from engine.service import add_worker_service, worker_info

C = TypeVar("C")


class ConfigFileError(ValueError):
    """The file cannot be used; the message names the key and the fix."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a phase is built from. One per process."""

    engine: Engine
    worker_id: str
    epoch: str
    secret: bytes
    metrics: WorkerMetrics


Build = Callable[[WorkerSetup], tuple[WorkerPart, Attach]]
"""Makes the phase's worker, and what adds its service to the server."""


def read_tables(path: str, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file. Raises ``ConfigFileError``."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigFileError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path} is not TOML: {error}") from None
    for name, table in content.items():
        if name not in known or not isinstance(table, dict):
            raise ConfigFileError(f"{path}: [{name}] is not a table known here; known: {', '.join(known)}")
    return {name: content.get(name, {}) for name in known}


def from_table(cls: type[C], name: str, table: Mapping[str, Any]) -> C:
    """``cls``, a dataclass that checks itself, from a table. Raises ``ConfigFileError`` naming the key."""
    known = [each.name for each in dataclasses.fields(cls) if each.init]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigFileError(f"[{name}] {key}: is not known; known here: {', '.join(known)}")
    try:
        return cls(**table)
    except (TypeError, ValueError) as error:
        raise ConfigFileError(f"[{name}] {error}") from None


def build_engine(config: EngineConfig, identity: EngineIdentity) -> Engine:
    """The engine that ``config.kind`` names. Heavy imports happen here and only for the kind that is asked for."""
    if config.kind == "vllm":
        from engine.vllm_engine import VllmEngine

        return VllmEngine(config, identity)
    from engine.sim import SimConfig, SimEngine, SimNetwork

    engine_id = f"{identity.worker_id}-{identity.epoch}"
    return SimEngine(SimConfig.from_engine_config(config, engine_id=engine_id), SimNetwork(spans_processes=True))


async def serve(
    role: Role, worker_id: str, host_config: HostConfig, engine_config: EngineConfig, secret: bytes, build: Build
) -> None:
    """Runs the worker until a signal. Raises ``HostingError`` and ENGINE_FAILED."""
    stop = asyncio.Event()
    stop_on_signals(stop)
    epoch = secrets.token_hex(8)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, worker_id)
    engine = build_engine(engine_config, EngineIdentity(worker_id, epoch, side_channel_key(secret)))
    if not await start_unless_stopped(engine, stop):
        return
    part, attach = build(WorkerSetup(engine, worker_id, epoch, secret, metrics))
    board = LoadBoard(engine, [part], epoch=epoch, metrics=metrics)

    introductions = Introductions(
        engine,
        worker_id=worker_id,
        secret=secret,
        allowed_hosts=(*engine_config.peer_hosts, engine_config.side_channel_host),
    )
    info = worker_info(engine.info, worker_id=worker_id, epoch=epoch, role=role, transfer_peer=introductions.sealed)

    def attach_worker(server: Any) -> str:
        return add_worker_service(server, info, board, introductions)

    host = WorkerHost(host_config, secret=secret, registry=registry, attach=[attach, attach_worker])
    await run_worker_host(
        engine, [part], board, host, host_config, worker_id=worker_id, stop=stop, on_ready=_say_ready
    )


def _say_ready(endpoint: WorkerEndpoint) -> None:
    print(
        f"{endpoint.worker_id} ready on {endpoint.address}, metrics on http://{endpoint.metrics_address}/metrics",
        flush=True,
    )


def main(
    role: Role, limits_class: type[C], build: Callable[[C], Build], arguments: Sequence[str] | None = None
) -> int:
    """The command: a file with [worker], [host], [limits] and [engine]. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {role.value}_worker",
        description=f"Runs one stand-alone {role.value} worker. A whole cluster is started by the fleet instead.",
        epilog="The cluster's secret is read from BATON_CLUSTER_SECRET.",
    )
    parser.add_argument("config", help="TOML file with [worker] id, [host], [limits] and [engine]")
    parser.add_argument("--port", type=int, help="gRPC port, instead of the file's; 0: any free one")
    parser.add_argument("--metrics-port", type=int, help="port of /metrics, likewise")
    parsed = parser.parse_args(arguments)
    log_to_stderr()
    try:
        tables = read_tables(parsed.config, ("worker", "host", "limits", "engine"))
        for key in ("port", "metrics_port"):
            if getattr(parsed, key) is not None:
                tables["host"][key] = getattr(parsed, key)
        worker_id = from_table(WorkerName, "worker", tables["worker"]).id or f"{role.value}-{os.getpid()}"
        host_config = from_table(HostConfig, "host", tables["host"])
        engine_config = from_table(EngineConfig, "engine", tables["engine"])
        # One list of hosts: whom the engine may dial is whom a ticket may name, unless the file says otherwise.
        transfer = tables["limits"].setdefault("transfer", {})
        if isinstance(transfer, dict):
            transfer.setdefault("allowed_hosts", [*engine_config.peer_hosts, engine_config.side_channel_host])
        limits = from_table(limits_class, "limits", tables["limits"])
        secret = secret_from_environment(os.environ)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    try:
        with event_loop.runner() as runner:
            runner.run(serve(role, worker_id, host_config, engine_config, secret, build(limits)))
    except (HostingError, BatonError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    return 0


@dataclass(frozen=True, slots=True)
class WorkerName:
    """The [worker] table. Without an id, one is made of role and process id."""

    id: str = ""

    def __post_init__(self) -> None:
        if self.id and not (len(self.id) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_.") for c in self.id)):
            raise ValueError("id: must be at most 64 letters, digits or any of - _ .")

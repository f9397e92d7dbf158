"""One worker process: an engine, both phases on top of it, and the services in front of them.

Composes; owns nothing but the order. Every worker serves both phases, so that its role is a decision of the router
and a change of role reloads nothing. Runnable: ``python -m fleet.worker_process --config '{...}'`` (or a file's path)
with the cluster's secret in the environment. Exits non-zero when it cannot start, or when its engine dies: whoever
supervises it starts it anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from baton import event_loop
from baton.errors import BatonError
from baton.log_lines import log_to_stderr
from baton.metrics import WorkerMetrics
from baton.request import Role
from baton.secret import secret_from_environment, side_channel_key
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeLimits, DecodeWorker
from engine.config import EngineConfig, EngineIdentity
from engine.hosting import (
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
from fleet.lifeline import Reports, die_with_parent
from fleet.toml_table import ConfigError, build
from kvtransfer.ticket import TransferLimits
from prefill_worker.service import add_prefill_service
from prefill_worker.worker import PrefillLimits, PrefillWorker

log = logging.getLogger("baton.worker")

GRACE_S = 2.0
"""Of the time a stop may take: for calls that end after draining."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProcessConfig:
    """What a worker process is told. Written by ``fleet.members``."""

    worker_id: str
    role: Role
    bind_host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    side_channel_port: int = 0
    """0: a free one."""
    cores: tuple[int, ...] = ()
    """Cores by number, or..."""
    core_slots: tuple[int, ...] = ()
    """...by position among the cores this process may use, wrapped around when there are fewer. Both empty: all."""
    gpus: tuple[int, ...] = ()
    """GPUs by number, unless CUDA_VISIBLE_DEVICES is set already (Ray sets it)."""
    stop_deadline_s: float = 10.0
    """A stop must be over by then, or the supervisor kills."""
    engine: Mapping[str, Any]
    """Arguments of ``EngineConfig``, without those made of the keys above."""
    simulated: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.worker_id:
            raise ConfigError("worker_id: is empty; give a name that is unique in the cluster")


def engine_config(config: WorkerProcessConfig, available_cores: tuple[int, ...]) -> EngineConfig:
    """The engine's configuration on this machine. Raises ``ConfigError``."""
    side_channel_port = config.side_channel_port or _free_port(config.bind_host)
    return build(
        EngineConfig,
        config.engine,
        "engine",
        given={
            "cores": _cores(config, available_cores),
            "side_channel_host": config.bind_host,
            "side_channel_port": side_channel_port,
        },
    )


def _cores(config: WorkerProcessConfig, available: tuple[int, ...]) -> tuple[int, ...]:
    if config.cores:
        missing = sorted(set(config.cores) - set(available))
        if missing:
            raise ConfigError(
                f"cores: {missing} cannot be used here; this process may use {list(available)}. Change cores of the "
                f"role {config.role.value}, or take it out to have cores dealt out"
            )
        return config.cores
    if len(config.core_slots) > len(available):
        raise ConfigError(
            f"cores_per_worker: is {len(config.core_slots)}, and this machine lets us use {len(available)}; lower it"
        )
    chosen = tuple(available[slot % len(available)] for slot in config.core_slots)
    return tuple(sorted(set(chosen)))


def _free_port(host: str) -> int:
    """A port that is free now. Somebody else may take it before the engine does: then its start fails and is
    repeated with another."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def make_engine(config: WorkerProcessConfig, engine: EngineConfig, epoch: str, secret: bytes) -> Engine:
    if engine.kind == "simulated":
        from engine.sim import SimEngine
        from engine.sim_config import SimConfig
        from kvtransfer.simulated import SimNetwork

        sim = SimConfig.from_engine_config(
            engine, engine_id=f"{config.worker_id}-{epoch}", overrides=dict(config.simulated)
        )
        return SimEngine(sim, SimNetwork(spans_processes=True))
    from engine.vllm_engine import VllmEngine

    return VllmEngine(engine, EngineIdentity(config.worker_id, epoch, side_channel_key(secret)))


async def run_worker(
    config: WorkerProcessConfig,
    secret: bytes,
    stop: asyncio.Event,
    on_ready: Callable[[WorkerEndpoint], None] = lambda _: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until ``stop`` is set; then drains, within ``config.stop_deadline_s``. Nothing it started is left.

    Raises ``ConfigError`` and ``HostingError`` for what the operator can change, ``BatonError`` when the engine died.
    """
    epoch = secrets.token_hex(8)
    on_machine = engine_config(config, tuple(sorted(os.sched_getaffinity(0))))
    if config.gpus:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, config.gpus)))
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, config.worker_id)
    engine = make_engine(config, on_machine, epoch, secret)
    what = "loading the model" if on_machine.kind == "vllm" else "starting"
    on_progress(f"{what} on {_said(on_machine)}")
    if not await start_unless_stopped(engine, stop):
        return
    transfer = TransferLimits(
        allowed_hosts=frozenset((*on_machine.peer_hosts, on_machine.side_channel_host)),
        block_token_count=on_machine.block_token_count,
    )
    shared: dict[str, Any] = {"worker_id": config.worker_id, "epoch": epoch, "secret": secret, "metrics": metrics}
    prefill = PrefillWorker(engine, limits=PrefillLimits(transfer=transfer), **shared)
    # What runs, and as many again that wait: an engine with room must not be refused by its own worker.
    leg_count = max(DecodeLimits().max_leg_count, 2 * on_machine.max_running_count)
    decode = DecodeWorker(engine, limits=DecodeLimits(max_leg_count=leg_count, transfer=transfer), **shared)
    parts: tuple[WorkerPart, ...] = (prefill, decode)
    board = LoadBoard(engine, parts, epoch=epoch, metrics=metrics)
    introductions = Introductions(
        engine, worker_id=config.worker_id, secret=secret, allowed_hosts=transfer.allowed_hosts
    )
    info = worker_info(
        engine.info,
        worker_id=config.worker_id,
        epoch=epoch,
        role=config.role,
        transfer_peer=introductions.sealed,
    )
    hosting = HostConfig(
        host=config.bind_host,
        port=config.port,
        metrics_port=config.metrics_port,
        grace_s=min(GRACE_S, config.stop_deadline_s / 4),
        drain_s=config.stop_deadline_s / 2,
    )
    host = WorkerHost(
        hosting,
        secret=secret,
        registry=registry,
        attach=(
            partial(add_prefill_service, worker=prefill),
            partial(add_decode_service, worker=decode),
            partial(add_worker_service, info=info, board=board, introductions=introductions),
        ),
    )
    await run_worker_host(
        engine, parts, board, host, hosting, worker_id=config.worker_id, stop=stop, on_ready=on_ready
    )


def _said(engine: EngineConfig) -> str:
    if engine.device == "cuda":
        return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '0')}"
    if not engine.cores:
        return "all cores"
    return f"core{'s' if len(engine.cores) > 1 else ''} {', '.join(map(str, engine.cores))}"


def endpoint_mapping(endpoint: WorkerEndpoint, role: Role) -> dict[str, Any]:
    """What the supervisor is told, and tells the router."""
    return {**asdict(endpoint), "role": role.value}


async def _main(config: WorkerProcessConfig, secret: bytes, reports: Reports) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    await run_worker(
        config,
        secret,
        stop,
        on_ready=lambda endpoint: reports.ready(endpoint_mapping(endpoint, config.role)),
        on_progress=reports.progress,
    )


def read_config(text: str) -> WorkerProcessConfig:
    """From JSON, or from a file with it. Raises ``ConfigError``."""
    try:
        data = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config is neither JSON nor a file with JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError("--config must hold one object")
    return build(WorkerProcessConfig, data, "")


def main() -> int:
    die_with_parent()
    reports = Reports()
    log_to_stderr()
    parser = argparse.ArgumentParser(prog="fleet.worker_process", description=__doc__)
    parser.add_argument("--config", required=True, help="JSON of WorkerProcessConfig, or the path of a file with it")
    parser.add_argument("--bind-host", default="", help="listen here instead of at the configured host")
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config)
        if arguments.bind_host:
            config = replace(config, bind_host=arguments.bind_host)
        secret = secret_from_environment(os.environ)
        with event_loop.runner() as runner:
            runner.run(_main(config, secret, reports))
    except asyncio.CancelledError:
        return 1  # a second signal: stopped without draining
    except BatonError as error:
        return _fail(reports, error.message)
    except (HostingError, ValueError, ImportError, OSError) as error:
        return _fail(reports, str(error))
    except Exception as error:
        log.exception("a bug in Baton")
        return _fail(reports, f"{type(error).__name__}: see the log")
    return 0


def _fail(reports: Reports, message: str) -> int:
    log.error("%s", message)
    with contextlib.suppress(OSError):
        reports.failed(message)
    return 1


if __name__ == "__main__":
    sys.exit(main())

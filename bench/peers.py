"""The systems a figure compares: started on given cores, ready or refused by a deadline, gone without a rest.

Owns the command lines of the peers and of Baton itself. A peer gets what Baton gets from its TOML: the same
build, model, dtype, KV bytes, context, block size, batch limits, prefix caching, eager mode and preloads.
Everything listens on loopback. Never measures.

Stock prefill/decode is run in two forms. "tuned": the UniProc executor, and after start every thread is moved
back to its engine's core, as ``taskset -a`` would, because the stock connector moves both engines' main threads
to the machine's last core. "as shipped": vLLM's default executor and that placement, untouched.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.admin_client import AdminClient
from baton.errors import BatonError
from baton.request import Role
from bench.children import Child, Cpu
from bench.cores import pinned_engine_environment
from engine.config import EngineConfig
from fleet.config import FleetConfig

UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
READY_DEADLINE_S = 240.0
_KV_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """One column of the table. ``kind``: "baton", "engine" (one vLLM server) or "stock-pd"."""

    name: str
    kind: str
    title: str
    as_shipped: bool = False
    """vLLM's default executor (API server, engine core and worker are three processes) and no re-pinning."""
    max_batched_token_count: int | None = None
    """Prefill chunk, where it differs from Baton's configuration."""


VLLM_OWN_CHUNK = 2048
"""What vLLM's server takes on CPU unless told otherwise."""

SYSTEMS: dict[str, SystemSpec] = {
    spec.name: spec
    for spec in (
        SystemSpec("baton", "baton", "Baton 1P+1D"),
        SystemSpec("engine", "engine", "one vLLM engine, one core", max_batched_token_count=VLLM_OWN_CHUNK),
        SystemSpec(
            "engine-as-shipped",
            "engine",
            "one vLLM engine, one core, as shipped",
            as_shipped=True,
            max_batched_token_count=VLLM_OWN_CHUNK,
        ),
        SystemSpec(
            "engine-chunk-256", "engine", "one vLLM engine, one core, chunks of 256", max_batched_token_count=256
        ),
        SystemSpec("stock-pd", "stock-pd", "stock vLLM P/D, tuned"),
        SystemSpec("stock-pd-as-shipped", "stock-pd", "stock vLLM P/D, as shipped", as_shipped=True),
    )
}


class RunningSystem:
    """A started system. ``target_address`` is a gRPC address for Baton and a URL for the others."""

    def __init__(self, spec: SystemSpec, target_address: str, children: Sequence[Child], facts: dict[str, Any]):
        self.spec = spec
        self.target_address = target_address
        self.facts = facts
        self.leg_urls: dict[Role, str] = {}
        """Of stock prefill/decode: the two servers behind its proxy."""
        self._children = list(children)

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


def start_system(spec: SystemSpec, config: FleetConfig, config_path: Path, log_dir: Path) -> RunningSystem:
    """Starts ``spec`` and waits until it is ready. Raises ``ChildError`` and leaves nothing behind."""
    with ExitStack() as stack:
        started_at = time.monotonic()
        match spec.kind:
            case "baton":
                system = _start_baton(spec, config, config_path, log_dir, stack)
            case "engine":
                system = _start_engine(spec, config, log_dir, stack)
            case "stock-pd":
                system = _start_stock_pd(spec, config, log_dir, stack)
            case _:
                raise ValueError(f"unknown kind of system: {spec.kind}")
        system.facts["start_s"] = round(time.monotonic() - started_at, 1)
        stack.pop_all()  # ready: the caller's to stop
        return system


def role_cores(config: FleetConfig, role: Role) -> tuple[int, ...]:
    """The cores the fleet gives the first worker of ``role``: named in the file, or dealt out, prefill first."""
    pool = config.pools[role]
    if pool.cores:
        return pool.cores[0]
    usable = sorted(os.sched_getaffinity(0))
    prefill = config.pools[Role.PREFILL]
    start = 0 if role is Role.PREFILL else prefill.count * prefill.cores_per_worker
    cores = tuple(usable[start : start + pool.cores_per_worker])
    if len(cores) < pool.cores_per_worker:
        raise ValueError(f"{role.value}: this machine has only {len(usable)} cores")
    return cores


def _start_baton(
    spec: SystemSpec, config: FleetConfig, config_path: Path, log_dir: Path, stack: ExitStack
) -> RunningSystem:
    child = Child(
        "baton up",
        [sys.executable, "-m", "baton", "up", "--foreground", "--config", str(config_path)],
        environment=os.environ,
        log_path=log_dir / "baton.log",
        stop_signal=signal.SIGINT,
        stop_grace_s=90.0,  # it stops its own processes, and sees to it
    )
    stack.callback(child.stop)
    wanted = {role.value: config.pools[role].count for role in Role}
    admin_address = config.router.admin_address
    _until_ready(child, lambda: asyncio.run(_has_all_workers(admin_address, wanted)))
    return RunningSystem(
        spec, config.router.listen_address, [child], {"prefill_cores": role_cores(config, Role.PREFILL)}
    )


def _start_engine(spec: SystemSpec, config: FleetConfig, log_dir: Path, stack: ExitStack) -> RunningSystem:
    cores = role_cores(config, Role.PREFILL)
    engine = config.engines[Role.PREFILL]  # its chunk of 2,048 is also vLLM's own default for a server on CPU
    port = _free_port()
    child = _vllm_server(spec, engine, port, cores, log_dir / f"{spec.name}.log", None)
    stack.callback(child.stop)
    url = f"http://127.0.0.1:{port}"
    _until_ready(child, lambda: _is_healthy(url))
    return RunningSystem(spec, url, [child], {"cores": cores})


def _start_stock_pd(spec: SystemSpec, config: FleetConfig, log_dir: Path, stack: ExitStack) -> RunningSystem:
    children: dict[Role, Child] = {}
    urls: dict[Role, str] = {}
    for role in Role:
        port = _free_port()
        child = _vllm_server(
            spec,
            config.engines[role],
            port,
            role_cores(config, role),
            log_dir / f"{spec.name}-{role.value}.log",
            _KV_ROLES[role],
        )
        stack.callback(child.stop)
        children[role], urls[role] = child, f"http://127.0.0.1:{port}"
    for role in Role:
        _until_ready(children[role], lambda url=urls[role]: _is_healthy(url))  # type: ignore[misc]
    repinned: dict[str, int] = {}
    if not spec.as_shipped:
        repinned = {role.value: children[role].pin(role_cores(config, role)) for role in Role}
    proxy_port = _free_port()
    addresses = ["--port", str(proxy_port), "--prefill", urls[Role.PREFILL], "--decode", urls[Role.DECODE]]
    proxy = Child(
        "stock proxy",
        [sys.executable, "-m", "bench.stock_proxy", *addresses],
        environment=os.environ,
        log_path=log_dir / f"{spec.name}-proxy.log",
    )
    stack.callback(proxy.stop)
    url = f"http://127.0.0.1:{proxy_port}"
    _until_ready(proxy, lambda: _is_healthy(url), deadline_s=30.0)
    facts = {"cores": {role.value: role_cores(config, role) for role in Role}, "threads_repinned": repinned}
    system = RunningSystem(spec, url, [proxy, *children.values()], facts)
    system.leg_urls = urls
    return system


def vllm_command(spec: SystemSpec, engine: EngineConfig, port: int, *, kv_role: str | None) -> list[str]:
    """The server's command line; everything Baton's configuration says, and nothing more."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    options: dict[str, Any] = {
        "model": engine.model_path,
        "served-model-name": engine.model_name,
        "dtype": engine.dtype,
        "seed": engine.seed,
        "max-model-len": engine.max_context_token_count,
        "block-size": engine.block_token_count,
        "kv-cache-memory-bytes": engine.kv_cache_bytes,
        "max-num-seqs": engine.max_running_count,
        "max-num-batched-tokens": spec.max_batched_token_count or engine.max_batched_token_count,
        "generation-config": "vllm",
    }
    options |= {key.replace("_", "-"): value for key, value in engine.extra_args.items()}
    if not spec.as_shipped:
        options["distributed-executor-backend"] = UNIPROC
    if kv_role is not None:
        options["kv-transfer-config"] = json.dumps({"kv_connector": "NixlConnector", "kv_role": kv_role})
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    command += ["--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] if engine.enforce_eager else []
    return [*command, "--disable-uvicorn-access-log"]


def _vllm_server(
    spec: SystemSpec,
    engine: EngineConfig,
    port: int,
    cores: tuple[int, ...],
    log_path: Path,
    kv_role: str | None,
) -> Child:
    environment = pinned_engine_environment(os.environ, cores)
    if kv_role is not None:
        environment |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_free_port()),
        }
    return Child(
        log_path.stem,
        vllm_command(spec, engine, port, kv_role=kv_role),
        environment=environment,
        log_path=log_path,
        cores=cores,
    )


def _until_ready(child: Child, is_ready: Callable[[], bool], deadline_s: float = READY_DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not is_ready():
        if not child.is_running():
            raise child.failed("ended before it was ready")
        if time.monotonic() > deadline:
            raise child.failed(f"was not ready within {deadline_s:.0f} s")
        time.sleep(0.5)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:  # noqa: S310 our own loopback URL
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def _has_all_workers(admin_address: str, wanted: Mapping[str, int]) -> bool:
    """Whether every worker is ready. The health check would be content with one of them."""
    try:
        async with (
            AdminClient(admin_address) as client,
            asyncio.timeout(5.0),
            aclosing(client.watch()) as views,
        ):
            async for view in views:
                ready = Counter(worker.role for worker in view.workers if worker.health == "ready")
                return view.is_serving and all(ready[role] >= count for role, count in wanted.items())
    except (BatonError, TimeoutError):
        pass
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

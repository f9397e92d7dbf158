"""Whether this machine can start the configured fleet, asked before anything is started.

Reads the machine; changes nothing. Every refusal says what is wrong and what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from baton.request import Role
from fleet.config import FleetConfig, check_model_directory
from fleet.members import router_configs
from fleet.toml_table import ConfigError

STATE_DISK_BYTES = 200 << 20
"""Logs, and the sockets and logs of Ray."""
ENGINE_MEMORY_BYTES = 1 << 30
"""A vLLM process beside its weights and its KV: 0.7 to 1 GB resident, measured."""


class CannotStart(Exception):
    """This machine cannot run the configured fleet; the message says why and what to do."""


def check(config: FleetConfig) -> None:
    """Raises ``CannotStart`` or ``ConfigError`` for the first reason found."""
    if config.uses_real_model:
        check_model_directory(config)
    elif not (config.model.directory / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.path: there is no tokenizer.json in {config.model.directory}; the router needs it even with "
            "simulated engines. Run `make model`"
        )
    check_tls(config)
    check_disk(config.state_path)
    check_ports(config)
    runs_here = not (config.cluster.runner == "ray" and config.cluster.ray.address)
    if runs_here:
        check_cpu(config, _cpu_flags())
        check_memory(config, _available_memory_bytes())


def check_tls(config: FleetConfig) -> None:
    """As the router will, which would be started again and again to say the same."""
    from baton.tls import TlsFilesError
    from router.tls_files import TlsFiles

    try:
        TlsFiles.of(config.router)
    except TlsFilesError as error:
        raise ConfigError(f"router.{error}") from None


def check_cpu(config: FleetConfig, flags: frozenset[str]) -> None:
    uses_cpu_engine = any(
        config.pools[role].count and config.engines[role].kind == "vllm" and config.engines[role].device == "cpu"
        for role in Role
    )
    if uses_cpu_engine and flags and not flags & {"avx2", "avx512f"}:
        raise CannotStart(
            "this processor has neither AVX2 nor AVX-512, and vLLM's CPU kernels need one of them; use a processor "
            "from 2015 or later, or, in a virtual machine, pass the host's CPU model through"
        )


def check_memory(config: FleetConfig, available_bytes: int | None) -> None:
    """``None``: not known here, so not checked."""
    if available_bytes is None or not config.uses_real_model:
        return
    weights_bytes = sum(file.stat().st_size for file in config.model.directory.glob("*.safetensors"))
    needed_bytes = 0
    for role in Role:
        engine = config.engines[role]
        if engine.kind == "vllm" and engine.device == "cpu":
            needed_bytes += config.pools[role].count * (weights_bytes + engine.kv_cache_bytes + ENGINE_MEMORY_BYTES)
    if needed_bytes > available_bytes:
        raise CannotStart(
            f"the workers need about {needed_bytes / 1e9:.1f} GB of memory and {available_bytes / 1e9:.1f} GB are "
            "free; lower kv_cache_bytes of [prefill.engine] and [decode.engine], or the count of workers"
        )


def check_disk(path: Path) -> None:
    there = path
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        raise CannotStart(f"{there} cannot be written to; set cluster.state_dir to a directory that can")
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < STATE_DISK_BYTES:
        raise CannotStart(
            f"{there} has {free_bytes / 1e6:.0f} MB free and {STATE_DISK_BYTES / 1e6:.0f} MB are needed; free some "
            "space, or set cluster.state_dir to another disk"
        )


def check_ports(config: FleetConfig) -> None:
    """The router's ports, and those of workers that run on this machine for certain."""
    for key, host, port in _ports(config):
        try:
            _bind(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CannotStart(
                    f"port {port} is in use ({key}); stop the process that has it (ss -ltnp 'sport = :{port}'), or "
                    f"set {key} to another one in {config.source}"
                ) from None
            raise CannotStart(f"cannot listen on {host}:{port} ({key}): {error.strerror}; change {key}") from None


def _ports(config: FleetConfig) -> Iterator[tuple[str, str, int]]:
    for router in router_configs(config):
        for key in ("listen_address", "admin_address", "metrics_address"):
            host, _, port = getattr(router, key).rpartition(":")
            if int(port):
                yield f"router.{key}", host.strip("[]"), int(port)
    if config.cluster.runner == "ray" and config.cluster.ray.address:
        return
    bind_host = "127.0.0.1" if config.cluster.bind_host == "node" else config.cluster.bind_host
    for role in Role:
        pool = config.pools[role]
        for key, host in (("port", bind_host), ("metrics_port", "127.0.0.1"), ("side_channel_port", bind_host)):
            first = getattr(pool, key)
            for port in range(first, first + pool.count) if first else ():
                yield f"{role.value}.{key}", host, port


def _bind(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def _available_memory_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None

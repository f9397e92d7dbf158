"""vLLM's own OpenAI server as a child process: everything Baton's configuration says, and nothing more."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.request import Role
from bench.children import Child
from bench.comparison.readiness import free_port
from bench.comparison.specs import SystemSpec
from bench.cores import pinned_engine_environment
from engine.config import EngineConfig
from fleet.config import FleetConfig

UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
KV_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


def vllm_command(
    spec: SystemSpec, engine: EngineConfig, port: int, *, kv_role: str | None = None, is_behind_router: bool = False
) -> list[str]:
    """The server's command line.

    ``is_behind_router``: vllm-router drops ``continuous_usage_stats`` from a request, without which nobody can count
    the tokens of an event, so the server says them unasked.
    """
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
        transfer: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": kv_role}
        if not spec.as_shipped:
            # Fewer of the library's threads that spin; no option ends all of them.
            transfer["kv_connector_extra_config"] = {"num_threads": 0}
        options["kv-transfer-config"] = json.dumps(transfer)
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    command += ["--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] if engine.enforce_eager else []
    command += ["--enable-force-include-usage"] if is_behind_router else []
    return [*command, "--disable-uvicorn-access-log"]


def start_vllm_server(
    spec: SystemSpec,
    engine: EngineConfig,
    port: int,
    cores: Sequence[int],
    log_path: Path,
    *,
    kv_role: str | None = None,
    is_behind_router: bool = False,
) -> Child:
    """Starts one server on ``cores``; it is not ready yet, and the caller's to stop."""
    environment = pinned_engine_environment(os.environ, cores)
    if kv_role is not None:
        environment |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
    return Child(
        log_path.stem,
        vllm_command(spec, engine, port, kv_role=kv_role, is_behind_router=is_behind_router),
        environment=environment,
        log_path=log_path,
        cores=cores,
    )


def engine_of_all(config: FleetConfig) -> EngineConfig:
    """One engine in the place of every worker: the KV memory and the running requests of all of them together."""
    engine = config.engines[Role.DECODE]
    counts = {role: config.pools[role].count for role in Role}
    return replace(
        engine,
        kv_cache_bytes=sum(counts[role] * config.engines[role].kv_cache_bytes for role in Role),
        max_running_count=sum(counts[role] * config.engines[role].max_running_count for role in Role),
    )


def engine_facts(spec: SystemSpec, engine: EngineConfig, cores: Sequence[int]) -> dict[str, Any]:
    """What a server was given, fit for JSON."""
    return {
        "cores": list(cores),
        "kv_cache_bytes": engine.kv_cache_bytes,
        "max_running_count": engine.max_running_count,
        "max_batched_token_count": spec.max_batched_token_count or engine.max_batched_token_count,
        "executor": "as shipped (multiprocess)" if spec.as_shipped else "UniProc",
    }

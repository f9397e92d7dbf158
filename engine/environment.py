"""The environment an engine process is born into. Owns these variables; starts no process.

OpenMP, the allocator and vLLM read them once, when the process starts, so they are set in the worker process
before it creates the engine's. They are the same for every engine of a process, and a second engine that would
need other values is refused.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path

from engine.config import EngineConfig
from kvtransfer.side_channel import KEY_VARIABLE

_TCP_SEGMENTS = {"UCX_TCP_TX_SEG_SIZE": "256k", "UCX_TCP_RX_SEG_SIZE": "256k"}
"""UCX answers a read over TCP in messages of this size at most, 8 KiB by itself: calls and bookkeeping then take more
time than the bytes. Both, because it refuses to send more than it would receive. A few MiB, once two engines are
connected over TCP."""

_key_of_this_process = secrets.token_bytes(32)
_in_force: dict[str, str] = {}
_handed_down = ""


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Variable by variable, with the reason."""
    variables = {
        # Nothing leaves the machine: no statistics of use, no look-ups of models by name.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Plugins of other packages have no business in an engine.
        "VLLM_PLUGINS": "",
        # Standard output belongs to the program that runs the worker.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TOKENIZERS_PARALLELISM": "false",
        # How many outputs of a step vLLM's client deals with before others have a turn; the statistics come
        # last. No fewer than may run: a pull's record comes with the first token, whose reader wants it.
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "4096",
        # What the grammar compiler warns of quotes the grammar.
        "LLGUIDANCE_LOG_LEVEL": "0",
    }
    if config.transports:
        variables["UCX_TLS"] = ",".join(config.transports)
    if config.net_devices:
        variables["UCX_NET_DEVICES"] = ",".join(config.net_devices)
    elif _is_loopback(config.side_channel_host) and "UCX_NET_DEVICES" not in os.environ:
        # NIXL's transport listens on every interface otherwise; peers of a loopback address are on this host.
        variables["UCX_NET_DEVICES"] = "lo"
    if "UCX_KEEPALIVE_INTERVAL" not in os.environ:
        # A keepalive is a message to the memory's owner, and a read is done only when all that was sent before it was
        # taken in. An engine that computes, or has nothing to do, takes nothing in; one was due every 20 s.
        variables["UCX_KEEPALIVE_INTERVAL"] = "inf"
    may_use_tcp = "tcp" in config.transports or not (config.transports or _is_loopback(config.side_channel_host))
    if may_use_tcp and not {*_TCP_SEGMENTS} & os.environ.keys():
        variables |= _TCP_SEGMENTS
    if config.enforce_eager:
        # vLLM compiles one small function of the sampler even so: at the first request for logprobs, with every other
        # request of the engine waiting for seconds.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    if config.device == "cpu":
        thread_count = len(config.cores) or len(os.sched_getaffinity(0))
        variables |= {
            "OMP_NUM_THREADS": str(thread_count),
            # Threads that wait must not spin: the core belongs to others, too.
            "KMP_BLOCKTIME": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        preload = [*_present(os.environ.get("LD_PRELOAD", "").split(":")), *preloads()]
        if preload:
            variables["LD_PRELOAD"] = ":".join(dict.fromkeys(preload))
    return variables


def hand_down_key(key: bytes) -> None:
    """Leaves engine processes of this process the key of their side channel; without one, a key of this process.

    Raises ``ValueError`` when another engine of this process has another key.
    """
    global _handed_down
    said = (key or _key_of_this_process).hex()
    # What the variable holds before is no engine's of this process, but whoever's that started it.
    if (_handed_down or said) != said:
        raise ValueError("engines of one process are of one cluster: give both the same secret, or run two processes")
    _handed_down = os.environ[KEY_VARIABLE] = said


def preloads() -> list[str]:
    """A faster allocator and OpenMP runtime, where installed: a quarter of the decode time on CPU."""
    lib_dirs = (Path(sys.prefix) / "lib", Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"))
    found = []
    for name in ("libtcmalloc_minimal.so.4", "libiomp5.so"):
        candidates = [d / name for d in lib_dirs if (d / name).is_file()]
        found += [str(path) for path in candidates[:1]]
    return found


def put_in_force(variables: dict[str, str]) -> None:
    """Sets them in this process, for its children. Raises ``ValueError`` when another engine of this process
    runs under other values."""
    for name, value in variables.items():
        if _in_force.get(name, value) != value:
            raise ValueError(
                f"{name} is {_in_force[name]} for an engine of this process and would be {value} for this one: "
                "give both as many cores, or run them in two processes"
            )
    for name, value in variables.items():
        os.environ[name] = value
        _in_force[name] = value
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _present(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if path and Path(path).is_file()]

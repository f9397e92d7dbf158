"""What an engine is told before it starts. Owns the checks of these values; never reads files or starts anything.

Imports in a bare interpreter, so that a supervisor can refuse a bad deployment before it costs a process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvtransfer.faults import FaultPlan

__all__ = ["EngineConfig", "EngineIdentity"]

_UCX_NAME = re.compile(r"[A-Za-z0-9_.:^/\\-]{1,64}")
_KINDS = ("vllm", "simulated")
_DEVICES = ("cpu", "cuda")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_OWN_KEYS = {
    "model": "model.path",
    "served_model_name": "model.name",
    "dtype": "dtype",
    "seed": "seed",
    "max_model_len": "max_context_token_count",
    "block_size": "block_token_count",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "max_num_seqs": "max_running_count",
    "max_num_batched_tokens": "max_batched_token_count",
    "enable_prefix_caching": "enable_prefix_caching",
    "enforce_eager": "enforce_eager",
}
_FIXED_ARGUMENTS = frozenset(
    {
        *("kv_transfer_config", "distributed_executor_backend", "worker_cls", "worker_extension_cls"),
        *("async_scheduling", "scheduling_policy", "disable_log_stats"),
        "enable_log_requests",  # it logs prompts
    }
)


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Who runs the engine, for error texts and for the name its transfer agent goes by."""

    worker_id: str = "engine"
    epoch: str = ""
    side_channel_key: bytes = field(default=b"", repr=False)
    """With which engines prove to one another that they are of one cluster (``baton.secret``). Empty: a key of this
    process, so that only engines of the same process are its peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine of one worker process. Raises ``ValueError`` naming the key and the fix."""

    kind: Literal["vllm", "simulated"] = "vllm"
    model_path: str = ""
    """A directory with config, weights and tokenizer. Workers that exchange KV must use the same string."""
    model_name: str
    """What callers call the model."""
    dtype: str = "bfloat16"
    block_token_count: int = 128
    kv_cache_bytes: int
    """Memory for KV. Never guessed: a guess takes most of the machine, once per worker."""
    max_context_token_count: int = 8192
    max_running_count: int = 16
    max_batched_token_count: int = 2048
    """Tokens of one engine step: a longer prompt is computed in chunks of this size."""
    enable_prefix_caching: bool = True
    enforce_eager: bool = True
    cores: tuple[int, ...] = ()
    """CPU cores of the engine process; empty: those of the starting process."""
    side_channel_host: str = "127.0.0.1"
    """Where peers fetch this engine's transfer metadata; must be reachable by them."""
    side_channel_port: int = 5600
    """One per engine on a host."""
    transports: tuple[str, ...] = ()
    """Of the transfer library, in UCX's words (UCX_TLS): ("tcp",), or ("rc", "cuda"). Empty: it chooses."""
    net_devices: tuple[str, ...] = ()
    """Network devices it may use (UCX_NET_DEVICES): ("eth1",), or ("mlx5_0:1",). It listens on each of them, to
    whoever can reach them. Empty: loopback alone with a loopback ``side_channel_host``, else all."""
    peer_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    """Hosts this engine may pull KV from, besides its own ``side_channel_host``."""
    lease_s: float = 30.0
    """The engine's own backstop for held KV whose owner vanished."""
    enable_progress_thread: bool = True
    """A thread that serves peers while the engine computes or idles. It sleeps until something arrives. Without it
    the first contact of a pair, and over TCP every read, waits for the owner's engine to step."""
    seed: int = 0
    enable_kv_digests: bool = True
    """Whether held blocks get digests that their reader checks: a few milliseconds a pull. Only KV in main memory
    can have them. That KV is still held when it has been read is proven either way."""
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """Further engine arguments by name: none that has a key of its own here, none that Baton rests on."""
    device: Literal["cpu", "cuda"] = "cpu"
    pull_timeout_s: float = 10.0
    """How long a pull of KV may take, first contact included, before the request goes on without it."""
    transfer_faults: Mapping[str, Any] = field(default_factory=dict)
    """For tests: how often what the transfer library does goes wrong (``kvtransfer.faults.FaultPlan``)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cores", tuple(self.cores))
        for key in ("peer_hosts", "transports", "net_devices"):
            if isinstance(getattr(self, key), str):
                raise ValueError(f"{key}: is a string; give a list of strings")
            object.__setattr__(self, key, tuple(getattr(self, key)))
        object.__setattr__(self, "extra_args", dict(self.extra_args))
        object.__setattr__(self, "transfer_faults", dict(self.transfer_faults))
        _one_of("kind", self.kind, _KINDS)
        _one_of("device", self.device, _DEVICES)
        _one_of("dtype", self.dtype, _DTYPES)
        if not self.model_name:
            raise ValueError("model_name: is empty; give the name that callers will use")
        if self.kind == "vllm" and not self.model_path:
            raise ValueError("model_path: is empty; give the directory of the prepared model")
        _whole("kv_cache_bytes", self.kv_cache_bytes, 1 << 20, 1 << 50)
        _whole("block_token_count", self.block_token_count, 1, 4096)
        if self.kind == "vllm" and self.device == "cpu" and self.block_token_count % 32:
            raise ValueError(
                f"block_token_count: is {self.block_token_count}; the CPU attention kernel needs a multiple of 32 "
                "(128 is the usual choice)"
            )
        _whole("max_context_token_count", self.max_context_token_count, 2, 1 << 24)
        _whole("max_running_count", self.max_running_count, 1, 4096)
        _whole("max_batched_token_count", self.max_batched_token_count, 1, 1 << 20)
        if self.max_batched_token_count < self.max_running_count:
            raise ValueError(
                f"max_batched_token_count: is {self.max_batched_token_count}, below max_running_count "
                f"({self.max_running_count}); a step holds at least one token per running request, so raise it"
            )
        for core in self.cores:
            _whole("cores", core, 0, 4095)
        if len(set(self.cores)) != len(self.cores):
            raise ValueError(f"cores: {list(self.cores)} names a core twice; name each once")
        if not self.side_channel_host:
            raise ValueError("side_channel_host: is empty; give the address that peers reach this engine at")
        _whole("side_channel_port", self.side_channel_port, 1, 65535)
        if not all(isinstance(host, str) and host for host in self.peer_hosts):
            raise ValueError("peer_hosts: has an empty entry; list host names or addresses")
        for key in ("transports", "net_devices"):
            for each in getattr(self, key):
                if not isinstance(each, str) or not _UCX_NAME.fullmatch(each):
                    raise ValueError(f"{key}: has {each!r}; give names as UCX knows them (ucx_info -d lists them)")
        if isinstance(self.lease_s, bool) or not math.isfinite(self.lease_s) or not 1 <= self.lease_s <= 3600:
            raise ValueError(f"lease_s: is {self.lease_s}; give between 1 and 3600 seconds")
        if isinstance(self.pull_timeout_s, bool) or not 0.1 <= self.pull_timeout_s <= 600:
            raise ValueError(f"pull_timeout_s: is {self.pull_timeout_s}; give between 0.1 and 600 seconds")
        if self.transfer_faults:
            FaultPlan.of(self.transfer_faults)
        _whole("seed", self.seed, 0, (1 << 32) - 1)
        for name in self.extra_args:
            if name in _OWN_KEYS:
                raise ValueError(f"extra_args.{name}: has a key of its own here; set {_OWN_KEYS[name]}")
            if name in _FIXED_ARGUMENTS:
                raise ValueError(
                    f"extra_args.{name}: cannot be set; the handoff and its checks rest on Baton's value"
                )

    @property
    def has_kv_digests(self) -> bool:
        return self.enable_kv_digests and self.device == "cpu"


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: is {value!r}; give one of {', '.join(allowed)}")


def _whole(key: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key}: is {value!r}; give a whole number between {low} and {high}")

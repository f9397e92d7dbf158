"""The configuration of the fleets that tests and soaks run: real engines on loopback, on ports nobody uses."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from fleet.config import FleetConfig, parse_config


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now; taken together, so that they differ."""
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def fleet_config(
    model_path: Path,
    state_dir: Path,
    *,
    prefill_cores: str,
    decode_cores: str,
    dtype: str = "bfloat16",
    max_batched_token_count: int = 512,
) -> FleetConfig:
    """Real engines with leases so long that no timer helps. Cores as in the TOML: ``[[0]]`` is one worker on core 0.

    The KV pools are sized for bfloat16; float32 halves their tokens.
    """
    listen, admin, metrics = free_ports(3)
    return parse_config(f"""
        [cluster]
        runner = "local"
        state_dir = "{state_dir}"
        [model]
        name = "smollm2-135m-instruct"
        path = "{model_path}"
        [router]
        listen_address = "127.0.0.1:{listen}"
        admin_address = "127.0.0.1:{admin}"
        metrics_address = "127.0.0.1:{metrics}"
        lease_s = 600.0
        [prefill]
        count = {prefill_cores.count("[") - 1}
        cores = {prefill_cores}
        [prefill.engine]
        dtype = "{dtype}"
        kv_cache_bytes = 536870912
        max_batched_token_count = {max_batched_token_count}
        lease_s = 600.0
        [decode]
        count = {decode_cores.count("[") - 1}
        cores = {decode_cores}
        [decode.engine]
        dtype = "{dtype}"
        kv_cache_bytes = 536870912
        max_batched_token_count = {max_batched_token_count}
        lease_s = 600.0
    """)

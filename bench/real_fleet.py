"""The configuration of the fleets that tests and soaks run: real engines on loopback, on ports nobody uses."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from fleet.config import FleetConfig, parse_config

FIRST_PORT = 10_000
TRY_COUNT = 100


def free_ports(count: int, *, in_a_row: bool = False) -> list[int]:
    """Ports nobody listens on now; all different, or one after another.

    Below those that the kernel gives to whoever asks for any: an engine binds its port half a minute after this, and
    by then a port of that range may be an end of somebody's connection. Raises ``OSError`` if there are none.
    """
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(FIRST_PORT, lowest_given - count)
    if not candidates:
        raise OSError(f"no port is between {FIRST_PORT} and {lowest_given}, from where on the kernel gives them out")
    for _ in range(TRY_COUNT):
        ports = random.SystemRandom().sample(candidates, 1 if in_a_row else count)
        if in_a_row:
            ports = list(range(ports[0], ports[0] + count))
        with ExitStack() as open_sockets, suppress(OSError):
            for port in ports:
                open_sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return ports
    raise OSError(f"no {count} free ports between {FIRST_PORT} and {lowest_given} in {TRY_COUNT} tries")


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

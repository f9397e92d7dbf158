"""When a started server may be asked: its health endpoint answers, or Baton's every worker is ready. And free ports.

Owns the waiting, with its deadline. It stops nothing: who started a server stops it.
"""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing

from baton.admin_client import AdminClient
from baton.errors import BatonError
from bench.children import Child

READY_DEADLINE_S = 240.0


def until_ready(child: Child, is_ready: Callable[[], bool], deadline_s: float = READY_DEADLINE_S) -> None:
    """Returns once ``is_ready``. Raises ``ChildError`` when the child ends or the deadline passes before."""
    deadline = time.monotonic() + deadline_s
    while not is_ready():
        if not child.is_running():
            raise child.failed("ended before it was ready")
        if time.monotonic() > deadline:
            raise child.failed(f"was not ready within {deadline_s:.0f} s")
        time.sleep(0.5)


def is_healthy(url: str) -> bool:
    """Whether ``url``/health answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:  # noqa: S310 our own loopback URL
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def has_all_workers(admin_address: str, wanted: Mapping[str, int]) -> bool:
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


def free_port() -> int:
    """A loopback port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The router's health, when the news come while the last ones are still being told."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2

from baton.testing import in_virtual_time
from router.health import RouterHealth

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class SlowServicer:
    """Tells its watchers, which takes a moment where there are some."""

    def __init__(self) -> None:
        self.statuses: dict[str, Any] = {}

    async def set(self, name: str, status: Any) -> None:
        self.statuses[name] = status
        if status == SERVING:
            await asyncio.sleep(0.1)


@in_virtual_time
async def test_a_drain_that_comes_while_serving_is_being_told_has_the_last_word() -> None:
    health = RouterHealth(["one", "two"], lambda: True)
    servicer: Any = SlowServicer()
    health._servicers.append(servicer)
    following = asyncio.create_task(health.run())
    await asyncio.sleep(0.05)
    await health.drain()
    await asyncio.sleep(1.0)
    assert servicer.statuses == {"": NOT_SERVING, "one": NOT_SERVING, "two": NOT_SERVING}
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)

"""A caller with Baton's own client that leaves at each of its awaits, over sockets: nothing of its call is left."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

from sim_cluster import SimCluster, sim_cluster

from baton.client import BatonClient, Chunk, Finished
from baton.request import StopConditions
from bench.await_points import Watched
from engine.cost import CostModel, DecodeCost

TOKEN_COUNT = 8


async def read(client: BatonClient) -> int:
    """An answer to its end; how many tokens it had."""
    count = 0
    stop = StopConditions(max_output_token_count=TOKEN_COUNT, ignore_eos=True)
    async for event in client.generate("Once upon a time", timeout=60, stop=stop):
        if isinstance(event, Chunk):
            count += event.token_count
        if isinstance(event, Finished):
            assert event.usage.output_token_count == count
    return count


async def left_at(cluster: SimCluster, client: BatonClient, point: int) -> bool:
    """Whether the caller was still there at its ``point``-th await, and was cancelled there."""
    count = 0
    is_cancelled = False
    caller: asyncio.Task[int] | None = None

    def gave_way(_: object) -> None:
        nonlocal count, is_cancelled
        count += 1
        if count == point:
            assert caller is not None
            is_cancelled = True
            stood.enter_context(cluster.standing())  # from here on nothing but the leave can end it
            caller.cancel()

    with ExitStack() as stood:
        caller = asyncio.Task(Watched(read(client), gave_way), loop=asyncio.get_running_loop())
        await asyncio.wait((caller,))
        if not is_cancelled:
            assert caller.result() == TOKEN_COUNT
            return False
        assert caller.cancelled(), "a cancel was swallowed"
        await cluster.until_balanced()
    return True


async def test_leaving_at_any_await_of_the_client_ends_the_call_everywhere(tmp_path: Path) -> None:
    slow = CostModel(decode=DecodeCost(base_s=0.005))  # a step that a client can keep up with
    async with sim_cluster(tmp_path, sim={"cost": slow}) as cluster, BatonClient(cluster.endpoint.address) as client:
        assert await read(client) == TOKEN_COUNT
        point = 1
        while await left_at(cluster, client, point):
            point += 1
        # At the first awaits nothing was sent yet, and at the last all was served.
        assert 0 < cluster.server.generation.failed_count < point

"""A prefill and a decode worker on simulated engines, whose books must balance when a test is over."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.errors import BatonError
from baton.leg import DecodeOrder, PrefillOrder, PrefillReply, Stepped
from baton.metrics import WorkerMetrics
from baton.request import EngineStop, Sampling
from decode_worker.config import DecodeLimits
from decode_worker.worker import DecodeWorker
from engine.sim import SimConfig, SimEngine, SimNetwork, TokenRule
from prefill_worker.config import PrefillLimits
from prefill_worker.worker import PrefillWorker

SECRET = bytes(range(32))
PROMPT = tuple(range(5, 305))
RULE = TokenRule(eos_probability=0.0)


def sim(engine_id: str, network: SimNetwork) -> SimEngine:
    return SimEngine(SimConfig(engine_id=engine_id, tokens=RULE), network)


class Pair:
    """A prefill and a decode worker, each on an engine of its own."""

    def __init__(self, prefill_limits: PrefillLimits, decode_limits: DecodeLimits) -> None:
        network = SimNetwork(spans_processes=False)
        self.prefill_engine, self.decode_engine = sim("p0", network), sim("d0", network)
        self.registry = CollectorRegistry()
        self.decode_registry = CollectorRegistry()
        self.prefill = PrefillWorker(
            self.prefill_engine,
            worker_id="prefill-0",
            epoch="e1",
            secret=SECRET,
            metrics=WorkerMetrics(self.registry, "prefill-0"),
            limits=prefill_limits,
        )
        self.decode = DecodeWorker(
            self.decode_engine,
            worker_id="decode-0",
            epoch="e2",
            secret=SECRET,
            metrics=WorkerMetrics(self.decode_registry, "decode-0"),
            limits=decode_limits,
        )

    def assert_nothing_is_left(self) -> None:
        assert self.prefill.running_count == self.decode.running_count == 0
        assert self.prefill.held_lease_count == 0
        assert self.prefill_engine.held_count == 0
        assert self.prefill_engine.load().used_block_count == 0
        assert self.decode_engine.load().used_block_count == 0

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(name, labels)
        return (value or 0.0) + (self.decode_registry.get_sample_value(name, labels) or 0.0)


@asynccontextmanager
async def a_pair(
    prefill_limits: PrefillLimits | None = None, decode_limits: DecodeLimits | None = None
) -> AsyncIterator[Pair]:
    pair = Pair(prefill_limits or PrefillLimits(), decode_limits or DecodeLimits())
    await pair.prefill_engine.start()
    await pair.decode_engine.start()
    reaper = asyncio.create_task(pair.prefill.run(), name="reaper")
    try:
        yield pair
        await asyncio.sleep(0)
    finally:
        await pair.prefill.close()
        await pair.decode.close()
        await reaper
        pair.assert_nothing_is_left()
        await pair.prefill_engine.close()
        await pair.decode_engine.close()


_legs = itertools.count()


def prefill_order(**changes: Any) -> PrefillOrder:
    order = PrefillOrder(f"leg-1.{next(_legs)}", PROMPT, Sampling(), EngineStop(max_token_count=8), lease_s=10.0)
    return dataclasses.replace(order, **changes)


def decode_order(reply: PrefillReply, **changes: Any) -> DecodeOrder:
    prompt = (*PROMPT, reply.first_token_id)
    order = DecodeOrder("leg-2", prompt, Sampling(), EngineStop(max_token_count=7), ticket=reply.ticket)
    return dataclasses.replace(order, **changes)


async def events_of(worker: DecodeWorker, order: DecodeOrder) -> list[Any]:
    async with aclosing(worker.decode(order)) as events:
        return [event async for event in events]


def tokens_of(events: list[Any]) -> list[int]:
    return [token for event in events if isinstance(event, Stepped) for token in event.token_ids]


async def refusal(awaitable: Coroutine[Any, Any, Any]) -> BatonError:
    with pytest.raises(BatonError) as caught:
        await awaitable
    return caught.value

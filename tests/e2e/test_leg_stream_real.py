"""What one step of the real engine brings to all its requests goes out in one message."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc.aio
import pytest
from engine_pair import engine_config, prompt, stop
from prometheus_client import CollectorRegistry

from baton.leg import DecodeOrder
from baton.request import Sampling
from baton.secret import TOKEN_KEY, cluster_token
from baton.worker.v1 import worker_pb2 as pb
from baton.worker.v1 import worker_pb2_grpc
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.config import EngineIdentity
from engine.hosting import HostConfig, WorkerHost
from router.leg_messages_client import decode_request

SECRET = bytes(range(32))
LEG_COUNT, TOKEN_COUNT = 6, 40


@pytest.mark.real
async def test_a_step_of_the_real_engine_is_one_message() -> None:
    from engine.vllm_engine import VllmEngine

    engine = VllmEngine(engine_config(0, 51900), EngineIdentity("decode-0"))
    await engine.start()
    worker = DecodeWorker(engine, worker_id="decode-0", epoch="e1", secret=SECRET)
    attach = [partial(add_decode_service, worker=worker)]
    host = WorkerHost(HostConfig(), secret=SECRET, registry=CollectorRegistry(), attach=attach)
    try:
        await host.start()
        async with grpc.aio.insecure_channel(host.address) as channel:
            stub: Any = worker_pb2_grpc.DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.DecodeMany(metadata=((TOKEN_KEY, cluster_token(SECRET)),))
            orders = [
                DecodeOrder(f"g.{number}", prompt(20, number), Sampling(temperature=0.0), stop(TOKEN_COUNT))
                for number in range(1, LEG_COUNT + 1)
            ]
            starts = [
                pb.LegStart(leg_number=number, order=decode_request(order), timeout_s=120.0)
                for number, order in enumerate(orders, start=1)
            ]
            await call.write(pb.DecodeManyRequest(starts=starts))
            sizes: list[int] = []
            finished: set[int] = set()
            async with asyncio.timeout(120):
                while len(finished) < LEG_COUNT:
                    message = await call.read()
                    sizes.append(len(message.leg_numbers) + len(message.news))
                    finished |= {each.leg_number for each in message.news if each.events.HasField("finished")}
                    await call.write(pb.DecodeManyRequest(taken_response_count=len(sizes)))
            call.cancel()
        # All but the first prompts' steps have every leg in them; were they sent leg by leg, none would.
        assert sizes.count(LEG_COUNT) >= TOKEN_COUNT - 10, sizes
    finally:
        await host.stop(0)
        await worker.close()
        await engine.close()

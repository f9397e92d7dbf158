"""A stand-in for workers: it speaks the router's protocol and computes nothing.

One process, two ports: a prefill worker and a decode worker. Every decode gets one token a step; a step is sent when
it is due, or, with a step of 0 s, whenever the one before was taken.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import grpc.aio

from baton.worker.v1 import worker_pb2 as pb

OPTIONS = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 * 1024 * 1024)]
TOKEN_ID = 262
CONTEXT = 8_000_000
ADOPTED = pb.DecodeResponse(
    adopted=pb.Adopted(transfer_s=0.001, transfer_byte_count=1_000_000, descriptor_count=30, pull_count=1)
).SerializeToString()
STEP = pb.DecodeResponse(step=pb.Step(token_ids=[TOKEN_ID])).SerializeToString()
LENGTH = pb.DecodeResponse(finished=pb.DecodeFinished(finish=pb.LEG_FINISH_LENGTH)).SerializeToString()


class StandInWorker:
    def __init__(self) -> None:
        self.step_s = 0.025
        self._prefill_s: list[float] = []
        self._servers: list[grpc.aio.Server] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, port: int) -> dict[str, int]:
        ports = {}
        for number, role in enumerate(("prefill", "decode")):
            server = grpc.aio.server(options=OPTIONS)
            for service, handlers in self._handlers(role).items():
                server.add_generic_rpc_handlers(
                    (grpc.method_handlers_generic_handler(f"baton.worker.v1.{service}", handlers),)
                )
            ports[role] = server.add_insecure_port(f"127.0.0.1:{port + number if port else 0}")
            await server.start()
            self._servers.append(server)
        return ports

    def stats(self) -> dict[str, float]:
        """Since the last time: prefills, and the median of the time from an order's arrival to its answer."""
        prefill_s, self._prefill_s = self._prefill_s, []
        return {"prefills": len(prefill_s), "prefill_p50_s": statistics.median(prefill_s or [0.0])}

    def _handlers(self, role: str) -> dict[str, dict[str, Any]]:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        info = pb.GetWorkerInfoResponse(
            worker_id=f"{role}-0",
            epoch="e1",
            role=role,
            model="m",
            max_context_token_count=CONTEXT,
            block_token_count=16,
            block_count=10_000_000,
            max_running_count=4096,
            kv_bytes_per_token=1000,
            engine="stand-in",
            vocab_size=49152,
        ).SerializeToString()

        async def get_info(request: bytes, context: Any) -> bytes:
            return info

        async def watch(request: bytes, context: Any) -> None:
            load = pb.WatchLoadResponse(epoch="e1", block_count=10_000_000).SerializeToString()
            while True:
                await context.write(load)
                await asyncio.sleep(0.2)

        async def done(request: bytes, context: Any) -> bytes:
            return b""

        return {
            "WorkerService": {"GetWorkerInfo": unary(get_info), "WatchLoad": stream(watch), "Introduce": unary(done)},
            "PrefillService": {"Prefill": unary(self._prefill), "ReleaseKv": unary(done), "ExtendLease": unary(done)},
            "DecodeService": {"Decode": stream(self._decode)},
        }

    async def _prefill(self, request: bytes, context: Any) -> bytes:
        began_at = time.perf_counter()
        order = pb.PrefillRequest.FromString(request)
        more = order.stop.max_token_count > 1
        reply = pb.PrefillResponse(
            first_token_id=TOKEN_ID,
            finish=pb.LEG_FINISH_UNSPECIFIED if more else pb.LEG_FINISH_LENGTH,
            ticket=b"t" * 500 if more else b"",
            ticket_id=order.leg_id if more else "",
        ).SerializeToString()
        self._prefill_s.append(time.perf_counter() - began_at)
        return reply

    async def _decode(self, request: bytes, context: Any) -> None:
        order = pb.DecodeRequest.FromString(request)
        await context.write(ADOPTED)
        for _ in range(order.stop.max_token_count):
            await self._next_step()
            await context.write(STEP)
        await context.write(LENGTH)

    async def _next_step(self) -> None:
        if self.step_s == 0:
            return
        loop = asyncio.get_running_loop()
        waiting = loop.create_future()
        self._waiting.append(waiting)
        if self._timer is None:
            self._timer = loop.call_later(self.step_s, self._tick)
        await waiting

    def _tick(self) -> None:
        self._timer = None
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

"""A stand-in for workers: it speaks the router's protocol and computes nothing.

One process, two ports: a prefill worker and a decode worker. Every decode gets one token a step. As a worker does, it
sends what a step brought to all legs in one message, stays at most four messages ahead of the router, and merges the
steps that come meanwhile. Messages that repeat are made once.
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
AHEAD_COUNT = 4
MIN_TICK_S = 0.001
"""Timers count milliseconds: shorter steps are sent together."""
ADOPTED = pb.Adopted(transfer_s=0.001, transfer_byte_count=1_000_000, descriptor_count=30, pull_count=1)
LENGTH = pb.DecodeFinished(finish=pb.LEG_FINISH_LENGTH)


class Legs:
    """The decodes of one stream, in step with one another."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        """Tokens still to come, by leg, from ``_base`` on."""
        self.new: list[int] = []
        self._base = 0
        self._next_end = 0
        self._cached: dict[int, bytes] = {}

    def start(self, number: int, token_count: int) -> None:
        self.left[number] = token_count + self._base
        self.new.append(number)
        self._changed()

    def cancel(self, number: int) -> None:
        if self.left.pop(number, None) is not None:
            self._changed()
        if number in self.new:
            self.new.remove(number)

    def _changed(self) -> None:
        self._cached.clear()
        self._next_end = min(self.left.values(), default=0)

    def message(self, step_count: int) -> bytes:
        """What so many steps bring to all; 0: adoptions alone."""
        if not self.new and self._base + step_count < self._next_end:
            self._base += step_count
            if step_count not in self._cached:
                if len(self._cached) > 64:
                    self._cached.clear()
                self._cached[step_count] = self._plain(list(self.left), step_count).SerializeToString()
            return self._cached[step_count]
        new, self.new = self.new, []
        self._base += step_count
        ended = [number for number, end in self.left.items() if end <= self._base] if step_count else []
        news = [pb.LegNews(leg_number=number, events=pb.DecodeResponse(adopted=ADOPTED)) for number in new]
        if step_count:
            others = set(ended) | set(new)
            message = self._plain([number for number in self.left if number not in others], step_count)
            news = []
            for number in others:
                count = step_count - max(0, self._base - self.left[number])
                news.append(
                    pb.LegNews(
                        leg_number=number,
                        events=pb.DecodeResponse(
                            adopted=ADOPTED if number in new else None,
                            step=pb.Step(token_ids=[TOKEN_ID] * count),
                            finished=LENGTH if number in ended else None,
                        ),
                    )
                )
        else:
            message = pb.DecodeManyResponse()
        message.news.extend(news)
        for number in ended:
            del self.left[number]
        self._changed()
        return bytes(message.SerializeToString())

    @staticmethod
    def _plain(numbers: list[int], count: int) -> pb.DecodeManyResponse:
        return pb.DecodeManyResponse(
            leg_numbers=numbers,
            token_counts=[count] * len(numbers) if count > 1 else (),
            token_ids=[TOKEN_ID] * (count * len(numbers)),
        )


class StandInWorker:
    def __init__(self) -> None:
        self.step_s = 0.025
        self._prefill_s: list[float] = []
        self._servers: list[grpc.aio.Server] = []

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
            "DecodeService": {"DecodeMany": grpc.stream_stream_rpc_method_handler(self._decode_many)},
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

    async def _decode_many(self, requests: Any, context: Any) -> None:
        stream = LegStream(self, context)
        writer = asyncio.create_task(stream.write())
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                stream.take(message)
        finally:
            writer.cancel()


class LegStream:
    def __init__(self, worker: StandInWorker, context: Any) -> None:
        self._worker = worker
        self._context = context
        self._legs = Legs()
        self._written_count = 0
        self._taken_count = 0
        self._woken = asyncio.Event()

    def take(self, message: bytes) -> None:
        request = pb.DecodeManyRequest.FromString(message)
        for start in request.starts:
            self._legs.start(start.leg_number, start.order.stop.max_token_count)
        for number in request.cancelled_leg_numbers:
            self._legs.cancel(number)
        self._taken_count = max(self._taken_count, request.taken_response_count)
        self._woken.set()

    async def write(self) -> None:
        loop = asyncio.get_running_loop()
        stepped_at = loop.time()
        while True:
            step_s = self._worker.step_s
            now = loop.time()
            due_at = stepped_at + step_s
            if not self._legs.left:
                stepped_at = now
            is_held_up = self._written_count - self._taken_count >= AHEAD_COUNT
            if is_held_up or not self._legs.left or (now < due_at and not self._legs.new):
                self._woken.clear()
                timer = None
                if not is_held_up and self._legs.left:
                    timer = loop.call_later(max(MIN_TICK_S, due_at - now), self._woken.set)
                await self._woken.wait()
                if timer is not None:
                    timer.cancel()
                continue
            step_count = int((now - stepped_at) / step_s)
            stepped_at += step_count * step_s
            await self._context.write(self._legs.message(step_count))
            self._written_count += 1

"""The processes beside the router in ``bench.router_cost``: each costs the router's machine as little as it can.

    worker    speaks the worker protocol to the router and emits one token a step for every decode it has
    sender    the sending floor: a bare grpc.aio server that answers the public call from nothing
    handoff   the relaying floors: one upstream stream per call, each message forwarded; or a bare handoff's calls
    readers   clients that only read

The floors' messages are made beforehand, and serialised and parsed by gRPC as any generated servicer and stub has it.
One JSON line says where a part listens; then each line on standard input is a command, answered by one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from baton import event_loop
from baton.v1 import generation_pb2 as public_pb
from baton.worker.v1 import worker_pb2 as pb
from bench.router_cost_worker import StandInWorker

GENERATE = "/baton.v1.GenerationService/Generate"
BARE = "baton.bench.Bare"
TOKEN_ID = 262
"""Any ordinary word of the tokenizer."""
OPTIONS = [("grpc.so_reuseport", 0), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]

STARTED = public_pb.GenerateResponse(
    started=public_pb.Started(generation_id="gen-0123456789abcdef01234567", model="m", prompt_token_count=64)
)


def chunk(token_count: int, index: int = 100) -> public_pb.GenerateResponse:
    """A message of the router's for so many tokens."""
    return public_pb.GenerateResponse(
        chunk=public_pb.Chunk(first_token_index=index, text=" time" * token_count, token_count=token_count)
    )


class Pace:
    """Steps of an engine that is not there. ``step_s`` 0: as fast as what is sent is taken."""

    def __init__(self) -> None:
        self.step_s = 0.025
        self._due_at = 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def next(self) -> None:
        if self.step_s == 0:
            return
        loop = asyncio.get_running_loop()
        waiting = loop.create_future()
        self._waiting.append(waiting)
        if self._timer is None:
            # From step to step, not from when the last was dealt with: the pace is an engine's own.
            now = loop.time()
            self._due_at = max(self._due_at + self.step_s, now)
            self._timer = loop.call_at(self._due_at, self._tick)
        await waiting

    def _tick(self) -> None:
        self._timer = None
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)


def bare_server(handlers: dict[str, Any], service: str, port: int) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    return server, server.add_insecure_port(f"127.0.0.1:{port}")


def public(generate: Any) -> Any:
    return grpc.unary_stream_rpc_method_handler(
        generate, public_pb.GenerateRequest.FromString, public_pb.GenerateResponse.SerializeToString
    )


class Sender:
    """Answers ``Generate`` with Started and one Chunk a step; also what a bare handoff calls."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.token_count = 0
        """Of each answer; 0: without end."""
        self.finished = public_pb.GenerateResponse()

    async def start(self, port: int) -> int:
        server, bound = bare_server({"Generate": public(self.generate)}, "baton.v1.GenerationService", port)
        bare: dict[str, Any] = {
            "Prefill": grpc.unary_unary_rpc_method_handler(
                self.prefill, pb.PrefillRequest.FromString, pb.PrefillResponse.SerializeToString
            ),
            "Decode": grpc.unary_stream_rpc_method_handler(
                self.decode, pb.DecodeRequest.FromString, pb.DecodeResponse.SerializeToString
            ),
            "Release": grpc.unary_unary_rpc_method_handler(
                self.release, pb.ReleaseKvRequest.FromString, pb.ReleaseKvResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE, bare),))
        await server.start()
        self._server = server
        return bound

    async def generate(self, request: Any, context: Any) -> None:
        await context.write(STARTED)
        one = chunk(1)
        if not self.token_count:
            while True:
                await context.write(one)
                await self.pace.next()
        await context.write(one)
        for _ in range(self.token_count - 1):
            await self.pace.next()
            await context.write(one)
        await context.write(self.finished)

    async def prefill(self, request: Any, context: Any) -> pb.PrefillResponse:
        return PREFILLED

    async def decode(self, request: Any, context: Any) -> None:
        for _ in range(self.token_count - 1):
            await self.pace.next()
            await context.write(STEP)

    async def release(self, request: Any, context: Any) -> pb.ReleaseKvResponse:
        return pb.ReleaseKvResponse(was_held=True)


PREFILLED = pb.PrefillResponse(first_token_id=TOKEN_ID, ticket=b"t" * 500, ticket_id="gen-0123456789abcdef01234567.1")
STEP = pb.DecodeResponse(step=pb.Step(token_ids=[TOKEN_ID]))
PREFILL = pb.PrefillRequest(leg_id="gen-0123456789abcdef01234567.1", prompt_token_ids=bytes(4 * 64))
RELEASE = pb.ReleaseKvRequest(ticket_id="gen-0123456789abcdef01234567.1")
ORDER = pb.DecodeRequest(leg_id="gen-0123456789abcdef01234567.2", prompt_token_ids=bytes(4 * 64), ticket=b"t" * 500)


class Handoff:
    """``Generate`` forwards an upstream's messages one by one; ``token_count``: makes the calls of a handoff."""

    def __init__(self, upstream: str) -> None:
        self.token_count = 0
        self.finished = public_pb.GenerateResponse()
        channel = grpc.aio.insecure_channel(upstream, options=OPTIONS)
        self._generate: Any = channel.unary_stream(
            GENERATE, public_pb.GenerateRequest.SerializeToString, public_pb.GenerateResponse.FromString
        )
        self._prefill: Any = channel.unary_unary(
            f"/{BARE}/Prefill", pb.PrefillRequest.SerializeToString, pb.PrefillResponse.FromString
        )
        self._decode: Any = channel.unary_stream(
            f"/{BARE}/Decode", pb.DecodeRequest.SerializeToString, pb.DecodeResponse.FromString
        )
        self._release: Any = channel.unary_unary(
            f"/{BARE}/Release", pb.ReleaseKvRequest.SerializeToString, pb.ReleaseKvResponse.FromString
        )

    async def start(self, port: int) -> int:
        handlers: dict[str, Any] = {"Generate": public(self.generate)}
        self._server, bound = bare_server(handlers, "baton.v1.GenerationService", port)
        await self._server.start()
        return bound

    async def generate(self, request: Any, context: Any) -> None:
        if self.token_count:
            await self._hand_off(context)
            return
        call = self._generate(request)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                await context.write(message)
        finally:
            call.cancel()

    async def _hand_off(self, context: Any) -> None:
        one = chunk(1)
        await self._prefill(PREFILL)
        await context.write(STARTED)
        await context.write(one)
        if self.token_count > 1:
            call = self._decode(ORDER)
            released: asyncio.Task[Any] | None = None
            while await call.read() is not grpc.aio.EOF:
                await context.write(one)
                if released is None:
                    released = asyncio.ensure_future(self._release(RELEASE))
        await context.write(self.finished)


class Readers:
    """Callers of one address. ``open``: so many endless streams; ``ask``: requests one after the other."""

    def __init__(self) -> None:
        self.token_count = 0
        self.message_count = 0
        self._channels: list[grpc.aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = 0

    async def open(self, address: str, count: int, request: bytes) -> None:
        """Returns when every stream has brought a token."""
        self.token_count = self.message_count = self._begun = 0
        self._channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(8)]
        for number in range(count):
            call: Any = self._channels[number % 8].unary_stream(GENERATE)
            self._tasks.append(asyncio.create_task(self._read(call, request)))
            if number % 32 == 31:
                await asyncio.sleep(0.02)  # a hundred at once would be a test of admission
        async with asyncio.timeout(60):
            while self._begun < count:  # what is waited for is in another process
                if failed := [task for task in self._tasks if task.done()]:
                    raise RuntimeError(f"{len(failed)} streams ended: {failed[0].exception()!r}")
                await asyncio.sleep(0.01)

    async def _read(self, method: Any, request: bytes) -> None:
        call = method(request)
        is_begun = False
        read = public_pb.GenerateResponse.FromString
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self.token_count += read(message).chunk.token_count
                self.message_count += 1
                if not is_begun and self.message_count > 1:
                    is_begun = True
                    self._begun += 1
        finally:
            call.cancel()

    def count(self) -> dict[str, Any]:
        ended = sum(task.done() for task in self._tasks)
        return {"tokens": self.token_count, "messages": self.message_count, "ended": ended}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    async def ask(self, address: str, for_s: float, at_once: int, request: bytes) -> dict[str, Any]:
        """Callers that ask one request after the other for ``for_s``."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + for_s
        ttft_s: list[float] = []
        last = [b""]
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            method: Any = channel.unary_stream(GENERATE)

            async def one_caller() -> None:
                while loop.time() < ends_at:
                    began_at = time.perf_counter()
                    call = method(request)
                    await call.read()
                    first = await call.read()
                    if first is grpc.aio.EOF:
                        await call  # raises what happened
                    ttft_s.append(time.perf_counter() - began_at)
                    while (message := await call.read()) is not grpc.aio.EOF:
                        last[0] = message
                    if await call.code() is not grpc.StatusCode.OK:
                        raise RuntimeError(f"a request ended with {await call.code()}")

            await asyncio.gather(*(one_caller() for _ in range(at_once)))
        return {"requests": len(ttft_s), "ttft_p50_s": statistics.median(ttft_s), "last": last[0].hex()}


async def serve_commands(commands: dict[str, Callable[..., Awaitable[Any] | Any]]) -> None:
    """Each line of standard input is ``[name, argument...]`` in JSON. Ends with the input."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        name, *arguments = json.loads(line)
        try:
            result = commands[name](*arguments)
            if asyncio.iscoroutine(result):
                result = await result
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


async def run(part: str, upstream: str, port: int) -> None:
    commands: dict[str, Callable[..., Any]]
    match part:
        case "worker":
            worker = StandInWorker()
            where: Any = await worker.start(port)
            commands = {"pace": lambda step_s: setattr(worker, "step_s", step_s), "stats": worker.stats}
        case "sender" | "handoff":
            sender: Any = Sender() if part == "sender" else Handoff(upstream)
            where = await sender.start(port)

            def say(token_count: int, finished: str) -> None:
                sender.token_count = token_count
                sender.finished = public_pb.GenerateResponse.FromString(bytes.fromhex(finished))

            commands = {"say": say, "pace": lambda step_s: setattr(sender.pace, "step_s", step_s)}
        case _:
            readers, where = Readers(), 0
            commands = {
                "open": lambda address, count, request: readers.open(address, count, bytes.fromhex(request)),
                "count": readers.count,
                "close": readers.close,
                "ask": lambda address, for_s, at_once, request: readers.ask(
                    address, for_s, at_once, bytes.fromhex(request)
                ),
            }
    print(json.dumps(where), flush=True)
    gc.freeze()
    await serve_commands(commands)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("worker", "sender", "handoff", "readers"))
    parser.add_argument("--upstream", default="")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with event_loop.runner() as runner:
        runner.run(run(options.part, options.upstream, options.port))

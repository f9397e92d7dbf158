"""Clients of ``bench.open_streams``, one process: many streams over a few plain gRPC channels, each checked: no token
missing or twice, and at the end the whole text, which depends on every token of it.

Every tenth stream or so has a channel with a window of a kilobyte, and stops reading when told to: what it does not
take then stays with the router. One JSON line on standard input is a command, answered by one JSON line.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from array import array
from typing import Any

import grpc
import grpc.aio

from baton import event_loop
from baton.v1 import generation_pb2 as pb
from engine.sim_tokens import TokenRule, simulated_answer
from router.tiny_model import tiny_tokenizer

GENERATE = "/baton.v1.GenerationService/Generate"
CHANNEL_STREAM_COUNT = 500
OPTIONS: list[tuple[str, int]] = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
SMALL_WINDOW: list[tuple[str, int]] = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
PROMPT_COUNT = 16
PROMPT_TOKEN_COUNT = 32


class Stream:
    """One call. ``wrong`` says what was not as it should be."""

    __slots__ = ("count", "is_finished", "last_at", "message_count", "prompt", "stalls", "task", "text", "wrong")

    def __init__(self, prompt: int, *, stalls: bool) -> None:
        self.prompt = prompt
        self.stalls = stalls
        self.count = self.message_count = 0
        self.last_at = 0.0
        self.is_finished = False
        self.wrong = ""
        self.text = ""
        self.task: asyncio.Task[None] | None = None


class Readers:
    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._channels: list[grpc.aio.Channel] = []
        self._expected: list[str] = []
        self._token_count = 0
        self._phase = ""
        self._phase_began_at = 0.0
        self._gaps: dict[str, array[float]] = {}
        self._may_read = asyncio.Event()
        self._may_read.set()

    async def open(
        self,
        address: str,
        stream_count: int,
        token_count: int,
        per_s: float,
        stalled_share: float,
        timeout_s: float,
        rule: dict[str, Any],
    ) -> dict[str, Any]:
        """Opens streams evenly, and returns when each has brought a token or failed."""
        token_rule = TokenRule(**rule)
        special, words = token_rule.special_token_count, token_rule.vocab_size - token_rule.special_token_count
        prompts = [
            [special + (7 * number + 11 * index) % words for index in range(PROMPT_TOKEN_COUNT)]
            for number in range(PROMPT_COUNT)
        ]
        self._token_count = token_count
        decode = tiny_tokenizer().decode
        self._expected = [decode(simulated_answer(p, token_count, token_rule, ignore_eos=True)) for p in prompts]
        requests = [
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt),
                stop=pb.StopConditions(max_output_token_count=token_count, ignore_eos=True),
            ).SerializeToString()
            for prompt in prompts
        ]
        every = round(1 / stalled_share) if stalled_share else 0
        staller_count = stream_count // every if every else 0
        methods = {
            stalls: [self._method(address, small=stalls) for _ in range(1 + count // CHANNEL_STREAM_COUNT)]
            for stalls, count in ((False, stream_count - staller_count), (True, staller_count))
        }
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        for number in range(stream_count):
            stream = Stream(number % PROMPT_COUNT, stalls=bool(every) and number % every == every - 1)
            of_kind = methods[stream.stalls]
            method = of_kind[(number // every if stream.stalls else number) % len(of_kind)]
            stream.task = asyncio.create_task(self._read(stream, method, requests[stream.prompt], timeout_s))
            self._streams.append(stream)
            late_s = began_at + (number + 1) / per_s - loop.time()
            if late_s > 0.002:
                await asyncio.sleep(late_s)
        while not all(stream.count or stream.wrong for stream in self._streams):  # noqa: ASYNC110  # once a run
            await asyncio.sleep(0.02)
        return self.stats()

    def _method(self, address: str, *, small: bool) -> Any:
        channel = grpc.aio.insecure_channel(address, options=[*OPTIONS, *(SMALL_WINDOW if small else [])])
        self._channels.append(channel)
        return channel.unary_stream(GENERATE)  # bytes in, bytes out: parsed below

    async def _read(self, stream: Stream, method: Any, request: bytes, timeout_s: float) -> None:
        try:
            await self._checked(stream, method(request, timeout=timeout_s))
            if not stream.is_finished and not stream.wrong:
                stream.wrong = f"ended after {stream.count} tokens without Finished"
        except grpc.RpcError as error:
            stream.wrong = f"{error.code().name} after {stream.count} tokens: {error.details()}"

    async def _checked(self, stream: Stream, call: Any) -> None:
        now = asyncio.get_running_loop().time
        parse = pb.GenerateResponse.FromString
        expected = self._expected[stream.prompt]
        while (message := await call.read()) is not grpc.aio.EOF:
            event = parse(message)
            if event.HasField("chunk"):
                at = now()
                if self._phase and stream.last_at >= self._phase_began_at and not stream.stalls:
                    self._gaps[self._phase].append(at - stream.last_at)
                stream.last_at = at
                stream.message_count += 1
                if event.chunk.first_token_index != stream.count:
                    stream.wrong = f"token {stream.count} was expected and {event.chunk.first_token_index} came"
                    call.cancel()
                    return
                stream.count += event.chunk.token_count
                stream.text += event.chunk.text
            elif event.HasField("finished"):
                stream.is_finished = stream.count == self._token_count and stream.text == expected
                if not stream.is_finished:
                    stream.wrong = f"{stream.count} tokens came, and {len(stream.text)} letters: not the answer"
            if stream.stalls and not self._may_read.is_set():
                await self._may_read.wait()

    def stats(self) -> dict[str, Any]:
        streams = self._streams
        return {
            "streams": len(streams),
            "stallers": sum(stream.stalls for stream in streams),
            "begun": sum(stream.count > 0 for stream in streams),
            "finished": sum(stream.is_finished for stream in streams),
            "tokens": sum(stream.count for stream in streams),
            "stalled_tokens": sum(stream.count for stream in streams if stream.stalls),
            "messages": sum(stream.message_count for stream in streams),
            "wrong": [stream.wrong for stream in streams if stream.wrong][:5],
            "wrong_count": sum(bool(stream.wrong) for stream in streams),
        }

    def phase(self, name: str) -> dict[str, Any]:
        """From now on gaps count under ``name``; empty: they do not count."""
        self._phase, self._phase_began_at = name, asyncio.get_running_loop().time()
        if name:
            self._gaps[name] = array("f")
        return self.stats()

    def gaps(self, name: str, path: str) -> dict[str, Any]:
        """Writes the gaps of a phase, seconds, as 32-bit floats."""
        with open(path, "wb") as file:
            self._gaps.get(name, array("f")).tofile(file)
        return {}

    def stall(self) -> dict[str, Any]:
        self._may_read.clear()
        return self.stats()

    def go_on(self) -> dict[str, Any]:
        self._may_read.set()
        return self.stats()

    async def finish(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every stream has ended, and says how."""
        tasks = [stream.task for stream in self._streams if stream.task is not None]
        await asyncio.wait(tasks, timeout=timeout_s)
        told = self.stats()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        return told


async def serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    readers = Readers()
    gc.freeze()
    while line := await reader.readline():
        command, *arguments = json.loads(line)
        match command:
            case "open":
                answer = await readers.open(*arguments)
            case "finish":
                answer = await readers.finish(*arguments)
            case "stats" | "phase" | "gaps" | "stall" | "go_on":
                answer = getattr(readers, command)(*arguments)
            case _:
                raise ValueError(f"no such command: {command}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with event_loop.runner() as runner:
        runner.run(serve())

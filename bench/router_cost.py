"""What the router costs: CPU microseconds per streamed token and per request, beside two floors in the same run.

    python -m bench.router_cost [--quick] [--write]

The router is the process that is deployed; the worker behind it is a stand-in (``router_cost_worker``). The floors
(``router_cost_parts``) are a bare grpc.aio server that only sends the same messages, and one that relays them from
one upstream stream per call, both on the same event loop as the router. CPU is each process's own clock (all its
threads), read before and after a window in which its streams run. Turns are A B C C B A, so that a
drift of the machine meets everybody.

Per request the bare calls are those of a handoff with nothing between them: the public call answered with the same
messages, a unary Prefill, a streamed Decode and a unary Release where there is a decode.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.admin.v1 import cluster_pb2 as admin_pb
from baton.admin.v1 import cluster_pb2_grpc
from baton.secret import SECRET_VARIABLE, TOKEN_KEY, cluster_token
from baton.v1 import generation_pb2 as pb
from bench.machine import MachineClock
from bench.router_cost_page import write_page
from bench.router_cost_worker import CONTEXT
from bench.soaking import model_directory, say
from router.tiny_model import write_tiny_model

SECRET = bytes(range(32))
SYSTEMS = ("send", "relay", "router")
PROMPT = pb.TokenIds(ids=range(300, 364))
LONGEST_START_S = 60.0
SATURATING_TOKENS_PER_S = 100_000
"""What the worker offers a router that is to be saturated: several times what one process can send one by one."""


def cpu_s(pid: int) -> float:
    """All threads of a process so far, in nanoseconds' resolution: the kernel's clock id of that process."""
    return time.clock_gettime((~pid) << 3 | 2)


@dataclass(frozen=True, slots=True)
class StreamTurn:
    """One system, streaming for one window."""

    system: str
    stream_count: int
    pace: str
    window_s: float
    token_count: int
    message_count: int
    cpu_s: float
    others_share: float

    @property
    def us_per_token(self) -> float:
        return 1e6 * self.cpu_s / max(1, self.token_count)


@dataclass(frozen=True, slots=True)
class RequestTurn:
    """One system, answering short requests for one window."""

    system: str
    output_token_count: int
    at_once: int
    request_count: int
    cpu_s: float
    ttft_p50_s: float
    worker_p50_s: float

    @property
    def us_per_request(self) -> float:
        return 1e6 * self.cpu_s / max(1, self.request_count)


class Part:
    """One of the processes, told what to do line by line."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.where: Any = None

    @classmethod
    async def start(
        cls, name: str, *arguments: str, log_path: Path, environment: dict[str, str] | None = None
    ) -> Part:
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        part = cls(name, process)
        async with asyncio.timeout(LONGEST_START_S):
            part.where = await part.heard()
        return part

    @property
    def pid(self) -> int:
        return self.process.pid

    async def heard(self) -> Any:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {await self.process.wait()}")
        return json.loads(line)

    async def tell(self, *command: Any, within_s: float = 90.0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        async with asyncio.timeout(within_s):
            result = await self.heard()
        if isinstance(result, dict) and "failed" in result:
            raise RuntimeError(f"{self.name}: {result['failed']}")
        return result

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
            try:
                async with asyncio.timeout(10):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()


class Bench:
    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self.parts: dict[str, Part] = {}
        self._address: dict[str, str] = {}

    async def start(self) -> None:
        def port(number: int) -> str:
            return str(self._port + number if self._port else 0)

        async def own(name: str, *arguments: str) -> Part:
            log_path = self._folder / f"{name}.log"
            part = await Part.start(name, "bench.router_cost_parts", *arguments, log_path=log_path)
            self.parts[name] = part
            return part

        worker = await own("worker", "worker", "--port", port(0))
        sender = await own("send", "sender", "--port", port(2))
        self._address["send"] = f"127.0.0.1:{sender.where}"
        upstream = ("--upstream", self._address["send"])
        relay = await own("relay", "handoff", *upstream, "--port", port(3))
        self._address["relay"] = f"127.0.0.1:{relay.where}"
        await own("readers", "readers")
        model = model_directory()
        if not (model / "tokenizer.json").is_file():
            model = write_tiny_model(self._folder / "model")
        config = {
            "model_name": "m",
            "model_dir": str(model),
            "listen_address": f"127.0.0.1:{port(4)}",
            "admin_address": f"127.0.0.1:{port(5)}",
            "metrics_address": f"127.0.0.1:{port(6)}",
            "max_context_token_count": CONTEXT,
            "max_in_flight_count": 4096,
            "queue_limit": 4096,
            "placement": "split",
        }
        path = self._folder / "router.json"
        path.write_text(json.dumps(config))
        environment = {SECRET_VARIABLE: SECRET.hex(), "PATH": "/usr/bin:/bin"}
        router = self.parts["router"] = await Part.start(
            "router",
            "router",
            "--config",
            str(path),
            log_path=self._folder / "router.log",
            environment=environment,
        )
        self._address["router"] = router.where["address"]
        await self._introduce(router.where["admin_address"], worker.where)

    async def _introduce(self, admin_address: str, ports: dict[str, int]) -> None:
        import grpc.aio

        specs = [
            admin_pb.WorkerSpec(worker_id=f"{role}-0", address=f"127.0.0.1:{port}", role=role)
            for role, port in ports.items()
        ]
        async with grpc.aio.insecure_channel(admin_address) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)  # type: ignore[no-untyped-call]
            metadata = ((TOKEN_KEY, cluster_token(SECRET)),)
            await stub.SetWorkers(admin_pb.SetWorkersRequest(workers=specs), metadata=metadata, timeout=10)
            async with asyncio.timeout(LONGEST_START_S):
                async for view in stub.WatchCluster(admin_pb.WatchClusterRequest(interval_ms=100)):
                    if view.is_serving:
                        return

    async def stop(self) -> None:
        for part in reversed(list(self.parts.values())):
            await part.stop()

    def _request(self, token_count: int) -> str:
        request = pb.GenerateRequest(
            token_ids=PROMPT, stop=pb.StopConditions(max_output_token_count=token_count, ignore_eos=True)
        )
        return request.SerializeToString().hex()

    async def stream(self, system: str, stream_count: int, step_s: float, window_s: float) -> StreamTurn:
        """``step_s`` 0: as fast as it is taken."""
        readers = self.parts["readers"]
        for name in ("send", "relay"):
            await self.parts[name].tell("say", 0, "")
        start_pace_s = max(step_s, stream_count / 2500)  # a pace that leaves room for opening streams
        for name in ("send", "worker"):
            await self.parts[name].tell("pace", start_pace_s)
        await readers.tell("open", self._address[system], stream_count, self._request(CONTEXT - 1000))
        await self.parts["send"].tell("pace", step_s)
        await self.parts["worker"].tell("pace", step_s or stream_count / SATURATING_TOKENS_PER_S)
        await asyncio.sleep(0.5)
        watched = [part.pid for part in self.parts.values()]
        machine, ours = MachineClock.read(), sum(map(cpu_s, watched))
        before, began_s, began_at = await readers.tell("count"), cpu_s(self.parts[system].pid), time.perf_counter()
        await asyncio.sleep(window_s)
        after, ended_s, ended_at = await readers.tell("count"), cpu_s(self.parts[system].pid), time.perf_counter()
        use = MachineClock.read().use_since(machine, sum(map(cpu_s, watched)) - ours)
        for name in ("send", "worker"):
            await self.parts[name].tell("pace", 0.1)
        await readers.tell("close")
        if after["ended"]:
            raise RuntimeError(f"{after['ended']} streams of {system} ended by themselves")
        await asyncio.sleep(0.3)  # what is cancelled is cleaned up on nobody else's account
        return StreamTurn(
            system,
            stream_count,
            f"{1000 * step_s:g} ms" if step_s else "saturated",
            ended_at - began_at,
            after["tokens"] - before["tokens"],
            after["messages"] - before["messages"],
            ended_s - began_s,
            use.others_share,
        )

    async def ask(self, system: str, token_count: int, at_once: int, window_s: float, step_s: float) -> RequestTurn:
        readers = self.parts["readers"]
        request = self._request(token_count)
        sample = await readers.tell("ask", self._address["router"], 0.2, 1, request)
        for name in ("send", "relay"):
            await self.parts[name].tell("say", token_count, sample["last"])
        for name in ("send", "worker"):
            await self.parts[name].tell("pace", step_s)
        await readers.tell("ask", self._address[system], 0.3, at_once, request)
        await self.parts["worker"].tell("stats")
        began_s = cpu_s(self.parts[system].pid)
        told = await readers.tell("ask", self._address[system], window_s, at_once, request)
        await asyncio.sleep(0.2)
        ended_s = cpu_s(self.parts[system].pid)
        worker = await self.parts["worker"].tell("stats")
        return RequestTurn(
            system,
            token_count,
            at_once,
            told["requests"],
            ended_s - began_s,
            told["ttft_p50_s"],
            worker["prefill_p50_s"],
        )


async def run(options: argparse.Namespace) -> tuple[list[StreamTurn], list[RequestTurn]]:
    window_s = 1.5 if options.quick else 3.0
    order = SYSTEMS if options.quick else (*SYSTEMS, *reversed(SYSTEMS))
    streams: list[StreamTurn] = []
    requests: list[RequestTurn] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        bench = Bench(folder, options.port)
        try:
            await bench.start()
            say("processes: " + ", ".join(f"{name} {part.pid}" for name, part in bench.parts.items()))
            for count, step_s in cells(options):
                for system in order:
                    if options.only and system not in options.only:
                        continue
                    turn = await bench.stream(system, count, step_s, options.window or window_s)
                    streams.append(turn)
                    say(
                        f"{count:5} streams, {turn.pace:9}: {system:6} {turn.us_per_token:6.1f} us/token, "
                        f"{turn.token_count / turn.window_s:8.0f} tokens/s, "
                        f"{turn.token_count / max(1, turn.message_count):4.1f} tokens/message, "
                        f"cpu {turn.cpu_s / turn.window_s:4.2f}, others {turn.others_share:4.2f}"
                    )
            for token_count, at_once in ((1, 8), (16, 8), (16, 1)) if not options.streams_only else ():
                for system in order:
                    if system == "send" or (options.only and system not in options.only):
                        continue
                    asked = await bench.ask(system, token_count, at_once, options.window or window_s, 0.005)
                    requests.append(asked)
                    say(
                        f"{token_count:2} tokens, {at_once} at once: {system:6} "
                        f"{asked.us_per_request:6.0f} us/request, "
                        f"{asked.request_count} requests, TTFT {1000 * asked.ttft_p50_s:.2f} ms, "
                        f"of it the worker's {1000 * asked.worker_p50_s:.2f}"
                    )
        finally:
            await bench.stop()
    return streams, requests


def cells(options: argparse.Namespace) -> Sequence[tuple[int, float]]:
    every = ((64, 0.025), (1000, 0.2), (64, 0.0), (1000, 0.0))
    return [
        cell for cell in every if not options.cells or f"{cell[0]}{'s' if cell[1] == 0 else 'n'}" in options.cells
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.router_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each turn once and short; below a minute")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/router-cost.md and its evidence")
    parser.add_argument("--port", type=int, default=0, help="first of seven ports; 0: any")
    parser.add_argument("--cells", nargs="*", help="64n 1000n 64s 1000s: streams at natural pace or saturated")
    parser.add_argument("--only", nargs="*", choices=SYSTEMS)
    parser.add_argument("--window", type=float, help="seconds of each turn")
    parser.add_argument("--folder", help="where the parts' logs go; default: a temporary one")
    parser.add_argument("--streams-only", action="store_true")
    options = parser.parse_args(arguments)
    streams, requests = asyncio.run(run(options))
    if options.write:
        for path in write_page([asdict(turn) for turn in streams], [asdict(turn) for turn in requests]):
            say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

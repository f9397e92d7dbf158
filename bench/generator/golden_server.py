"""The golden server as a process: both protocols on one precise loop; and a handle to start, ask and end it.

Loopback only. Collecting garbage would stop it for milliseconds, so it does not: nothing here makes cycles that grow,
and the notes are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any

import grpc.aio

from bench.generator.golden import Behaviour, Ending, GoldenRecord, GoldenScript
from bench.generator.golden_http import HttpGolden
from bench.generator.golden_service import GoldenService
from bench.generator.precise_loop import precise_runner

HOST = "127.0.0.1"
DEFAULT_MODEL = "golden"
MAX_RECORD_COUNT = 50_000
"""The oldest notes go first."""
START_DEADLINE_S = 60.0
_PR_SET_PDEATHSIG = 1
"""So that it ends also with a benchmark that was killed."""


@dataclass(frozen=True, slots=True)
class GoldenPorts:
    http: int
    grpc: int


async def serve(
    script: GoldenScript,
    *,
    http_port: int,
    grpc_port: int,
    model: str = DEFAULT_MODEL,
    stop: asyncio.Event,
    on_ready: Callable[[GoldenPorts], None] = lambda _: None,
) -> None:
    """Serves until ``stop`` is set. Port 0: any. Raises ``OSError`` when a port cannot be had."""
    records: deque[GoldenRecord] = deque(maxlen=MAX_RECORD_COUNT)
    http = HttpGolden(script, records, model=model)
    grpc_server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 * 2**20)],
        maximum_concurrent_rpcs=4096,
    )
    GoldenService(script, records, model=model).add_to(grpc_server)
    try:
        real_grpc_port = grpc_server.add_insecure_port(f"{HOST}:{grpc_port}")
    except RuntimeError as error:
        raise OSError(f"port {grpc_port} cannot be had") from error
    http_server = await asyncio.get_running_loop().create_server(http.connection, HOST, http_port, backlog=1024)
    try:
        await grpc_server.start()
        on_ready(GoldenPorts(http_server.sockets[0].getsockname()[1], real_grpc_port))
        await stop.wait()
    finally:
        http_server.close()
        await grpc_server.stop(grace=None)


def run(script: GoldenScript, *, http_port: int, grpc_port: int, model: str = DEFAULT_MODEL) -> None:
    """The process: one line of JSON with the ports when it is ready, then serves until SIGTERM or SIGINT."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        gc.collect()
        gc.freeze()
        gc.disable()
        await serve(
            script,
            http_port=http_port,
            grpc_port=grpc_port,
            model=model,
            stop=stop,
            on_ready=lambda ports: print(json.dumps(asdict(ports)), flush=True),
        )

    with precise_runner() as runner:
        runner.run(main())


@dataclass(frozen=True, slots=True)
class GoldenProcess:
    """A running golden server and how to ask it. Made by ``golden_process``, which also ends it."""

    pid: int
    ports: GoldenPorts

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.ports.http}"

    @property
    def grpc_address(self) -> str:
        return f"{HOST}:{self.ports.grpc}"

    def drain(self) -> list[GoldenRecord]:
        """What it noted since the last time. Not while a measurement runs: it would be late meanwhile."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
        with opener.open(f"{self.url}/golden/drain", timeout=30.0) as reply:
            return [GoldenRecord.from_json(fields) for fields in json.loads(reply.read())]


@contextlib.contextmanager
def golden_process(
    script: GoldenScript,
    *,
    model: str = DEFAULT_MODEL,
    http_port: int = 0,
    grpc_port: int = 0,
    cores: Sequence[int] | None = None,
) -> Iterator[GoldenProcess]:
    """A golden server of its own, on ``cores`` (None: all of ours). Ended with the block, whatever happens in it."""
    command = [sys.executable, "-m", "bench.generator.golden_server", json.dumps(script_to_json(script))]
    command += [model, str(http_port), str(grpc_port), ",".join(map(str, cores or ())), str(os.getpid())]
    root = Path(__file__).resolve().parents[2]
    process = Popen(command, stdout=PIPE, cwd=root, env={**os.environ, "GRPC_VERBOSITY": "ERROR"})  # noqa: S603
    try:
        yield GoldenProcess(process.pid, _wait_ready(process))
    finally:
        process.terminate()
        try:
            process.wait(timeout=5.0)
        except TimeoutExpired:
            process.kill()
            process.wait(timeout=5.0)
            raise
        finally:
            assert process.stdout is not None
            process.stdout.close()


def _wait_ready(process: Popen[bytes]) -> GoldenPorts:
    assert process.stdout is not None
    deadline = time.monotonic() + START_DEADLINE_S
    readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
    line = process.stdout.readline() if readable else b""
    if not line:
        raise RuntimeError(f"the golden server did not start within {START_DEADLINE_S:.0f} s, or ended: see above")
    return GoldenPorts(**json.loads(line))


def script_to_json(script: GoldenScript) -> dict[str, Any]:
    return asdict(script)


def script_from_json(fields: dict[str, Any]) -> GoldenScript:
    behaviours = tuple(Behaviour(Ending(one["ending"]), one["message_count"]) for one in fields["behaviours"])
    cycles = {name: tuple(fields[name]) for name in ("tokens_per_message", "gap_pattern")}
    return GoldenScript(**{**fields, **cycles, "behaviours": behaviours})


def main(arguments: Sequence[str]) -> None:
    script, model, http_port, grpc_port, cores, parent_pid = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent_pid):  # it died before the line above
        sys.exit(1)
    if cores:
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    run(script_from_json(json.loads(script)), http_port=int(http_port), grpc_port=int(grpc_port), model=model)


if __name__ == "__main__":
    main(sys.argv[1:])

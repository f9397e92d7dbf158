"""The router of ``bench.open_streams``: the router's own process, with a clock at both of its edges.

For each write that tokens begin: how long the worker's message had been in the router's hands by then, and how long
after the write before, of the same call, it began. Both edges are gRPC's: where the stream of a worker's legs is
read, and where a call's context is given a message; what lies between them is whatever the router does.

Records go to the file that an environment variable names, three doubles each: when the write began (CLOCK_MONOTONIC),
seconds since the worker's message (-1: begun by another task than the one that read it), seconds since the write
before of the same call. Calls that a header marks as stallers are left out.

On SIGUSR1 it tells, as JSON in the file of another variable, what of its memory is in use.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Coroutine
from typing import Any

from grpc.aio import _call as grpc_aio_call

from bench.open_streams_readers import STALLER_HEADER
from fleet import router_process
from router.service import GenerationService

RECORDS_VARIABLE = "BATON_BENCH_WRITES"
MEMORY_VARIABLE = "BATON_BENCH_MEMORY"
FIELD_COUNT = 3
FLUSH_COUNT = 3 * 4096
"""Values kept in memory before they are written."""


class Records:
    def __init__(self, path: str) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # as long as the process
        self._values = array("d")
        self.heard_at: dict[asyncio.Task[Any] | None, float] = {}
        """Of each task that reads a worker's stream, when its last message was in its hands."""

    def wrote(self, at: float, gap_s: float) -> None:
        heard_at = self.heard_at.get(asyncio.current_task())
        values = self._values
        values.append(at)
        values.append(-1.0 if heard_at is None else at - heard_at)
        values.append(gap_s)
        if len(values) >= FLUSH_COUNT:
            self._file.write(values)
            self._values = array("d")


class TimedContext:
    """A call's context, whose writes are noted."""

    __slots__ = ("_context", "_last_at", "_records")

    def __init__(self, context: Any, records: Records) -> None:
        self._context = context
        self._records = records
        self._last_at: float | None = None

    def write(self, message: Any) -> Coroutine[Any, Any, None]:
        now = time.monotonic()
        if self._last_at is not None:
            self._records.wrote(now, now - self._last_at)
        self._last_at = now
        begun: Coroutine[Any, Any, None] = self._context.write(message)
        return begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def put_clocks_in(records: Records) -> None:
    read = grpc_aio_call.StreamStreamCall.read
    generate = GenerationService.Generate

    async def timed_read(call: Any) -> Any:
        message = await read(call)
        records.heard_at[asyncio.current_task()] = time.monotonic()
        return message

    async def timed_generate(service: GenerationService, request: Any, context: Any) -> None:
        is_staller = any(key == STALLER_HEADER for key, _ in context.invocation_metadata() or ())
        await generate(service, request, context if is_staller else TimedContext(context, records))

    grpc_aio_call.StreamStreamCall.read = timed_read  # type: ignore[assignment, method-assign]
    GenerationService.Generate = timed_generate  # type: ignore[assignment, method-assign]


_MALLOC_FIELDS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keep",
)


class _MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLOC_FIELDS)


def memory_in_use() -> dict[str, int]:
    """What is in use by glibc's malloc (Python's larger objects and gRPC), and by Python's own of small objects."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    info = libc.mallinfo2()
    return {"malloc_bytes": info.uordblks + info.hblkhd, "python_block_count": sys.getallocatedblocks()}


def tell_memory(path: str) -> None:
    with open(f"{path}.new", "w") as file:
        json.dump(memory_in_use(), file)
    os.replace(f"{path}.new", path)  # whole, once it is there


if __name__ == "__main__":
    put_clocks_in(Records(os.environ[RECORDS_VARIABLE]))
    signal.signal(signal.SIGUSR1, lambda *_: tell_memory(os.environ[MEMORY_VARIABLE]))
    sys.exit(router_process.main())

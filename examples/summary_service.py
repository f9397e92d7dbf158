"""An internal service that calls Baton: it sums texts up for others, each within its caller's own deadline.

    .venv/bin/python examples/summary_service.py --baton 127.0.0.1:50051 --port 8100
    printf '{"text": "…", "timeout_s": 5}\n' | nc 127.0.0.1 8100

One JSON object a line in, one a line out: ``{"summary": …, "output_token_count": …}``, or ``{"error": {"kind": …}}``
with ``retry_after_s`` where a retry helps. What to copy from here:

- one client for the process, made in its event loop; it carries every call at once;
- the caller's deadline is passed on, less what we need ourselves, so that nobody computes for someone who has left;
- a caller that hangs up cancels its call: the request ends in the engine, not in our memory;
- what may wait is bounded, and the rest is told at once when to come back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
from typing import Any

from baton.client import BatonClient, Tls
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest
from baton.request import StopConditions

MAX_LINE_BYTES = 256 * 1024
MAX_TIMEOUT_S = 60.0
OWN_MARGIN_S = 0.05
"""Of the caller's time: for writing the answer, and for telling that the deadline passed."""
MAX_CALL_COUNT = 64
BUSY_RETRY_S = 1.0
STOP = StopConditions(max_output_token_count=96)


class SummaryService:
    """One per process."""

    def __init__(self, client: BatonClient) -> None:
        self._client = client
        self._call_count = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests one after another, until it is closed. Closed while we work, it ends the work."""
        with contextlib.suppress(ConnectionError):
            try:
                line = await reader.readline()
                while line:
                    answer = asyncio.create_task(self.answer(line))
                    following = asyncio.create_task(reader.readline())
                    try:
                        await asyncio.wait((answer, following), return_when=asyncio.FIRST_COMPLETED)
                        if not answer.done() and following.result() == b"":
                            return  # the caller left: the call is cancelled below, and ends in the engine
                        writer.write(json.dumps(await answer).encode() + b"\n")
                        await writer.drain()
                        line = await following
                    finally:
                        for task in (answer, following):
                            task.cancel()
                        await asyncio.gather(answer, following, return_exceptions=True)
            except ValueError:  # a line longer than the limit
                writer.write(json.dumps(failure("invalid", f"a line has at most {MAX_LINE_BYTES} bytes")).encode())
            finally:
                writer.close()

    async def answer(self, line: bytes) -> dict[str, Any]:
        try:
            text, timeout_s = read(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return failure("invalid", 'send {"text": "...", "timeout_s": seconds}')
        if timeout_s <= OWN_MARGIN_S:
            return failure("deadline", "there was no time to begin")
        if self._call_count >= MAX_CALL_COUNT:
            return failure("busy", f"{MAX_CALL_COUNT} calls run already", retry_after_s=BUSY_RETRY_S)
        self._call_count += 1
        try:
            answer = await self._client.complete_chat(
                [("system", "Sum up in one sentence what you are given."), ("user", text)],
                timeout=timeout_s - OWN_MARGIN_S,
                stop=STOP,
            )
        except InvalidRequest as error:
            return failure("invalid", error.message)
        except DeadlineExceeded as error:
            return failure("deadline", f"it passed in the phase {error.metadata.get('phase', 'unknown')}")
        except BatonError as error:
            kind = "busy" if error.is_retryable else "failed"
            return failure(kind, error.reason.value, retry_after_s=error.retry_after_s)
        finally:
            self._call_count -= 1
        return {"summary": answer.text, "output_token_count": answer.usage.output_token_count}


def read(line: bytes) -> tuple[str, float]:
    """Text, and the seconds that its caller has for it. Raises much for what is none of it: ValueError, KeyError,
    TypeError, OverflowError, RecursionError."""
    request = json.loads(line)
    text, timeout_s = str(request["text"]), float(request["timeout_s"])
    text.encode()  # JSON can say half a surrogate pair ("\\ud800"); gRPC cannot
    if math.isnan(timeout_s):  # which Python's JSON reads, and which is neither too little time nor too much
        raise ValueError("timeout_s is no number")
    return text, min(timeout_s, MAX_TIMEOUT_S)


def failure(kind: str, message: str, *, retry_after_s: float | None = None) -> dict[str, Any]:
    error = {"kind": kind, "message": message, "retry_after_s": retry_after_s}
    return {"error": {key: value for key, value in error.items() if value is not None}}


async def main() -> None:
    parser = argparse.ArgumentParser(description="Sums texts up, one JSON object a line.")
    parser.add_argument("--baton", default="127.0.0.1:50051", help="host:port of the router")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with BatonClient(options.baton, tls=Tls.from_environment()) as client:
        service = SummaryService(client)
        server = await asyncio.start_server(service.serve, "127.0.0.1", options.port, limit=MAX_LINE_BYTES)
        async with server:
            print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
            await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())

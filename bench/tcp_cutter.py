"""A TCP proxy that cuts connections after a given number of bytes, as networks do: without a word.

``TcpCutter`` stands between a client and a server. Each connection gets a budget of bytes of the server's answer;
when it is used up both sides are reset in the middle of whatever was being sent.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
_PIECE_BYTES = 4096


class TcpCutter:
    """Made by ``tcp_cutter``."""

    def __init__(self, target: str, budget: Callable[[], int | None]) -> None:
        """``target``: host:port. ``budget``: asked for each connection; None: it is never cut."""
        self.target = target
        self.address = ""
        self.cut_count = 0
        self._budget = budget
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def cut_all(self) -> None:
        """Every connection there is, now."""
        for writer in [*self._writers]:
            _reset(writer)
            self.cut_count += 1

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            _reset(writer)
            return
        pair = {writer, far_writer}
        self._writers |= pair
        try:
            up = asyncio.create_task(_copy(reader, far_writer, None))
            down = asyncio.create_task(_copy(far_reader, writer, self._budget()))
            self._tasks |= {up, down}
            done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if down in done and not down.cancelled() and down.exception() is None and down.result():
                self.cut_count += 1
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            self._tasks -= {up, down}
        finally:
            self._writers -= pair
            for each in pair:
                _reset(each)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None) -> bool:
    """True when the budget was used up."""
    left = budget
    while data := await reader.read(_PIECE_BYTES):
        if left is not None:
            data, left = data[:left], left - len(data)
        writer.write(data)
        await writer.drain()
        if left is not None and left <= 0:
            return True
    return False


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()


@asynccontextmanager
async def tcp_cutter(target: str, budget: Callable[[], int | None] = lambda: None) -> AsyncIterator[TcpCutter]:
    """Listens on a free port of loopback; everything is cut on leaving."""
    cutter = TcpCutter(target, budget)
    server = await asyncio.start_server(cutter.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    cutter.address = f"{host}:{port}"
    try:
        yield cutter
    finally:
        server.close()
        cutter.cut_all()
        for task in [*cutter._tasks]:
            task.cancel()

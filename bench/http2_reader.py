"""As much of HTTP/2 as reading many gRPC streams cheaply takes, and as stalling one surely takes. No I/O here.

A client of gRPC's own library spends 70 microseconds of CPU time on a message that Python reads: with thousands of
streams it, and not the server, is what one measures. Here a message costs a few. And the client decides over each
stream's window itself, so that a stalled reader is one that has given the server no room for another byte.

    connection = Connection("host:port", window_bytes=..., on_message=..., on_end=...)
    number = connection.call("/package.Service/Method", request, timeout_s=60.0)
    send(connection.to_send()); connection.feed(received); connection.give(number)
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
MOST_WINDOW_BYTES = 2**31 - 1
FIRST_CONNECTION_WINDOW_BYTES = 65_535
_FRAME = struct.Struct(">HBBBI")
_MESSAGE = struct.Struct(">BI")
_STATUS = re.compile(rb"grpc-status[\x01\x02](\d+)")

OnMessage = Callable[[int, bytes], None]
"""(call, message)"""
OnEnd = Callable[[int, str], None]
"""(call, how it ended): "grpc-status 0", or what else the server said."""


class Connection:
    """The client's end of one. What the server sends must fit into the windows it is given: the connection's is as
    large as can be and is never given anew, a call's is given back by ``give``, or never."""

    def __init__(self, authority: str, *, window_bytes: int, on_message: OnMessage, on_end: OnEnd) -> None:
        """``window_bytes``: of each call."""
        self._authority = authority
        self._on_message = on_message
        self._on_end = on_end
        self._next_call = 1
        self._received = b""
        self._partial: dict[int, bytes] = {}
        """Of a call, the beginning of a message."""
        self.ungiven: dict[int, int] = {}
        """Bytes that each open call has received, and no room was given for since. ``window_bytes``: it is full."""
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, window_bytes)
        room = struct.pack(">I", MOST_WINDOW_BYTES - FIRST_CONNECTION_WINDOW_BYTES)
        self._to_send = bytearray(PREFACE + _frame(SETTINGS, 0, 0, settings) + _frame(WINDOW_UPDATE, 0, 0, room))

    def call(
        self, path: str, request: bytes, *, timeout_s: float, headers: Mapping[str, str] = MappingProxyType({})
    ) -> int:
        """Begins a call with one request; returns its number. ``headers``: further ones, lower-case."""
        number = self._next_call
        self._next_call += 2
        self.ungiven[number] = 0
        named = {
            ":path": path,
            ":authority": self._authority,
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-timeout": f"{round(1000 * timeout_s)}m",
            **headers,
        }
        block = b"\x83\x86" + b"".join(itertools.starmap(_literal, named.items()))  # POST, http: of the static table
        body = _MESSAGE.pack(0, len(request)) + request
        self._to_send += _frame(HEADERS, END_HEADERS, number, block) + _frame(DATA, END_STREAM, number, body)
        return number

    def give(self, number: int) -> None:
        """Room for as many bytes as the call has received since."""
        if byte_count := self.ungiven.get(number, 0):
            self.ungiven[number] = 0
            self._to_send += _frame(WINDOW_UPDATE, 0, number, struct.pack(">I", byte_count))

    def to_send(self) -> bytes:
        """What is to be sent now."""
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def feed(self, data: bytes) -> None:
        """Raises ``ConnectionError`` for what no server of ours sends."""
        received = self._received + data if self._received else data
        at, end = 0, len(received)
        while end - at >= _FRAME.size:
            high, low, kind, flags, number = _FRAME.unpack_from(received, at)
            next_at = at + _FRAME.size + (high << 8 | low)
            if next_at > end:
                break
            payload = received[at + _FRAME.size : next_at]
            at = next_at
            if kind == DATA:
                self._take_data(number, flags, payload)
            elif kind == HEADERS:
                if flags & END_STREAM:
                    status = _STATUS.search(payload)
                    self._end(number, "grpc-status " + (status[1].decode() if status else "unknown"))
            elif kind == RST_STREAM:
                self._end(number, f"reset {int.from_bytes(payload)}")
            elif kind == SETTINGS and not flags & ACK:
                self._to_send += _frame(SETTINGS, ACK, 0, b"")
            elif kind == PING and not flags & ACK:
                self._to_send += _frame(PING, ACK, 0, payload)
            elif kind == GOAWAY:
                raise ConnectionError(f"the server said goodbye: {payload[8:].decode(errors='replace')}")
        self._received = received[at:]

    def _take_data(self, number: int, flags: int, payload: bytes) -> None:
        if flags & PADDED:
            raise ConnectionError("the server pads its data")
        if number not in self.ungiven:
            return  # of a call that is over
        self.ungiven[number] += len(payload)
        if number in self._partial:
            payload = self._partial.pop(number) + payload
        while len(payload) >= _MESSAGE.size:
            is_compressed, length = _MESSAGE.unpack_from(payload)
            if is_compressed:
                raise ConnectionError("the server compresses")
            if len(payload) < _MESSAGE.size + length:
                break
            self._on_message(number, payload[_MESSAGE.size : _MESSAGE.size + length])
            payload = payload[_MESSAGE.size + length :]
        if payload:
            self._partial[number] = payload
        if flags & END_STREAM:
            self._end(number, "without a status")

    def _end(self, number: int, how: str) -> None:
        self._partial.pop(number, None)
        if self.ungiven.pop(number, None) is not None:
            self._on_end(number, how)


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, number) + payload


def _literal(name: str, value: str) -> bytes:
    """Of the header compression only that nothing is compressed: a name and a value below 127 bytes."""
    said = name.encode(), value.encode()
    if max(map(len, said)) >= 127:
        raise ValueError(f"{name} is too long for this client")
    return b"\x00" + b"".join(bytes((len(each),)) + each for each in said)

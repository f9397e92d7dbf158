"""The cheap reader of many gRPC streams: messages however the frames cut them, and windows that stay full."""

from __future__ import annotations

import struct

import pytest

from bench.http2_reader import ACK, DATA, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, Connection

WINDOW_BYTES = 64


class Told:
    def __init__(self) -> None:
        self.messages: list[tuple[int, bytes]] = []
        self.ends: list[tuple[int, str]] = []
        self.connection = Connection(
            "host:1",
            window_bytes=WINDOW_BYTES,
            on_message=lambda number, message: self.messages.append((number, message)),
            on_end=lambda number, how: self.ends.append((number, how)),
        )

    def call(self) -> int:
        return self.connection.call("/p.S/M", b"ask", timeout_s=1.5, headers={"mark": "1"})


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", number) + payload


def message(said: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(said)) + said


def frames_of(sent: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while sent:
        length = int.from_bytes(sent[:3], "big")
        found.append((sent[3], sent[4], int.from_bytes(sent[5:9], "big"), sent[9 : 9 + length]))
        sent = sent[9 + length :]
    return found


def test_a_call_is_its_headers_and_its_request() -> None:
    told = Told()
    opening = told.connection.to_send()
    assert opening.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert (told.call(), told.call()) == (1, 3)
    (kind, _, number, headers), data, *_ = frames_of(told.connection.to_send())
    assert (kind, number) == (HEADERS, 1)
    for said in (b"\x05:path\x06/p.S/M", b"\x0a:authority\x06host:1", b"\x0cgrpc-timeout\x051500m", b"\x04mark\x011"):
        assert said in headers
    assert data == (DATA, END_STREAM, 1, message(b"ask"))
    assert told.connection.to_send() == b""


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_messages_are_whole_however_frames_and_reads_cut_them(size: int) -> None:
    told = Told()
    first, second = told.call(), told.call()
    body = message(b"one") + message(b"") + message(b"three")
    sent = b"".join(frame(DATA, 0, first, body[at : at + 4]) for at in range(0, len(body), 4))
    sent += frame(DATA, 0, second, message(b"other"))
    for at in range(0, len(sent), size):
        told.connection.feed(sent[at : at + size])
    assert told.messages == [(first, b"one"), (first, b""), (first, b"three"), (second, b"other")]


def test_a_window_is_given_anew_only_when_its_reader_reads() -> None:
    told = Told()
    number = told.call()
    told.connection.to_send()
    told.connection.feed(frame(DATA, 0, number, message(b"x" * 40)) + frame(DATA, 0, number, message(b"y" * 40)[:19]))
    assert told.connection.ungiven[number] == WINDOW_BYTES
    assert told.connection.to_send() == b"", "nobody has read"
    told.connection.give(number)
    assert frames_of(told.connection.to_send()) == [(8, 0, number, struct.pack(">I", WINDOW_BYTES))]
    assert told.connection.ungiven[number] == 0
    told.connection.give(number)
    assert told.connection.to_send() == b""


def test_the_end_of_a_call_is_told_once_with_its_status() -> None:
    told = Told()
    first, second, third = told.call(), told.call(), told.call()
    told.connection.feed(frame(HEADERS, 4, first, b"\x00\x0bgrpc-status\x010"))  # no end: headers that come first
    assert told.ends == []
    told.connection.feed(frame(HEADERS, 4 | END_STREAM, first, b"\x00\x0bgrpc-status\x0214"))
    told.connection.feed(frame(RST_STREAM, 0, second, struct.pack(">I", 8)) * 2)
    told.connection.feed(frame(DATA, END_STREAM, third, b""))
    told.connection.feed(frame(DATA, 0, first, message(b"late")))
    assert told.ends == [(first, "grpc-status 14"), (second, "reset 8"), (third, "without a status")]
    assert told.messages == []


def test_the_server_is_answered_and_what_no_server_of_ours_says_is_an_error() -> None:
    told = Told()
    told.connection.to_send()
    told.connection.feed(frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b"") + frame(PING, 0, 0, b"12345678"))
    assert frames_of(told.connection.to_send()) == [(SETTINGS, ACK, 0, b""), (PING, ACK, 0, b"12345678")]
    with pytest.raises(ConnectionError, match="said goodbye: too much"):
        told.connection.feed(frame(GOAWAY, 0, 0, b"\0" * 8 + b"too much"))
    with pytest.raises(ConnectionError, match="compresses"):
        told.connection.feed(frame(DATA, 0, told.call(), b"\1\0\0\0\0"))
    with pytest.raises(ValueError, match="mark is too long"):
        told.connection.call("/p.S/M", b"", timeout_s=1.0, headers={"mark": "x" * 127})

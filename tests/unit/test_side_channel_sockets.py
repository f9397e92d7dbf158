"""The side channel on real loopback sockets: nobody who is silent, slow or hostile keeps others from their answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from kvtransfer import connector_side_channel
from kvtransfer.connector_side_channel import MAX_CONNECTION_COUNT, Listener, ask
from kvtransfer.side_channel import MAGIC, MAX_REQUEST_BYTES, SideChannelError

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
HOST = "127.0.0.1"


def echo(request: bytes) -> bytes:
    if request == b"fail":
        raise RuntimeError("the answer failed")
    return b"you said " + request[:100] + b"." * (len(request) * 100)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def listening() -> Iterator[int]:
    port = free_port()
    listener = Listener((HOST, port), KEY, echo)
    try:
        yield port
    finally:
        listener.close()
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), timeout=60)


def said_by(port: int, key: bytes = KEY, request: bytes = b"hello") -> bytes:
    return ask(HOST, port, key, request, 5.0)


def test_questions_large_and_small_are_answered() -> None:
    with listening() as port:
        assert said_by(port).startswith(b"you said hello")
        assert len(said_by(port, request=b"x" * MAX_REQUEST_BYTES)) > 1_000_000


def test_another_key_gets_no_answer_on_either_side_and_an_answer_that_fails_ends_only_itself() -> None:
    with listening() as port:
        with pytest.raises(SideChannelError, match="server does not know"):
            said_by(port, OTHER_KEY)
        with pytest.raises(SideChannelError, match="hung up"):
            said_by(port, request=b"fail")
        assert said_by(port)


def test_garbage_is_hung_up_on_and_a_crowd_of_silent_callers_is_no_obstacle() -> None:
    with listening() as port, ExitStack() as crowd:
        for said in (b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 20), MAGIC + bytes(32) + b"\xff" * 4):
            with socket.create_connection((HOST, port), timeout=60) as outsider:
                with suppress(ConnectionError):
                    outsider.sendall(said)
                with suppress(ConnectionError):
                    while outsider.recv(65_536):
                        pass
        for number in range(2 * MAX_CONNECTION_COUNT):
            silent = crowd.enter_context(socket.create_connection((HOST, port), timeout=60))
            if number % 2:
                silent.sendall(MAGIC)
        assert said_by(port)


def test_a_caller_that_never_ends_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector_side_channel, "CONNECTION_TIMEOUT_S", 0.05)
    with listening() as port, socket.create_connection((HOST, port), timeout=60) as slow:
        slow.sendall(MAGIC)
        assert slow.recv(1) == b""


def test_a_peer_that_is_silent_or_gone_costs_a_bounded_wait() -> None:
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError):
            ask(HOST, port, KEY, b"hello", 0.05)
    with pytest.raises(ConnectionRefusedError):
        ask(HOST, port, KEY, b"hello", 5.0)


def test_a_peer_that_trickles_is_not_waited_for_longer() -> None:
    """Each byte comes in time, and all of them together do not."""
    with socket.create_server((HOST, 0)) as server:
        is_over = threading.Event()

        def trickle() -> None:
            accepted, _ = server.accept()
            with accepted, suppress(OSError):
                while not is_over.wait(0.01):
                    accepted.send(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                ask(HOST, server.getsockname()[1], KEY, b"hello", 0.1)
        finally:
            is_over.set()
            thread.join()


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.create_server((HOST, 0)) as taken, pytest.raises(OSError, match="in use"):
        Listener((HOST, taken.getsockname()[1]), KEY, echo)

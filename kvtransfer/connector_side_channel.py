"""The sockets of the side channel: who listens, who asks, and how long either may take.

What is said is ``kvtransfer/side_channel.py``'s. Blocking calls and a thread of its own, because an engine process
has no event loop to spare; knows nothing of vLLM.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from kvtransfer.side_channel import NONCE_BYTES, ClientSession, ServerSession, SideChannelError

logger = logging.getLogger(f"vllm.{__name__}")  # the only tree that an engine process shows

MAX_CONNECTION_COUNT = 64
CONNECTION_TIMEOUT_S = 2.0
"""From the accept to the last byte of the reply, whoever is slow."""
_RECV_BYTES = 64 * 1024


class Listener:
    """Answers on the side channel, in one thread. The socket listens when the constructor returns."""

    def __init__(self, address: tuple[str, int], key: bytes, answer: Callable[[bytes], bytes]) -> None:
        self._key = key
        self._answer = answer
        host, port = address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=MAX_CONNECTION_COUNT)
        self._socket.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}
        """Oldest first."""
        self._thread = threading.Thread(target=self._run, name="baton-side-channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening and hangs up on everybody. Idempotent."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join(timeout=CONNECTION_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while True:
                for ready, _ in self._selector.select(self._next_timeout_s()):
                    if ready.fileobj is self._woken:
                        return
                    if ready.fileobj is self._socket:
                        self._accept()
                    elif ready.fileobj in self._connections:
                        self._serve(ready.fileobj)
                now = time.monotonic()
                for connection in [each for each in self._connections.values() if each.ends_at <= now]:
                    self._drop(connection)
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._selector.close()
            for each in (self._socket, self._wake, self._woken):
                each.close()

    def _next_timeout_s(self) -> float | None:
        first = next(iter(self._connections.values()), None)
        return None if first is None else max(0.0, first.ends_at - time.monotonic())

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except OSError:  # it left before we came to it, or there are no file descriptors
            return
        accepted.setblocking(False)
        if len(self._connections) >= MAX_CONNECTION_COUNT:
            # An honest handshake takes milliseconds: who is oldest is stuck, or means harm.
            self._drop(next(iter(self._connections.values())))
        session = ServerSession(self._key, secrets.token_bytes(NONCE_BYTES), self._answer)
        self._connections[accepted] = _Connection(accepted, session, time.monotonic() + CONNECTION_TIMEOUT_S)
        self._selector.register(accepted, selectors.EVENT_READ)

    def _serve(self, ready: Any) -> None:
        connection = self._connections[ready]
        try:
            if not connection.session.is_done:
                data = ready.recv(_RECV_BYTES)
                if not data:
                    self._drop(connection)
                    return
                connection.unsent += connection.session.feed(data)
            if connection.unsent:
                del connection.unsent[: ready.send(connection.unsent)]
        except BlockingIOError:
            pass
        except SideChannelError as error:
            logger.warning("Refused a connection to the side channel: %s", error)
            self._drop(connection)
            return
        except Exception as error:
            logger.warning("A connection to the side channel failed: %s", type(error).__name__)
            self._drop(connection)
            return
        if connection.session.is_done and not connection.unsent:
            self._drop(connection)
            return
        self._selector.modify(ready, selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ)

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.socket, None) is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()


class _Connection:
    def __init__(self, accepted: socket.socket, session: ServerSession, ends_at: float) -> None:
        self.socket = accepted
        self.session = session
        self.ends_at = ends_at
        self.unsent = bytearray()


def ask(host: str, port: int, key: bytes, request: bytes, timeout_s: float) -> bytes:
    """The reply of the engine at ``host``. Raises ``SideChannelError`` when that is not of our cluster, ``OSError``
    when nobody answers within ``timeout_s``, all steps together."""
    ends_at = time.monotonic() + timeout_s
    session = ClientSession(key, secrets.token_bytes(NONCE_BYTES), request)
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(session.start())
        while not session.is_done:
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no reply within {timeout_s:g} s")
            connection.settimeout(left_s)
            data = connection.recv(_RECV_BYTES)
            if not data:
                raise SideChannelError("the peer hung up: another cluster's secret, or not an engine")
            if out := session.feed(data):
                connection.sendall(out)
    return session.reply

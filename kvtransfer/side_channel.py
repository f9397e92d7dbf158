"""How two engines find out that they are of one cluster, before either says anything of itself.

Both sides know one key. Pure state machines: bytes in, bytes out; no socket, no clock, no randomness (nonces are
handed in, new ones each time). Whoever drives them owns the deadline and closes the connection on any error.

    client                                                              server
    magic | nonce_c                              ---->
                                                 <----   nonce_s | HMAC(key, "server" | nonce_c | nonce_s)
    length | HMAC(key_c, request) | request      ---->
                                                 <----   length | HMAC(key_s, request's HMAC | reply) | reply

The server has proved itself before the client sends more than a nonce, and the client has before the server reads a
request. ``key_c`` and ``key_s`` are made of the key and both nonces, so that nothing can be replayed, reflected or
changed on the way. What is said is authentic, not secret.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Mapping

__all__ = [
    "KEY_VARIABLE",
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "NONCE_BYTES",
    "ClientSession",
    "ServerSession",
    "SideChannelError",
    "differences",
]

KEY_VARIABLE = "BATON_SIDE_CHANNEL_KEY"
"""Environment variable with an engine process's key, 64 hexadecimal digits. Not in the engine's configuration: vLLM
logs that."""
MAGIC = b"BKS1"
NONCE_BYTES = 32
MAX_REQUEST_BYTES = 16 * 1024
MAX_REPLY_BYTES = 4 * 1024 * 1024
"""The agent's own description with the addresses of all layers takes some KiB."""

_MAC_BYTES = hashlib.sha256().digest_size
_LENGTH = struct.Struct(">I")
MAX_VALUE_LENGTH = 200


class SideChannelError(Exception):
    """The other side is not of this cluster, or does not keep to the protocol."""


class _Session:
    """Bytes that arrived and were not used yet; never more than the next message may have."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        self._key = key
        self._nonce = nonce
        self._buffer = bytearray()
        self.is_done = False

    def _mac(self, label: bytes, nonce_c: bytes, nonce_s: bytes) -> bytes:
        return _hmac(self._key, MAGIC + label + nonce_c + nonce_s)

    def _take(self, count: int) -> bytes | None:
        if len(self._buffer) < count:
            return None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _take_frame(self, most: int) -> tuple[bytes, bytes] | None:
        """HMAC and body, once they are there."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 1 <= length <= most:
            raise SideChannelError(f"a message of {length} bytes, where 1 to {most} are allowed")
        if len(self._buffer) > _LENGTH.size + _MAC_BYTES + length:
            raise SideChannelError("more bytes than were announced")
        frame = self._take(_LENGTH.size + _MAC_BYTES + length)
        if frame is None:
            return None
        return frame[_LENGTH.size : _LENGTH.size + _MAC_BYTES], frame[_LENGTH.size + _MAC_BYTES :]


class ServerSession(_Session):
    """One accepted connection. ``answer`` makes the reply of a request; it is asked only once the client has proved
    itself, and what it raises is the driver's."""

    def __init__(self, key: bytes, nonce: bytes, answer: Callable[[bytes], bytes]) -> None:
        super().__init__(key, nonce)
        self._answer = answer
        self._client_nonce: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """What is to be sent now. Raises ``SideChannelError``."""
        self._buffer += data
        sent = b""
        if self._client_nonce is None:
            if not MAGIC.startswith(bytes(self._buffer[: len(MAGIC)])):
                raise SideChannelError("not this protocol")
            hello = self._take(len(MAGIC) + NONCE_BYTES)
            if hello is None:
                return b""
            self._client_nonce = hello[len(MAGIC) :]
            sent = self._nonce + self._mac(b"server", self._client_nonce, self._nonce)
        frame = None if self.is_done else self._take_frame(MAX_REQUEST_BYTES)
        if frame is None:
            if self.is_done and self._buffer:
                raise SideChannelError("more bytes than were announced")
            return sent
        mac, request = frame
        client_key = self._mac(b"client session", self._client_nonce, self._nonce)
        if not hmac.compare_digest(mac, _hmac(client_key, request)):
            raise SideChannelError("the client does not know the cluster's key")
        reply = self._answer(request)
        server_key = self._mac(b"server session", self._client_nonce, self._nonce)
        self.is_done = True
        return sent + _frame(_hmac(server_key, mac + reply), reply)


class ClientSession(_Session):
    """One opened connection. ``start`` first, then ``feed`` until ``is_done``; then ``reply`` is there."""

    def __init__(self, key: bytes, nonce: bytes, request: bytes) -> None:
        super().__init__(key, nonce)
        if not 1 <= len(request) <= MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {len(request)} bytes, where 1 to {MAX_REQUEST_BYTES} are allowed")
        self._request = request
        self._server_nonce: bytes | None = None
        self._request_mac = b""
        self.reply = b""

    def start(self) -> bytes:
        return MAGIC + self._nonce

    def feed(self, data: bytes) -> bytes:
        """What is to be sent now. Raises ``SideChannelError``."""
        if self.is_done:
            raise SideChannelError("more bytes than were announced")
        self._buffer += data
        if self._server_nonce is None:
            hello = self._take(NONCE_BYTES + _MAC_BYTES)
            if hello is None:
                return b""
            server_nonce = hello[:NONCE_BYTES]
            if not hmac.compare_digest(hello[NONCE_BYTES:], self._mac(b"server", self._nonce, server_nonce)):
                raise SideChannelError("the server does not know the cluster's key")
            self._server_nonce = server_nonce
            client_key = self._mac(b"client session", self._nonce, server_nonce)
            self._request_mac = _hmac(client_key, self._request)
            return _frame(self._request_mac, self._request)
        frame = self._take_frame(MAX_REPLY_BYTES)
        if frame is None:
            return b""
        mac, reply = frame
        server_key = self._mac(b"server session", self._nonce, self._server_nonce)
        if not hmac.compare_digest(mac, _hmac(server_key, self._request_mac + reply)):
            raise SideChannelError("the reply was changed on its way")
        self.reply = reply
        self.is_done = True
        return b""


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """What two engines that exchange KV must have in common and have not, by name; empty: nothing."""
    names = [*here, *(name for name in there if name not in here)]
    return "; ".join(
        f"{name[:MAX_VALUE_LENGTH]}: {_said(here, name)} here, {_said(there, name)} there"
        for name in names
        if here.get(name) != there.get(name)
    )


def _said(facts: Mapping[str, str], name: str) -> str:
    return facts[name][:MAX_VALUE_LENGTH] if name in facts else "not said"


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def _frame(mac: bytes, body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + mac + body

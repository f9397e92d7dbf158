"""Where an engine can be reached by other engines, sealed so that only this cluster can have said it.

A worker seals the coordinates of its own engine, the router carries them to the other workers, and these open them.
Pure: no I/O and no clock. Nobody connects anywhere here.

    "BKP1" | HMAC-SHA256 of the body, 32 bytes | canonical JSON body
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from baton.secret import peer_key

__all__ = [
    "MAX_PEER_BYTES",
    "MAX_PEER_COUNT",
    "PeerAddress",
    "PeerRefusedError",
    "open_peer",
    "seal_peer",
]

MAGIC = b"BKP1"
MAX_PEER_BYTES = 1024
MAX_PEER_COUNT = 64
"""In one introduction."""

_MAC_BYTES = hashlib.sha256().digest_size
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_HOST = re.compile(r"[A-Za-z0-9_.:%-]{1,253}")


class PeerRefusedError(ValueError):
    """Coordinates that are not to be used; the message says which check failed, and quotes nothing of them."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """One engine of one worker process."""

    worker_id: str
    epoch: str
    engine_id: str
    """New with each engine process: what an earlier one held is not reached under it."""
    host: str
    port: int
    """Of its side channel."""

    def __post_init__(self) -> None:
        for name in ("worker_id", "epoch", "engine_id"):
            _matching(name, getattr(self, name), _NAME)
        _matching("host", self.host, _HOST)
        if type(self.port) is not int or not 1 <= self.port <= 65_535:
            raise PeerRefusedError("port is not within 1 to 65535")


_KEYS = tuple(field.name for field in fields(PeerAddress))


def seal_peer(address: PeerAddress, secret: bytes) -> bytes:
    """The coordinates as bytes. Raises ``ValueError`` if they would not open again."""
    body = json.dumps(asdict(address), sort_keys=True, separators=(",", ":")).encode()
    data = MAGIC + _mac(body, secret) + body
    if len(data) > MAX_PEER_BYTES:
        raise ValueError(f"coordinates of {len(data)} bytes are larger than {MAX_PEER_BYTES}")
    return data


def open_peer(data: bytes, secret: bytes) -> PeerAddress:
    """The coordinates in ``data``. Raises ``PeerRefusedError`` for anything that this cluster has not sealed. Whether
    the host may be dialled is for whoever dials."""
    if len(data) > MAX_PEER_BYTES:
        raise PeerRefusedError(f"larger than {MAX_PEER_BYTES} bytes")
    start = len(MAGIC) + _MAC_BYTES
    if len(data) <= start or not data.startswith(MAGIC):
        raise PeerRefusedError("not sealed coordinates")
    body = data[start:]
    if not hmac.compare_digest(data[len(MAGIC) : start], _mac(body, secret)):
        raise PeerRefusedError("not sealed by this cluster")
    # The seal says who made it, not that the maker is of this version or free of bugs.
    try:
        content = json.loads(body)
    except ValueError:
        raise PeerRefusedError("not JSON") from None
    if not isinstance(content, dict) or content.keys() != set(_KEYS):
        raise PeerRefusedError("not the fields of coordinates")
    return PeerAddress(**content)


def _mac(body: bytes, secret: bytes) -> bytes:
    return hmac.new(peer_key(secret), MAGIC + body, hashlib.sha256).digest()


def _matching(name: str, value: Any, pattern: re.Pattern[str]) -> None:
    if type(value) is not str or not pattern.fullmatch(value):
        raise PeerRefusedError(f"{name} is malformed")

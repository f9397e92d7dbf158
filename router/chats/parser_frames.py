"""What the router and the process that parses answers say to each other: JSON objects, each behind its length.

    4 bytes, big-endian: n | n bytes: a JSON object in ASCII

Pure. Nothing but JSON is ever read from the pipe. Token ids travel packed: a prompt may have a hundred thousand.
"""

from __future__ import annotations

import base64
import json
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

MAX_FRAME_BYTES = 16 * 1024 * 1024
HEADER_BYTES = 4
_HEADER = struct.Struct(">I")


class FrameError(ValueError):
    """Not a frame of ours: the other side is not who it should be, or no longer itself."""


def frame(message: Mapping[str, Any]) -> bytes:
    """Raises ``FrameError`` for one larger than any may be."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Bytes that follow. Raises ``FrameError``."""
    if len(header) != HEADER_BYTES:
        raise FrameError("a frame was cut off")
    length: int = _HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES}")
    return length


def message_of(body: bytes) -> dict[str, Any]:
    """Raises ``FrameError``."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError("a frame holds no JSON") from error
    if not isinstance(message, dict):
        raise FrameError("a frame holds no JSON object")
    return message


def packed_ids(token_ids: Sequence[int]) -> str:
    """``token_ids``: each from 0 to 2**31 - 1."""
    return base64.b64encode(array("i", token_ids).tobytes()).decode("ascii")


def unpacked_ids(text: str) -> list[int]:
    ids = array("i")
    ids.frombytes(base64.b64decode(text, validate=True))
    return ids.tolist()

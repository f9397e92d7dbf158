"""About what a piece of an answer takes in memory, for those who keep pieces and have a bound in bytes. Pure."""

from __future__ import annotations

import sys

from router.answering import Piece

_PIECE_BYTES = 320
_TOKEN_BYTES = 40
_LOGPROBS_BYTES = 160
_TOP_BYTES = 120
"""What Python takes for them, rounded up: see tests/unit/test_replay_window.py."""
_BARE_BYTES = _PIECE_BYTES + sys.getsizeof("")


def size_bytes(piece: Piece) -> int:
    """Of a piece that stands by itself."""
    size = _PIECE_BYTES + _TOKEN_BYTES * len(piece.token_ids) + sys.getsizeof(piece.text)
    if piece.reasoning_text:
        size += sys.getsizeof(piece.reasoning_text)
    for call in piece.tool_calls:
        size += _PIECE_BYTES + sys.getsizeof(call.arguments_json)
    for each in piece.logprobs:
        size += _LOGPROBS_BYTES + _TOP_BYTES * len(each.top)
    return size


def content_bytes(piece: Piece) -> int:
    """Of what it adds to another piece that it is merged into."""
    return size_bytes(piece) - _BARE_BYTES

"""Frames between the router and the process that parses answers."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest

from router.chats.parser_frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    FrameError,
    body_length,
    frame,
    message_of,
    packed_ids,
    unpacked_ids,
)
from router.chats.parser_process import frames


def test_what_goes_in_comes_out_whatever_it_says() -> None:
    messages: list[dict[str, Any]] = [{"op": "push", "texts": ["\ud800", "é👍\n\0", ""]}, {"x": [1, None, True]}]
    assert list(frames(io.BytesIO(b"".join(frame(message) for message in messages)))) == messages


def test_token_ids_travel_packed() -> None:
    ids = [0, 1, 2**31 - 1]
    assert unpacked_ids(packed_ids(ids)) == ids
    assert unpacked_ids(packed_ids(())) == []


@pytest.mark.parametrize("header", [b"", b"\0\0", struct.pack(">I", MAX_FRAME_BYTES + 1), b"\xff\xff\xff\xff"])
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    with pytest.raises(FrameError):
        body_length(header)


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_holds_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        message_of(body)


def test_a_frame_has_a_largest_size() -> None:
    with pytest.raises(FrameError):
        frame({"x": "y" * MAX_FRAME_BYTES})
    assert body_length(frame({"x": "y"})[:HEADER_BYTES]) == len(frame({"x": "y"})) - HEADER_BYTES

"""Server-sent events, cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.generator import sse
from bench.generator.sse import EventStream, EventTooLong

STREAM = (
    b": a comment\n\n"
    b'data: {"a":1}\n\n'
    b'event: error\r\ndata: {"b":2}\r\nid: 7\r\n\r\n'
    b"data:without a space\r\r"
    b"retry: 10\n\n"
    b"data: two\ndata: lines\n\n"
    b"data: and\r\ndata: more\r\n\r\n"
    b"data\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a":1}', b'{"b":2}', b"without a space", b"two\nlines", b"and\nmore", b"[DONE]"]


def events_of(pieces: list[bytes]) -> list[bytes]:
    stream = EventStream()
    return [event for piece in pieces for event in stream.feed(piece)] + stream.end()


def test_events_come_whole_whatever_ends_their_lines() -> None:
    assert events_of([STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_network_cut_them(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert events_of([STREAM[a:b] for a, b in itertools.pairwise(places)]) == EVENTS


def test_events_do_not_depend_on_cuts_byte_by_byte() -> None:
    assert events_of([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


def test_an_event_is_told_as_soon_as_it_is_complete() -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1\n") == []
    assert stream.feed(b"\n") == [b"1"]
    assert stream.feed(b"data: 2\n\ndata: 3\n\nda") == [b"2", b"3"]
    assert stream.feed(b"ta: 4\n\n") == [b"4"]


def test_a_last_event_without_its_empty_line_counts() -> None:
    assert events_of([b"data: 1\n\ndata: 2"]) == [b"1", b"2"]
    assert events_of([b"data: 1\n\ndata: 2\r\n"]) == [b"1", b"2"]
    assert events_of([b""]) == []


def test_an_event_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    with pytest.raises(EventTooLong):
        EventStream().feed(b"data: " + b"x" * 200)
    stream = EventStream()
    for _ in range(10):
        assert stream.feed(b"data: 1234567890\n") == []
    with pytest.raises(EventTooLong):
        stream.feed(b"data: 1234567890\n")

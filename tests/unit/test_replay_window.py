"""The replay window: what may be read from where, and what it costs."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from baton.errors import BatonError, Reason, draining
from baton.request import TokenLogprobs, ToolCallDelta
from router.answering import Completed, Piece
from router.piece_size import size_bytes
from router.resuming import replay_window
from router.resuming.replay_window import (
    GUARANTEED_TOKEN_COUNT,
    MAX_LOOK_COUNT,
    Cursor,
    ReplayWindow,
    SharedBytes,
    WindowLimits,
    joined,
    trim_largest,
)

END = object.__new__(Completed)
"""An end: the window looks at nothing of it."""


def piece(first: int, count: int, text: str = "", **more: Any) -> Piece:
    return Piece(first, tuple(range(first, first + count)), text or f"<{first}+{count}>", None, **more)


def window(
    *,
    max_tokens: int = 10_000,
    max_bytes: int = 1 << 20,
    total: int = 1 << 30,
    chunk: int = 64,
    guaranteed: int = 0,
    **more: Any,
) -> ReplayWindow:
    return ReplayWindow(WindowLimits(max_bytes, max_tokens, guaranteed), SharedBytes(total), chunk, **more)


def read(replay: ReplayWindow, cursor: Cursor) -> list[Piece]:
    pieces = []
    while (taken := replay.take(cursor)) is not None:
        pieces.append(taken)
    return pieces


def refused(replay: ReplayWindow, *indices: int) -> BatonError:
    with pytest.raises(BatonError) as caught:
        replay.cursor(indices)
    return caught.value


def test_a_reader_who_keeps_up_gets_each_piece_as_it_was_made() -> None:
    replay = window()
    cursor = replay.cursor([0])
    for made in (piece(0, 1), piece(1, 4), piece(5, 2)):
        replay.put(made)
        assert read(replay, cursor) == [made]
    assert replay.take(cursor) is None


def test_pieces_that_wait_are_read_together_up_to_the_size_of_a_chunk() -> None:
    replay = window(chunk=6)
    for first, last in pairwise((0, 1, 5, 7, 13)):
        replay.put(piece(first, last - first))
    got = read(replay, replay.cursor([0]))
    assert [(each.first_token_index, each.token_count) for each in got] == [(0, 5), (5, 2), (7, 6)]
    assert "".join(each.text for each in got) == "<0+1><1+4><5+2><7+6>"


def test_a_reader_begins_at_every_border_and_nowhere_else() -> None:
    replay = window()
    for first, last in pairwise((0, 3, 7, 8)):
        replay.put(piece(first, last - first))
    for index, count in ((0, 8), (3, 5), (7, 1), (8, 0)):
        got = read(replay, replay.cursor([index]))
        assert sum(each.token_count for each in got) == count
        assert not got or got[0].first_token_index == index
    for index in (1, 2, 4, 9):
        error = refused(replay, index)
        assert error.reason is Reason.INVALID_REQUEST
        assert [each.field for each in error.violations] == ["next_token_index"]


def test_the_tail_is_one_piece_at_the_end_and_has_a_place_of_its_own() -> None:
    replay = window()
    replay.put(piece(0, 4))
    replay.put(Piece(4, (), "held", None))
    replay.put(Piece(4, (), " back", None))
    cursor = replay.cursor([0])
    assert [each.text for each in read(replay, cursor)] == ["<0+4>"], "it waits for tokens or for the end"
    replay.end(END)
    assert [(each.first_token_index, each.text) for each in read(replay, cursor)] == [(4, "held back")]
    assert [each.text for each in read(replay, replay.cursor([4]))] == ["held back"]
    assert read(replay, replay.cursor([5])) == []
    assert refused(replay, 6).reason is Reason.INVALID_REQUEST


def test_text_without_tokens_in_the_middle_goes_along_with_the_next_tokens() -> None:
    replay = window()
    replay.put(piece(0, 2))
    replay.put(Piece(2, (), "thought", None, tool_calls=(ToolCallDelta(0, "id", "f"),)))
    replay.put(piece(2, 1, " then"))
    replay.end(END)
    got = read(replay, replay.cursor([2]))
    assert [(each.token_count, each.text, len(each.tool_calls)) for each in got] == [(1, "thought then", 1)]


def test_a_failed_answer_has_no_tail() -> None:
    replay = window()
    replay.put(piece(0, 2))
    replay.put(Piece(2, (), "held", None))
    replay.end(draining())
    assert read(replay, replay.cursor([2])) == []
    assert refused(replay, 3).reason is Reason.INVALID_REQUEST


def test_the_oldest_leaves_by_tokens_and_whoever_asks_for_it_is_too_late() -> None:
    replay = window(max_tokens=5)
    slow = replay.cursor([0])
    for first in range(0, 12, 2):
        replay.put(piece(first, 2))
    assert replay.token_count == 4
    error = refused(replay, 6)
    assert error.reason is Reason.RESUME_TOO_LATE
    assert error.metadata == {"next_token_index": "6", "first_token_index": "8"}
    assert [each.first_token_index for each in read(replay, replay.cursor([8]))] == [8]
    with pytest.raises(BatonError) as caught:
        replay.take(slow)
    assert caught.value.metadata == {"next_token_index": "0", "first_token_index": "8"}


def test_a_reader_that_was_overtaken_but_has_what_left_reads_on() -> None:
    replay = window(max_tokens=4)
    replay.put(piece(0, 4))
    cursor = replay.cursor([4])
    replay.put(piece(4, 4))
    assert [each.first_token_index for each in read(replay, cursor)] == [4]


def test_it_is_bounded_in_bytes_and_so_are_all_together() -> None:
    shared = SharedBytes(60_000)
    one = ReplayWindow(WindowLimits(50_000, 10**6), shared, 64)
    other = ReplayWindow(WindowLimits(50_000, 10**6), shared, 64)
    for first in range(1000):
        one.put(piece(first, 1))
        assert one.used_bytes <= 50_000
    for first in range(1000):
        other.put(piece(first, 1))
        assert shared.used_bytes <= 60_000 or other.token_count <= GUARANTEED_TOKEN_COUNT
    assert other.token_count == GUARANTEED_TOKEN_COUNT, "who comes late to a full house keeps its share"
    assert shared.used_bytes == one.used_bytes + other.used_bytes
    one.clear()
    other.clear()
    assert shared.used_bytes == 0


def test_a_reader_who_keeps_up_is_never_too_late_however_full_the_house_is() -> None:
    shared = SharedBytes(10_000, used_bytes=20_000)  # of others, who give way to nothing
    replay = ReplayWindow(WindowLimits(1 << 20, 10_000), shared, 64)
    cursor, got = replay.cursor([0]), 0
    for first in range(0, 600, 3):
        for each in range(3):
            replay.put(piece(first + each, 1))
        if first % GUARANTEED_TOKEN_COUNT in (0, 1, 2) or first + 3 - got > GUARANTEED_TOKEN_COUNT - 3:
            got += sum(each.token_count for each in read(replay, cursor))
            assert got == first + 3
        assert replay.token_count <= GUARANTEED_TOKEN_COUNT


@pytest.mark.parametrize("limits", [{"max_bytes": 1024}, {"max_tokens": 64}, {"total": 1024}])
@pytest.mark.parametrize("size", [1, 3, 40, 64, 100])
def test_the_newest_tokens_are_kept_whatever_bounds_the_window(limits: dict[str, int], size: int) -> None:
    replay = window(**limits, guaranteed=GUARANTEED_TOKEN_COUNT)
    for first in range(0, 100 * size, size):
        replay.put(piece(first, size))
        wanted = min(first + size, GUARANTEED_TOKEN_COUNT)
        assert wanted <= replay.token_count < GUARANTEED_TOKEN_COUNT + size


def test_room_is_asked_for_where_there_is_none_and_not_for_every_token() -> None:
    asked: list[int] = []
    shared = SharedBytes(64_000, make_room=asked.append)
    replay = ReplayWindow(WindowLimits(1 << 20, 10**6), shared, 64)
    first = 0
    while shared.used_bytes <= 64_000 and not asked:
        replay.put(piece(first, 1))
        first += 1
    assert asked == [60_000]
    for each in range(first, first + 10):
        replay.put(piece(each, 1))
    assert 1 < len(asked) <= 6, "again once a 64th came, not for each"


def test_the_largest_windows_give_first_and_none_more_than_it_is_guaranteed() -> None:
    shared = SharedBytes(1 << 30)
    windows = [ReplayWindow(WindowLimits(1 << 30, 10**6), shared, 64) for _ in range(3)]
    for each, count in zip(windows, (50, 400, 1000), strict=True):
        for first in range(count):
            each.put(piece(first, 1))
    before = [each.used_bytes for each in windows]
    trim_largest(windows, shared, shared.used_bytes - before[2] // 4)
    assert [each.used_bytes for each in windows[:2]] == before[:2]
    assert windows[2].used_bytes > before[2] // 2
    trim_largest(windows, shared, 0)
    assert [each.token_count for each in windows] == [50, GUARANTEED_TOKEN_COUNT, GUARANTEED_TOKEN_COUNT]
    assert shared.used_bytes == sum(each.used_bytes for each in windows)


def test_the_newest_piece_is_kept_whatever_its_size() -> None:
    replay = window(max_bytes=1)
    for first in range(3):
        replay.put(piece(first, 1))
    assert [each.first_token_index for each in read(replay, replay.cursor([2]))] == [2]


def test_samples_have_places_of_their_own_in_one_window() -> None:
    replay = window(first_indices=(0, 0), max_tokens=6)
    for first in range(0, 4, 2):
        replay.put(piece(first, 2))
        replay.put(piece(first, 2, sample_index=1))
    replay.put(piece(4, 2))  # the first of both samples left
    got = read(replay, replay.cursor([4, 2]))
    assert [(each.sample_index, each.first_token_index, each.token_count) for each in got] == [(1, 2, 2), (0, 4, 2)]
    assert refused(replay, 0, 0).metadata["first_token_index"] == "2"
    assert refused(replay, 2, 0).metadata["first_token_index"] == "2"
    assert [each.field for each in refused(replay, 2, 3).violations] == ["next_token_indices[1]"]


def test_an_answer_that_goes_on_from_elsewhere_begins_there() -> None:
    replay = window(first_indices=(7,))
    replay.put(piece(7, 2))
    assert [each.first_token_index for each in read(replay, replay.cursor([7]))] == [7]
    assert refused(replay, 6).reason is Reason.RESUME_TOO_LATE


def test_a_gap_is_a_bug_of_the_writer() -> None:
    replay = window()
    replay.put(piece(0, 2))
    with pytest.raises(ValueError, match="begins at 3, 2 is next"):
        replay.put(piece(3, 1))


@pytest.mark.parametrize("seed", range(20))
def test_however_often_a_reader_is_cut_off_it_hears_every_token_once(seed: int) -> None:
    rng = random.Random(seed)
    replay = window(chunk=rng.choice((1, 5, 64)))
    text, heard, index = "", "", 0
    heard_ids: list[int] = []
    cursor = replay.cursor([0])
    first = 0
    while first < 200:
        count = rng.randrange(1, 6) if replay.max_chunk_token_count > 5 else 1
        made = piece(first, count)
        replay.put(made)
        text, first = text + made.text, first + count
        if rng.random() < 0.3:
            cursor = replay.cursor([index])  # cut off; what was on the way is lost
        if rng.random() < 0.5:
            for got in read(replay, cursor):
                assert got.first_token_index == index
                assert got.token_count <= max(replay.max_chunk_token_count, 5)
                heard, index = heard + got.text, index + got.token_count
                heard_ids += got.token_ids
                if rng.random() < 0.2:
                    break
            cursor = replay.cursor([index])
    replay.end(END)
    for got in read(replay, replay.cursor([index])):
        heard += got.text
        heard_ids += got.token_ids
    assert heard == text
    assert heard_ids == list(range(first))


def test_a_full_window_is_read_in_parts_of_bounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at each piece and a copy of each token, once; and of no more pieces at a stretch than may be."""
    joins: list[int] = []
    join = replay_window.joined

    def counted(parts: Sequence[Piece]) -> Piece:
        joins.append(len(parts))
        return join(parts)

    monkeypatch.setattr(replay_window, "joined", counted)
    count = 3 * MAX_LOOK_COUNT
    replay = window(max_tokens=count, max_bytes=1 << 26, chunk=1024)
    for index in range(count):
        replay.put(piece(index, 1))
    everything = replay.cursor([0])
    sizes = []
    while (got := replay.take(everything)) is not None:
        sizes.append(got.token_count)
    assert sizes == [1024] * (count // 1024)
    assert joins == sizes, "each token was copied once"
    newest = replay.cursor([count - 1])
    stretches = 0
    while (got := replay.take(newest)) is None:
        assert replay.is_behind(newest)
        stretches += 1
    assert (stretches, got.first_token_index) == (2, count - 1)
    assert replay.take(newest) is None
    assert not replay.is_behind(newest)


def test_merged_pieces_say_all_that_both_said() -> None:
    logprobs = TokenLogprobs(-0.5, 1)
    first = piece(0, 1, "a", logprobs=(logprobs,), reasoning_text="r", tool_calls=(ToolCallDelta(0),))
    second = Piece(1, (1,), "b", "stop", (logprobs,), reasoning_text="s", tool_calls=(ToolCallDelta(1),))
    both = joined((first, second))
    assert (both.token_ids, both.text, both.matched_stop_sequence) == ((0, 1), "ab", "stop")
    assert (len(both.logprobs), both.reasoning_text, len(both.tool_calls)) == (2, "rs", 2)


@pytest.mark.parametrize("count", [1, 4, 64])
def test_the_estimate_is_at_least_what_python_takes(count: int) -> None:
    tops = tuple((1000 + number, -0.1 * number) for number in range(5))
    logprobs = tuple(TokenLogprobs(-0.25 * number, 2, tops) for number in range(count))
    for made in (piece(0, count, "some text"), piece(0, count, "ä" * count, logprobs=logprobs)):
        taken = sys.getsizeof(made) + sys.getsizeof(made.token_ids) + sys.getsizeof(made.text) + 28 * count
        for each in made.logprobs:
            taken += sys.getsizeof(each) + 24 + sys.getsizeof(each.top)
            taken += sum(sys.getsizeof(pair) + 24 + 28 for pair in each.top)
        assert taken <= size_bytes(made) <= 6 * taken

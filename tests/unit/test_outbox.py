"""What waits for a slow caller: merged, in order, and with borders where a caller who was cut off needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

import router.outbox
from baton.errors import BatonError, Reason, StatusName
from baton.request import FinishReason, TokenLogprobs
from router.answering import Admitted, Piece
from router.handoff_words import Finish
from router.outbox import Outbox
from router.piece_size import content_bytes, size_bytes

END = Finish(FinishReason.STOP, None, 3)


def taken(outbox: Outbox) -> list[object]:
    async def take_all() -> list[object]:
        heard: list[object] = []
        while not isinstance(item := await outbox.take(), Finish):
            heard.append(item)
        return heard

    return asyncio.run(take_all())


def test_tokens_that_wait_are_merged_up_to_the_largest_chunk() -> None:
    outbox = Outbox(2)
    for index, text in enumerate("abc"):
        outbox.put(Piece(index, (index,), text, None))
    outbox.end(END)
    assert taken(outbox) == [Piece(0, (0, 1), "ab", None), Piece(2, (2,), "c", None)]


def test_however_many_tokens_wait_each_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    joins: list[int] = []
    join = router.outbox._joined

    def counted(parts: Sequence[Piece]) -> Piece:
        joins.append(len(parts))
        return join(parts)

    monkeypatch.setattr(router.outbox, "_joined", counted)
    outbox = Outbox(1000)
    for index in range(2500):
        outbox.put(Piece(index, (index,), "a", None))
    assert joins == [1000, 1000], "what cannot grow any more takes no more room than it must"
    outbox.end(END)
    heard = taken(outbox)
    assert joins == [1000, 1000, 500]
    assert heard == [
        Piece(first, tuple(range(first, first + count)), "a" * count, None)
        for first, count in ((0, 1000), (1000, 1000), (2000, 500))
    ]


def test_a_piece_taken_and_one_put_meanwhile_stay_in_order() -> None:
    outbox = Outbox(3)
    heard: list[object] = []
    for index in range(5):
        outbox.put(Piece(index, (index,), "a", "s" if index == 1 else None))
    heard.append(asyncio.run(outbox.take()))
    outbox.put(Piece(5, (5,), "b", None))
    outbox.end(END)
    heard += taken(outbox)
    assert [(each.first_token_index, each.text) for each in heard if isinstance(each, Piece)] == [
        (0, "aa"),
        (2, "aaa"),
        (5, "b"),
    ]


def test_text_held_back_to_the_end_is_never_merged_into_a_token() -> None:
    """Or the index of a caller who was cut off would not say whether that text was received."""
    outbox = Outbox(64)
    outbox.put(Piece(0, (7,), "a", None))
    outbox.put(Piece(1, (), "b", None))
    outbox.end(END)
    assert taken(outbox) == [Piece(0, (7,), "a", None), Piece(1, (), "b", None)]


def test_nothing_is_merged_into_an_end_found_or_across_an_admission() -> None:
    outbox = Outbox(64)
    outbox.put(Admitted("gen-1"))
    outbox.put(Piece(0, (7,), "a", "stop"))
    outbox.put(Piece(1, (8,), "b", None))
    outbox.end(END)
    assert taken(outbox) == [Admitted("gen-1"), Piece(0, (7,), "a", "stop"), Piece(1, (8,), "b", None)]


SCORED = Piece(0, (7,), "a", None, logprobs=(TokenLogprobs(-0.1, 1, ((7, -0.1),) * 20),))


def scored(index: int) -> Piece:
    return Piece(index, (7,), "a", None, logprobs=SCORED.logprobs)


async def heard_from(outbox: Outbox) -> tuple[list[int], BatonError | None]:
    """First indices and counts, flat; and how it failed."""
    indices: list[int] = []
    try:
        while not isinstance(item := await outbox.take(), Finish):
            assert isinstance(item, Piece)
            indices += range(item.first_token_index, item.first_token_index + item.token_count)
    except BatonError as error:
        return indices, error
    return indices, None


@pytest.mark.parametrize("chunk_token_count", [1, 64])
async def test_what_waits_is_bounded_in_bytes_and_ends_after_what_was_kept(chunk_token_count: int) -> None:
    kept_count = 10
    size = size_bytes if chunk_token_count == 1 else content_bytes
    limit = size_bytes(SCORED) + (kept_count - 1) * size(SCORED)
    outbox = Outbox(chunk_token_count, limit)
    for index in range(kept_count):
        outbox.put(scored(index))
    assert not outbox.is_given_up
    for index in range(kept_count, 3 * kept_count):
        outbox.put(scored(index))
        assert outbox.is_given_up
    outbox.end(END)
    heard, error = await heard_from(outbox)
    assert heard == list(range(kept_count))
    assert error is not None
    assert (error.reason, error.status) == (Reason.READER_TOO_SLOW, StatusName.ABORTED)
    assert error.metadata == {
        "unread_bytes": str(limit),
        "limit_bytes": str(limit),
        "emitted_token_count": str(kept_count),
    }


async def test_who_reads_as_it_comes_never_meets_the_bound() -> None:
    outbox = Outbox(64, 2 * size_bytes(SCORED))
    for index in range(500):
        outbox.put(scored(index))
        item = await outbox.take()
        assert isinstance(item, Piece)
        assert item.first_token_index == index
    outbox.end(END)
    assert await heard_from(outbox) == ([], None)


async def test_one_piece_is_kept_whatever_its_size() -> None:
    outbox = Outbox(64, 1)
    outbox.put(scored(0))
    outbox.end(END)
    assert await heard_from(outbox) == ([0], None)

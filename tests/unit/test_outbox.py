"""What waits for a slow caller: merged, in order, and with borders where a caller who was cut off needs them."""

from __future__ import annotations

import asyncio

from baton.request import FinishReason
from router.answering import Admitted, Piece
from router.handoff_words import Finish
from router.outbox import Outbox

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

"""Answers whose beginning is there already: how they end, what is dropped, and what cannot be a beginning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from baton.request import FinishReason, OutputOptions
from router.answer import TextAnswer
from router.answering import Admitted, Completed, Piece, RelayEvent, RoutedRequest
from router.resuming.beginning import (
    SLICE_TOKEN_COUNT,
    Beginning,
    check_beginning,
    end_only,
    how_it_ended,
    no_tail_yet,
    read_again,
    with_beginning,
    without_beginning,
)
from router.tiny_model import END_ID, tiny_tokenizer
from router.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer(), vocab_size=tiny_tokenizer().get_vocab_size(), eos_token_ids=(END_ID,))
IDS = TOKENIZER.encode("once upon a time there was")


def request(most: int = 100, **more: Any) -> RoutedRequest:
    return RoutedRequest("g", (5, 6), most, eos_token_ids=(END_ID,), **more)


def answer(*stop: str) -> TextAnswer:
    return TextAnswer(TOKENIZER, OutputOptions(), stop_sequences=stop, silent_token_ids=(END_ID,))


def read(token_ids: tuple[int, ...], *stop: str) -> tuple[TextAnswer, Piece]:
    made = answer(*stop)
    return made, asyncio.run(read_again(made, Beginning(token_ids, has_tail=False)))


async def listed(events: AsyncGenerator[RelayEvent, None]) -> list[RelayEvent]:
    return [event async for event in events]


@pytest.mark.parametrize(
    ("token_ids", "stop", "asked", "how"),
    [
        (IDS, (), request(), None),
        ((), (), request(), None),
        ((*IDS, END_ID), (), request(), FinishReason.STOP),
        ((*IDS, END_ID), (), request(ignore_eos=True), None),
        ((*IDS, 9), (), request(stop_token_ids=(9,), ignore_eos=True), FinishReason.STOP),
        (IDS, (), request(len(IDS)), FinishReason.MAX_OUTPUT_TOKENS),
        (IDS, (), request(len(IDS), is_context_bound=True), FinishReason.CONTEXT_FULL),
        (IDS, ("was",), request(), FinishReason.STOP),
    ],
)
def test_a_beginning_says_whether_it_is_the_whole(
    token_ids: tuple[int, ...], stop: tuple[str, ...], asked: RoutedRequest, how: FinishReason | None
) -> None:
    assert how_it_ended(asked, read(token_ids, *stop)[1]) is how


def test_tokens_after_the_end_are_no_beginning() -> None:
    with pytest.raises(BatonError) as caught:
        read(IDS, "upon")
    assert caught.value.reason is Reason.INVALID_REQUEST
    for asked, token_ids in ((request(3), IDS), (request(), (END_ID, *IDS))):
        with pytest.raises(BatonError) as caught:
            check_beginning(asked, Beginning(token_ids, has_tail=False))
        assert [each.field for each in caught.value.violations] == ["continuation.samples"]
    check_beginning(request(len(IDS)), Beginning(IDS, has_tail=True))
    assert isinstance(no_tail_yet(), BatonError)


class Turns:
    """Counts the turns that others get."""

    def __init__(self) -> None:
        self.count = 0

    async def take(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.count += 1


@pytest.mark.parametrize("stop", [(), ("no such text",), ("once upon a time there was here",)])
def test_a_long_beginning_is_read_in_slices_and_comes_to_the_same(stop: tuple[str, ...]) -> None:
    """A whole context at one stretch would hold up everybody's tokens for most of a second."""
    token_ids = (IDS * 2000)[: 5 * SLICE_TOKEN_COUNT + 3]

    async def sliced() -> tuple[Piece, int]:
        turns = Turns()
        others = asyncio.create_task(turns.take())
        piece = await read_again(answer(*stop), Beginning(token_ids, has_tail=False))
        others.cancel()
        return piece, turns.count

    piece, turn_count = asyncio.run(sliced())
    assert piece == answer(*stop).push(token_ids)
    assert turn_count >= 4, "and others had their turn between any two"


@pytest.mark.parametrize("at", [5, SLICE_TOKEN_COUNT - 1, SLICE_TOKEN_COUNT, 2 * SLICE_TOKEN_COUNT + 7])
def test_an_end_in_any_slice_is_found_where_it_is(at: int) -> None:
    ids = (IDS * 2000)[:at]
    word = TOKENIZER.encode("fox")
    whole = answer("fox").push((*ids, *word)).token_count
    assert read((*ids, *word)[:whole], "fox")[1].matched_stop_sequence == "fox"
    with pytest.raises(BatonError) as caught:
        read((*ids, *word, *IDS * 300), "fox")
    assert f"which is at token {whole};" in caught.value.violations[0].description
    with pytest.raises(BatonError) as caught:
        check_beginning(request(10**6), Beginning((*ids, END_ID, *IDS), has_tail=False))
    assert f"which is at token {at + 1};" in caught.value.violations[0].description


def test_only_the_end_is_sent_where_nothing_else_is_lacking() -> None:
    made, piece = read((*IDS, END_ID))
    events = asyncio.run(listed(end_only(request(), made, piece, FinishReason.STOP, 0.0)))
    assert isinstance(events[0], Admitted)
    completed = events[-1]
    assert isinstance(completed, Completed)
    assert (completed.reason, completed.matched_stop_token_id) == (FinishReason.STOP, END_ID)
    assert completed.usage.output_token_count == len(IDS) + 1
    assert completed.report.attempt_count == 0


def test_text_that_was_held_back_comes_with_the_end() -> None:
    made, piece = read(IDS, "was not")
    events = asyncio.run(listed(end_only(request(len(IDS)), made, piece, FinishReason.MAX_OUTPUT_TOKENS, 0.0)))
    tails = [event for event in events if isinstance(event, Piece)]
    assert [(tail.first_token_index, tail.token_ids, tail.text) for tail in tails] == [(len(IDS), (), "was")]
    assert TOKENIZER.encode(piece.text + tails[0].text) == IDS


def test_stages_see_the_whole_answer_and_the_caller_what_it_lacks() -> None:
    seen: list[RelayEvent] = []
    began = Piece(0, (1, 2), "a b ", None)

    async def relay() -> AsyncGenerator[RelayEvent, None]:
        yield Admitted("g")
        yield Piece(2, (3,), "c", None)
        yield Piece(3, (), "tail", None)

    async def watched() -> AsyncGenerator[RelayEvent, None]:
        async for event in with_beginning(relay(), began):
            seen.append(event)
            yield event

    got = asyncio.run(listed(without_beginning(watched(), Beginning((1, 2), has_tail=False))))
    assert seen == [Admitted("g"), began, Piece(2, (3,), "c", None), Piece(3, (), "tail", None)]
    assert got == [Admitted("g"), Piece(2, (3,), "c", None), Piece(3, (), "tail", None)]
    has_all = Beginning((1, 2, 3), has_tail=True)
    assert asyncio.run(listed(without_beginning(relay(), has_all))) == [Admitted("g")]

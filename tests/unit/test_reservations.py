"""The book of promised blocks: what fits, what does not, and that nothing stays promised."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.reservations import BlockBook, NeverFits, NoRoom, Reservation, wanted_block_count
from engine.protocol import EngineInfo

INFO = EngineInfo("sim", "m", 1000, 16, 64, 8, 1, 500)


def reserved(book: BlockBook, wanted: int, used: int = 0) -> Reservation:
    answer = book.reserve(wanted, used)
    assert isinstance(answer, Reservation), answer
    return answer


@pytest.mark.parametrize(
    ("prompt", "most", "blocks"),
    [(15, 9, 1), (16, 9, 2), (16, 1, 1), (17, 9, 2), (31, 9, 2), (32, 9, 3), (999, 1, 63), (999, 9, 63)],
)
def test_a_decode_wants_the_blocks_of_its_prompt_and_of_the_token_after_the_first(
    prompt: int, most: int, blocks: int
) -> None:
    assert wanted_block_count(prompt, most, INFO) == blocks


def test_where_an_engine_sets_the_answer_aside_all_of_it_is_wanted() -> None:
    info = dataclasses.replace(INFO, sets_answers_aside=True)
    assert wanted_block_count(100, 600, info) == 44
    assert wanted_block_count(100, 5000, info) == 63, "the context ends it"


def test_what_is_promised_is_spoken_for_until_the_engine_counts_it() -> None:
    book = BlockBook(10)
    first = reserved(book, 6)
    assert book.reserve(5, 0) == NoRoom(5, 4)
    second = reserved(book, 4)
    book.settle(first)
    assert book.reserved_block_count == 4
    assert book.reserve(1, 6) == NoRoom(1, 0), "by the engine's count now"
    book.release(second)
    assert isinstance(book.reserve(4, 6), Reservation)


def test_what_could_never_fit_is_not_told_to_come_back() -> None:
    book = BlockBook(10)
    assert book.reserve(11, 0) == NeverFits(11, 10)
    assert book.reserve(11, 0, may_wait=True) == NeverFits(11, 10)
    reserved(book, 10)
    assert len(book) == 1


def test_with_nothing_in_hand_whatever_could_fit_is_taken_though_the_engine_says_that_it_is_full() -> None:
    book = BlockBook(10)
    only = reserved(book, 10, used=10)
    assert book.reserve(1, 0) == NoRoom(1, 0)
    book.release(only)
    reserved(book, 10, used=10)


def test_what_may_wait_is_taken_and_counts_against_others() -> None:
    book = BlockBook(10)
    reserved(book, 8)
    assert isinstance(book.reserve(8, 0, may_wait=True), Reservation)
    assert book.reserve(1, 0) == NoRoom(1, 0)
    assert book.reserved_block_count == 16


def test_giving_back_twice_gives_back_once() -> None:
    book = BlockBook(10)
    first, second = reserved(book, 3), reserved(book, 4)
    book.release(first)
    book.release(first)
    book.settle(first)
    assert (len(book), book.reserved_block_count) == (1, 4)
    book.release(second)
    assert (len(book), book.reserved_block_count) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("rsx"), st.integers(1, 12), st.integers(0, 10)), max_size=60))
def test_whatever_happens_the_book_never_promises_more_than_there_is(steps: list[tuple[str, int, int]]) -> None:
    book, mine = BlockBook(10), list[Reservation]()
    for kind, number, used in steps:
        if kind == "r":
            was_empty, pending = not len(book), book.reserved_block_count
            match book.reserve(number, used):
                case Reservation() as taken:
                    mine.append(taken)
                    assert number <= 10
                    assert was_empty or pending + used + number <= 10
                case NoRoom(wanted, free):
                    assert (wanted, not was_empty) == (number, True)
                    assert 0 <= free < wanted <= 10
                case NeverFits(wanted, capacity):
                    assert wanted > capacity == 10
        elif mine:
            each = mine[number % len(mine)]
            if kind == "s":
                book.settle(each)
            else:
                book.release(each)
                mine.remove(each)
        assert len(book) == len(mine)
        assert book.reserved_block_count == sum(each.block_count for each in mine if each.is_pending) <= 10
    for each in mine:
        book.release(each)
    assert (len(book), book.reserved_block_count) == (0, 0)

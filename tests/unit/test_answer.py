"""One answer's text: counted tokens, held-back text, stop sequences found in the middle of what was pushed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.request import OutputOptions
from router.answer import TextAnswer
from router.answering import Piece
from router.tiny_model import END_ID, tiny_tokenizer
from router.tokenizer import Tokenizer

TINY = Tokenizer(tiny_tokenizer(), vocab_size=tiny_tokenizer().get_vocab_size(), eos_token_ids=(END_ID,))
TEXT = OutputOptions()


def ids(text: str) -> tuple[int, ...]:
    return TINY.encode(text)


def test_pieces_are_numbered_without_gaps_and_join_to_the_text() -> None:
    answer = TextAnswer(TINY, TEXT)
    tokens = ids("Grüße 👍!")
    pieces = [answer.push(tokens[:3]), answer.push(tokens[3:4]), answer.push(tokens[4:]), answer.flush()]
    assert [p.first_token_index for p in pieces] == [0, 3, 4, len(tokens)]
    assert "".join(p.text for p in pieces) == "Grüße 👍!"


def test_a_stop_sequence_ends_the_piece_with_the_token_that_completed_it() -> None:
    answer = TextAnswer(TINY, TEXT, stop_sequences=["\nUser:"])
    before, sequence, after = ids("Fine."), ids("\nUser:"), ids(" more text")
    piece = answer.push(before + sequence + after)
    assert piece == Piece(0, before + sequence, "Fine.", "\nUser:")
    assert answer.push(ids("never")) == Piece(len(before + sequence), (), "", None)
    assert answer.flush().text == ""


def test_a_stop_sequence_within_the_least_length_is_text_like_any_other() -> None:
    tokens = ids("go STOP and STOP on")
    early, late = len(ids("go STOP")), len(ids("go STOP and STOP"))
    for least, kept in ((0, "go "), (early - 1, "go "), (early, "go STOP and "), (late, "go STOP and STOP on")):
        answer = TextAnswer(TINY, TEXT, stop_sequences=["STOP"], min_token_count=least)
        said = ""
        for token in tokens:
            piece = answer.push((token,))
            said += piece.text
            if piece.matched_stop_sequence is not None:
                break
        else:
            said += answer.flush().text
        assert said == kept


def test_a_sequence_across_pushes_is_held_back_and_then_dropped() -> None:
    answer = TextAnswer(TINY, TEXT, stop_sequences=["STOP"])
    texts = [answer.push((token,)).text for token in ids("go ST")]
    assert "".join(texts) == "go "
    tail = [answer.push((token,)) for token in ids("OP on")]
    assert "".join(piece.text for piece in tail) == ""
    assert [piece.matched_stop_sequence for piece in tail].count("STOP") == 1


def test_text_held_for_a_sequence_that_never_came_is_flushed() -> None:
    answer = TextAnswer(TINY, TEXT, stop_sequences=["STOP"])
    said = answer.push(ids("go STO")).text
    assert said + answer.flush().text == "go STO"
    assert answer.flush().text == ""


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character_also_with_stop_sequences() -> None:
    for sequences in ([], ["STOP"]):
        answer = TextAnswer(TINY, TEXT, stop_sequences=sequences)
        said = answer.push(ids("ok 👍")[:-1]).text
        assert said + answer.flush().text == "ok \ufffd"


def test_a_stop_token_is_counted_and_sent_as_id_but_not_as_text() -> None:
    full_stop = ids(".")[0]
    answer = TextAnswer(TINY, TEXT, silent_token_ids=[full_stop])
    piece = answer.push((*ids("done"), full_stop))
    assert piece.text == "done"
    assert piece.token_ids[-1] == full_stop


def test_ids_only_output_never_detokenises_but_still_finds_stop_sequences() -> None:
    only_ids = OutputOptions(wants_text=False, wants_token_ids=True)
    assert TextAnswer(TINY, only_ids).push(ids("hello")).text == ""
    found = TextAnswer(TINY, only_ids, stop_sequences=["l"]).push(ids("hello"))
    assert found.matched_stop_sequence == "l"


@given(
    text=st.text(alphabet="ab STOP\n👍é", max_size=40),
    sizes=st.lists(st.integers(1, 4), max_size=30),
    sequences=st.lists(st.sampled_from(["STOP", "\n\n", "ab", "👍"]), max_size=2, unique=True),
)
def test_the_size_of_the_pushes_changes_neither_text_nor_tokens(
    text: str, sizes: list[int], sequences: list[str]
) -> None:
    def result(cuts: list[int]) -> tuple[str, tuple[int, ...], str | None]:
        answer = TextAnswer(TINY, TEXT, stop_sequences=sequences)
        tokens, said, start = ids(text), "", 0
        sent: tuple[int, ...] = ()
        for size in [*cuts, len(tokens)]:
            piece = answer.push(tokens[start : start + size])
            said, sent, start = said + piece.text, sent + piece.token_ids, start + size
            if piece.matched_stop_sequence:
                return said, sent, piece.matched_stop_sequence
        return said + answer.flush().text, sent, None

    whole = result([])
    assert result(sizes) == whole
    assert result([1] * 200) == whole

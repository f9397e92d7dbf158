"""Stop sequences: the streaming matcher against the naive search of the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.stop_sequences import StopMatcher


def naive(text: str, sequences: list[str]) -> tuple[str, str | None]:
    """The rule, said plainly: at the first character that completes a sequence, the longest one that it completes."""
    for end in range(1, len(text) + 1):
        complete = [sequence for sequence in sequences if text[:end].endswith(sequence)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def streamed(pieces: list[str], sequences: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(sequences)
    sent = []
    for piece in pieces:
        match = matcher.push(piece)
        sent.append(match.text)
        if match.sequence is not None:
            return sent, match.sequence
    return [*sent, matcher.flush()], None


small = st.text(alphabet="ab\n", max_size=30)


@settings(max_examples=1000)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12),
    sequences=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_any_chunking_finds_what_a_search_of_the_whole_text_finds(pieces: list[str], sequences: list[str]) -> None:
    sent, found = streamed(pieces, sequences)
    assert ("".join(sent), found) == naive("".join(pieces), sequences)


@settings(max_examples=500)
@given(
    text=st.text(alphabet="ab", max_size=40),
    sequences=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_at_no_moment_was_a_part_of_a_later_match_sent(text: str, sequences: list[str]) -> None:
    matcher, sent = StopMatcher(sequences), ""
    kept, _ = naive(text, sequences)
    for char in text:
        match = matcher.push(char)
        sent += match.text
        assert kept.startswith(sent)
        if match.sequence:
            break


def test_a_sequence_across_three_pieces_is_found_and_no_part_of_it_is_sent() -> None:
    assert streamed(["The end.", "\nUs", "er", ": more"], ["\nUser:"]) == (["The end.", "", "", ""], "\nUser:")


def test_a_false_start_is_sent_once_it_cannot_match_any_more() -> None:
    assert streamed(["a\nUs", "ual"], ["\nUser:"]) == (["a", "\nUsual", ""], None)


def test_held_text_is_sent_at_the_end() -> None:
    assert streamed(["done\nUs"], ["\nUser:"]) == (["done", "\nUs"], None)


def test_a_match_that_is_not_minded_is_text_and_one_that_only_begins_there_still_counts() -> None:
    matcher = StopMatcher(["ab", "abc"])
    early = matcher.push("xab", is_minded=False)
    assert early.sequence is None
    late = matcher.push("c!")
    assert (early.text + late.text, late.sequence) == ("x", "abc")
    matcher = StopMatcher(["ab"])
    said = matcher.push("ab", is_minded=False).text + matcher.push("-ab").text
    assert said == "ab-"


def test_text_after_the_match_is_never_sent() -> None:
    assert streamed(["one STOP two"], ["STOP"]) == (["one "], "STOP")


def test_sixteen_sequences_of_256_bytes_hold_back_at_most_their_own_length() -> None:
    matcher = StopMatcher([chr(97 + n) * 256 for n in range(16)])
    sent = sum(len(matcher.push("a" * 255 + "-").text) for _ in range(100))
    assert sent == 100 * 256

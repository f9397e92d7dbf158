"""The tokenizer: bounds before work, and an incremental detokeniser that equals the decode of the whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders
from tokenizers.models import BPE

from baton.errors import BatonError, Reason
from router.tiny_model import END_ID, tiny_tokenizer, write_tiny_model
from router.tokenizer import Tokenizer, TokenizerError

REAL_MODEL_DIR = Path(
    os.environ.get("BATON_MODEL_DIR", Path.home() / ".cache/baton/models/smollm2-135m-instruct")
).expanduser()
needs_model = pytest.mark.skipif(not REAL_MODEL_DIR.is_dir(), reason=f"no model prepared at {REAL_MODEL_DIR}")

TINY = Tokenizer(tiny_tokenizer(), vocab_size=tiny_tokenizer().get_vocab_size(), eos_token_ids=(END_ID,))
TEXTS = (
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces\tand\ttabs\n\n\nand lines",
    "Grüße, 你好, مرحبا, नमस्ते",
    "family: 👨‍👩‍👧‍👦, flag: 🇩🇪, skin: 👍🏽",
    "zero\u200bwidth and \ufeffBOM and \ufffd itself",
    "",
)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.load(REAL_MODEL_DIR)


def cut(items: list[int], sizes: list[int]) -> list[list[int]]:
    """``items`` in pieces of the given sizes, the rest as one piece."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(items[start : start + size])
        start += size
    return [*pieces, items[start:]]


def in_pieces(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


sizes_strategy = st.lists(st.integers(0, 5), max_size=40)


@given(ids=st.lists(st.integers(0, 399), max_size=60), sizes=sizes_strategy)
def test_pieces_of_any_tokens_join_to_the_decode_of_the_whole(ids: list[int], sizes: list[int]) -> None:
    assert "".join(in_pieces(TINY, cut(ids, sizes))) == TINY.decode(ids)


@given(text=st.text(max_size=60), sizes=sizes_strategy)
def test_pieces_of_any_text_join_to_the_text_and_hold_whole_characters(text: str, sizes: list[int]) -> None:
    pieces = in_pieces(TINY, cut(list(TINY.encode(text)), sizes))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@needs_model
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=50), sizes=sizes_strategy)
def test_the_real_models_pieces_join_to_the_decode_of_the_whole(
    real: Tokenizer, ids: list[int], sizes: list[int]
) -> None:
    assert "".join(in_pieces(real, cut(ids, sizes))) == real.decode(ids)


@needs_model
@pytest.mark.parametrize("text", TEXTS)
def test_the_real_model_gives_back_every_text_one_token_at_a_time(real: Tokenizer, text: str) -> None:
    ids = list(real.encode(text))
    pieces = in_pieces(real, [[i] for i in ids])
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@needs_model
def test_the_real_model_is_read_as_its_files_say(real: Tokenizer) -> None:
    assert (real.vocab_size, real.eos_token_ids, real.is_exact) == (49152, (2,), True)


def test_an_emoji_of_several_tokens_comes_out_whole_with_its_last_token() -> None:
    ids = TINY.encode("👍")
    assert len(ids) == 4
    assert in_pieces(TINY, [[i] for i in ids]) == ["", "", "", "👍", ""]


def test_an_emoji_cut_off_by_the_end_becomes_replacement_characters_as_in_a_full_decode() -> None:
    ids = list(TINY.encode("👍"))[:3]
    assert "".join(in_pieces(TINY, [ids])) == TINY.decode(ids) == "\ufffd"


def test_special_tokens_have_no_text() -> None:
    ids = [*TINY.encode("one"), END_ID, 1, *TINY.encode(" two")]
    assert "".join(in_pieces(TINY, [ids])) == "one two"


def test_ids_the_tokenizer_does_not_name_have_no_text() -> None:
    assert in_pieces(TINY, [[399 + 5, 10**6]]) == ["", ""]


def sentencepiece_like() -> Tokenizer:
    """A Llama 2 style decoder: ▁ is a space, <0xNN> is a byte, the first space is dropped."""
    names = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁Hello", "▁world", "lo", "!", "é"]
    hf = HfTokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    hf.add_special_tokens(["<s>", "</s>"])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(hf, vocab_size=len(names), eos_token_ids=(1,))


def test_a_sentencepiece_decoder_keeps_inner_spaces_and_joins_bytes_across_pieces() -> None:
    tokenizer = sentencepiece_like()
    emoji = [2 + byte for byte in "👍".encode()]
    ids = [258, 259, 261, *emoji, 259, 262]
    whole = tokenizer.decode(ids)
    assert whole == "Hello world!👍 worldé"
    for size in (1, 2, 3, 5, 20):
        pieces = in_pieces(tokenizer, [ids[i : i + size] for i in range(0, len(ids), size)])
        assert "".join(pieces) == whole
    assert not tokenizer.is_exact


async def test_a_prompt_that_cannot_fit_is_refused_without_being_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> tuple[int, ...]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(TINY, "encode", explode)
    with pytest.raises(BatonError) as refused:
        await TINY.encode_bounded("a" * 60_000_000, max_token_count=2048)
    assert refused.value.reason is Reason.PROMPT_TOO_LONG
    assert "at least" in refused.value.message


async def test_a_long_text_is_tokenised_in_a_thread_and_gives_the_same_ids() -> None:
    text = "the quick brown fox " * 1000
    assert await TINY.encode_bounded(text, max_token_count=100_000) == TINY.encode(text)


async def test_a_prompt_one_token_too_long_is_refused_with_its_exact_length() -> None:
    ids = TINY.encode("the quick brown fox")
    assert await TINY.encode_bounded("the quick brown fox", max_token_count=len(ids)) == ids
    with pytest.raises(BatonError) as refused:
        await TINY.encode_bounded("the quick brown fox", max_token_count=len(ids) - 1)
    assert refused.value.metadata["prompt_token_count"] == str(len(ids))


def test_truncation_and_padding_in_the_file_are_switched_off() -> None:
    hf = tiny_tokenizer()
    hf.enable_truncation(2)
    hf.enable_padding(length=50)
    assert Tokenizer(hf, vocab_size=400, eos_token_ids=()).encode("a b c d e f") == TINY.encode("a b c d e f")


def test_a_missing_directory_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_written_tiny_model_loads_with_its_limits(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tiny_model(tmp_path / "tiny"))
    assert tokenizer.eos_token_ids == (END_ID,)
    assert tokenizer.vocab_size == TINY.vocab_size
    assert tokenizer.decode(tokenizer.encode("Grüße 👍")) == "Grüße 👍"


@pytest.mark.parametrize("said", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}])
def test_the_tokenizers_own_end_ends_answers_besides_the_models(tmp_path: Path, said: Any) -> None:
    """As in the engine: what it stops at, the router must know, or an answer would be carried on beyond its end."""
    write_tiny_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (END_ID, 0)

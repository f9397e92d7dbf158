"""Prompts: exact lengths, the same tokens for the same name, and a text that gives the same tokens again."""

from __future__ import annotations

import itertools
import random
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bench.traffic import prompts as prompts_module
from bench.traffic.prompts import PromptMaker
from bench.traffic.sharing import prefix_hit_share
from deploy.setup import prepare_model


def words(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(count)]


def byte_level(directory: Path) -> Path:
    """A tokenizer like those of GPT and Llama 3: bytes, merges, and a special token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words(4000))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def metaspace(directory: Path) -> Path:
    """A tokenizer like those made by sentencepiece: a leading space is taken away and put back."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(words(4000))], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def word_level(directory: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)} | {"<unk>": 200}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(params=[byte_level, metaspace, word_level], ids=lambda make: make.__name__)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made: Path = request.param(tmp_path)
    return made


def test_a_prompt_has_the_same_tokens_when_a_server_gets_its_text(directory: Path) -> None:
    maker = PromptMaker(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for count in (1, 2, 17, 500):
        ids = maker.tokens(f"prompt {count}", count)
        assert len(ids) == count
        text = maker.text(ids)
        assert tokenizer.encode(text, add_special_tokens=False).ids == list(ids)
        assert len(tokenizer.encode(text).ids) == count + maker.added_token_count


def test_special_tokens_are_in_no_prompt(tmp_path: Path) -> None:
    maker = PromptMaker(byte_level(tmp_path))
    special = {0, 1}
    assert not special & set(maker.tokens("long", 50_000))
    assert maker.added_token_count == 1


def test_a_word_that_is_special_in_a_chat_is_in_no_prompt(tmp_path: Path) -> None:
    path = word_level(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    assert 5 in PromptMaker(tmp_path).tokens("long", 20_000)
    tokenizer.add_special_tokens(["w5"])
    tokenizer.save(str(path))
    assert tokenizer.token_to_id("w5") == 5
    assert 5 not in PromptMaker(tmp_path).tokens("long", 20_000)


def test_the_default_models_tokenizer_gives_thousands_of_words_that_return() -> None:
    folder = prepare_model.baton_home() / "models" / prepare_model.MODEL
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the default model is not there: `make model`")
    maker = PromptMaker(folder)
    assert maker.word_count > 20_000
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for number in range(20):
        ids = maker.shared("system", 100) + maker.tokens(f"prompt {number}", 400)
        assert tokenizer.encode(maker.text(ids)).ids == list(ids)


def test_the_same_name_gives_the_same_tokens_and_a_shorter_piece_begins_a_longer_one() -> None:
    maker = PromptMaker.without_tokenizer(32_000)
    again = PromptMaker.without_tokenizer(32_000)
    assert maker.tokens("document 7", 300) == again.tokens("document 7", 300)
    assert maker.tokens("document 7", 300)[:120] == maker.tokens("document 7", 120)
    assert maker.shared("document 7", 120) == maker.tokens("document 7", 120)
    assert maker.shared("document 7", 300) == maker.tokens("document 7", 300)
    assert maker.shared("document 7", 5) == maker.tokens("document 7", 5)
    assert maker.tokens("document 7", 0) == ()
    with pytest.raises(ValueError, match="-1 tokens"):
        maker.tokens("document 7", -1)


def test_the_stream_of_tokens_is_pinned() -> None:
    """A change here makes every recorded seed mean another plan."""
    assert PromptMaker.without_tokenizer(1000).tokens("pinned", 6) == (816, 238, 220, 921, 337, 836)


def test_pieces_of_different_names_share_no_block() -> None:
    maker = PromptMaker.without_tokenizer(1000)
    assert prefix_hit_share([maker.tokens(f"prompt {number}", 64) for number in range(3000)]) == 0.0
    blocks = [
        maker.tokens(f"prompt {number}", 64)[place : place + 16] for number in range(500) for place in (0, 16, 32, 48)
    ]
    assert len(set(blocks)) == len(blocks)


def test_tokens_are_even_over_the_vocabulary() -> None:
    maker = PromptMaker.without_tokenizer(164, first_token_id=100)
    ids = maker.tokens("even", 64_000)
    counts = [ids.count(token_id) for token_id in range(100, 164)]
    assert sum(counts) == 64_000
    assert max(abs(count - 1000) for count in counts) < 5 * 1000**0.5


def test_what_is_kept_is_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "MAX_KEPT_TOKEN_COUNT", 1000)
    maker = PromptMaker.without_tokenizer(1000)
    first = {number: maker.shared(f"piece {number}", 100 + number) for number in range(50)}
    assert maker._kept_token_count == sum(map(len, maker._kept.values())) <= 1000
    assert 0 < len(maker._kept) < 10
    for number, ids in reversed(first.items()):
        assert maker.shared(f"piece {number}", 100 + number) == ids
    assert maker.shared("piece 0", 5000) == maker.tokens("piece 0", 5000), "longer than all that may be kept"
    assert maker._kept_token_count == 0


def test_prompts_without_a_tokenizer_have_no_text() -> None:
    with pytest.raises(ValueError, match="name the model's folder"):
        PromptMaker.without_tokenizer(1000).text((1, 2, 3))


def test_tokens_that_would_not_come_back_have_no_text(tmp_path: Path) -> None:
    maker = PromptMaker(byte_level(tmp_path))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    letters = [tokenizer.get_vocab()[letter] for letter in words(1)[0]]
    with pytest.raises(ValueError, match="do not survive") as caught:
        maker.text(letters)
    assert words(1)[0] not in str(caught.value), "prompts never reach errors"


def test_a_folder_without_a_tokenizer_and_a_vocabulary_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        PromptMaker(tmp_path)
    small = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    small.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="only 10 words"):
        PromptMaker(tmp_path)
    with pytest.raises(ValueError, match="repeats itself"):
        PromptMaker.without_tokenizer(100, first_token_id=50)


def melting(directory: Path) -> tuple[Path, dict[str, int]]:
    """Merges that nothing keeps within words: all pairs of letters are words, and "▁aa▁ab" is one token, too."""
    letters = "abcdefghij"
    vocabulary = ["<unk>", "▁", *letters]
    merges = []
    for first, second in itertools.product(letters, repeat=2):
        merges += [("▁" + first, second)]
    vocabulary += ["▁" + letter for letter in letters] + [first + second for first, second in merges] + ["▁aa▁ab"]
    vocabulary += ["▁half"]  # no merges lead to it: encoding never gives this one back
    ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(
        models.BPE(
            ids, [*(("▁", letter) for letter in letters), *merges, ("▁aa", "▁ab")], unk_token="<unk>", fuse_unk=False
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory, ids


def test_words_that_do_not_return_are_left_out_and_a_pair_that_melts_is_noticed(tmp_path: Path) -> None:
    directory, ids = melting(tmp_path)
    maker = PromptMaker(directory)
    assert ids["▁half"] not in maker.tokens("all", 20_000)
    assert maker.word_count == 100
    assert maker.text((ids["▁ab"], ids["▁aa"])) == "ab aa"
    with pytest.raises(ValueError, match="do not survive"):
        maker.text((ids["▁aa"], ids["▁ab"]))


# ---- sharing


def naive_hit_share(prompts: list[tuple[int, ...]], block: int) -> float:
    """The longest common prefix with any earlier prompt, in whole blocks."""
    hit = 0
    for place, prompt in enumerate(prompts):
        best = 0
        for earlier in prompts[:place]:
            common = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, earlier, strict=False))
            )
            # A block is known only if it was whole in the earlier prompt, too.
            best = max(best, common // block * block)
        hit += best
    total = sum(map(len, prompts))
    return hit / total if total else 0.0


@given(st.lists(st.lists(st.integers(0, 1), max_size=9).map(tuple), max_size=12))
def test_the_hit_share_is_what_comparing_all_pairs_gives(prompts: list[tuple[int, ...]]) -> None:
    assert prefix_hit_share(prompts, 2) == pytest.approx(naive_hit_share(prompts, 2))


def test_the_hit_share_by_hand() -> None:
    # 4 of 4 + 6 + 5 tokens: the second repeats the first's two blocks of two; the third differs in its first token.
    assert prefix_hit_share([(1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (9, 2, 3, 4, 5)], 2) == 4 / 15
    assert prefix_hit_share([]) == 0.0

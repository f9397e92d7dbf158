"""Prompts of exact length, made of the model's own tokens. Pure but for reading the tokenizer once; holds no prompt.

A prompt is a sequence of pieces, and a piece is ``(key, length)``: the same key gives the same tokens, a longer piece
begins with the shorter one, and different keys have nothing in common. So a shared prefix is a key that is used
again, and what is to be computed anew has a key of its own.

Words are whole-word tokens with their leading space, so that a prompt has the same token count where a target takes
text: its text, encoded again, gives the same tokens. That is checked for every word once, and for every text made
(10 to 20 ms for 2,000 tokens, so texts are made before a run and not during it).

A random token is one of thousands, so keys that differ do so within any block of a prefix cache (16 tokens: less than
one chance in 10^40). Beware of the other direction: the same seed against the same running server finds the
prompts of the run before in its cache. Take another seed for another run.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

MIN_WORD_COUNT = 64
"""A vocabulary with fewer usable words is refused: prompts would repeat themselves."""
MAX_KEPT_TOKEN_COUNT = 2_000_000
"""Of pieces that were made, for when they are asked for again (shared documents)."""
_WORD_MARKERS = ("Ġ", "▁")
"""How byte-level and sentencepiece vocabularies write the space that begins a word."""


class PromptMaker:
    """Makes prompts with the tokenizer of a model.

    ``model_directory``: has ``tokenizer.json``. Raises ``ValueError`` if that is missing or has too few words.
    """

    def __init__(self, model_directory: Path) -> None:
        path = model_directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"no tokenizer.json in {model_directory}: name the folder of a prepared model")
        self._tokenizer: Tokenizer | None = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        words = _words_that_return(self._tokenizer)
        if len(words) < MIN_WORD_COUNT:
            raise ValueError(
                f"only {len(words)} words of this tokenizer survive being decoded and encoded, of {MIN_WORD_COUNT}"
            )
        self._start(words, {"vocabulary": "whole words of tokenizer.json", "tokenizer_sha256": digest})

    @classmethod
    def without_tokenizer(cls, vocabulary_size: int, *, first_token_id: int = 0) -> PromptMaker:
        """Uses the ids from ``first_token_id`` up to ``vocabulary_size``: for simulators and tests. Has no texts."""
        if vocabulary_size - first_token_id < MIN_WORD_COUNT:
            raise ValueError(f"a vocabulary of fewer than {MIN_WORD_COUNT} tokens repeats itself")
        maker = cls.__new__(cls)
        maker._tokenizer = None
        maker._start(
            list(range(first_token_id, vocabulary_size)),
            {"vocabulary": f"token ids {first_token_id} to {vocabulary_size - 1}"},
        )
        return maker

    def _start(self, words: list[int], facts: dict[str, object]) -> None:
        # Python's own ints, each once: prompts of a long plan then cost one pointer a token.
        self._words = np.array(words, dtype=object)
        self._facts = {**facts, "word_count": len(words)}
        self._kept: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._kept_token_count = 0

    def tokens(self, key: str, count: int) -> tuple[int, ...]:
        """The first ``count`` tokens of the piece ``key``, always the same ones."""
        if count < 0:
            raise ValueError(f"a piece of {count} tokens")
        # An extendable hash: its first bytes are the same however many are asked for, in every release of every
        # library. The remainder's bias is below 10^-4.
        drawn = np.frombuffer(hashlib.shake_128(key.encode()).digest(4 * count), dtype="<u4")
        return tuple(self._words[drawn % len(self._words)].tolist())

    def shared(self, key: str, count: int) -> tuple[int, ...]:
        """Like ``tokens``, for pieces that are asked for again and again: those used last are kept, bounded."""
        kept = self._kept.get(key)
        if kept is not None and len(kept) >= count:
            self._kept.move_to_end(key)
            return kept[:count]
        made = self.tokens(key, count)
        self._kept_token_count += count - len(kept or ())
        self._kept[key] = made
        self._kept.move_to_end(key)
        while self._kept_token_count > MAX_KEPT_TOKEN_COUNT:
            _, forgotten = self._kept.popitem(last=False)
            self._kept_token_count -= len(forgotten)
        return made

    def text(self, prompt_token_ids: Sequence[int]) -> str:
        """The text that gives exactly these tokens, without special ones. Raises ``ValueError`` if none does.

        A server may put special tokens of its own before a text (``added_token_count``).
        """
        if self._tokenizer is None:
            raise ValueError("prompts without a tokenizer have no text: name the model's folder")
        text: str = self._tokenizer.decode(list(prompt_token_ids), skip_special_tokens=False)
        if self._tokenizer.encode(text, add_special_tokens=False).ids != list(prompt_token_ids):
            raise ValueError("these tokens do not survive decoding and encoding: send the token ids")
        return text

    @property
    def added_token_count(self) -> int:
        """Special tokens that the tokenizer puts around a text unless asked not to."""
        return 0 if self._tokenizer is None else int(self._tokenizer.num_special_tokens_to_add(False))

    @property
    def word_count(self) -> int:
        """Different tokens that prompts are made of."""
        return len(self._words)

    def facts(self) -> dict[str, object]:
        """Fit for JSON: what prompts are made of, and what a server may add to their texts."""
        return {**self._facts, "added_token_count": self.added_token_count}


def _words_that_return(tokenizer: Tokenizer) -> list[int]:
    """Ids of all words that survive decoding and encoding among other words, ascending."""
    added = set(tokenizer.get_added_tokens_decoder())
    vocabulary = {
        token: token_id
        for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items()
        if token_id not in added
    }
    marked = [
        token_id
        for token, token_id in vocabulary.items()
        if token.startswith(_WORD_MARKERS) and len(token) > 2 and token[1:].isascii() and token[1:].isalpha()
    ]
    # Without markers (word-level vocabularies) any plain word may do, if it passes.
    candidates = marked or [token_id for token, token_id in vocabulary.items() if token.isascii() and token.isalnum()]
    words = sorted(candidates)
    for seed in range(2):
        # In two orders, so that every word is seen among different neighbours.
        words = _survivors(tokenizer, [words[place] for place in np.random.default_rng(seed).permutation(len(words))])
    return sorted(words)


def _survivors(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    if not token_ids:
        return []
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    if tokenizer.encode(text, add_special_tokens=False).ids == token_ids:
        return list(token_ids)
    if len(token_ids) == 1:
        return []
    middle = len(token_ids) // 2
    return _survivors(tokenizer, token_ids[:middle]) + _survivors(tokenizer, token_ids[middle:])

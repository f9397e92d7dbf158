"""What a simulated model says: the next token as a fixed function of all tokens before it.

The content of a KV cache is modelled by a 64-bit rolling digest of the tokens it was computed from. Because each
token depends on all before it, a continuation of prompt + answer goes on exactly as the uninterrupted answer
would, and a gap, a repeat, a swap or another request's KV changes everything after it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from baton.leg import PromptLogprobs
from baton.request import LegFinish, TokenLogprobs

EMPTY_CONTENT = 0x243F6A8885A308D3
_MASK = (1 << 64) - 1


def extend_content(content: int, token_ids: Sequence[int]) -> int:
    """The digest after ``token_ids`` follow what ``content`` stands for."""
    for token_id in token_ids:
        content = ((content ^ (token_id + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) & _MASK
        content ^= content >> 31
    return content


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Which token follows a content. The defaults have the default model's vocabulary and never end by themselves."""

    vocab_size: int = 49_152
    special_token_count: int = 17
    """Ids below are never said, except the end of sequence."""
    eos_token_id: int | None = 2
    eos_when: Callable[[int], bool] | None = None
    """Whether the token at this position (tokens before it, prompt included) is the end of sequence."""
    scripted: Callable[[int], int | None] | None = None
    """What is said at this position (tokens before it, prompt included); None: what follows from the tokens."""
    eos_probability: float = 0.0
    """The share of positions at which the model ends; like every token, fixed by the tokens before."""

    def __post_init__(self) -> None:
        # Two words are left at least, so that there is another one when a word happens to be the eos id.
        if not 0 <= self.special_token_count <= self.vocab_size - 2:
            raise ValueError(
                f"special_token_count {self.special_token_count} must leave two ids of vocab_size {self.vocab_size}"
            )
        if not 0.0 <= self.eos_probability <= 1.0:
            raise ValueError(f"eos_probability must be from 0 to 1, got {self.eos_probability}")
        if self.eos_token_id is None and (self.eos_when is not None or self.eos_probability > 0):
            raise ValueError("a model that ends needs an eos_token_id")

    @property
    def never_ends(self) -> bool:
        """Whether no answer ends by its own will, or says anything but what follows from its tokens."""
        if self.scripted is not None:
            return False
        return self.eos_token_id is None or (self.eos_when is None and self.eos_probability == 0)

    def next_token(self, content: int, position: int, forbidden: Collection[int] = ()) -> int:
        """``forbidden``: not to be said here, a small part of the vocabulary; the next word is said instead."""
        if self.scripted is not None and (said := self.scripted(position)) is not None:
            return said
        may_end = self.eos_token_id not in forbidden
        if self.eos_token_id is not None and may_end and self._ends(content, position):
            return self.eos_token_id
        mixed = (content * 0x94D049BB133111EB) & _MASK
        word_count = self.vocab_size - self.special_token_count
        word = (mixed >> 17) % word_count
        while self.special_token_count + word == self.eos_token_id or self.special_token_count + word in forbidden:
            word = (word + 1) % word_count
        return self.special_token_count + word

    def go_on(self, content: int, token_ids: list[int], count: int) -> int:
        """Appends ``count`` tokens, each computed from those before it, and returns the content after the last but
        one of them. ``content``: that before the last of ``token_ids``. The same as ``extend_content`` and
        ``next_token`` in turns, where nothing ends and nothing is forbidden; simulations spend their time here."""
        assert self.never_ends
        special, word_count, eos = (
            self.special_token_count,
            self.vocab_size - self.special_token_count,
            self.eos_token_id,
        )
        token_id = token_ids[-1]
        for _ in range(count):
            content = ((content ^ (token_id + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) & _MASK
            content ^= content >> 31
            word = (((content * 0x94D049BB133111EB) & _MASK) >> 17) % word_count
            if special + word == eos:
                word = (word + 1) % word_count
            token_id = special + word
            token_ids.append(token_id)
        return content

    def too_early(
        self, answer_token_count: int, *, min_token_count: int, stop_token_ids: Collection[int]
    ) -> frozenset[int]:
        """What may not be said while the answer has so many tokens: whatever would end it before its least."""
        if answer_token_count >= min_token_count:
            return frozenset()
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        return frozenset((*stop_token_ids, *eos))

    def logprobs(self, content: int, token_id: int, top_count: int) -> TokenLogprobs:
        """Of ``token_id``, said after ``content``: made up, the same for the same content, and decreasing."""
        likeliest = -1e-6 * ((content >> 7) % 1_000_000)
        others = (token_id + step for step in range(1, top_count))
        top = [(token_id, likeliest)] + [
            (other % self.vocab_size, likeliest - rank) for rank, other in enumerate(others, start=1)
        ]
        return TokenLogprobs(likeliest, 1, tuple(top[:top_count]))

    def prompt_logprobs(self, prompt_token_ids: Sequence[int], top_count: int) -> PromptLogprobs:
        """Of each token of a prompt, as ``logprobs`` would have it said after those before it."""
        told = PromptLogprobs(top_count)
        content = EMPTY_CONTENT
        for index, token_id in enumerate(prompt_token_ids):
            if index == 0:
                told.append_first()
            else:
                told.append(self.logprobs(content, token_id, top_count))
            content = extend_content(content, (token_id,))
        return told

    def _ends(self, content: int, position: int) -> bool:
        if self.eos_when is not None and self.eos_when(position):
            return True
        mixed = ((content ^ 0x5851F42D4C957F2D) * 0xD6E8FEB86659FD93) & _MASK
        return (mixed >> 11) / (1 << 53) < self.eos_probability

    def finish_of(
        self,
        token_id: int,
        output_token_count: int,
        total_token_count: int,
        *,
        max_token_count: int,
        stop_token_ids: Sequence[int],
        ignore_eos: bool,
        max_context_token_count: int,
    ) -> LegFinish | None:
        """Why the answer ends with ``token_id``, its ``output_token_count``-th token; None if it goes on."""
        if (token_id == self.eos_token_id and not ignore_eos) or token_id in stop_token_ids:
            return LegFinish.STOP
        if output_token_count >= max_token_count or total_token_count >= max_context_token_count:
            return LegFinish.LENGTH
        return None


def simulated_answer(
    prompt_token_ids: Sequence[int],
    count: int,
    rule: TokenRule = TokenRule(),
    *,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    min_token_count: int = 0,
    max_context_token_count: int | None = None,
) -> tuple[int, ...]:
    """The answer of an uninterrupted run of at most ``count`` tokens: what every test compares with.

    ``max_context_token_count`` cuts the answer when prompt and answer fill it (the engine's default is 8,192).
    """
    content = extend_content(EMPTY_CONTENT, prompt_token_ids)
    limit = max_context_token_count if max_context_token_count is not None else len(prompt_token_ids) + count
    answer: list[int] = []
    while len(answer) < count:
        early = rule.too_early(len(answer), min_token_count=min_token_count, stop_token_ids=stop_token_ids)
        token_id = rule.next_token(content, len(prompt_token_ids) + len(answer), early)
        answer.append(token_id)
        content = extend_content(content, (token_id,))
        if rule.finish_of(
            token_id,
            len(answer),
            len(prompt_token_ids) + len(answer),
            max_token_count=count,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            max_context_token_count=limit,
        ):
            break
    return tuple(answer)

"""One answer in the making: token ids in, text out, stop sequences found. Implements ``answering.Answer``.

Owns the count of tokens so far, the unfinished character and the text that may begin a stop sequence. Never ends a
generation: it says what it found, and the relay acts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from baton.request import OutputOptions
from router.answering import Piece
from router.stop_sequences import StopMatcher
from router.tokenizer import Tokenizer


class TextAnswer:
    """Satisfies ``answering.Answer``. Detokenises only if text or stop sequences ask for it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        output: OutputOptions,
        *,
        stop_sequences: Sequence[str] = (),
        silent_token_ids: Collection[int] = (),
        min_token_count: int = 0,
        keeps_special_tokens: bool = False,
    ) -> None:
        """``silent_token_ids``: tokens that end the answer; counted, sent as ids, never text. ``min_token_count``: a
        stop sequence that is complete within so many tokens is text like any other. ``keeps_special_tokens``: spelled
        out, for whoever looks for them in the text."""
        is_text_needed = output.wants_text or bool(stop_sequences)
        self._detokenizer = (
            tokenizer.detokenizer(keep_special_tokens=keeps_special_tokens) if is_text_needed else None
        )
        self._matcher = StopMatcher(stop_sequences) if stop_sequences else None
        self._silent = frozenset(silent_token_ids)
        self._min_token_count = min_token_count
        self._token_count = 0
        self._is_over = False

    def push(self, token_ids: tuple[int, ...]) -> Piece:
        """The next tokens. On a match the piece ends with the token that completed it and with the text before the
        sequence; whatever else was pushed is dropped."""
        if self._is_over:
            return Piece(self._token_count, (), "", None)
        first = self._token_count
        if self._matcher is None:
            self._token_count += len(token_ids)
            return Piece(first, token_ids, self._text_of(token_ids), None)
        texts = []
        for count, token_id in enumerate(token_ids, start=1):
            self._token_count += 1
            text = self._text_of((token_id,))
            match = self._matcher.push(text, is_minded=self._token_count > self._min_token_count)
            texts.append(match.text)
            if match.sequence is not None:
                self._is_over = True
                return Piece(first, token_ids[:count], "".join(texts), match.sequence)
        return Piece(first, token_ids, "".join(texts), None)

    def flush(self) -> Piece:
        """The end: text held back, zero tokens. Idempotent."""
        if self._is_over:
            return Piece(self._token_count, (), "", None)
        self._is_over = True
        text = self._detokenizer.flush() if self._detokenizer is not None else ""
        if self._matcher is None:
            return Piece(self._token_count, (), text, None)
        match = self._matcher.push(text, is_minded=self._token_count > self._min_token_count)
        if match.sequence is not None:
            return Piece(self._token_count, (), match.text, match.sequence)
        return Piece(self._token_count, (), match.text + self._matcher.flush(), None)

    def _text_of(self, token_ids: tuple[int, ...]) -> str:
        if self._detokenizer is None:
            return ""
        if self._silent and not self._silent.isdisjoint(token_ids):
            token_ids = tuple(token_id for token_id in token_ids if token_id not in self._silent)
        return self._detokenizer.push(token_ids)

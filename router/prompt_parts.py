"""The prompt as the model read it, told ahead of the answer in parts of bounded size.

A stage between relay and caller: made of the token ids alone, or of what the relay brought of their logprobs. Text is
as the tokenizer spells it, special tokens included, so that what a template or a truncation did to it can be seen.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace

from baton.leg import PromptLogprobs
from router.answering import Admitted, PromptPart, RelayEvent
from router.tokenizer import Detokenizer

MAX_PART_BYTES = 64 * 1024
"""Of a part's logprobs on the wire, about."""
MAX_PART_TOKENS = 1024
"""Of a part without them: the longest tokens of usual vocabularies, spelled out, stay far below a message's limit."""
_ENTRY_BYTES, _TOP_BYTES = 24, 17
"""Of one token's logprobs, and of each of its likeliest."""


def part_token_count(logprob_count: int | None) -> int:
    """Tokens in one part."""
    if logprob_count is None:
        return MAX_PART_TOKENS
    return min(MAX_PART_TOKENS, MAX_PART_BYTES // (_ENTRY_BYTES + _TOP_BYTES * logprob_count))


def prompt_parts(
    token_ids: tuple[int, ...], logprob_count: int | None = None, logprobs: PromptLogprobs | None = None
) -> Iterator[PromptPart]:
    """All of the prompt, in order. Made as they are asked for: at no time are there more than one."""
    size = part_token_count(logprob_count)
    for start in range(0, len(token_ids), size):
        part = token_ids[start : start + size]
        told = () if logprobs is None else tuple(logprobs[index] for index in range(start, start + len(part)))
        yield PromptPart(start, part, logprobs=told)


async def with_prompt(
    events: AsyncGenerator[RelayEvent, None],
    token_ids: tuple[int, ...],
    *,
    is_brought: bool,
    detokenizer: Detokenizer | None,
) -> AsyncGenerator[RelayEvent, None]:
    """``events`` with the prompt's parts behind ``Admitted``. ``is_brought``: the relay brings them, for their
    logprobs. ``detokenizer``: one that spells special tokens out; None where no text was asked for."""
    last_index = len(token_ids)
    async with aclosing(events):
        async for event in events:
            match event:
                case PromptPart():
                    yield _spelled(event, detokenizer, last_index)
                case Admitted() if not is_brought:
                    yield event
                    for part in prompt_parts(token_ids):
                        yield _spelled(part, detokenizer, last_index)
                case _:
                    yield event


def _spelled(part: PromptPart, detokenizer: Detokenizer | None, last_index: int) -> PromptPart:
    if detokenizer is None:
        return part
    text = detokenizer.push(part.token_ids)
    if part.first_token_index + len(part.token_ids) == last_index:
        text += detokenizer.flush()
    return replace(part, text=text)

"""The prompt told in parts of bounded size. Pure.

A prompt of thousands of tokens with twenty likeliest each is megabytes as messages: parts are made one at a time, as
the caller takes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.leg import PromptLogprobs
from router.answering import PromptPart

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

"""How much of some prompts an infinite prefix cache would hit: what they share, as one number. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def prefix_hit_share(prompts: Iterable[Sequence[int]], block_token_count: int = 16) -> float:
    """Share of prompt tokens in leading whole blocks that an earlier prompt began with, 0 to 1.

    Earlier: in the order given. Real caches hit less: they forget, and a prefix that is still being computed is not
    there yet.
    """
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    hit_count = token_count = 0
    for prompt in prompts:
        token_count += len(prompt)
        # A block is its tokens after a certain prefix: (number of the block before, tokens) -> number. The first one
        # that is new has a new number, so nothing after it is known either.
        before = 0
        for begin in range(0, len(prompt) - block_token_count + 1, block_token_count):
            block = (before, tuple(prompt[begin : begin + block_token_count]))
            hit_count += block_token_count if block in known else 0
            before = known.setdefault(block, len(known) + 1)
    return hit_count / token_count if token_count else 0.0

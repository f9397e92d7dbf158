"""vLLM's logprobs of a prompt in our words."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from baton.leg import PromptLogprobs
from baton.request import TokenLogprobs
from engine.protocol import PrefillJob
from engine.vllm_sampling import prompt_logprobs
from router.samples.prompt_parts import MAX_PART_TOKENS, part_token_count, prompt_parts


@dataclass
class Flat:
    """The lists of vLLM's FlatLogprobs: each token but the first has itself, then its likeliest."""

    position_count: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.position_count


def flat(position_count: int, top_count: int) -> Flat:
    told = Flat(position_count)
    for position in range(1, position_count):
        for place in range(1 + top_count):
            told.token_ids.append(100 * position + place)
            told.logprobs.append(-position - place / 16)
            told.ranks.append(40 + position if place == 0 else place)
    return told


@pytest.mark.parametrize("top_count", [0, 1, 3])
def test_every_token_but_the_first_has_itself_and_its_likeliest(top_count: int) -> None:
    job = PrefillJob("g.1", (1, 2, 3, 4), prompt_logprob_count=top_count)
    logprobs = prompt_logprobs(job, flat(4, top_count))
    assert logprobs is not None
    assert [logprobs[index] for index in range(4)] == [
        None,
        *(
            TokenLogprobs(
                -position,
                40 + position,
                tuple((100 * position + place, -position - place / 16) for place in range(1, 1 + top_count)),
            )
            for position in (1, 2, 3)
        ),
    ]


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    logprobs = prompt_logprobs(PrefillJob("g.1", (1,), prompt_logprob_count=2), flat(1, 2))
    assert logprobs is not None
    assert [logprobs[index] for index in range(len(logprobs))] == [None]


def test_what_was_not_asked_for_is_not_told() -> None:
    assert prompt_logprobs(PrefillJob("g.1", (1, 2)), flat(2, 1)) is None


def test_lists_of_another_shape_are_not_believed() -> None:
    with pytest.raises(ValueError, match="likeliest"):
        prompt_logprobs(PrefillJob("g.1", (1, 2, 3), prompt_logprob_count=2), flat(3, 1))


@pytest.mark.parametrize("count", [None, 0, 1, 20])
def test_parts_cover_the_prompt_in_order_and_are_no_larger_than_they_may_be(count: int | None) -> None:
    size = part_token_count(count)
    assert 1 <= size <= MAX_PART_TOKENS
    for length in (1, size - 1, size, size + 1, 3 * size):
        ids = tuple(range(length))
        logprobs = None
        if count is not None:
            logprobs = PromptLogprobs(count)
            for _ in ids:
                logprobs.append_first()
        parts = list(prompt_parts(ids, count, logprobs))
        assert tuple(token_id for part in parts for token_id in part.token_ids) == ids
        assert [part.first_token_index for part in parts] == list(range(0, length, size))
        assert all(len(part.token_ids) <= size for part in parts)
        assert all(len(part.logprobs) == (0 if count is None else len(part.token_ids)) for part in parts)

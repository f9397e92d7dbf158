"""What is wrong with asking for several samples, or for the prompt back. Pure; ``validation.py`` asks."""

from __future__ import annotations

from collections.abc import Iterator

from baton.errors import FieldViolation
from baton.request import MAX_SAMPLE_COUNT, MAX_TOP_LOGPROB_COUNT, GenerateRequest

MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5
"""A temperature below this counts as 0."""


def samples(request: GenerateRequest) -> Iterator[FieldViolation]:
    """Rules of ``sample_count``."""
    count = request.sample_count
    if not 1 <= count <= MAX_SAMPLE_COUNT:
        yield FieldViolation(
            "sample_count", f"is {count}; must be 1 to {MAX_SAMPLE_COUNT}. For more, send several requests."
        )
        return
    if count == 1:
        return
    if 0.0 <= request.sampling.temperature < GREEDY_BELOW:
        yield FieldViolation(
            "sample_count",
            f"is {count} with sampling.temperature {request.sampling.temperature:g}, which draws the same answer "
            f"{count} times; set a temperature of at least {GREEDY_BELOW:g}, or sample_count 1",
        )
    seed = request.sampling.seed
    if seed is not None and 0 <= seed <= MAX_SEED < seed + count - 1:
        yield FieldViolation(
            "sampling.seed",
            f"is {seed}; with sample_count {count} the last sample is drawn with seed + {count - 1}, which must be "
            f"at most {MAX_SEED}",
        )


def prompt_output(request: GenerateRequest) -> Iterator[FieldViolation]:
    """Rules of ``prompt_logprob_count``."""
    count = request.output.prompt_logprob_count
    if count is not None and not 0 <= count <= MAX_TOP_LOGPROB_COUNT:
        yield FieldViolation(
            "output.prompt_logprob_count",
            f"is {count}; must be 0 to {MAX_TOP_LOGPROB_COUNT}, or absent for no logprobs of the prompt",
        )

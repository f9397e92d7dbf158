"""The step log of a real fleet accounts for every token that callers saw, and for every pull."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from patience import patient

pytest.importorskip("vllm")

from bench.real_fleet import fleet_config
from bench.simulation.fit import journeys
from bench.simulation.probe import Ask, Effort, observe

pytestmark = pytest.mark.real

WORK = Effort(alone=(200, 700), waves=((Ask(40, 60), Ask(90, 40), Ask(600, 6)),))


async def test_every_token_has_its_step_and_every_handed_over_prompt_its_pull(
    model_path: Path, tmp_path: Path
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    config = patient(
        fleet_config(model_path, tmp_path, prefill_cores=f"[[{cores[0]}]]", decode_cores=f"[[{cores[-1]}]]")
    )
    observed = await observe(config, is_quick=True, seed=1, work=WORK)
    travelled = journeys(observed)
    assert len(travelled) == len(observed.answers) == 5
    for journey in travelled:
        answer, (prefill, decode) = journey.answer, journey.legs
        assert sum(part.new_token_count for _, part in prefill) == answer.prompt_token_count
        assert {step.worker_id for step, _ in prefill} == {answer.prefill_worker_id}
        assert {step.worker_id for step, _ in decode} == {answer.decode_worker_id}
        assert [part.new_token_count for _, part in decode] == [1] * (len(answer.token_at) - 1)
        assert decode[0][0].pull_count >= 1
        assert decode[0][1].context_token_count == answer.prompt_token_count
        for step, seen_at in zip(journey.with_tokens, answer.token_at, strict=True):
            assert answer.sent_at < step.began_at < step.ended_at < seen_at
    for worker_id in {step.worker_id for step in observed.steps}:
        own = [step for step in observed.steps if step.worker_id == worker_id]
        for earlier, later in itertools.pairwise(own):
            assert earlier.until <= later.entered_at <= later.began_at < later.ended_at
    assert max(len(step.parts) for step in observed.steps) >= 2, "the streams shared steps"

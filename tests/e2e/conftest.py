"""One real fleet, and one oracle, for the whole session: both take half a minute to start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from service_under_test import Service

from bench.drills import baseline_of
from bench.fleet_under_test import running_fleet
from bench.questions import make_questions
from bench.real_fleet import fleet_config

QUESTION_COUNT = 40
LONGEST_PROMPT = 1100
SEED = 20261121
HELD_BACK = (("decode-death", 300, 40), ("prefill-death", 1500, 8))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def service(model_path: Path, tmp_path_factory: object) -> AsyncIterator[Service]:
    """One prefill worker and two decode workers, so that one of the latter may die."""
    state_dir: Path = tmp_path_factory.mktemp("fleet")  # type: ignore[attr-defined]
    config = fleet_config(model_path, state_dir, prefill_cores="[[0]]", decode_cores="[[1], [1]]")
    asking = asyncio.create_task(
        make_questions(model_path, count=QUESTION_COUNT, max_length=LONGEST_PROMPT, seed=SEED, held_back=HELD_BACK)
    )
    try:
        async with running_fleet(config) as fleet:
            questions = await asking
            yield Service(fleet, await baseline_of(fleet, questions.corpus), questions)
    finally:
        asking.cancel()

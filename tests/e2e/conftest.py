"""One real fleet, and one oracle, for the whole session: both take half a minute to start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from patience import START_S, TEST_S, patient
from service_under_test import Service

from bench.drills import baseline_of
from bench.fleet_under_test import running_fleet
from bench.questions import make_questions
from bench.real_fleet import fleet_config

QUESTION_COUNT, STOP_BASE_COUNT = 24, 6
LONGEST_PROMPT = 1100
SEED = 20261121
HELD_BACK = (("decode-death", 300, 40), ("prefill-death", 1500, 8))
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_S))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def service(model_path: Path, tmp_path_factory: object) -> AsyncIterator[Service]:
    """One prefill worker and two decode workers, so that one of the latter may die."""
    state_dir: Path = tmp_path_factory.mktemp("fleet")  # type: ignore[attr-defined]
    config = patient(fleet_config(model_path, state_dir, prefill_cores="[[0]]", decode_cores="[[1], [1]]"))
    asking = asyncio.create_task(
        make_questions(
            model_path,
            count=QUESTION_COUNT,
            max_length=LONGEST_PROMPT,
            seed=SEED,
            stop_base_count=STOP_BASE_COUNT,
            held_back=HELD_BACK,
        )
    )
    try:
        async with running_fleet(config, start_timeout_s=START_S) as fleet:
            questions = await asking
            yield Service(fleet, await baseline_of(fleet, questions.corpus), questions)
    finally:
        asking.cancel()

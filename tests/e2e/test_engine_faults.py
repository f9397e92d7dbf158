"""Real engines whose transfers go wrong: a sample of the soak's section ``faults-real``."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.real_faults import STUCK_S, faulty_cluster, refusal_to_register
from bench.tiny_model import make_tiny_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


async def test_answers_are_one_engines_and_nothing_is_left_while_a_quarter_of_all_operations_go_wrong(
    tiny_model: Path,
) -> None:
    async with faulty_cluster(tiny_model, {"probability": 0.25, "seed": 1}) as cluster:
        questions = await cluster.questions(12, seed=1)
        tally = await cluster.ask_all(questions * 5, concurrency=8)
        assert tally.wrong == []
        assert tally.outcomes == {"complete": 60}
        counts = await cluster.fault_counts()
        assert any(name.startswith("post.") for name in counts), counts
        assert tally.reasons or tally.attempts[2], "no fault was met: the test proves nothing"
        await cluster.at_rest(STUCK_S + 15.0)


async def test_an_engine_whose_memory_the_library_does_not_take_does_not_start(tiny_model: Path) -> None:
    assert "the engine did not start" in await refusal_to_register(tiny_model)

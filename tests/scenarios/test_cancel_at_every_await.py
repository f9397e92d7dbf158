"""A caller that leaves at every point there is, once: the engine lets go within 50 ms and the books balance."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.testing import run_virtual
from bench.await_points import AwaitPoints, Swept, sweep
from bench.await_sweeps import ABORT_WITHIN_S, SWEEPS, Sweep, swept

BY_NAME = {kind.name: kind for kind in SWEEPS}


def functions_of(result: Swept) -> set[str]:
    return {site.split()[-1] for site in result.sites}


@pytest.mark.parametrize("write_s", [0.0, 0.003, 0.03])
@pytest.mark.parametrize("kind", SWEEPS, ids=lambda kind: kind.name)
def test_nothing_is_left_wherever_its_caller_left(kind: Sweep, write_s: float, tmp_path: Path) -> None:
    """With writes that take no time, less than a step of the engine, and more."""
    result = swept(tmp_path, kind, write_s)
    assert result.point_count > 20
    assert result.slowest_abort_s <= kind.grace_s + ABORT_WITHIN_S


def test_the_points_are_those_of_the_whole_path(tmp_path: Path) -> None:
    functions = functions_of(swept(tmp_path, BY_NAME["split"], 0.003))
    for room in ("StreamWriter.", "Flight.", "SimEngine."):
        assert any(name.startswith(room) for name in functions), (room, functions)
    in_line = functions_of(swept(tmp_path, BY_NAME["a wait in line"]))
    assert any(name.startswith("Turn.") for name in in_line), in_line


def test_a_resumable_generation_outlives_its_caller_for_its_grace(tmp_path: Path) -> None:
    assert swept(tmp_path, BY_NAME["resumable, its grace over"]).slowest_abort_s > ABORT_WITHIN_S / 5


def test_an_engine_that_does_not_let_go_is_found() -> None:
    async def scenario() -> None:
        points = AwaitPoints(asyncio.get_running_loop())

        async def begin() -> None:
            await asyncio.sleep(1.0)

        async def check() -> None:
            pass

        with pytest.raises(AssertionError, match=r"an engine still has it after 0\.05 s"):
            await sweep(points, begin, lambda: True, check, abort_within_s=ABORT_WITHIN_S)

    run_virtual(scenario())

"""A caller that leaves at every point there is, once: the engine lets go within 50 ms and the books balance."""

from __future__ import annotations

import asyncio
import tempfile
from functools import cache
from pathlib import Path

import pytest

from baton.testing import run_virtual
from bench.await_points import AwaitPoints, Swept, sweep
from bench.await_sweeps import ABORT_WITHIN_S, SWEEPS, Sweep, swept

BY_NAME = {kind.name: kind for kind in SWEEPS}


def functions_of(result: Swept) -> set[str]:
    return {site.split()[-1] for site in result.sites}


@cache
def result_of(name: str, write_s: float) -> Swept:
    """Deterministic, so once is enough."""
    with tempfile.TemporaryDirectory() as folder:
        return swept(Path(folder), BY_NAME[name], write_s)


@pytest.mark.parametrize(
    ("kind", "write_s"),
    [*((kind, 0.003) for kind in SWEEPS), *((BY_NAME[name], s) for name in ("split", "local") for s in (0.0, 0.03))],
    ids=lambda each: each.name if isinstance(each, Sweep) else f"{each:g}",
)
def test_nothing_is_left_wherever_its_caller_left(kind: Sweep, write_s: float) -> None:
    """With writes that take less than a step of the engine; no time, and more, for the plain ones. The soak's section
    `cancels-api` has every kind with all three."""
    result = result_of(kind.name, write_s)
    assert result.point_count > 20
    assert result.slowest_abort_s <= kind.grace_s + ABORT_WITHIN_S


def test_the_points_are_those_of_the_whole_path() -> None:
    functions = functions_of(result_of("split", 0.003))
    for room in ("StreamWriter.", "Flight.", "SimEngine."):
        assert any(name.startswith(room) for name in functions), (room, functions)
    in_line = functions_of(result_of("a wait in line", 0.003))
    assert any(name.startswith("Turn.") for name in in_line), in_line


def test_a_resumable_generation_outlives_its_caller_for_its_grace() -> None:
    assert result_of("resumable, its grace over", 0.003).slowest_abort_s > ABORT_WITHIN_S / 5


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

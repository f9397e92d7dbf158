"""Who outlives whom: an engine process never outlives its owner, and its owner is told when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from engine_pair import (
    Pair,
    alone,
    becomes_true,
    continuation,
    decoded,
    engine_config,
    is_idle,
    kv_of,
    prefilled,
    prompt,
    running_pair,
    stop,
)
from patience import START_S, WITHIN_S

from baton.errors import BatonError, Reason
from bench.real_fleet import free_ports
from engine.protocol import DecodeJob, Prefilled, PrefillJob

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]
HERE = Path(__file__).parent


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def owner() -> AsyncIterator[asyncio.subprocess.Process]:
    """Its engine starts while the next test watches another, which does not get that far."""
    async with owner_process() as process:
        yield process


async def test_an_engine_that_is_still_starting_dies_with_its_owner(owner: asyncio.subprocess.Process) -> None:
    async with owner_process() as another:
        engines: list[int] = []

        async def engine_was_started() -> bool:
            names = ("spawn_main", "EngineCore")  # as it begins, and as it calls itself before it loads the model
            engines[:] = [pid for pid in children(another.pid) if any(name in command(pid) for name in names)]
            return bool(engines)

        await becomes_true(engine_was_started, within_s=START_S)
        another.kill()
        await another.wait()
        # It notices when it has loaded the first of our code, which is before it loads the model.
        await becomes_true(gone(*engines))


async def test_an_engine_dies_with_the_process_that_owns_it(owner: asyncio.subprocess.Process) -> None:
    assert owner.stdout is not None
    engine_pid = int(await asyncio.wait_for(owner.stdout.readline(), START_S))
    assert is_alive(engine_pid)
    owner.kill()
    await owner.wait()
    await becomes_true(gone(engine_pid))


@dataclass(frozen=True)
class Bereaved:
    """A pair whose prefill engine was killed while it held KV and had a request."""

    pair: Pair
    ids: tuple[int, ...]
    expected: list[int]
    held: Prefilled
    running: asyncio.Task[Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bereaved() -> AsyncIterator[Bereaved]:
    async with running_pair(has_met=False) as pair:
        ids = prompt(300, seed=2)
        expected = await alone(pair.decoder, ids)
        held = await prefilled(pair.prefiller, ids)
        running = asyncio.create_task(decoded(pair.prefiller, DecodeJob("running", prompt(50), stop=stop(3000))))

        async def it_runs() -> bool:
            return (await pair.prefiller.load_now()).running_count > 0

        await becomes_true(it_runs)
        assert not running.done()
        os.kill(pair.prefiller.process_id, signal.SIGKILL)
        yield Bereaved(pair, ids, expected, held, running)


async def test_a_decoder_whose_peer_died_computes_the_prompt_itself(bereaved: Bereaved) -> None:
    decoder = bereaved.pair.decoder
    async with asyncio.timeout(WITHIN_S):
        adopted, rest, _ = await decoded(decoder, continuation(bereaved.ids, bereaved.held))
    assert [bereaved.held.first_token_id, *rest] == bereaved.expected
    assert (adopted.recomputed_token_count, adopted.transfer_bytes) == (300, 0)
    await is_idle(decoder)


async def test_the_owner_is_told_when_its_engine_dies(bereaved: Bereaved) -> None:
    engine = bereaved.pair.prefiller
    for asked in (
        bereaved.running,
        engine.check_health(),
        engine.prefill(PrefillJob("late", prompt(10), stop=stop(2))),
        engine.release(kv_of(bereaved.held).handle),
        engine.load_now(),
    ):
        with pytest.raises(BatonError) as failed:
            await asyncio.wait_for(asked, WITHIN_S)
        assert failed.value.reason is Reason.ENGINE_FAILED
    await asyncio.wait_for(engine.close(), WITHIN_S)
    assert not is_alive(engine.process_id)


async def test_a_model_that_is_not_there_is_said_before_a_process_is_started(tmp_path: Path) -> None:
    from engine.vllm_engine import VllmEngine

    engine = VllmEngine(engine_config(0, free_ports(1)[0], model_path=str(tmp_path)))
    with pytest.raises(BatonError, match="no model in"):
        await engine.start()
    await engine.close()


@asynccontextmanager
async def owner_process() -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "engine_owner.py"), str(free_ports(1)[0])),
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        yield owner
    finally:
        with suppress(ProcessLookupError):
            owner.kill()
        await owner.wait()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def gone(*pids: int) -> Callable[[], Awaitable[bool]]:
    async def all_gone() -> bool:
        return not any(map(is_alive, pids))

    return all_gone


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):
            found += map(int, task.read_text().split())
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""

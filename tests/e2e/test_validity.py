"""Real engines whose holds end before and while they are read: what they answer is what one engine answers.

A sample of the soak's section ``validity``, with its model of two layers. The decode engine stops itself at points of
a pull that a signal from outside would rarely hit. The same engines, told to believe what they read, must be wrong,
or the rest would prove nothing. The last test starts the prefill engine anew on its port.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from engine_pair import TRY_COUNT
from patience import LEASE_S

from baton.leg import KvAdopted, RecomputeReason, Stepped
from baton.request import EngineStop
from bench.real_fleet import free_ports
from bench.tiny_model import make_tiny_model
from bench.validity_engines import LEASE_S as SHORT_LEASE_S
from bench.validity_engines import Asker, Engines, Moment, StopCounts, Stopper, engine_config, running_engines
from engine.config import EngineIdentity
from engine.protocol import DecodeJob, Prefilled, PrefillJob

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

PROMPT = tuple(range(3, 303))
ANSWER_TOKEN_COUNT = 12
PULL_COUNT = 12
STALE, EXPIRED = RecomputeReason.STALE.value, RecomputeReason.EXPIRED.value


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def first_port() -> int:
    return free_ports(2, in_a_row=True)[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tiny_model: Path, first_port: int) -> AsyncIterator[Engines]:
    async with running_engines(tiny_model, first_port) as both:
        yield both


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asker(engines: Engines) -> Asker:
    return Asker(engines, seed=7)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stopper(asker: Asker) -> Stopper:
    # The stop lasts as long as it takes the blocks to be other prompts', and no longer.
    made = Stopper(asker, stop_s=0.0, pull_count=PULL_COUNT)
    asker.lease_s = LEASE_S
    await made.prepare()
    return made


async def prefilled(engine: Any) -> Prefilled:
    stop = EngineStop(ANSWER_TOKEN_COUNT, ignore_eos=True)
    result: Prefilled = await engine.prefill(PrefillJob("prefill", PROMPT, stop=stop, lease_s=LEASE_S))
    assert result.held is not None
    return result


async def continued(engine: Any, first: Prefilled | None) -> tuple[KvAdopted, tuple[int, ...]]:
    """The account and the whole answer; without ``first``, one engine's own."""
    if first is None:
        job = DecodeJob("alone", PROMPT, stop=EngineStop(ANSWER_TOKEN_COUNT, ignore_eos=True))
    else:
        assert first.held is not None
        stop = EngineStop(ANSWER_TOKEN_COUNT - 1, ignore_eos=True)
        job = DecodeJob("go-on", (*PROMPT, first.first_token_id), stop=stop, pull=first.held.params)
    events = [event async for event in engine.decode(job)]
    tokens = [token for event in events if isinstance(event, Stepped) for token in event.token_ids]
    (adopted,) = [event for event in events if isinstance(event, KvAdopted)]
    return adopted, (*([first.first_token_id] if first else []), *tokens)


@pytest.mark.parametrize("moment", [Moment.QUEUED, Moment.TORN])
async def test_what_was_overwritten_after_its_first_look_and_before_its_read_is_computed_anew(
    asker: Asker, stopper: Stopper, moment: Moment
) -> None:
    # Holds end by their leases, or by release.
    asker.lease_s = SHORT_LEASE_S if moment is Moment.QUEUED else LEASE_S
    for _ in range(TRY_COUNT):
        counts = StopCounts()
        await stopper.stop_once(counts, moment, by_release=moment is Moment.TORN)
        assert counts.wrong_count == 0
        if counts.forced_stop_count or not counts.late_count:
            continue  # on a machine that stood still, leases were over before all had been asked for
        assert counts.reused_count == PULL_COUNT
        # Every one that read on: by the nonce, and not only by the digests, which engines with KV on a GPU have not.
        assert set(counts.reasons) <= {STALE, EXPIRED}
        assert counts.reasons[STALE] == counts.late_count
        return
    raise AssertionError(f"{TRY_COUNT} times no read was late: nothing is proven")


async def test_the_same_engines_answer_wrongly_once_they_believe_what_they_read(
    engines: Engines, asker: Asker, stopper: Stopper
) -> None:
    asker.lease_s = LEASE_S
    counts = StopCounts()
    engines.plan.set("believes", 1)
    try:
        for _ in range(TRY_COUNT):
            await stopper.stop_once(counts, Moment.QUEUED, by_release=True)
            if counts.wrong_count:
                break
    finally:
        engines.plan.set("believes", 0)
    assert counts.reused_count == counts.trial_count
    assert counts.wrong_count > 0
    assert set(counts.reasons) == {"used"}


async def test_a_prefill_engine_that_came_back_on_its_port_is_another_engine(
    engines: Engines, tiny_model: Path, first_port: int
) -> None:
    from engine.vllm_engine import VllmEngine

    _, expected = await continued(engines.decoder, None)
    used = await prefilled(engines.prefiller)
    adopted, answer = await continued(engines.decoder, used)
    assert (adopted.recompute_reason, answer) == (None, expected)
    left = [await prefilled(engines.prefiller) for _ in range(2)]

    os.kill(engines.prefiller.process_id, signal.SIGKILL)  # no goodbye
    await engines.prefiller.close()
    adopted, answer = await continued(engines.decoder, left[0])
    assert (adopted.recompute_reason, answer) == (RecomputeReason.FAILED, expected)

    again = VllmEngine(engine_config(tiny_model, first_port, 0), EngineIdentity("prefill-0"))
    try:
        await again.start()
        adopted, answer = await continued(engines.decoder, left[1])
        assert (adopted.recompute_reason, answer) == (RecomputeReason.FAILED, expected)
        for _ in range(2):
            adopted, answer = await continued(engines.decoder, await prefilled(again))
            assert (adopted.recompute_reason, answer) == (None, expected)
        await again.check_health()
        await engines.decoder.check_health()
    finally:
        await again.close()


async def test_blocks_that_go_free_by_an_unknown_way_take_their_hold_with_them() -> None:
    from kvtransfer.connector_holds import guard_frees

    order: list[str] = []

    class Keeper:
        def let_go(self, request_id: str) -> bool:
            order.append(f"revoked {request_id}")
            return request_id == "held"

    class Manager:
        def free(self, request: Any) -> None:
            order.append(f"freed {request.request_id}")

        def pop_blocks_for_free(self, request: Any) -> list[int]:
            order.append(f"popped {request.request_id}")
            return [1]

    manager: Any = Manager()
    guard_frees(manager, Keeper())  # type: ignore[arg-type]
    manager.free(SimpleNamespace(request_id="held"))
    assert manager.pop_blocks_for_free(SimpleNamespace(request_id="other")) == [1]
    assert order == ["revoked held", "freed held", "revoked other", "popped other"]

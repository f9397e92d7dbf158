"""A caller that leaves at every point there is, once: the engine lets go within 50 ms and the books balance."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from baton.errors import engine_failed
from baton.leg import DecodeOrder, KvAdopted
from baton.request import LegFinish, TokenLogprobs
from baton.testing import run_virtual
from baton.v1 import generation_pb2 as pb
from bench.await_points import AwaitPoints, Swept, sweep
from bench.virtual_cluster import ProcessClient
from bench.virtual_service import RULE, KeptCall, VirtualService, message_of, virtual_service
from engine.sim_tokens import simulated_answer
from router.worker_client import DecodeSink

ABORT_WITHIN_S = 0.05
BALANCED_WITHIN_S = 0.2
TOKEN_COUNT = 10


class LosingSink:
    """The connection is lost with the first tokens."""

    def __init__(self, inner: DecodeSink) -> None:
        self._inner = inner
        self.lost = asyncio.Event()

    def adopted(self, kv: KvAdopted) -> None:
        self._inner.adopted(kv)

    def tokens(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        if not self.lost.is_set():
            self._inner.tokens(token_ids, logprobs)
            self.lost.set()

    def done(self, finish: LegFinish) -> None:
        raise AssertionError("a decode ended that was to be lost")


class LosingClient(ProcessClient):
    """The first decode of every request is lost after its first step."""

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        if not order.leg_id.endswith(".2"):
            await super().decode(order, timeout_s=timeout_s, sink=sink)
            return
        losing = LosingSink(sink)
        decoding = asyncio.create_task(super().decode(order, timeout_s=timeout_s, sink=losing))
        try:
            await losing.lost.wait()
        finally:
            decoding.cancel()
            await asyncio.gather(decoding, return_exceptions=True)
        raise engine_failed("decode", "the connection was lost")


def swept(
    directory: Path,
    *,
    more: dict[str, Any] | None = None,
    counts: tuple[int, int] = (1, 1),
    connect: Any = ProcessClient,
    rest_s: float = BALANCED_WITHIN_S,
    write_s: float = 0.0,
    **router: Any,
) -> Swept:
    """Sweeps every point of one kind of request; the last of them, which nobody cancelled, must be exact."""

    async def scenario() -> Swept:
        points = AwaitPoints(asyncio.get_running_loop())
        numbers = itertools.count(1)
        async with virtual_service(directory, *counts, connect=connect, **router) as service:
            calls: list[KeptCall] = []
            messages: list[pb.GenerateRequest] = []

            async def begin() -> None:
                messages.append(message_of(next(numbers), max_output_token_count=TOKEN_COUNT, **(more or {})))
                calls.append(KeptCall(write_s=write_s))
                await service.generate(messages[-1], calls[-1])

            result = await sweep(
                points,
                begin,
                lambda: _has_legs(service),
                lambda: service.assert_balanced(rest_s),
                abort_within_s=ABORT_WITHIN_S,
            )
            assert calls[-1].is_finished, calls[-1].details
            if not messages[-1].sampling.temperature:
                answer = simulated_answer(messages[-1].token_ids.ids, TOKEN_COUNT, RULE, ignore_eos=True)
                assert calls[-1].token_ids == list(answer)
            assert service.server.generation.call_count == 0
            return result

    return run_virtual(scenario())


def _has_legs(service: VirtualService) -> bool:
    return any(process.books()["legs"] for process in service.processes.values())


def functions_of(result: Swept) -> set[str]:
    return {site.split()[-1] for site in result.sites}


@pytest.mark.parametrize("write_s", [0.0, 0.003, 0.03])
def test_split(tmp_path: Path, write_s: float) -> None:
    """With writes that take no time, less than a step, more than a step."""
    result = swept(tmp_path, placement="split", write_s=write_s)
    assert result.point_count > 30
    functions = functions_of(result)
    assert {"SimEngine._until", "StreamWriter.write_all", "SimEngine._rest"} & functions
    assert any(name.startswith("Flight.") for name in functions)
    assert result.slowest_abort_s <= ABORT_WITHIN_S


@pytest.mark.parametrize("write_s", [0.0, 0.03])
def test_local(tmp_path: Path, write_s: float) -> None:
    assert swept(tmp_path, placement="local", counts=(0, 1), write_s=write_s).point_count > 20


def test_a_prompt_of_several_steps(tmp_path: Path) -> None:
    more = {"prompt_token_count": 700}
    assert swept(tmp_path, placement="split", more=more).point_count > 30


@pytest.mark.parametrize("write_s", [0.0, 0.03])
def test_a_retry_after_a_lost_leg(tmp_path: Path, write_s: float) -> None:
    result = swept(tmp_path, placement="split", counts=(1, 2), connect=LosingClient, write_s=write_s)
    assert result.point_count > 45


def test_a_wait_in_line(tmp_path: Path) -> None:
    """One place, which somebody else has: the request waits, is admitted when that one ends, and goes on."""

    async def scenario() -> int:
        points = AwaitPoints(asyncio.get_running_loop())
        numbers = itertools.count(1)
        async with virtual_service(tmp_path, placement="split", max_in_flight_count=1) as service:

            async def begin() -> None:
                first = asyncio.create_task(service.generate(message_of(next(numbers)), KeptCall()))
                try:
                    await service.generate(message_of(next(numbers)), KeptCall())
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)

            result = await sweep(
                points,
                begin,
                lambda: _has_legs(service),
                lambda: service.assert_balanced(BALANCED_WITHIN_S),
                abort_within_s=ABORT_WITHIN_S,
            )
            assert any("admission" in site for site in result.sites)
            return result.point_count

    assert run_virtual(scenario()) > 40


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

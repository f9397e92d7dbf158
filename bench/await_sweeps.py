"""Which requests are cancelled at every point: one kind each, on its own virtual service.

Used by the tests, a sweep each, and by the soak for the page.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import duration_pb2

from baton.errors import engine_failed
from baton.leg import DecodeOrder, KvAdopted
from baton.request import LegFinish, TokenLogprobs
from baton.testing import run_virtual
from baton.v1 import generation_pb2 as pb
from bench.await_points import AwaitPoints, Swept, sweep
from bench.virtual_cluster import ProcessClient, WorkerProcess
from bench.virtual_service import RULE, KeptCall, VirtualService, message_of, virtual_service
from engine.sim_tokens import simulated_answer
from router.worker_client import DecodeSink, WorkerClient

ABORT_WITHIN_S = 0.05
BALANCED_WITHIN_S = 0.2
TOKEN_COUNT = 10
GRACE_S = 0.02
"""Of resumable generations: shorter than an answer, so that it is cut off."""


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


@dataclass(frozen=True, slots=True)
class Sweep:
    """One kind of request, and the service it is asked of."""

    name: str
    prefill_count: int = 1
    decode_count: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)
    """Of the request."""
    router: Mapping[str, Any] = field(default_factory=lambda: {"placement": "split"})
    connect: Callable[[WorkerProcess], WorkerClient] = ProcessClient
    is_behind_another: bool = False
    """It waits for the only place there is."""
    grace_s: float = 0.0
    """How long its engine may go on by design."""


SWEEPS = (
    Sweep("split"),
    Sweep("local", 0, 1, router={"placement": "local"}),
    Sweep("a prompt of several steps", more={"prompt_token_count": 700}),
    Sweep("a retry after a lost leg", 1, 2, connect=LosingClient),
    Sweep("a wait in line", router={"placement": "split", "max_in_flight_count": 1}, is_behind_another=True),
    Sweep("three samples", more={"sample_count": 3, "sampling": pb.Sampling(temperature=1.0, seed=7)}),
    Sweep(
        "resumable, its grace over",
        more={"resume": pb.ResumeOptions(grace=duration_pb2.Duration(nanos=round(1e9 * GRACE_S)))},
        router={"placement": "split", "resume_grace_s": GRACE_S},
        grace_s=GRACE_S,
    ),
)


def swept(directory: Path, kind: Sweep, write_s: float = 0.0) -> Swept:
    """Sweeps every point of one kind of request, whose caller takes ``write_s`` for each message. The last request,
    which nobody cancelled, must be exact. Raises ``AssertionError`` naming the point."""
    return run_virtual(_swept(directory, kind, write_s))


async def _swept(directory: Path, kind: Sweep, write_s: float) -> Swept:
    points = AwaitPoints(asyncio.get_running_loop())
    numbers = itertools.count(1)
    calls: list[KeptCall] = []
    messages: list[pb.GenerateRequest] = []

    def request() -> pb.GenerateRequest:
        return message_of(next(numbers), **{"max_output_token_count": TOKEN_COUNT, **kind.more})

    async with virtual_service(
        directory, kind.prefill_count, kind.decode_count, connect=kind.connect, **kind.router
    ) as service:

        async def begin() -> None:
            messages.append(request())
            calls.append(KeptCall(write_s=write_s))
            await service.generate(messages[-1], calls[-1])

        async def begin_behind() -> None:
            ahead = KeptCall()
            first = asyncio.create_task(service.generate(request(), ahead))
            try:
                while not ahead.written:  # noqa: ASYNC110  # virtual time
                    await asyncio.sleep(0.001)
                await begin()
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)

        result = await sweep(
            points,
            begin_behind if kind.is_behind_another else begin,
            lambda: _has_legs(service),
            lambda: service.assert_balanced(kind.grace_s + BALANCED_WITHIN_S),
            abort_within_s=kind.grace_s + ABORT_WITHIN_S,
        )
        assert calls[-1].is_finished, calls[-1].details
        if not messages[-1].sampling.temperature:
            answer = simulated_answer(messages[-1].token_ids.ids, TOKEN_COUNT, RULE, ignore_eos=True)
            assert calls[-1].token_ids == list(answer)
        assert service.server.generation.call_count == 0
        return result


def _has_legs(service: VirtualService) -> bool:
    return any(process.books()["legs"] for process in service.processes.values())

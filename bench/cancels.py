"""Cancels at a chosen moment of a request's life, and how long the engines then hold what was its.

The harness runs a router of its own, whose clients to the workers tell it where each request is: so a cancel comes
while its prompt is computed, while its KV is held and nobody has asked for it, while its decode waits behind another
prompt, while its KV is pulled, or while it decodes. Leases are so long that no timer helps.

Simulated engines give the volume, in virtual time; real ones the proof, on a fleet of processes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from baton.leg import DecodeOrder, KvAdopted, PrefillOrder, PrefillReply, WorkerInfo, WorkerLoad
from baton.request import LegFinish, Role, TokenLogprobs
from bench.decode_events import told
from bench.fleet_under_test import FleetUnderTest
from bench.virtual_cluster import Heard, ProcessClient, VirtualCluster, virtual_cluster
from engine.sim import SimConfig
from kvtransfer.simulated import Link
from router.answering import RoutedRequest
from router.cluster_view import WorkerSpec
from router.grpc_worker_client import GrpcWorkerClient
from router.worker_client import DecodeSink, WorkerClient


class Stage(enum.Enum):
    """Where a request is when its caller leaves."""

    PREFILLING = "prefilling"
    HELD = "held"
    """Its KV is held; nobody has been asked to decode."""
    QUEUED = "queued for decode"
    """Behind another prompt, in the decode engine."""
    PULLING = "pulling"
    """From its decode's order on, in an engine with nothing else to do."""
    DECODING = "decoding"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """One cancel: ``free_after_s`` until every engine's own count was where it was before the request."""

    stage: Stage
    at: str
    """Where the request really was: the last that its worker clients saw."""
    free_after_s: float


class Watch:
    """Where one request is, as its worker clients see it. ``hold`` keeps it from going on to its decode."""

    def __init__(self) -> None:
        self.at = "placing"
        self.changed = asyncio.Event()
        self.may_decode = asyncio.Event()
        self.may_decode.set()
        self.decode_worker = ""

    def went(self, where: str) -> None:
        self.at = where
        self.changed.set()

    async def until(self, *where: str) -> None:
        while self.at not in where:
            self.changed.clear()
            await self.changed.wait()


class WatchingSink:
    """Passes on what it is told of a decode, and tells where that is."""

    def __init__(self, inner: DecodeSink, watch: Watch) -> None:
        self._inner = inner
        self._watch = watch

    def adopted(self, kv: KvAdopted) -> None:
        self._watch.went("adopted")
        self._inner.adopted(kv)

    def tokens(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self._watch.went("decoding")
        self._inner.tokens(token_ids, logprobs)

    def done(self, finish: LegFinish) -> None:
        self._watch.went("decoding")
        self._inner.done(finish)


class WatchingClient:
    """A worker's client that tells where requests are. Requests without a watch pass as they are."""

    def __init__(self, inner: WorkerClient, worker_id: str, watches: dict[str, Watch]) -> None:
        self._inner = inner
        self._worker_id = worker_id
        self._watches = watches

    def _watch(self, leg_id: str) -> Watch:
        return self._watches.get(leg_id.rpartition(".")[0]) or Watch()

    async def prefill(self, order: PrefillOrder, *, timeout_s: float) -> PrefillReply:
        watch = self._watch(order.leg_id)
        watch.went("prefilling")
        reply = await self._inner.prefill(order, timeout_s=timeout_s)
        watch.went("held")
        return reply

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        watch = self._watch(order.leg_id)
        await watch.may_decode.wait()
        watch.went("ordered")
        await self._inner.decode(order, timeout_s=timeout_s, sink=WatchingSink(sink, watch))

    async def release_kv(self, ticket_id: str, *, timeout_s: float) -> bool:
        return await self._inner.release_kv(ticket_id, timeout_s=timeout_s)

    async def extend_lease(self, ticket_id: str, lease_s: float, *, timeout_s: float) -> bool:
        return await self._inner.extend_lease(ticket_id, lease_s, timeout_s=timeout_s)

    def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        return self._inner.watch_load(interval_s)

    async def info(self, *, timeout_s: float) -> WorkerInfo:
        return await self._inner.info(timeout_s=timeout_s)

    async def close(self) -> None:
        await self._inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True, slots=True)
class Scale:
    """Lengths and moments that suit the engines: seconds, tokens."""

    prompt_token_count: int
    blocker_token_count: int
    output_token_count: int
    prefill_s_per_token: float
    longest_pull_s: float
    longest_decode_s: float
    poll_s: float
    pause_s: float
    """Between two cancels, where an engine's answer does not wait for the step it is in."""
    give_up_s: float = 60.0


SIMULATED = Scale(200, 700, 40, 0.001, 0.05, 0.3, 0.001, 1.0)
REAL = Scale(300, 700, 48, 0.0015, 0.05, 0.5, 0.005, 0.0)


class CancelDrill:
    """``ask`` runs a request through the harness's router; ``is_at_baseline`` asks every engine itself."""

    def __init__(
        self,
        cluster: VirtualCluster,
        watches: dict[str, Watch],
        is_at_baseline: Callable[[], Awaitable[bool]],
        scale: Scale,
        rng: random.Random,
    ) -> None:
        self._cluster = cluster
        self._watches = watches
        self._is_at_baseline = is_at_baseline
        self._scale = scale
        self._rng = rng

    async def run(self, stage: Stage) -> Cancelled:
        """One request, alone but for the prompt it may have to wait behind, cancelled at ``stage``."""
        scale, rng = self._scale, self._rng
        request = self._request(rng.randint(scale.prompt_token_count // 4, scale.prompt_token_count))
        watch = self._watches[request.generation_id] = Watch()
        if stage in (Stage.HELD, Stage.QUEUED):
            watch.may_decode.clear()
        tasks = [asyncio.create_task(self._ask(request))]
        try:
            if stage is Stage.PREFILLING:
                await self._reached(tasks[0], watch, "prefilling")
                await asyncio.sleep(rng.random() * scale.prefill_s_per_token * len(request.prompt_token_ids))
            else:
                await self._reached(tasks[0], watch, "held")
            match stage:
                case Stage.HELD:
                    await asyncio.sleep(rng.random() * scale.longest_decode_s / 2)
                case Stage.QUEUED:
                    tasks += self._blockers()
                    await asyncio.sleep(scale.longest_pull_s)  # they are being computed
                    watch.may_decode.set()
                    await self._reached(tasks[0], watch, "ordered")
                    await asyncio.sleep(rng.random() * scale.longest_pull_s)
                case Stage.PULLING:
                    await self._reached(tasks[0], watch, "ordered")
                    await asyncio.sleep(rng.random() * scale.longest_pull_s)
                case Stage.DECODING:
                    await self._reached(tasks[0], watch, "adopted", "decoding")
                    await asyncio.sleep(rng.random() * scale.longest_decode_s)
            at = "finished" if tasks[0].done() else watch.at
            loop = asyncio.get_running_loop()
            began_at = loop.time()
            for task in tasks:
                task.cancel()
            free_after_s = await self._free_after_s(began_at)
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(scale.pause_s)
            return Cancelled(stage, at, free_after_s)
        finally:
            self._watches.pop(request.generation_id, None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _request(self, token_count: int) -> RoutedRequest:
        request = self._cluster.request(token_count, self._scale.output_token_count)
        return dataclasses.replace(request, ignore_eos=True)

    def _blockers(self) -> list[asyncio.Task[Any]]:
        """A long prompt on each decode worker, asked past the router: whichever decodes next waits behind it."""
        tasks = []
        for process in self._decode_clients():
            request = self._request(self._scale.blocker_token_count)
            tasks.append(asyncio.create_task(_decode_locally(process, request)))
        return tasks

    def _decode_clients(self) -> Sequence[WorkerClient]:
        view = self._cluster.roster.view()
        return [self._cluster.roster.client(each.identity) for each in view.workers if each.role is Role.DECODE]

    async def _ask(self, request: RoutedRequest) -> Heard:
        heard = await self._cluster.ask(request)
        assert heard.error is None, heard.error
        return heard

    async def _reached(self, asking: asyncio.Task[Heard], watch: Watch, *where: str) -> None:
        """Returns once the request is there, or is over before anybody could leave."""
        reaching = asyncio.create_task(watch.until(*where))
        try:
            async with asyncio.timeout(self._scale.give_up_s):
                await asyncio.wait((reaching, asking), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reaching.cancel()
            with suppress(asyncio.CancelledError):
                await reaching

    async def _free_after_s(self, began_at: float) -> float:
        loop = asyncio.get_running_loop()
        while not await self._is_at_baseline():
            if loop.time() - began_at > self._scale.give_up_s:
                raise AssertionError(f"blocks are still in use {self._scale.give_up_s:g} s after a cancel")
            await asyncio.sleep(self._scale.poll_s)
        return loop.time() - began_at


async def _decode_locally(client: WorkerClient, request: RoutedRequest) -> None:
    from baton.request import EngineStop, Sampling

    order = DecodeOrder(
        leg_id=f"{request.generation_id}.1",
        prompt_token_ids=request.prompt_token_ids,
        sampling=Sampling(),
        stop=EngineStop(2, ignore_eos=True),
    )
    async with aclosing(told(client, order, 60.0)) as events:
        async for _ in events:
            pass


async def simulated_cancels(count: int, seed: int) -> list[Cancelled]:
    """``count`` cancels on 2P+2D, the stages in turn. In virtual time."""
    watches: dict[str, Watch] = {}
    rng = random.Random(seed)  # noqa: S311 reproducible moments

    def connect(process: Any) -> Any:
        return WatchingClient(ProcessClient(process), process.worker_id, watches)

    async with virtual_cluster(2, 2, connect=connect) as cluster:
        cluster.network.link = Link(latency_s=0.005, bytes_per_s=1e8)

        async def is_at_baseline() -> bool:
            return not any(any(process.books().values()) for process in cluster.processes.values())

        drill = CancelDrill(cluster, watches, is_at_baseline, SIMULATED, rng)
        stages = list(Stage)
        return [await drill.run(stages[number % len(stages)]) for number in range(count)]


@asynccontextmanager
async def own_router(fleet: FleetUnderTest) -> AsyncIterator[tuple[VirtualCluster, dict[str, Watch]]]:
    """A router in this process in front of a fleet's workers, each of whose clients is watched."""
    watches: dict[str, Watch] = {}
    specs = {
        worker_id: WorkerSpec(worker_id, str(each["address"]), Role(str(each["role"])), str(each["epoch"]))
        for worker_id, each in fleet.endpoints().items()
    }
    cluster = FleetsRouter(SimConfig(engine_id="none"), specs, fleet.secret, watches)
    cluster.tell_fleet()
    try:
        await cluster.until_ready()
        yield cluster, watches
    finally:
        await cluster.close()


class FleetsRouter(VirtualCluster):
    """The router's parts in real time, and no processes of its own."""

    clock_slack_s = 60.0

    def __init__(
        self, config: SimConfig, specs: dict[str, WorkerSpec], secret: bytes, watches: dict[str, Watch]
    ) -> None:
        super().__init__(
            config,
            connect_spec=lambda spec: WatchingClient(GrpcWorkerClient(spec.address, secret), spec.worker_id, watches),
        )
        self._specs = specs

    def tell_fleet(self) -> None:
        self.roster.set_workers(list(self._specs.values()))


async def real_cancels(fleet: FleetUnderTest, count: int, seed: int) -> list[Cancelled]:
    """``count`` cancels on a running fleet, the stages in turn; every engine counts its own blocks each time."""
    rng = random.Random(seed)  # noqa: S311 reproducible moments

    async def is_at_baseline() -> bool:
        return not any(
            each.running_count or each.waiting_count or each.used_block_count or each.held_lease_count
            for each in (await fleet.books()).values()
        )

    async with own_router(fleet) as (cluster, watches):
        drill = CancelDrill(cluster, watches, is_at_baseline, REAL, rng)
        stages = list(Stage)
        return [await drill.run(stages[number % len(stages)]) for number in range(count)]


def rows_of(cancels: Sequence[Cancelled], engines: str) -> list[dict[str, Any]]:
    """Percentiles by stage, in milliseconds."""
    rows = []
    for stage in Stage:
        of_stage = [each for each in cancels if each.stage is stage]
        if not of_stage:
            continue
        times = sorted(each.free_after_s for each in of_stage)
        seen = Counter(each.at for each in of_stage)
        rows.append(
            {
                "engines": engines,
                "cancelled while": stage.value,
                "cancels": len(of_stage),
                "p50, ms": _ms(times, 0.50),
                "p99, ms": _ms(times, 0.99),
                "max, ms": _ms(times, 1.0),
                "really at": ", ".join(f"{name} {number}" for name, number in sorted(seen.items())),
            }
        )
    return rows


def _ms(times: Sequence[float], share: float) -> str:
    """Nearest rank."""
    index = min(len(times) - 1, max(0, round(share * len(times) + 0.5) - 1))
    return f"{times[index] * 1000:.1f}"

"""A whole Baton in virtual time, as a configuration file describes it and as fast as a profile says its engines are.

The router's parts, its limits and the workers are the real ones; only the engines compute nothing, and calls take the
time that the profile says in place of crossing a wire. Owns the composition and the books of tokens; never decides
where or when anything runs.

    caller --admit--> engine queue [engine: steps, pulls] --first_token/token--> caller
                                      '--handoff--> decode engine's queue
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from baton.leg import DecodeOrder, PrefillOrder, PrefillReply, WorkerLoad
from baton.metrics import RouterMetrics, WorkerMetrics
from baton.request import Role
from bench.results.records import TimelineSample
from bench.simulation.profile import KINDS, Line, Noise, Profile
from bench.virtual_cluster import ProcessClient, WorkerProcess
from engine.cost import Link
from engine.load_board import LoadBoard
from engine.sim import SimConfig, SimEngine, SimNetwork
from engine.sim_pace import Machine, Pace
from fleet.config import FleetConfig
from router.admission import Admission, AdmissionLimits
from router.flight import FlightLimits
from router.placement import PlacementPolicy
from router.relay import Relay
from router.roster import Roster, RosterLimits
from router.validation import ModelLimits
from router.worker_client import DecodeSink, tell

SAMPLE_INTERVAL_S = 1.0


class Delays:
    """What the profile says beside steps and pulls, drawn with its noise. Seeded, so that a run can be repeated."""

    def __init__(self, profile: Profile, rng: random.Random) -> None:
        self._overheads = profile.overheads
        self._noise = profile.overhead_noise
        self._rng = rng

    def admit_s(self, prompt_token_count: int) -> float:
        return self._drawn("admit", self._overheads.admit, prompt_token_count)

    def reply_s(self, prompt_token_count: int) -> float:
        """The part of the way that a first token and a handoff have in common: from the prefill engine to the router.
        Only their sums are measured; where it ends changes neither."""
        overheads = self._overheads
        return min(overheads.first_token.at(prompt_token_count), overheads.handoff.at(prompt_token_count))

    def rest_of_handoff_s(self, prompt_token_count: int) -> float:
        drawn_s = self._drawn("handoff", self._overheads.handoff, prompt_token_count)
        return max(0.0, drawn_s - self.reply_s(prompt_token_count))

    def first_token_s(self, prompt_token_count: int) -> float:
        return self._drawn("first_token", self._overheads.first_token, prompt_token_count)

    def tokens_s(self, sequence_count: int, count: int, rng: random.Random) -> list[float]:
        """Of ``count`` tokens. ``rng``: of the answer, so that it does not matter in which bundles they are said."""
        way_s, noise = self._overheads.token.at(sequence_count), self._noise.get("token")
        return [way_s * noise.at(rng.random()) for _ in range(count)] if noise is not None else [way_s] * count

    def _drawn(self, name: str, line: Line, units: int) -> float:
        noise = self._noise.get(name)
        return line.at(units) * (1.0 if noise is None else noise.at(self._rng.random()))


@dataclass(slots=True)
class _Told:
    prompt_token_count: int
    rng: random.Random
    at_s: list[float] = field(default_factory=list)


class TokenBook:
    """When each token of each answer reaches its caller: a step's end and the way from there.

    The engine says tokens as it computes them, several steps at once where nothing depends on them; their times come
    from here. Entries live as long as their request.
    """

    def __init__(self, delays: Delays, seed: int) -> None:
        self._delays = delays
        self._seed = seed
        self._told: dict[str, _Told] = {}
        self._exact: set[str] = set()

    def open(self, generation_id: str, prompt_token_count: int, *, is_exact: bool) -> None:
        """``is_exact``: the caller may leave at any moment, so nothing of this answer is computed ahead."""
        self._told[generation_id] = _Told(prompt_token_count, _rng(self._seed, generation_id))
        if is_exact:
            self._exact.add(generation_id)

    def close(self, generation_id: str) -> None:
        self._told.pop(generation_id, None)
        self._exact.discard(generation_id)

    def is_exact(self, leg_id: str) -> bool:
        return leg_id.rpartition(".")[0] in self._exact

    def tokens(self, leg_id: str, first: int, ends_at: Sequence[float], sequence_count: int) -> None:
        """Answers' tokens from index ``first``, one of each step. What an attempt that was given up said of them and
        of those after them no longer counts."""
        told = self._told.get(leg_id.rpartition(".")[0])
        if told is None:
            return  # its caller left
        del told.at_s[first:]
        if first == 0:
            told.at_s.append(ends_at[0] + self._delays.first_token_s(told.prompt_token_count))
            ends_at = ends_at[1:]
        latest = told.at_s[-1] if told.at_s else 0.0
        ways_s = self._delays.tokens_s(sequence_count, len(ends_at), told.rng)
        for ended_at, way_s in zip(ends_at, ways_s, strict=True):
            latest = max(latest, ended_at + way_s)  # a stream does not overtake itself
            told.at_s.append(latest)

    def times(self, generation_id: str, first: int, count: int) -> list[float]:
        """Of ``count`` tokens of the answer from index ``first``."""
        return self._told[generation_id].at_s[first : first + count]


class WireClient(ProcessClient):
    """The router's client of a worker in the same process, with the time that the way takes. Without deadlines of its
    own for prefills and decodes: the router's are there, of the request, of prefills and of silences."""

    def __init__(self, process: WorkerProcess, delays: Delays) -> None:
        super().__init__(process)
        self._worker = process
        self._delays = delays

    async def prefill(self, order: PrefillOrder, *, timeout_s: float) -> PrefillReply:
        count = len(order.prompt_token_ids)
        await _sleep(self._delays.admit_s(count))
        self._check_there()
        reply = await self._worker.prefill.prefill(order)
        await _sleep(self._delays.reply_s(count))
        return reply

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        count = len(order.prompt_token_ids)  # with a ticket, the first token is in it
        await _sleep(self._delays.rest_of_handoff_s(count - 1) if order.ticket else self._delays.admit_s(count))
        self._check_there()
        await tell(self._worker.decode.decode(order), sink)


class SimulatedCluster:
    """Started by ``simulated_cluster``."""

    def __init__(self, config: FleetConfig, profile: Profile, seed: int, look_ahead_step_count: int) -> None:
        router = config.router
        self.config = config
        self.delays = Delays(profile, _rng(seed, "ways"))
        self.book = TokenBook(self.delays, seed)
        self.processes: dict[str, WorkerProcess] = {}
        self._profile = profile
        self._seed = seed
        self._look_ahead_step_count = look_ahead_step_count
        contention = profile.contention
        self._machine = Machine(
            lambda own, others: contention.share(is_prefill=own, neighbour_is_prefill=others),
        )
        self._network = SimNetwork(_link(profile, _rng(seed, "link")), spans_processes=False)
        # As router/server.py makes them from the same file.
        self.roster = Roster(
            lambda spec: WireClient(self.processes[spec.worker_id], self.delays),
            RosterLimits(
                load_interval_s=router.load_interval_s,
                silence_s=router.worker_silence_s,
                lost_s=2 * router.worker_silence_s,
            ),
        )
        self.admission = Admission(
            self.roster,
            limits=AdmissionLimits(
                queue_limit=router.queue_limit,
                max_in_flight_count=router.max_in_flight_count,
                max_wait_s=router.max_queue_wait_s,
                no_worker_s=router.max_no_worker_wait_s,
            ),
            policy=PlacementPolicy(mode=router.placement, local_prompt_token_count=router.local_prompt_token_count),
            rng=_rng(seed, "placement"),
        )
        self.relay = Relay(
            self.roster,
            self.admission,
            limits=FlightLimits(
                max_attempt_count=router.max_attempt_count,
                lease_s=router.lease_s,
                prefill_timeout_s=router.prefill_timeout_s,
                gap_timeout_s=router.gap_timeout_s,
            ),
            metrics=_UnscrapedRouter(CollectorRegistry()),
        )

    @property
    def limits(self) -> ModelLimits:
        contexts = [process.info.max_context_token_count for process in self.processes.values()]
        vocab_size = next(iter(self.processes.values())).info.vocab_size
        wanted = self.config.router.max_context_token_count
        return ModelLimits(
            self.config.model.name, vocab_size, min(contexts if wanted is None else [wanted, *contexts])
        )

    async def start(self) -> None:
        for role in Role:
            for index in range(self.config.pools[role].count):
                await self._launch(f"{role.value[0]}{index}", role)
        self.roster.set_workers([process.spec for process in self.processes.values()])
        changed = asyncio.Event()
        self.roster.on_change(changed.set)
        while not all(worker.is_ready for worker in self.roster.view().workers):
            changed.clear()
            await changed.wait()

    async def close(self) -> None:
        await self.relay.close()
        await self.roster.close()
        for process in self.processes.values():
            await process.close()

    def samples(self, at_s: float) -> list[TimelineSample]:
        loads = [(worker_id, process.board.current()) for worker_id, process in self.processes.items()]
        return [
            TimelineSample(
                at_s=at_s,
                source=worker_id,
                running_count=load.running_count,
                waiting_count=load.waiting_count,
                kv_used_share=load.used_block_count / load.block_count,
            )
            for worker_id, load in loads
        ]

    async def _launch(self, worker_id: str, role: Role) -> None:
        noise = self._profile.noise
        sim = SimConfig.from_engine_config(
            self.config.engines[role],
            engine_id=f"{worker_id}.e1",
            overrides={**self.config.simulated[role], "cost": self._profile.costs[role.value]},
        )
        pulled_step = self._profile.overheads.pulled_step
        rngs = {kind: _rng(self._seed, f"{worker_id}/{kind}") for kind in KINDS}
        pace = Pace(
            machine=self._machine,
            ratio=lambda kind: noise.get(kind, _QUIET).at(rngs[kind].random()),
            pulled_step_s=pulled_step.at,
            look_ahead_step_count=self._look_ahead_step_count,
            is_exact=self.book.is_exact,
            on_tokens=self.book.tokens,
        )
        process = WorkerProcess(worker_id, role, "e1", SimEngine(sim, self._network, pace))
        metrics = _UnscrapedWorker(CollectorRegistry(), worker_id)
        process.board = LoadBoard(process.engine, [process.prefill, process.decode], epoch="e1", metrics=metrics)
        await process.start()
        self.processes[worker_id] = process


@asynccontextmanager
async def simulated_cluster(
    config: FleetConfig, profile: Profile, *, seed: int, look_ahead_step_count: int = 32
) -> AsyncIterator[SimulatedCluster]:
    """All workers of ``config``, ready. To be used on a loop in virtual time."""
    cluster = SimulatedCluster(config, profile, seed, look_ahead_step_count)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.close()


@asynccontextmanager
async def sampling(
    cluster: SimulatedCluster, started_at_s: list[float], samples: list[TimelineSample]
) -> AsyncIterator[None]:
    """Looks at every worker once a second meanwhile. ``started_at_s``: loop time of the run's start, once known."""

    async def look() -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            if started_at_s:
                samples.extend(cluster.samples(loop.time() - started_at_s[0]))

    task = asyncio.create_task(look(), name="timeline of the simulation")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class _UnscrapedRouter(RouterMetrics):
    """Nobody scrapes a simulated process, and counting for Prometheus would be a tenth of the simulation's time."""

    def request_ended(self, *_: Any, **__: Any) -> None:
        pass

    def tokens_sent(self, token_count: int, gap_s: float | None) -> None:
        pass

    def set_ready_workers(self, counts: Iterable[tuple[str, int]]) -> None:
        pass


class _UnscrapedWorker(WorkerMetrics):
    """Its load is told ten times a second."""

    def set_load(self, load: WorkerLoad) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _NoisyLink(Link):
    ratio: Callable[[], float] = lambda: 1.0
    """Drawn for each transfer, of its time to the model's."""

    def transfer_s(self, byte_count: int) -> float:
        return self.ratio() * Link.transfer_s(self, byte_count)


def _link(profile: Profile, rng: random.Random) -> Link:
    noise = profile.overhead_noise.get("pull")
    if noise is None:
        return profile.link
    return _NoisyLink(profile.link.latency_s, profile.link.bytes_per_s, lambda: noise.at(rng.random()))


_QUIET = Noise()


def _rng(seed: int, part: str) -> random.Random:
    """One stream of chance a part, so that a change to one moves no other."""
    return random.Random(f"{seed}/{part}")  # noqa: S311 a reproducible simulation


async def _sleep(delay_s: float) -> None:
    if delay_s > 0:
        await asyncio.sleep(delay_s)

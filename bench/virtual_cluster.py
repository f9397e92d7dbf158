"""A whole Baton in virtual time: the real router in front of real workers on simulated engines, without a wire.

For the scenario tests and for soaks. The lease is 600 s and the books must balance a second after the last request,
so that no timer can do what an explicit release must.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from baton.errors import BatonError
from baton.leg import WorkerInfo, WorkerLoad
from baton.metrics import RouterMetrics, WorkerMetrics
from baton.request import Role
from baton.timeline import PHASES
from decode_worker.worker import DecodeWorker
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.load_board import LoadBoard
from engine.service import worker_info
from engine.sim import SimConfig, SimEngine, SimNetwork, TokenRule, simulated_answer
from prefill_worker.config import PrefillLimits
from prefill_worker.worker import PrefillWorker
from router.admission import Admission, AdmissionLimits
from router.answering import Admitted, Completed, Piece, RoutedRequest
from router.cluster_view import WorkerIdentity, WorkerSpec
from router.flight import FlightLimits
from router.placement import PlacementPolicy
from router.relay import Relay
from router.roster import Roster, RosterLimits
from router.worker_client import InProcessWorkerClient

SECRET = bytes(range(32))
LEASE_S = 600.0
BLOCK = 16
CONTEXT = 1024
RULE = TokenRule(vocab_size=500, special_token_count=3)
COST = CostModel(
    prefill=PrefillCost(base_s=0.010, per_token_s=0.001, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=0.010, per_context_token_s=0.0, per_sequence_s=0.0),
)
SIM = SimConfig(
    engine_id="set-later",
    block_token_count=BLOCK,
    block_count=256,
    max_context_token_count=CONTEXT,
    enable_prefix_caching=False,  # cached blocks count as used: the books could not be seen to balance
    cost=COST,
    tokens=RULE,
)


class WorkerProcess:
    """What a worker process is, without the process. ``die`` is SIGKILL, ``stop`` SIGSTOP, ``go_on`` SIGCONT.

    ``go_silent``: its load is told no more, while it computes on and its streams flow; ``go_on`` ends that, too.
    """

    def __init__(self, worker_id: str, role: Role, epoch: str, engine: Any) -> None:
        """``engine``: a ``SimEngine``, or a started real one that is not asked to start, die, stop or tell books."""
        self.worker_id = worker_id
        self.role = role
        self.epoch = epoch
        self.engine = engine
        self.registry = CollectorRegistry()
        metrics = WorkerMetrics(self.registry, worker_id)
        common: dict[str, Any] = {"worker_id": worker_id, "epoch": epoch, "secret": SECRET, "metrics": metrics}
        self.prefill = PrefillWorker(self.engine, limits=PrefillLimits(max_hold_s=LEASE_S), **common)
        self.decode = DecodeWorker(self.engine, **common)
        self.board = LoadBoard(self.engine, [self.prefill, self.decode], epoch=epoch, metrics=metrics)
        self.info: WorkerInfo = worker_info(self.engine.info, worker_id=worker_id, epoch=epoch, role=role)
        self.is_dead = False
        self._is_going = asyncio.Event()
        self._is_going.set()
        self._reaper: asyncio.Task[None] | None = None

    @property
    def spec(self) -> WorkerSpec:
        return WorkerSpec(self.worker_id, f"{self.worker_id}:1", self.role, self.epoch)

    @property
    def identity(self) -> WorkerIdentity:
        return WorkerIdentity(self.worker_id, self.epoch)

    async def start(self) -> None:
        await self.engine.start()
        self.start_reaper()

    def start_reaper(self) -> None:
        self._reaper = asyncio.create_task(self.prefill.run(), name=f"reaper {self.worker_id}")

    def die(self) -> None:
        self.is_dead = True
        self.engine.kill()

    def stop(self) -> None:
        self._is_going.clear()
        self.engine.hang()

    def go_silent(self) -> None:
        self._is_going.clear()

    def go_on(self) -> None:
        self._is_going.set()
        self.engine.resume()

    async def going(self) -> None:
        await self._is_going.wait()

    def books(self) -> dict[str, int]:
        if self.is_dead:
            return {"legs": self.board.current().running_count}  # all else died with the process
        load = self.board.current()
        return {
            "legs": load.running_count + load.waiting_count,
            "leases": load.held_lease_count,
            "held": self.engine.held_count,
            "blocks": load.used_block_count,
            "promised blocks": load.reserved_block_count,
        }

    async def close(self) -> None:
        await self.decode.close()
        await self.prefill.close()
        if self._reaper is not None:
            await self._reaper
        await self.engine.close()


class ProcessClient(InProcessWorkerClient):
    """As over a wire: a dead process breaks the watch at once, a stopped one says nothing."""

    def __init__(self, process: WorkerProcess) -> None:
        super().__init__(
            process.info, process.prefill, process.decode, process.board.current, is_gone=lambda: process.is_dead
        )
        self._process = process

    async def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        async with aclosing(super().watch_load(interval_s)) as loads:
            async for load in loads:
                await self._process.going()
                yield load


class TokenAnswer:
    """Text is the token ids in words; ``stop`` is a sequence of tokens to stop at."""

    def __init__(self, stop: Sequence[int] = ()) -> None:
        self._stop = tuple(stop)
        self._tokens: list[int] = []

    def push(self, token_ids: tuple[int, ...]) -> Piece:
        first = len(self._tokens)
        for count, token_id in enumerate(token_ids, start=1):
            self._tokens.append(token_id)
            if self._stop and tuple(self._tokens[-len(self._stop) :]) == self._stop:
                return Piece(first, token_ids[:count], "", "stop")
        return Piece(first, token_ids, "", None)

    def flush(self) -> Piece:
        return Piece(len(self._tokens), (), "", None)


@dataclass
class Heard:
    """What one caller got."""

    tokens: list[int] = field(default_factory=list)
    piece_count: int = 0
    is_admitted: bool = False
    completed: Completed | None = None
    error: BatonError | None = None
    ended_at: float = 0.0

    @property
    def report(self) -> Any:
        assert self.completed is not None, self.error
        return self.completed.report


class VirtualCluster:
    clock_slack_s = 1e-9
    """Between an answer's end and its caller's hearing of it: none, but for clocks that go on by themselves."""

    def __init__(self, config: SimConfig, **options: Any) -> None:
        self.network = SimNetwork(spans_processes=False, misfortune=options.pop("misfortune", None))
        connect = options.pop("connect", ProcessClient)
        connect_spec = options.pop("connect_spec", lambda spec: connect(self.processes[spec.worker_id]))
        self.config = config
        self.processes: dict[str, WorkerProcess] = {}
        self.dead: list[WorkerProcess] = []
        self._epochs = itertools.count(1)
        self._requests = itertools.count(1)
        self.registry = CollectorRegistry()
        self.roster = Roster(connect_spec, options.pop("roster", RosterLimits()))
        self.admission = Admission(
            self.roster,
            rng=random.Random(7),  # noqa: S311 a reproducible choice among equals
            limits=options.pop("admission", AdmissionLimits()),
            policy=options.pop("policy", PlacementPolicy()),
        )
        self.relay = Relay(
            self.roster,
            self.admission,
            limits=options.pop("flight", FlightLimits(lease_s=LEASE_S)),
            release_limits=options.pop("release", None),
            metrics=RouterMetrics(self.registry),
        )
        assert not options, f"unknown options {options}"

    # The fleet

    async def launch(self, worker_id: str, role: Role) -> WorkerProcess:
        """A process, or its successor; the router learns of it."""
        before = self.processes.get(worker_id)
        if before is not None:
            self.dead.append(before)
        epoch = f"e{next(self._epochs)}"
        engine = SimEngine(dataclasses.replace(self.config, engine_id=f"{worker_id}.{epoch}"), self.network)
        process = WorkerProcess(worker_id, role, epoch, engine)
        await process.start()
        self.processes[worker_id] = process
        self.tell_fleet()
        return process

    def tell_fleet(self) -> None:
        self.roster.set_workers([process.spec for process in self.processes.values()])

    async def until_ready(self) -> None:
        changed = asyncio.Event()
        self.roster.on_change(changed.set)
        while not all(worker.is_ready for worker in self.roster.view().workers):
            changed.clear()
            await changed.wait()

    # A caller

    def request(self, prompt_token_count: int = 100, max_output_token_count: int = 8, **more: Any) -> RoutedRequest:
        number = next(self._requests)
        prompt = tuple(3 + (7 * number + 11 * index) % 490 for index in range(prompt_token_count))
        request = RoutedRequest(f"g{number}", prompt, max_output_token_count, eos_token_ids=(2,))
        return dataclasses.replace(request, **more)

    def expected(self, request: RoutedRequest) -> list[int]:
        """The answer of one engine that nothing happens to."""
        tokens = simulated_answer(
            request.prompt_token_ids,
            request.max_output_token_count,
            self.config.tokens,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            max_context_token_count=self.config.max_context_token_count,
        )
        return list(tokens)

    async def ask(
        self,
        request: RoutedRequest,
        *,
        stop: Sequence[int] = (),
        timeout_s: float = 300.0,
        heard: Heard | None = None,
        on_token: Any = None,
    ) -> Heard:
        """Consumes one answer to its end, checking the stream's grammar. ``on_token(count)`` after each piece."""
        heard = heard if heard is not None else Heard()
        loop = asyncio.get_running_loop()
        received_at = loop.time()
        events = self.relay.run(request, TokenAnswer(stop), received_at + timeout_s, received_at=received_at)
        try:
            async with aclosing(events):
                async for event in events:
                    assert heard.completed is None, "an event after the last"
                    match event:
                        case Admitted():
                            assert not heard.is_admitted
                            heard.is_admitted = True
                        case Piece():
                            assert heard.is_admitted
                            assert event.first_token_index == len(heard.tokens), "a gap or a repeat"
                            heard.tokens.extend(event.token_ids)
                            heard.piece_count += 1
                            if on_token is not None:
                                on_token(len(heard.tokens))
                        case Completed():
                            heard.completed = event
        except BatonError as error:
            heard.error = error
        finally:
            heard.ended_at = loop.time()
        if heard.completed is not None:
            durations = heard.completed.report.durations
            assert abs(sum(durations[phase] for phase in PHASES) - durations.total_s) < 1e-9
            assert abs(durations.total_s - (heard.ended_at - received_at)) < self.clock_slack_s
            assert heard.completed.usage.output_token_count == len(heard.tokens)
        return heard

    async def exact(self, request: RoutedRequest, **options: Any) -> Heard:
        """As ``ask``, and the answer must be complete and exactly the expected one."""
        heard = await self.ask(request, **options)
        assert heard.error is None, heard.error
        assert heard.tokens == self.expected(request)
        return heard

    # The books

    def books(self) -> dict[str, dict[str, int]]:
        books = {process.identity.worker_id: process.books() for process in self.processes.values()}
        assigned = sum(view.assigned.request_count for view in self.roster.view().workers)
        books["router"] = {
            "in flight": self.relay.in_flight_count,
            "places": self.admission.in_flight_count,
            "waiting": self.admission.waiting_count,
            "waiting for room": self.admission.room_waiting_count,
            "releases": self.relay.releasing_count,
            "assigned": assigned,
        }
        return books

    async def assert_balanced(self, within_s: float = 1.0) -> None:
        await asyncio.sleep(within_s)
        unbalanced = {name: book for name, book in self.books().items() if any(book.values())}
        assert not unbalanced, f"{unbalanced} {self.relay} {self.admission} {self.roster}"

    async def close(self) -> None:
        await self.relay.close()
        await self.roster.close()
        for process in [*self.processes.values(), *self.dead]:
            process.go_on()
            await process.close()


@asynccontextmanager
async def virtual_cluster(
    prefill_count: int = 1,
    decode_count: int = 1,
    *,
    sim: dict[str, Any] | None = None,
    rest_s: float = 1.0,
    **options: Any,
) -> AsyncIterator[VirtualCluster]:
    """``sim``: changes to every engine; ``options``: limits and policy of the router's parts, ``misfortune`` of the
    network, ``connect`` from a process to its client. At the end the books must balance within ``rest_s``."""
    cluster = VirtualCluster(dataclasses.replace(SIM, **(sim or {})), **options)
    try:
        for role, count in ((Role.PREFILL, prefill_count), (Role.DECODE, decode_count)):
            for index in range(count):
                await cluster.launch(f"{role.value}-{index}", role)
        await cluster.until_ready()
        yield cluster
        await cluster.assert_balanced(rest_s)
    finally:
        await cluster.close()

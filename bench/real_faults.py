"""Real engines, a tiny model, and transfers that go wrong: every answer must be what one engine alone says.

The real router and the real workers in one process, two engine processes below them. The oracle is one of these
engines computing every prompt itself, before anything is transferred. Nothing judges by the clock.

One pair of engines meets everything, cell by cell: what goes wrong next stands in a file that the engines look at
(``faulty_connector.py``). The reader of KV meets faults of its first contacts, reads, polls, notices and releases of
handles; the holder meets those of first contacts as the one that answers, of notices, and of the calls that release
what it holds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from baton.errors import BatonError, engine_failed
from baton.leg import DecodeDone, KvAdopted, Stepped
from baton.request import EngineStop, Role
from bench.real_fleet import free_ports
from bench.tiny_model import VOCAB_SIZE
from bench.virtual_cluster import Heard, ProcessClient, VirtualCluster, WorkerProcess
from engine.config import EngineConfig, EngineIdentity
from engine.protocol import DecodeJob
from engine.sim import SimConfig
from kvtransfer.faults import Fault, FaultDice, FaultPlan, Operation
from router.answering import RoutedRequest
from router.flight import FlightLimits
from router.relay import ReleaseLimits

PULL_TIMEOUT_S = 0.3
STUCK_S = 1.2
"""Beyond the deadlines of a pull and of a handshake."""
HANG_S = 0.02
LEASE_S = 3.0
RELEASE_LIMITS = ReleaseLimits(timeout_s=0.3, attempt_count=2, pause_s=0.05)
REST_POLL_S = 0.05
BLOCK = 32
PROBABILITIES = (1 / 16, 1 / 4)
METRICS = (
    "baton_requests_total",
    "baton_recomputes_total",
    "baton_lost_legs_total",
    "baton_worker_refused_tickets_total",
    "baton_worker_expired_leases_total",
    "baton_worker_failed_releases_total",
)
READER, HOLDER = "decode-0", "prefill-0"
OPERATIONS = {
    READER: (Operation.HANDSHAKE, Operation.POST, Operation.POLL, Operation.NOTIFY, Operation.RELEASE),
    HOLDER: (Operation.HANDSHAKE, Operation.NOTIFY, Operation.RELEASE),
}


@dataclass(frozen=True, slots=True)
class Question:
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    answer: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cell:
    """One operation that goes wrong in one way, this often, in one of the engines."""

    worker_id: str
    operation: Operation
    fault: Fault
    probability: float

    def __str__(self) -> str:
        side = "reader" if self.worker_id == READER else "holder"
        return f"{side}: {self.operation.value} {self.fault.value}, 1/{round(1 / self.probability)}"

    @property
    def is_of_the_release_call(self) -> bool:
        """The holder gives no handles back: its release is the router's call that lets go of held KV."""
        return self.worker_id == HOLDER and self.operation is Operation.RELEASE

    def plan(self, seed: int) -> FaultPlan:
        return FaultPlan(
            allow_faults=True,
            probability=self.probability,
            operations=[self.operation.value],
            kinds=[self.fault.value],
            seed=seed,
            hang_s=HANG_S,
            stuck_s=STUCK_S,
        )


def all_cells() -> Iterator[Cell]:
    """Both frequencies of each in turn, so that a run cut short has seen a bit of everything."""
    for probability in reversed(PROBABILITIES):
        for worker_id, operations in OPERATIONS.items():
            for operation, fault in itertools.product(operations, Fault):
                yield Cell(worker_id, operation, fault, probability)


@dataclass(slots=True)
class Tally:
    """What many requests came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    exact_count: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def request_count(self) -> int:
        return sum(self.outcomes.values())

    def add(self, other: Tally) -> None:
        self.outcomes += other.outcomes
        self.exact_count += other.exact_count
        self.attempts += other.attempts
        self.modes += other.modes
        self.reasons += other.reasons
        self.wrong += other.wrong


@dataclass(frozen=True, slots=True)
class Usage:
    """What an engine process has of its operating system."""

    thread_count: int
    file_count: int


class FaultyCluster(VirtualCluster):
    """One prefill and one decode worker on real engines, in real time."""

    clock_slack_s = 60.0

    def __init__(self, folder: Path) -> None:
        self.release_dice = FaultDice(FaultPlan(allow_faults=True, probability=0.0))
        super().__init__(
            SimConfig(engine_id="none"),
            connect=lambda process: _StruckClient(process, self.release_dice),
            flight=FlightLimits(lease_s=LEASE_S),
            release=RELEASE_LIMITS,
        )
        self._folder = folder

    async def adopt(self, worker_id: str, role: Role, engine: Any) -> None:
        process = WorkerProcess(worker_id, role, f"e{next(self._epochs)}", engine)
        process.start_reaper()
        self.processes[worker_id] = process
        self.tell_fleet()

    def tell_engine(
        self,
        worker_id: str,
        faults: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """What it is to meet from now on. ``faults`` as ``EngineConfig.transfer_faults``; None: nothing. ``more``:
        see ``bench.faulty_connector.Told``."""
        tell_engine(self._folder, worker_id, faults, **more)

    def hold_for(self, lease_s: float) -> None:
        """KV of requests that come from now on."""
        self.relay._limits = FlightLimits(lease_s=lease_s)

    def begin(self, cell: Cell, seed: int) -> None:
        plan = cell.plan(seed)
        if cell.is_of_the_release_call:
            self.release_dice.follow(plan)
            return
        table = {
            "probability": plan.probability, "operations": plan.operations, "kinds": plan.kinds, "seed": seed,
            "hang_s": HANG_S, "stuck_s": STUCK_S,
        }  # fmt: skip
        self.tell_engine(cell.worker_id, table, forgets_peers=cell.operation is Operation.HANDSHAKE)
        if cell.operation is Operation.HANDSHAKE and cell.worker_id == HOLDER:
            self.tell_engine(READER, forgets_peers=True)

    def end(self) -> None:
        """Nothing new goes wrong; what is stuck stays so until its time is over."""
        self.release_dice.follow(FaultPlan(allow_faults=True, probability=0.0))
        for worker_id in self.processes:
            self.tell_engine(worker_id)

    async def questions(self, count: int, seed: int, *, longest: int = 300, token_count: int = 12) -> list[Question]:
        """Prompts of any length and what one engine answers by itself, one at a time."""
        rng = random.Random(seed)  # noqa: S311 reproducible questions
        questions = []
        for _ in range(count):
            length = rng.choice((1, BLOCK - 1, BLOCK, BLOCK + 1, rng.randint(2, longest)))
            prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))
            questions.append(Question(prompt, await self.answer(HOLDER, prompt, token_count)))
        return questions

    async def answer(self, worker_id: str, prompt: tuple[int, ...], token_count: int) -> tuple[int, ...]:
        """What this engine says by itself."""
        tokens: list[int] = []
        stop = EngineStop(token_count, ignore_eos=True)
        async for event in self.processes[worker_id].engine.decode(DecodeJob("oracle", prompt, stop=stop)):
            match event:
                case Stepped():
                    tokens += event.token_ids
                case KvAdopted() | DecodeDone():
                    pass
        assert len(tokens) == token_count
        return tuple(tokens)

    async def ask_all(self, questions: Sequence[Question], *, concurrency: int) -> Tally:
        tally = Tally()
        slots = asyncio.Semaphore(concurrency)

        async def one(question: Question) -> None:
            number = next(self._requests)
            request = RoutedRequest(
                f"g{number}", question.prompt_token_ids, len(question.answer), eos_token_ids=(2,), ignore_eos=True
            )
            async with slots:
                heard = await self.ask(request, timeout_s=120.0)
            _judge(tally, f"g{number}", question, heard)

        await asyncio.gather(*(one(question) for question in questions))
        return tally

    async def contacts_over(self, within_s: float) -> None:
        """Returns when no first contact is under way. Raises ``TimeoutError``."""
        async with asyncio.timeout(within_s):
            while True:
                counts = await self.fault_counts()
                if not any(counts[f"{worker_id} contacts under way"] for worker_id in self.processes):
                    return
                await asyncio.sleep(REST_POLL_S)

    async def at_rest(self, within_s: float) -> float:
        """Seconds until nothing is used, held, quarantined, running or on its way. Raises ``AssertionError``."""
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        while True:
            left = {name: book for name, book in (await self.audit()).items() if any(book.values())}
            if not left:
                return loop.time() - began_at
            if loop.time() - began_at > within_s:
                raise AssertionError(f"not at rest after {within_s:g} s: {left}")
            await asyncio.sleep(REST_POLL_S)

    async def audit(self) -> dict[str, dict[str, int]]:
        books: dict[str, dict[str, int]] = {}
        for process in self.processes.values():
            await process.engine.check_health()
            load = await process.board.audited()
            now = await process.engine.load_now()
            books[process.worker_id] = {
                "contacts": (await process.engine.fault_counts())["contacts under way"],
                "legs": load.running_count + load.waiting_count,
                "leases": load.held_lease_count,
                "blocks": load.used_block_count,
                "quarantined": now.quarantined_pull_count,
            }
        books["router"] = {
            "in flight": self.relay.in_flight_count,
            "places": self.admission.in_flight_count,
            "waiting": self.admission.waiting_count,
            "releases": self.relay.releasing_count,
        }
        return books

    async def fault_counts(self) -> Counter[str]:
        """Faults that struck, by worker: how often each operation was asked for, and how it was struck."""
        counts: Counter[str] = Counter()
        for worker_id, process in self.processes.items():
            for name, count in (await process.engine.fault_counts()).items():
                counts[f"{worker_id} {name}"] = count
        for name, count in self.release_dice.counts().items():
            counts[f"{HOLDER} call {name}"] = count
        return counts

    def metrics(self) -> Counter[str]:
        """The router's and the workers' counters of what went wrong, by name and labels."""
        counts: Counter[str] = Counter()
        for registry in (self.registry, *(process.registry for process in self.processes.values())):
            for metric in registry.collect():
                for sample in metric.samples:
                    if sample.name in METRICS:
                        labels = [value for name, value in sample.labels.items() if name != "worker_id"]
                        counts[" ".join((sample.name, *labels))] += int(sample.value)
        return counts

    def usage(self) -> dict[str, Usage]:
        return {
            worker_id: Usage(
                len(os.listdir(f"/proc/{process.engine.process_id}/task")),
                len(os.listdir(f"/proc/{process.engine.process_id}/fd")),
            )
            for worker_id, process in self.processes.items()
        }


class _StruckClient(ProcessClient):
    """The calls that release held KV fail without an effect, are not answered in time, or take long."""

    def __init__(self, process: WorkerProcess, dice: FaultDice) -> None:
        super().__init__(process)
        self._dice = dice
        self._worker_id = process.worker_id

    async def release_kv(self, ticket_id: str, *, timeout_s: float) -> bool:
        match self._dice.draw(Operation.RELEASE):
            case Fault.FAIL:
                raise engine_failed(self._worker_id, "the connection broke")
            case Fault.TIME_OUT:
                await asyncio.sleep(timeout_s)
                raise engine_failed(self._worker_id, "did not answer")
            case Fault.HANG:
                await asyncio.sleep(HANG_S)
        return await super().release_kv(ticket_id, timeout_s=timeout_s)


def _judge(tally: Tally, name: str, question: Question, heard: Heard) -> None:
    if heard.completed is None:
        assert heard.error is not None
        tally.outcomes[heard.error.reason.value] += 1
        tally.wrong.append(f"{name}: {heard.error!r}")
        return
    tally.outcomes["complete"] += 1
    tally.attempts[heard.report.attempt_count] += 1
    tally.modes[heard.report.mode.value] += 1
    if (reason := heard.report.transfer.recompute_reason) is not None:
        tally.reasons[reason.value] += 1
    if tuple(heard.tokens) == question.answer:
        tally.exact_count += 1
        return
    length = len(question.prompt_token_ids)
    both = itertools.zip_longest(heard.tokens, question.answer)
    first = next(i for i, (said, right) in enumerate(both) if said != right)
    tally.wrong.append(f"{name}: prompt of {length} tokens, wrong from token {first}, {heard.report}")


def tell_engine(folder: Path, worker_id: str, faults: Mapping[str, Any] | None, **more: Any) -> None:
    table = {"allow_faults": True, **(faults or {"probability": 0.0})}
    new = folder / f".{worker_id}"
    new.write_text(json.dumps({"faults": table, "pull_timeout_s": PULL_TIMEOUT_S, **more}))
    new.replace(folder / worker_id)  # all of it or nothing of it is seen


def tiny_config(
    model: Path, port: int, core_index: int, faults: Mapping[str, Any] | None, *, block_count: int = 2048
) -> EngineConfig:
    """``faults`` as ``EngineConfig.transfer_faults``, without the switch that allows them."""
    cores = sorted(os.sched_getaffinity(0))
    block_bytes = 2 * 2 * 2 * 32 * BLOCK * 4  # layers, keys and values, heads, head size, tokens, float32
    return EngineConfig(
        model_path=str(model),
        model_name="tiny",
        dtype="float32",
        kv_cache_bytes=block_count * block_bytes,
        block_token_count=BLOCK,
        max_context_token_count=1024,
        enable_prefix_caching=False,  # or a prompt asked twice would pull nothing
        pull_timeout_s=PULL_TIMEOUT_S,
        extra_args={"skip_tokenizer_init": True},
        cores=(cores[core_index % len(cores)],),
        side_channel_port=port,
        transfer_faults={"allow_faults": True, "hang_s": HANG_S, "stuck_s": STUCK_S, **faults} if faults else {},
    )


@asynccontextmanager
async def faulty_cluster(model: Path, *, block_count: int = 2048) -> AsyncIterator[FaultyCluster]:
    """Engines that meet nothing until they are told to. ``block_count``: of each one's pool."""
    from bench.faulty_connector import CONNECTOR_MODULE, FOLDER_VARIABLE
    from engine.vllm_engine import VllmEngine

    engines = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.dict(os.environ, {FOLDER_VARIABLE: str(folder)}))
        stack.enter_context(mock.patch("kvtransfer.connector_settings.CONNECTOR_MODULE", CONNECTOR_MODULE))
        roles = {HOLDER: Role.PREFILL, READER: Role.DECODE}
        for index, (worker_id, port) in enumerate(zip(roles, free_ports(2), strict=True)):
            tell_engine(folder, worker_id, None)
            config = tiny_config(model, port, index, {"probability": 0.0}, block_count=block_count)
            engines[worker_id] = VllmEngine(config, EngineIdentity(worker_id))
        cluster = FaultyCluster(folder)
        try:
            await asyncio.gather(*(engine.start() for engine in engines.values()))
            for worker_id, engine in engines.items():
                await cluster.adopt(worker_id, roles[worker_id], engine)
            await cluster.until_ready()
            yield cluster
        finally:
            await cluster.relay.close()
            await cluster.roster.close()
            for process in cluster.processes.values():
                await process.decode.close()
                await process.prefill.close()
            await asyncio.gather(*(engine.close() for engine in engines.values()))


def seed_that_strikes(number: int, probability: float = 0.5) -> int:
    """A seed with which the first registrations of an engine pass and that of this ``number`` does not. 1: the hold
    records, 2: the KV memory."""
    for seed in itertools.count():
        plan = FaultPlan(allow_faults=True, probability=probability, operations=["register"], seed=seed)
        dice = FaultDice(plan)
        if [dice.draw(Operation.REGISTER) is not None for _ in range(number)] == [False] * (number - 1) + [True]:
            return seed
    raise AssertionError("there is always another seed")


async def start_that_meets(
    model: Path, fault: Fault, *, number: int, core_index: int = 0, stuck_s: float = STUCK_S, hang_s: float = HANG_S
) -> str:
    """What an engine says one of whose registrations meets this fault, or ``started``. Leaves no process."""
    from engine.vllm_engine import VllmEngine

    plan = {
        "probability": 0.5, "operations": ["register"], "kinds": [fault.value], "seed": seed_that_strikes(number),
        "stuck_s": stuck_s, "hang_s": hang_s,
    }  # fmt: skip
    engine = VllmEngine(tiny_config(model, free_ports(1)[0], core_index, plan), EngineIdentity(READER))
    try:
        # Baton's connector itself, even beside a cluster of engines that are told what to meet.
        with mock.patch("kvtransfer.connector_settings.CONNECTOR_MODULE", "kvtransfer.connector"):
            await engine.start()
        counts = await engine.fault_counts()
        assert counts.get(f"register.{fault.value}"), f"the registration met nothing: {counts}"
    except BatonError as error:
        return f"{error.reason.value}: {error.message}"
    finally:
        await engine.close()
    return "started"

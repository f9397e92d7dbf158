"""A whole Baton in one process: the real router with real sockets in front of real workers on simulated engines.

A helper of the tests beside it. Balances the books when it closes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from baton.leg import WorkerInfo
from baton.metrics import WorkerMetrics
from baton.request import Role
from decode_worker.worker import DecodeWorker
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.load_board import LoadBoard
from engine.service import worker_info
from engine.sim import SimEngine
from engine.sim_config import SimConfig
from engine.sim_tokens import TokenRule
from kvtransfer.simulated import SimNetwork
from prefill_worker.worker import PrefillLimits, PrefillWorker
from router.cluster_view import WorkerSpec
from router.config import RouterConfig
from router.server import RouterEndpoint, RouterServer
from router.tiny_model import END_ID, tiny_tokenizer, write_tiny_model
from router.tokenizer import Tokenizer
from router.worker_client import InProcessWorkerClient

SECRET = bytes(range(32))
MODEL = "tiny"
TOKENIZER = Tokenizer(tiny_tokenizer(), vocab_size=tiny_tokenizer().get_vocab_size(), eos_token_ids=(END_ID,))
RULE = TokenRule(vocab_size=TOKENIZER.vocab_size, special_token_count=3, eos_token_id=END_ID)
FAST = CostModel(
    prefill=PrefillCost(base_s=0.001, per_token_s=1e-6, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=0.001, per_context_token_s=0.0, per_sequence_s=1e-5),
)
CONTEXT = 2048
QUIET_S = 20.0
"""Within this, whatever a storm left must be gone: less than the graces, leases and timeouts that would see to it. An
answer may be over in less: who shows that leaving ends one lets the engines stand meanwhile (``standing``)."""
TOO_LATE_S = 3 * QUIET_S

_numbers = itertools.count()


class StandingEngine(SimEngine):
    """Can be kept from beginning a step, all else going on: requests come and leave, KV is read and released."""

    def __init__(self, config: SimConfig, network: SimNetwork) -> None:
        super().__init__(config, network)
        self.may_step = asyncio.Event()
        self.may_step.set()

    async def _finish_pulls(self) -> int:
        await self.may_step.wait()  # AFTER requests are let in, BEFORE it is settled whose step it is
        return await super()._finish_pulls()


@dataclass
class SimWorker:
    """One worker: an engine and both phases on top of it."""

    worker_id: str
    role: Role
    engine: StandingEngine
    prefill: PrefillWorker
    decode: DecodeWorker
    board: LoadBoard
    info: WorkerInfo
    is_gone: bool = False

    @property
    def spec(self) -> WorkerSpec:
        return WorkerSpec(self.worker_id, f"127.0.0.1:{1 + next(_numbers)}", self.role, self.info.epoch)

    def client(self) -> InProcessWorkerClient:
        return InProcessWorkerClient(
            self.info, self.prefill, self.decode, self.board.current, is_gone=lambda: self.is_gone
        )

    def is_balanced(self) -> bool:
        load = self.board.current()
        counts = (load.running_count, load.waiting_count, load.used_block_count, load.held_lease_count)
        return counts == (0, 0, 0, 0) and self.engine.held_count == 0


class SimCluster:
    """``server`` is the router; ``workers`` by id."""

    def __init__(self, config: RouterConfig, server: RouterServer, workers: dict[str, SimWorker]) -> None:
        self.config = config
        self.server = server
        self.workers = workers
        self.endpoint: RouterEndpoint

    def set_cost(self, cost: CostModel) -> None:
        """What the steps of all engines take from now on: slow until something is seen, then fast to be done."""
        for worker in self.workers.values():
            worker.engine.config = dataclasses.replace(worker.engine.config, cost=cost)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """No engine begins a step meanwhile: what nobody calls off stays, however long one waits for its end."""
        for worker in self.workers.values():
            worker.engine.may_step.clear()
        try:
            yield
        finally:
            for worker in self.workers.values():
                worker.engine.may_step.set()

    def set_workers(self, *worker_ids: str) -> None:
        self.server.roster.set_workers([self.workers[worker_id].spec for worker_id in worker_ids])

    async def until(self, is_so: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        """Real sockets need real time: asks again every few milliseconds, up to a limit."""
        try:
            async with asyncio.timeout(limit_s):
                while not is_so():  # noqa: ASYNC110  # what is waited for is on the other side of a socket
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not within {limit_s} s: {what}") from None

    async def until_balanced(self) -> None:
        """Both sides' books: no call, no place given out, no leg, no lease, no block."""
        await self.until(
            lambda: (
                self.server.generation.call_count == 0
                and all(worker.is_balanced() for worker in self.workers.values())
                and all(view.assigned.request_count == 0 for view in self.server.roster.view().workers)
            ),
            f"balanced books: {self.server.roster.view()} {[w.board.current() for w in self.workers.values()]}",
            QUIET_S,
        )


@asynccontextmanager
async def sim_cluster(
    directory: Path,
    *,
    prefill_count: int = 1,
    decode_count: int = 1,
    sim: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[SimCluster]:
    """``sim``: changes to every engine's SimConfig; ``config``: to the router's."""
    write_tiny_model(directory, max_context_token_count=CONTEXT)
    router_config = RouterConfig(
        **{
            "model_name": MODEL,
            "model_dir": str(directory),
            "listen_address": "127.0.0.1:0",
            "admin_address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            "load_interval_s": 0.05,
            "lease_s": 600.0,  # no timer may do what an explicit release must, within QUIET_S
            "parser_start_deadline_s": 500.0,  # a process of its own, and it imports the engine
            "parser_deadline_s": 120.0,
            **config,
        }
    )
    network = SimNetwork()
    workers: dict[str, SimWorker] = {}
    tasks: list[asyncio.Task[None]] = []
    try:
        for role, count in ((Role.PREFILL, prefill_count), (Role.DECODE, decode_count)):
            for index in range(count):
                changes = {"pull_timeout_s": TOO_LATE_S, **(sim or {})}
                worker = await make_worker(f"{role.value}-{index}", role, network, changes)
                workers[worker.worker_id] = worker
                tasks.append(asyncio.create_task(worker.prefill.run()))
        server = RouterServer(router_config, secret=SECRET, connect=lambda spec: workers[spec.worker_id].client())
        server.relay._limits = dataclasses.replace(server.relay._limits, cleanup_timeout_s=TOO_LATE_S)
        cluster = SimCluster(router_config, server, workers)
        try:
            cluster.endpoint = await server.start()
            cluster.set_workers(*workers)
            await cluster.until(lambda: len(server.roster.view().ready()) == len(workers), "all workers ready")
            yield cluster
            await cluster.until_balanced()
        finally:
            await server.close()
    finally:
        for worker in workers.values():
            await worker.decode.close()
            await worker.prefill.close()
            await worker.engine.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def make_worker(worker_id: str, role: Role, network: SimNetwork, changes: dict[str, Any]) -> SimWorker:
    defaults = SimConfig(
        engine_id=worker_id,
        model_name=MODEL,
        block_token_count=16,
        block_count=1024,
        max_context_token_count=CONTEXT,
        enable_prefix_caching=False,  # cached blocks count as used: the books could not be seen to balance
        cost=FAST,
        tokens=RULE,
    )
    engine = StandingEngine(dataclasses.replace(defaults, **changes), network)
    await engine.start()
    epoch = f"epoch-{next(_numbers)}"
    metrics = WorkerMetrics(CollectorRegistry(), worker_id)
    limits = PrefillLimits(max_hold_s=3600.0)
    prefill = PrefillWorker(engine, worker_id=worker_id, epoch=epoch, secret=SECRET, metrics=metrics, limits=limits)
    decode = DecodeWorker(engine, worker_id=worker_id, epoch=epoch, secret=SECRET, metrics=metrics)
    board = LoadBoard(engine, [prefill, decode], epoch=epoch, metrics=metrics)
    info = worker_info(engine.info, worker_id=worker_id, epoch=epoch, role=role)
    return SimWorker(worker_id, role, engine, prefill, decode, board, info)

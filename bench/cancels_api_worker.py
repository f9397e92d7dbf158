"""Workers of ``bench.cancels_api``, one process: a prefill and a decode worker as they are, on simulated engines that
write down when a leg leaves them.

One JSON line says where they listen; then each line on standard input is a command.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from baton import event_loop
from baton.metrics import WorkerMetrics
from baton.request import Role
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.hosting import HostConfig, WorkerHost
from engine.introductions import Introductions
from engine.load_board import LoadBoard
from engine.service import add_worker_service, worker_info
from engine.sim import SimEngine, SimNetwork
from engine.sim_config import SimConfig
from engine.sim_scheduler import State
from engine.sim_tokens import TokenRule
from prefill_worker.config import PrefillLimits
from prefill_worker.service import add_prefill_service
from prefill_worker.worker import PrefillWorker

CONTEXT = 2048
COST = CostModel(
    prefill=PrefillCost(base_s=0.005, per_token_s=0.0002, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=0.01, per_context_token_s=0.0, per_sequence_s=0.0),
)


class NotingEngine(SimEngine):
    """Notes CLOCK_MONOTONIC whenever its scheduler lets go of a leg, and whether the leg was done by then."""

    left_at: dict[str, tuple[float, bool]]

    def _leave(self, leg: Any) -> None:
        is_done = leg.sequence.state is State.DONE
        super()._leave(leg)
        self.left_at[leg.leg_id] = time.monotonic(), is_done


class Worker:
    def __init__(self, role: Role, network: SimNetwork, secret: bytes, rule: TokenRule) -> None:
        self.worker_id, self._epoch = f"{role.value}-0", "e1"
        config = SimConfig(
            engine_id=self.worker_id,
            model_name="tiny",
            block_token_count=16,
            block_count=8192,
            max_context_token_count=CONTEXT,
            max_running_count=64,
            enable_prefix_caching=False,  # cached blocks count as used
            cost=COST,
            tokens=rule,
        )
        self.engine = NotingEngine(config, network)
        self.engine.left_at = {}
        registry = CollectorRegistry()
        metrics = WorkerMetrics(registry, self.worker_id)
        common: dict[str, Any] = {
            "worker_id": self.worker_id,
            "epoch": self._epoch,
            "secret": secret,
            "metrics": metrics,
        }
        self.prefill = PrefillWorker(self.engine, limits=PrefillLimits(max_hold_s=3600.0), **common)
        decode = DecodeWorker(self.engine, **common)
        self.board = LoadBoard(self.engine, [self.prefill, decode], epoch=self._epoch, metrics=metrics)
        introductions = Introductions(self.engine, worker_id=self.worker_id, secret=secret, allowed_hosts=())
        info = worker_info(self.engine.info, worker_id=self.worker_id, epoch=self._epoch, role=role)
        self.host = WorkerHost(
            HostConfig(),
            secret=secret,
            registry=registry,
            attach=(
                partial(add_prefill_service, worker=self.prefill),
                partial(add_decode_service, worker=decode),
                partial(add_worker_service, info=info, board=self.board, introductions=introductions),
            ),
        )

    async def start(self) -> str:
        await self.engine.start()
        self._reaper = asyncio.create_task(self.prefill.run())
        await self.host.start()
        return self.host.address

    def books(self) -> dict[str, int]:
        load = self.board.current()
        return {
            "legs": load.running_count + load.waiting_count,
            "blocks": load.used_block_count,
            "leases": load.held_lease_count,
            "held": self.engine.held_count,
        }


async def serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    secret, rule = bytes.fromhex(sys.argv[1]), TokenRule(**json.loads(sys.argv[2]))
    network = SimNetwork()
    workers = [Worker(role, network, secret, rule) for role in Role]
    print(json.dumps({worker.worker_id: await worker.start() for worker in workers}), flush=True)
    while line := await reader.readline():
        match json.loads(line)[0]:
            case "left":
                answer: Any = {leg: at for worker in workers for leg, at in worker.engine.left_at.items()}
                for worker in workers:
                    worker.engine.left_at.clear()
            case "books":
                answer = {worker.worker_id: worker.books() for worker in workers}
            case other:
                raise ValueError(f"no such command: {other}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with event_loop.runner() as runner:
        runner.run(serve())

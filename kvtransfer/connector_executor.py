"""The executor Baton's engines run on, and the calls a worker process makes into its engine process.

The executor is vLLM's single-process one under a name of ours: the class is the first thing of Baton's that
the new process loads, hence the place from which it ties itself to its owner.
"""

from __future__ import annotations

from kvtransfer.connector_parent import become_engine_process

become_engine_process()  # before the slow imports: the process must not outlive its owner while it starts

import os  # noqa: E402
from typing import Any  # noqa: E402

from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: E402
from vllm.v1.executor.uniproc_executor import UniProcExecutor  # noqa: E402

from kvtransfer.connector import NixlConnector, scheduler_side  # noqa: E402
from kvtransfer.peer import PeerAddress  # noqa: E402

EXECUTOR = "kvtransfer.connector_executor.SingleProcessExecutor"
WORKER_EXTENSION = "kvtransfer.connector_executor.WorkerCalls"


class SingleProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """The model runs in the engine process itself: no queue between them, nothing that spins."""


class WorkerCalls:
    """Mixed into vLLM's worker. Every method runs between two engine steps, in the engine process."""

    def baton_describe(self) -> dict[str, Any]:
        """Sizes that are known only once KV memory is laid out."""
        worker = _connector().connector_worker
        return {
            "block_count": worker.num_blocks - 1,  # block 0 is vLLM's null block
            "block_bytes": sum(worker.block_len_per_layer),
            "process_id": os.getpid(),
            "engine_id": worker.engine_id,
        }

    def baton_introduce(self, peers: list[dict[str, Any]]) -> None:
        """Begins handshakes; see ``Peers.begin_introductions``."""
        _connector().connector_worker.begin_introductions([PeerAddress(**peer) for peer in peers])

    def baton_introductions(self, engine_ids: list[str]) -> dict[str, tuple[str | None, float]]:
        """What became of them so far; see ``Peers.introductions``."""
        said: dict[str, tuple[str | None, float]] = _connector().connector_worker.introductions(engine_ids)
        return said

    def baton_release(self, handle: str) -> int:
        """Frees KV held under ``handle`` (see ``release_held``); returns how many requests that were."""
        released: int = _connector().connector_worker.release_held(handle)
        return released

    def baton_occupancy(self) -> dict[str, int]:
        """Blocks in use, held and being pulled included, cached-but-free ones not; and held prefills."""
        pool = scheduler_side().block_pool
        return {
            "used_block_count": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "held_count": _connector().connector_worker.held_count,
        }

    def baton_fault_counts(self) -> dict[str, int]:
        """Injected faults so far (``kvtransfer.faults.FaultDice.counts``); nothing where none are configured."""
        dice = getattr(_connector().connector_worker.nixl_wrapper, "dice", None)
        return dice.counts() if dice is not None else {}


def _connector() -> Any:
    connector = get_kv_transfer_group()
    assert isinstance(connector, NixlConnector)
    return connector

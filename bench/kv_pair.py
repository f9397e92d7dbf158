"""One end of a pair of processes that move KV over one path: the holder keeps blocks, the reader pulls them.

    python -m bench.kv_pair --end holder --path baton --socket FILE --port 6600 --model DIR

Both ends build what an engine process builds, a connector of vLLM's or of Baton's over KV tensors laid out as the
default model's, and leave out the model. They call it as an engine without other work does: post, look, and look
again after a millisecond. ``raw`` is NIXL by itself. Obeys one JSON line after another on a Unix socket; never
measures more than it is asked to. ``bench/transfer_pairs.py`` drives it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LAYER_COUNT = 30
KV_HEAD_COUNT = 3
HEAD_SIZE = 64
BLOCK_TOKEN_COUNT = 128
PAGE_BYTES = 2 * KV_HEAD_COUNT * HEAD_SIZE * BLOCK_TOKEN_COUNT * 2
"""Keys and values of one block in one layer, in bfloat16."""
BLOCK_BYTES = LAYER_COUNT * PAGE_BYTES
POOL_BLOCK_COUNT = 128
POOL_BYTES = POOL_BLOCK_COUNT * BLOCK_BYTES
"""With smaller blocks there are more of them."""
ENGINE_STEP_PAUSE_S = 0.001
"""What vLLM's engine sleeps between two steps that computed nothing."""
READ_DEADLINE_S = 30.0
STOCK_PATHS = ("stock-as-shipped", "stock-tuned", "stock-no-progress-thread")
WITHOUT_DIGESTS = "baton-without-digests"
BATON_PATHS = ("baton", WITHOUT_DIGESTS)
PATHS = (*BATON_PATHS, *STOCK_PATHS, "raw")


class End(Protocol):
    """What a pair's end can do: a method a command, and a step of an engine that has nothing to compute."""

    def step(self) -> None: ...


def checksum(pages: Sequence[np.ndarray[Any, Any]], block_ids: Sequence[int]) -> int:
    """Of the blocks in order, over all layers; the pools of both ends are lists of (block, word) arrays."""
    total = 0
    for layer, page in enumerate(pages, 1):
        for position, block_id in enumerate(block_ids, 1):
            total = (total + layer * position * int(page[block_id].sum(dtype=np.uint64))) % (1 << 61)
    return total


def fill(pages: Sequence[np.ndarray[Any, Any]], seed: int) -> None:
    for layer, page in enumerate(pages):
        page[:] = np.random.default_rng((seed, layer)).integers(0, 1 << 40, page.shape, dtype=np.uint64)


class ConnectorEnd:
    """A connector, scheduler and worker side, without an engine around it."""

    def __init__(self, path: str, model: Path, host: str, port: int, seed: int, block_token_count: int) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer import kv_transfer_state
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        self._host, self._port = host, port
        self._is_baton = path in BATON_PATHS
        self._block_token_count = block_token_count
        page_bytes = PAGE_BYTES * block_token_count // BLOCK_TOKEN_COUNT
        block_count = POOL_BYTES // (LAYER_COUNT * page_bytes)
        if self._is_baton:
            config = _baton_config(model, host, port, block_token_count, enable_kv_digests=path != WITHOUT_DIGESTS)
        else:
            config = _stock_config(path, model, block_token_count)
        config.cache_config.kv_cache_layout = "LBHNC"
        config.cache_config.num_gpu_blocks = block_count
        self._engine_id = config.kv_transfer_config.engine_id
        names = [f"model.layers.{number}.self_attn.attn" for number in range(LAYER_COUNT)]
        spec = FullAttentionSpec(
            block_size=block_token_count, num_kv_heads=KV_HEAD_COUNT, head_size=HEAD_SIZE, dtype=torch.bfloat16
        )
        kv_config = KVCacheConfig(
            num_blocks=block_count,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
            kv_cache_layout="LBHNC",
        )
        shape = (block_count, KV_HEAD_COUNT, block_token_count, 2 * HEAD_SIZE)
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names}
        self._pages = [
            tensor.view(torch.uint8).numpy().reshape(block_count, page_bytes).view(np.uint64)
            for tensor in tensors.values()
        ]
        fill(self._pages, seed)
        with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
            kind = _connector_class(path)
            # The worker side first, and where Baton's scheduler side looks for it, as in an engine process.
            self._worker_side = kind(config, KVConnectorRole.WORKER, kv_config)
            kv_transfer_state._KV_CONNECTOR_AGENT = self._worker_side
            self._worker_side.register_kv_caches(tensors)
            self._scheduler_side = kind(config, KVConnectorRole.SCHEDULER, kv_config)
            metadata = self._worker_side.get_handshake_metadata()
            self._scheduler_side.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})

    def hello(self, **_: Any) -> dict[str, Any]:
        return {"engine_id": self._engine_id, "port": self._port}

    def hold(self, *, request_id: str, block_ids: list[int], **_: Any) -> dict[str, Any]:
        """What a prefill leaves behind: blocks promised to a reader, and the parameters that name them."""
        metadata = self._metadata()
        metadata.reqs_in_batch.add(request_id)
        metadata.reqs_to_send[request_id] = time.perf_counter() + 600.0
        params = {
            "remote_block_ids": [block_ids],
            "remote_engine_id": self._engine_id,
            "remote_request_id": request_id,
            "remote_host": self._host,
            "remote_port": self._port,
            "remote_num_tokens": len(block_ids) * self._block_token_count,
            "tp_size": 1,
        }
        self._call(metadata)
        if self._is_baton:
            hold = self._worker_side.connector_worker.keeper.hold(request_id, block_ids)
            params |= {"hold_slot": hold.slot, "hold_nonce": hold.nonce}
        return {"params": params, "checksum": checksum(self._pages, block_ids)}

    def release(self, *, request_id: str, **_: Any) -> dict[str, Any]:
        worker = self._worker_side.connector_worker
        if self._is_baton:
            worker.release_held(request_id[:-9])
        self.step()
        return {}

    def read(
        self, *, request_id: str, block_ids: list[int], params: dict[str, Any], is_checked: bool, **_: Any
    ) -> dict[str, Any]:
        for page in self._pages if is_checked else ():
            page[block_ids] = 0
        params = {**params, "remote_block_ids": tuple(map(list, params["remote_block_ids"]))}
        metadata = self._metadata()
        metadata.add_new_req_to_recv(
            request_id, (list(block_ids),), params, local_num_computed_blocks=(0,), awaiting_kvs=True
        )
        if self._is_baton:
            from kvtransfer.connector_holds import HOLDS_ATTRIBUTE
            from kvtransfer.holds import Hold

            setattr(metadata, HOLDS_ATTRIBUTE, {request_id: Hold(params["hold_slot"], params["hold_nonce"])})
        began = time.perf_counter()
        results = self._call(metadata)
        posted = time.perf_counter()
        while request_id not in results.finished_recving:
            if time.perf_counter() - began > READ_DEADLINE_S:
                raise TimeoutError(f"{request_id} did not arrive")
            time.sleep(ENGINE_STEP_PAUSE_S)
            results = self._call(self._metadata())  # a read that waited for a handshake is posted here
        elapsed_s = time.perf_counter() - began
        stats = self._worker_side.get_kv_connector_stats()
        told = {} if stats is None else stats.data
        from kvtransfer.connector_telemetry import pull_records

        pulls = pull_records(told)
        return {
            "elapsed_s": elapsed_s,
            "first_look_s": posted - began,
            "is_ok": request_id not in results.failed_recving,
            "descriptor_count": sum(told.get("num_descriptors", ())),
            "wire_s": sum(told.get("transfer_duration", ())),
            "post_s": sum(told.get("post_duration", ())),
            "verify_s": sum(pull.verify_s for pull in pulls),
            "checksum": checksum(self._pages, block_ids) if is_checked else None,
        }

    def step(self) -> None:
        """A step of an engine with nothing to compute: notices are taken in, leases looked at."""
        self._call(self._metadata())
        self._worker_side.get_kv_connector_stats()

    def _metadata(self) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

        return NixlConnectorMetadata()

    def _call(self, metadata: Any) -> Any:
        self._worker_side.bind_connector_metadata(metadata)
        self._worker_side.start_load_kv(None)
        results = self._worker_side.get_transfer_results(set())
        self._worker_side.clear_connector_metadata()
        return results


def _baton_config(model: Path, host: str, port: int, block_token_count: int, *, enable_kv_digests: bool) -> Any:
    from vllm import AsyncEngineArgs

    from engine.config import EngineConfig, EngineIdentity
    from engine.vllm_arguments import engine_arguments

    config = EngineConfig(
        model_path=str(model),
        model_name="kv",
        kv_cache_bytes=POOL_BYTES,
        block_token_count=block_token_count,
        enable_kv_digests=enable_kv_digests,
        side_channel_host=host,
        side_channel_port=port,
    )
    return AsyncEngineArgs(**engine_arguments(config, EngineIdentity(f"pair-{port}"))).create_engine_config()


def _stock_config(path: str, model: Path, block_token_count: int) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config import KVTransferConfig

    tuned = {} if path == "stock-as-shipped" else {"num_threads": 0}
    return AsyncEngineArgs(
        model=str(model),
        dtype="bfloat16",
        block_size=block_token_count,
        kv_cache_memory_bytes=POOL_BYTES,
        enforce_eager=True,
        async_scheduling=False,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
        kv_transfer_config=KVTransferConfig(
            kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cpu", kv_connector_extra_config=tuned
        ),
    ).create_engine_config()


def _connector_class(path: str) -> Any:
    if path in BATON_PATHS:
        from kvtransfer.connector import NixlConnector

        return NixlConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

    if path == "stock-no-progress-thread":
        # Not an option of vLLM's: here to tell what the thread costs from what the notices cost.
        import functools

        base_worker.nixl_agent_config = functools.partial(base_worker.nixl_agent_config, enable_prog_thread=False)
    return NixlPullConnector


class RawEnd:
    """NIXL alone: one registered region, descriptors of a size to be chosen."""

    def __init__(self, seed: int) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        options = nixl_agent_config(enable_prog_thread=False, num_threads=0)
        self._agent = nixl_agent(f"raw-{os.getpid()}", options)
        self._memory = np.zeros((1, POOL_BYTES // 8), dtype=np.uint64)
        fill([self._memory], seed)
        self._agent.register_memory([(self._address, self._memory.nbytes, 0, "")], "DRAM")
        self._peer = ""
        self._there = 0

    @property
    def _address(self) -> int:
        return int(self._memory.ctypes.data)

    def hello(self, *, peer: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        if peer is not None:
            self._peer = self._agent.add_remote_agent(bytes.fromhex(peer["metadata"]))
            self._there = peer["address"]
        return {"metadata": self._agent.get_agent_metadata().hex(), "address": self._address}

    def hold(self, *, byte_count: int, offset: int, **_: Any) -> dict[str, Any]:
        return {"params": {}, "checksum": self._sum(offset, byte_count)}

    def _sum(self, offset: int, byte_count: int) -> int:
        return int(self._memory[0, offset // 8 : (offset + byte_count) // 8].sum(dtype=np.uint64))

    def release(self, **_: Any) -> dict[str, Any]:
        return {}

    def read(
        self,
        *,
        byte_count: int,
        offset: int,
        their_offset: int,
        descriptor_bytes: int,
        is_checked: bool,
        **_: Any,
    ) -> dict[str, Any]:
        if is_checked:
            self._memory[0, offset // 8 : (offset + byte_count) // 8] = 0
        # From the last to the first: in this order NIXL cannot merge them, so the size is what it says.
        offsets = np.arange(0, byte_count, descriptor_bytes, dtype=np.uint64)[::-1]
        sides = []
        places = ("NIXL_INIT_AGENT", self._address + offset), (self._peer, self._there + their_offset)
        for agent, base in places:
            table = np.zeros((len(offsets), 3), dtype=np.uint64)
            table[:, 0], table[:, 1] = base + offsets, np.minimum(descriptor_bytes, byte_count - offsets)
            sides.append(self._agent.prep_xfer_dlist(agent, table, "DRAM"))
        indices = np.arange(len(offsets), dtype=np.int32)
        began = time.perf_counter()
        handle = self._agent.make_prepped_xfer("READ", sides[0], indices, sides[1], indices)
        made = time.perf_counter()
        state = self._agent.transfer(handle)
        while state == "PROC":
            if time.perf_counter() - began > READ_DEADLINE_S:
                raise TimeoutError("a raw read did not end")
            state = self._agent.check_xfer_state(handle)
        ended = time.perf_counter()
        self._agent.release_xfer_handle(handle)
        for side in sides:
            self._agent.release_dlist_handle(side)
        total = self._sum(offset, byte_count) if is_checked else None
        return {
            "elapsed_s": ended - began,
            "wire_s": ended - made,
            "is_ok": state == "DONE",
            "descriptor_count": len(offsets),
            "checksum": total,
        }

    def memcpy(self, *, byte_count: int, **_: Any) -> dict[str, Any]:
        """The same bytes within one process: from the far end of the pool to its beginning."""
        words = byte_count // 8
        source, target = self._memory[0, -words:], self._memory[0, :words]
        began = time.perf_counter()
        np.copyto(target, source)
        return {"elapsed_s": time.perf_counter() - began, "is_ok": True, "descriptor_count": 0, "checksum": None}

    def step(self) -> None:
        self._agent.get_new_notifs()


def serve(end: End, connection: socket.socket) -> None:
    """Until the other side hangs up. While it holds KV it steps between commands, as an engine does."""
    lines = connection.makefile("rw")
    is_stepping = False
    connection.settimeout(None)
    while True:
        if is_stepping:
            while not select.select([connection], [], [], 0)[0]:
                end.step()
                time.sleep(ENGINE_STEP_PAUSE_S)
        line = lines.readline()
        if not line:
            return
        asked = json.loads(line)
        command = asked.pop("command")
        if command in ("hold", "idle"):
            is_stepping = command == "hold"
        try:
            answer = {} if command == "idle" else getattr(end, command)(**asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_pair", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--end", choices=("holder", "reader"), required=True)
    parser.add_argument("--path", choices=PATHS, required=True)
    parser.add_argument("--socket", required=True, help="Unix socket of who drives this")
    parser.add_argument("--host", default="127.0.0.1", help="side channel")
    parser.add_argument("--port", type=int, required=True, help="side channel")
    parser.add_argument("--model", type=Path, required=True, help="only its configuration is read")
    parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKEN_COUNT, help="tokens of a block")
    options = parser.parse_args(arguments)
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = options.host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(options.port)
    seed = 1 if options.end == "holder" else 2
    end: End = RawEnd(seed)
    if options.path != "raw":
        end = ConnectorEnd(options.path, options.model, options.host, options.port, seed, options.block_tokens)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(options.socket)
        connection.sendall(options.end.encode() + b"\n")
        serve(end, connection)
    return 0


if __name__ == "__main__":
    # At once: NIXL's threads and vLLM's listener need no goodbye, and the stock destructors may wait for peers.
    code = main()
    sys.stdout.flush()
    os._exit(code)

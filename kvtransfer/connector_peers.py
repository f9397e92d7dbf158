"""How this engine meets others: the side channel, handshakes and introductions. Part of the connector's worker side.

Replaces vLLM's own exchange, which anybody could ask and anybody could answer. Here both sides prove that they know
the cluster's key (``kvtransfer/side_channel.py``), every step has a deadline, and engines that cannot exchange KV are
refused by the name of what differs.

    worker process                                    engine process
    Introduce -> engine.introduce -> begin_introductions -> a thread per handshake: ask, compare, register, warm up
                                  <- introductions       <- what became of them, between two steps

The listener is one thread of its own: it answers while the engine computes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import metadata as nixl_metadata
from vllm.logger import init_logger

from baton.secret import SECRET_VARIABLE
from kvtransfer.connector_scheduler import SIDE_CHANNEL_HOST_KEY, SIDE_CHANNEL_PORT_KEY
from kvtransfer.connector_side_channel import Listener, ask
from kvtransfer.peer import PeerAddress
from kvtransfer.side_channel import KEY_VARIABLE, SideChannelError, differences

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

CONNECTOR_VERSION = 1
"""Goes up with each incompatible change of what engines say to one another or leave in memory for one another."""
HANDSHAKE_TIMEOUT_S = 1.0
"""From the dial to the last byte of the reply."""
CLIENT_THREAD_COUNT = 8
"""Handshakes at a time: a peer that does not answer holds up one of them, for the time above."""
WARM_UP_READ_COUNT = 3
WARM_UP_TIMEOUT_S = 2.0
PROGRESS_WAKE_UP_US = 10_000
"""Longest sleep of NIXL's progress thread. It wakes up by itself when something arrives; this is its safety net."""
_SAMPLE_BYTES = 64 * 1024
_MAX_NAMED_PEERS = 4096


class Hello(msgspec.Struct):
    """What a client asks for."""

    engine_id: str
    """Of the asker, for the log."""
    wanted_engine_id: str


class Welcome(msgspec.Struct):
    """What a server says of its engine."""

    engine_id: str
    facts: dict[str, str]
    clock_s: float
    """Its monotonic clock when it answered."""
    agent: bytes = b""
    """vLLM's metadata of its agent and ours. Decoded only when all facts agree."""


class HandshakeError(Exception):
    """The two engines cannot exchange KV; the message says why."""


@dataclass(slots=True)
class _Introduction:
    peer: PeerAddress
    started_at: float
    problem: str | None = None
    """None: under way."""
    ended_at: float = 0.0


class Peers:
    """Mixed into the worker side, in front of vLLM's class, whose handshake it replaces."""

    # vLLM's, as far as it is used here.
    engine_id: str
    nixl_wrapper: Any
    vllm_config: Any
    transfer_topo: Any
    xfer_handshake_metadata: Any
    block_len_per_layer: list[int]
    block_size: int
    backend_name: str
    kv_cache_layout: str
    num_blocks: int
    src_xfer_handles_by_block_size: dict[int, int]
    dst_xfer_side_handles: dict[str, dict[int, int]]
    dst_num_blocks: dict[str, int]
    region_num_blocks: list[int]
    kv_cache_config: Any
    _has_mamba: bool
    _engine_last_active: dict[str, float]

    def __init__(self, vllm_config: VllmConfig, *rest: Any, **named: Any) -> None:
        settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._side_channel_at: tuple[str, int] = (settings[SIDE_CHANNEL_HOST_KEY], settings[SIDE_CHANNEL_PORT_KEY])
        self._side_channel_key = _key_from_environment()
        with _sleeping_progress_thread():
            super().__init__(vllm_config, *rest, **named)  # type: ignore[call-arg]
        # One thread would do, were it not for peers that do not answer: each would hold up all others. What touches
        # the agent is done one after another all the same.
        self._handshake_initiation_executor.shutdown(wait=False)
        self._handshake_initiation_executor: Any = ThreadPoolExecutor(CLIENT_THREAD_COUNT, "baton-handshake")
        self._agent_turn = threading.Lock()
        self._facts: dict[str, str] = {}
        self._listener: Listener | None = None
        self._introductions: dict[str, _Introduction] = {}
        self._engine_of_worker: dict[str, str] = {}
        self._warming: set[str] = set()
        self._evicted: set[str] = set()

    # -- being met --------------------------------------------------------------------------------------------

    def open_side_channel(self) -> None:
        """Once KV memory is registered and described: from here on others may meet this engine."""
        self._facts = self._facts_of(self.vllm_config)
        welcome = Welcome(
            engine_id=self.engine_id,
            facts=self._facts,
            clock_s=0.0,
            agent=self.xfer_handshake_metadata.agent_metadata_bytes,
        )
        self._listener = Listener(self._side_channel_at, self._side_channel_key, functools.partial(_welcome, welcome))

    def _facts_of(self, config: VllmConfig) -> dict[str, str]:
        """What must be equal of two engines that exchange KV, each under the name that a refusal uses."""
        model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
        return {
            "vllm": vllm.__version__,
            "connector": f"{CONNECTOR_VERSION}/{nixl_metadata.NIXL_CONNECTOR_VERSION}",
            "model": str(model.served_model_name),
            "weights": weights_digest(Path(model.model)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_dtype": str(cache.cache_dtype),
            "layers": str(model.get_total_num_hidden_layers()),
            "kv_heads": str(model.get_total_num_kv_heads()),
            "head_size": str(model.get_head_size()),
            "block_token_count": str(self.block_size),
            "block_bytes": _counted(self.block_len_per_layer),
            "kv_layout": self.kv_cache_layout,
            "attention": self.backend_name,
            "parallel": f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size} "
            f"dcp{parallel.decode_context_parallel_size} pcp{parallel.prefill_context_parallel_size}",
            "hybrid_kv": str(not config.scheduler_config.disable_hybrid_kv_cache_manager),
            "speculation": _speculation(config),
            "mode": "pull",
        }

    # -- meeting others ---------------------------------------------------------------------------------------

    def _nixl_handshake(
        self,
        host: str,
        port: int,
        remote_tp_size: int,
        expected_engine_id: str,
        remote_dcp_size: int = 1,
        remote_pp_size: int = 1,
        notif_agents_only: bool = False,
    ) -> tuple[dict[tuple[int, int], str], float]:
        """In place of vLLM's, in a thread of the handshake. Returns the peer's agent and its clock less ours."""
        if (remote_tp_size, remote_dcp_size, remote_pp_size, notif_agents_only) != (1, 1, 1, False):
            raise HandshakeError("the peer is spread over several processes, which is not supported")
        request = msgspec.msgpack.encode(Hello(self.engine_id, expected_engine_id))
        asked_at = time.perf_counter()
        reply = ask(host, port, self._side_channel_key, request, HANDSHAKE_TIMEOUT_S)
        answered_at = time.perf_counter()
        welcome = msgspec.msgpack.decode(reply, type=Welcome)
        if welcome.engine_id != expected_engine_id:
            raise HandshakeError("another engine answers there now")
        if different := differences(self._facts, welcome.facts):
            raise HandshakeError(f"the engines cannot exchange KV: {different}")
        metadata = msgspec.msgpack.decode(welcome.agent, type=base_worker.NixlAgentMetadata)
        if metadata.engine_id != expected_engine_id:
            raise HandshakeError("the agent is another engine's")
        with self._agent_turn:
            agent: str = self.add_remote_agent(metadata, 0, 1, 1)  # type: ignore[attr-defined]
        return {(0, 0): agent}, welcome.clock_s - (asked_at + answered_at) / 2

    def begin_introductions(self, peers: list[PeerAddress]) -> None:
        """Between two steps. Handshakes that are new begin; those of peers known already are over at once."""
        now = time.monotonic()
        for peer in peers:
            known = self._introductions.get(peer.engine_id)
            if known is not None and known.problem is None:
                continue
            while len(self._introductions) >= _MAX_NAMED_PEERS:
                del self._introductions[next(iter(self._introductions))]
            introduction = self._introductions[peer.engine_id] = _Introduction(peer, now)
            future = self._ensure_handshake(peer.engine_id, peer.host, peer.port, 1)  # type: ignore[attr-defined]
            pool = self._handshake_initiation_executor
            if future is None and known is not None and not known.problem:
                introduction.problem, introduction.ended_at = "", now
            elif future is None:
                pool.submit(self._met, peer, introduction, None)
            else:
                # vLLM's own callback was added before this one: by the time this runs, the peer is known. Through
                # the pool, because a handshake that is over already would have this thread run it.
                future.add_done_callback(functools.partial(pool.submit, self._met, peer, introduction))

    def introductions(self, engine_ids: list[str]) -> dict[str, tuple[str | None, float]]:
        """Between two steps: the problem of each (None: under way, "": none) and how long it took."""
        self._cleanup_remote_engines()  # an idle engine would not come to it by itself
        said: dict[str, tuple[str | None, float]] = {}
        for engine_id in engine_ids:
            known = self._introductions.get(engine_id)
            if known is not None:
                said[engine_id] = (known.problem, known.ended_at - known.started_at if known.ended_at else 0.0)
        return said

    def _met(self, peer: PeerAddress, introduction: _Introduction, future: Any) -> None:
        """In a thread of the handshake."""
        problem = ""
        self._warming.add(peer.engine_id)
        try:
            if future is not None:
                future.result()
            self._replace(peer)
            self._warm_up(peer.engine_id)
        except (HandshakeError, SideChannelError, OSError) as error:
            problem = str(error) or type(error).__name__
        except Exception as error:
            problem = type(error).__name__
        finally:
            self._warming.discard(peer.engine_id)
        introduction.ended_at = time.monotonic()
        introduction.problem = problem  # LAST: it says that the rest is there
        if problem:
            logger.warning("No KV can be exchanged with worker %s: %s", peer.worker_id, problem)

    def _replace(self, peer: PeerAddress) -> None:
        """A worker has one engine at a time: what is known of its last one goes, wherever that listened."""
        with self._handshake_lock:  # type: ignore[attr-defined]
            before = self._engine_of_worker.get(peer.worker_id)
            self._engine_of_worker[peer.worker_id] = peer.engine_id
            if before in (None, peer.engine_id):
                return
            addresses = self._engine_by_address  # type: ignore[attr-defined]
            for address in [address for address, engine_id in addresses.items() if engine_id == before]:
                del addresses[address]  # vLLM releases engines without one once their reads are over

    def _evict_stale_engines(self) -> None:
        """Whenever it meets a peer, vLLM forgets those that were not read from for an hour, dead or alive."""
        if self._warming:
            return  # as below; the next new peer comes by here again
        before = set(self._engine_last_active)
        super()._evict_stale_engines()  # type: ignore[misc]
        self._evicted |= before - self._engine_last_active.keys()

    def _meet_again(self) -> None:
        """Peers evicted though their worker has no other engine: or the next request of such a pair would pay for its
        first contact. Who is gone does not answer and stays forgotten."""
        evicted, self._evicted = self._evicted, set()
        introduced = [self._introductions[engine_id] for engine_id in evicted if engine_id in self._introductions]
        self.begin_introductions(
            [
                each.peer
                for each in introduced
                if self._engine_of_worker.get(each.peer.worker_id) == each.peer.engine_id
            ]
        )

    def _cleanup_remote_engines(self) -> None:
        """Once a step."""
        if self._evicted:
            self._meet_again()
        if not self._warming:  # a warm-up read is unknown to vLLM, which would take its descriptors away
            super()._cleanup_remote_engines()  # type: ignore[misc]

    def _warm_up(self, engine_id: str) -> None:
        """Reads the null block of every layer into our own: no request's data is touched on either side, and the
        connection, its buffers and its memory mappings are there when the first request comes."""
        here = self.src_xfer_handles_by_block_size[self.block_size]
        there = self.dst_xfer_side_handles[engine_id][0]
        # Descriptors are numbered layer by layer where all layers are alike. Otherwise only the first is certain to
        # be a null block; a wrong number would overwrite somebody's KV.
        is_plain = (
            len(self.kv_cache_config.transfer_groups) == 1
            and not self._has_mamba
            and set(self.region_num_blocks) <= {self.num_blocks}
        )
        layers = range(len(self.block_len_per_layer) if is_plain else 1)
        local = [layer * self.num_blocks for layer in layers]
        remote = [layer * self.dst_num_blocks[engine_id] for layer in layers]
        ends_at = time.monotonic() + WARM_UP_TIMEOUT_S
        for _ in range(WARM_UP_READ_COUNT):
            with self._agent_turn:
                handle = self.nixl_wrapper.make_prepped_xfer("READ", here, local, there, remote)
                state = self.nixl_wrapper.transfer(handle)
            while state == "PROC" and time.monotonic() < ends_at:
                time.sleep(0.001)
                state = self.nixl_wrapper.check_xfer_state(handle)
            # Also when the time is up: NIXL then cancels what is left of it.
            self.nixl_wrapper.release_xfer_handle(handle)
            if state != "DONE":
                what = "did not end in time" if state == "PROC" else "failed"
                raise HandshakeError(f"the warm-up read {what}: the engine's transports do not reach the peer's")

    def shutdown(self) -> None:
        listener, self._listener = getattr(self, "_listener", None), None
        if listener is not None:
            listener.close()
        super().shutdown()  # type: ignore[misc]


def _welcome(welcome: Welcome, request: bytes) -> bytes:
    hello = msgspec.msgpack.decode(request, type=Hello)
    if hello.wanted_engine_id != welcome.engine_id:
        # Who looks for an earlier engine of this address learns that it is gone, and not more.
        return msgspec.msgpack.encode(Welcome(welcome.engine_id, {}, time.perf_counter()))
    return msgspec.msgpack.encode(msgspec.structs.replace(welcome, clock_s=time.perf_counter()))


def weights_digest(directory: Path) -> str:
    """Tells models apart without reading gigabytes: what describes the model, and each file of weights by its name,
    size, first and last bytes. The directory's own name does not matter."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt", ".gguf") and path.is_file():
            size = path.stat().st_size
            digest.update(f"\n{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _counted(values: list[int]) -> str:
    """Lengths of all layers, briefly: ``98304 x 30``."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return " ".join(f"{value} x {count}" for value, count in runs)


def _speculation(config: VllmConfig) -> str:
    factors = nixl_metadata._get_speculative_compatibility_factors(config)
    return "none" if factors is None else hashlib.sha256(repr(sorted(factors.items())).encode()).hexdigest()[:16]


def _key_from_environment() -> bytes:
    key = bytes.fromhex(os.environ.pop(KEY_VARIABLE, ""))
    os.environ.pop(SECRET_VARIABLE, None)  # the rest of the process has no use for either
    if len(key) != hashlib.sha256().digest_size:
        raise RuntimeError(f"{KEY_VARIABLE} is missing or malformed: whoever starts the engine process sets it")
    return key


@contextlib.contextmanager
def _sleeping_progress_thread() -> Iterator[None]:
    """Agents made meanwhile may be called by several threads, and their progress thread, if they have one, sleeps
    until something arrives.

    NIXL's Python class fixes that thread's sleep at zero, with which it polls without end and takes half a core. Its
    loop is made for more: it waits on the transport's event descriptors for as long as it is told.
    """
    import nixl._api

    bindings = sys.modules[nixl._api.__name__].nixlBind
    stock = bindings.nixlAgentConfig

    class Sleeping(stock):  # type: ignore[misc, valid-type]
        pthrDelay = property(stock.pthrDelay.fget, lambda self, value: None)
        syncMode = property(stock.syncMode.fget, lambda self, value: None)

        def __init__(self) -> None:
            super().__init__()
            stock.pthrDelay.fset(self, PROGRESS_WAKE_UP_US)
            stock.syncMode.fset(self, bindings.NIXL_THREAD_SYNC_STRICT)

    bindings.nixlAgentConfig = Sleeping
    try:
        yield
    finally:
        bindings.nixlAgentConfig = stock

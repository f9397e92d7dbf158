"""What validity costs: how fast blocks are hashed, and what the proof adds to a pull, with digests and without."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from baton.leg import KvAdopted
from baton.request import EngineStop
from engine.config import EngineConfig, EngineIdentity
from engine.protocol import DecodeJob, PrefillJob
from kvtransfer.digest import BlockMemory

LAYER_COUNT = 30
LAYER_BLOCK_BYTES = 98_304
"""Keys and values of 128 tokens of the default model in one layer."""
PROMPT_TOKEN_COUNT = 2000
PULL_COUNT = 15


@dataclass(frozen=True, slots=True)
class PullCost:
    """Medians of ``PULL_COUNT`` pulls of one prompt, in turns with the other's, engines otherwise idle."""

    digests: str
    pulled_mb: float
    transfer_ms: float
    wire_ms: float
    verify_ms: float
    worst_verify_ms: float


def hash_gb_per_s(block_count: int = 16, round_count: int = 9) -> float:
    """Of blocks as they lie in an engine: 45 MB in 30 layers. The median round."""
    pools = [np.random.default_rng(layer).bytes(block_count * LAYER_BLOCK_BYTES) for layer in range(LAYER_COUNT)]
    sizes = [LAYER_BLOCK_BYTES] * LAYER_COUNT
    memory = BlockMemory([memoryview(pool) for pool in pools], sizes, sizes)
    rates = []
    for number in range(round_count):
        began_at = time.perf_counter()
        for block_id in range(block_count):
            memory.digest(block_id, nonce=number + 1, position=block_id)
        rates.append(sum(map(len, pools)) / (time.perf_counter() - began_at) / 1e9)
    return statistics.median(rates)


async def pull_costs(model: Path, first_port: int) -> tuple[PullCost, PullCost]:
    """Without digests, and with them: two readers take turns at the same held KV. Takes three ports."""
    from engine.vllm_engine import VllmEngine

    cores = sorted(os.sched_getaffinity(0))
    config = EngineConfig(
        model_path=str(model),
        model_name="smollm2-135m-instruct",
        kv_cache_bytes=384 << 20,
        max_context_token_count=4096,
        max_batched_token_count=512,
        enable_prefix_caching=False,
        enable_kv_digests=True,
    )

    def engine(name: str, number: int, *, enable_kv_digests: bool) -> VllmEngine:
        core = cores[min(number, 1) % len(cores)]  # both readers on the second: only one is at work at a time
        own = replace(
            config, cores=(core,), side_channel_port=first_port + number, enable_kv_digests=enable_kv_digests
        )
        return VllmEngine(own, EngineIdentity(name))

    prefiller = engine("prefill-0", 0, enable_kv_digests=True)
    readers = {
        "off": engine("decode-0", 1, enable_kv_digests=False),
        "on": engine("decode-1", 2, enable_kv_digests=True),
    }
    adopted: dict[str, list[KvAdopted]] = {digests: [] for digests in readers}
    try:
        await asyncio.gather(prefiller.start(), *(reader.start() for reader in readers.values()))
        rng = random.Random(1)  # noqa: S311  reproducible prompt
        prompt = tuple(rng.randrange(100, 49_000) for _ in range(PROMPT_TOKEN_COUNT))
        first = await prefiller.prefill(PrefillJob("cost", prompt, stop=EngineStop(8, ignore_eos=True)))
        assert first.held is not None
        stop = EngineStop(2, ignore_eos=True)
        job = DecodeJob("cost", (*prompt, first.first_token_id), stop=stop, pull=first.held.params)
        for number in range(PULL_COUNT + 1):  # the first connects
            for digests in sorted(readers, reverse=bool(number % 2)):
                told = [event async for event in readers[digests].decode(job)]
                assert isinstance(told[0], KvAdopted)
                assert told[0].recompute_reason is None
                adopted[digests].append(told[0])
        await prefiller.release(first.held.handle)
    finally:
        await asyncio.gather(prefiller.close(), *(reader.close() for reader in readers.values()))
    return _cost("off", adopted["off"][1:]), _cost("on", adopted["on"][1:])


def _cost(digests: str, kept: Sequence[KvAdopted]) -> PullCost:
    return PullCost(
        digests=digests,
        pulled_mb=round(kept[0].transfer_bytes / 1e6, 1),
        transfer_ms=round(1e3 * statistics.median(each.transfer_s for each in kept), 2),
        wire_ms=round(1e3 * statistics.median(each.wire_s for each in kept), 2),
        verify_ms=round(1e3 * statistics.median(each.verify_s for each in kept), 2),
        worst_verify_ms=round(1e3 * max(each.verify_s for each in kept), 2),
    )

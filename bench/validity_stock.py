"""The control with vLLM's own connector on both ends: engines stopped as in ``bench/validity_engines.py``.

Nothing of Baton's runs in these engines but two calls that look: what is held, and the process to stop. The decode
engine is stopped from outside before its pulls are asked for, so they wait in its queue as they would behind a long
step. vLLM looks at no expiry before it reads; it counts afterwards, at the prefill engine, reads that came too late
(``num_notifications_after_expiry``), and the answer has been given by then.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.request import LegFinish
from bench.validity_engines import (
    BLOCK,
    LEASE_S,
    TOKEN_COUNT,
    Asker,
    Moment,
    Question,
    StopCounts,
    Stopper,
    engine_config,
    go_on,
)
from engine.environment import engine_environment, put_in_force
from engine.protocol import HeldKv, Prefilled

MODULE = "bench.validity_stock"
_NOTICES = "num_notifications_after_expiry"


class StockCalls:
    """Mixed into vLLM's worker; runs in the engine process, between two steps."""

    def bench_process_id(self) -> int:
        return os.getpid()

    def bench_held_count(self) -> int:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group().connector_worker
        return len(worker._reqs_to_send) + len(worker._reqs_to_process)


@dataclass(frozen=True)
class StockLoad:
    used_block_count: int


class StockEngine:
    """Just what ``Asker`` needs of an engine."""

    def __init__(self, model: Path, port: int, core_index: int, *, pool_factor: int = 1) -> None:
        self._config = engine_config(model, port, core_index)
        self._pool_factor = pool_factor
        self._llm: Any = None
        self._numbers = itertools.count()
        self.process_id = 0
        self.notice_count = 0
        """Of reads that the engine heard of after their lease."""

    async def start(self) -> None:
        put_in_force(engine_environment(self._config))
        self._llm = await asyncio.to_thread(self._create)
        (self.process_id,) = await self._llm.collective_rpc("bench_process_id")

    def _create(self) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **named: Any) -> None:
                told = scheduler_stats.kv_connector_stats if scheduler_stats is not None else None
                engine.notice_count += len((told or {}).get(_NOTICES, ()))

            def log_engine_initialized(self) -> None:
                pass

        config = self._config
        arguments = AsyncEngineArgs(
            model=config.model_path,
            dtype=config.dtype,
            block_size=BLOCK,
            max_model_len=config.max_context_token_count,
            kv_cache_memory_bytes=self._pool_factor * config.kv_cache_bytes,
            max_num_seqs=config.max_running_count,
            max_num_batched_tokens=config.max_batched_token_count,
            enable_prefix_caching=False,
            enforce_eager=True,
            distributed_executor_backend="uni",  # one process computes and moves KV, as Baton's: stopped is stopped
            skip_tokenizer_init=True,
            worker_extension_cls=f"{MODULE}.StockCalls",
            kv_transfer_config=KVTransferConfig(
                kv_connector="NixlConnector",
                kv_role="kv_both",
                kv_buffer_device="cpu",
                engine_id=uuid.uuid4().hex,
                kv_connector_extra_config={"kv_lease_duration": int(LEASE_S)},
            ),
        )
        os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(config.side_channel_port)  # read by the child as it starts
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[Logger])

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
            del llm
            gc.collect()  # vLLM's client sits in reference cycles, and complains if it is found at the very end

    async def generate(
        self, prompt: tuple[int, ...], token_count: int, transfer: dict[str, Any] | None = None
    ) -> tuple[tuple[int, ...], dict[str, Any] | None]:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=token_count,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
        last = None
        async for output in self._llm.generate(tokens_input(list(prompt)), sampling, f"stock-{next(self._numbers)}"):
            last = output
        if last is None or len(last.outputs[0].token_ids) != token_count:
            raise RuntimeError("a stock engine did not answer whole")
        return tuple(last.outputs[0].token_ids), last.kv_transfer_params

    async def load_now(self) -> StockLoad:
        (count,) = await self._llm.collective_rpc("bench_held_count")
        return StockLoad(count)


@dataclass(frozen=True)
class StockEngines:
    prefiller: StockEngine
    decoder: StockEngine
    plan: None = None
    """These stop nowhere by themselves."""


class StockAsker(Asker):
    """As a proxy between two stock servers does it: the decode engine gets the prompt and what the prefill said."""

    async def alone(self, prompts: Any) -> list[tuple[int, ...]]:
        answers = await asyncio.gather(*(self.engines.decoder.generate(each, TOKEN_COUNT) for each in prompts))
        return [tokens for tokens, _ in answers]

    async def begun(self, question: Question) -> Prefilled:
        (first,), params = await self.engines.prefiller.generate(question.prompt, 1, {"do_remote_decode": True})
        assert params is not None
        return Prefilled(first, LegFinish.LENGTH, HeldKv("", 0, params), 0.0, 0.0, 0)

    async def ended(self, question: Question, first: Prefilled) -> tuple[str, tuple[int, ...]]:
        assert first.held is not None
        tokens, _ = await self.engines.decoder.generate(question.prompt, TOKEN_COUNT, first.held.params)
        return "used", tokens

    async def release(self, first: Prefilled) -> None:
        """There is no such call: its lease ends it."""


@asynccontextmanager
async def stock_engines(model: Path, first_port: int) -> AsyncIterator[StockEngines]:
    prefiller = StockEngine(model, first_port, 0)
    decoder = StockEngine(model, first_port + 1, 1, pool_factor=2)
    try:
        await prefiller.start()  # one after the other: their port is a variable of this process
        await decoder.start()
        yield StockEngines(prefiller, decoder)
    finally:
        go_on(decoder.process_id)
        await asyncio.gather(prefiller.close(), decoder.close())


async def run_stock_stops(
    model: Path, first_port: int, *, trial_count: int, seed: int, say: Callable[[str], None] = lambda text: None
) -> StopCounts:
    """At least so many pulls. Stops as ``Moment.BEFORE``, all holds ended by their leases."""
    counts = StopCounts()
    async with stock_engines(model, first_port) as engines:
        asker = StockAsker(engines, seed)
        stopper = Stopper(asker)
        await stopper.prepare()
        while counts.trial_count < trial_count:
            await stopper.stop_once(counts, Moment.BEFORE)
            # It counts a late notice when it steps, and tells of it with what it answers.
            for _ in range(2):
                await engines.prefiller.generate(asker.prompt(8), 2)
            counts.expired_notice_count = engines.prefiller.notice_count
            say(
                f"control, stock vLLM: {counts.trial_count} pulls, {counts.wrong_count} wrong, "
                f"{counts.expired_notice_count} notices after expiry"
            )
    return counts

"""vLLM behind the ``Engine`` protocol: token ids in, token ids out, one engine process per instance.

Owns the engine process and every request in it. Never tokenises, never logs a prompt, never decides which
worker does what. What vLLM needs to move KV is in ``kvtransfer/connector*.py``.

A job's last ``output_token_count`` tokens are output that the answer has already. The engine is given them as output,
not as prompt (``kvtransfer/connector_scheduler.py``): every sampling mode goes on as if one engine had done it all.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import threading
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from baton.errors import (
    BatonError,
    FieldViolation,
    engine_failed,
    internal,
    invalid_request,
    prompt_too_long,
    queue_full,
    ticket_refused,
)
from baton.leg import DecodeDone, DecodeEvent, Introduced, Stepped
from baton.request import LegFinish, Structure
from baton.structures import MAX_CHECK_S
from engine.adoption import StartTimes, kv_adopted
from engine.config import EngineConfig, EngineIdentity
from engine.environment import engine_environment, hand_down_key, put_in_force
from engine.legs import RETRY_AFTER_S, sampling_violations
from engine.protocol import DecodeJob, EngineInfo, EngineLoad, HeldKv, Prefilled, PrefillJob
from engine.vllm_sampling import can_be_read, prompt_logprobs, sampling_params, token_logprobs
from kvtransfer.connector_parent import claim_ownership
from kvtransfer.emitted_tokens import STRUCTURE_FAILED
from kvtransfer.hold_keeper import MAX_HOLD_COUNT
from kvtransfer.peer import PeerAddress
from kvtransfer.transfer_params import NixlParams, TransferLimits, validate_transfer_params

__all__ = ["VllmEngine"]

_CALL_TIMEOUT_S = 60.0
"""A call into the engine process waits for the step in progress, which may be a long chunk of prefill."""
_SHUTDOWN_TIMEOUT_S = 5.0
_INTRODUCTION_TIMEOUT_S = 10.0
_INTRODUCTION_POLL_S = 0.05
_KNOWN_STRUCTURE_COUNT = 256
_PEER_FIELDS = tuple(f.name for f in fields(NixlParams))


class VllmEngine:
    """See ``engine.protocol.Engine``. ``start`` takes half a minute on CPU and does not block the loop."""

    def __init__(self, config: EngineConfig, identity: EngineIdentity | None = None) -> None:
        self._config = config
        self._identity = identity or EngineIdentity()
        self.process_id = 0
        """Of the engine process, once started."""
        self._llm: Any = None
        self._info: EngineInfo | None = None
        self._block_bytes = 0
        self._transfer_peer: PeerAddress | None = None
        self._reports: Any = None
        self._owner: threading.Thread | None = None
        self._may_end = threading.Event()
        self._limits = TransferLimits(
            allowed_hosts=frozenset((*config.peer_hosts, config.side_channel_host)),
            block_token_count=config.block_token_count,
        )
        self._leg_numbers = itertools.count()
        self._background: set[asyncio.Task[None]] = set()
        self._known_structures: dict[Structure, None] = {}
        """Read before and found good, oldest first."""
        self._structure_reader = asyncio.Semaphore(1)

    # -- life ----------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine is not started"
        return self._info

    @property
    def transfer_peer(self) -> PeerAddress | None:
        return self._transfer_peer

    async def start(self) -> None:
        if self._owner is not None:
            raise internal("an engine is started once")
        config = self._config
        if not (Path(config.model_path) / "config.json").is_file():
            raise self._failed(f"no model in {config.model_path}: prepare it, or correct model_path")
        put_in_force(engine_environment(config))
        hand_down_key(self._identity.side_channel_key)
        claim_ownership()
        loop = asyncio.get_running_loop()
        started: asyncio.Future[tuple[Any, Any]] = loop.create_future()
        # A thread of its own that lives as long as the engine: the kernel ends a process that asked to die
        # with its parent when the *thread* that made it ends. The affinity is that thread's, too, and the
        # engine process inherits it while this process keeps its own.
        self._owner = threading.Thread(target=self._own, args=(loop, started), name="baton-engine-owner", daemon=True)
        self._owner.start()
        self._llm, self._reports = await started
        sizes = await self._call("baton_describe")
        self._block_bytes = sizes["block_bytes"]
        self.process_id = sizes["process_id"]
        self._transfer_peer = PeerAddress(
            self._identity.worker_id,
            self._identity.epoch or "-",
            sizes["engine_id"],
            config.side_channel_host,
            config.side_channel_port,
        )
        model_config = self._llm.model_config
        self._info = EngineInfo(
            name=f"vllm {_vllm_version()}",
            model=config.model_name,
            max_context_token_count=model_config.max_model_len,
            block_token_count=config.block_token_count,
            block_count=sizes["block_count"],
            max_running_count=config.max_running_count,
            kv_bytes_per_token=sizes["block_bytes"] // config.block_token_count,
            vocab_size=model_config.get_vocab_size(),
        )

    def _own(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[tuple[Any, Any]]) -> None:
        llm = None
        try:
            if self._config.cores:
                os.sched_setaffinity(0, self._config.cores)
            llm, reports = _create(self._config, self._identity)
        except BaseException as error:
            failure = self._failed(f"the engine did not start: {type(error).__name__}: {error}")
            failure.__cause__ = error
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(_settle, started, None, failure)
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, started, (llm, reports), None)
        self._may_end.wait()
        llm.shutdown(timeout=_SHUTDOWN_TIMEOUT_S)
        # A library keeps an exception of its import, hence this frame, for good; vLLM's client must not stay with
        # it, because its finalizer fails at the interpreter's end.
        del llm, started

    async def close(self) -> None:
        """Ends the engine process; requests in it fail. Idempotent."""
        llm, self._llm = self._llm, None
        for task in self._background:
            task.cancel()
        if llm is not None:
            # Before the process ends, or vLLM would report a crash: first those who wait, then who serves them.
            llm.output_processor.propagate_error(self._failed("the engine was closed"))
            if (handler := llm.output_handler) is not None:
                handler.cancel()
                await asyncio.gather(handler, return_exceptions=True)
            del llm, handler
        self._may_end.set()
        if self._owner is not None:
            # While the engine is still starting, this waits until it has, and then ends it.
            await asyncio.to_thread(self._owner.join)
            gc.collect()  # vLLM's client sits in reference cycles

    async def check_health(self) -> None:
        try:
            await self._running.check_health()
        except Exception as error:
            raise self._failed("the engine process is dead") from error

    # -- the two phases ------------------------------------------------------------------------

    async def prefill(self, job: PrefillJob) -> Prefilled:
        """See the protocol. Prompt of at least one token and at most the context less one."""
        arrived = asyncio.get_running_loop().time()
        wants_more = job.hold_kv and job.stop.max_token_count > 1
        transfer = {"do_remote_decode": True, "baton_lease_s": float(job.lease_s)} if wants_more else None
        handle = self._mint_id(job.leg_id)
        last = None
        scores = None
        is_handed_over = False
        try:
            async with aclosing(self._generate(handle, job, 1, transfer)) as outputs:
                async for output in outputs:
                    last = output
                    scores = prompt_logprobs(job, output.prompt_logprobs) or scores
            if last is None or not last.outputs[0].token_ids:
                raise self._failed("the engine ended a prefill without a token")
            finish = LegFinish.STOP if last.outputs[0].finish_reason == "stop" else None
            held = None
            if finish is None and not wants_more:
                finish = LegFinish.LENGTH
            elif finish is None:
                if last.kv_transfer_params is None:
                    # Every hold record is taken. KV that nothing vouches for would never be believed.
                    raise queue_full(MAX_HOLD_COUNT, MAX_HOLD_COUNT, RETRY_AFTER_S)
                params = self._checked({name: last.kv_transfer_params[name] for name in _PEER_FIELDS})
                block_count = sum(map(len, params.remote_block_ids))
                held = HeldKv(handle, block_count * self._block_bytes, params.to_vllm())
            prefilled = Prefilled(
                first_token_id=int(last.outputs[0].token_ids[0]),
                finish=finish,
                held=held,
                queue_s=max(0.0, last.metrics.scheduled_ts - arrived),
                compute_s=max(0.0, last.metrics.first_token_ts - last.metrics.scheduled_ts),
                cached_token_count=last.num_cached_tokens or 0,
                first_logprobs=(*token_logprobs(job, last.outputs[0]), None)[0],
                prompt_logprobs=scores,
            )
            is_handed_over = True
            return prefilled
        finally:
            if wants_more and not is_handed_over:
                # Cancelled or failed: the engine may have finished all the same and hold the KV for us. It answers
                # only after the step it is in, which the caller need not wait for.
                self._in_background(self.release(handle))

    async def decode(self, job: DecodeJob) -> AsyncGenerator[DecodeEvent, None]:
        arrived = asyncio.get_running_loop().time()
        transfer = None
        if job.pull is not None:
            params = self._checked(job.pull)
            if params.token_count != len(job.prompt_token_ids) - 1:
                raise ticket_refused("params", "remote_num_tokens does not match the prompt")
            transfer = {**params.to_vllm(), "do_remote_prefill": True, "do_remote_decode": False}
        request_id = self._mint_id(job.leg_id)
        reports = self._reports
        is_adopted = False
        try:
            stream = self._generate(request_id, job, job.stop.max_token_count, transfer)
            if transfer is not None:
                stream = self._unless_given_up(request_id, stream)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    (completion,) = output.outputs
                    if not is_adopted:
                        is_adopted = True
                        yield kv_adopted(
                            job,
                            StartTimes(arrived, output.metrics.scheduled_ts, output.metrics.first_token_ts),
                            told_at=asyncio.get_running_loop().time(),
                            cached_token_count=output.num_cached_tokens or 0,
                            block_token_count=self._config.block_token_count,
                            pull=reports.take_pull(request_id),
                            is_with_tokens=bool(completion.token_ids),
                        )
                    if completion.token_ids:
                        yield Stepped(tuple(completion.token_ids), token_logprobs(job, completion))
                    if output.finished:
                        is_stop = completion.finish_reason == "stop"
                        yield DecodeDone(LegFinish.STOP if is_stop else LegFinish.LENGTH)
                        return
            raise self._failed("the engine ended a decode without saying why")
        finally:
            reports.take_pull(request_id)

    async def _unless_given_up(
        self, request_id: str, outputs: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        """The outputs of a request that pulls. Raises TICKET_REFUSED when its pull is given up: the request ends, and
        the engine keeps its blocks from others until the read is over."""
        async with aclosing(outputs):
            try:
                async with asyncio.timeout(None) as patience:
                    now = asyncio.get_running_loop().time
                    self._reports.expect_pull(request_id, lambda: patience.reschedule(now()))
                    first = await anext(outputs, None)
            except TimeoutError:
                if not patience.expired():
                    raise
                detail = f"its read was not over after {self._config.pull_timeout_s:g} s"
                raise ticket_refused("pull_timed_out", detail) from None
            if first is not None:
                yield first
            async for output in outputs:
                yield output

    async def release(self, handle: str) -> None:
        await self._call("baton_release", handle)

    async def introduce(self, peers: Sequence[PeerAddress]) -> list[Introduced]:
        """See the protocol. Not a loop that a request waits for: it asks the engine process now and then."""
        told = [asdict(peer) for peer in peers]
        engine_ids = [peer.engine_id for peer in peers]
        await self._call("baton_introduce", told)
        ends_at = asyncio.get_running_loop().time() + _INTRODUCTION_TIMEOUT_S
        while True:
            said = await self._call("baton_introductions", engine_ids)
            is_over = all(engine_id in said and said[engine_id][0] is not None for engine_id in engine_ids)
            if is_over or asyncio.get_running_loop().time() >= ends_at:
                break
            await asyncio.sleep(_INTRODUCTION_POLL_S)
        late = ("is not over in time", _INTRODUCTION_TIMEOUT_S)
        results = []
        for peer in peers:
            problem, duration_s = said.get(peer.engine_id, late)
            if problem is None:
                problem, duration_s = late
            results.append(Introduced(peer.worker_id, peer.epoch, problem, duration_s))
        return results

    # -- load ----------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        reports = self._reports
        block_count = self.info.block_count
        return EngineLoad(
            running_count=reports.running_count,
            waiting_count=reports.waiting_count,
            used_block_count=round(reports.kv_usage * block_count),
            block_count=block_count,
            quarantined_pull_count=reports.quarantined_pull_count,
        )

    async def load_now(self) -> EngineLoad:
        occupancy = await self._call("baton_occupancy")
        load = self.load()
        return EngineLoad(
            running_count=load.running_count,
            waiting_count=load.waiting_count,
            used_block_count=occupancy["used_block_count"],
            block_count=load.block_count,
            quarantined_pull_count=load.quarantined_pull_count,
        )

    async def fault_counts(self) -> dict[str, int]:
        """For tests: the faults that ``transfer_faults`` brought about, by operation and kind."""
        counts: dict[str, int] = await self._call("baton_fault_counts")
        return counts

    async def reset_prefix_cache(self) -> None:
        """Forgets cached prefixes, for measurements and comparisons. Fails while requests or held KV use blocks."""
        if not await self._running.reset_prefix_cache():
            raise self._failed("the prefix cache is in use; finish or release what uses it first")

    # -- inside --------------------------------------------------------------------------------

    @property
    def _running(self) -> Any:
        if self._llm is None:
            raise self._failed("the engine is not running")
        return self._llm

    def _failed(self, detail: str) -> BatonError:
        return engine_failed(self._identity.worker_id, detail)

    def _mint_id(self, leg_id: str) -> str:
        """Unique in this engine, whatever the caller's id is; it travels in notices between engines."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', leg_id)[:100]}.{next(self._leg_numbers)}"

    async def _call(self, method: str, *args: Any) -> Any:
        """A method of ``WorkerCalls``, run in the engine process between two steps."""
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                (result,) = await self._running.collective_rpc(method, args=args)
        except BatonError:
            raise
        except TimeoutError as error:
            raise self._failed(f"the engine did not answer {method} in {_CALL_TIMEOUT_S:.0f} s") from error
        except Exception as error:
            raise self._failed(f"{method} failed in the engine: {type(error).__name__}") from error
        return result

    async def _generate(
        self, request_id: str, job: PrefillJob | DecodeJob, max_token_count: int, transfer: dict[str, Any] | None
    ) -> AsyncGenerator[Any, None]:
        """The engine's outputs; errors become ``BatonError``. However it ends, the request ends with it."""
        self._check(job, max_token_count)
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        if job.sampling.structure is not None:
            await self._check_structure(job.sampling.structure)
        llm = self._running
        try:
            sampling = sampling_params(job, max_token_count, transfer)
        except (VLLMClientError, ValueError) as error:
            what = getattr(error, "parameter", None) or "value"
            raise invalid_request([FieldViolation(f"sampling.{what}", "was refused by the engine")]) from None
        is_finished = False
        true_prompt = job.prompt_token_ids[: len(job.prompt_token_ids) - job.output_token_count]
        prompt = tokens_input(list(true_prompt), cache_salt=job.tenant or None)
        # Ours: larger goes first. vLLM's: smaller does.
        outputs = llm.generate(prompt, sampling, request_id, priority=-job.priority)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if output.finished:
                        is_finished = True
                        reason = output.outputs[0].finish_reason
                        is_given_up = (output.kv_transfer_params or {}).get(STRUCTURE_FAILED)
                        if is_given_up or (reason == "error" and job.sampling.structure is not None):
                            # A grammar that does not compile, that was given up, or that no token may follow: another
                            # engine would say the same. Failed pulls never come here, they are recomputed.
                            what = "is more than the engine can follow, or is contradicted by another field"
                            raise invalid_request([FieldViolation("sampling.structure", what)])
                        if reason not in ("stop", "length"):
                            raise self._failed(f"the engine ended the request: {reason}")
                    yield output
        except BatonError:
            raise
        except VLLMClientError as error:
            # The text may quote the prompt; its type and field say enough.
            what = getattr(error, "parameter", None) or "value"
            raise invalid_request([FieldViolation(f"sampling.{what}", "was refused by the engine")]) from None
        except Exception as error:
            raise self._failed(f"the engine failed: {type(error).__name__}") from error
        finally:
            if not is_finished and not llm.errored:
                # vLLM aborts by itself unless it was interrupted while it added the request.
                await self._finally(llm.abort(request_id))

    async def _finally(self, closing: Any) -> None:
        """Runs to its end even when this task is being cancelled, and keeps the original error."""
        task = asyncio.ensure_future(closing)
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()

    def _in_background(self, closing: Coroutine[Any, Any, None]) -> None:
        """Runs until done or until ``close``; an engine that cannot answer any more has nothing to release."""
        task = asyncio.create_task(closing)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _checked(self, params: Mapping[str, Any]) -> NixlParams:
        """vLLM trusts what it is told to pull and dies of a malformed value: this is the last check before it."""
        checked = validate_transfer_params(params, self._limits)
        if not isinstance(checked, NixlParams):
            raise ticket_refused("params", "not this engine's kind of transfer")
        return checked

    def _check(self, job: PrefillJob | DecodeJob, max_token_count: int) -> None:
        info = self.info
        prompt_token_ids = job.prompt_token_ids
        if len(prompt_token_ids) > info.max_context_token_count - 1:
            raise prompt_too_long(len(prompt_token_ids), info.max_context_token_count - 1)
        if not prompt_token_ids:
            raise invalid_request([FieldViolation("prompt", "has no tokens")])
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < info.vocab_size:
            raise invalid_request(
                [FieldViolation("prompt.token_ids", f"holds an id outside 0 to {info.vocab_size - 1}")]
            )
        if max_token_count < 1:
            raise invalid_request([FieldViolation("stop.max_output_token_count", "must be at least 1")])
        if not 0 <= job.output_token_count < len(prompt_token_ids):
            raise invalid_request([FieldViolation("output_token_count", "must leave at least one token of prompt")])
        violations = list(sampling_violations(job.sampling, info))
        if violations:
            raise invalid_request(violations)

    async def _check_structure(self, structure: Structure) -> None:
        """Reads it as the engine will, beside the event loop: what takes too long here would hold the loop up."""
        if structure in self._known_structures:
            return
        async with self._structure_reader:
            reading = asyncio.get_running_loop().run_in_executor(None, can_be_read, structure)
            done, _ = await asyncio.wait([reading], timeout=MAX_CHECK_S)
        if not done:
            reading.add_done_callback(lambda late: late.exception())
            raise invalid_request([FieldViolation("sampling.structure", "takes too long to read")])
        if (bug := reading.exception()) is not None:
            # Not the caller's fault. Its text, which a chain of errors would show in a log, may quote the structure.
            raise self._failed(f"a structure could not be checked: {type(bug).__name__}")
        if not reading.result():
            raise invalid_request([FieldViolation("sampling.structure", "is not one that the engine can follow")])
        if len(self._known_structures) >= _KNOWN_STRUCTURE_COUNT:
            self._known_structures.pop(next(iter(self._known_structures)))
        self._known_structures[structure] = None


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def _create(config: EngineConfig, identity: EngineIdentity) -> tuple[Any, Any]:
    """Starts the engine process and returns once it is ready: the client and its reports. Takes half a minute,
    hence runs in the owner thread, as do vLLM's slow imports."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine.vllm_arguments import engine_arguments
    from kvtransfer.connector_reports import Reports

    reports = Reports()
    arguments = AsyncEngineArgs(**engine_arguments(config, identity))
    return AsyncLLM.from_engine_args(arguments, stat_loggers=[reports.attach]), reports

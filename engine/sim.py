"""A simulated engine: real scheduling, real blocks, real prefix cache and handoff; only the arithmetic is a clock.

``SimEngine`` satisfies ``engine.protocol.Engine``. It owns one task, which is the engine: admit, schedule, run
(wait for as long as the cost model says), apply, report. A request's own coroutine waits for its turn there, does
its pull, and frees what it owns however it ends. Time is the running loop's, so it works in virtual and in real time.
Sampling parameters are ignored: what is said follows from the tokens before it alone (``sim_tokens``), except that an
answer does not end before its least length. It is for tests, for the simulator and for scale; never what a user gets
from the main command.

A pull that fails (source gone, KV released or expired) is recomputed here and reported, as the real engine does
under its "recompute" policy. Faults for tests: ``kill``, ``hang`` and ``resume``, and ``extra_delay_s``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from baton.errors import FieldViolation, engine_failed, invalid_request, prompt_too_long, queue_full, ticket_refused
from baton.leg import DecodeDone, DecodeEvent, Introduced, KvAdopted, RecomputeReason, Stepped
from engine import sim_scheduler
from engine.blocks import BlockPool, BlockTable, block_count_for
from engine.protocol import DecodeJob, EngineInfo, EngineLoad, HeldKv, Prefilled, PrefillJob
from engine.sim_config import PhaseDelays, SimConfig
from engine.sim_pace import RESOLUTION_S, Pace, Row
from engine.sim_scheduler import Batch, Scheduler, State
from engine.sim_tokens import TokenRule, simulated_answer
from kvtransfer.peer import PeerAddress
from kvtransfer.simulated import HeldContent, PullFailed, PullGivenUp, SimNetwork, SimulatedPull, simulated_params
from kvtransfer.transfer_params import SimulatedParams

__all__ = ["PhaseDelays", "SimConfig", "SimEngine", "SimNetwork", "TokenRule", "simulated_answer"]

LONGEST_SILENCE_S = 5.0
"""For so long at most are tokens kept back under a pace: the router takes long silences for death."""

LONGEST_ROW = 8
"""Steps planned at once under a pace: most rows are cut short by something that comes, and planned anew."""

# Over all engines of the process: a handle of an engine that was replaced never names KV of its successor.
_handle_numbers = itertools.count(1)


@dataclass(eq=False, slots=True)
class _Leg:
    """A request inside the engine, and the bell its coroutine waits for."""

    sequence: sim_scheduler.Sequence
    arrived_at: float
    leg_id: str
    told_token_count: int = 0
    """Output tokens when its coroutine was last woken for some, and when that was."""
    told_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_queued: bool = False


@dataclass(frozen=True, slots=True)
class _Held:
    content: HeldContent
    table: BlockTable
    backstop: asyncio.TimerHandle


@dataclass(frozen=True, slots=True)
class _Pulled:
    wait_s: float
    transfer_s: float
    ended_at: float
    byte_count: int
    block_count: int
    recomputed_token_count: int
    recompute_reason: RecomputeReason | None = None
    pull_count: int = 1


class SimEngine:
    """One simulated engine. ``extra_delay_s`` may be replaced at any time; it starts as configured."""

    def __init__(self, config: SimConfig, network: SimNetwork, pace: Pace | None = None) -> None:
        """``pace``: how a real engine's time differs from the cost model's; see there what else it turns on. Raises
        ``ValueError`` for one with micro-batches: its rows are steps of all that runs."""
        if pace is not None and config.micro_batch_count > 1:
            raise ValueError(f"micro_batch_count: is {config.micro_batch_count}; with a pace it must be 1")
        self.config = config
        self.network = network
        self.extra_delay_s = config.extra_delay_s
        self.pool = BlockPool(
            config.block_count,
            config.block_token_count,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.pool,
            config.tokens,
            max_running_count=config.max_running_count,
            max_batched_token_count=config.max_batched_token_count,
            max_context_token_count=config.max_context_token_count,
            admits_by_budget=pace is not None,
            micro_batch_count=config.micro_batch_count,
        )
        self._pace = pace
        self._core = None if pace is None else pace.machine.core(self._speed_changed)
        self._row: Row | None = None
        self._drawn_ratios: list[float] = []
        """Of the next decode steps: drawn for a row that was cut short, and not used yet."""
        self._pause: asyncio.Future[None] | None = None
        self._link_turn = asyncio.Lock()
        # The mutable state, besides the scheduler's: requests inside, KV held after prefills, and whether it lives.
        self._legs: dict[sim_scheduler.Sequence, _Leg] = {}
        self._held: dict[str, _Held] = {}
        self._quarantined: dict[BlockTable, asyncio.TimerHandle] = {}
        self._death: str | None = None
        self._died = asyncio.Event()
        self._is_going = asyncio.Event()
        self._is_going.set()
        self._has_work = asyncio.Event()
        self._pull_ended = asyncio.Event()
        self._orders = itertools.count()
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            name="simulated",
            model=self.config.model_name,
            max_context_token_count=self.config.max_context_token_count,
            block_token_count=self.config.block_token_count,
            block_count=self.config.block_count,
            max_running_count=self.config.max_running_count,
            kv_bytes_per_token=self.config.cost.kv_bytes_per_token,
            vocab_size=self.config.tokens.vocab_size,
            sets_answers_aside=True,
        )

    @property
    def transfer_peer(self) -> PeerAddress | None:
        """None: simulated engines of one network know each other."""
        return None

    async def introduce(self, peers: Sequence[PeerAddress]) -> list[Introduced]:
        return [Introduced(peer.worker_id, peer.epoch, "", 0.0) for peer in peers]

    @property
    def held_count(self) -> int:
        """Prefills whose KV waits for a puller."""
        return len(self._held)

    @property
    def quarantined_count(self) -> int:
        """Pulls that ended while their read had not."""
        return len(self._quarantined)

    async def start(self) -> None:
        if self._task is not None or self._death is not None:
            raise RuntimeError("an engine is started once")
        self.network.join(self.config.engine_id, self)
        self._task = asyncio.create_task(self._run(), name=f"simulated engine {self.config.engine_id}")
        await self._sleep(self.config.start_s)

    async def prefill(self, job: PrefillJob) -> Prefilled:
        leg = self._enter(job, is_prefill=True, keeps_kv=job.hold_kv)
        sequence = leg.sequence
        try:
            await self._queue(leg)
            await self._until(leg, lambda: sequence.state is State.DONE)
            assert sequence.scheduled_at is not None
            assert sequence.first_token_at is not None
            held = None
            if job.hold_kv and sequence.finish is None:
                held = self._hold(sequence, job.lease_s)  # nothing is awaited after this: the caller owns it now
            return Prefilled(
                first_token_id=sequence.token_ids[-1],
                finish=sequence.finish,
                held=held,
                queue_s=sequence.scheduled_at - leg.arrived_at,
                compute_s=sequence.first_token_at - sequence.scheduled_at,
                cached_token_count=sequence.cached_token_count,
                first_logprobs=sequence.logprobs[0] if sequence.logprobs else None,
                prompt_logprobs=None
                if job.prompt_logprob_count is None
                else self.config.tokens.prompt_logprobs(job.prompt_token_ids, job.prompt_logprob_count),
            )
        finally:
            self._leave(leg)

    async def decode(self, job: DecodeJob) -> AsyncGenerator[DecodeEvent, None]:
        params = None if job.pull is None else simulated_params(job.pull)
        if params is not None and params.token_count >= len(job.prompt_token_ids):
            raise ticket_refused("params", "more tokens are held than the prompt has before its last token")
        leg = self._enter(job, is_prefill=False, pull_token_count=0 if params is None else params.token_count)
        sequence = leg.sequence
        try:
            await self._queue(leg)
            if params is None:
                await self._until(leg, lambda: sequence.first_token_at is not None)
                yield self._adopted_by_computing(leg)
            else:
                await self._until(leg, lambda: sequence.state is not State.WAITING)
                pulled = await self._pull(leg, params)
                # Recomputed KV is in place when its first token is; pulled KV already is.
                await self._until(
                    leg,
                    lambda: (
                        (sequence.first_token_at if pulled.recomputed_token_count else sequence.scheduled_at)
                        is not None
                    ),
                )
                yield self._adopted_by_pulling(leg, pulled)
            reported_count = 0
            while sequence.finish is None or reported_count < sequence.output_token_count:
                await self._until(
                    leg,
                    lambda count=reported_count: sequence.output_token_count > count,  # type: ignore[misc]
                )
                # A slow consumer gets several steps at once; how many is bounded by max_token_count.
                fresh = tuple(sequence.token_ids[sequence.prompt_token_count + reported_count :])
                logprobs = tuple(sequence.logprobs[reported_count:])
                reported_count += len(fresh)
                yield Stepped(fresh, logprobs)
            yield DecodeDone(sequence.finish)
        finally:
            self._leave(leg)

    async def release(self, handle: str) -> None:
        self._check_alive()
        await self._going()
        self._drop_held(handle)

    def load(self) -> EngineLoad:
        """Of a dead engine: nothing runs and nothing is used."""
        not_queued_count = sum(not leg.is_queued for leg in self._legs.values())
        return EngineLoad(
            running_count=self.scheduler.running_count,
            waiting_count=self.scheduler.waiting_count + not_queued_count,
            used_block_count=self.pool.used_block_count,
            block_count=self.config.block_count,
            quarantined_pull_count=self.quarantined_count,
        )

    async def load_now(self) -> EngineLoad:
        self._check_alive()
        await self._going()
        return self.load()

    async def check_health(self) -> None:
        """A hung engine passes: it is not known to be dead."""
        self._check_alive()

    async def close(self) -> None:
        """Requests inside fail with ENGINE_FAILED. Raises what a bug in the engine's task raised, if any."""
        self._die("the engine was closed")
        self.network.leave(self.config.engine_id, self)
        if self._pace is not None and self._core is not None:
            self._pace.machine.leave(self._core)
        task, self._task = self._task, None
        if task is not None:
            with suppress(asyncio.CancelledError):
                await task

    # Faults.

    def kill(self) -> None:
        """Dies at once: its blocks vanish, and every call in progress and to come raises ENGINE_FAILED."""
        self._die("the engine died")

    def hang(self) -> None:
        """Stops making progress and answering, without dying, until ``resume``."""
        self._is_going.clear()

    def resume(self) -> None:
        self._is_going.set()

    # What the network asks of a source.

    def held_content(self, handle: str) -> HeldContent | None:
        held = self._held.get(handle)
        return None if held is None else held.content

    def note_pulled(self, handle: str) -> None:
        self._drop_held(handle)

    def __repr__(self) -> str:
        state = "dead" if self._death else "going" if self._is_going.is_set() else "hung"
        return f"<SimEngine {self.config.engine_id} {state} {self.scheduler} {len(self._held)} held {self.pool}>"

    # The engine's task.

    async def _run(self) -> None:
        try:
            while True:
                await self._is_going.wait()
                self._has_work.clear()
                self._ring(self.scheduler.admit())
                pull_count = await self._finish_pulls()
                batch = self.scheduler.schedule(_now())
                if not batch and self.scheduler.running_count:
                    # The turn of an empty micro-batch takes its time, too: the others come no faster for it.
                    await asyncio.sleep(self.config.cost.decode.base_s)
                    continue
                if not batch:
                    await self._rest()
                    continue
                begun = (*batch.decoding, *(sequence for sequence, _ in batch.chunks))
                if self._pace is not None:
                    self._ring([sequence for sequence in begun if sequence.output_token_count == 0])
                    await self._run_row(batch, pull_count, self._pace)
                    continue
                self._ring(begun)
                await asyncio.sleep(self._step_s(batch))
                await self._is_going.wait()
                self._ring(self.scheduler.apply(batch, _now()))
        except Exception:
            self._die("a bug in the simulated engine", is_own_task=True)
            raise

    def _step_s(self, batch: Batch) -> float:
        step_s = self.config.cost.step_s([chunk for _, chunk in batch.chunks], batch.context_token_counts)
        if batch.ends_a_prompt:
            step_s += self.extra_delay_s.prefill
        if batch.decoding:
            step_s += self.extra_delay_s.decode
        return step_s

    # What a pace turns on.

    async def _rest(self) -> None:
        if self._has_work.is_set():
            return
        if self._core is not None:
            self._core.rest()
        await self._has_work.wait()

    async def _finish_pulls(self) -> int:
        """Where pulls are part of a step, waits until those of the requests just admitted are over. Returns how many
        there were."""
        if self._core is None or self.scheduler.pulling_count == 0:
            return 0
        pull_count = self.scheduler.pulling_count
        if self._core.stepping is None:
            self._core.begin(is_prefill=False)
        while self.scheduler.pulling_count:
            self._pull_ended.clear()
            await self._pull_ended.wait()
        self.scheduler.start_pulled()
        return pull_count

    async def _run_row(self, batch: Batch, pull_count: int, pace: Pace) -> None:
        """One step, or several of decoding alone: until one of them ends an answer, or something comes meanwhile and
        wants to be in the next."""
        assert self._core is not None
        row_works_s = self._row_works_s(batch, pace)
        row_works_s[0] += pace.pulled_step_s(pull_count) if pull_count else 0.0
        self._core.begin(is_prefill=bool(batch.chunks))
        row = self._row = Row(_now(), row_works_s, self._core.speed())
        try:
            last = len(row) - 1
            while True:
                if self._has_work.is_set():
                    last = min(last, row.under_way(_now()))
                end_at = row.end_at(last)
                if _now() + RESOLUTION_S >= end_at:
                    break
                await self._pause_until(end_at)
        finally:
            self._row = None
        await self._is_going.wait()
        ends_at = [row.end_at(index) for index in range(last + 1)]
        before = {each: each.output_token_count for each in (*batch.decoding, *(each for each, _ in batch.chunks))}
        if batch.chunks:
            advanced = self.scheduler.apply(batch, ends_at[0])
        else:
            advanced = self.scheduler.apply_certain(batch, ends_at)
            del self._drawn_ratios[: len(ends_at)]
        for sequence in advanced:
            if (leg := self._legs.get(sequence)) is not None:
                pace.on_tokens(leg.leg_id, sequence.answered_before + before[sequence], ends_at, len(before))
        self._ring([sequence for sequence in advanced if self._is_due(sequence, pace)])

    def _is_due(self, sequence: sim_scheduler.Sequence, pace: Pace) -> bool:
        """Whether its new tokens go out now, or may wait for more: nobody acts on the middle of an answer."""
        if (leg := self._legs.get(sequence)) is None:
            return False
        count, now = sequence.output_token_count, _now()
        is_due = (
            sequence.finish is not None
            or count == 1
            or count - leg.told_token_count >= pace.look_ahead_step_count
            or now - leg.told_at >= LONGEST_SILENCE_S
            or pace.is_exact(leg.leg_id)
        )
        if is_due:
            leg.told_token_count, leg.told_at = count, now
        return is_due

    def _row_works_s(self, batch: Batch, pace: Pace) -> list[float]:
        cost = self.config.cost
        if batch.chunks:
            chunks = [chunk for _, chunk in batch.chunks]
            work_s = cost.step_s(chunks, batch.context_token_counts)
            return [work_s * pace.ratio("mixed" if batch.decoding else "prefill")]
        contexts = batch.context_token_counts
        count = self._look_ahead_count(batch, pace)
        while len(self._drawn_ratios) < count:
            self._drawn_ratios.append(pace.ratio("decode"))
        steps = zip(range(count), self._drawn_ratios, strict=False)
        return [cost.step_s((), [context + step for context in contexts]) * ratio for step, ratio in steps]

    def _look_ahead_count(self, batch: Batch, pace: Pace) -> int:
        count = min(pace.look_ahead_step_count, LONGEST_ROW)
        for sequence in batch.decoding:
            leg = self._legs.get(sequence)
            if leg is None or pace.is_exact(leg.leg_id):
                return 1
            count = min(count, self.scheduler.certain_step_count(sequence))
        return count

    async def _pause_until(self, at_s: float) -> None:
        """Until then, or until ``_wake``, or until its speed has changed."""
        loop = asyncio.get_running_loop()
        pause = self._pause = loop.create_future()
        timer = loop.call_at(at_s, self._end_pause)
        try:
            await pause
        finally:
            timer.cancel()
            self._pause = None

    def _end_pause(self) -> None:
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(None)

    def _speed_changed(self) -> None:
        if self._row is not None and self._core is not None:
            self._row.retime(_now(), self._core.speed())
            self._end_pause()

    def _end_pull(self) -> None:
        self._pull_ended.set()
        if self._pace is None:
            self._wake()  # with one, the step it is part of waits for it

    def _blocks_freed(self) -> None:
        if self.scheduler.waiting_count:
            self._wake()

    def _wake(self) -> None:
        self._has_work.set()
        self._pull_ended.set()  # the request may have left in the middle of it
        self._end_pause()

    def _ring(self, sequences: Sequence[sim_scheduler.Sequence]) -> None:
        for sequence in sequences:
            if (leg := self._legs.get(sequence)) is not None:
                leg.changed.set()

    # A request's way through.

    def _enter(
        self,
        job: PrefillJob | DecodeJob,
        *,
        is_prefill: bool,
        keeps_kv: bool = False,
        pull_token_count: int = 0,
    ) -> _Leg:
        self._check_alive()
        self._check_request(job)
        waiting_count = self.load().waiting_count
        if waiting_count >= self.config.max_waiting_count:
            raise queue_full(waiting_count, self.config.max_waiting_count, retry_after_s=1.0)
        sequence = sim_scheduler.Sequence(
            order=next(self._orders),
            prompt_token_ids=job.prompt_token_ids,
            stop=job.stop,
            priority=job.priority,
            block_token_count=self.config.block_token_count,
            max_context_token_count=self.config.max_context_token_count,
            is_prefill=is_prefill,
            keeps_kv=keeps_kv,
            pull_token_count=pull_token_count,
            answer_token_count=job.output_token_count,
            top_logprob_count=job.top_logprob_count,
            tenant=job.tenant,
            # As a real engine: what is computed to score every token is not looked for in the cache.
            reads_cache=not isinstance(job, PrefillJob) or job.prompt_logprob_count is None,
        )
        leg = _Leg(sequence, _now(), job.leg_id)
        self._legs[sequence] = leg
        return leg

    def _leave(self, leg: _Leg) -> None:
        self._legs.pop(leg.sequence, None)
        is_done = leg.sequence.state is State.DONE
        self.scheduler.remove(leg.sequence)
        if is_done:
            self._blocks_freed()
        else:
            self._wake()

    async def _queue(self, leg: _Leg) -> None:
        await self._sleep(self.extra_delay_s.queue)
        leg.is_queued = True
        self.scheduler.add(leg.sequence)
        self._wake()

    async def _pull(self, leg: _Leg, params: SimulatedParams) -> _Pulled:
        sequence = leg.sequence
        started_at = _now()
        wait_s = started_at - leg.arrived_at
        if not sequence.needs_pull:
            self.network.note_pulled(params)
            return _Pulled(wait_s, 0.0, started_at, 0, 0, 0, pull_count=0)
        size = self.config.block_token_count
        block_count = block_count_for(params.token_count, size) - sequence.computed_token_count // size
        byte_count = block_count * size * self.config.cost.kv_bytes_per_token  # whole blocks move
        pull = self.network.pull(params, self.config.engine_id)
        try:
            # One reader in an engine with a pace: the thread that computes. Without one pulls do not meet.
            async with self._link_turn if self._pace is not None else nullcontext():
                content = await pull.run(
                    byte_count,
                    timeout_s=self.config.pull_timeout_s,
                    extra_s=self.extra_delay_s.transfer,
                    sleep=self._sleep,
                )
        except PullFailed as failure:
            ended_at = _now()
            recomputed_count = self.scheduler.pull_failed(sequence)
            self._end_pull()
            return _Pulled(wait_s, ended_at - started_at, ended_at, 0, 0, recomputed_count, failure.reason)
        except PullGivenUp:
            raise ticket_refused(
                "pull_timed_out", f"its read was not over after {self.config.pull_timeout_s:g} s"
            ) from None
        finally:
            self._quarantine(sequence, pull)  # also where the caller left in the middle of it
        ended_at = _now()
        await self._sleep(self.extra_delay_s.decode_wait)
        self.scheduler.pulled(sequence, content)
        self._end_pull()
        return _Pulled(wait_s, ended_at - started_at, ended_at, byte_count, block_count, 0)

    def _quarantine(self, sequence: sim_scheduler.Sequence, pull: SimulatedPull) -> None:
        """Blocks that a read may still write to are nobody's until it is over."""
        left_s = pull.busy_until - _now()
        table = sequence.table
        if left_s <= 0 or table is None or table.is_freed:
            return
        sequence.table = None
        self._quarantined[table] = asyncio.get_running_loop().call_later(left_s, self._end_quarantine, table)

    def _end_quarantine(self, table: BlockTable) -> None:
        if (timer := self._quarantined.pop(table, None)) is not None:
            timer.cancel()
            table.free()
            self._blocks_freed()

    def _adopted_by_computing(self, leg: _Leg) -> KvAdopted:
        sequence = leg.sequence
        assert sequence.scheduled_at is not None
        assert sequence.first_token_at is not None
        return KvAdopted(
            wait_s=sequence.scheduled_at - leg.arrived_at,
            transfer_s=0.0,
            decode_wait_s=0.0,
            transfer_bytes=0,
            descriptor_count=0,
            recomputed_token_count=0,
            prefill_s=sequence.first_token_at - sequence.scheduled_at,
            cached_token_count=sequence.cached_token_count,
            is_with_tokens=True,
        )

    def _adopted_by_pulling(self, leg: _Leg, pulled: _Pulled) -> KvAdopted:
        """``decode_wait_s`` includes the computing where the pull failed: it is what the request waits for."""
        sequence = leg.sequence
        ready_at = sequence.first_token_at if pulled.recomputed_token_count else sequence.scheduled_at
        assert ready_at is not None
        return KvAdopted(
            wait_s=pulled.wait_s,
            transfer_s=pulled.transfer_s,
            decode_wait_s=max(0.0, ready_at - pulled.ended_at),
            transfer_bytes=pulled.byte_count,
            descriptor_count=pulled.block_count,
            recomputed_token_count=pulled.recomputed_token_count,
            recompute_reason=pulled.recompute_reason,
            pull_count=pulled.pull_count,
            prefill_s=0.0,
            cached_token_count=sequence.cached_token_count,
            is_with_tokens=sequence.output_token_count > 0,
        )

    def _hold(self, sequence: sim_scheduler.Sequence, lease_s: float) -> HeldKv:
        table = self.scheduler.take_table(sequence)
        token_count = sequence.prompt_token_count
        handle = f"{self.config.engine_id}/{next(_handle_numbers)}"
        block_bytes = self.config.block_token_count * self.config.cost.kv_bytes_per_token
        kv_bytes = len(table.block_ids) * block_bytes
        backstop = asyncio.get_running_loop().call_later(
            lease_s + self.config.backstop_extra_s, self._drop_held, handle
        )
        self._held[handle] = _Held(HeldContent(token_count, sequence.content), table, backstop)
        params = SimulatedParams(self.config.engine_id, handle, token_count, kv_bytes)
        return HeldKv(handle=handle, kv_bytes=kv_bytes, params=params.to_engine())

    def _drop_held(self, handle: str) -> None:
        held = self._held.pop(handle, None)
        if held is not None:
            held.backstop.cancel()
            held.table.free()
            self._blocks_freed()

    # Waiting: each of these ends with ENGINE_FAILED when the engine dies meanwhile.

    async def _until(self, leg: _Leg, is_so: Callable[[], bool]) -> None:
        self._check_alive()
        while not is_so():
            await leg.changed.wait()
            leg.changed.clear()
            self._check_alive()

    async def _sleep(self, delay_s: float) -> None:
        if delay_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._died.wait()
        self._check_alive()
        await self._going()

    async def _going(self) -> None:
        await self._is_going.wait()
        self._check_alive()

    # Checks.

    def _check_alive(self) -> None:
        if self._death is not None:
            raise engine_failed(self.config.engine_id, self._death)
        if self._task is None:
            raise engine_failed(self.config.engine_id, "the engine was not started")

    def _check_request(self, job: PrefillJob | DecodeJob) -> None:
        prompt_token_ids = job.prompt_token_ids
        limit = self.config.max_context_token_count - 1
        if not prompt_token_ids:
            raise invalid_request([FieldViolation("prompt", "has no tokens; give at least one")])
        if len(prompt_token_ids) > limit:
            raise prompt_too_long(len(prompt_token_ids), limit)
        vocab_size = self.config.tokens.vocab_size
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab_size:
            raise invalid_request([FieldViolation("prompt", f"has a token id outside 0 to {vocab_size - 1}")])
        if not 0 <= job.output_token_count < len(prompt_token_ids):
            raise invalid_request([FieldViolation("output_token_count", "must leave at least one token of prompt")])
        if job.stop.max_token_count < 1:
            raise invalid_request([FieldViolation("stop.max_output_token_count", "must be at least 1")])

    def _die(self, why: str, *, is_own_task: bool = False) -> None:
        if self._death is not None:
            return
        self._death = why
        if self._task is not None and not is_own_task:
            self._task.cancel()
        for handle in list(self._held):
            self._drop_held(handle)
        for table in list(self._quarantined):
            self._end_quarantine(table)
        for sequence, leg in self._legs.items():
            self.scheduler.remove(sequence)
            leg.changed.set()
        self._died.set()
        self._is_going.set()  # whoever waits for a hung engine learns that it is dead


def _now() -> float:
    return asyncio.get_running_loop().time()

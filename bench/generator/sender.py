"""Sends a plan in open loop: every request at its intended time, whatever became of those before it.

Owns the schedule and the records. Knows no protocol (targets do) and computes no statistics. Every latency counts
from the intended time, so that a late generator or a slow target cannot hide queueing; how late each request was sent
is in its record.

Runs on the running loop's clock: in virtual time as on sockets.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from bench.generator.exact_timer import ExactTimer
from bench.generator.target import Target, TargetError, Tokens
from bench.results.records import NOT_SENT, NOT_SENT_LEFT, Outcome, RequestRecord
from bench.traffic.plan import Plan, PlannedRequest

LEAD_S = 0.05
"""From the start of the run's clock to the first possible send: the loop comes to rest first."""
INTERRUPTED = "interrupted"
TIMED_OUT = "the generator's deadline passed"
LEFT = "the caller left, as planned"


@runtime_checkable
class Preparing(Protocol):
    """A target that makes what it will send before the clock starts."""

    def prepare(self, requests: Sequence[PlannedRequest]) -> None:
        """Called once per plan, before its first request."""
        ...


@dataclass(slots=True)
class RunState:
    """The run as it goes, for whoever shows it. Written by the sender alone; reading it costs the sender nothing."""

    started_at_s: float
    """Loop time at which the run's clock was 0."""
    planned_count: int
    duration_s: float
    in_flight: dict[int, RequestRecord] = field(default_factory=dict)
    """By index; sent or waiting for a place under ``max_in_flight``."""
    ended: list[RequestRecord] = field(default_factory=list)
    """In the order in which they ended."""


async def send_plan(
    plan: Plan,
    target: Target,
    *,
    timeout_s: float,
    on_record: Callable[[RequestRecord], None] | None = None,
    observer: Callable[[RunState], None] | None = None,
    max_in_flight: int | None = None,
) -> list[RequestRecord]:
    """Sends all of ``plan`` and returns one record a request, in order of ``index``, once the last has ended.

    ``timeout_s``: the deadline of each request, from its intended time. ``on_record`` gets every record as its
    request ends; ``observer`` gets the state of the run once, before the first is sent. ``max_in_flight`` closes the
    loop at so many: what is due beyond waits its turn, first come first served, and the wait is lag in its record.
    One that ends without a place was never sent; its ``sent_at_s`` is its end.

    Cancelled, it cancels every request, hands their records (and those only: what was not due yet has none) to
    ``on_record`` and raises ``CancelledError``.
    """
    if isinstance(target, Preparing):
        target.prepare(plan.requests)
    sender = _Sender(plan, target, timeout_s, on_record, max_in_flight)
    if observer is not None:
        observer(sender.state)
    return await sender.run()


@contextmanager
def calm_collector() -> Iterator[None]:
    """Keeps the garbage collector from stopping a run: what is there already (plans of millions of numbers) is never
    looked at again, and young objects are looked at a hundred times less often. Undone at the end."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100 * thresholds[0], thresholds[1], thresholds[2])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class _Sender:
    """One run. Its timer starts the tasks that are due; each task is one request, and lets its next turn be due."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        timeout_s: float,
        on_record: Callable[[RequestRecord], None] | None,
        max_in_flight: int | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._target = target
        self._timeout_s = timeout_s
        self._on_record = on_record
        self._places = None if max_in_flight is None else _Places(max_in_flight)
        self._zero_at = self._loop.time() + LEAD_S
        self.state = RunState(self._zero_at, len(plan.requests), plan.duration_s)
        self._due: list[tuple[float, int, PlannedRequest]] = []
        """A heap of (intended loop time, index, request)."""
        self._turns: dict[int, list[PlannedRequest]] = {}
        """By the request they follow."""
        for request in plan.requests:
            if request.after is None:
                self._due.append((self._zero_at + request.at_s, request.index, request))
            else:
                self._turns.setdefault(request.after, []).append(request)
        heapq.heapify(self._due)
        self._left_count = len(plan.requests)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over: asyncio.Future[None] = self._loop.create_future()
        self._timer = ExactTimer(self._start_what_is_due)

    async def run(self) -> list[RequestRecord]:
        try:
            if self._left_count:
                self._arm()
                await self._is_over
        finally:
            # Also when cancelled: nothing of a run outlives it.
            self._timer.close()
            for task in self._tasks:
                task.cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)
        return sorted(self.state.ended, key=lambda record: record.index)

    def _arm(self) -> None:
        if self._due:
            self._timer.arm(self._due[0][0])

    def _start_what_is_due(self) -> None:
        now = self._loop.time()
        while self._due and self._due[0][0] <= now:
            intended_at, _, request = heapq.heappop(self._due)
            task = self._loop.create_task(self._send(request, intended_at))
            self._tasks.add(task)
            task.add_done_callback(self._on_done)
        self._arm()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._is_over.done():
            self._is_over.set_exception(error)  # on_record failed, or we are wrong: not to be lost

    async def _send(self, request: PlannedRequest, intended_at: float) -> None:
        loop, zero_at = self._loop, self._zero_at
        record = RequestRecord(
            index=request.index,
            group=request.group,
            session_id=request.session_id,
            prompt_token_count=len(request.prompt_token_ids),
            output_token_limit=request.output_token_count,
            intended_at_s=intended_at - zero_at,
            sent_at_s=loop.time() - zero_at,
            ended_at_s=intended_at - zero_at,
            outcome=Outcome.ERROR,
            error=INTERRUPTED,
        )
        self.state.in_flight[request.index] = record
        deadline = intended_at + self._timeout_s
        leaves_at = None if request.cancel_after_s is None else intended_at + request.cancel_after_s
        is_leaving = leaves_at is not None and leaves_at < deadline
        times, counts = record.message_at_s, record.message_token_counts
        has_place = False
        scope = asyncio.timeout_at(leaves_at if is_leaving else deadline)
        try:
            async with scope:
                if self._places is not None:
                    await self._places.take()
                    has_place = True
                now = loop.time()
                record.sent_at_s = now - zero_at
                answer = self._target.generate(request, timeout_s=max(deadline - now, 1e-3))
                async with aclosing(answer) as events:
                    async for event in events:
                        if type(event) is Tokens:
                            times.append(event.at_s - zero_at)
                            counts.append(event.token_count)
                        else:
                            assert not isinstance(event, Tokens)
                            record.phases_s = None if event.phases_s is None else dict(event.phases_s)
                            record.kv_transfer_bytes = event.kv_transfer_bytes
                            record.placement = event.placement
                            record.attempt_count = event.attempt_count
                            record.prefill_worker_id = event.prefill_worker_id
                            record.decode_worker_id = event.decode_worker_id
                            record.cached_prompt_token_count = event.cached_prompt_token_count
                            if event.prompt_token_count is not None:
                                record.prompt_token_count = event.prompt_token_count
            record.outcome, record.error = Outcome.OK, None
        except TargetError as error:
            record.outcome, record.error = error.outcome, str(error)
        except Exception as error:
            if scope.expired():
                record.outcome = Outcome.CANCELLED if is_leaving else Outcome.TIMEOUT
                record.error = LEFT if is_leaving else TIMED_OUT
            else:
                # Its type only: other libraries put what they were sent into their messages.
                record.error = f"the target failed: {type(error).__name__}"
        finally:
            if has_place and self._places is not None:
                self._places.give_back()
            self._end(request, record, had_place=has_place or self._places is None)

    def _end(self, request: PlannedRequest, record: RequestRecord, *, had_place: bool) -> None:
        now = self._loop.time()
        record.ended_at_s = now - self._zero_at
        if not had_place:
            record.sent_at_s = record.ended_at_s  # never sent: all of its wait is lag
        if not record.message_at_s:
            record.sent_at_s = min(record.sent_at_s, record.ended_at_s)
        self.state.in_flight.pop(request.index, None)
        self._keep(record)
        if record.error == INTERRUPTED:
            return
        for turn in self._turns.pop(request.index, ()):
            if record.outcome is Outcome.OK:
                heapq.heappush(self._due, (now + turn.at_s, turn.index, turn))
            else:
                self._not_sent(turn, record)
        if self._left_count:
            self._arm()
        elif not self._is_over.done():
            self._is_over.set_result(None)

    def _not_sent(self, turn: PlannedRequest, before: RequestRecord) -> None:
        """Turns after one that failed: errors of their own, in every denominator, in no latency."""
        waiting = [(turn, before.ended_at_s)]
        has_left = before.outcome is Outcome.CANCELLED
        while waiting:
            one, ended_at_s = waiting.pop()
            at_s = ended_at_s + one.at_s
            self._keep(
                RequestRecord(
                    index=one.index,
                    group=one.group,
                    session_id=one.session_id,
                    prompt_token_count=len(one.prompt_token_ids),
                    output_token_limit=one.output_token_count,
                    intended_at_s=at_s,
                    sent_at_s=at_s,
                    ended_at_s=at_s,
                    outcome=Outcome.CANCELLED if has_left else Outcome.ERROR,
                    error=NOT_SENT_LEFT if has_left else NOT_SENT,
                )
            )
            waiting += [(turn, at_s) for turn in self._turns.pop(one.index, ())]

    def _keep(self, record: RequestRecord) -> None:
        self._left_count -= 1
        self.state.ended.append(record)
        if self._on_record is not None:
            self._on_record(record)


class _Places:
    """A bound on requests in flight, first come first served."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"at least one request must be allowed in flight, not {count}")
        self._free_count = count
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        if self._free_count:
            self._free_count -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()  # given to us as we left
            raise

    def give_back(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free_count += 1

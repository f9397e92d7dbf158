"""Carries requests: one flight each, from the front door to the last token.

Owns the requests in flight and the releases of KV still on their way. What happens in which order is the handoff's,
where is placement's, when is admission's; the relay lets them talk, and tells metrics and log how it ended.

    run: Admitted Piece* Completed, or a raised BatonError. Closing the generator means nobody listens any more.

Durations, log line and metrics of a request come from the same ``PhaseReport``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from baton.errors import BatonError, deadline_exceeded, draining
from baton.leg import PromptLogprobs
from baton.metrics import Outcome, RouterMetrics, outcome_of
from baton.request import Role
from baton.timeline import PHASES, Phase
from router.admission import Admission
from router.answering import Admitted, Answer, Completed, PhaseReport, Piece, RelayEvent, RoutedRequest
from router.cluster_view import Assigned, WorkerIdentity
from router.flight import Flight, FlightLimits
from router.handoff import State
from router.handoff_words import Finish, ReleaseKv
from router.relay_run import RelayRun, TokenMeter
from router.roster import Roster
from router.samples.prompt_parts import prompt_parts
from router.samples.sample_group import SampleGroup, Seat

__all__ = ["Admitted", "Answer", "Completed", "PhaseReport", "Piece", "Relay", "RelayEvent", "RoutedRequest"]

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("router.request")
"""One line per request, a JSON object."""
HELD = Assigned(held_count=1)


@dataclass(frozen=True, slots=True)
class ReleaseLimits:
    """How hard the router tries to let go of KV; what it cannot, the lease ends."""

    timeout_s: float = 5.0
    attempt_count: int = 2
    pause_s: float = 0.25


class Relay:
    """One per router. ``close`` ends every request and waits until nothing is left of them."""

    def __init__(
        self,
        roster: Roster,
        admission: Admission,
        *,
        limits: FlightLimits | None = None,
        release_limits: ReleaseLimits | None = None,
        metrics: RouterMetrics | None = None,
    ) -> None:
        self.roster = roster
        self.admission = admission
        self._limits = limits or FlightLimits()
        self._release_limits = release_limits or ReleaseLimits()
        self._metrics = metrics or RouterMetrics(CollectorRegistry())
        # The mutable state: requests in flight with the task that flies each, and releases on their way.
        self._flights: dict[Flight, asyncio.Task[None]] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._is_closed = False
        roster.on_lost(self._worker_lost)
        roster.on_readiness(self._count_ready)
        self._metrics.queued.set_function(lambda: self.queued_count)
        self._metrics.in_flight.set_function(lambda: self.in_flight_count)

    def __repr__(self) -> str:
        states = [flight.handoff.state for flight in self._flights]
        prefilling, waiting = states.count(State.PREFILLING), states.count(State.PLACING)
        decoding = sum(state in (State.PREFILLED, State.STARTING, State.DECODING) for state in states)
        roomless = states.count(State.NO_ROOM)
        return f"<Relay [{prefilling} prefilling, {decoding} decoding | {waiting} waiting, {roomless} for room]>"

    # Questions

    @property
    def queued_count(self) -> int:
        """Requests waiting for admission or placement."""
        return self.admission.waiting_count

    @property
    def in_flight_count(self) -> int:
        """Requests received and not yet ended, those that wait included."""
        return len(self._flights)

    @property
    def releasing_count(self) -> int:
        return len(self._releases)

    def phase_of(self, generation_id: str) -> Phase | None:
        """Where a request in flight is; of one with samples, its first. None: it has no flight."""
        return next(
            (each.handoff.phase for each in self._flights if each.request.generation_id == generation_id), None
        )

    @property
    def could_serve(self) -> bool:
        """Whether a request that came now could be placed, at once or when its turn comes."""
        return not self._is_closed and self.admission.could_serve

    # Effects

    def samples(self, sample_count: int) -> SampleGroup:
        """The group whose seats the samples of one request run with; the caller closes it."""
        return self.admission.samples(sample_count)

    def run(
        self,
        request: RoutedRequest,
        answer: Answer,
        deadline_at: float,
        *,
        received_at: float,
        seat: Seat | None = None,
    ) -> RelayRun:
        """Serves one request. Times are the loop's. ``seat``: of one of several samples. Consume with ``aclosing``.

        Raises QUEUE_FULL, NO_WORKER, DRAINING, ATTEMPTS_EXHAUSTED, DEADLINE_EXCEEDED, what a worker says against
        the request (INVALID_REQUEST, PROMPT_TOO_LONG), INTERNAL. Pieces made before a failure are yielded first.
        """
        flight = self._take_off(request, answer, deadline_at, received_at, seat)
        meter = TokenMeter(self._metrics)
        events = self._events(flight, meter, deadline_at, received_at)
        return RelayRun(events, flight.outbox, meter, asyncio.get_running_loop().time)

    async def _events(
        self, flight: Flight, meter: TokenMeter, deadline_at: float, received_at: float
    ) -> AsyncGenerator[RelayEvent, None]:
        request = flight.request
        outcome = Outcome.CANCELLED
        completed: Completed | None = None
        failure: BatonError | None = None
        try:
            if self._is_closed:
                raise draining()
            if received_at >= deadline_at or _now() >= deadline_at:
                raise deadline_exceeded(flight.handoff.phase.value, 0)
            self._flights[flight] = asyncio.create_task(flight.fly(), name=f"{request.generation_id} flight")
            clock = asyncio.get_running_loop().time
            while completed is None:
                item = await flight.outbox.take()
                now = clock()
                match item:
                    case Piece():
                        if item.token_ids:
                            if meter.sent_at is None:
                                flight.account.first_token(now)
                            meter.sent(len(item.token_ids), now)
                        yield item
                    case Finish():
                        completed = flight.completed(item, now)
                        # BEFORE it leaves: response, log line and metrics must agree whatever the caller does next.
                        outcome = Outcome.OK
                        self._ended(flight, outcome, completed, None)
                        yield completed
                    case Admitted():
                        yield item
                    case PromptLogprobs():
                        # Made as they are taken: of a long prompt all of them at once would be megabytes.
                        for part in prompt_parts(request.prompt_token_ids, request.prompt_logprob_count, item):
                            yield part
        except BatonError as error:
            outcome, failure = outcome_of(error), error
            raise
        finally:
            if completed is None:
                if outcome is Outcome.CANCELLED and _now() >= deadline_at:
                    outcome = Outcome.DEADLINE  # the caller's own clock called it off first
                elif outcome is Outcome.CANCELLED and flight.outbox.is_given_up and flight.outbox.failure:
                    failure = flight.outbox.failure  # and the rest was not waited for
                    outcome = outcome_of(failure)
                flight.account.close(_now())
                self._ended(flight, outcome, None, failure)
            await self._land(flight)

    def goodbyes(self) -> list[Callable[[], None]]:
        """Takes nothing new. Returns what ends each request, in no hurry: callers that still listen hear DRAINING,
        after the tokens that are there. Idempotent."""
        self._is_closed = True
        self.admission.close()
        return [flight.client_gone for flight in self._flights]

    async def close(self) -> None:
        """Ends everything and waits. Idempotent."""
        for end in self.goodbyes():
            end()
        while running := [task for task in (*self._flights.values(), *self._releases) if not task.done()]:
            await asyncio.wait(running)

    # Parts

    def _take_off(
        self, request: RoutedRequest, answer: Answer, deadline_at: float, received_at: float, seat: Seat | None
    ) -> Flight:
        return Flight(
            request,
            answer,
            deadline_at=deadline_at,
            received_at=received_at,
            roster=self.roster,
            admission=self.admission,
            limits=self._limits,
            release=self._release,
            on_leg_lost=lambda phase: self._metrics.lost_legs.labels(phase).inc(),
            on_no_room=self._metrics.no_room.inc,
            seat=seat,
        )

    async def _land(self, flight: Flight) -> None:
        """Waits until nothing of the flight is left. Cancelled meanwhile, the flight still ends by itself."""
        task = self._flights.get(flight)
        if task is None:
            return
        if task.done():
            del self._flights[flight]
            return
        task.add_done_callback(lambda _: self._flights.pop(flight, None))
        flight.client_gone()
        await asyncio.shield(task)

    def _worker_lost(self, worker: WorkerIdentity) -> None:
        for flight in self._flights:
            flight.worker_lost(worker)

    def _count_ready(self) -> None:
        view = self.roster.view()
        self._metrics.set_ready_workers((role.value, len(view.ready(role))) for role in Role)

    def _release(self, action: ReleaseKv) -> None:
        """In the background, with a deadline of its own: neither a caller that left nor a dead worker delays it."""
        is_known = self.roster.is_known(action.worker)
        if is_known:
            self.roster.assign(action.worker, HELD)  # or one that left the set would be out of reach
        task = asyncio.create_task(self._release_kv(action), name=f"release {action.ticket_id}")
        self._releases.add(task)
        task.add_done_callback(lambda done: self._released(done, action.worker if is_known else None))

    def _released(self, task: asyncio.Task[None], worker: WorkerIdentity | None) -> None:
        self._releases.discard(task)
        if worker is not None:
            self.roster.assign(worker, HELD, sign=-1)

    async def _release_kv(self, action: ReleaseKv) -> None:
        for attempt in range(self._release_limits.attempt_count):
            if attempt:
                await asyncio.sleep(self._release_limits.pause_s)
            try:
                client = self.roster.client(action.worker)
                await client.release_kv(action.ticket_id, timeout_s=self._release_limits.timeout_s)
                return
            except BatonError as error:
                logger.info("KV of ticket %s on %s was not released: %s", action.ticket_id, action.worker, error)
            except Exception:
                logger.exception("a bug in releasing ticket %s on %s", action.ticket_id, action.worker)
                return

    def _ended(
        self, flight: Flight, outcome: Outcome, completed: Completed | None, failure: BatonError | None
    ) -> None:
        report = flight.report() if completed is None else completed.report
        self._metrics.request_ended(
            outcome,
            report.durations,
            usage=None if completed is None else completed.usage,
            transfer=report.transfer,
            mode=report.mode,
            placement_reason=report.placement_reason,
        )
        if request_logger.isEnabledFor(logging.INFO):
            request_logger.info("%s", json.dumps(_log_fields(flight, outcome, completed, failure, report)))


def _log_fields(
    flight: Flight,
    outcome: Outcome,
    completed: Completed | None,
    failure: BatonError | None,
    report: PhaseReport,
) -> dict[str, str | int | float | None]:
    """What is said of a request: never a word of its prompt or its answer."""
    durations, transfer = report.durations, report.transfer
    ttft_s = durations.time_to_first_token_s
    token_count = flight.handoff.emitted_token_count if completed is None else completed.usage.output_token_count
    return {
        "generation_id": flight.request.generation_id,
        "correlation_id": flight.request.correlation_id,
        "tenant": flight.request.tenant,
        "outcome": outcome.value,
        "error": None if failure is None else failure.reason.value,
        "error_phase": None if failure is None else failure.metadata.get("phase"),
        "reason": None if completed is None else completed.reason.value,
        "prompt_tokens": len(flight.request.prompt_token_ids),
        "output_tokens": token_count,
        "cached_tokens": flight.handoff.cached_prompt_token_count,
        **{f"{phase.value}_s": round(durations[phase], 6) for phase in PHASES},
        "total_s": round(durations.total_s, 6),
        "ttft_s": None if ttft_s is None else round(ttft_s, 6),
        "kv_bytes": transfer.kv_bytes,
        "kv_descriptors": transfer.descriptor_count,
        "kv_pulls": transfer.pull_count,
        "kv_post_s": round(transfer.post_s, 6),
        "kv_wire_s": round(transfer.wire_s, 6),
        "kv_verify_s": round(transfer.verify_s, 6),
        "recomputed_tokens": transfer.recomputed_token_count,
        "recompute_reason": None if transfer.recompute_reason is None else transfer.recompute_reason.value,
        "handover": report.handover.value,
        "prefill_worker": report.prefill_worker_id,
        "decode_worker": report.decode_worker_id,
        "mode": report.mode.value,
        "placement": report.placement_reason,
        "attempts": report.attempt_count,
        "no_room_refusals": flight.handoff.no_room_count,
    }


def _now() -> float:
    return asyncio.get_running_loop().time()

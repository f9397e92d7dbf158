"""One request in flight: performs the handoff's actions and feeds back what happened. No policy here.

Owns everything the request has running: its legs, its wait for a place, its lease keeper, its place. All of it is
cancelled, awaited and given back before ``fly`` returns, however the request ends.

    fly:  perform the start | until ended: next fact -> handoff.on -> perform | clean up
    legs: one task each; what they have to say is acted on where it is said, so that a token goes from the worker's
          message to the outbox without a wait; the caller's side takes from there and never holds this side up
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.errors import BatonError, Reason, deadline_exceeded, draining, engine_failed, internal, stalled
from baton.leg import KvAdopted
from baton.request import FinishReason, LegFinish, TokenLogprobs, Usage
from baton.timeline import Phase
from router.admission import Admission, Entry, Turn
from router.admission import Place as GivenPlace
from router.answering import Admitted, Answer, Completed, PhaseReport, Piece, RoutedRequest
from router.budgets import Budget, Budgets, SilenceLimits
from router.cluster_view import WorkerIdentity
from router.fact_queue import FactQueue
from router.handoff import Handoff, State
from router.handoff_words import (
    Abandon,
    Action,
    Adopted,
    CancelLeg,
    ClientGone,
    DeadlinePassed,
    DecodeEnded,
    Emit,
    Emitted,
    Fact,
    Fail,
    FindRoom,
    Finish,
    KeepLease,
    LegFailed,
    Place,
    Placed,
    PlacementFailed,
    PrefillDone,
    ReleaseKv,
    RoomFailed,
    RoomFound,
    StartDecode,
    StartPrefill,
    StopMatched,
    TellPrompt,
    TokensArrived,
    WorkerLost,
)
from router.outbox import DEFAULT_MAX_BYTES, Outbox
from router.phase_account import PhaseAccount
from router.roster import Roster
from router.samples.sample_group import Seat
from router.worker_client import WorkerClient

logger = logging.getLogger(__name__)

_DECODING, _ENDED = State.DECODING, State.ENDED
"""Looked at with every token; of an enumeration's class that is a call."""

_WORKERS_FAULT = frozenset({Reason.ENGINE_FAILED, Reason.STALLED})
"""What makes a worker doubtful for requests that come next."""


@dataclass(frozen=True, slots=True)
class FlightLimits:
    """Raises ``ValueError`` naming the key."""

    max_attempt_count: int = 3
    """Attempts of one request, the first included."""
    lease_s: float = 30.0
    """How long a prefill worker holds KV without a word; extended while the request still wants it."""
    prefill_timeout_s: float = 120.0
    """Longest wait for a prefill's answer; then it is tried elsewhere."""
    gap_timeout_s: float = 60.0
    """Longest silence of a decode; then it is tried elsewhere."""
    max_unread_bytes: int = DEFAULT_MAX_BYTES
    """Of one call, all its samples together: what its caller has not taken yet. Past it READER_TOO_SLOW."""
    cleanup_timeout_s: float = 10.0
    """Longest wait for cancelled legs to end. A leg that takes longer is a bug, and logged as one."""

    def __post_init__(self) -> None:
        if self.max_attempt_count < 1:
            raise ValueError(f"max_attempt_count is {self.max_attempt_count}; it must be at least 1")
        if self.max_unread_bytes < 1:
            raise ValueError(f"max_unread_bytes is {self.max_unread_bytes}; it must be at least 1")
        for key in ("lease_s", "prefill_timeout_s", "gap_timeout_s", "cleanup_timeout_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be positive")


class Flight:
    """``fly`` runs as a task; ``outbox`` is what the caller's side takes from."""

    def __init__(
        self,
        request: RoutedRequest,
        answer: Answer,
        *,
        deadline_at: float,
        received_at: float,
        roster: Roster,
        admission: Admission,
        limits: FlightLimits,
        release: Callable[[ReleaseKv], None],
        on_leg_lost: Callable[[str], None],
        on_no_room: Callable[[], None],
        seat: Seat | None = None,
    ) -> None:
        """``release`` lets go of KV in its own time. ``on_leg_lost`` is told the phase; ``on_no_room``, that a decode
        was refused for want of room. ``seat``: of one of several samples."""
        self.request = request
        self.handoff = Handoff(request, max_attempt_count=limits.max_attempt_count, lease_s=limits.lease_s)
        self.account = PhaseAccount(received_at)
        sample_count = 1 if seat is None else seat.group.sample_count
        self.outbox = Outbox(
            request.max_chunk_token_count, limits.max_unread_bytes // sample_count, request.reader.too_slow
        )
        self._answer = answer
        self._deadline_at = deadline_at
        self._budgets = Budgets(deadline_at, SilenceLimits(limits.prefill_timeout_s, limits.gap_timeout_s))
        self._roster = roster
        self._admission = admission
        self._limits = limits
        self._release = release
        self._on_leg_lost = on_leg_lost
        self._on_no_room = on_no_room
        self._seat = seat
        self._facts = FactQueue()
        # What is running for this request, and what it has:
        self._legs: dict[int, asyncio.Task[None]] = {}
        self._wait: asyncio.Task[None] | None = None
        self._lease_keepers: dict[str, asyncio.Task[None]] = {}
        self._place: GivenPlace | None = None
        self._is_admitted = False
        self._matched_stop_sequence: str | None = None
        self._cumulative_logprob = 0.0
        self._is_acting = False
        self._bug: Exception | None = None

    # What others tell

    def client_gone(self) -> None:
        self._facts.put_now(ClientGone())

    def worker_lost(self, worker: WorkerIdentity) -> None:
        if self.handoff.worker == worker:
            self._facts.put_now(WorkerLost(worker))

    # The loop

    async def fly(self) -> None:
        """Until the request has ended and nothing of it is left. Raises only when cancelled."""
        loop = asyncio.get_running_loop()
        deadline = loop.call_at(self._deadline_at, self._facts.put_now, DeadlinePassed())
        try:
            self._act(self.handoff.start())
            while not self.handoff.is_ended:
                fact = await self._facts.next()
                if self._bug is not None:
                    raise self._bug
                if fact is not None:
                    self._act(self._decided(fact))
        except Exception as error:
            logger.exception("request %s: a bug in its flight", self.request.generation_id)
            self.outbox.end(internal(f"the relay raised {type(error).__name__}", self.request.generation_id))
            self._perform_all(self.handoff.on(ClientGone()))  # lets go of whatever is held
        finally:
            if not self.outbox.has_end:
                self.outbox.end(self._stopped())
            deadline.cancel()
            await self._clean_up()

    def _tell(self, fact: Fact) -> None:
        """A fact of a leg: acted on here and now, unless others wait before it. Raises nothing: whoever says it reads
        a worker's connection, and other requests are on that."""
        handoff = self.handoff
        state = handoff.state
        if self._facts.waiting or self._is_acting or state is _ENDED:
            self._facts.put_now(fact)
            return
        try:
            if type(fact) is TokensArrived and state is _DECODING:
                self._pass_on(fact)
            else:
                self._act(self._decided(fact))
        except Exception as bug:
            self._bug = bug
        if handoff.state is _ENDED or self._bug is not None:
            self._facts.nudge()

    def _pass_on(self, fact: TokensArrived) -> None:
        """Nearly every fact there is, by the shortest way: the same as ``_act(_decided(fact))``."""
        actions = self.handoff.on(fact)
        if len(actions) == 1 and type(emit := actions[0]) is Emit:
            emitted = self._emit(emit)
            if type(emitted) is not Emitted:  # only the first token's is waited for
                self._act(self._decided(emitted))
            return
        placement = self.handoff.placement
        assert placement is not None, "it decodes, so it was placed"
        self._act(self._decided_otherwise(fact, actions, Phase.DECODE, placement.decode))

    def _act(self, actions: Sequence[Action]) -> None:
        """Performs, and feeds in what is known at once from performing, until nothing is left to do."""
        self._is_acting = True
        try:
            facts = self._perform_all(actions)
            if facts:
                waiting = deque(facts)
                while waiting:
                    waiting.extend(self._perform_all(self._decided(waiting.popleft())))
        finally:
            self._is_acting = False

    def _decided(self, fact: Fact) -> list[Action]:
        if type(fact) is Emitted and self.handoff.state is State.DECODING:
            return []  # only the first token's is waited for
        phase, worker = self.handoff.phase, self.handoff.worker
        if isinstance(fact, LegFailed) and fact.error.reason in _WORKERS_FAULT and worker is not None:
            self._roster.doubt(worker)  # BEFORE another place is looked for, by this request or by others
        self._account(fact)
        actions = self.handoff.on(fact)
        if isinstance(fact, Adopted) and self._seat is not None and self.handoff.state is State.DECODING:
            self._seat.on_adopted(self.handoff.decode_worker_id)
        return self._decided_otherwise(fact, actions, phase, worker)

    def _decided_otherwise(
        self, fact: Fact, actions: list[Action], phase: Phase, worker: WorkerIdentity | None
    ) -> list[Action]:
        if any(_is_leg_lost(action) for action in actions):
            self._on_leg_lost(phase.value)
            why = fact.error if isinstance(fact, LegFailed) else type(fact).__name__  # a fact's text may hold tokens
            where = "" if worker is None else f" on {worker.worker_id}"
            logger.warning("request %s lost its leg in %s%s: %s", self.request.generation_id, phase.value, where, why)
        return actions

    def _account(self, fact: Fact) -> None:
        """Draws the border in the request's time that this fact is."""
        match fact:
            case PrefillDone() if fact.leg == self.handoff.leg:
                self.account.prefill_done(fact.reply, _now())
                if self._place is not None:
                    self._place.prefill_answered()
            case Adopted() if fact.leg == self.handoff.leg:
                self.account.adopted(fact.kv, _now())

    # Performing

    def _perform_all(self, actions: Sequence[Action]) -> list[Fact]:
        return [fact for action in actions if (fact := self._perform(action)) is not None]

    def _perform(self, action: Action) -> Fact | None:
        """Starts what takes time, does the rest. Returns the fact that is known at once, if there is one."""
        match action:
            case Place():
                return self._find_place(action)
            case StartPrefill():
                self.account.prefill_started(_now())
                self._start_leg(action.leg, "prefill", self._prefill(action))
            case StartDecode():
                self.account.decode_started(is_split=bool(action.order.ticket), now=_now())
                self._start_leg(action.leg, "decode", self._decode(action))
            case FindRoom():
                self._on_no_room()
                self._wait = self._task("room", self._wait_for_room(action))
            case CancelLeg():
                self._legs[action.leg].cancel()
            case KeepLease():
                self._lease_keepers[action.ticket_id] = self._task("lease", self._keep_lease(action))
            case ReleaseKv():
                if (keeper := self._lease_keepers.get(action.ticket_id)) is not None:
                    keeper.cancel()
                self._release(action)
            case TellPrompt():
                self.outbox.put(action.logprobs)
            case Emit():
                return self._emit(action)
            case Finish():
                self._finish(action)
            case Fail():
                self.outbox.end(action.error)
            case Abandon():
                self.outbox.end(self._stopped())
        return None

    def _find_place(self, action: Place) -> Fact | None:
        self._give_place_back()
        self.account.placing(_now())
        entry = Entry(
            prompt_token_ids=self.request.prompt_token_ids,
            max_output_token_count=self.request.max_output_token_count,
            priority=self.request.priority,
            session_id=self.request.session_id,
            tenant=self.request.tenant,
            deadline_at=self._deadline_at,
            is_retry=action.attempt > 1,
            excluded=action.excluded,
            needs_recompute=action.needs_recompute,
            seat=self._seat,
        )
        try:
            place = self._admission.try_enter(entry)
        except BatonError as error:
            return PlacementFailed(action.attempt, error)
        if place is None:
            turn = self._admission.join(entry)
            self._wait = self._task("place", self._wait_for_place(action.attempt, turn))
            # Cancelled before its first step, the task runs nothing of itself.
            self._wait.add_done_callback(lambda _: turn.leave())
            return None
        return self._placed(action.attempt, place)

    def _placed(self, attempt: int, place: GivenPlace) -> Fact:
        self._place = place
        if not self._is_admitted:
            self._is_admitted = True
            self.outbox.put(Admitted(self.request.generation_id))
        return Placed(attempt, place.placement)

    def _emit(self, action: Emit) -> Fact:
        size = self.request.max_chunk_token_count
        token_ids = action.token_ids
        if len(token_ids) <= size and not action.logprobs:  # nearly always
            piece = self._answer.push(token_ids)
            self._put(piece)
            if piece.matched_stop_sequence is not None:
                return StopMatched(piece.first_token_index + len(piece.token_ids))
            return Emitted(action.first_index + len(token_ids))
        for start in range(0, len(token_ids), size):
            piece = self._answer.push(token_ids[start : start + size])
            # BESIDE the tokens that the piece kept: after a stop sequence fewer than were pushed.
            logprobs = action.logprobs[start : start + piece.token_count]
            for each in logprobs:
                self._cumulative_logprob += each.logprob
            self._put(replace(piece, logprobs=logprobs) if logprobs else piece)
            if piece.matched_stop_sequence is not None:
                return StopMatched(piece.first_token_index + piece.token_count)
        return Emitted(action.first_index + len(action.token_ids))

    def _put(self, piece: Piece) -> None:
        self._matched_stop_sequence = self._matched_stop_sequence or piece.matched_stop_sequence
        if piece.token_ids or piece.text:
            self.outbox.put(piece)
            if self.outbox.is_given_up:
                self._facts.put_now(ClientGone())  # the same road as of a caller that left: nothing computes for it

    def _finish(self, action: Finish) -> None:
        self._put(self._answer.flush())
        self.outbox.end(action)

    def _start_leg(self, leg: int, phase: str, body: Coroutine[Any, Any, None]) -> None:
        self._legs[leg] = self._task(f"{phase} {leg}", body)

    def _task(self, what: str, body: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(body, name=f"{self.request.generation_id} {what}")

    # The tasks: each says facts, and no more

    async def _wait_for_place(self, attempt: int, turn: Turn) -> None:
        try:
            place = await turn.place()
        except BatonError as error:
            self._facts.put_now(PlacementFailed(attempt, error))
        except Exception as error:
            logger.exception("request %s: a bug in admission", self.request.generation_id)
            self._facts.put_now(PlacementFailed(attempt, internal(f"admission raised {type(error).__name__}")))
        else:
            self._facts.put_now(self._placed(attempt, place))
        finally:
            turn.leave()

    async def _wait_for_room(self, action: FindRoom) -> None:
        assert self._place is not None, "a decode was refused, so it was placed"
        try:
            decode = await self._admission.wait_for_room(
                self._place,
                action.wanted_block_count,
                refused_by=action.refused_by,
                barred=action.barred,
                otherwise=action.otherwise,
            )
        except BatonError as error:
            self._facts.put_now(RoomFailed(action.leg, error))
        except Exception as error:
            logger.exception("request %s: a bug in looking for room", self.request.generation_id)
            self._facts.put_now(RoomFailed(action.leg, internal(f"admission raised {type(error).__name__}")))
        else:
            self._facts.put_now(RoomFound(action.leg, decode))

    async def _prefill(self, action: StartPrefill) -> None:
        budget = self._budgets.prefill(_now())
        try:
            client = self._client_to_start_on(action.worker)
            self._check_in_time(budget)
            async with asyncio.timeout(budget.silence_s) as limit:
                reply = await client.prefill(action.order, timeout_s=budget.call_timeout_s)
        except asyncio.CancelledError:
            return  # the task ends with it; kept as its error it would be a cycle with its frames
        except Exception as error:
            is_late = isinstance(error, TimeoutError) and limit.expired()
            self._tell(LegFailed(action.leg, _baton_error(self._silent(budget) if is_late else error)))
        else:
            # BEFORE anything is awaited: a cancellation must not come between an answer and its being known.
            self._tell(PrefillDone(action.leg, reply))

    async def _decode(self, action: StartDecode) -> None:
        loop = asyncio.get_running_loop()
        leg = _DecodeLeg(action.leg, self._tell, self._budgets, computes_prompt=not action.order.ticket)
        try:
            client = self._client_to_start_on(action.worker)
            self._check_in_time(leg.budget)
            async with asyncio.timeout(None) as limit:
                leg.watch_silence(lambda: limit.reschedule(loop.time()))
                await client.decode(action.order, timeout_s=leg.budget.left_s, sink=leg)
            if not leg.is_done:
                raise engine_failed(action.worker.worker_id, "ended a decode without saying why")
        except asyncio.CancelledError:
            return  # the task ends with it; kept as its error it would be a cycle with its frames
        except Exception as error:
            is_late = isinstance(error, TimeoutError) and limit.expired()
            self._tell(LegFailed(action.leg, _baton_error(self._silent(leg.budget) if is_late else error)))
        finally:
            leg.close()

    def _client_to_start_on(self, worker: WorkerIdentity) -> WorkerClient:
        """Raises ENGINE_FAILED for a worker that was lost between its placement and its leg: the news of it came when
        the request was elsewhere, and does not come again."""
        if self._roster.is_lost(worker):
            raise engine_failed(worker.worker_id, "was lost before its leg began")
        return self._roster.client(worker)

    async def _keep_lease(self, action: KeepLease) -> None:
        """Extends at a third of the lease, so that two extensions may be lost. Ends when told so or too late."""
        pause_s = self._limits.lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            try:
                client = self._roster.client(action.worker)
                if not await client.extend_lease(action.ticket_id, self._limits.lease_s, timeout_s=pause_s):
                    return
            except BatonError as error:
                logger.info("request %s: its lease was not extended: %s", self.request.generation_id, error)
            except Exception:
                logger.exception("request %s: a bug in extending its lease", self.request.generation_id)
                return

    # The end

    async def _clean_up(self) -> None:
        """Nothing of the request is left when this returns; KV that came too late to be used is let go."""
        tasks = [*self._legs.values(), *self._lease_keepers.values()]
        if self._wait is not None:
            tasks.append(self._wait)
        running = [task for task in tasks if not task.done()]
        for task in running:
            task.cancel()
        if running:
            _, stuck = await asyncio.wait(running, timeout=self._limits.cleanup_timeout_s)
            for task in stuck:
                logger.error("%s did not end when cancelled", task.get_name())
        for fact in self._facts.drain():
            self._perform_all(self.handoff.on(fact))
        # A cancelled task has its error, that its frames, and those this: kept, they would wait for the collector.
        self._legs.clear()
        self._lease_keepers.clear()
        self._wait = None
        self._give_place_back()

    def _give_place_back(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def _stopped(self) -> BatonError:
        """What a caller that is still there is told when the router stops."""
        return draining(self.handoff.emitted_token_count)

    def _check_in_time(self, budget: Budget) -> None:
        if budget.left_s <= 0:
            raise deadline_exceeded(self.handoff.phase.value, self.handoff.emitted_token_count)

    def _silent(self, budget: Budget) -> BatonError:
        return stalled(self.handoff.phase.value, budget.silence_s, self.handoff.emitted_token_count)

    # The report

    def completed(self, finish: Finish, now: float) -> Completed:
        """The last word. ``now`` is the moment the caller takes it: the end of the request's time."""
        self.account.close(now)
        is_match = self._matched_stop_sequence is not None
        return Completed(
            reason=FinishReason.STOP if is_match else finish.reason,  # a match may come with the text held back
            matched_stop_sequence=self._matched_stop_sequence,
            matched_stop_token_id=None if is_match else finish.matched_stop_token_id,
            usage=Usage(
                prompt_token_count=len(self.request.prompt_token_ids),
                output_token_count=finish.output_token_count,
                cached_prompt_token_count=self.handoff.cached_prompt_token_count,
            ),
            report=self.report(),
            cumulative_logprob=None if self.request.top_logprob_count is None else self._cumulative_logprob,
        )

    def report(self) -> PhaseReport:
        """So far; complete once ``completed``."""
        handoff = self.handoff
        return PhaseReport(
            durations=self.account.durations(),
            transfer=handoff.transfer,
            handover=handoff.handover,
            prefill_worker_id=handoff.prefill_worker_id,
            decode_worker_id=handoff.decode_worker_id,
            attempt_count=handoff.attempt_count,
            mode=handoff.mode,
            placement_reason=handoff.placement.reason if handoff.placement is not None else "",
        )


class _DecodeLeg:
    """One decode's sink: numbers its tokens, says facts of it, and notices its silence. The silence is looked for now
    and then: a timer that moved with each token would cost more than the token."""

    __slots__ = (
        "_budgets",
        "_heard_at",
        "_is_silent",
        "_leg",
        "_loop",
        "_now",
        "_tell",
        "_timer",
        "_token_count",
        "budget",
        "is_done",
    )

    def __init__(self, leg: int, tell: Callable[[Fact], None], budgets: Budgets, *, computes_prompt: bool) -> None:
        self._leg = leg
        self._tell = tell
        self._budgets = budgets
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._heard_at = self._now()
        self._token_count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_silent: Callable[[], None] = lambda: None
        self.budget = budgets.handoff(self._heard_at, computes_prompt=computes_prompt)
        self.is_done = False

    def watch_silence(self, is_silent: Callable[[], None]) -> None:
        """``is_silent`` is called when nothing was heard for the budget's time. Until ``close``."""
        self._is_silent = is_silent
        self._look()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def adopted(self, kv: KvAdopted) -> None:
        self._heard_at = self._now()
        self.budget = self._budgets.decode(self._heard_at)
        self._look()  # the silence allowed from now on may be shorter
        self._tell(Adopted(self._leg, kv))

    def tokens(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self._heard_at = self._now()
        first_index = self._token_count
        self._token_count = first_index + len(token_ids)
        self._tell(TokensArrived(self._leg, first_index, token_ids, logprobs))

    def done(self, finish: LegFinish) -> None:
        self.is_done = True
        self._tell(DecodeEnded(self._leg, self._token_count, finish))

    def _look(self) -> None:
        self.close()
        silent_at = self._heard_at + self.budget.silence_s
        if self._now() >= silent_at:
            self._is_silent()
        else:
            self._timer = self._loop.call_at(silent_at, self._look)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _is_leg_lost(action: Action) -> bool:
    match action:
        case Place():
            return True  # an answer to a fact, so not the first
        case Fail():
            return action.error.reason in (Reason.ATTEMPTS_EXHAUSTED, Reason.STALLED)
    return False


def _baton_error(error: Exception) -> BatonError:
    """Any failure of a leg as ours. Of a foreign one only the type is told: its text may quote the prompt."""
    if isinstance(error, BatonError):
        return error
    logger.error("a leg raised %s", type(error).__name__, exc_info=error)
    return internal(f"a leg raised {type(error).__name__}")

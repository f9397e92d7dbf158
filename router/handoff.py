"""The order of one request: place, prefill, ticket, decode, release; for success, failure, cancel and timeout alike.

Facts in, actions out. Owns the ordering, the tokens emitted so far and which ticket is held; no I/O, no time, no
tasks. Whoever drives it performs every action, in order, and feeds back what happened.

                       start
                         v
      .------------> PLACING <--------------------------------------------.
      |        split |     | local                                        |
      |              v     '---------------.                              |  a leg was lost and attempts
      |         PREFILLING ----------------)------------------------------|  are left: the next one starts
      |              | PrefillDone: Emit   |                              |  from prompt + tokens emitted
      |              v                     v                              |
      |          PREFILLED --Emitted--> STARTING <--RoomFound-- NO_ROOM --|
      |              |                     |  '---refused: FindRoom-'     |
      |              |                     | Adopted: ReleaseKv, but      |
      |              |                     | AFTER tokens that came along |
      |              |                     v                              |
      |              |                 DECODING --------------------------'
      |              | last token          | DecodeEnded
      |              v                     v
      '-- no --- ENDED: exactly one of Finish, Fail, Abandon. After it, only ReleaseKv.

A leg is one prefill or one decode on one worker; its number grows with each start, and its facts carry it. Facts of
another leg than the present one change nothing, with one exception: a PrefillDone always brings KV that somebody
holds, so it is answered by ReleaseKv. Every ticket seen is released exactly once: when it was adopted, or when its
attempt is over.

A decode worker that has too few KV blocks refuses its leg before anything is pulled (NO_ROOM). No leg is lost by that
and no attempt spent: the KV stays held, its lease extended, until some decode worker has room or the deadline passes.

Tokens are numbered within their leg, so a repeat is dropped; a gap is a lost leg. Every Emit is answered by Emitted
or StopMatched before anything else of that leg: a stop sequence in the first token then never costs a decode.
"""

from __future__ import annotations

import dataclasses
import enum

from baton.errors import (
    BatonError,
    Reason,
    attempts_exhausted,
    deadline_exceeded,
    engine_failed,
    internal,
    stalled,
    told_of_a_leg,
)
from baton.leg import DecodeOrder, KvAdopted, PrefillOrder, PrefillReply
from baton.request import EngineStop, FinishReason, Handover, LegFinish, PlacementMode, TokenLogprobs
from baton.timeline import Phase
from baton.transfer_report import TransferReport
from router.answering import RoutedRequest
from router.cluster_view import WorkerIdentity
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
from router.placement import Placement


class State(enum.Enum):
    PLACING = "placing"
    PREFILLING = "prefilling"
    PREFILLED = "prefilled"
    STARTING = "starting"
    NO_ROOM = "no_room"
    DECODING = "decoding"
    ENDED = "ended"


_CALLERS_FAULT = frozenset({Reason.INVALID_REQUEST, Reason.PROMPT_TOO_LONG, Reason.MODEL_NOT_FOUND})
"""What another worker would say too."""


_WANTED = "wanted_block_count"
"""In the metadata of NO_ROOM, and of the PROMPT_TOO_LONG that a worker with a small KV cache says."""
_GAP = "gap_s"
"""In the metadata of STALLED."""

_DECODING = State.DECODING
"""Asked with every token: looked up in its class, it would be a call."""


class Handoff:
    """One request's. ``start`` once, then ``on`` each fact. Not reusable."""

    def __init__(self, request: RoutedRequest, *, max_attempt_count: int = 3, lease_s: float = 30.0) -> None:
        if max_attempt_count < 1:
            raise ValueError(f"max_attempt_count is {max_attempt_count}; the first attempt counts, so at least 1")
        self._request = request
        self._max_attempt_count = max_attempt_count
        self._lease_s = lease_s
        self._wants_logprobs = request.top_logprob_count is not None
        # The mutable state. Of the request:
        self.state = State.PLACING
        """For others to read."""
        self._emitted: list[int] = list(request.emitted_token_ids)
        self._attempt = 0
        self._is_prompt_told = False
        self._excluded: frozenset[WorkerIdentity] = frozenset()
        self._stall: tuple[Phase, float] | None = None  # if the last leg was lost to silence: where, and for how long
        # Of prefills, in all attempts: where each was started, and which have been answered.
        self._prefill_workers: dict[int, WorkerIdentity] = {}
        self._answered: set[int] = set()
        # Of the attempt:
        self._placement: Placement | None = None
        self._leg = 0
        self._is_leg_running = False
        self._leg_token_count = 0
        self._reply: PrefillReply | None = None
        self._held: ReleaseKv | None = None
        self._too_small: frozenset[WorkerIdentity] = frozenset()
        # For the report:
        self.no_room_count = 0
        self.transfer = TransferReport()
        self.handover = Handover.NONE
        self.cached_prompt_token_count = 0
        self.prefill_worker_id = ""
        self.decode_worker_id = ""

    def __repr__(self) -> str:
        where = f"attempt {self._attempt}, leg {self._leg}"
        return f"<Handoff {self._request.generation_id} {self.state.value} [{where}]>"

    # Questions

    @property
    def leg(self) -> int:
        """The present leg, or the last; 0 before the first."""
        return self._leg

    @property
    def is_ended(self) -> bool:
        return self.state is State.ENDED

    @property
    def attempt_count(self) -> int:
        return self._attempt

    @property
    def emitted_token_count(self) -> int:
        return len(self._emitted)

    @property
    def sent_token_count(self) -> int:
        """Of those, the ones that this handoff sent: a caller that brought the others may ask again with them."""
        return len(self._emitted) - len(self._request.emitted_token_ids)

    @property
    def placement(self) -> Placement | None:
        """The last one."""
        return self._placement

    @property
    def mode(self) -> PlacementMode:
        """How the last attempt was served."""
        if self._placement is None or self._placement.mode is PlacementMode.LOCAL:
            return PlacementMode.LOCAL
        return PlacementMode.SPLIT if self.decode_worker_id else PlacementMode.PREFILL_ONLY

    @property
    def worker(self) -> WorkerIdentity | None:
        """The worker of the present leg."""
        if self._placement is None or not self._is_leg_running:
            return None
        is_prefill = self.state is State.PREFILLING
        return self._prefill_workers[self._leg] if is_prefill else self._placement.decode

    @property
    def phase(self) -> Phase:
        """The phase the request is in, as far as a router can know: between the start of a decode and KvAdopted
        it is HANDOFF_WAIT, and only KvAdopted tells how much of that was transfer or decode wait."""
        match self.state:
            case State.PREFILLING:
                return Phase.PREFILL
            case State.PREFILLED:
                return Phase.HANDOFF_WAIT
            case State.STARTING | State.NO_ROOM:
                return Phase.HANDOFF_WAIT if self._is_split else Phase.PREFILL
            case State.DECODING:
                return Phase.DECODE
            case _:
                return Phase.QUEUE

    # Effects

    def start(self) -> list[Action]:
        assert self._attempt == 0, "a handoff is started once"
        return self._next_attempt()

    def on(self, fact: Fact) -> list[Action]:
        """What to do now. Late, repeated and foreign facts give nothing to do but the release of late KV."""
        if type(fact) is TokensArrived and self.state is _DECODING and fact.leg == self._leg:
            return self._stepped(fact)  # nearly every fact there is: ahead of the others
        match self.state, fact:
            case _, PrefillDone() if fact.leg != self._leg or self.state is not State.PREFILLING:
                return self._release_late(fact)
            case State.ENDED, _:
                return []
            case _, ClientGone():
                return self._end(Abandon())
            case _, DeadlinePassed():
                return self._end(Fail(deadline_exceeded(self.phase.value, len(self._emitted))))
            case _, StopMatched():
                del self._emitted[fact.token_count :]
                return self._end(Finish(FinishReason.STOP, None, fact.token_count))
            case _, WorkerLost() if fact.worker == self.worker:
                return self._lost(engine_failed(fact.worker.worker_id, "was lost"))
            case State.PLACING, Placed() if fact.attempt == self._attempt:
                return self._placed(fact.placement)
            case State.PLACING, PlacementFailed() if fact.attempt == self._attempt:
                return self._end(Fail(self._placement_error(fact.error)))
            case State.PREFILLING, PrefillDone():
                return self._prefilled(fact.reply)
            case State.PREFILLED, Emitted() if fact.token_count == len(self._emitted):
                return self._hand_over()
            case State.STARTING, Adopted() if fact.leg == self._leg:
                return self._adopted(fact.kv)
            case State.STARTING, TokensArrived() | DecodeEnded() if fact.leg == self._leg:
                return self._lost(internal("tokens came before their KV was adopted"))
            case State.DECODING, DecodeEnded() if fact.leg == self._leg:
                return self._decode_ended(fact)
            case State.PREFILLING | State.STARTING | State.DECODING, LegFailed() if fact.leg == self._leg:
                self._is_leg_running = False
                return self._leg_failed(fact.error)
            case State.NO_ROOM, RoomFound() if fact.leg == self._leg:
                return self._room_found(fact.decode)
            case State.NO_ROOM, RoomFailed() if fact.leg == self._leg:
                is_final = fact.error.reason in _CALLERS_FAULT
                return self._end(Fail(fact.error)) if is_final else self._lost(fact.error)
        return []

    # Going forward

    def _next_attempt(self, *, needs_recompute: bool = False) -> list[Action]:
        self._attempt += 1
        self.state = State.PLACING
        return [Place(self._attempt, self._excluded, needs_recompute)]

    def _placed(self, placement: Placement) -> list[Action]:
        self._placement = placement
        self.decode_worker_id = ""
        self.handover = Handover.NONE
        prefill, stop = placement.prefill, self._stop()
        if prefill is None:
            # It computes the prompt too.
            prefill = placement.decode
            self.prefill_worker_id = prefill.worker_id
            if not self._wants_prompt_logprobs:
                return self._start_decode(ticket=b"")
            # Only a prefill scores a prompt: one that holds nothing, after which the same worker goes on.
            stop = dataclasses.replace(stop, max_token_count=1)
        self.state = State.PREFILLING
        leg = self._next_leg()
        self._prefill_workers[leg] = prefill
        self.prefill_worker_id = prefill.worker_id
        order = PrefillOrder(
            leg_id=self._leg_id(leg),
            prompt_token_ids=self._prompt_so_far(),
            sampling=self._request.sampling,
            stop=stop,
            lease_s=self._lease_s,
            priority=self._request.priority,
            output_token_count=len(self._emitted),
            top_logprob_count=self._request.top_logprob_count,
            tenant=self._request.tenant,
            prompt_logprob_count=self._request.prompt_logprob_count if self._wants_prompt_logprobs else None,
        )
        return [StartPrefill(leg, prefill, order)]

    def _prefilled(self, reply: PrefillReply) -> list[Action]:
        worker = self._prefill_workers[self._leg]
        self._answered.add(self._leg)
        self._is_leg_running = False
        if reply.ticket_id:
            self._held = ReleaseKv(worker, reply.ticket_id)
        if (reply.finish is None) != bool(reply.ticket and reply.ticket_id):
            return self._lost(internal(f"worker {worker.worker_id} answered a prefill with neither end nor ticket"))
        self.state = State.PREFILLED
        self._reply = reply
        self._note_cached(reply.cached_token_count)
        keep: list[Action] = [KeepLease(worker, reply.ticket_id)] if reply.ticket_id else []
        logprobs = () if reply.first_logprobs is None else (reply.first_logprobs,)
        if bool(logprobs) != self._wants_logprobs:
            return self._lost(internal(f"worker {worker.worker_id} brought logprobs unasked, or did not"))
        told = self._tell_prompt(reply)
        if told is None:
            return self._lost(internal(f"worker {worker.worker_id} brought other logprobs of the prompt than asked"))
        return [*keep, *told, self._emit((reply.first_token_id,), logprobs)]

    def _tell_prompt(self, reply: PrefillReply) -> list[Action] | None:
        """None: the reply has not what was asked for. Told once, whatever is lost later."""
        scores = reply.prompt_logprobs
        if not self._wants_prompt_logprobs:
            return [] if scores is None else None
        if scores is None or len(scores) != len(self._request.prompt_token_ids):
            return None
        if scores.top_count != self._request.prompt_logprob_count:
            return None
        self._is_prompt_told = True
        return [TellPrompt(scores)]

    def _hand_over(self) -> list[Action]:
        reply = self._reply
        assert reply is not None
        is_scored_here = not self._is_split and reply.finish is LegFinish.LENGTH
        if reply.finish is not None and not is_scored_here:
            return self._finish(reply.finish)
        if len(self._emitted) >= self._request.max_output_token_count:
            return self._finish(LegFinish.LENGTH)
        return self._start_decode(reply.ticket)

    def _start_decode(self, ticket: bytes) -> list[Action]:
        assert self._placement is not None
        self.state = State.STARTING
        leg = self._next_leg()
        self.decode_worker_id = self._placement.decode.worker_id
        self.handover = Handover.OUTPUT_INJECTION if self._emitted else Handover.NONE
        order = DecodeOrder(
            leg_id=self._leg_id(leg),
            prompt_token_ids=self._prompt_so_far(),
            sampling=self._request.sampling,
            stop=self._stop(),
            ticket=ticket,
            priority=self._request.priority,
            output_token_count=len(self._emitted),
            top_logprob_count=self._request.top_logprob_count,
            tenant=self._request.tenant,
        )
        return [StartDecode(leg, self._placement.decode, order)]

    def _adopted(self, kv: KvAdopted) -> list[Action]:
        self.state = State.DECODING
        self.transfer = self.transfer.plus(kv)
        if not self._is_split:
            self._note_cached(kv.cached_token_count)
        # Tokens that are here are the caller's first: they are told in the next fact, and the release AFTER them.
        return [] if kv.is_with_tokens else self._release_held()

    def _stepped(self, fact: TokensArrived) -> list[Action]:
        if fact.first_index > self._leg_token_count:
            return self._lost(internal(f"tokens are missing before index {fact.first_index} of a leg"))
        if len(fact.logprobs) != (len(fact.token_ids) if self._wants_logprobs else 0):
            return self._lost(internal("a leg brought other logprobs than it was asked for"))
        repeated_count = self._leg_token_count - fact.first_index
        fresh, logprobs = fact.token_ids, fact.logprobs
        if repeated_count:
            fresh, logprobs = fresh[repeated_count:], logprobs[repeated_count:]
        if not fresh:
            return self._release_held()
        if len(self._emitted) + len(fresh) > self._request.max_output_token_count:
            return self._lost(internal("a leg brought more tokens than it was asked for"))
        self._leg_token_count += len(fresh)
        emit = self._emit(fresh, logprobs)
        return [emit] if self._held is None else [emit, *self._release_held()]

    def _decode_ended(self, fact: DecodeEnded) -> list[Action]:
        if fact.token_count != self._leg_token_count:
            return self._lost(internal(f"a leg ended after {fact.token_count} tokens, {self._leg_token_count} came"))
        self._is_leg_running = False
        return self._finish(fact.finish)

    def _no_room(self, error: BatonError) -> list[Action]:
        """Nothing was pulled and the ticket is unused: the same KV is offered to the next worker that has room."""
        assert self._placement is not None
        self.state = State.NO_ROOM
        self.no_room_count += 1
        decode = self._placement.decode
        could_never = error.reason is not Reason.NO_ROOM
        if could_never:
            self._too_small |= {decode}
        holder = frozenset() if self._held is None else frozenset({self._held.worker})
        wanted = int(error.metadata[_WANTED])
        return [FindRoom(self._leg, wanted, decode, self._too_small | holder, error if could_never else None)]

    def _room_found(self, decode: WorkerIdentity) -> list[Action]:
        assert self._placement is not None
        self._placement = dataclasses.replace(self._placement, decode=decode)
        if not self._is_split:
            self.prefill_worker_id = decode.worker_id
        return self._start_decode(self._reply.ticket if self._is_split and self._reply is not None else b"")

    # Going back

    def _leg_failed(self, error: BatonError) -> list[Action]:
        match error.reason:
            case Reason.DEADLINE_EXCEEDED:  # the worker's clock was a little ahead of ours
                return self._end(Fail(deadline_exceeded(self.phase.value, len(self._emitted))))
            case Reason.NO_ROOM | Reason.PROMPT_TOO_LONG if (
                self.state is State.STARTING and error.metadata.get(_WANTED, "").isdecimal()
            ):
                return self._no_room(error)
            case reason if reason in _CALLERS_FAULT:
                return self._end(Fail(error))
            case Reason.TICKET_REFUSED:
                return self._lost(error, is_ticket_refused=True)
        return self._lost(error)

    def _lost(self, error: BatonError, *, is_ticket_refused: bool = False) -> list[Action]:
        """The present leg is lost: start again elsewhere, unless nothing is left to do or to try."""
        phase, worker = self.phase, self._worker_of_leg()
        ended = self._end_reached()
        if ended is not None:
            return self._finish(ended)
        self._stall = (phase, float(error.metadata[_GAP])) if error.reason is Reason.STALLED else None
        if self._attempt >= self._max_attempt_count:
            return self._end(Fail(self._given_up(self._attempt, phase, error)))
        if worker is not None and not is_ticket_refused:
            self._excluded |= {worker}
        return [*self._let_go(), *self._next_attempt(needs_recompute=is_ticket_refused)]

    def _end_reached(self) -> LegFinish | None:
        """How the answer ended, if all of it was emitted and only the word of its end was lost."""
        if self._emitted and self._emitted[-1] in self._request.end_token_ids:
            return LegFinish.STOP
        if len(self._emitted) >= self._request.max_output_token_count:
            return LegFinish.LENGTH
        return None

    def _placement_error(self, error: BatonError) -> BatonError:
        is_stalled = self._stall is not None and error.reason in (Reason.NO_WORKER, Reason.QUEUE_FULL)
        if (not self.sent_token_count and not is_stalled) or error.reason is Reason.DEADLINE_EXCEEDED:
            return error
        # Nothing may be called safe to retry once a token was sent.
        return self._given_up(self._attempt - 1, Phase.QUEUE, error)

    def _given_up(self, attempt_count: int, phase: Phase, last: BatonError) -> BatonError:
        """STALLED where silence is what it ends in, and was when there was nowhere else to go."""
        if self._stall is not None:
            stalled_in, gap_s = self._stall
            return stalled(stalled_in.value, gap_s, self.sent_token_count)
        return attempts_exhausted(attempt_count, self.sent_token_count, phase.value, told_of_a_leg(last))

    # Ending

    def _finish(self, finish: LegFinish) -> list[Action]:
        count = len(self._emitted)
        match finish:
            case LegFinish.STOP:
                return self._end(Finish(FinishReason.STOP, self._emitted[-1] if self._emitted else None, count))
            case LegFinish.LENGTH if count < self._request.max_output_token_count or self._request.is_context_bound:
                return self._end(Finish(FinishReason.CONTEXT_FULL, None, count))
            case LegFinish.LENGTH:
                return self._end(Finish(FinishReason.MAX_OUTPUT_TOKENS, None, count))

    def _end(self, last: Finish | Fail | Abandon) -> list[Action]:
        actions = self._let_go()
        self.state = State.ENDED
        return [*actions, last]

    def _let_go(self) -> list[Action]:
        """Stops the leg BEFORE its KV is released: nothing may read blocks that are being given away."""
        cancel: list[Action] = [CancelLeg(self._leg)] if self._is_leg_running else []
        self._is_leg_running = False
        return [*cancel, *self._release_held()]

    def _release_held(self) -> list[Action]:
        held, self._held = self._held, None
        return [] if held is None else [held]

    def _release_late(self, fact: PrefillDone) -> list[Action]:
        worker = self._prefill_workers.get(fact.leg)
        if worker is None or fact.leg in self._answered:
            return []
        self._answered.add(fact.leg)
        return [ReleaseKv(worker, fact.reply.ticket_id)] if fact.reply.ticket_id else []

    # Parts

    @property
    def _is_split(self) -> bool:
        return self._placement is not None and self._placement.prefill is not None

    def _worker_of_leg(self) -> WorkerIdentity | None:
        if self._placement is None:
            return None
        is_prefill = self.state in (State.PREFILLING, State.PREFILLED)
        return self._prefill_workers[self._leg] if is_prefill else self._placement.decode

    def _next_leg(self) -> int:
        self._leg += 1
        self._is_leg_running = True
        self._leg_token_count = 0
        return self._leg

    def _leg_id(self, leg: int) -> str:
        return f"{self._request.generation_id}.{leg}"

    def _prompt_so_far(self) -> tuple[int, ...]:
        return (*self._request.prompt_token_ids, *self._emitted)

    def _stop(self) -> EngineStop:
        return EngineStop(
            max_token_count=self._request.max_output_token_count - len(self._emitted),
            stop_token_ids=self._request.stop_token_ids,
            ignore_eos=self._request.ignore_eos,
            min_token_count=self._request.min_output_token_count,
        )

    @property
    def _wants_prompt_logprobs(self) -> bool:
        return self._request.prompt_logprob_count is not None and not self._is_prompt_told

    def _emit(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> Emit:
        first_index = len(self._emitted)
        self._emitted.extend(token_ids)
        return Emit(first_index, token_ids, logprobs)

    def _note_cached(self, token_count: int) -> None:
        """Of the prefill that the answer began with: what a later one finds may be what the first one left there."""
        if len(self._emitted) == len(self._request.emitted_token_ids):
            self.cached_prompt_token_count = min(token_count, len(self._request.prompt_token_ids))

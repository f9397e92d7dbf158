"""The handoff against a world that duplicates, delays, reorders and loses: what must hold whatever happens."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import cache_too_small, engine_failed, no_room, no_worker, ticket_refused
from baton.leg import KvAdopted, PrefillReply
from baton.request import LegFinish, PlacementMode
from router.answering import RoutedRequest
from router.cluster_view import WorkerIdentity
from router.handoff import Handoff
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
    TokensArrived,
    WorkerLost,
)
from router.placement import Placement

PROMPT = (1, 2, 3)
WORKERS = [WorkerIdentity(name, "e") for name in ("p0", "p1", "d0", "d1")]
MAX_ATTEMPTS = 3


def token_at(position: int) -> int:
    """What every worker says at a position of prompt + answer, so that a skip or a repeat shows."""
    return 100 + position


class World:
    """Performs actions by putting what may come of them among the facts under way."""

    def __init__(self, max_output_token_count: int, last_position: int) -> None:
        request = RoutedRequest("g", PROMPT, max_output_token_count, eos_token_ids=(token_at(last_position),))
        self.handoff = Handoff(request, max_attempt_count=MAX_ATTEMPTS)
        self.last_position = last_position
        self.max_output_token_count = max_output_token_count
        self.under_way: list[Fact] = []
        self.delivered: list[Fact] = []
        self.emitted: list[int] = []
        self.granted: set[str] = set()
        self.released: Counter[str] = Counter()
        self.terminals: list[Action] = []
        self.live_legs: set[int] = set()
        self.attempts = 0

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            assert not self.terminals or isinstance(action, ReleaseKv), f"{action} after {self.terminals}"
            match action:
                case Place():
                    self.attempts += 1
                    assert action.attempt == self.attempts <= MAX_ATTEMPTS
                    self._place(action.attempt)
                case StartPrefill():
                    self._start(action.leg)
                    self._prefill(action)
                case StartDecode():
                    self._start(action.leg)
                    self._decode(action)
                case CancelLeg():
                    self.live_legs.discard(action.leg)
                case FindRoom():
                    self._find_room(action)
                case KeepLease():
                    assert self.released[action.ticket_id] == 0
                case ReleaseKv():
                    self.released[action.ticket_id] += 1
                case Emit():
                    assert action.first_index == len(self.emitted), "a gap or a repeat"
                    self.emitted.extend(action.token_ids)
                    self.deliver(Emitted(len(self.emitted)))
                case Finish() | Fail() | Abandon():
                    self.terminals.append(action)

    def deliver(self, fact: Fact) -> None:
        self.delivered.append(fact)
        match fact:
            case PrefillDone():
                self.live_legs.discard(fact.leg)
                if fact.reply.ticket_id:
                    self.granted.add(fact.reply.ticket_id)
            case DecodeEnded() | LegFailed():
                self.live_legs.discard(fact.leg)
        self.perform(self.handoff.on(fact))

    def _start(self, leg: int) -> None:
        assert not self.live_legs, "two legs at once"
        self.live_legs.add(leg)

    def _place(self, attempt: int) -> None:
        p0, p1, d0, d1 = WORKERS
        self.under_way += [
            Placed(attempt, Placement(p0, d0, PlacementMode.SPLIT, "r")),
            Placed(attempt, Placement(p1, d1, PlacementMode.SPLIT, "r")),
            Placed(attempt, Placement(None, d1, PlacementMode.LOCAL, "r")),
            PlacementFailed(attempt, no_worker("decode", 0)),
        ]

    def _prefill(self, action: StartPrefill) -> None:
        position = len(action.order.prompt_token_ids)
        finish = self._finish_at(position, action.order.stop.max_token_count == 1)
        ticket = "" if finish else f"t{action.leg}"
        reply = PrefillReply(token_at(position), finish, ticket.encode(), ticket, 0.0, 0.0, 0, 0)
        self.under_way += [PrefillDone(action.leg, reply), LegFailed(action.leg, engine_failed("w", "died"))]

    def _decode(self, action: StartDecode) -> None:
        start = len(action.order.prompt_token_ids)
        assert action.order.stop.max_token_count >= 1
        count = 0
        finish: LegFinish | None = None
        is_with_tokens = bool(action.leg % 2)
        facts: list[Fact] = [Adopted(action.leg, KvAdopted(0, 0, 0, 1, 1, 0, 0, 0, is_with_tokens=is_with_tokens))]
        while finish is None:
            facts.append(TokensArrived(action.leg, count, (token_at(start + count),)))
            count += 1
            finish = self._finish_at(start + count - 1, count == action.order.stop.max_token_count)
        if count > 1:  # and once in larger, overlapping portions
            tokens = tuple(token_at(start + index) for index in range(count))
            facts.append(TokensArrived(action.leg, 0, tokens[: count // 2 + 1]))
            facts.append(TokensArrived(action.leg, count // 2, tokens[count // 2 :]))
        facts.append(DecodeEnded(action.leg, count, finish))
        facts.append(LegFailed(action.leg, engine_failed("w", "died")))
        if action.order.ticket:
            facts.append(LegFailed(action.leg, ticket_refused("replayed")))
            facts.insert(0, LegFailed(action.leg, no_room(7, 2, 0.25)))
            facts.append(LegFailed(action.leg, cache_too_small(100, 7, 5)))
        self.under_way += facts

    def _find_room(self, action: FindRoom) -> None:
        held = [ticket for ticket in self.granted if not self.released[ticket]]
        assert held, "waits for room, and its KV was let go"
        self.under_way += [
            RoomFound(action.leg, WORKERS[3]),
            RoomFailed(action.leg, no_worker("decode", 0)),
            *([] if action.otherwise is None else [RoomFailed(action.leg, action.otherwise)]),
        ]

    def _finish_at(self, position: int, is_at_limit: bool) -> LegFinish | None:
        if position == self.last_position:
            return LegFinish.STOP
        return LegFinish.LENGTH if is_at_limit else None


@settings(max_examples=1500, deadline=None)
@given(data=st.data(), max_output=st.integers(1, 6), length=st.integers(1, 8))
def test_whatever_the_order_of_facts_the_invariants_hold(data: st.DataObject, max_output: int, length: int) -> None:
    world = World(max_output, last_position=len(PROMPT) + length - 1)
    world.perform(world.handoff.start())
    for _ in range(data.draw(st.integers(0, 60), label="steps")):
        kind = data.draw(st.integers(0, 19), label="kind")
        if kind == 0:
            world.deliver(WorkerLost(data.draw(st.sampled_from(WORKERS))))
        elif kind == 1 and data.draw(st.booleans()):
            world.deliver(DeadlinePassed() if data.draw(st.booleans()) else ClientGone())
        elif kind == 2 and world.emitted and data.draw(st.booleans()):
            count = data.draw(st.integers(1, len(world.emitted)))
            if not world.terminals:
                del world.emitted[count:]
            world.deliver(StopMatched(count))
        elif kind in (3, 4) and world.delivered:
            world.deliver(data.draw(st.sampled_from(world.delivered), label="again"))
        elif world.under_way:
            # Mostly in order, so that deep states are reached; sometimes not.
            index = 0 if kind > 9 else data.draw(st.integers(0, len(world.under_way) - 1))
            world.deliver(world.under_way.pop(index))
    world.deliver(DeadlinePassed())
    for fact in world.under_way[:]:
        world.deliver(fact)

    assert len(world.terminals) == 1
    assert not world.live_legs or all(leg < world.handoff.leg for leg in world.live_legs)
    assert world.granted == set(world.released), "granted but never released, or the other way round"
    assert all(count == 1 for count in world.released.values()), world.released
    oracle = [token_at(len(PROMPT) + index) for index in range(min(max_output, length))]
    assert world.emitted == oracle[: len(world.emitted)]
    match world.terminals[0]:
        case Finish() as finish:
            assert finish.output_token_count == len(world.emitted)
            if not any(isinstance(fact, StopMatched) for fact in world.delivered):
                assert world.emitted == oracle
        case Fail() as fail:
            if world.emitted:
                assert fail.error.status.value != "UNAVAILABLE", "not safe to retry: tokens were sent"

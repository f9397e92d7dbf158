"""What each leg is told of the answer so far, and what becomes of the logprobs that legs bring."""

from __future__ import annotations

import pytest

from baton.errors import Reason, StatusName, queue_full
from baton.leg import DecodeOrder, KvAdopted, PrefillOrder, PrefillReply
from baton.request import EngineStop, PlacementMode, Sampling, TokenLogprobs
from router.answering import RoutedRequest
from router.cluster_view import WorkerIdentity
from router.handoff import Handoff
from router.handoff_words import (
    Action,
    Adopted,
    Emit,
    Emitted,
    Fail,
    Place,
    Placed,
    PlacementFailed,
    PrefillDone,
    ReleaseKv,
    StartDecode,
    StartPrefill,
    TokensArrived,
    WorkerLost,
)
from router.placement import Placement

P, D = WorkerIdentity("p", "e"), WorkerIdentity("d", "e")
PROMPT = (1, 2, 3)
ADOPTED = KvAdopted(0.0, 0.0, 0.0, 10, 1, 0, 0.0, 0)


def lp(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token_id), 1)


def handoff_of(top_logprob_count: int | None = 2) -> Handoff:
    request = RoutedRequest(
        "g",
        PROMPT,
        10,
        sampling=Sampling(presence_penalty=1.0),
        min_output_token_count=6,
        top_logprob_count=top_logprob_count,
        tenant="t",
    )
    handoff = Handoff(request)
    handoff.start()
    return handoff


def only(actions: list[Action], kind: type) -> Action:
    (found,) = [each for each in actions if isinstance(each, kind)]
    return found


def place(handoff: Handoff) -> PrefillOrder:
    placement = Placement(P, D, PlacementMode.SPLIT, "scripted")
    start = only(handoff.on(Placed(handoff.attempt_count, placement)), StartPrefill)
    assert isinstance(start, StartPrefill)
    return start.order


def prefilled(handoff: Handoff, token_id: int, logprobs: TokenLogprobs | None) -> list[Action]:
    ticket = f"k{handoff.leg}"
    reply = PrefillReply(token_id, None, ticket.encode(), ticket, 0.0, 0.0, 0, 0, logprobs)
    return handoff.on(PrefillDone(handoff.leg, reply))


def decode_order(actions: list[Action]) -> DecodeOrder:
    start = only(actions, StartDecode)
    assert isinstance(start, StartDecode)
    return start.order


def test_every_leg_is_told_which_tokens_are_output_and_whose_request_it_is() -> None:
    handoff = handoff_of()
    order = place(handoff)
    assert (order.prompt_token_ids, order.output_token_count) == (PROMPT, 0)
    assert (order.stop, order.top_logprob_count, order.tenant) == (EngineStop(10, min_token_count=6), 2, "t")
    assert only(prefilled(handoff, 7, lp(7)), Emit) == Emit(0, (7,), (lp(7),))
    decode = decode_order(handoff.on(Emitted(1)))
    assert (decode.prompt_token_ids, decode.output_token_count) == ((*PROMPT, 7), 1)
    assert (decode.stop, decode.top_logprob_count, decode.tenant) == (EngineStop(9, min_token_count=6), 2, "t")
    handoff.on(Adopted(handoff.leg, ADOPTED))
    arrived = TokensArrived(handoff.leg, 0, (8, 9), (lp(8), lp(9)))
    assert handoff.on(arrived) == [Emit(1, (8, 9), (lp(8), lp(9)))]
    assert isinstance(only(handoff.on(WorkerLost(D)), Place), Place)
    again = place(handoff)
    assert (again.prompt_token_ids, again.output_token_count) == ((*PROMPT, 7, 8, 9), 3)
    assert again.stop == EngineStop(7, min_token_count=6)
    prefilled(handoff, 5, lp(5))
    decode = decode_order(handoff.on(Emitted(4)))
    assert (decode.prompt_token_ids, decode.output_token_count) == ((*PROMPT, 7, 8, 9, 5), 4)


def test_repeated_tokens_are_dropped_with_their_logprobs() -> None:
    handoff = handoff_of()
    place(handoff)
    prefilled(handoff, 7, lp(7))
    handoff.on(Emitted(1))
    handoff.on(Adopted(handoff.leg, ADOPTED))
    handoff.on(TokensArrived(handoff.leg, 0, (8, 9), (lp(8), lp(9))))
    repeated = TokensArrived(handoff.leg, 1, (9, 4), (lp(9), lp(4)))
    assert handoff.on(repeated) == [Emit(3, (4,), (lp(4),))]


@pytest.mark.parametrize(("asked", "brought"), [(2, None), (None, lp(7))])
def test_a_prefill_whose_logprobs_are_not_as_asked_is_lost_and_its_kv_released(
    asked: int | None, brought: TokenLogprobs | None
) -> None:
    handoff = handoff_of(asked)
    place(handoff)
    actions = prefilled(handoff, 7, brought)
    assert only(actions, ReleaseKv) == ReleaseKv(P, "k1")
    assert not any(isinstance(each, Emit) for each in actions)
    assert handoff.emitted_token_count == 0


@pytest.mark.parametrize("brought", [(), (lp(8),), (lp(8), lp(9), lp(9))])
def test_a_decode_whose_logprobs_are_not_one_per_token_is_lost(brought: tuple[TokenLogprobs, ...]) -> None:
    handoff = handoff_of()
    place(handoff)
    prefilled(handoff, 7, lp(7))
    handoff.on(Emitted(1))
    handoff.on(Adopted(handoff.leg, ADOPTED))
    actions = handoff.on(TokensArrived(handoff.leg, 0, (8, 9), brought))
    assert only(actions, Place)
    assert handoff.emitted_token_count == 1


@pytest.mark.parametrize("sends_one", [False, True])
def test_a_continuation_may_be_asked_again_as_long_as_this_call_added_no_token(sends_one: bool) -> None:
    """What the caller brought along it brings along again: only what was sent since would come twice."""
    handoff = Handoff(RoutedRequest("g", PROMPT, 10, emitted_token_ids=(4, 5)))
    handoff.start()
    if sends_one:
        place(handoff)
        prefilled(handoff, 7, None)
        handoff.on(Emitted(3))
        handoff.on(WorkerLost(D))
    refused = only(handoff.on(PlacementFailed(handoff.attempt_count, queue_full(1, 1, 5.0))), Fail)
    assert isinstance(refused, Fail)
    error = refused.error
    if sends_one:
        assert (error.reason, error.status) == (Reason.ATTEMPTS_EXHAUSTED, StatusName.ABORTED)
        assert error.metadata["emitted_token_count"] == "1"
    else:
        assert (error.reason, error.status, error.retry_after_s) == (
            Reason.QUEUE_FULL,
            StatusName.RESOURCE_EXHAUSTED,
            5.0,
        )

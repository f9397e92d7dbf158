"""Where a client tries next after a cut, what it keeps, and when it gives up: every rule, without a socket."""

from __future__ import annotations

import random

import pytest

from baton.client import Chunk, Event, Finished, PhaseTimings, Started
from baton.errors import (
    BatonError,
    HandshakeFailed,
    Interrupted,
    Reason,
    ResumeFailed,
    StatusName,
    Unavailable,
    attached_elsewhere,
    attempts_exhausted,
    draining,
    engine_failed,
    internal,
    no_worker,
    queue_full,
    resume_denied,
    resume_too_late,
)
from baton.request import FinishReason, Handover, PlacementMode, Usage
from baton.resuming import Continuity, NextTry, ResumePolicy
from baton.timeline import PHASES
from baton.transfer_report import TransferReport

STARTED = Started("gen-1", "tiny", 3, "token-1", 30.0)
FINISHED = Finished(
    FinishReason.STOP,
    None,
    None,
    Usage(3, 2, 0),
    PhaseTimings(
        dict.fromkeys(PHASES, 0.0), None, TransferReport(), Handover.NONE, "p", "d", 1, PlacementMode.SPLIT, "split"
    ),
)
TIME = 1000.0


def lost() -> BatonError:
    return BatonError(Reason.ENGINE_FAILED, StatusName.UNAVAILABLE, "lost", metadata={"transport": "UNAVAILABLE"})


def no_tls() -> BatonError:
    return HandshakeFailed(
        Reason.ENGINE_FAILED, StatusName.UNAVAILABLE, "no TLS", metadata={"transport": "UNAVAILABLE"}
    )


def chunk(first: int, *ids: int, sample: int = 0) -> Chunk:
    return Chunk(first, "x" * len(ids), ids, len(ids), sample_index=sample)


def state_of(
    *events: Event,
    addresses: int = 1,
    samples: int = 1,
    wants_ids: bool = False,
    is_resumable: bool = True,
    rounds: int = 4,
) -> Continuity:
    state = Continuity(
        address_count=addresses,
        address_index=0,
        sample_count=samples,
        is_resumable=is_resumable,
        wants_token_ids=wants_ids,
        rng=random.Random(1),
        policy=ResumePolicy(max_round_count=rounds, first_delay_s=0.1, max_delay_s=0.3),
    )
    for event in events:
        state.take(event)
    return state


def tries(state: Continuity, error: BatonError) -> tuple[list[NextTry], BatonError]:
    """Every try of calls that all fail like this, and what the caller sees then."""
    made = []
    while True:
        try:
            made.append(state.after(error, remaining_s=TIME))
        except BatonError as given:
            return made, given


def test_the_address_of_the_cut_is_asked_first_then_the_others_then_all_again_later_and_later() -> None:
    made, given = tries(state_of(STARTED, chunk(0, 7), addresses=3, rounds=3), lost())
    assert [each.address_index for each in made] == [0, 1, 2] * 3
    delays = [each.delay_s for each in made]
    assert [delay > 0 for delay in delays] == [False, False, False, True, False, False, True, False, False]
    assert 0.05 <= delays[3] <= 0.1 < delays[6] <= 0.2
    assert isinstance(given, Interrupted)
    assert (given.metadata["emitted_token_count"], given.metadata["resume_try_count"]) == ("1", "9")


@pytest.mark.parametrize("is_resumable", [True, False])
def test_a_status_lost_after_the_end_is_not_missed(is_resumable: bool) -> None:
    whole = state_of(STARTED, chunk(0, 7, 8), FINISHED, is_resumable=is_resumable)
    assert whole.is_over_despite(lost())
    assert not whole.is_over_despite(internal("a bug after the end"))
    assert not state_of(STARTED, chunk(0, 7, 8), is_resumable=is_resumable).is_over_despite(lost())


def test_delays_grow_to_their_bound_and_are_drawn() -> None:
    made, _ = tries(state_of(STARTED, chunk(0, 7), rounds=9), lost())
    delays = [each.delay_s for each in made]
    assert delays[0] == 0.0
    assert all(0.15 <= delay <= 0.3 for delay in delays[4:])
    assert len(set(delays)) == len(delays)


def test_one_that_drains_is_asked_last() -> None:
    made, _ = tries(state_of(STARTED, chunk(0, 7), addresses=2, rounds=1), draining())
    assert [each.address_index for each in made] == [1, 0]


def test_a_reader_too_slow_for_its_window_goes_on_from_the_tokens_it_kept() -> None:
    state = state_of(STARTED, chunk(0, 7), rounds=2)
    assert state.after(resume_too_late(1, 40), remaining_s=TIME).delay_s == 0.0
    state.take(STARTED)
    state.take(chunk(1, 8))
    assert (state.resume_count, state.token_ids) == (1, ((7, 8),))


def test_an_attachment_refused_as_too_late_was_refused_with_the_continuation_and_is_the_end() -> None:
    state = state_of(STARTED, chunk(0, 7))
    state.after(lost(), remaining_s=TIME)
    with pytest.raises(BatonError) as caught:
        state.after(resume_too_late(1, 40), remaining_s=TIME)
    assert isinstance(caught.value, Interrupted)


def test_a_token_makes_the_tries_count_anew_and_a_mere_attachment_does_not() -> None:
    state = state_of(STARTED, chunk(0, 7), rounds=2)
    assert state.after(lost(), remaining_s=TIME).delay_s == 0.0
    state.take(STARTED)
    assert state.after(lost(), remaining_s=TIME).delay_s > 0.0
    state.take(STARTED)
    state.take(chunk(1, 8))
    assert state.after(lost(), remaining_s=TIME).delay_s == 0.0
    assert state.resume_count == 2


def test_what_was_received_is_kept_for_whoever_goes_on_and_the_caller_gets_what_it_asked_for() -> None:
    state = state_of(STARTED, chunk(0, 7, 8))
    assert state.take(chunk(2, 9)) == Chunk(2, "x", (), 1)
    assert (state.next_token_indices, state.token_ids) == ((3,), ((7, 8, 9),))
    assert state_of(STARTED, wants_ids=True).take(chunk(0, 7)) == chunk(0, 7)


def test_of_several_samples_each_goes_on_from_its_own_token() -> None:
    state = state_of(STARTED, chunk(0, 7, 8, sample=1), chunk(0, 5, sample=2), samples=3)
    assert (state.next_token_indices, state.token_ids) == ((0, 2, 1), ((), (7, 8), (5,)))
    state.after(lost(), remaining_s=TIME)
    state.take(STARTED)
    state.take(chunk(2, 9, sample=1))
    with pytest.raises(BatonError, match="token 1 was expected and 0 came"):
        state.take(chunk(0, 5, sample=2))


def test_text_held_back_to_the_end_counts_as_one_and_is_not_taken_twice() -> None:
    state = state_of(STARTED, chunk(0, 7), Chunk(1, "rest", (), 0))
    assert (state.next_token_indices, state.token_ids) == ((2,), ((7,),))
    state.after(lost(), remaining_s=TIME)
    state.take(STARTED)
    with pytest.raises(BatonError, match="token 2 was expected and 1 came"):
        state.take(Chunk(1, "rest", (), 0))
    state.take(FINISHED)


def test_a_later_attachment_is_not_shown_but_counted_and_its_token_replaces_the_old_one() -> None:
    state = state_of(STARTED, chunk(0, 7))
    state.after(lost(), remaining_s=TIME)
    assert state.take(Started("gen-2", "tiny", 3, "token-2", 30.0)) is None
    assert state.resume_token == "token-2"
    finished = state.take(FINISHED)
    assert isinstance(finished, Finished)
    assert finished.resume_count == 1
    assert not state.may_still_run
    state.check_end()


@pytest.mark.parametrize(
    "error", [lost(), draining(), attempts_exhausted(3, 2, "decode", "lost"), no_worker("decode", 0)]
)
def test_what_may_go_on_elsewhere_is_gone_on_with(error: BatonError) -> None:
    assert state_of(STARTED, chunk(0, 7)).after(error, remaining_s=TIME) == NextTry(0.0, 0)


def test_a_wait_longer_than_the_time_left_is_not_begun_and_what_cut_the_stream_is_told() -> None:
    state = state_of(STARTED, chunk(0, 7))
    state.after(lost(), remaining_s=20.0)
    with pytest.raises(BatonError) as given:
        state.after(queue_full(9, 9, 30.0), remaining_s=20.0)
    assert given.value.metadata["transport"] == lost().metadata["transport"]
    assert given.value.metadata["emitted_token_count"] == "1"


def test_who_is_told_before_the_beginning_to_wait_longer_than_there_is_time_hears_just_that() -> None:
    with pytest.raises(BatonError) as given:
        state_of().after(queue_full(9, 9, 30.0), remaining_s=20.0)
    assert given.value.reason is Reason.QUEUE_FULL


@pytest.mark.parametrize("where", ["INTERNAL", "UNKNOWN"])
def test_a_connection_torn_in_the_middle_of_a_message_is_a_cut(where: str) -> None:
    torn = BatonError(Reason.INTERNAL, StatusName.INTERNAL, "torn", metadata={"transport": where})
    assert state_of(STARTED, chunk(0, 7)).after(torn, remaining_s=TIME) == NextTry(0.0, 0)


def test_a_failed_handshake_does_not_keep_a_cut_stream_from_the_other_addresses() -> None:
    state = state_of(STARTED, chunk(0, 7), addresses=2)
    assert [state.after(error, remaining_s=TIME).address_index for error in (lost(), lost(), no_tls())] == [0, 1, 0]


def test_a_failed_handshake_before_the_beginning_is_tried_at_each_other_address_and_not_again() -> None:
    made, given = tries(state_of(addresses=3), no_tls())
    assert [each.address_index for each in made] == [1, 2]
    assert isinstance(given, HandshakeFailed)


def test_a_bug_is_no_cut() -> None:
    bug = BatonError(Reason.INTERNAL, StatusName.INTERNAL, "a bug")
    with pytest.raises(BatonError) as given:
        state_of(STARTED, chunk(0, 7)).after(bug, remaining_s=TIME)
    assert given.value is bug


def test_without_a_resume_token_a_cut_ends_the_stream() -> None:
    for state in (state_of(STARTED, chunk(0, 7), is_resumable=False), state_of(Started("g", "m", 3), chunk(0, 7))):
        with pytest.raises(Interrupted):
            state.after(lost(), remaining_s=TIME)


def test_a_resume_that_is_denied_ends_with_what_cut_the_stream() -> None:
    state = state_of(STARTED, chunk(0, 7))
    state.after(lost(), remaining_s=TIME)
    with pytest.raises(Interrupted) as given:
        state.after(resume_denied(), remaining_s=TIME)
    assert isinstance(given.value.__cause__, ResumeFailed)


def test_whom_another_reader_replaced_is_told_so() -> None:
    with pytest.raises(ResumeFailed):
        state_of(STARTED, chunk(0, 7)).after(attached_elsewhere(), remaining_s=TIME)


def test_a_full_router_is_asked_again_when_it_said() -> None:
    state = state_of(STARTED, chunk(0, 7))
    state.after(lost(), remaining_s=TIME)
    assert state.after(queue_full(1, 1, 5.0), remaining_s=TIME).delay_s == 5.0


def test_a_router_that_is_full_after_it_said_started_is_asked_again_and_never_called_retryable_at_the_end() -> None:
    state = state_of(STARTED, chunk(0, 7), rounds=2)
    state.after(lost(), remaining_s=TIME)
    state.take(STARTED)
    assert state.after(queue_full(1, 1, 5.0), remaining_s=TIME).delay_s == 5.0
    state.take(STARTED)
    with pytest.raises(Interrupted) as given:
        state.after(queue_full(1, 1, 5.0), remaining_s=TIME)
    assert (given.value.reason, given.value.is_retryable) == (Reason.QUEUE_FULL, False)
    assert (given.value.metadata["emitted_token_count"], given.value.retry_after_s) == ("1", None)


def test_what_would_be_retryable_is_not_once_tokens_came_and_is_before() -> None:
    for error in (queue_full(1, 1, 5.0), lost()):
        assert state_of(STARTED, is_resumable=False).broken(error) is error
        assert isinstance(state_of(STARTED, chunk(0, 7), is_resumable=False).broken(error), Interrupted)


def test_what_another_reader_took_over_is_not_ours_to_end() -> None:
    state = state_of(STARTED, chunk(0, 7))
    assert state.may_still_run
    with pytest.raises(ResumeFailed):
        state.after(attached_elsewhere(), remaining_s=TIME)
    assert not state.may_still_run


def test_a_generation_runs_where_it_was_last_attached_whatever_is_tried_since() -> None:
    state = state_of(STARTED, chunk(0, 7), addresses=2)
    state.after(lost(), remaining_s=TIME)
    state.after(lost(), remaining_s=TIME)
    assert (state.address_index, state.home_index) == (1, 0)
    state.take(STARTED)
    assert state.home_index == 1


def test_there_is_no_try_after_the_callers_time() -> None:
    state = state_of(STARTED, chunk(0, 7))
    state.after(lost(), remaining_s=TIME)
    with pytest.raises(Interrupted):
        state.after(lost(), remaining_s=0.01)


def test_a_call_refused_before_it_began_goes_to_each_other_address_once() -> None:
    made, given = tries(state_of(addresses=3, is_resumable=False), no_worker("decode", 0))
    assert [each.address_index for each in made] == [1, 2]
    assert isinstance(given, Unavailable)
    assert tries(state_of(is_resumable=False), engine_failed("d0", "lost"))[0] == []


def test_a_resumable_call_lost_before_it_began_is_begun_again_and_a_refused_one_is_not() -> None:
    made, given = tries(state_of(rounds=3), lost())
    assert len(made) == 3
    assert isinstance(given, Unavailable)
    assert tries(state_of(rounds=3), no_worker("decode", 0))[0] == []


def test_nothing_but_unavailable_is_sent_elsewhere() -> None:
    assert tries(state_of(addresses=3), queue_full(1, 1, 1.0))[0] == []

"""What waits for a slow reader is merged, in order, and leaves in bounded parts."""

from __future__ import annotations

from baton.errors import engine_failed
from baton.leg import DecodeDone, KvAdopted, Stepped
from baton.request import LegFinish, TokenLogprobs
from decode_worker.outlet import MAX_BYTES, MAX_LEG_TOKEN_COUNT, Outlet

ADOPTED = KvAdopted(1, 2, 3, 4, 5, 6, 7, 8, is_with_tokens=True)
LOGPROBS = TokenLogprobs(-0.5, 1, tuple((token_id, -1.0) for token_id in range(20)))


def test_what_one_step_brought_to_all_legs_leaves_together_in_the_order_it_came() -> None:
    outlet = Outlet()
    for leg in (3, 1, 2):
        outlet.add(leg, Stepped((leg * 10,)))
    assert [(each.leg_number, each.token_ids) for each in outlet.take()] == [(3, [30]), (1, [10]), (2, [20])]
    assert len(outlet) == 0
    assert outlet.take() == []


def test_what_waits_is_merged_leg_by_leg_and_keeps_its_order() -> None:
    outlet = Outlet()
    outlet.add(1, ADOPTED)
    outlet.add(1, Stepped((5,), (LOGPROBS,)))
    outlet.add(2, Stepped((9,)))
    outlet.add(1, Stepped((6, 7), (LOGPROBS, LOGPROBS)))
    outlet.add(1, DecodeDone(LegFinish.STOP))
    first, second = outlet.take()
    assert (first.adopted, first.token_ids, len(first.logprobs)) == (ADOPTED, [5, 6, 7], 3)
    assert (first.finish, first.is_tokens_only) == (LegFinish.STOP, False)
    assert (second.token_ids, second.is_tokens_only) == ([9], True)


def test_a_leg_that_fails_says_first_what_it_had() -> None:
    outlet = Outlet()
    error = engine_failed("d", "died")
    outlet.add(1, ADOPTED)
    outlet.fail(1, error)
    (waiting,) = outlet.take()
    assert (waiting.adopted, waiting.failure) == (ADOPTED, error)


def test_nobody_hears_of_a_leg_that_was_called_off() -> None:
    outlet = Outlet()
    outlet.add(1, Stepped((5,)))
    outlet.forget(1)
    outlet.forget(2)
    assert outlet.take() == []


def test_a_long_backlog_of_one_leg_leaves_in_parts_with_its_end_in_the_last() -> None:
    outlet = Outlet()
    count = 2 * MAX_LEG_TOKEN_COUNT + 3
    outlet.add(1, ADOPTED)
    outlet.add(1, Stepped(tuple(range(count)), (LOGPROBS,) * count))
    outlet.add(1, DecodeDone(LegFinish.LENGTH))
    parts = [part for _ in range(3) for part in outlet.take()]
    assert [len(part.token_ids) for part in parts] == [MAX_LEG_TOKEN_COUNT, MAX_LEG_TOKEN_COUNT, 3]
    assert [len(part.logprobs) for part in parts] == [len(part.token_ids) for part in parts]
    assert [token_id for part in parts for token_id in part.token_ids] == list(range(count))
    assert [part.adopted is not None for part in parts] == [True, False, False]
    assert [part.finish for part in parts] == [None, None, LegFinish.LENGTH]
    assert len(outlet) == 0


def test_what_leaves_at_once_is_bounded_and_the_rest_is_next() -> None:
    outlet = Outlet()
    legs = 2000
    for leg in range(legs):
        outlet.add(leg, Stepped(tuple(range(100)), (LOGPROBS,) * 100))
    taken: list[int] = []
    while len(outlet):
        part = outlet.take()
        assert sum(each.byte_count for each in part[:-1]) < MAX_BYTES
        taken += [each.leg_number for each in part]
    assert taken == list(range(legs))

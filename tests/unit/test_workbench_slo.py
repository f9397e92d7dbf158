"""What a good answer is, and how many of all requests were one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workbench_records import failed, record

from bench.results.records import Outcome, RequestRecord
from bench.results.slo import CRITERIA, PRESETS, Slo, broken, goodput, meets, tail_gap_s

SLO = Slo("hand", ttft_s=0.5, tpot_s=0.05, tail_itl_s=0.2)


def test_the_presets_are_those_of_the_issue() -> None:
    assert {name: (slo.ttft_s, slo.tpot_s, slo.tail_itl_s) for name, slo in PRESETS.items()} == {
        "chatbot": (0.5, 0.05, 0.2),
        "code-completion": (0.2, 0.03, 0.12),
        "voice": (0.1, 0.02, 0.08),
        "batch": (5.0, 0.1, 1.0),
        "rag": (1.0, 0.08, 0.32),
    }


@pytest.mark.parametrize(
    ("answer", "failed_by"),
    [
        (record(ttft_s=0.5, gaps_s=(0.05, 0.05)), ()),
        (record(ttft_s=0.500001, gaps_s=(0.05,)), ("ttft",)),
        (record(gaps_s=(0.05, 0.051)), ("tpot",)),
        (record(gaps_s=(0.201, *[0.01] * 10)), ("tail_itl",)),
        (record(gaps_s=(0.2, *[0.01] * 10)), ()),
        (record(ttft_s=9.0, gaps_s=(1.0, 1.0)), ("ttft", "tpot", "tail_itl")),
        (record(ttft_s=0.4, gaps_s=()), ()),
        (failed(), ("outcome",)),
        (record(outcome=Outcome.CANCELLED), ("outcome",)),
        (record(outcome=Outcome.INCOMPLETE), ("outcome",)),
        (failed(outcome=Outcome.OK), ("outcome",)),
    ],
)
def test_every_bound_must_hold(answer: RequestRecord, failed_by: tuple[str, ...]) -> None:
    assert broken(answer, SLO) == failed_by
    assert meets(answer, SLO) == (not failed_by)


def test_a_mean_that_hides_a_stall_does_not_pass() -> None:
    # 150 tokens at 20 ms with one pause of 2 s: TPOT 33 ms, within 50; its p99 gap would pass as well.
    stalled = record(gaps_s=(*[0.02] * 100, 2.0, *[0.02] * 48))
    assert stalled.tpot_s is not None
    assert stalled.tpot_s < 0.05
    assert broken(stalled, SLO) == ("tail_itl",)
    by_p99 = Slo("p99", ttft_s=0.5, tpot_s=0.05, tail_itl_s=0.2, tail_percent=99.0)
    assert tail_gap_s(stalled, 99.0) == pytest.approx(0.02)
    assert meets(stalled, by_p99)


def test_time_to_first_token_counts_from_the_intended_time() -> None:
    # Sent 450 ms late and answered in 100: a closed loop would call it good.
    late = record(at_s=1.0, ttft_s=0.55, sent_at_s=1.45)
    assert late.service_ttft_s == pytest.approx(0.1)
    assert broken(late, SLO) == ("ttft",)


def test_gaps_are_between_messages_as_a_reader_sees_them() -> None:
    # Four tokens a message every 160 ms: 40 ms a token, and a pause of 160 ms.
    coalesced = record(gaps_s=(0.16,) * 5, message_token_counts=[4] * 6)
    assert tail_gap_s(coalesced) == pytest.approx(0.16)
    assert meets(coalesced, SLO)


def test_all_outcomes_are_in_the_denominator() -> None:
    records = [
        *(record(index, gaps_s=(0.02,) * 9) for index in range(3)),
        record(3, ttft_s=0.6, gaps_s=(0.3,)),
        record(4, ttft_s=0.6),
        *(failed(5 + place, outcome=outcome) for place, outcome in enumerate(Outcome) if outcome is not Outcome.OK),
    ]
    found = goodput(records, SLO, window_s=2.0)
    assert (found.good_count, found.total_count, found.share) == (3, 10, 0.3)
    assert found.good_requests_per_s == 1.5
    assert found.good_tokens_per_s == 15.0
    assert dict(found.failed_by) == {"outcome": 5, "ttft": 2, "tpot": 1, "tail_itl": 1}
    assert dict(found.failed_only_by) == {"outcome": 5, "ttft": 1, "tpot": 0, "tail_itl": 0}
    assert found.failed_most_by == "outcome"
    assert found.interval.low is not None
    assert found.interval.low < 0.3


def test_of_no_requests_no_share_can_be_said() -> None:
    found = goodput([], SLO, window_s=0.0)
    assert (found.share, found.good_requests_per_s, found.failed_most_by) == (None, None, None)
    assert found.interval.low is None


def test_a_scale_multiplies_every_bound_and_is_kept() -> None:
    scaled = SLO.scaled(2.0).scaled(3.0)
    assert (scaled.ttft_s, scaled.tpot_s, scaled.tail_itl_s, scaled.scale) == pytest.approx((3.0, 0.3, 1.2, 6.0))
    assert scaled.name == SLO.name
    with pytest.raises(ValueError, match="above 0"):
        SLO.scaled(0.0)


answers = st.lists(
    st.builds(
        record,
        ttft_s=st.floats(0.0, 2.0),
        gaps_s=st.lists(st.floats(0.0, 1.0), max_size=6).map(tuple),
        outcome=st.sampled_from([Outcome.OK, Outcome.OK, Outcome.ERROR]),
    ),
    min_size=1,
    max_size=15,
)


@given(answers, st.floats(0.1, 10.0), st.floats(1.0, 10.0))
def test_goodput_rises_with_the_scale(records: list[RequestRecord], scale: float, more: float) -> None:
    strict, lax = SLO.scaled(scale), SLO.scaled(scale * more)
    assert goodput(records, strict, 1.0).good_count <= goodput(records, lax, 1.0).good_count


@given(answers, st.randoms(use_true_random=False))
def test_goodput_knows_no_order_and_accounts_for_every_request(
    records: list[RequestRecord], rng: random.Random
) -> None:
    found = goodput(records, SLO, 1.0)
    shuffled = records.copy()
    rng.shuffle(shuffled)
    assert goodput(shuffled, SLO, 1.0) == found
    bad_count = found.total_count - found.good_count
    assert max(found.failed_by.values()) <= bad_count <= sum(found.failed_by.values())
    assert set(found.failed_by) == set(CRITERIA)

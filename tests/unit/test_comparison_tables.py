"""The comparison's tables and goals, from records whose figures are worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.comparison import tables
from bench.comparison.blocks import block_order, turn_order
from bench.comparison.cells import FULL_CELLS, Cell, CellPlans, beyond, chain
from bench.comparison.goals import goal_lines
from bench.comparison.page import cell_runs, render, sweeps
from bench.comparison.tables import CellRun
from bench.results.records import Outcome, RequestRecord
from bench.results.slo import PRESETS
from bench.results.store import request_as_json
from bench.traffic.plan import PlannedRequest
from bench.traffic.prompts import PromptMaker

TITLES = {"baton": "Baton", "vllm-2core": "one server", "vllm-2core-chunk-128": "small chunks", "naive": "naive"}


def record(
    index: int = 0,
    *,
    ttft_s: float = 0.1,
    gaps_s: tuple[float, ...] = (0.02, 0.02, 0.02),
    at_s: float = 0.0,
    group: str = "all",
    prompt_token_count: int = 64,
    outcome: Outcome = Outcome.OK,
) -> RequestRecord:
    times = [at_s + ttft_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    return RequestRecord(
        index=index,
        group=group,
        session_id="",
        prompt_token_count=prompt_token_count,
        output_token_limit=len(times),
        intended_at_s=at_s,
        sent_at_s=at_s,
        message_at_s=times,
        message_token_counts=[1] * len(times),
        ended_at_s=times[-1],
        outcome=outcome,
    )


def run(system: str, *records: RequestRecord, group: str = "chat@1", block: int = 0, **more: Any) -> CellRun:
    return CellRun(
        **{
            "system": system,
            "block": block,
            "pass_number": block,
            "cell": group,
            "group": group,
            "records": records,
            "span_s": 10.0,
            "cpu_s": 5.0,
            **more,
        }
    )


def streams(system: str, held_up_s: float, long_ttft_s: float, block: int = 0) -> CellRun:
    """A stream whose gap before the arrival at 1 s is 0.9 s, and after it ``held_up_s``."""
    stream = record(0, ttft_s=0.05, gaps_s=(0.9, held_up_s, held_up_s), group="stream")
    arrival = record(1, ttft_s=long_ttft_s, gaps_s=(), at_s=1.0, group="arrival", prompt_token_count=2000)
    return run(system, stream, arrival, group="streams", block=block)


def test_only_gaps_that_end_after_the_first_long_prompt_was_due_count_as_held_up() -> None:
    (unit,) = tables.held_up_gaps(streams("baton", 0.25, 1.0))
    assert unit == pytest.approx([0.25, 0.25])


def test_a_system_is_compared_over_the_passes_and_loads_that_both_were_asked() -> None:
    runs = [run("baton", record(ttft_s=0.1)), run("baton", record(ttft_s=0.9), block=1)]
    runs += [run("baton", record(ttft_s=5.0), cell="chat@9"), run("vllm-2core", record(ttft_s=0.2))]
    assert [(base.block, peer.system) for base, peer in tables.shared_runs(runs, "vllm-2core")] == [(0, "vllm-2core")]
    found = tables.ratio(runs, "vllm-2core", tables.TTFT_P50, seed=1)
    assert found is not None
    assert found.value == pytest.approx(2.0)
    assert found.low is None


def test_who_gives_requests_up_does_not_look_fast() -> None:
    given_up = record(1, ttft_s=0.0, gaps_s=(), outcome=Outcome.TIMEOUT)
    given_up.message_at_s, given_up.message_token_counts, given_up.ended_at_s = [], [], 30.0
    asked = run("baton", record(0, ttft_s=0.1, gaps_s=()), given_up)
    assert tables.TTFT_P99.values(asked) == [[pytest.approx(0.1)], [pytest.approx(30.0)]]
    assert "| TTFT p50 | ≥ 15,050 ms |" in tables.table([asked], TITLES, [tables.TTFT_P50], 1)


def test_a_turn_that_was_never_sent_has_waited_for_nobody() -> None:
    unsent = record(1, gaps_s=(), outcome=Outcome.ERROR)
    unsent.message_at_s, unsent.message_token_counts = [], []
    unsent.error = "not sent: the turn before failed"
    assert tables.TTFT_P50.values(run("baton", unsent)) == []


def test_a_ratio_is_the_peer_over_baton() -> None:
    runs = [
        run("baton", *(record(index, ttft_s=0.1) for index in range(5))),
        run("vllm-2core", *(record(index, ttft_s=0.3) for index in range(5))),
    ]
    found = tables.ratio(runs, "vllm-2core", tables.TTFT_P50, seed=1)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_an_answer_that_was_cut_off_counts_its_open_gap_and_the_time_until_then() -> None:
    cut = record(gaps_s=(0.5,), outcome=Outcome.TIMEOUT)
    cut.ended_at_s = 9.0
    assert tables.ITL_P99.values(run("baton", cut)) == [[pytest.approx(0.5), pytest.approx(8.4)]]
    assert tables.E2E_P50.values(run("baton", cut)) == [[pytest.approx(9.0)]]


def test_goodput_has_every_request_in_its_denominator() -> None:
    chat = PRESETS["chatbot"]
    asked = run("baton", record(0), record(1, ttft_s=2.0), record(2, outcome=Outcome.REFUSED), record(3))
    assert tables.good_share([asked], "baton", chat) == pytest.approx(0.5)
    assert tables.good_rate([asked], "baton", chat) == pytest.approx(0.2)
    assert tables.good_share([asked], "baton", chat.scaled(10.0)) == pytest.approx(0.75)


def test_goals_are_met_missed_or_not_asked() -> None:
    runs = [streams("baton", 0.05, 4.0, block) for block in range(3)]
    runs += [streams("vllm-2core", 2.0, 3.0, block) for block in range(3)]
    runs += [streams("vllm-2core-chunk-128", 0.15, 3.0, block) for block in range(3)]
    by_name = {line.what: line for line in goal_lines(runs, TITLES, 1)}
    assert by_name["Baton 1P+1D: gap p99 of the streams"].verdict == "met"
    assert by_name["gap p99 of the streams: one server / Baton"].verdict == "met"
    assert by_name["gap p99 of the streams: small chunks / Baton"].verdict == "missed"
    assert by_name["idle ITL p50: stock-router / Baton"].verdict == "no valid load that both were asked"
    price = by_name["TTFT of long prompts beside streams: Baton / one server"]
    assert price.measured == "4.00 s / 3.00 s = 1.33x"
    assert price.verdict == "within it"


def test_a_load_with_a_remark_decides_no_goal() -> None:
    runs = [streams("baton", 0.05, 4.0), dataclasses.replace(streams("vllm-2core", 2.0, 3.0), remarks=("late",))]
    by_name = {line.what: line for line in goal_lines(runs, TITLES, 1)}
    assert by_name["gap p99 of the streams: one server / Baton"].verdict == "no valid load that both were asked"


def test_no_goal_is_met_by_the_requests_that_were_answered_alone() -> None:
    short = streams("baton", 0.05, 4.0)
    short.records[1].outcome = Outcome.TIMEOUT
    by_name = {line.what: line for line in goal_lines([short, streams("vllm-2core", 2.0, 3.0)], TITLES, 1)}
    line = by_name["gap p99 of the streams: one server / Baton"]
    assert line.verdict == "withheld: Baton left 1 unanswered"


def test_a_goal_met_without_an_interval_says_so() -> None:
    runs = [streams("baton", 0.05, 4.0), streams("vllm-2core", 2.0, 3.0)]
    by_name = {line.what: line for line in goal_lines(runs, TITLES, 1)}
    assert by_name["gap p99 of the streams: one server / Baton"].verdict == "met by too few for an interval"


def test_ten_times_the_naive_server_is_a_rate_of_answers_and_of_good_ones() -> None:
    quick = [record(index, gaps_s=(0.02,)) for index in range(20)]
    slow = [record(index, ttft_s=3.0, gaps_s=(0.02,)) for index in range(2)]
    runs = [run("baton", *quick, group="crowd"), run("naive", *slow, group="crowd")]
    answers, good = (line for line in goal_lines(runs, TITLES, 1) if "eight callers" in line.what)
    assert answers.measured == "2.00 / 0.20 = 10.0x"
    assert answers.verdict == "met"
    assert good.measured == "2.00 against none"


def test_a_rate_beyond_a_system_ends_its_sweep_of_that_workload_alone() -> None:
    tried = {"chat": (1.0, 0.3), "code": (1.0, 0.8)}
    assert beyond(Cell(workload="chat", rate_per_s=3.0), tried)
    assert not beyond(Cell(workload="code", rate_per_s=3.0), tried)
    assert not beyond(Cell(workload="agent", rate_per_s=3.0), tried)
    assert not beyond(Cell(workload="streams"), tried)


def test_rates_of_a_workload_rise_in_the_order_in_which_they_are_asked() -> None:
    rates: dict[str, list[float]] = {}
    for cell in FULL_CELLS:
        if cell.rate_per_s is not None:
            rates.setdefault(cell.workload, []).append(cell.rate_per_s)
    assert set(rates) == {"chat", "agent", "code", "bursts"}
    assert all(each == sorted(each) and len(each) > 1 for each in rates.values())
    assert len({cell.name for cell in FULL_CELLS}) == len(FULL_CELLS)


def test_a_chain_is_due_after_the_end_of_the_one_before() -> None:
    asked = [
        PlannedRequest(index=index, at_s=9.0, prompt_token_ids=(1,), output_token_count=1) for index in (4, 5, 6)
    ]
    assert [(each.after, each.at_s) for each in chain(asked, 0.2, first_at_s=1.0)] == [
        (None, 1.0),
        (4, 0.2),
        (5, 0.2),
    ]


def test_systems_take_turns_in_mirrored_order() -> None:
    assert block_order("abc", 3) == list("abccbaabc")


def test_who_has_one_turn_has_it_between_the_passes_with_the_requests_of_the_first() -> None:
    order = turn_order("ab", "x", 2)
    assert order == [(0, "a"), (0, "b"), (0, "x"), (1, "b"), (1, "a")]


def test_the_page_is_made_of_the_raw_documents_alone() -> None:
    documents = raw_documents()
    (found,) = [each for each in cell_runs(documents) if each.system == "baton"]
    assert [each.ttft_s for each in found.records] == pytest.approx([0.1, 0.1])
    page = render(documents)
    assert "| requests, answered | 2, 100% | 2, 50% |" in page
    assert "Not asked, since a lower rate was beyond it already: one server." in page
    assert "did not start: ChildError" in page


def test_open_loads_become_runs_of_a_sweep_by_system_and_rate() -> None:
    documents = raw_documents()
    documents[0]["cells"] = [{"name": "chat@1", "workload": "chat", "rate_per_s": 1.0, "duration_s": 2.0}]
    (workload,) = sweeps(documents).items()
    assert workload[0] == "chat"
    assert [each.facts["label"] for each in workload[1]] == ["Baton", "one server"]
    assert [each.facts["plan"]["rate_per_s"] for each in workload[1]] == [1.0, 1.0]
    assert [len(each.records) for each in workload[1]] == [2, 2]


def test_a_raw_file_that_was_cut_off_is_refused() -> None:
    documents = raw_documents()
    documents.remove(next(document for document in documents if document["document"] == "request"))
    with pytest.raises(ValueError, match="1 of 2 requests"):
        cell_runs(documents)


@pytest.mark.parametrize("cell", FULL_CELLS, ids=lambda cell: cell.name)
def test_every_load_can_be_planned_in_every_pass_with_about_as_many_requests_as_its_rate_says(cell: Cell) -> None:
    plans = CellPlans(PromptMaker.without_tokenizer(5000), seed=4, trace=None)
    for round_number in range(3):
        plan = plans.plan(cell, round_number)
        assert plan == plans.plan(cell, round_number)
        assert len({request.prompt_token_ids for request in plan.requests}) == len(plan.requests)
        if cell.rate_per_s is not None:
            arrivals = sum(request.after is None and request.group != "arrival" for request in plan.requests)
            expected = cell.rate_per_s * cell.duration_s
            assert abs(arrivals - expected) <= max(1.0, 0.2 * expected)


def test_passes_and_loads_have_prompts_of_their_own() -> None:
    plans = CellPlans(PromptMaker.without_tokenizer(5000), seed=4, trace=None)
    prompts = [
        request.prompt_token_ids[:64]
        for cell in (Cell(workload="streams"), Cell(workload="streams", repetition=1), Cell(workload="crowd"))
        for round_number in range(2)
        for request in plans.plan(cell, round_number).requests
    ]
    assert len(set(prompts)) == len(prompts)


def test_a_code_trace_is_replayed_in_sequence_from_another_place_in_each_pass(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:{i // 60:02d}:{i % 60:02d}.0000000,{1000 + i},{20 + i}" for i in range(300)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    plans = CellPlans(PromptMaker.without_tokenizer(5000), seed=4, trace=trace)
    cell = Cell(workload="code", rate_per_s=1.0, duration_s=10.0)
    first, second = (plans.plan(cell, round_number) for round_number in range(2))
    assert len(first.requests) == len(second.requests) == 10
    lengths = [[len(request.prompt_token_ids) for request in plan.requests] for plan in (first, second)]
    assert lengths[0] == sorted(lengths[0])
    assert lengths[0] != lengths[1]
    assert plans.trace_facts["row_count"] == 300


def test_a_run_that_was_cut_off_says_what_it_lacks() -> None:
    documents = raw_documents()
    documents[0]["order"] = ["baton", "vllm-2core", "baton", "vllm-2core"]
    documents = [each for each in documents if each["document"] != "block" or each["block"] != 1]
    page = render(documents)
    assert "Turn 2, one server, was cut off: only its loads above were run." in page
    assert "Turns that were planned and not run: one server." in page
    assert "was cut off:" not in render(raw_documents()).partition("## How it was run")[2]


def test_a_raw_file_without_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no record of a run"):
        render([])


def raw_documents() -> list[dict[str, Any]]:
    systems = {name: {"title": TITLES[name]} for name in ("baton", "vllm-2core")}
    machine = {"core_count": 2, "cpu_model": "a CPU", "memory_gib": 8, "kernel": "6", "commit": "abc", "at": "today"}
    engine = {"dtype": "bfloat16", "block_token_count": 16, "kv_cache_bytes": 2**29, "max_context_token_count": 8192}
    documents: list[dict[str, Any]] = [
        {
            "document": "run",
            "machine": {**machine, "packages": {"vllm": "1"}, "python": "3.11"},
            "seed": 1,
            "is_quick": False,
            "order": ["baton", "vllm-2core"],
            "systems": systems,
            "model": "a model",
            "engines": {"decode": {**engine, "max_running_count": 16}},
            "trace": {},
        }
    ]
    for block, system in enumerate(systems):
        names = {"system": system, "block": block, "pass": 0, "cell": "chat@1"}
        told = {"plan": {}, "cpu_s": 1.0, "span_s": 2.0, "remarks": [], "calm_wait_s": 0.1, "request_count": 2}
        told |= {"machine": {"others_share": 0.01}, "lag_p99_ms": 0.4}
        documents.append({"document": "cell", **names, "group_name": "chat@1", **told})
        outcomes = (Outcome.OK, Outcome.OK if system == "baton" else Outcome.TIMEOUT)
        for index, outcome in enumerate(outcomes):
            row = request_as_json(record(index, outcome=outcome))
            documents.append(
                {"document": "request", **names, **{k: v for k, v in row.items() if v not in (None, "")}}
            )
        ended = {"facts": {"start_s": 9}, "wall_s": 30, "busy_share_before": 0.0}
        documents.append({"document": "block", "block": block, "pass": 0, "system": system, **ended})
    documents.append(
        {
            "document": "cell",
            "system": "vllm-2core",
            "block": 1,
            "pass": 0,
            "cell": "chat@3",
            "group_name": "chat@3",
            "skipped": "beyond",
        }
    )
    failed = {"error": "did not start: ChildError", "busy_share_before": 0.0}
    documents.append({"document": "block", "block": 2, "pass": 1, "system": "baton", **failed})
    return documents

"""Errors of a simulation by metric, when a goal is claimed, and which runs are held out."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench.commands.simulate import add_command
from bench.results.records import Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.results.store import read_run, write_run
from bench.simulation import accuracy
from bench.simulation.errors import errors_of, metrics_of, render_errors
from bench.simulation.held_out import CONFIGURATIONS, QUICK
from bench.simulation.observe import ReplayError, plan_of, reprompted
from bench.simulation.profile import Profile
from bench.traffic.prompts import PromptMaker
from engine.sim_pace import Machine, Row
from fleet.config import load_config

PROMPTS = PromptMaker.without_tokenizer(40_000, first_token_id=100)


def record(index: int, ttft_s: float, gap_s: float, count: int = 3) -> RequestRecord:
    start = float(index)
    at_s = [start + ttft_s + gap_s * token for token in range(count)]
    return RequestRecord(
        index=index,
        group="all",
        session_id="",
        prompt_token_count=10,
        output_token_limit=count,
        intended_at_s=start,
        sent_at_s=start,
        message_at_s=at_s,
        message_token_counts=[1] * count,
        ended_at_s=at_s[-1],
        outcome=Outcome.OK,
    )


def run(ttft_s: float, gap_s: float, **facts: Any) -> RunData:
    known = {"valid": True, "plan": {"duration_s": 30.0}, **facts}
    return RunData(facts=known, records=[record(index, ttft_s, gap_s) for index in range(30)])


def test_latencies_are_of_the_requests_compared_and_goodput_of_all() -> None:
    found = metrics_of([record(0, 0.1, 0.02), record(1, 0.3, 0.04), record(2, 0.1, 0.02)], 1.0, {0, 1})
    assert found["ttft_mean"] == pytest.approx(0.2)
    assert found["ttft_p99"] == pytest.approx(0.298)
    assert found["itl_mean"] == pytest.approx(0.03)
    assert found["e2e_mean"] == pytest.approx((0.14 + 0.38) / 2)
    assert found["goodput"] == 1.0


def test_errors_have_their_sign_and_the_worst_comes_first() -> None:
    pairs = [
        ("near", run(0.100, 0.010), run(0.101, 0.010)),
        ("far", run(0.200, 0.020), run(0.160, 0.021)),
    ]
    result = errors_of(pairs)
    assert [row["name"] for row in result["configurations"]] == ["far", "near"]
    ttft = result["metrics"]["ttft_mean"]
    assert ttft["mape"] == pytest.approx((0.01 + 0.20) / 2)
    assert ttft["bias"] == pytest.approx((0.01 - 0.20) / 2)
    assert ttft["worst"] == pytest.approx(-0.20)
    assert (ttft["within_goal_count"], ttft["count"]) == (1, 2)
    assert ttft["claim"] == "withheld: missed"
    assert result["metrics"]["itl_mean"]["worst"] == pytest.approx(0.05)


def test_a_goal_is_claimed_when_the_mean_of_absolute_errors_is_within_it() -> None:
    # Errors of opposite signs do not cancel: 6% too much and 6% too little are 6% off.
    opposite = errors_of([("up", run(1.0, 0.1), run(1.06, 0.1)), ("down", run(1.0, 0.1), run(0.94, 0.1))])
    assert opposite["metrics"]["ttft_mean"]["bias"] == pytest.approx(0.0, abs=1e-9)
    assert opposite["metrics"]["ttft_mean"]["claim"] == "withheld: missed"
    near = ("up", run(1.0, 0.1), run(1.04, 0.1))
    assert errors_of([near] * 12)["metrics"]["ttft_mean"]["claim"] == "met on the mean"


def test_a_claim_takes_twelve_configurations_that_can_all_be_compared() -> None:
    near = ("near", run(1.0, 0.1), run(1.0, 0.1))
    few = errors_of([near] * 11)["metrics"]["ttft_mean"]
    assert few["claim"] == "withheld: 11 configurations, 12 are needed"
    refused = run(1.0, 0.1)
    for each in refused.records:
        each.outcome = Outcome.REFUSED
    result = errors_of([*[near] * 12, ("refused", run(1.0, 0.1), refused)])
    assert result["metrics"]["ttft_mean"]["claim"] == "withheld: 1 valid runs do not have it"
    assert result["configurations"][0]["name"] == "refused", "the worst is what could not be compared"


def test_goodput_errors_are_differences_of_shares() -> None:
    measured, simulated = run(0.1, 0.01), run(0.1, 0.01)
    simulated.records[:3] = [record(index, 9.0, 0.01) for index in range(3)]
    row = errors_of([("slow starts", measured, simulated)])["configurations"][0]
    assert row["errors"]["goodput"] == pytest.approx(-3 / 30)


def test_an_invalid_run_is_shown_and_not_counted() -> None:
    bad = run(0.1, 0.01, valid=False, invalid_reasons=["too late"])
    result = errors_of([("bad", bad, run(0.2, 0.02))])
    assert result["metrics"]["ttft_mean"] == {"count": 0, "goal": 0.05, "claim": "withheld: no valid run has it"}
    assert "bad (invalid, not counted)" in render_errors(result)


def test_other_outcomes_than_measured_are_said() -> None:
    refused = run(0.1, 0.01)
    refused.records[0] = dataclasses.replace(refused.records[0], outcome=Outcome.REFUSED)
    page = render_errors(errors_of([("busy", refused, run(0.1, 0.01))]))
    assert "busy: measured 29 ok, 1 refused, simulated 30 ok" in page


def test_twelve_configurations_are_held_out_half_of_each_kind_of_cluster() -> None:
    assert len(CONFIGURATIONS) == len({each.name for each in CONFIGURATIONS}) == 12
    assert len({each.seed for each in CONFIGURATIONS}) == 12
    assert [sum(each.system == system for each in CONFIGURATIONS) for system in ("baton", "baton-aggregated")] == [
        6,
        6,
    ]
    assert {each.system for each in QUICK} == {"baton", "baton-aggregated"}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.name)
def test_the_plan_of_a_held_out_run_can_be_made_again_from_its_facts(configuration: Any) -> None:
    for plan in (first := configuration.plan(PROMPTS, 45.0), reprompted(first, 1)):
        records = [
            dataclasses.replace(
                record(request.index, 0.1, 0.01),
                intended_at_s=request.at_s,
                prompt_token_count=len(request.prompt_token_ids),
                output_token_limit=request.output_token_count,
            )
            for request in plan.requests
        ]
        facts = {"plan": {**plan.facts, "workload": plan.name, "duration_s": plan.duration_s}}
        assert (
            plan_of(RunData(facts=json.loads(json.dumps(facts)), records=records), PROMPTS).requests == plan.requests
        )


# How long steps take


def test_a_row_ends_later_by_what_it_was_slowed() -> None:
    row = Row(0.0, [1.0, 1.0, 1.0], 1.0)
    assert [row.end_at(index) for index in range(3)] == [1.0, 2.0, 3.0]
    row.retime(1.5, 0.5)
    assert [row.end_at(index) for index in range(3)] == [1.0, 2.5, 4.5]
    assert row.under_way(1.6) == 1
    row.retime(2.5, 1.0)
    assert [row.end_at(index) for index in range(3)] == [1.0, 2.5, 3.5]
    assert row.under_way(9.0) == 2


def test_a_core_is_slowed_by_each_neighbour_that_computes_and_told_of_changes() -> None:
    machine = Machine(lambda own, other: 0.5 if own else 0.2)
    told: list[str] = []
    first, second, third = (machine.core(lambda name=name: told.append(name)) for name in "abc")  # type: ignore[misc]
    first.begin(is_prefill=True)
    assert first.speed() == 1.0
    second.begin(is_prefill=False)
    assert (first.speed(), second.speed(), told) == (0.5, 0.8, ["a"])
    third.begin(is_prefill=False)
    assert first.speed() == 0.25
    second.begin(is_prefill=False)  # goes on as it was: nobody is told
    assert told == ["a", "a", "b"]
    machine.leave(third)
    third.rest()
    assert (first.speed(), told) == (0.5, ["a", "a", "b", "a", "b"])


# The command


SMALL = ("--rate", "2", "--duration", "12", "--scale", "0.2", "--seed", "3")


def ran(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["simulate", *words])
    code: int = options.run(options)
    return code


def test_wrong_options_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (("--config", str(tmp_path / "none.toml")), "there is no configuration file"),
        (("--profile", str(tmp_path / "none.toml")), "none.toml"),
        (("--decode", "0"), "at least 1"),
        (("--prefill", "999"), "0 to 256 workers"),
        (("--rates", "1,x"), "numbers with commas"),
        (("--slo-scale", "0"), "above 0"),
        (("--against", str(tmp_path)), "there is no run here"),
    ):
        assert ran(*words) == 2, words
        error = capsys.readouterr().err
        assert said in error, (words, error)
        assert error.count("\n") == 1


def test_the_command_writes_what_a_measured_run_writes_and_tells_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.commands.simulate.prompt_maker", lambda _: PROMPTS)
    out = tmp_path / "run"
    assert ran(*SMALL, "--out", str(out), "--prefill", "0", "--decode", "2") == 0
    said = capsys.readouterr()
    assert "simulated 1" in said.err
    assert said.err.rstrip().endswith(" x")
    found = read_run(out)
    assert found.facts["kind"] == "simulated"
    assert found.facts["worker_counts"] == {"prefill": 0, "decode": 2}
    assert {path.name for path in out.iterdir()} >= {"run.json", "requests.jsonl", "summary.json", "report.html"}
    assert ran("--against", str(out), "--json") == 0
    errors = json.loads(capsys.readouterr().out)["configurations"][0]["errors"]
    assert errors["ttft_mean"] == pytest.approx(0.0, abs=1e-5)


def test_accuracy_refuses_a_run_that_does_not_say_its_workers(tmp_path: Path) -> None:
    write_run(tmp_path / "unknown", run(0.1, 0.01))
    config = load_config(Path(__file__).resolve().parents[2] / "deploy" / "baton.toml")

    def replayed(*_: Any) -> RunData:
        raise AssertionError("it was simulated as a guess")

    with pytest.raises(ReplayError, match="how many workers"):
        accuracy.compare([("unknown", tmp_path / "unknown")], [], Profile(), config, PROMPTS, replayed=replayed)


def test_what_has_no_run_among_those_to_replay_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.commands.simulate.prompt_maker", lambda _: PROMPTS)
    assert ran(*SMALL, "--out", str(tmp_path / "one")) == 0
    (tmp_path / "a-sweep").mkdir()
    capsys.readouterr()
    assert ran("--against", str(tmp_path / "a-sweep"), str(tmp_path / "one"), "--json") == 0
    said = capsys.readouterr()
    assert said.err == f"left out: {tmp_path / 'a-sweep'} has no run.json\n"
    assert [row["name"] for row in json.loads(said.out)["configurations"]] == ["one"]


def test_a_measured_run_is_replayed_with_its_own_numbers_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.commands.simulate.prompt_maker", lambda _: PROMPTS)
    assert ran(*SMALL, "--out", str(tmp_path / "one"), "--prefill", "0") == 0
    run_data = read_run(tmp_path / "one")
    run_data.facts |= {"kind": "measured", "worker_counts": {"decode": 1}}
    write_run(tmp_path / "measured", run_data)
    capsys.readouterr()
    assert ran("--against", str(tmp_path / "measured"), "--json") == 0
    row = json.loads(capsys.readouterr().out)["configurations"][0]
    assert row["errors"]["ttft_mean"] == pytest.approx(0.0, abs=1e-5)

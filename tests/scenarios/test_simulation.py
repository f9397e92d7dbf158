"""The simulated cluster in virtual time: times by formula, chance by seed, and the real router's refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from typing import Any

import pytest

from bench.results.records import Outcome, RequestRecord
from bench.results.report import render
from bench.results.run_data import RunData
from bench.results.store import request_as_json
from bench.results.summary import summarise
from bench.simulation.errors import errors_of
from bench.simulation.observe import ReplayError, plan_of, replay, reprompted
from bench.simulation.profile import Contention, Line, Noise, Overheads, Profile
from bench.simulation.simulate import simulate, with_counts
from bench.traffic.pacers import parse_pacer
from bench.traffic.plan import Plan, PlannedRequest
from bench.traffic.prompts import PromptMaker
from bench.traffic.workloads import make_plan
from engine.cost import CostModel, DecodeCost, Link, PrefillCost
from fleet.config import ConfigError, FleetConfig, parse_config

BLOCK, KV_BYTES = 32, 1000
BUDGET = 512
# Figures a reader can add up: a prompt token 1 ms, a decode step 10 ms, a block 32 ms on the link.
COST = CostModel(PrefillCost(0.0, 0.001, 0.0), DecodeCost(0.010, 0.0, 0.0), kv_bytes_per_token=KV_BYTES)
LINK = Link(latency_s=0.002, bytes_per_s=1e6)
PROFILE = Profile(costs={"prefill": COST, "decode": COST}, link=LINK)
OVERHEADS = Overheads(
    admit=Line(0.003, 1e-5),
    first_token=Line(0.004, 2e-5),
    token=Line(0.001, 0.0005),
    handoff=Line(0.006, 4e-5),
    pulled_step=Line(0.0, 0.0007),
)
NOISE = Noise((0.0, 0.5, 1.0), (0.8, 1.0, 1.5))
NOISY = dataclasses.replace(
    PROFILE,
    overheads=OVERHEADS,
    noise={"prefill": NOISE, "decode": NOISE, "mixed": NOISE},
    overhead_noise=dict.fromkeys(("admit", "first_token", "token", "handoff", "pull"), NOISE),
    contention=Contention(prefill_by_decode=0.1, decode_by_prefill=0.2, decode_by_decode=0.3, prefill_by_prefill=0.4),
)
PROMPTS = PromptMaker.without_tokenizer(40_000, first_token_id=100)


def cluster(prefill: int = 1, decode: int = 1, *, router: str = "", budget: int = BUDGET) -> FleetConfig:
    engine = f"""
        kv_cache_bytes = {512 * BLOCK * KV_BYTES}
        block_token_count = {BLOCK}
        max_batched_token_count = {budget}
    """
    return parse_config(f"""
        [model]
        name = "smollm2-135m-instruct"
        path = "nowhere"
        [router]
        {router}
        [prefill]
        count = {prefill}
        [prefill.engine]
        {engine}
        [decode]
        count = {decode}
        [decode.engine]
        {engine}
    """)


def planned(*asked: tuple[float, int, int], **more: Any) -> Plan:
    """Requests as (time, prompt tokens, output tokens), all prompts different."""
    requests = tuple(
        PlannedRequest(
            index=index,
            at_s=at_s,
            prompt_token_ids=PROMPTS.tokens(f"prompt {index}", prompt_count),
            output_token_count=output_count,
            **more,
        )
        for index, (at_s, prompt_count, output_count) in enumerate(asked)
    )
    duration_s = max(at_s for at_s, _, _ in asked) + 1.0
    return Plan(name="by hand", requests=requests, duration_s=duration_s, facts={})


def chat(rate_per_s: float = 2.0, duration_s: float = 12.0, seed: int = 5) -> Plan:
    pacer = parse_pacer(f"poisson:{rate_per_s}")
    return make_plan("chat", pacer=pacer, duration_s=duration_s, seed=seed, prompts=PROMPTS, scale=0.3)


def lines_of(run: RunData) -> list[str]:
    return [json.dumps(request_as_json(record), sort_keys=True) for record in run.records]


def times(record: RequestRecord) -> list[float]:
    """From its intended time."""
    return [at_s - record.intended_at_s for at_s in record.message_at_s]


# Times by formula


def test_one_split_request_takes_prefill_then_its_pull_then_its_steps() -> None:
    run = simulate(planned((0.0, 100, 3)), PROFILE, cluster())
    pull_s = LINK.latency_s + 4 * BLOCK * KV_BYTES / LINK.bytes_per_s  # 100 tokens fill or begin four blocks
    first_s = 0.100
    assert times(run.records[0]) == pytest.approx([first_s, first_s + pull_s + 0.010, first_s + pull_s + 0.020])
    assert run.records[0].e2e_s == pytest.approx(0.100 + 0.130 + 0.020)
    assert run.records[0].kv_transfer_bytes == 4 * BLOCK * KV_BYTES
    assert run.records[0].placement == "split/split"


def test_every_overhead_of_the_profile_is_on_the_way_once() -> None:
    run = simulate(planned((0.0, 100, 3)), dataclasses.replace(PROFILE, overheads=OVERHEADS), cluster())
    prompt_done_s = (0.003 + 100e-5) + 0.100
    decode_began_s = prompt_done_s + (0.006 + 100 * 4e-5) + 0.130
    step_s = 0.010 + 0.0007
    token_s = 0.001 + 0.0005
    assert times(run.records[0]) == pytest.approx(
        [
            prompt_done_s + 0.004 + 100 * 2e-5,
            decode_began_s + step_s + token_s,
            decode_began_s + step_s + 0.010 + token_s,
        ]
    )


def test_a_prompt_beyond_the_budget_is_computed_in_chunks_and_costs_the_same() -> None:
    cost = dataclasses.replace(COST, prefill=PrefillCost(0.005, 0.001, 1e-6))
    run = simulate(
        planned((0.0, 1200, 1)), dataclasses.replace(PROFILE, costs=dict.fromkeys(PROFILE.costs, cost)), cluster()
    )
    assert run.records[0].ttft_s == pytest.approx(3 * 0.005 + 1.2 + 1e-6 * 1200**2)


def test_an_aggregated_worker_computes_its_own_prompts() -> None:
    run = simulate(planned((0.0, 100, 3)), dataclasses.replace(PROFILE, overheads=OVERHEADS), cluster(0, 2))
    first_s = 0.004 + 0.100 + 0.006
    second_s = 0.004 + 0.100 + 0.010 + 0.0015
    assert times(run.records[0]) == pytest.approx([first_s, second_s, second_s + 0.010])
    assert run.records[0].placement is not None
    assert run.records[0].placement.startswith("local")
    assert run.records[0].prefill_worker_id == run.records[0].decode_worker_id


def test_a_stream_waits_for_the_pull_of_another_and_not_for_its_prompt() -> None:
    run = simulate(planned((0.0, 32, 100), (0.5, 256, 1), (0.5, 256, 2)), PROFILE, cluster())
    gaps = run.records[0].token_gaps_s[1:]
    # Two prompts of 256 tokens in one step of 512; only the second goes on: eight blocks.
    pull_s = 0.002 + 8 * 0.032
    assert max(gaps) == pytest.approx(0.010 + pull_s)
    assert sorted(gaps)[-2] == pytest.approx(0.010)


def test_in_an_aggregated_worker_a_stream_waits_for_a_prompt() -> None:
    run = simulate(planned((0.0, 32, 100), (0.5, 400, 1)), PROFILE, cluster(0, 1))
    assert max(run.records[0].token_gaps_s) == pytest.approx(0.400 + 0.010)


def test_neighbours_slow_each_other_by_the_share_of_the_profile() -> None:
    profile = dataclasses.replace(PROFILE, contention=Contention(prefill_by_prefill=0.5))
    run = simulate(planned((0.0, 100, 1), (0.0, 300, 1)), profile, cluster(0, 2))
    # Both at half speed until the short one is done at 200 ms; the long one has 200 ms of work left then.
    assert [record.ttft_s for record in run.records] == pytest.approx([0.200, 0.400])


def test_a_prefix_computed_before_is_not_computed_again() -> None:
    prompt = PROMPTS.tokens("shared", 321)
    first, second = (
        PlannedRequest(index=index, at_s=float(index), prompt_token_ids=prompt, output_token_count=1)
        for index in range(2)
    )
    # What is left of the second is one token, and a step of one token is a decode step.
    run = simulate(Plan(name="twice", requests=(first, second), duration_s=3.0, facts={}), PROFILE, cluster())
    assert [record.ttft_s for record in run.records] == pytest.approx([0.321, 0.010])
    assert run.records[1].cached_prompt_token_count == 320


def test_a_worker_that_has_work_never_rests() -> None:
    rng = random.Random(3)
    lengths = [rng.randrange(10, 400) for _ in range(40)]
    run = simulate(planned(*((0.0, length, 1) for length in lengths)), PROFILE, cluster())
    assert max(times(record)[0] for record in run.records) == pytest.approx(sum(lengths) * 0.001)


def test_waiting_for_prefill_follows_the_formula_of_m_d_1() -> None:
    length, load, count = 32, 0.4, 800
    service_s = length * 0.001
    rng = random.Random(11)
    at_s, asked = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(load / service_s)
        asked.append((at_s, length, 1))  # as long as the budget: one prompt a step
    run = simulate(planned(*asked), PROFILE, cluster(budget=length))
    waits = [times(record)[0] - service_s for record in run.records]
    expected_s = load * service_s / (2 * (1 - load))
    batches = [statistics.mean(waits[start : start + 40]) for start in range(0, count, 40)]
    margin_s = 2.0 * statistics.stdev(batches) / math.sqrt(len(batches))
    assert margin_s < 0.4 * expected_s  # or the test could not fail
    assert statistics.mean(waits) == pytest.approx(expected_s, abs=margin_s)


# Chance


def test_the_same_seed_gives_the_same_records_to_the_last_digit() -> None:
    runs = [lines_of(simulate(chat(), NOISY, cluster(), seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("workers", [(1, 1), (0, 2)])
def test_computing_ahead_shows_in_no_time(workers: tuple[int, int]) -> None:
    runs = [simulate(chat(), NOISY, cluster(*workers), seed=3, look_ahead_step_count=count) for count in (1, 32)]
    for one, other in zip(*(run.records for run in runs), strict=True):
        assert one.message_at_s == pytest.approx(other.message_at_s, abs=1e-6)
        assert one.ended_at_s == pytest.approx(other.ended_at_s, abs=1e-6)
        assert (one.prefill_worker_id, one.decode_worker_id) == (other.prefill_worker_id, other.decode_worker_id)


# What becomes of requests


def test_what_the_router_turns_away_is_refused() -> None:
    config = cluster(router="queue_limit = 2\n        max_in_flight_count = 3")
    run = simulate(planned(*((0.001 * number, 200, 20) for number in range(8))), PROFILE, config)
    outcomes = [record.outcome for record in run.records]
    assert (outcomes.count(Outcome.OK), outcomes.count(Outcome.REFUSED)) == (5, 3)
    assert {record.error for record in run.records} == {None, "RESOURCE_EXHAUSTED/QUEUE_FULL"}


def test_a_prompt_beyond_the_context_is_refused() -> None:
    run = simulate(planned((0.0, 9000, 4), (0.0, 100, 4)), PROFILE, cluster())
    assert [record.outcome for record in run.records] == [Outcome.REFUSED, Outcome.OK]


def test_a_caller_that_leaves_has_what_came_by_then_and_its_worker_goes_on_without_it() -> None:
    run = simulate(planned((0.0, 100, 400), (0.0, 100, 400), cancel_after_s=1.0), PROFILE, cluster())
    for record in run.records:
        assert record.outcome is Outcome.CANCELLED
        assert record.message_at_s[-1] <= 1.0 < record.message_at_s[-1] + 0.0101
        assert record.ended_at_s == pytest.approx(1.0)


def test_a_deadline_that_passes_is_a_timeout() -> None:
    run = simulate(planned((0.0, 100, 400)), PROFILE, cluster(), timeout_s=1.0)
    assert run.records[0].outcome is Outcome.TIMEOUT


def test_the_run_says_everywhere_that_it_is_simulated() -> None:
    run = simulate(chat(duration_s=12.0), NOISY, cluster())
    assert run.facts["kind"] == "simulated"
    assert summarise(run)["kind"] == "simulated"
    assert "SIMULATED" in render([run])
    assert {sample.source for sample in run.samples} == {"p0", "d0"}
    assert max(sample.running_count for sample in run.samples) > 1


def test_other_numbers_of_workers_take_the_place_of_the_files() -> None:
    config = with_counts(cluster(), prefill=2, decode=3)
    run = simulate(chat(duration_s=12.0), PROFILE, config)
    assert run.facts["worker_counts"] == {"prefill": 2, "decode": 3}
    assert {record.decode_worker_id for record in run.records} == {"d0", "d1", "d2"}
    with pytest.raises(ConfigError, match=r"decode\.count"):
        with_counts(config, prefill=1, decode=0)


# Observe, replay


def as_measured(run: RunData, stretch: float) -> RunData:
    """The run as if everything in it had taken ``stretch`` times as long."""

    def stretched(record: RequestRecord) -> RequestRecord:
        start = record.intended_at_s
        return dataclasses.replace(
            record,
            message_at_s=[start + stretch * (at_s - start) for at_s in record.message_at_s],
            ended_at_s=start + stretch * (record.ended_at_s - start),
        )

    return RunData(facts={**run.facts, "kind": "measured"}, records=[stretched(record) for record in run.records])


def test_a_run_with_known_errors_has_exactly_those() -> None:
    ours = simulate(chat(), NOISY, cluster(), seed=4)
    measured = as_measured(ours, 1.25)
    replayed = replay(measured, NOISY, cluster(), PROMPTS, seed=4)
    assert lines_of(replayed) == lines_of(ours)
    result = errors_of([("stretched", measured, replayed)])
    errors = result["configurations"][0]["errors"]
    for metric in ("ttft_mean", "ttft_p99", "itl_mean", "itl_p99", "e2e_mean"):
        assert errors[metric] == pytest.approx(1 / 1.25 - 1)
        assert result["metrics"][metric]["bias"] == pytest.approx(-0.2)
    assert result["metrics"]["ttft_mean"]["claim"] == "withheld: missed"


def test_sessions_are_replayed_by_their_own_answers() -> None:
    pacer = parse_pacer("poisson:0.5")
    plan = make_plan("chat-sessions", pacer=pacer, duration_s=20.0, seed=6, prompts=PROMPTS, scale=0.3)
    slow = Profile(costs=dict.fromkeys(PROFILE.costs, dataclasses.replace(COST, decode=DecodeCost(0.05, 0.0, 0.0))))
    measured = simulate(plan, slow, cluster())
    replayed = replay(measured, PROFILE, cluster(), PROMPTS)
    turns = [(one, other) for one, other in zip(measured.records, replayed.records, strict=True) if one.index]
    assert any(other.intended_at_s < one.intended_at_s - 0.5 for one, other in turns)  # answered sooner, asked sooner
    assert errors_of([("faster", measured, replayed)])["configurations"][0]["errors"]["itl_mean"] < -0.5


def test_the_plan_made_again_is_the_plan_that_was_sent() -> None:
    plan = chat(rate_per_s=1.2345678)
    run = simulate(plan, PROFILE, cluster())
    assert plan_of(run, PROMPTS).requests == plan.requests
    other = reprompted(plan, 1)
    assert plan_of(simulate(other, PROFILE, cluster()), PROMPTS).requests == other.requests
    assert other.requests != plan.requests


def test_other_words_share_what_the_words_shared() -> None:
    plan = chat()
    changed = reprompted(plan, 1)
    for one, two in zip(plan.requests, changed.requests, strict=True):
        assert (one.at_s, len(one.prompt_token_ids)) == (two.at_s, len(two.prompt_token_ids))
        assert all(word != other for word, other in zip(one.prompt_token_ids, two.prompt_token_ids, strict=True))
    firsts = {request.prompt_token_ids[:25] for request in changed.requests}
    assert len(firsts) == len({request.prompt_token_ids[:25] for request in plan.requests}) == 1


def test_a_plan_that_differs_from_its_records_is_refused() -> None:
    run = simulate(chat(), PROFILE, cluster())
    run.records[3] = dataclasses.replace(run.records[3], output_token_limit=1)
    with pytest.raises(ReplayError, match="request 3 has other lengths"):
        plan_of(run, PROMPTS)
    run = simulate(chat(), PROFILE, cluster())
    run.records[5].intended_at_s += 0.002
    with pytest.raises(ReplayError, match="request 5 has another time"):
        plan_of(run, PROMPTS)
    run = simulate(chat(), PROFILE, cluster())
    run.facts["plan"]["seed"] += 1
    with pytest.raises(ReplayError, match="in the plan made again"):
        plan_of(run, PROMPTS)
    with pytest.raises(ReplayError, match="no facts of its plan"):
        plan_of(RunData(facts={}, records=[]), PROMPTS)

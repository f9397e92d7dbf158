"""Workloads: what they promise of lengths, sharing, sessions and groups, and that a seed means one plan."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.traffic import draft as draft_module
from bench.traffic import lengths as lengths_module
from bench.traffic import pacers as pacers_module
from bench.traffic.lengths import Fixed, Uniform
from bench.traffic.pacers import Constant, Poisson, parse_pacer
from bench.traffic.plan import Plan, PlannedRequest
from bench.traffic.prompts import PromptMaker
from bench.traffic.sharing import prefix_hit_share
from bench.traffic.workloads import WORKLOADS, make_plan

PROMPTS = PromptMaker.without_tokenizer(30_000)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "workbench" / "workloads.md"
EVERY = pytest.mark.parametrize("name", WORKLOADS)


def plan_of(name: str, *, rate: float = 3.0, duration_s: float = 30.0, seed: int = 1, **more: Any) -> Plan:
    return make_plan(name, pacer=Poisson(rate), duration_s=duration_s, seed=seed, prompts=PROMPTS, **more)


def sessions_of(plan: Plan) -> list[list[PlannedRequest]]:
    sessions: list[list[PlannedRequest]] = []
    for request in plan.requests:
        if request.after is None:
            sessions.append([])
        sessions[-1].append(request)
    return sessions


@EVERY
def test_a_plan_is_in_order_within_its_duration_and_fits_the_context(name: str) -> None:
    plan = plan_of(name, context_token_count=4000)
    assert [request.index for request in plan.requests] == list(range(len(plan.requests)))
    starts = [request.at_s for request in plan.requests if request.after is None]
    assert starts == sorted(starts)
    assert 0 <= starts[0] <= starts[-1] < 30
    for request in plan.requests:
        assert len(request.prompt_token_ids) >= 1
        assert request.output_token_count >= 1
        assert len(request.prompt_token_ids) + request.output_token_count <= 4000
        assert request.at_s >= 0
    for session in sessions_of(plan):
        assert [request.after for request in session[1:]] == [request.index for request in session[:-1]]
        assert len({request.session_id for request in session}) == 1
        assert len(session) == 1 or session[0].session_id


@EVERY
def test_the_same_arguments_give_the_same_plan_and_another_seed_shares_nothing_with_it(name: str) -> None:
    first, again = plan_of(name), plan_of(name)
    assert first == again
    other = plan_of(name, seed=2)
    assert other.requests != first.requests
    own = [request.prompt_token_ids for request in first.requests]
    both = prefix_hit_share([*own, *(request.prompt_token_ids for request in other.requests)])
    apart = prefix_hit_share(own), prefix_hit_share([request.prompt_token_ids for request in other.requests])
    assert both <= max(apart) + 1e-9


@EVERY
def test_a_longer_run_begins_with_the_shorter_one(name: str) -> None:
    short, long = plan_of(name, duration_s=15.0), plan_of(name, duration_s=30.0)
    assert len(short.requests) < len(long.requests)
    assert long.requests[: len(short.requests)] == short.requests


@EVERY
def test_facts_are_json_and_enough_to_make_the_plan_again(name: str) -> None:
    plan = plan_of(name, scale=0.5, context_token_count=3000, arrival_limit=50)
    facts = json.loads(json.dumps(plan.facts))
    assert facts["workload"] == plan.name == name
    assert facts["rate_per_s"] == 3.0
    assert facts["arrival_count"] == 50
    assert facts["request_count"] == len(plan.requests)
    assert facts["session_count"] == len(sessions_of(plan))
    assert sum(group["request_count"] for group in facts["groups"].values()) == len(plan.requests)
    total = sum(group["prompt_tokens"]["sum"] for group in facts["groups"].values())
    assert total == sum(len(request.prompt_token_ids) for request in plan.requests)
    parameters = {
        key: value["spelling"] if isinstance(value, dict) else str(value)
        for key, value in facts["parameters"].items()
    }
    again = make_plan(
        facts["workload"],
        pacer=parse_pacer(facts["pacer"]["spelling"]),
        duration_s=facts["duration_s"],
        seed=facts["seed"],
        prompts=PROMPTS,
        scale=facts["scale"],
        context_token_count=facts["context_token_count"],
        arrival_limit=facts["arrival_limit"],
        parameters=parameters,
    )
    assert again == plan


@EVERY
def test_one_factor_scales_every_length(name: str) -> None:
    # A context in which nothing is cut; tiny prompts of the adversarial mix are the ones that do not scale.
    wide = {"context_token_count": 100_000}
    whole = [r for r in plan_of(name, **wide).requests if r.group != "tiny"]
    quarter = [r for r in plan_of(name, scale=0.25, **wide).requests if r.group != "tiny"]
    assert len(whole) == len(quarter)
    ratio = sum(len(r.prompt_token_ids) for r in quarter) / sum(len(r.prompt_token_ids) for r in whole)
    assert ratio == pytest.approx(0.25, rel=0.02)
    answers = sum(r.output_token_count for r in quarter) / sum(r.output_token_count for r in whole)
    assert answers == pytest.approx(0.25, rel=0.05)
    assert [r.at_s for r in whole] == [r.at_s for r in quarter]


def test_agents_prompts_grow_from_the_one_before() -> None:
    plan = plan_of("agent", parameters={"system_prompt_token_count": 300})
    sessions = sessions_of(plan)
    assert {len(session) for session in sessions} == {3, 4, 5, 6, 7, 8}
    for session in sessions:
        for former, turn in itertools.pairwise(session):
            former_ids = former.prompt_token_ids
            assert turn.prompt_token_ids[: len(former_ids)] == former_ids
            # The former prompt, its answer and at least a token of the tool's.
            assert len(turn.prompt_token_ids) > len(former_ids) + former.output_token_count
    assert len({session[0].prompt_token_ids[:300] for session in sessions}) == 1, "instructions are shared by all"
    assert len({session[0].prompt_token_ids[300:316] for session in sessions}) == len(sessions), "tasks are not"
    fixed = plan_of("agent", parameters={"result_tokens": 20, "answer_tokens": 20})
    followers = [request.prompt_token_ids for request in fixed.requests if request.after is not None]
    assert len({prompt[-20:] for prompt in followers}) == len(followers), "every result is its own"
    assert len({prompt[-40:-20] for prompt in followers}) == len(followers), "and so is every answer"
    pauses = [request.at_s for request in plan.requests if request.after is not None]
    assert stats.kstest(pauses, stats.expon(scale=1.0).cdf).pvalue > 0.01


def test_an_agents_session_ends_before_it_would_break_the_context_and_that_is_counted() -> None:
    plan = plan_of("agent", context_token_count=2500)
    longest = max(len(r.prompt_token_ids) + r.output_token_count for r in plan.requests)
    assert 2000 < longest <= 2500
    free = plan_of("agent", context_token_count=100_000)
    ended = sum(len(a) < len(b) for a, b in zip(sessions_of(plan), sessions_of(free), strict=True))
    cut = plan.facts["cut"]
    assert isinstance(cut, dict)
    assert cut["sessions_ended_by_context"] == ended > 10
    for session, whole in zip(sessions_of(plan), sessions_of(free), strict=True):
        assert [r.prompt_token_ids for r in session[1:]] == [r.prompt_token_ids for r in whole[1 : len(session)]]


@pytest.mark.parametrize("name", ["agent", "chat-sessions"])
def test_sessions_of_another_seed_have_other_names(name: str) -> None:
    ids = [{request.session_id for request in plan_of(name, seed=seed).requests} for seed in (1, 2, 1)]
    assert ids[0] == ids[2]
    assert not ids[0] & ids[1], "a router that remembers a session would know those of the run before"


def test_chat_is_one_turn_under_a_shared_system_prompt_and_sessions_are_several() -> None:
    plan = plan_of("chat")
    assert all(request.after is None and request.session_id == "" for request in plan.requests)
    assert len({request.prompt_token_ids[:100] for request in plan.requests}) == 1
    assert len({request.prompt_token_ids[100:116] for request in plan.requests}) == len(plan.requests)
    # 112 tokens, of which 96 are whole blocks of 16 that all but the first hit.
    fixed = plan_of("chat", parameters={"message_tokens": 12})
    hits = 96 * (len(fixed.requests) - 1) / (112 * len(fixed.requests))
    assert fixed.facts["prefix_hit_share_infinite_cache"] == pytest.approx(hits, abs=1e-4)

    sessions = sessions_of(plan_of("chat-sessions"))
    assert {len(session) for session in sessions} == {2, 3, 4, 5, 6}
    for session in sessions:
        for former, turn in itertools.pairwise(session):
            assert turn.prompt_token_ids[: len(former.prompt_token_ids)] == former.prompt_token_ids
            assert len(turn.prompt_token_ids) > len(former.prompt_token_ids) + former.output_token_count


def test_chat_may_have_several_system_prompts_or_none() -> None:
    several = plan_of("chat", parameters={"system_prompt_count": 5})
    counts = Counter(request.prompt_token_ids[:100] for request in several.requests)
    assert len(counts) == 5
    assert stats.chisquare(list(counts.values())).pvalue > 0.01
    none = plan_of("chat", parameters={"system_prompt_token_count": 0})
    assert none.facts["prefix_hit_share_infinite_cache"] == 0.0


def test_documents_are_asked_for_by_zipfs_law_and_each_keeps_its_text() -> None:
    plan = plan_of("rag", rate=40.0, scale=0.1, parameters={"document_count": 8, "question_tokens": "100"})
    by_document = defaultdict(list)
    for request in plan.requests:
        by_document[request.prompt_token_ids[:22]].append(request.prompt_token_ids)  # 6 of the system, then its own
    assert len(by_document) == 8
    counts = sorted((len(prompts) for prompts in by_document.values()), reverse=True)
    weights = np.array([1 / k for k in range(1, 9)])
    assert stats.chisquare(counts, weights / weights.sum() * sum(counts)).pvalue > 0.001
    for prompts in by_document.values():
        assert len({prompt[:-10] for prompt in prompts}) == 1, "the document"
        assert len({prompt[-10:] for prompt in prompts}) == len(prompts), "the questions"
    even = plan_of("rag", rate=40.0, scale=0.1, parameters={"document_count": 8, "zipf_exponent": 0.0})
    even_counts = Counter(request.prompt_token_ids[:22] for request in even.requests).values()
    assert stats.chisquare(list(even_counts)).pvalue > 0.01


def test_code_is_as_long_as_in_azures_trace_and_shares_a_part() -> None:
    requests = plan_of("code", rate=50.0).requests
    prompts = [len(request.prompt_token_ids) for request in requests]
    answers = [request.output_token_count for request in requests]
    # Azure 2023 code: 1,469 / 7,315 and 13 / 90 (p50 / p95).
    assert np.quantile(prompts, [0.5, 0.95]) == pytest.approx([1469, 7315], rel=0.1)
    assert np.quantile(answers, [0.5, 0.95]) == pytest.approx([13, 90], rel=0.2)
    one = plan_of("code", parameters={"prefix_count": 1, "prompt_tokens": 1001, "shared_share": 0.3}).requests
    assert len({request.prompt_token_ids[:300] for request in one}) == 1
    assert len({request.prompt_token_ids[300:316] for request in one}) == len(one)


@pytest.mark.parametrize(
    ("name", "prompt_p50", "answer_p50"),
    [("summarisation", 2700, 170), ("long-output", 300, 1100), ("random", 512, 128)],
)
def test_summaries_long_answers_and_random_prompts_share_nothing(name: str, prompt_p50: int, answer_p50: int) -> None:
    plan = plan_of(name, rate=10.0)
    assert plan.facts["prefix_hit_share_infinite_cache"] == 0.0
    assert statistics.median(len(r.prompt_token_ids) for r in plan.requests) == pytest.approx(prompt_p50, rel=0.1)
    assert statistics.median(r.output_token_count for r in plan.requests) == pytest.approx(answer_p50, rel=0.1)


def test_bursts_of_long_prompts_come_at_their_times_beside_the_streams() -> None:
    plan = make_plan(
        "chat-bursts",
        pacer=Constant(2.0),
        duration_s=10.0,
        seed=1,
        prompts=PROMPTS,
        parameters={"burst_first_s": 1.0, "burst_every_s": 5.0, "burst_size": 3, "burst_spacing_s": 0.25},
    )
    arrivals = [request for request in plan.requests if request.group == "arrival"]
    streams = [request for request in plan.requests if request.group == "stream"]
    assert [request.at_s for request in arrivals] == [1.0, 1.25, 1.5, 6.0, 6.25, 6.5]
    assert [request.at_s for request in streams] == [place / 2 for place in range(20)]
    assert {(len(r.prompt_token_ids), r.output_token_count) for r in arrivals} == {(2000, 4)}
    assert {(len(r.prompt_token_ids), r.output_token_count) for r in streams} == {(64, 150)}
    assert plan.facts["prefix_hit_share_infinite_cache"] == 0.0


def test_the_adversarial_mix_has_all_its_kinds_in_their_shares() -> None:
    plan = plan_of("adversarial", rate=40.0)
    groups = defaultdict(list)
    for request in plan.requests:
        groups[request.group].append(request)
    shares = {"tiny": 0.2, "long": 0.1, "endless": 0.05, "cancelled": 0.15, "identical": 0.2, "ordinary": 0.3}
    assert set(groups) == set(shares)
    counts = [len(groups[group]) for group in shares]
    expected = [share * len(plan.requests) for share in shares.values()]
    assert stats.chisquare(counts, expected).pvalue > 0.001

    assert {r.output_token_count for r in groups["tiny"]} == {1}
    assert {len(r.prompt_token_ids) for r in groups["tiny"]} == {1, 2, 3, 4}
    assert min(len(r.prompt_token_ids) for r in groups["long"]) >= 4000
    assert min(r.output_token_count for r in groups["endless"]) >= 1000
    assert len({r.prompt_token_ids for r in groups["identical"]}) == 1
    assert len({r.prompt_token_ids for r in groups["ordinary"]}) == len(groups["ordinary"])
    for group, requests in groups.items():
        assert all((request.cancel_after_s is not None) == (group == "cancelled") for request in requests)
    leaving = [r.cancel_after_s for r in groups["cancelled"]]
    assert stats.kstest(leaving, stats.expon(scale=1.0).cdf).pvalue > 0.01
    priorities = Counter(request.priority for request in plan.requests)
    assert set(priorities) == {-1, 0, 1}
    assert stats.chisquare(list(priorities.values())).pvalue > 0.001
    at_once = Counter(Counter(request.at_s for request in plan.requests).values())
    assert set(at_once) == {1, 8}
    assert at_once[8] == pytest.approx(0.03 * at_once.total(), rel=0.4)


def test_parameters_are_taken_as_values_or_as_words() -> None:
    as_values = plan_of(
        "random", parameters={"prompt_tokens": Uniform(10, 20), "answer_tokens": 5, "shared_share": 0.5}
    )
    as_words = plan_of(
        "random", parameters={"prompt_tokens": "uniform:10..20", "answer_tokens": "constant:5", "shared_share": "0.5"}
    )
    assert as_values == as_words
    assert {request.output_token_count for request in as_values.requests} == {5}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "talk"}, "no workload is called 'talk'; there are chat,"),
        ({"parameters": {"size": 3}}, "has no parameter 'size'; it has answer_tokens, prefix_count"),
        ({"parameters": {"prefix_count": "some"}}, "'some' is not a number"),
        ({"parameters": {"prefix_count": 2.5}}, "2.5 is not a whole number"),
        ({"parameters": {"prefix_count": True}}, "True is not a number"),
        ({"parameters": {"prefix_count": 0}}, "prefix_count is below 1"),
        ({"parameters": {"shared_share": "1.5"}}, "shared_share is not within 0 and 1"),
        ({"parameters": {"shared_share": "nan"}}, "shared_share is not within 0 and 1"),
        ({"parameters": {"prompt_tokens": "lots"}}, "no distribution of lengths"),
        ({"parameters": {"prompt_tokens": None}}, "None is no distribution of lengths"),
        ({"name": "adversarial", "parameters": {"tiny_share": 0.9}}, "sum to more than 1"),
        ({"name": "agent", "parameters": {"pause_mean_s": -1.0}}, "pause_mean_s is not 0 or more"),
        ({"name": "chat-bursts", "parameters": {"burst_every_s": 0.0}}, "burst_every_s is not above 0"),
        ({"scale": 0.0}, "scale 0 is not above 0"),
        ({"scale": math.inf}, "scale inf"),
        ({"duration_s": 0.0}, "duration 0 s is not above 0"),
        ({"duration_s": math.nan}, "duration nan s is not above 0"),
        ({"duration_s": 1e-9}, "no request falls into the duration"),
        ({"duration_s": None}, "a duration is needed"),
        ({"context_token_count": 1}, "room for a token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], says: str) -> None:
    given = {"name": "random", "duration_s": 10.0, **arguments}
    with pytest.raises(ValueError) as caught:
        make_plan(given.pop("name"), pacer=Poisson(2.0), seed=1, prompts=PROMPTS, **given)
    assert says in str(caught.value)


def test_a_plan_too_large_to_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_module, "MAX_PROMPT_TOKEN_COUNT", 10_000)
    with pytest.raises(ValueError, match="take a lower rate"):
        plan_of("random")


def test_stages_bring_their_own_duration() -> None:
    plan = make_plan("random", pacer=parse_pacer("steps:1x10,2x10"), seed=1, prompts=PROMPTS)
    assert plan.duration_s == 20.0
    assert plan.facts["rate_per_s"] is None


def test_only_so_many_arrivals_are_planned_when_a_limit_is_set() -> None:
    assert len(plan_of("random", arrival_limit=7).requests) == 7
    assert plan_of("random", arrival_limit=7).requests == plan_of("random").requests[:7]


def test_a_workloads_defaults_may_be_read_and_say_what_they_are() -> None:
    for workload in WORKLOADS.values():
        for field in dataclasses.fields(workload):
            assert field.metadata["what"], field.name
    assert WORKLOADS["random"] == dataclasses.replace(WORKLOADS["random"], prompt_tokens=Fixed(512))


def spelled(value: Any) -> str:
    return str(value) if isinstance(value, int | float) else str(value.facts()["spelling"])


@EVERY
def test_the_page_has_every_parameter_with_its_default(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    workload: Any = WORKLOADS[name]
    assert f"`{name}`" in page
    for field in dataclasses.fields(workload):
        default = spelled(getattr(workload, field.name))
        rows = [line for line in page.splitlines() if line.startswith(f"| `{field.name}` |")]
        assert any(f"`{default}`" in row for row in rows), f"{name}: {field.name} = {default}"


def test_the_page_has_every_spelling() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for spelling in (*pacers_module.SPELLINGS.values(), *lengths_module.SPELLINGS.values()):
        assert f"`{spelling}`" in page, spelling

"""Every workload, sent in virtual time to a server of known speed: what the plan says is what happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from baton.testing import in_virtual_time
from bench.generator.sender import send_plan
from bench.generator.target import TargetEvent, Tokens
from bench.results.records import Outcome
from bench.traffic.draft import Draft
from bench.traffic.pacers import Poisson
from bench.traffic.plan import PlannedRequest
from bench.traffic.prompts import PromptMaker
from bench.traffic.traces import Trace, TraceRow, plan_from_trace
from bench.traffic.workloads import WORKLOADS, make_plan

PROMPTS = PromptMaker.without_tokenizer(30_000)
TTFT_S = 0.25
GAP_S = 0.01


class SteadyServer:
    """Serves any number at once, each with the same times."""

    async def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        for token in range(request.output_token_count):
            await asyncio.sleep(GAP_S if token else TTFT_S)
            yield Tokens(asyncio.get_running_loop().time(), 1)

    async def close(self) -> None:
        return


@pytest.mark.parametrize("name", WORKLOADS)
@in_virtual_time
async def test_what_a_workload_plans_is_what_is_sent(name: str) -> None:
    # Agent prompts that grow and long answers, small enough to be quick.
    plan = make_plan(name, pacer=Poisson(2.0), duration_s=12.0, seed=1, prompts=PROMPTS, scale=0.1)
    records = await send_plan(plan, SteadyServer(), timeout_s=600.0)
    assert [record.index for record in records] == [request.index for request in plan.requests]
    for record, request in zip(records, plan.requests, strict=True):
        assert record.lag_s == pytest.approx(0.0, abs=1e-6)
        assert record.group == request.group
        if request.cancel_after_s is None:
            assert record.outcome is Outcome.OK
            assert record.output_token_count == request.output_token_count
            assert record.ttft_s == pytest.approx(TTFT_S, abs=1e-6)
        else:
            answer_s = TTFT_S + GAP_S * (request.output_token_count - 1)
            leaves = request.cancel_after_s < answer_s
            assert record.outcome is (Outcome.CANCELLED if leaves else Outcome.OK)
        if request.after is None:
            assert record.intended_at_s == pytest.approx(request.at_s)
        else:
            due_s = records[request.after].ended_at_s + request.at_s
            assert record.intended_at_s == pytest.approx(due_s, abs=1e-6)


@in_virtual_time
async def test_a_trace_is_sent_at_its_own_times() -> None:
    rows = tuple(TraceRow(0.3 * i, 50 + i, 1 + i % 7, (i % 3,)) for i in range(40))
    plan = plan_from_trace(Trace("t", "plain", "0", rows), PROMPTS, seed=1, rate_scale=2.0)
    records = await send_plan(plan, SteadyServer(), timeout_s=60.0)
    assert [record.sent_at_s for record in records] == pytest.approx([0.15 * i for i in range(40)], abs=1e-6)
    assert [record.prompt_token_count for record in records] == [50 + i for i in range(40)]
    assert [record.output_token_count for record in records] == [1 + i % 7 for i in range(40)]


def test_a_turn_that_does_not_fit_is_not_added_to_a_draft() -> None:
    draft = Draft(seed=1, prompts=PROMPTS, scale=1.0, context_token_count=100)
    draft.start(0.0, tuple(range(10)), 10)
    with pytest.raises(ValueError, match="does not fit the context"):
        draft.follow(0.0, tuple(range(95)), 10)

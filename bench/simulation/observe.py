"""Observe, replay: the plan of a measured run, made again from its facts, and sent to the simulation.

A run keeps no prompt. Its facts name what made every one of them (workload, parameters, pacer, seed, scale), so the
plan is made again and then held against the records: lengths of every request, intended times of all that had one of
their own. A plan that differs anywhere is refused, for a comparison with it would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.results.run_data import RunData
from bench.simulation.profile import Profile
from bench.simulation.simulate import DEFAULT_TIMEOUT_S, simulate
from bench.traffic.pacers import parse_pacer
from bench.traffic.plan import Plan
from bench.traffic.prompts import PromptMaker
from bench.traffic.traces import plan_from_trace, read_trace
from bench.traffic.workloads import make_plan
from fleet.config import FleetConfig

TIME_TOLERANCE_S = 1e-3
"""Between an intended time of the plan made again and that of the record: runs keep microseconds, and spellings of
rates may be rounded."""


class ReplayError(Exception):
    """The run cannot be replayed: why, and what to do."""


def replay(
    measured: RunData,
    profile: Profile,
    cluster: FleetConfig,
    prompts: PromptMaker,
    *,
    seed: int = 0,
    trace_path: Path | None = None,
) -> RunData:
    """The run as the simulation has it. Raises ``ReplayError``."""
    plan = plan_of(measured, prompts, trace_path=trace_path)
    timeout_s = measured.facts.get("timeout_s")
    return simulate(
        plan,
        profile,
        cluster,
        seed=seed,
        timeout_s=float(timeout_s) if isinstance(timeout_s, int | float) else DEFAULT_TIMEOUT_S,
    )


def plan_of(measured: RunData, prompts: PromptMaker, *, trace_path: Path | None = None) -> Plan:
    """The plan that was sent, checked against what is known of it. Raises ``ReplayError``."""
    facts = measured.facts.get("plan")
    if not isinstance(facts, Mapping):
        raise ReplayError("the run has no facts of its plan: measure it again")
    try:
        plan = _made_again(facts, prompts, trace_path)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(f"its plan cannot be made again ({error}): measure it again with this version") from error
    if "reprompted" in facts:
        plan = reprompted(plan, int(facts["reprompted"]))
    _check(plan, measured)
    return plan


def reprompted(plan: Plan, turn: int) -> Plan:
    """The same plan with other words: each token becomes another one, the same for the same, so that lengths, times
    and shared prefixes stay and nothing is found in a cache that an earlier run has filled. Token ids only."""
    used = sorted({token for request in plan.requests for token in request.prompt_token_ids})
    step = turn * 7919 % len(used)
    other = dict(zip(used, used[step:] + used[:step], strict=True))
    requests = tuple(
        replace(request, prompt_token_ids=tuple(other[token] for token in request.prompt_token_ids))
        for request in plan.requests
    )
    return replace(plan, requests=requests, facts={**plan.facts, "reprompted": turn})


def _made_again(facts: Mapping[str, Any], prompts: PromptMaker, trace_path: Path | None) -> Plan:
    if facts["workload"] == "trace":
        return _from_trace(facts, prompts, trace_path)
    return make_plan(
        facts["workload"],
        pacer=parse_pacer(_exact_spelling(facts["pacer"])),
        duration_s=facts["duration_s"],
        seed=facts["seed"],
        prompts=prompts,
        scale=facts["scale"],
        context_token_count=facts["context_token_count"],
        arrival_limit=facts["arrival_limit"],
        parameters={name: _spelled(value) for name, value in facts["parameters"].items()},
    )


def _from_trace(facts: Mapping[str, Any], prompts: PromptMaker, trace_path: Path | None) -> Plan:
    if trace_path is None:
        raise ReplayError("the run replayed a trace: name its file with --trace")
    trace, pacer = read_trace(trace_path), facts["pacer"]
    if trace.facts() != facts["trace"]:
        raise ReplayError(f"{trace_path} is not the trace of the run: its facts differ")
    return plan_from_trace(
        trace,
        prompts,
        seed=facts["seed"],
        start_s=pacer["start_s"],
        end_s=math.inf if pacer["end_s"] is None else pacer["end_s"],
        rate_scale=pacer["rate_scale"],
        keep_share=pacer["keep_share"],
        jitter=repr(pacer["bin_s"]),  # as it was found or given, whichever way
        length_scale=facts["length_scale"],
        context_token_count=facts["context_token_count"],
        too_long=facts["too_long"],
        request_limit=facts["request_limit"],
    )


def _exact_spelling(pacer: Mapping[str, Any]) -> str:
    """A pacer's spelling, with its rate to the last digit where it has one."""
    spelling = str(pacer["spelling"])
    rate = pacer.get("rate_per_s")
    name, _, rest = spelling.partition(":")
    if name not in ("constant", "poisson", "gamma", "weibull") or rate is None:
        return spelling
    named = [part for part in rest.split(",") if "=" in part]
    return f"{name}:{','.join([repr(float(rate)), *named])}"


def _spelled(value: Any) -> object:
    """A parameter's fact as ``make_plan`` reads it."""
    return value["spelling"] if isinstance(value, Mapping) else value


def _check(plan: Plan, measured: RunData) -> None:
    requests = {request.index: request for request in plan.requests}
    if not measured.records:
        raise ReplayError("the run has no records")
    for record in measured.records:
        request = requests.get(record.index)
        if request is None:
            raise ReplayError(f"request {record.index} of the run is not in the plan made again")
        ours = (len(request.prompt_token_ids), request.output_token_count)
        if ours != (record.prompt_token_count, record.output_token_limit):
            raise ReplayError(f"request {record.index} has other lengths in the plan made again")
        if request.after is None and abs(request.at_s - record.intended_at_s) > TIME_TOLERANCE_S:
            raise ReplayError(f"request {record.index} has another time in the plan made again")

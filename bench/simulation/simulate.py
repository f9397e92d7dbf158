"""Runs a plan against the simulated cluster, in virtual time, and keeps what a measured run would keep.

The plan is sent by the generator's own sender, so intended times, lags, outcomes and latencies mean the same as
in a measured run; facts say ``kind = "simulated"``. Deterministic: the same plan, profile, configuration and seed
give the same records to the last digit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any

from baton.request import Role
from baton.testing import run_virtual
from bench.generator.sender import RunState, calm_collector, send_plan
from bench.results.records import RequestRecord, TimelineSample
from bench.results.run_data import RunData
from bench.simulation.cluster import sampling, simulated_cluster
from bench.simulation.profile import Profile, to_toml
from bench.simulation.target import SimulatedTarget
from bench.traffic.plan import Plan
from fleet.config import ConfigError, FleetConfig

DEFAULT_TIMEOUT_S = 300.0
LOOK_AHEAD_STEP_COUNT = 32
GRACE_S = 7200.0
"""Of virtual time after the last arrival; a run that needs more is stuck, and said to be."""


def simulate(
    plan: Plan,
    profile: Profile,
    cluster: FleetConfig,
    *,
    seed: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    label: str = "simulated",
    look_ahead_step_count: int = LOOK_AHEAD_STEP_COUNT,
) -> RunData:
    """``cluster``: the file that a real cluster would be started from. ``seed``: of the simulation's own chance
    (noise, ties between workers); the plan has its own. ``timeout_s``: of each request."""
    began_at = time.process_time()
    records, samples, simulated_s = run_virtual(
        _run(plan, profile, cluster, seed, timeout_s, look_ahead_step_count),
        limit_s=plan.duration_s + timeout_s + GRACE_S,
    )
    cpu_s = time.process_time() - began_at
    facts = run_facts(plan, profile, cluster, seed=seed, label=label, timeout_s=timeout_s)
    facts["simulation"] |= {"simulated_s": simulated_s, "cpu_s": cpu_s}
    return RunData(facts=facts, records=records, samples=samples)


async def _run(
    plan: Plan, profile: Profile, config: FleetConfig, seed: int, timeout_s: float, look_ahead_step_count: int
) -> tuple[list[RequestRecord], list[TimelineSample], float]:
    samples: list[TimelineSample] = []
    started_at_s: list[float] = []

    def note_start(state: RunState) -> None:
        started_at_s.append(state.started_at_s)

    with calm_collector():
        async with (
            simulated_cluster(config, profile, seed=seed, look_ahead_step_count=look_ahead_step_count) as cluster,
            sampling(cluster, started_at_s, samples),
        ):
            records = await send_plan(plan, SimulatedTarget(cluster), timeout_s=timeout_s, observer=note_start)
    ended_at_s = max((record.ended_at_s for record in records), default=0.0)
    return records, samples, max(ended_at_s, plan.duration_s)


def run_facts(
    plan: Plan, profile: Profile, cluster: FleetConfig, *, seed: int, label: str, timeout_s: float
) -> dict[str, Any]:
    """Of a simulated run: those of a measured one, without a machine's, and what the simulation rests on."""
    counts = {role.value: cluster.pools[role].count for role in Role}
    return {
        "kind": "simulated",
        "label": label,
        "target": {"kind": "simulated", "address": None},
        "plan": {"workload": plan.name, "duration_s": plan.duration_s, **plan.facts},
        "model": cluster.model.name,
        "worker_counts": counts,
        "timeout_s": timeout_s,
        "valid": True,
        "invalid_reasons": [],
        "simulation": {
            "seed": seed,
            "profile_sha256": profile_digest(profile),
            "profile_provenance": dict(profile.provenance),
            "limits": {
                role.value: {
                    "max_batched_token_count": cluster.engines[role].max_batched_token_count,
                    "max_running_count": cluster.engines[role].max_running_count,
                    "kv_cache_bytes": cluster.engines[role].kv_cache_bytes,
                }
                for role in Role
                if counts[role.value]
            },
            "placement": cluster.router.placement,
        },
    }


def profile_digest(profile: Profile) -> str:
    """Of everything in it."""
    return hashlib.sha256(to_toml(profile).encode()).hexdigest()


def with_counts(config: FleetConfig, *, prefill: int | None, decode: int | None) -> FleetConfig:
    """``config`` with other numbers of workers; the cores named for them go, for a simulation has none. Raises
    ``ConfigError``."""
    wanted = {Role.PREFILL: prefill, Role.DECODE: decode}
    pools = {
        role: pool if (count := wanted[role]) is None else dataclasses.replace(pool, count=count, cores=())
        for role, pool in config.pools.items()
    }
    if pools[Role.DECODE].count < 1:
        raise ConfigError("decode.count: is 0; without a decode worker nothing can be generated, give at least 1")
    return dataclasses.replace(config, pools=pools)

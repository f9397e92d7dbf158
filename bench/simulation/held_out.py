"""Runs held out from calibration: which, and how they are measured on real clusters, one after the other.

Half go to one prefill and one decode worker, half to two aggregated workers, at 30 to 70% of what those can do. The
first of each half is measured a second time at its end, so that the machine can be held against itself. No run here
is among the loads of `baton bench calibrate`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.simulation.observe import reprompted
from bench.traffic.pacers import parse_pacer
from bench.traffic.plan import Plan
from bench.traffic.prompts import PromptMaker
from bench.traffic.workloads import make_plan
from fleet.config import FleetConfig, load_config

TIMEOUT_S = 120.0
SLO_SCALE = 4.0
"""One core of this machine is about that much slower than the servers that the presets are for."""
WARM_UP_COUNT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One held-out run. None of them is among what `baton bench calibrate` loads a cluster with."""

    name: str
    workload: str
    rate_per_s: float
    scale: float
    seed: int
    system: str
    """Of ``bench.comparison.specs``: "baton" (one prefill, one decode worker) or "baton-aggregated" (two of both)."""
    parameters: Mapping[str, object] = field(default_factory=dict)

    def plan(self, prompts: PromptMaker, duration_s: float) -> Plan:
        return make_plan(
            self.workload,
            pacer=parse_pacer(f"poisson:{self.rate_per_s!r}"),
            duration_s=duration_s,
            seed=self.seed,
            prompts=prompts,
            scale=self.scale,
            parameters=self.parameters,
        )


_BURSTS = {"burst_size": 3, "burst_every_s": 9.0}
CONFIGURATIONS = tuple(
    Configuration(name=f"{label} {where}", system=system, seed=seed + 100 * number, **values)  # type: ignore[arg-type]
    for number, (system, where) in enumerate((("baton", "1P+1D"), ("baton-aggregated", "2 aggregated")))
    for seed, (label, values) in enumerate(
        (
            ("chat 0.8/s", {"workload": "chat", "rate_per_s": 0.8, "scale": 0.5}),
            ("chat 1.6/s", {"workload": "chat", "rate_per_s": 1.6, "scale": 0.5}),
            ("long prompts 0.5/s", {"workload": "summarisation", "rate_per_s": 0.5, "scale": 0.25}),
            ("long prompts 0.9/s", {"workload": "summarisation", "rate_per_s": 0.9, "scale": 0.25}),
            ("bursts", {"workload": "chat-bursts", "rate_per_s": 0.6, "scale": 0.5, "parameters": _BURSTS}),
            ("long output", {"workload": "long-output", "rate_per_s": 0.4, "scale": 0.2}),
        ),
        start=4001,
    )
)
QUICK = (CONFIGURATIONS[1], CONFIGURATIONS[7])


@dataclass(frozen=True, slots=True)
class Run:
    """A directory with a measured run. ``repeats``: the run of the same configuration that came before it."""

    configuration: Configuration
    directory: Path
    repeats: Path | None = None


def measure_all(
    configurations: Sequence[Configuration], config_path: Path, out: Path, duration_s: float, prompts: PromptMaker
) -> tuple[list[Run], list[str]]:
    """Both clusters, one after the other. Returns what was measured, and what failed in words."""
    from baton import event_loop
    from bench.peers import SYSTEMS, start_system

    config = load_config(config_path)
    runs: list[Run] = []
    failures: list[str] = []
    for system_name in dict.fromkeys(each.system for each in configurations):
        mine = [each for each in configurations if each.system == system_name]
        _say(f"starting {system_name}")
        try:
            system = start_system(SYSTEMS[system_name], config, config_path, out / "logs")
        except Exception as error:
            failures.append(f"{system_name} did not start ({type(error).__name__})")
            continue
        try:
            with event_loop.runner() as runner:
                counts = system.facts["worker_counts"]
                runner.run(
                    _measure_one_cluster(mine, system.target_address, config, out, duration_s, prompts, runs, counts)
                )
            system.assert_running()
        except Exception as error:
            failures.append(f"{system_name} was given up ({type(error).__name__}: {str(error)[:200]!r})")
        finally:
            system.stop()
    return runs, failures


async def _measure_one_cluster(
    configurations: Sequence[Configuration],
    address: str,
    config: FleetConfig,
    out: Path,
    duration_s: float,
    prompts: PromptMaker,
    runs: list[Run],
    worker_counts: Mapping[str, int],
) -> None:
    from bench.generator.baton_target import BatonTarget
    from bench.generator.measure import Measurement, measure

    target = BatonTarget(address)
    measurement = Measurement(
        label="measured",
        target={"kind": "baton", "address": address},
        model=config.model.name,
        timeout_s=TIMEOUT_S,
        worker_counts={role: count for role, count in worker_counts.items() if count},
        slo_scale=SLO_SCALE,
        admin_address=config.router.admin_address,
        is_quiet=True,
    )
    try:
        await _warm_up(target, prompts)
        turns = [*configurations, configurations[0]] if len(configurations) > 1 else list(configurations)
        for turn, configuration in enumerate(turns):
            is_repeat = turn >= len(configurations)
            plan = configuration.plan(prompts, duration_s)
            directory = out / _slug(configuration.name, is_repeat=is_repeat)
            if is_repeat:
                plan = reprompted(plan, 1)  # or the prefix cache would know every prompt
            _say(f"measuring {directory.name}: {len(plan.requests)} requests")
            await measure(plan, target, directory, measurement)
            repeats = out / _slug(configuration.name) if is_repeat else None
            runs.append(Run(configuration, directory, repeats))
    finally:
        await target.close()


async def _warm_up(target: Any, prompts: PromptMaker) -> None:
    """First contacts and first steps are not what is compared."""
    from bench.traffic.plan import PlannedRequest

    for number in range(WARM_UP_COUNT):
        request = PlannedRequest(
            index=-1 - number,
            at_s=0.0,
            prompt_token_ids=prompts.tokens(f"accuracy warm-up {number}", 600),
            output_token_count=8,
        )
        async for _ in target.generate(request, timeout_s=TIMEOUT_S):
            pass


def _slug(name: str, *, is_repeat: bool = False) -> str:
    words = "".join(letter if letter.isalnum() or letter in ".+" else "-" for letter in name).lower()
    return f"{words}-again" if is_repeat else words


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

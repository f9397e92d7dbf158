"""One run from plan to directory: sends the plan, watches machine and servers meanwhile, judges it, writes it down.

What ``baton bench run`` does with each plan; the comparison has several systems side by side and calls ``send_plan``
itself. Owns the run's writer, timeline and progress; the target is the
caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.generator.environment import Watch, environment_facts
from bench.generator.priority import ahead_of_the_servers
from bench.generator.progress import Progress
from bench.generator.sender import RunState, calm_collector, send_plan
from bench.generator.target import Target
from bench.generator.timeline import Timeline, as_facts
from bench.generator.validity import reasons_against, schedule_of
from bench.results.records import RequestRecord
from bench.results.run_data import RunData
from bench.results.slo import Slo
from bench.results.store import RecordWriter
from bench.traffic.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a run is beside its plan and its target."""

    label: str
    target: Mapping[str, Any]
    """Fit for JSON: kind, address, and what matters of how it is asked."""
    model: str
    timeout_s: float
    worker_counts: Mapping[str, int] | None = None
    max_in_flight: int | None = None
    slo: Slo | None = None
    """Of the live progress, already scaled."""
    slo_scale: float = 1.0
    admin_address: str | None = None
    metrics_url: str | None = None
    is_quiet: bool = False
    more_facts: Mapping[str, Any] = field(default_factory=dict)


async def measure(plan: Plan, target: Target, directory: Path, measurement: Measurement) -> RunData:
    """Runs it and returns it as it lies in ``directory``, valid or not. Raises ``StoreError`` where a run lies there.

    Cancelled, it completes the run with what there is, marked as interrupted, and raises ``CancelledError``.
    """
    facts = _facts_before(plan, measurement)
    records: list[RequestRecord] = []
    with RecordWriter(directory, facts) as writer:

        def keep(record: RequestRecord) -> None:
            records.append(record)
            writer.add(record)

        timeline = Timeline(
            admin_address=measurement.admin_address,
            metrics_url=measurement.metrics_url,
            on_sample=writer.add_sample,
        )
        progress = Progress(measurement.slo, title=f"{measurement.label}: {plan.name}", is_quiet=measurement.is_quiet)

        def observe(state: RunState) -> None:
            writer.facts["zero_at_monotonic_s"] = state.started_at_s  # what a log of the same machine is laid beside
            timeline.start(state.started_at_s)
            progress.observe(state)

        watch = Watch.start()
        is_interrupted = False
        try:
            with calm_collector(), ahead_of_the_servers() as niceness:
                writer.facts["generator_niceness"] = niceness
                await send_plan(
                    plan,
                    target,
                    timeout_s=measurement.timeout_s,
                    on_record=keep,
                    observer=observe,
                    max_in_flight=measurement.max_in_flight,
                )
        except asyncio.CancelledError:
            is_interrupted = True
            raise
        finally:
            during = watch.since()
            await timeline.close()
            await progress.close()
            schedule = schedule_of(records, len(plan.requests))
            reasons = reasons_against(
                schedule,
                records,
                steal_share=during["steal_share"],
                is_interrupted=is_interrupted,
                max_in_flight=measurement.max_in_flight,
            )
            writer.facts |= {
                "valid": not reasons,
                "invalid_reasons": reasons,
                "schedule": schedule.as_json(),
                "machine": {**facts["machine"], "during": during},
                "timeline": as_facts(timeline),
            }
            if is_interrupted:
                writer.close()
        if (counting := getattr(target, "counting", None)) is not None:
            writer.facts["target"] = {**facts["target"], "counting": counting}
        return writer.close()


def _facts_before(plan: Plan, measurement: Measurement) -> dict[str, Any]:
    """What is known before anything was sent; a run that is cut off keeps these."""
    bound = measurement.max_in_flight
    return {
        "kind": "measured",
        "label": measurement.label,
        "target": dict(measurement.target),
        "plan": {
            **plan.facts,
            "workload": plan.name,
            "duration_s": plan.duration_s,
            "request_count": len(plan.requests),
            "prompt_token_count": sum(len(request.prompt_token_ids) for request in plan.requests),
            "output_token_count": sum(request.output_token_count for request in plan.requests),
        },
        "machine": environment_facts(),
        "model": measurement.model,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "worker_counts": None if measurement.worker_counts is None else dict(measurement.worker_counts),
        "valid": False,
        "invalid_reasons": ["The run did not end."],
        "slo_scale": measurement.slo_scale,
        "slo": None if measurement.slo is None else measurement.slo.name,
        "loop": "open" if bound is None else f"closed at {bound}",
        "timeout_s": measurement.timeout_s,
        **measurement.more_facts,
    }

"""Turns of the systems on one machine: who comes when, and one system's turn from its start to its end.

The machine has too few cores for the systems to run at once, so they take turns in mirrored order (A B C, C B A),
each with its processes alive in its turn only. A drift of the machine then hits all alike.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any, TypeVar

from bench.comparison.cells import Cell, CellPlans, beyond
from bench.generator.sender import calm_collector, send_plan
from bench.generator.target import Target
from bench.machine import MachineClock
from bench.peers import RunningSystem
from bench.results.records import Outcome, RequestRecord, was_sent
from bench.results.statistics import percentile
from bench.results.store import request_as_json
from bench.traffic.plan import Plan

T = TypeVar("T")
STEAL_LIMIT = 0.02
OTHERS_LIMIT = 0.10
LAG_LIMIT_S = 0.005
CALM_DEADLINE_S = 60.0
"""Longest wait after a load for a system to be done with what it was left with."""
CALM_FACTOR = 2.0
PROBE_PAUSE_S = 0.2


def block_order(systems: Sequence[T], pass_count: int) -> list[T]:
    """A B C, then C B A, and so on: a drift of the machine hits all alike."""
    return [system for number in range(pass_count) for system in (systems if number % 2 == 0 else systems[::-1])]


def turn_order(often: Sequence[T], once: Sequence[T], pass_count: int) -> list[tuple[int, T]]:
    """Turns with the number of their pass. Who has one turn has it after the first pass, with its requests."""
    turns = [(place // len(often), system) for place, system in enumerate(block_order(often, pass_count))]
    return [*turns[: len(often)], *((0, system) for system in once), *turns[len(often) :]]


class Turn:
    """One system's turn. ``write`` gets a document for each cell and each request as they end."""

    def __init__(
        self,
        system: RunningSystem,
        connect: Callable[[RunningSystem], Target],
        plans: CellPlans,
        *,
        block: int,
        round_number: int,
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        self._system, self._connect, self._plans = system, connect, plans
        self._block, self._round, self._write = block, round_number, write
        self._shares: dict[str, tuple[float, float]] = {}
        self._calm_s = 0.0

    async def run(self, cells: Sequence[Cell]) -> None:
        async with AsyncExitStack() as stack:
            target = self._connect(self._system)
            stack.push_async_callback(target.close)
            await self._warm_up(target)
            for cell in cells:
                if beyond(cell, self._shares):
                    self._cell(cell, skipped="a lower rate was beyond this system already")
                    continue
                await self._run_cell(cell, target)
                self._system.assert_running()

    async def _warm_up(self, target: Target) -> None:
        """First contacts (connections, handshakes, first kernels) are paid here, by rule, and not counted."""
        await self._ask(self._plans.warm_up(self._round), target, timeout_s=120.0)
        probes = await self._ask(self._plans.probe(self._round, 0, count=3), target, timeout_s=60.0)
        times = [record.e2e_s for record in probes if record.e2e_s is not None]
        if not times:
            raise RuntimeError(f"{self._system.spec.name} answers nothing: {probes[0].error}")
        self._calm_s = CALM_FACTOR * percentile(times, 50.0)

    async def _until_calm(self, target: Target) -> float:
        """Waits until a short request takes what it takes on an idle system; the seconds waited."""
        started_at, loop = asyncio.get_running_loop().time(), asyncio.get_running_loop()
        for number in itertools.count(1):
            (probe,) = await self._ask(self._plans.probe(self._round, number), target, timeout_s=CALM_DEADLINE_S)
            waited_s = loop.time() - started_at
            is_calm = probe.e2e_s is not None and probe.e2e_s <= self._calm_s
            if is_calm or waited_s > CALM_DEADLINE_S:
                return waited_s
            await asyncio.sleep(PROBE_PAUSE_S)
        raise AssertionError

    async def _run_cell(self, cell: Cell, target: Target) -> None:
        calm_wait_s = await self._until_calm(target)
        plan = self._plans.plan(cell, self._round)
        machine, own = MachineClock.read(), time.process_time()
        system_cpu = self._system.cpu()
        records = await self._ask(plan, target, timeout_s=cell.timeout_s)
        spent = self._system.cpu().since(system_cpu)
        own_s = time.process_time() - own
        use = MachineClock.read().use_since(machine, own_s + spent.total_s)
        answered = [record for record in records if record.outcome is Outcome.OK]
        if cell.rate_per_s is not None:
            self._shares[cell.workload] = (cell.rate_per_s, len(answered) / max(1, len(records)))
        lags = [record.lag_s for record in records if was_sent(record)]
        lag_p99_s = percentile(lags, 99.0) if lags else 0.0
        remarks = []
        if lag_p99_s > LAG_LIMIT_S:
            remarks.append(f"schedule lag p99 {lag_p99_s * 1e3:.1f} ms")
        if use.steal_share > STEAL_LIMIT:
            remarks.append(f"steal {use.steal_share:.1%}")
        if use.others_share > OTHERS_LIMIT:
            remarks.append(f"others used {use.others_share:.0%} of the machine")
        self._cell(
            cell,
            request_count=len(records),
            plan=plan.facts,
            cpu_s=round(spent.total_s, 2),
            generator_cpu_s=round(own_s, 2),
            span_s=round(_span_s(records), 3),
            lag_p99_ms=round(lag_p99_s * 1e3, 2),
            machine={key: round(share, 4) for key, share in asdict(use).items()},
            calm_wait_s=round(calm_wait_s, 1),
            remarks=remarks,
        )
        for record in records:
            self._write({"document": "request", **self._names(cell), **_compact(record)})
        _say(f"    {cell.name}: {len(answered)} of {len(records)} answered in {_span_s(records):.0f} s")

    async def _ask(self, plan: Plan, target: Target, *, timeout_s: float) -> list[RequestRecord]:
        with calm_collector():
            return await send_plan(plan, target, timeout_s=timeout_s)

    def _names(self, cell: Cell) -> dict[str, Any]:
        return {
            "system": self._system.spec.name,
            "block": self._block,
            "pass": self._round,
            "cell": cell.name,
        }

    def _cell(self, cell: Cell, **facts: Any) -> None:
        self._write({"document": "cell", **self._names(cell), "group_name": cell.group, **facts})


def _span_s(records: Sequence[RequestRecord]) -> float:
    if not records:
        return 0.0
    return max(record.ended_at_s for record in records) - min(record.intended_at_s for record in records)


def _compact(record: RequestRecord) -> dict[str, Any]:
    """A record with times in tenths of milliseconds: the file is for people's repositories."""
    document = request_as_json(record)
    for key in ("intended_at_s", "sent_at_s", "ended_at_s"):
        document[key] = round(document[key], 4)
    document["message_at_s"] = [round(at, 4) for at in document["message_at_s"]]
    if document.get("phases_s"):
        document["phases_s"] = {phase: round(seconds, 4) for phase, seconds in document["phases_s"].items()}
    return {key: value for key, value in document.items() if value not in (None, "")}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

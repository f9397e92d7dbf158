"""Transfers that fail, hang, arrive stale or damaged, and releases that are lost, late or doubled: in virtual time.

A scenario is made from its seed alone: the real router in front of real workers on simulated engines, whose every
pull may meet a fault. What must hold whatever happens:

* what a caller heard is a prefix of the one right answer, and a complete answer is the right one;
* while no worker dies, every answer completes;
* once the last read that could still write is over and the last lease has ended, nothing is held anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.errors import engine_failed
from baton.testing import run_virtual
from bench.simulated_deaths import EXCUSES, Failure, Report, quietly
from bench.virtual_cluster import Heard, ProcessClient, VirtualCluster, WorkerProcess, virtual_cluster
from kvtransfer.faults import FaultPlan
from kvtransfer.simulated import Misfortune
from router.flight import FlightLimits

PROBABILITIES = (1 / 16, 1 / 4)
PULL_TIMEOUT_S = 2.0
STUCK_S = 20.0
LEASE_S = 15.0
LATE_S = 5.0
CALLER_COUNT = 16
SAY_EVERY = 200


@dataclass(slots=True)
class Seen:
    """What one scenario, or many, came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    quarantined_count: int = 0

    def add(self, other: Seen) -> None:
        self.outcomes += other.outcomes
        self.attempts += other.attempts
        self.reasons += other.reasons
        self.faults += other.faults
        self.quarantined_count += other.quarantined_count


class FaultyReleases:
    """Makes clients whose releases are lost, late or doubled."""

    def __init__(self, seed: int, probability: float) -> None:
        self.rng = random.Random(f"{seed}/releases")  # noqa: S311 replayable misfortune
        self.probability = probability
        self.counts: Counter[str] = Counter()

    def connect(self, process: WorkerProcess) -> ProcessClient:
        return _FaultyClient(process, self)


class _FaultyClient(ProcessClient):
    def __init__(self, process: WorkerProcess, faults: FaultyReleases) -> None:
        super().__init__(process)
        self._faults = faults
        self._worker_id = process.worker_id

    async def release_kv(self, ticket_id: str, *, timeout_s: float) -> bool:
        faults = self._faults
        if faults.rng.random() >= faults.probability:
            return await super().release_kv(ticket_id, timeout_s=timeout_s)
        kind = faults.rng.choice(("lost", "lost with its answer", "late", "doubled"))
        faults.counts[f"release message {kind}"] += 1
        match kind:
            case "lost":
                await asyncio.sleep(timeout_s)
                raise engine_failed(self._worker_id, "did not answer")
            case "lost with its answer":
                await super().release_kv(ticket_id, timeout_s=timeout_s)
                raise engine_failed(self._worker_id, "the connection broke")
            case "late":
                await asyncio.sleep(min(LATE_S, timeout_s))
            case "doubled":
                await super().release_kv(ticket_id, timeout_s=timeout_s)
        return await super().release_kv(ticket_id, timeout_s=timeout_s)


def run_faults(
    request_count: int, seed: int, say: Callable[[str], None], probabilities: tuple[float, ...] = PROBABILITIES
) -> Report:
    """Runs scenarios until ``request_count`` requests were asked, half of them at each probability."""
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    drawn: Counter[str] = Counter()
    scenario_count = -(-request_count // (CALLER_COUNT * len(probabilities)))
    with quietly(logging.ERROR):
        for probability in probabilities:
            total = Seen()
            for number in range(scenario_count):
                try:
                    total.add(run_scenario(seed + number, probability))
                except Exception as error:
                    failures.append(Failure(seed + number, f"{type(error).__name__}: {error}"[:500]))
                if (number + 1) % SAY_EVERY == 0:
                    say(f"faults at {probability:g}: {number + 1} of {scenario_count}, {len(failures)} broken")
            drawn += total.faults
            rows.append(
                {
                    "probability": f"1/{round(1 / probability)}",
                    "scenarios": scenario_count,
                    "requests": sum(total.outcomes.values()),
                    "outcomes": _listed(total.outcomes),
                    "attempts": _listed(total.attempts),
                    "KV recomputed because": _listed(total.reasons),
                    "pulls in quarantine at the end": total.quarantined_count,
                }
            )
    asked_count = sum(row["requests"] for row in rows)
    summary = [
        f"{asked_count} requests in {scenario_count * len(rows)} scenarios from seed {seed}; "
        "simulated_faults.run_scenario(seed, probability) replays one",
        "every third scenario kills and restarts a worker, every ninth caller leaves early",
        f"faults met: {_listed(drawn)}",
        f"wrong outputs, leaks and unexcused errors: {len(failures)}",
    ]
    return Report(summary, rows, failures)


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def run_scenario(seed: int, probability: float) -> Seen:
    """One scenario. Raises ``AssertionError`` (or what went wrong) when a promise is broken."""
    return run_virtual(_scenario(seed, probability))


async def _scenario(seed: int, probability: float) -> Seen:
    rng = random.Random(f"{seed}/{probability}")  # noqa: S311 replayable misfortune
    seen = Seen()
    misfortune = Misfortune(
        FaultPlan(allow_faults=True, probability=probability, seed=seed, stuck_s=STUCK_S), probability
    )
    releases = FaultyReleases(seed, probability)
    is_deadly = rng.random() < 1 / 3
    async with virtual_cluster(
        rng.randint(1, 2),
        rng.randint(2, 3),
        sim={"pull_timeout_s": PULL_TIMEOUT_S},
        rest_s=STUCK_S + PULL_TIMEOUT_S + LEASE_S + LATE_S + 30.0,
        flight=FlightLimits(lease_s=LEASE_S),
        misfortune=misfortune,
        connect=releases.connect,
    ) as cluster:
        callers = [asyncio.create_task(_caller(cluster, rng)) for _ in range(CALLER_COUNT)]
        deaths = asyncio.create_task(_deaths(cluster, random.Random(rng.random()), is_deadly))  # noqa: S311
        for heard in await asyncio.gather(*callers):
            if heard.error is not None:
                assert is_deadly, f"nobody died: {heard.error!r}"
                assert heard.error.reason in EXCUSES, heard.error
            _note(seen, heard)
        await deaths
        seen.quarantined_count = sum(process.engine.quarantined_count for process in cluster.processes.values())
    drawn = {name: count for name, count in misfortune.dice.counts().items() if "." in name}
    seen.faults += Counter(drawn) + Counter({each.value: n for each, n in misfortune.damaged.items()})
    seen.faults += releases.counts
    return seen


async def _caller(cluster: VirtualCluster, rng: random.Random) -> Heard:
    arrives_s = rng.random() * 2.0
    leaves_s = rng.random() if rng.random() < 1 / 9 else None
    request = cluster.request(rng.choice((1, 16, 17, 32, rng.randint(2, 300))), rng.choice((1, 2, 8, 40)))
    heard = Heard()
    await asyncio.sleep(arrives_s)
    asking = asyncio.create_task(cluster.ask(request, heard=heard))
    if leaves_s is not None:
        await asyncio.wait([asking], timeout=leaves_s)
        asking.cancel()
    await asyncio.wait([asking])
    if not asking.cancelled():
        asking.result()  # raises what the grammar checks found
    want = cluster.expected(request)
    assert heard.tokens == want[: len(heard.tokens)], "not a prefix of the right answer"
    if heard.completed is not None:
        assert heard.tokens == want, "complete, and not the right answer"
    return heard


async def _deaths(cluster: VirtualCluster, rng: random.Random, is_deadly: bool) -> None:
    """A worker dies and comes back under its name and address: a new epoch, of which its peers know nothing."""
    for _ in range(rng.randint(1, 2) if is_deadly else 0):
        await asyncio.sleep(rng.random() * 1.5)
        process = cluster.processes[rng.choice(sorted(cluster.processes))]
        process.die()
        await asyncio.sleep(rng.random() * 0.3)
        await cluster.launch(process.worker_id, process.role)


def _note(seen: Seen, heard: Heard) -> None:
    if heard.completed is None:
        seen.outcomes["left" if heard.error is None else heard.error.reason.value] += 1
        return
    seen.outcomes["complete"] += 1
    seen.attempts[heard.report.attempt_count] += 1
    if (reason := heard.report.transfer.recompute_reason) is not None:
        seen.reasons[reason.value] += 1

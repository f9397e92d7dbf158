"""Random fleets, random requests, random misfortune, in virtual time: thousands of interleavings, each replayable.

A scenario is made from its seed alone. Its requests are answered by the real router in front of real workers on
simulated engines, while workers die, come back, stop and go on, links are cut, and callers leave or run out of
time. What must hold whatever happens:

* what a caller heard is a prefix of the one right answer, without gap or repeat;
* a complete answer is the right answer, and its phases sum to its time;
* a failure is a typed error, and only in scenarios whose misfortune can excuse it;
* a second after the last request nothing is held anywhere: no leg, lease, block, place, release or task.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.errors import Reason
from baton.testing import run_virtual
from bench.virtual_cluster import Heard, VirtualCluster, virtual_cluster

EXCUSES = {Reason.ATTEMPTS_EXHAUSTED, Reason.NO_WORKER, Reason.DEADLINE_EXCEEDED, Reason.QUEUE_FULL}
SAY_EVERY = 500


@dataclass(frozen=True, slots=True)
class Failure:
    """A promise that was broken; ``run_scenario(seed)`` shows it again."""

    seed: int
    what: str


@dataclass(slots=True)
class Report:
    """``rows`` by kind of misfortune."""

    summary: list[str]
    rows: list[dict[str, Any]]
    failures: list[Failure] = field(default_factory=list)


@dataclass(slots=True)
class Seen:
    """What one scenario came to."""

    kind: str
    outcomes: Counter[str]
    attempt_count: int


KINDS = (
    "one death",
    "deaths and returns",
    "stops and returns",
    "callers leave",
    "deadlines",
    "cut links",
    "everything",
)


@contextmanager
def quietly(level: int = logging.WARNING) -> Iterator[None]:
    """The product's own warnings are not shown: misfortune is what is asked for."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def run_interleavings(count: int, seed: int, say: Callable[[str], None]) -> Report:
    """Runs ``count`` scenarios from ``seed`` on. Takes some 10 ms each."""
    seen: list[Seen] = []
    failures: list[Failure] = []
    with quietly():
        for number in range(count):
            try:
                seen.append(run_scenario(seed + number))
            except Exception as error:
                failures.append(Failure(seed + number, f"{type(error).__name__}: {error}"[:500]))
            if (number + 1) % SAY_EVERY == 0:
                say(f"interleavings: {number + 1} of {count}, {len(failures)} broken")
    rows = []
    for kind in KINDS:
        of_kind = [each for each in seen if each.kind == kind]
        outcomes = sum((each.outcomes for each in of_kind), Counter[str]())
        rows.append(
            {
                "misfortune": kind,
                "scenarios": len(of_kind),
                "requests": sum(outcomes.values()),
                "attempts": sum(each.attempt_count for each in of_kind),
                "outcomes": ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items())),
            }
        )
    requests = sum(sum(each.outcomes.values()) for each in seen)
    summary = [
        f"{count} scenarios from seed {seed}, {requests} requests; simulated_deaths.run_scenario(seed) replays one",
        f"broken promises: {len(failures)}",
    ]
    return Report(summary, rows, failures)


def run_scenario(seed: int) -> Seen:
    """One scenario. Raises ``AssertionError`` (or what went wrong) when a promise is broken."""
    return run_virtual(_scenario(random.Random(seed)))  # noqa: S311 replayable misfortune


async def _scenario(rng: random.Random) -> Seen:
    kind = rng.choice(KINDS)
    seen = Seen(kind, Counter(), 0)
    async with virtual_cluster(rng.randint(0, 2), rng.randint(2, 3)) as cluster:
        callers = [asyncio.create_task(_caller(cluster, rng, kind)) for _ in range(rng.randint(1, 8))]
        misfortune = asyncio.create_task(_misfortune(cluster, random.Random(rng.random()), kind))  # noqa: S311
        for heard, is_excused in await asyncio.gather(*callers):
            seen.outcomes[_outcome(heard)] += 1
            if heard.completed is not None:
                seen.attempt_count += heard.report.attempt_count
            elif heard.error is not None:
                assert heard.error.reason in EXCUSES, heard.error
                assert is_excused, f"{kind}: {heard.error!r}"
        await misfortune
    return seen


async def _caller(cluster: VirtualCluster, rng: random.Random, kind: str) -> tuple[Heard, bool]:
    """Asks once, perhaps leaving early. Whether an error would be excused by what was planned."""
    arrives_s, leaves_s = rng.random() * 0.3, rng.random() * 0.5
    is_leaving = kind in ("callers leave", "everything") and rng.random() < 0.5
    timeout_s = rng.random() * 0.6 + 0.01 if kind in ("deadlines", "everything") and rng.random() < 0.5 else 300.0
    request = cluster.request(rng.choice((1, 15, 16, 17, 32, rng.randint(2, 300))), rng.choice((1, 2, 8, 40)))
    heard = Heard()
    await asyncio.sleep(arrives_s)
    asking = asyncio.create_task(cluster.ask(request, timeout_s=timeout_s, heard=heard))
    if is_leaving:
        await asyncio.wait([asking], timeout=leaves_s)
        asking.cancel()
    await asyncio.wait([asking])
    if not asking.cancelled():
        asking.result()  # raises what the grammar checks found
    want = cluster.expected(request)
    assert heard.tokens == want[: len(heard.tokens)], "not a prefix of the right answer"
    if heard.completed is not None:
        assert heard.tokens == want, "complete, and not the right answer"
    return heard, kind in ("deaths and returns", "stops and returns", "everything") or timeout_s < 300.0


async def _misfortune(cluster: VirtualCluster, rng: random.Random, kind: str) -> None:
    """Ends with every worker in its place and going, so that the books can balance."""
    names = sorted(cluster.processes)
    if kind == "one death":
        await asyncio.sleep(rng.random() * 0.5)
        cluster.processes[rng.choice(names)].die()
        return
    if kind in ("callers leave", "deadlines"):
        return
    for _ in range(rng.randint(1, 4)):
        await asyncio.sleep(rng.random() * 0.3)
        name = rng.choice(names)
        process = cluster.processes[name]
        deeds = {"deaths and returns": ("die",), "stops and returns": ("stop",), "cut links": ("cut",)}
        match rng.choice(deeds.get(kind, ("die", "stop", "cut"))):
            case "die":
                process.die()
                await asyncio.sleep(rng.random() * 0.3)
                await cluster.launch(name, process.role)
            case "stop":
                process.stop()
                await asyncio.sleep(rng.random() * 3.0)
                process.go_on()
            case _:
                cluster.network.cut_off(f"{process.worker_id}.{process.epoch}")
                await asyncio.sleep(rng.random() * 0.3)
                cluster.network.reconnect(f"{process.worker_id}.{process.epoch}")


def _outcome(heard: Heard) -> str:
    if heard.completed is not None:
        return "complete"
    return "left" if heard.error is None else heard.error.reason.value

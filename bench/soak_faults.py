"""Soak sections ``faults`` (simulated, in virtual time) and ``faults-real`` (real engines with a tiny model)."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import evidence
from bench.faulty_starts import FAILS, HANGS, START_DEADLINE_S, fleet_starts_others
from bench.real_faults import (
    LEASE_S,
    STUCK_S,
    Cell,
    FaultyCluster,
    Tally,
    Usage,
    all_cells,
    faulty_cluster,
    start_that_meets,
)
from bench.simulated_faults import run_faults
from bench.soaking import SEED, say
from bench.tiny_model import make_tiny_model
from kvtransfer.faults import Fault, Operation

QUESTION_COUNT = 100
"""Distinct prompts; asked as often as the volume wants."""
CONCURRENCY = 12
CONCURRENCY_OF_CONTACTS = 3
"""A peer is met again only when no request reads from it: fewer at a time have more first contacts. And no more are
asked while a contact is under way, or one that hangs would answer for all of them."""
MOST_ROUNDS = 6
"""A cell that has met no fault asks its questions again, so often."""
REST_WITHIN_S = LEASE_S + STUCK_S + 15.0
MORE_THREADS, MORE_FILES = 16, 32
"""What an engine may have beyond its state before the first fault: pools of threads fill up, connections are made."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faulty", type=int, default=50_000, help="simulated requests under faults")
    parser.add_argument(
        "--faulty-real", type=int, default=2400, help="requests under faults on real engines, in all cells together"
    )
    parser.add_argument(
        "--faulty-real-minutes",
        type=float,
        default=11.0,
        help="after these no cell begins; the page says which",
    )
    parser.add_argument("--faulty-cells", default="", help="only cells with this in their name")


async def run(options: argparse.Namespace) -> bool:
    """Each operation fails, never ends or blocks, 1/16 and 1/4 of the time: no wrong output, no leak."""
    report = await asyncio.to_thread(run_faults, options.faulty, SEED, say)
    evidence.write(
        "faults",
        "Faults in every operation of a transfer, simulated",
        report.summary,
        report.rows,
        [asdict(failure) for failure in report.failures],
    )
    return not report.failures


@dataclass(slots=True)
class _Run:
    """What the page is made of. It is written anew after every cell: a run cut short leaves what it found."""

    cells: Sequence[Cell]
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    request_count: int = 0
    exact_count: int = 0
    struck_count: int = 0
    baseline: dict[str, Usage] = field(default_factory=dict)
    most: dict[str, Usage] = field(default_factory=dict)

    def write(self) -> None:
        left_out = [str(cell) for cell in self.cells[len(self.rows) :]]
        usage = [
            f"{worker_id}: {before.thread_count} threads, {before.file_count} files before the first fault; at most "
            f"{self.most[worker_id].thread_count} and {self.most[worker_id].file_count} after a cell"
            for worker_id, before in self.baseline.items()
        ]
        summary = [
            f"{self.request_count} requests in {len(self.rows)} cells, one pair of real engines with a tiny model in "
            f"float32, the real connector, up to {CONCURRENCY} at a time; seed {self.seed}",
            f"answers equal, token by token, to those of one engine that computes every prompt itself: "
            f"{self.exact_count} of {self.request_count}; faults met: {self.struck_count}",
            "after each cell, once what hangs is over: no leg, lease, block, quarantined read, place or release is "
            "left (the column says after how many seconds), and both engines answer",
            *usage,
            "reader: the decode engine, to which the library fails; holder: the prefill engine, which answers first "
            "contacts, is asked for notices, and takes the router's calls that release KV",
            "notices are looked for in every step and Baton needs none, so that those cells change nothing but must "
            "not end an engine",
            *(f"registration, {start['what']}: {start['outcome']}" for start in self.starts),
            f"wrong outputs, failed requests, leaks, dead engines and miscounts: {len(self.wrong)}",
            f"cells not asked, for want of time: {', '.join(left_out) or 'none'}",
        ]
        evidence.write(
            "faults-real", "Faults in every operation of a transfer, on real engines", summary, self.rows, self.wrong
        )


async def run_real(options: argparse.Namespace) -> bool:
    """The same on real engines: the real connector and NIXL below it, with a decorator between them that fails."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + 60.0 * options.faulty_real_minutes
    cells = [cell for cell in all_cells() if options.faulty_cells in str(cell)]
    count = -(-options.faulty_real // max(1, len(cells)))
    run = _Run(cells, SEED)
    with tempfile.TemporaryDirectory() as folder:
        model = await asyncio.to_thread(make_tiny_model, Path(folder) / "tiny")
        await _registrations(run, model)
        run.write()
        if cells:
            async with faulty_cluster(model) as cluster:
                questions = await cluster.questions(QUESTION_COUNT, SEED)
                # The first contact and the pools it fills are no fault's doing.
                await _ask(run, cluster, questions[:CONCURRENCY], CONCURRENCY, "before the first fault")
                run.baseline = run.most = cluster.usage()
                for number, cell in enumerate(cells):
                    if loop.time() >= ends_at:
                        break
                    first = number * count
                    asked = [questions[(first + each) % len(questions)] for each in range(count)]
                    await _cell(run, cluster, cell, SEED + number, asked)
                    run.write()
    run.write()
    return not run.wrong and len(run.rows) == len(cells)


async def _ask(run: _Run, cluster: FaultyCluster, asked: Sequence[Any], concurrency: int, what: str) -> Tally:
    tally = await cluster.ask_all(asked, concurrency=concurrency)
    run.request_count += tally.request_count
    run.exact_count += tally.exact_count
    run.wrong += [f"{what}: {each}" for each in tally.wrong]
    return tally


async def _cell(run: _Run, cluster: FaultyCluster, cell: Cell, seed: int, asked: Sequence[Any]) -> None:
    is_contact = cell.operation is Operation.HANDSHAKE
    metrics_before, faults_before = cluster.metrics(), await cluster.fault_counts()
    total = Tally()
    struck_name = f"{cell.worker_id} {'call ' if cell.is_of_the_release_call else ''}{cell.operation.value}"
    struck: Counter[str] = Counter()
    rest = ""
    try:
        cluster.begin(cell, seed)
        for _ in range(MOST_ROUNDS):
            size = CONCURRENCY_OF_CONTACTS if is_contact else len(asked)
            for first in range(0, len(asked), size):
                total.add(await _ask(run, cluster, asked[first : first + size], CONCURRENCY, str(cell)))
                if is_contact:
                    await cluster.contacts_over(REST_WITHIN_S)
            struck = await cluster.fault_counts() - faults_before
            if struck[f"{struck_name}.{cell.fault.value}"]:
                break
        else:
            run.wrong.append(f"{cell}: no fault was met, so nothing is proven")
        cluster.end()
        rest = f"{await cluster.at_rest(REST_WITHIN_S):.1f}"
    except (AssertionError, TimeoutError) as error:
        rest = "LEAK"
        run.wrong.append(f"{cell}: {error!r}")
    metrics = cluster.metrics() - metrics_before
    run.wrong += [f"{cell}: {what}" for what in _miscounts(total, metrics)]
    for worker_id, usage in cluster.usage().items():
        before, most = run.baseline[worker_id], run.most[worker_id]
        run.most = run.most | {
            worker_id: Usage(max(usage.thread_count, most.thread_count), max(usage.file_count, most.file_count))
        }
        if (
            usage.thread_count > before.thread_count + MORE_THREADS
            or usage.file_count > before.file_count + MORE_FILES
        ):
            run.wrong.append(f"{cell}: {worker_id} had {before} before the first fault and has {usage} now")
    strikes = struck[f"{struck_name}.{cell.fault.value}"]
    run.struck_count += strikes
    run.rows.append(
        {
            "faults": str(cell),
            "asked for, struck": f"{struck[struck_name]}, {strikes}",
            "requests": total.request_count,
            "exact": total.exact_count,
            "modes": _listed(total.modes),
            "attempts": _listed(total.attempts),
            "KV recomputed because": _listed(total.reasons),
            "metrics": _listed(Counter({name.removeprefix("baton_"): n for name, n in metrics.items()})),
            "at rest after, s": rest,
        }
    )
    say(f"faults-real: {run.rows[-1]}")


def _miscounts(tally: Tally, metrics: Counter[str]) -> list[str]:
    """What the responses say and the router's metrics do not."""
    recomputed = {name: count for name, count in metrics.items() if name.startswith("baton_recomputes_total")}
    said = {f"baton_recomputes_total {reason}": count for reason, count in tally.reasons.items()}
    lost = sum(count for name, count in metrics.items() if name.startswith("baton_lost_legs_total"))
    more_attempts = sum((number - 1) * count for number, count in tally.attempts.items())
    return [
        f"the responses say {a}, the metrics {b}" for a, b in ((said, recomputed), (more_attempts, lost)) if a != b
    ]


async def _registrations(run: _Run, model: Path) -> None:
    """An engine whose memory the library does not take does not start, and says so. Two at a time."""
    tries = [
        ("the hold records', fails", Fault.FAIL, 1, "is refused"),
        ("the KV's, fails", Fault.FAIL, 2, "is refused"),
        ("the KV's, does not come about", Fault.TIME_OUT, 2, "is refused"),
        ("the KV's, hangs and goes on", Fault.HANG, 2, "starts"),
    ]
    for first in range(0, len(tries), 2):
        pair = tries[first : first + 2]
        said = await asyncio.gather(
            *(
                start_that_meets(model, fault, number=number, core_index=index, hang_s=1.0)
                for index, (_, fault, number, _) in enumerate(pair)
            )
        )
        for (what, _, _, right), outcome in zip(pair, said, strict=True):
            run.starts.append({"what": what, "outcome": outcome})
            say(f"faults-real: registration, {what}: {outcome}")
            if (outcome == "started") is not (right == "starts"):
                run.wrong.append(f"registration, {what}: {outcome}")
    with tempfile.TemporaryDirectory() as folder:
        starts = await fleet_starts_others(model, Path(folder))
    for line in starts.lines:
        say(f"faults-real: {line}")
    kept = starts.are_ready and bool(starts.last_words[FAILS]) and min(starts.launch_counts.values()) > 1
    outcome = (
        f"launches {starts.launch_counts}; said of the failure: {starts.last_words[FAILS] or 'nothing'}; "
        f"both served in the end: {'yes' if starts.are_ready else 'NO'}"
    )
    what = f"in a fleet, {FAILS}'s fails, {HANGS}'s hangs beyond the start deadline of {START_DEADLINE_S:g} s"
    run.starts.append({"what": what, "outcome": outcome})
    say(f"faults-real: registration, {what}: {outcome}")
    if not kept:
        run.wrong.append(f"registration, {what}: {outcome}")


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count) or "none"

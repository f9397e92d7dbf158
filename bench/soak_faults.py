"""Soak sections ``faults`` (simulated, in virtual time) and ``faults-real`` (real engines with a tiny model)."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import evidence
from bench.real_faults import STUCK_S, faulty_cluster, refusal_to_register
from bench.simulated_faults import run_faults
from bench.soaking import SEED, say
from bench.tiny_model import make_tiny_model

QUESTION_COUNT = 100
"""Distinct prompts of each plan; asked as often as the volume wants."""
CONCURRENCY = 8
REST_WITHIN_S = STUCK_S + 15.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faulty", type=int, default=50_000, help="simulated requests under faults")
    parser.add_argument(
        "--faulty-real", type=int, default=2000, help="requests under faults on real engines; 0: first contacts alone"
    )


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


async def run_real(options: argparse.Namespace) -> bool:
    """The same on real engines: the real connector and NIXL below it, with a decorator between them that fails."""
    count = options.faulty_real // 2
    plans: dict[str, tuple[Mapping[str, Any], int]] = {
        "every operation, 1/16": ({"probability": 1 / 16, "seed": SEED}, count),
        "every operation, 1/4": ({"probability": 1 / 4, "seed": SEED + 1}, count),
        "first contacts, 9/10": (
            # With this seed the first ten fail or do not end.
            {"probability": 0.9, "operations": ["handshake"], "kinds": ["fail", "time_out"], "seed": 3},
            QUESTION_COUNT,
        ),
    }
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        for name, (plan, asked_count) in plans.items():
            if asked_count == 0:
                continue
            row, failures = await _faulty_run(model, name, plan, asked_count)
            rows.append(row)
            wrong += failures
            say(f"faults-real: {row}")
        refusal = await refusal_to_register(model)
    say(f"faults-real: an engine whose memory is not registered: {refusal}")
    summary = [
        f"{sum(row['requests'] for row in rows)} requests of one prefill and one decode engine with a tiny model in "
        f"float32, {CONCURRENCY} at a time, compared to the token with one engine that computes every prompt itself",
        f"wrong outputs, failed requests and leaks: {len(wrong)}",
        f"an engine whose memory is not registered does not start: {refusal}",
    ]
    evidence.write("faults-real", "Faults in every operation of a transfer, on real engines", summary, rows, wrong)
    return not wrong


async def _faulty_run(
    model: Path, name: str, plan: Mapping[str, Any], asked_count: int
) -> tuple[dict[str, Any], list[str]]:
    wrong: list[str] = []
    async with faulty_cluster(model, plan) as cluster:
        questions = await cluster.questions(QUESTION_COUNT, SEED)
        asked = [questions[number % len(questions)] for number in range(asked_count)]
        tally = await cluster.ask_all(asked, concurrency=CONCURRENCY)
        wrong += [f"{name}: {what}" for what in tally.wrong]
        rest = "nothing held"
        try:
            await cluster.at_rest(REST_WITHIN_S)
        except AssertionError as error:
            rest = "LEAK"
            wrong.append(f"{name}: {error}")
        counts = await cluster.fault_counts()
    faults = Counter({key: value for key, value in counts.items() if "." in key})
    if not faults:
        wrong.append(f"{name}: no fault was met, so nothing is proven")
    row = {
        "faults": name,
        "requests": len(asked),
        "outcomes": _listed(tally.outcomes),
        "attempts": _listed(tally.attempts),
        "modes": _listed(tally.modes),
        "KV recomputed because": _listed(tally.reasons),
        "faults met": _listed(faults),
        "afterwards": rest,
    }
    return row, wrong


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

"""Soak section ``faults``: transfers that go wrong, simulated, in virtual time."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict

from bench import evidence
from bench.simulated_faults import run_faults
from bench.soaking import SEED, say


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faulty", type=int, default=50_000, help="simulated requests under faults")


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

"""Soak section ``books``: callers leave in every stage of a request; how soon are the engines as they were?"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from baton.testing import run_virtual
from bench import evidence
from bench.cancels import Cancelled, real_cancels, rows_of, simulated_cancels
from bench.corpus import Corpus
from bench.drills import baseline_of
from bench.fleet_under_test import running_fleet
from bench.real_fleet import fleet_config
from bench.soaking import SEED, model_directory, say

FREE_WITHIN_S = 1.0
STEP_TOKEN_COUNT = 128
"""An engine lets go between two steps: where four engines share two cores, a step must be short."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cancels", type=int, default=200, help="cancels on real engines, over all stages")
    parser.add_argument("--simulated-cancels", type=int, default=5000, help="and on simulated ones")


async def run(options: argparse.Namespace) -> bool:
    """Two prefill and two decode engines, leases of 600 s: every block is free within a second of a cancel."""
    simulated = await asyncio.to_thread(_simulated, options.simulated_cancels)
    rows = rows_of(simulated, "simulated")
    _say(rows)
    real: list[Cancelled] = []
    if options.cancels:
        real = await _real(options.cancels)
        real_rows = rows_of(real, "vLLM")
        _say(real_rows)
        rows += real_rows
    is_kept = True
    told = []
    for name, cancels in (("simulated", simulated), ("vLLM", real)):
        times_s = sorted(each.free_after_s for each in cancels)
        if times_s:
            p99_s = times_s[max(0, round(0.99 * len(times_s)) - 1)]
            is_kept &= p99_s <= FREE_WITHIN_S
            told.append(f"{name}: p99 of all {p99_s * 1000:.1f} ms, slowest {times_s[-1] * 1000:.1f} ms")
    summary = [
        f"{len(simulated)} cancels on simulated engines (virtual time), {len(real)} on vLLM (two cores, steps of at "
        f"most {STEP_TOKEN_COUNT} tokens); 2 prefill and 2 decode workers, leases of 600 s: no timer helps",
        "free: every engine's own count of blocks, every ledger and all legs at zero, by audited GetLoad; counted "
        "from the cancel, the asking included",
        *told,
        f"promise (within {FREE_WITHIN_S:g} s, p99): " + ("kept" if is_kept else "BROKEN"),
    ]
    evidence.write("books", "Cancels free everything", summary, rows, [*real, *simulated[:200]])
    return is_kept


def _simulated(count: int) -> list[Cancelled]:
    return run_virtual(simulated_cancels(count, SEED))


async def _real(count: int) -> list[Cancelled]:
    model = model_directory()
    with tempfile.TemporaryDirectory() as state:
        config = fleet_config(
            model,
            Path(state),
            prefill_cores="[[0], [0]]",
            decode_cores="[[1], [1]]",
            max_batched_token_count=STEP_TOKEN_COUNT,
        )
        async with running_fleet(config) as fleet:
            await baseline_of(fleet, Corpus(model, SEED))
            say("books: the fleet is ready")
            return await real_cancels(fleet, count, SEED)


def _say(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        say(f"books: {row}")

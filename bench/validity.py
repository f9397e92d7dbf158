"""Soak section ``validity``: no token from KV that was not proven to be what was held.

Damage at the block layer, races over NIXL between two processes, real engines stopped until their holds are gone, the
same with the checks taken out, and what the checks cost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import evidence
from bench.real_fleet import free_ports
from bench.soaking import SEED, model_directory, say
from bench.tiny_model import make_tiny_model
from bench.validity_blocks import EXPECTED_REASONS, Counts, run_blocks
from bench.validity_costs import hash_gb_per_s, pull_cost
from bench.validity_engines import StopCounts, run_stops
from bench.validity_nixl import NixlCounts, run_nixl


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--damaged", type=int, default=10_000, help="damaged transfers at the block layer")
    parser.add_argument("--clean", type=int, default=100_000, help="clean transfers at the block layer")
    parser.add_argument("--nixl-clean", type=int, default=5000, help="clean transfers between two NIXL agents")
    parser.add_argument("--nixl-damaged", type=int, default=1000, help="damaged ones")
    parser.add_argument("--nixl-races", type=int, default=5000, help="holds that end around their read")
    parser.add_argument("--stopped", type=int, default=500, help="pulls of real engines whose hold ends meanwhile")
    parser.add_argument("--stopped-control", type=int, default=100, help="the same with the checks taken out")


async def run(options: argparse.Namespace) -> bool:
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    os.environ.setdefault("UCX_KEEPALIVE_INTERVAL", "inf")  # as engines have it: ``engine/environment.py``
    blocks = await asyncio.to_thread(run_blocks, damaged_count=options.damaged, clean_count=options.clean, seed=SEED)
    say(f"validity: {blocks}")
    nixl = await asyncio.to_thread(
        run_nixl,
        clean_count=options.nixl_clean,
        damaged_count=options.nixl_damaged,
        race_count=options.nixl_races,
    )
    say(f"validity: over NIXL: {_told(nixl)}")
    with tempfile.TemporaryDirectory() as folder:
        model = await asyncio.to_thread(make_tiny_model, Path(folder) / "tiny")
        stopped = await run_stops(model, _port(), trial_count=options.stopped, seed=SEED)
        say(f"validity: {stopped}")
        control = await run_stops(model, _port(), trial_count=options.stopped_control, seed=SEED, is_checked=False)
        say(f"validity: checks taken out: {control}")
    rate = await asyncio.to_thread(hash_gb_per_s)
    costs = [await pull_cost(model_directory(), _port(), enable_kv_digests=enabled) for enabled in (False, True)]
    say(f"validity: hashing {rate:.1f} GB/s; {costs}")
    is_kept = _is_kept(blocks, nixl, stopped)
    proves = control.wrong_count > 0 and nixl.race_overwritten_count > 0
    summary = [
        f"block layer: {blocks.damaged.total()} damaged transfers, of which {blocks.harmful.total()} would have put "
        f"wrong bytes to use; used: {blocks.missed.total()}. {blocks.clean_count} clean ones; refused: "
        f"{blocks.false_alarms.total()}",
        f"between two processes over NIXL: {nixl.damaged_count} damaged, used: {nixl.missed_count}; "
        f"{nixl.clean_count} clean, refused: {nixl.false_alarms.total()}; {nixl.race_count} holds ended within a "
        f"millisecond of the read, which brought other bytes {nixl.race_overwritten_count} times; used of those, by "
        f"the nonce alone: {nixl.race_missed_count}",
        f"a check over NIXL: median {1e6 * statistics.median(nixl.check_s):.0f} µs" if nixl.check_s else "",
        f"real engines (tiny model, float32), decode engine stopped for 5 s, leases of 2 s or releases, every block "
        f"overwritten: {stopped.trial_count} pulls, wrong answers: {stopped.wrong_count}; {dict(stopped.reasons)}",
        f"the same with the checks taken out: {control.trial_count} pulls, wrong answers: {control.wrong_count}"
        + ("" if proves else ": THE TRIALS PROVE NOTHING"),
        f"xxh3-64 over 45 MB in blocks of 30 layers: {rate:.1f} GB/s; a pull of {costs[0].pulled_mb} MB: verified in "
        f"{costs[0].verify_ms} ms without digests and {costs[1].verify_ms} ms with them",
        "promise (no token from KV that is not provably what was held): " + ("kept" if is_kept else "BROKEN"),
    ]
    rows: list[dict[str, Any]] = [
        {
            "damage": kind,
            "transfers": blocks.damaged[kind],
            "would have been wrong": blocks.harmful[kind],
            "used": blocks.missed[kind],
            "reader said": ", ".join(
                f"{reason} {count}" for (of, reason), count in sorted(blocks.reasons.items()) if of == kind
            ),
        }
        for kind in blocks.damaged
    ]
    records = [asdict(cost) for cost in costs]
    records.append({"nixl": _told(nixl), "stopped": asdict(stopped), "control": asdict(control)})
    evidence.write("validity", "KV that is not provably valid is not used", [s for s in summary if s], rows, records)
    return is_kept and proves


def _is_kept(blocks: Counts, nixl: NixlCounts, stopped: StopCounts) -> bool:
    unexpected = [key for key in blocks.reasons if key[1] not in EXPECTED_REASONS[key[0]]]
    return not (
        blocks.missed.total()
        or blocks.false_alarms.total()
        or unexpected
        or nixl.missed_count
        or nixl.false_alarms.total()
        or nixl.race_missed_count
        or stopped.wrong_count
    )


def _told(nixl: NixlCounts) -> dict[str, Any]:
    return {name: value for name, value in asdict(nixl).items() if name != "check_s"}


def _port() -> int:
    """The first of two that nobody uses."""
    for port in free_ports(8):
        if port < 65_000:
            return port
    raise RuntimeError("no free port")

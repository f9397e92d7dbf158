"""Soak section ``validity``: no token from KV that was not proven to be what was held.

Damage at the block layer, races over NIXL between two processes, real engines stopped until their holds are gone, the
same with the checks taken out and with stock vLLM, and what the checks cost. One run, one page.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench import evidence
from bench.real_fleet import free_ports
from bench.soaking import SEED, model_directory, say
from bench.tiny_model import make_tiny_model
from bench.validity_blocks import EXPECTED_REASONS, Counts, run_blocks
from bench.validity_costs import PullCost, hash_gb_per_s, pull_costs
from bench.validity_engines import PULL_COUNT, Moment, StopCounts, run_stops
from bench.validity_nixl import NixlCounts, run_nixl
from bench.validity_stock import run_stock_stops

CONTROLS_S = 300.0
"""Set aside, of the whole, for the controls and the costs, which come last."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--damaged", type=int, default=10_000, help="damaged transfers at the block layer")
    parser.add_argument("--clean", type=int, default=100_000, help="clean transfers at the block layer")
    parser.add_argument("--nixl-clean", type=int, default=1500, help="clean transfers between two NIXL agents")
    parser.add_argument("--nixl-damaged", type=int, default=300, help="damaged ones")
    parser.add_argument("--nixl-races", type=int, default=1500, help="holds that end around their read")
    parser.add_argument("--stopped", type=int, default=500, help="pulls of real engines whose hold ends meanwhile")
    parser.add_argument("--stopped-control", type=int, default=64, help="the same with the checks taken out")
    parser.add_argument("--stopped-stock", type=int, default=64, help="the same with vLLM's own connector")
    parser.add_argument(
        "--validity-limit-s", type=float, default=1140.0, help="stopped pulls end early, to keep this"
    )


async def run(options: argparse.Namespace) -> bool:
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    os.environ.setdefault("UCX_KEEPALIVE_INTERVAL", "inf")  # as engines have it: ``engine/environment.py``
    began_at = time.monotonic()
    blocks = await asyncio.to_thread(run_blocks, damaged_count=options.damaged, clean_count=options.clean, seed=SEED)
    say(f"validity: {blocks}")
    nixl = await asyncio.to_thread(
        run_nixl,
        clean_count=options.nixl_clean,
        damaged_count=options.nixl_damaged,
        race_count=options.nixl_races,
    )
    say(f"validity: over NIXL: {_told(nixl)}")
    left_s = began_at + options.validity_limit_s - CONTROLS_S - time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = await asyncio.to_thread(make_tiny_model, Path(folder) / "tiny")
        stopped, control = await run_stops(
            model,
            _port(),
            trial_count=options.stopped,
            control_count=options.stopped_control,
            seed=SEED,
            limit_s=left_s,
            say=lambda text: say(f"validity: {text}"),
        )
        stock = await run_stock_stops(
            model, _port(), trial_count=options.stopped_stock, seed=SEED, say=lambda text: say(f"validity: {text}")
        )
    rate = await asyncio.to_thread(hash_gb_per_s)
    costs: list[PullCost] = []
    if time.monotonic() - began_at < options.validity_limit_s - CONTROLS_S / 2:
        costs = list(await pull_costs(model_directory(), _port()))
    say(f"validity: hashing {rate:.1f} GB/s; {costs}")
    is_kept = _is_kept(blocks, nixl, stopped)
    proves = {
        "stopped engines": stopped.late_count > 0 and stopped.reused_count > 0,
        "checks taken out": control.wrong_count > 0,
        "stock vLLM": stock.wrong_count + stock.expired_notice_count > 0,
        "NIXL": nixl.race_overwritten_count > 0,
    }
    unproven = [name for name, does in proves.items() if not does]
    summary = [
        f"block layer, one process: {blocks.damaged.total()} damaged transfers, of which {blocks.harmful.total()} "
        f"would have put wrong bytes to use; used: {blocks.missed.total()}. {blocks.clean_count} clean ones; "
        f"refused: {blocks.false_alarms.total()}",
        f"between two processes over NIXL: {nixl.damaged_count} damaged, used: {nixl.missed_count}; "
        f"{nixl.clean_count} clean, refused: {nixl.false_alarms.total()}; {nixl.race_count} holds ended within a "
        f"millisecond of the read ({_listed(nixl.race_reasons)}), which brought other bytes "
        f"{nixl.race_overwritten_count} times; used of those, by the nonce alone: {nixl.race_missed_count}",
        f"a check over NIXL, digests of up to 2 MB included: median {1e6 * statistics.median(nixl.check_s):.0f} µs"
        if nixl.check_s
        else "",
        f"real engines (tiny model, float32), decode engine stopped for 5 s, leases of 2 s or releases, "
        f"{PULL_COUNT} pulls a stop: {stopped.trial_count} pulls in {stopped.stop_count} stops"
        + (f" ({options.stopped} were asked for: no time)" if stopped.trial_count < options.stopped else "")
        + f"; all their blocks computed over by other prompts before it went on: {stopped.reused_count}; reads made "
        f"after that with every earlier check passed: {stopped.late_count}; wrong answers: {stopped.wrong_count} "
        f"(near ties of one engine with itself: {stopped.tie_count}); {_listed(stopped.reasons)}",
        f"control, the same engines with the check taken out: {control.trial_count} pulls, wrong answers: "
        f"{control.wrong_count}",
        f"control, stock vLLM on both ends, stopped before the pulls were asked for: {stock.trial_count} pulls, "
        f"wrong answers: {stock.wrong_count}, notifications_after_expiry: {stock.expired_notice_count}",
        "THE TRIALS PROVE NOTHING for: " + ", ".join(unproven) if unproven else "",
        f"xxh3-64 over 45 MB in blocks of 30 layers: {rate:.1f} GB/s"
        + (
            f"; a pull of {costs[0].pulled_mb} MB: verified in {costs[0].verify_ms} ms without digests and "
            f"{costs[1].verify_ms} ms with them"
            if costs
            else "; what a pull's proof costs was not measured this time"
        ),
        f"one run, {time.monotonic() - began_at:.0f} s; promise (no token from KV that is not provably what was "
        "held): " + ("kept" if is_kept else "BROKEN"),
    ]
    rows = [
        *(
            _row(
                kind, blocks.damaged[kind], str(blocks.harmful[kind]), blocks.missed[kind], _of(kind, blocks.reasons)
            )
            for kind in blocks.damaged
        ),
        *_stop_rows("stopped", stopped),
        *_stop_rows("control, checks out: stopped", control),
        *_stop_rows("control, stock vLLM: stopped", stock),
    ]
    records: list[Any] = [asdict(cost) for cost in costs]
    records.append({"nixl": _told(nixl), "stopped": stopped.told(), "control": control.told(), "stock": stock.told()})
    evidence.write("validity", "KV that is not provably valid is not used", [s for s in summary if s], rows, records)
    return is_kept and not unproven


def _row(trial: str, pulls: int, harmful: str, used: int, said: str) -> dict[str, Any]:
    return {
        "trial": trial,
        "pulls": pulls,
        "would have been wrong": harmful,
        "wrong and used": used,
        "reader said": said,
    }


def _stop_rows(name: str, counts: StopCounts) -> list[dict[str, Any]]:
    rows = []
    for moment in Moment:
        said = _of(moment.value, counts.by_moment)
        if said:
            pulls = sum(count for (of, _), count in counts.by_moment.items() if of == moment.value)
            rows.append(_row(f"{name} {moment.value}", pulls, "", counts.wrong_by_moment[moment.value], said))
    return rows


def _of(kind: str, reasons: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{reason} {count}" for (of, reason), count in sorted(reasons.items()) if of == kind)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))


def _is_kept(blocks: Counts, nixl: NixlCounts, stopped: StopCounts) -> bool:
    unexpected = [key for key in blocks.reasons if key[1] not in EXPECTED_REASONS[key[0]]]
    return not (
        blocks.missed.total()
        or blocks.false_alarms.total()
        or unexpected
        or nixl.missed_count
        or nixl.false_alarms.total()
        or nixl.race_missed_count
        or not stopped.is_kept
    )


def _told(nixl: NixlCounts) -> dict[str, Any]:
    """Plain values. Not ``asdict``, which makes another Counter, of a Counter's items."""
    values = {each.name: getattr(nixl, each.name) for each in fields(nixl) if each.name != "check_s"}
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}


def _port() -> int:
    """The first of two that nobody uses."""
    for port in free_ports(8):
        if port < 65_000:
            return port
    raise RuntimeError("no free port")

"""The comparison: Baton beside its peers, on the same cores, with the same requests, in one run.

    python -m bench.comparison --quick              # three systems, a few loads, about five minutes
    python -m bench.comparison                      # all systems, three of them twice, within an hour
    python -m bench.comparison --trace FILE         # the code trace from a file; else its statistical likeness

Every request goes to the raw file as its load ends (JSON lines: "run", "block", "cell", "request"); the page is made
from that file alone, and can be made again with --page-from.

Exit status: 0 when every system started and every load was run, 1 otherwise. A request that a system fails, and a
goal that is missed, are figures and no failure of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from baton import event_loop
from bench import raw_file
from bench.comparison.blocks import Turn, turn_order
from bench.comparison.cells import FULL_CELLS, QUICK_CELLS, CellPlans
from bench.comparison.page import render, sweeps
from bench.generator.baton_target import BatonTarget
from bench.generator.openai_target import OpenAiTarget
from bench.generator.priority import ahead_of_the_servers
from bench.generator.target import Target
from bench.machine import machine_facts, wait_until_quiet
from bench.peers import SYSTEMS, RunningSystem, SystemSpec, start_system
from bench.results.report import render as render_plots
from bench.traffic.prompts import PromptMaker
from fleet.config import FleetConfig, check_model_directory, load_config

FULL_SYSTEMS = ("baton", "vllm-2core", "stock-router-tuned")
ONCE_SYSTEMS = ("baton-aggregated", "vllm-2core-chunk-128", "vllm-2x1core", "stock-router", "naive")
"""One turn each, between the passes of the others: a turn takes four to eight minutes, and an hour has sixty."""
QUICK_SYSTEMS = ("baton", "vllm-2core", "stock-router-tuned")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.page_from is not None:
        options.out = options.page_from
        options.page.write_text(render(raw_file.read(options.out)))
        print(options.page)
        _write_plots(options)
        return 0
    raw_file.end_on_sigterm()
    config = load_config(options.config)
    check_model_directory(config)
    plans = CellPlans(PromptMaker(config.model.directory), seed=options.seed, trace=options.trace)
    order = turn_order(
        [SYSTEMS[name] for name in options.systems], [SYSTEMS[name] for name in options.once], options.passes
    )
    cells = QUICK_CELLS if options.quick else FULL_CELLS
    for path in (options.out, options.page):
        path.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells:  # what cannot be asked is known before a server is started
        for round_number in range(options.passes):
            plans.plan(cell, round_number)
    with options.out.open("w") as raw:
        raw_file.write(
            raw,
            {
                "document": "run",
                "machine": machine_facts(),
                "seed": options.seed,
                "is_quick": options.quick,
                "order": [spec.name for _, spec in order],
                "systems": {spec.name: asdict(spec) for _, spec in order},
                "cells": [{"name": cell.name, **asdict(cell)} for cell in cells],
                "model": config.model.name,
                "engines": _engine_facts(config),
                "trace": plans.trace_facts,
            },
        )
        is_good = True
        for number, (round_number, spec) in enumerate(order):
            is_good &= _run_block(number, round_number, spec, config, options, plans, raw)
    text = render(raw_file.read(options.out))
    options.page.write_text(text)
    print(text)
    _write_plots(options)
    return 0 if is_good else 1


def _write_plots(options: argparse.Namespace) -> None:
    """One report with plots for each open-loop workload: the systems' curves, and what they make of rising rates."""
    options.plots.mkdir(parents=True, exist_ok=True)
    for workload, runs in sweeps(raw_file.read(options.out)).items():
        path = options.plots / f"{options.out.stem}-{workload}.html"
        path.write_text(render_plots(runs, title=f"Baton beside its peers: {workload}"))
        raw_file.say(f"plots: {path}")


def _run_block(
    number: int,
    round_number: int,
    spec: SystemSpec,
    config: FleetConfig,
    options: argparse.Namespace,
    plans: CellPlans,
    raw: TextIO,
) -> bool:
    block: dict[str, Any] = {"document": "block", "block": number, "pass": round_number, "system": spec.name}
    block["busy_share_before"] = round(wait_until_quiet(options.wait_quiet_s), 3)
    raw_file.say(f"turn {number + 1}: {spec.title}: starting ({block['busy_share_before']:.0%} busy before)")
    started_at = time.monotonic()
    try:
        system = start_system(spec, config, options.config, options.logs)
    except Exception as error:
        raw_file.say(f"  did not start: {error}")
        raw_file.write(raw, {**block, "error": f"did not start: {type(error).__name__}"})
        return False
    failure: str | None = None
    cells = QUICK_CELLS if options.quick else FULL_CELLS
    try:
        turn = Turn(
            system,
            lambda running: _target(running, config),
            plans,
            block=number,
            round_number=round_number,
            write=lambda document: raw_file.write(raw, document),
        )
        with ahead_of_the_servers(), asyncio.Runner(loop_factory=event_loop.new_event_loop) as runner:
            runner.run(turn.run(cells))
    except Exception as error:
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raw_file.say(f"  broken off: {error}")
    finally:
        system.stop()
    raw_file.write(
        raw, {**block, "facts": system.facts, "wall_s": round(time.monotonic() - started_at, 1), "error": failure}
    )
    return failure is None


def _target(system: RunningSystem, config: FleetConfig) -> Target:
    if system.spec.kind.startswith("baton"):
        return BatonTarget(system.target_address)
    return OpenAiTarget(system.target_address, config.model.name)


def _engine_facts(config: FleetConfig) -> dict[str, Any]:
    engines = {role.value: asdict(engine) for role, engine in config.engines.items()}
    for engine in engines.values():
        engine.pop("model_path")  # a path of this machine is nobody's business
    return engines


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.comparison", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--config", type=Path, default=Path("deploy/baton.toml"), help="what every engine is told")
    parser.add_argument("--quick", action="store_true", help="three systems once each, and few loads")
    parser.add_argument("--passes", type=int, help="turns of each system (default 2, quick 1)")
    parser.add_argument("--systems", type=_names, help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--once", type=_names, help="systems with one turn, between the passes; needs --systems")
    parser.add_argument("--trace", type=Path, help="the code trace (docs/workbench/workloads.md says where it is)")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--out", type=Path, help="raw records")
    parser.add_argument("--page", type=Path, help="markdown")
    parser.add_argument("--page-from", type=Path, help="run nothing; make the page from these raw records")
    parser.add_argument(
        "--wait-quiet-s", type=float, default=20.0, help="longest wait before a turn for a quiet machine"
    )
    parser.add_argument("--plots", type=Path, default=Path(".baton/bench"), help="where reports with plots go")
    parser.add_argument("--logs", type=Path, default=Path(".baton/bench"), help="the servers' logs")
    options = parser.parse_args(arguments)
    stem = "comparison-quick" if options.quick else "comparison"
    options.out = options.out or Path(f"docs/evidence/{stem}.jsonl")
    stem = options.out.stem if options.page_from is None else options.page_from.stem
    options.page = options.page or Path(f"docs/benchmarks/{stem}.md")
    if options.once is not None and options.systems is None:
        parser.error("--once: name the others with --systems")
    if options.once is None:
        options.once = () if options.quick or options.systems is not None else ONCE_SYSTEMS
    options.systems = options.systems or (QUICK_SYSTEMS if options.quick else FULL_SYSTEMS)
    options.passes = options.passes if options.passes is not None else (1 if options.quick else 2)
    if options.passes < 1:
        parser.error("--passes must be at least 1")
    if options.trace is not None and not options.trace.is_file():
        parser.error(f"--trace: there is no file {options.trace}")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SYSTEMS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

"""First figures: Baton 1P+1D beside one vLLM engine on one core and beside stock vLLM P/D, in one run.

    python -m bench.first_figures --quick          # one block each, a few minutes
    python -m bench.first_figures                  # A B C C B A, about 25 minutes

The machine has too few cores for the systems to run at once, so they take turns in mirrored blocks, each with
its servers alive in its block only. Every request goes to the raw file as it ends (JSON lines: "run", "block",
"request"); the report is made from that file alone, and can be made again with --report-from.

Exit status: 0 when every block ran and no request failed, 1 otherwise; the report is written either way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from bench.figures_report import render
from bench.load import Block, LoadPlan
from bench.machine import MachineClock, machine_facts, wait_until_quiet
from bench.oracle import model_limits
from bench.peers import SYSTEMS, RunningSystem, SystemSpec, start_system
from bench.targets import BatonTarget, OpenAiTarget, Target
from fleet.config import FleetConfig, check_model_directory, load_config

FULL_PLAN = LoadPlan(alone_counts={64: 12, 512: 12, 2048: 6}, arrival_count=2, stream_run_count=3)
QUICK_PLAN = replace(FULL_PLAN, alone_counts={64: 6, 512: 6, 2048: 4}, idle_s=2.0)
DEFAULT_SYSTEMS = ("baton", "engine", "stock-pd")
FULL_EXTRAS = ("stock-pd-as-shipped", "engine-chunk-256")
"""Once each at the end of a full run: the peers' other forms, so that neither the worst nor the best is hidden."""
STEAL_LIMIT = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.report_from is not None:
        options.report.write_text(render(_read(options.report_from)))
        print(options.report)
        return 0
    # A terminated benchmark must still end its servers.
    signal.signal(signal.SIGTERM, _raise_exit)
    config = load_config(options.config)
    check_model_directory(config)
    plan = QUICK_PLAN if options.quick else FULL_PLAN
    order = block_order([SYSTEMS[name] for name in options.systems], 1 if options.quick else 2 * options.rounds)
    order += [SYSTEMS[name] for name in options.extras]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as raw:
        _write(raw, _run_facts(options, config, plan, order))
        is_good = _run_blocks(order, config, options, plan, raw)
    text = render(_read(options.out))
    options.report.write_text(text)
    print(text)
    return 0 if is_good else 1


def block_order(systems: Sequence[SystemSpec], pass_count: int) -> list[SystemSpec]:
    """A B C, then C B A, and so on: a drift of the machine hits all alike."""
    return [spec for number in range(pass_count) for spec in (systems if number % 2 == 0 else systems[::-1])]


def _run_blocks(
    order: Sequence[SystemSpec], config: FleetConfig, options: argparse.Namespace, plan: LoadPlan, raw: TextIO
) -> bool:
    is_good = True
    turns: dict[str, int] = {}
    patience_s = options.wait_quiet_s
    for number, spec in enumerate(order):
        round_number = turns.get(spec.name, 0)
        turns[spec.name] = round_number + 1
        report: dict[str, Any] = {"record": "block", "block": number, "system": spec.name, "round": round_number}
        asked_at = time.monotonic()
        report["busy_share_before"] = round(wait_until_quiet(patience_s), 3)
        patience_s = max(0.0, patience_s - (time.monotonic() - asked_at))
        _say(
            f"block {number + 1}/{len(order)}: {spec.title}: starting ({report['busy_share_before']:.0%} busy before)"
        )
        try:
            system = start_system(spec, config, options.config, options.logs)
        except Exception as error:
            _say(f"block {number + 1} did not start: {error}")
            _write(raw, {**report, "error": f"did not start: {type(error).__name__}"})
            is_good = False
            continue
        try:
            is_good &= asyncio.run(_run_block(system, config, plan, options.seed, report, raw))
        finally:
            system.stop()
    return is_good


async def _run_block(
    system: RunningSystem, config: FleetConfig, plan: LoadPlan, seed: int, report: dict[str, Any], raw: TextIO
) -> bool:
    name = system.spec.name
    vocab_size, _ = model_limits(config.model.directory)
    target: Target = (
        BatonTarget(system.target_address)
        if system.spec.kind == "baton"
        else OpenAiTarget(system.target_address, config.model.name)
    )
    block = Block(
        target,
        plan,
        system=name,
        block=report["block"],
        round_number=report["round"],
        # The same prompts in the same order for every system of a round.
        rng=random.Random(f"{seed}/{report['round']}"),  # noqa: S311 a reproducible load
        vocabulary=range(1000, vocab_size),
        cpu=system.cpu,
    )
    failure: str | None = None
    machine, own = MachineClock.read(), time.process_time() + system.cpu().total_s
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(target.close)
        try:
            for scenario in (block.warm_up, block.alone, block.streams):
                await scenario()
                system.assert_running()
                _say(f"  {scenario.__name__} done after {time.monotonic() - started:.0f} s")
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _say(f"  failed: {error}")
    use = MachineClock.read().use_since(machine, time.process_time() + system.cpu().total_s - own)
    for record in block.records:
        _write(raw, record.as_json())
    report |= {
        "wall_s": round(time.monotonic() - started, 1),
        "facts": system.facts,
        "idle_cpu_share": None if block.idle_cpu_share is None else round(block.idle_cpu_share, 3),
        "stream_cpu_s": None if block.stream_cpu is None else round(block.stream_cpu.total_s, 2),
        "cpu_by_command_s": {key: round(value, 2) for key, value in system.cpu().by_command.items()},
        "machine": {key: round(value, 4) for key, value in asdict(use).items()},
        "too_much_steal": use.steal_share > STEAL_LIMIT,
        "error": failure,
    }
    _write(raw, report)
    failed = [record for record in block.records if record.error is not None]
    for record in failed:
        _say(f"  failed: {record.scenario} {record.role} {record.prompt_token_count} tokens: {record.error}")
    return failure is None and not failed


def _run_facts(
    options: argparse.Namespace, config: FleetConfig, plan: LoadPlan, order: Sequence[SystemSpec]
) -> dict[str, Any]:
    engines = {role.value: asdict(engine) for role, engine in config.engines.items()}
    for engine in engines.values():
        engine.pop("model_path")  # a path of this machine is nobody's business
    return {
        "record": "run",
        "machine": machine_facts(),
        "seed": options.seed,
        "is_quick": options.quick,
        "plan": asdict(plan),
        "order": [spec.name for spec in order],
        "systems": {spec.name: asdict(spec) for spec in order},
        "model": config.model.name,
        "runner": config.cluster.runner,
        "engines": engines,
    }


def _write(raw: TextIO, document: dict[str, Any]) -> None:
    raw.write(json.dumps(document, separators=(",", ":")) + "\n")
    raw.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _raise_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_figures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--config", type=Path, default=Path("deploy/baton.toml"))
    parser.add_argument("--quick", action="store_true", help="one block each and few requests")
    parser.add_argument("--rounds", type=int, default=1, help="times A B C C B A, without --quick")
    parser.add_argument("--systems", type=_names, default=DEFAULT_SYSTEMS, help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--extras", type=_names, help="systems with one block each at the end")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, help="raw records")
    parser.add_argument("--report", type=Path, help="markdown")
    parser.add_argument("--report-from", type=Path, help="run nothing; make the report from these raw records")
    parser.add_argument(
        "--wait-quiet-s", type=float, default=120.0, help="longest wait, over all blocks, for others to be quiet"
    )
    parser.add_argument("--logs", type=Path, default=Path(".baton/bench"), help="the servers' logs")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    stem = "first-figures-quick" if options.quick else "first-figures"
    options.out = options.out or Path(f"docs/evidence/{stem}.jsonl")
    options.report = options.report or Path(f"docs/benchmarks/{stem}.md")
    if options.extras is None:
        options.extras = () if options.quick else FULL_EXTRAS
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SYSTEMS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

"""``baton bench simulate``: the real router before simulated workers, in virtual time; the same report as a run's."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.cli import exits
from bench.commands.traffic_options import (
    UsageError,
    add_traffic_options,
    make_plan_of,
    pacer_spelling,
    print_workloads,
    prompt_maker,
    seed_of,
)

if TYPE_CHECKING:
    from bench.results.run_data import RunData
    from bench.simulation.profile import Profile
    from fleet.config import FleetConfig

DEFAULT_CONFIG = Path("deploy/baton.toml")


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "simulate",
        help="run a workload on simulated workers, much faster than real time",
        description="Runs the real router, admission, placement and handoff with simulated engines in virtual time, "
        "under the workloads of `baton bench run`, and writes what that writes. With --against it replays measured "
        "runs and tells how far off the simulation is.",
        epilog="Exit codes: 0 done, 1 nothing succeeded, 2 wrong command line or file. What is simulated and what is "
        "not: docs/workbench/simulation.md",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="TOML of the cluster (default: %(default)s)",
    )
    cluster.add_argument("--prefill", type=int, metavar="N", help="prefill workers, in place of the file's count")
    cluster.add_argument(
        "--decode", type=int, metavar="N", help="decode workers, in place of the file's; 0 prefill: aggregated"
    )
    cluster.add_argument(
        "--profile", type=Path, metavar="FILE", help="of `baton bench calibrate` (default: built-in costs, no noise)"
    )
    cluster.add_argument(
        "--chance",
        type=int,
        default=0,
        metavar="SEED",
        help="seed of the simulation's own noise (default: %(default)s)",
    )
    cluster.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="deadline of a request (%(default)g)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="measured runs to replay and compare with; needs no workload",
    )
    add_traffic_options(parser)
    rate = parser.add_argument_group("how much").add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, metavar="R", help="arrivals per second (default: the pacer's, or 1)")
    rate.add_argument("--rates", metavar="R,R,...", help="a sweep: one run a rate, each in a directory of its own")
    parser.add_argument("--pacer", metavar="P", help="as of `baton bench run`")
    kept = parser.add_argument_group("how it is judged and kept")
    kept.add_argument(
        "--slo-scale", type=float, default=1.0, metavar="X", help="factor of all SLO bounds (default: 1)"
    )
    kept.add_argument(
        "--out", type=Path, metavar="DIR", help="where the run goes (default: bench-runs/ and the time)"
    )
    kept.add_argument("--label", default="simulated", help="name of the system in reports (default: %(default)s)")
    kept.add_argument("--json", action="store_true", help="print the summary as JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from bench.results.store import StoreError
    from bench.simulation.observe import ReplayError
    from bench.simulation.profile import ProfileError
    from fleet.toml_table import ConfigError

    if arguments.list_workloads:
        print_workloads()
        return exits.OK
    try:
        return _against(arguments) if arguments.against else _simulate(arguments)
    except (UsageError, ConfigError, ProfileError, ReplayError, StoreError, OSError) as error:
        print(f"baton bench simulate: {error}", file=sys.stderr)
        return exits.USAGE


def _simulate(arguments: argparse.Namespace) -> int:
    from bench.results.report import render
    from bench.results.store import read_run, write_run
    from bench.results.summary import summarise
    from bench.simulation.simulate import simulate

    if not arguments.slo_scale > 0:
        raise UsageError("--slo-scale is above 0")
    config, profile = _cluster(arguments), _profile(arguments)
    prompts = prompt_maker(arguments)
    rates = _rates(arguments)
    directory = arguments.out or Path("bench-runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-simulated")
    runs: list[RunData] = []
    simulated_s = took_s = 0.0
    seed = seed_of(arguments)
    for place, rate_per_s in enumerate(rates):  # seeds as `baton bench run` gives them
        pacer = pacer_spelling(arguments.pacer, rate_per_s)
        plan = make_plan_of(arguments, prompts, pacer=pacer, seed=seed + place)
        began_at = time.perf_counter()
        data = simulate(
            plan, profile, config, seed=arguments.chance, timeout_s=arguments.timeout, label=arguments.label
        )
        took_s += time.perf_counter() - began_at
        simulated_s += data.facts["simulation"]["simulated_s"]
        data.facts |= {
            "slo_scale": arguments.slo_scale,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        where = directory if len(rates) == 1 else directory / f"rate-{rate_per_s:g}"
        write_run(where, data)
        runs.append(read_run(where))
        _show(arguments, summarise(runs[-1]), where)
    page = directory / "report.html"
    page.write_text(render(runs), encoding="utf-8")
    if not arguments.json:
        print(f"report        {page}")
    print(f"simulated {simulated_s:.0f} s in {took_s:.2f} s: {simulated_s / took_s:.0f} x", file=sys.stderr)
    has_success = any(record.outcome == "ok" for data in runs for record in data.records)
    return exits.OK if has_success else exits.FAILED


def _against(arguments: argparse.Namespace) -> int:
    from bench.results.store import read_run
    from bench.simulation.errors import errors_of, render_errors
    from bench.simulation.observe import replay

    prompts = prompt_maker(arguments)
    profile = _profile(arguments)
    pairs = []
    for directory in _runs_among(arguments.against):
        measured = read_run(directory)
        config = _cluster(arguments, measured.facts.get("worker_counts"))
        simulated = replay(measured, profile, config, prompts, seed=arguments.chance, trace_path=arguments.trace)
        pairs.append((directory.name, measured, simulated))
    result = errors_of(pairs)
    print(json.dumps(result) if arguments.json else render_errors(result))
    return exits.OK


def _runs_among(directories: Sequence[Path]) -> list[Path]:
    """Those with a run in them, the others being named on stderr: bench-runs/* has sweeps and reports among it. All
    of them where none has, so that reading says what is wrong."""
    from bench.results.store import RUN

    found = [directory for directory in directories if (directory / RUN).exists()]
    if not found:
        return list(directories)
    for directory in directories:
        if directory not in found:
            print(f"left out: {directory} has no {RUN}", file=sys.stderr)
    return found


def _cluster(arguments: argparse.Namespace, measured_counts: Any = None) -> FleetConfig:
    """``measured_counts``: workers by role of the run that is replayed, where it knew them."""
    from bench.simulation.simulate import with_counts
    from fleet.config import load_config

    prefill, decode = arguments.prefill, arguments.decode
    if prefill is None and decode is None and measured_counts:
        prefill, decode = measured_counts.get("prefill", 0), measured_counts.get("decode", 0)
    for name, count in (("--prefill", prefill), ("--decode", decode)):
        if count is not None and not 0 <= count <= 256:
            raise UsageError(f"{name} {count}: 0 to 256 workers are possible")
    return with_counts(load_config(arguments.config), prefill=prefill, decode=decode)


def _profile(arguments: argparse.Namespace) -> Profile:
    from bench.simulation.profile import Profile, read_profile

    return Profile() if arguments.profile is None else read_profile(arguments.profile)


def _rates(arguments: argparse.Namespace) -> list[float | None]:
    if arguments.trace is not None and (arguments.rate is not None or arguments.rates or arguments.pacer):
        raise UsageError("a trace has its own times: --trace-rate plays it faster")
    if arguments.rates is None:
        return [arguments.rate]
    try:
        rates = [float(rate) for rate in arguments.rates.split(",")]
    except ValueError:
        raise UsageError(f"--rates {arguments.rates}: numbers with commas between them are expected") from None
    if any(rate <= 0 for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UsageError(f"--rates {arguments.rates}: different rates above 0 are expected")
    return list(rates)


def _show(arguments: argparse.Namespace, summary: dict[str, Any], where: Path) -> None:
    if arguments.json:
        print(json.dumps(summary), flush=True)
        return
    from rich.console import Console

    from bench.generator.run_table import run_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(run_table(summary))
    console.print(f"kept          {where}", highlight=False, soft_wrap=True)

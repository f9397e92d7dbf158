"""``baton bench run``: sends a workload to a server in open loop, judges the run, writes it down, prints it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.cli import exits
from bench.commands.target_options import CannotRun, add_target_options, check_target_options, reach
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
    from bench.results.slo import Slo
    from bench.traffic.plan import Plan
    from bench.traffic.prompts import PromptMaker

SLO_ALIASES = {"code": "code-completion"}


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="send a workload to a server and measure it",
        description="Sends a workload in open loop: every request at its intended time, every latency counted from "
        "it. Writes a directory with every request, a summary and an HTML report.",
        epilog="Exit codes: 0 the run is valid, 1 it is not (or nothing succeeded), 2 wrong command line, "
        "3 the server cannot be reached or does not serve, 130 interrupted. "
        "What makes a run invalid, and what each number means: docs/workbench/running.md",
    )
    add_target_options(parser)
    add_traffic_options(parser)
    how_much = parser.add_argument_group("how much")
    rate = how_much.add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, metavar="R", help="arrivals per second (default: the pacer's, or 1)")
    rate.add_argument("--rates", metavar="R,R,...", help="a sweep: one run a rate, each in a directory of its own")
    how_much.add_argument(
        "--pacer",
        metavar="P",
        help="constant, poisson (default), gamma:cv=C, weibull:shape=K, ramp:A..B, steps:RxS,...",
    )
    how_much.add_argument("--until-saturated", action="store_true", help="end a sweep at the first saturated rate")
    judged = parser.add_argument_group("how it is judged and kept")
    judged.add_argument(
        "--slo", default="chatbot", metavar="NAME", help="chatbot, code, voice, batch or rag (%(default)s)"
    )
    judged.add_argument("--slo-scale", type=float, default=1.0, metavar="X", help="factor of all bounds (default: 1)")
    judged.add_argument(
        "--out", type=Path, metavar="DIR", help="where the run goes (default: bench-runs/ and the time)"
    )
    judged.add_argument("--label", help="name of the system in reports (default: the target's kind)")
    judged.add_argument("--json", action="store_true", help="print the summary as JSON instead of tables")
    judged.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from baton import event_loop
    from bench.results.store import StoreError

    if arguments.list_workloads:
        print_workloads()
        return exits.OK
    directory = arguments.out or Path("bench-runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    ended: list[RunData] = []
    plans: list[Plan] = []
    try:
        check_target_options(arguments)
        rates = _rates(arguments)
        slo = _slo(arguments)
        prompts = prompt_maker(arguments)
        # A wrong option is said before anything is sent. Each run of a sweep has a seed of its own: with the same
        # prompts again, all but the first would find theirs in the server's cache.
        seed = seed_of(arguments)
        plans = [
            make_plan_of(arguments, prompts, pacer=pacer_spelling(arguments.pacer, rate_per_s), seed=seed + place)
            for place, rate_per_s in enumerate(rates)
        ]
        _check_directories(directory, plans)
        with event_loop.runner() as runner:
            outcome = runner.run(_run(arguments, directory, plans, slo, prompts, ended))
    except UsageError as error:
        return _failed(str(error), exits.USAGE)
    except CannotRun as error:
        return _failed(str(error), error.code)
    except StoreError as error:
        return _failed(str(error), exits.FAILED)
    except KeyboardInterrupt:
        return _failed(_interrupted(directory, len(ended), len(plans)), exits.INTERRUPTED)
    return outcome


def _failed(message: str, code: int) -> int:
    print(f"baton bench run: {message}", file=sys.stderr)
    return code


def _interrupted(directory: Path, ended_count: int, planned_count: int) -> str:
    if ended_count:
        return (
            f"interrupted after {ended_count} of {planned_count} rates, which are reported in "
            f"{directory / 'report.html'}; what was measured of the next is in {directory} as well, marked invalid"
        )
    if not directory.exists():
        return "interrupted before anything was measured"
    return f"interrupted; what was measured by then is in {directory}, marked invalid"


def _directory_of(directory: Path, plan: Plan, plan_count: int) -> Path:
    return directory if plan_count == 1 else directory / f"rate-{plan.facts['rate_per_s']:g}"


def _check_directories(directory: Path, plans: Sequence[Plan]) -> None:
    """All of them before the first run starts. Raises ``StoreError`` where one has a run, ``UsageError`` where none
    could be written. Leaves nothing behind: a run that cannot start makes no directory."""
    from bench.results.store import RUN, StoreError

    try:
        for plan in plans:
            kept = _directory_of(directory, plan, len(plans)) / RUN
            if kept.exists():
                raise StoreError(kept, "there is a run here already", "Give another directory")
        there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):  # permissions alone do not tell of a read-only disk
            pass
    except OSError as error:
        raise UsageError(f"--out {directory} cannot be written: {error.strerror}") from None


def _rates(arguments: argparse.Namespace) -> list[float | None]:
    """One run each; None: the pacer's own. Raises ``UsageError``."""
    if arguments.trace is not None and (arguments.rate is not None or arguments.rates or arguments.pacer):
        raise UsageError("a trace has its own times: --trace-rate plays it faster")
    if arguments.rates is None:
        if arguments.until_saturated:
            raise UsageError("--until-saturated ends a sweep: name its rates with --rates")
        return [arguments.rate]
    try:
        rates = [float(rate) for rate in arguments.rates.split(",")]
    except ValueError:
        raise UsageError(f"--rates {arguments.rates}: numbers with commas between them are expected") from None
    if not rates or any(rate <= 0 for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UsageError(f"--rates {arguments.rates}: different rates above 0 are expected")
    return list(rates)


def _slo(arguments: argparse.Namespace) -> Slo:
    from bench.results.slo import PRESETS

    name = SLO_ALIASES.get(arguments.slo, arguments.slo)
    if name not in PRESETS:
        raise UsageError(f"--slo {arguments.slo}: there are {', '.join(PRESETS)}")
    if not arguments.slo_scale > 0:
        raise UsageError("--slo-scale is above 0")
    return PRESETS[name].scaled(arguments.slo_scale)


async def _run(
    arguments: argparse.Namespace,
    directory: Path,
    plans: Sequence[Plan],
    slo: Slo,
    prompts: PromptMaker,
    runs: list[RunData],
) -> int:
    """``runs`` gets each as it ends. Cancelled, it reports those before it raises ``CancelledError``."""
    from bench.generator.measure import Measurement, measure
    from bench.results.steady import SaturationVerdict
    from bench.results.summary import summarise

    reached = await reach(arguments, prompts)
    measurement = Measurement(
        label=arguments.label or reached.label,
        target=reached.facts,
        model=reached.target.model,
        timeout_s=arguments.timeout,
        worker_counts=reached.worker_counts,
        max_in_flight=arguments.max_in_flight,
        slo=slo,
        slo_scale=arguments.slo_scale,
        admin_address=reached.admin_address,
        metrics_url=reached.metrics_url,
        is_quiet=arguments.quiet,
    )
    summaries: list[dict[str, Any]] = []
    try:
        for plan in plans:
            where = _directory_of(directory, plan, len(plans))
            data = await measure(plan, reached.target, where, measurement)
            runs.append(data)
            summaries.append(summarise(data))
            _show(arguments, summaries[-1], data.facts, where)
            if arguments.until_saturated and summaries[-1]["saturation"]["verdict"] == SaturationVerdict.SATURATED:
                break
    except asyncio.CancelledError:
        if runs:
            _finish(arguments, directory, runs, summaries, slo)
        raise
    finally:
        await reached.target.close()
    _finish(arguments, directory, runs, summaries, slo)
    return exits.OK if all(summary["validity"]["valid"] for summary in summaries) else exits.FAILED


def _show(arguments: argparse.Namespace, summary: Mapping[str, Any], facts: Mapping[str, Any], where: Path) -> None:
    if arguments.json:
        print(json.dumps(summary), flush=True)
        return
    from rich.console import Console

    from bench.generator.run_table import run_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(run_table(summary, facts))
    console.print(f"kept          {where}", highlight=False, markup=False, soft_wrap=True)


def _finish(
    arguments: argparse.Namespace, directory: Path, runs: list[RunData], summaries: list[dict[str, Any]], slo: Slo
) -> None:
    from bench.results.report import render

    page = directory / "report.html"
    page.write_text(render(runs), encoding="utf-8")
    if arguments.json:
        return
    from rich.console import Console

    from bench.generator.run_table import sweep_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    if len(runs) > 1:
        console.print(sweep_table(summaries, slo.name))
    console.print(f"report        {page}", highlight=False, markup=False, soft_wrap=True)

"""``baton bench compare``: two runs, or two directories of repeated runs, metric by metric with a verdict."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from bench.results.comparing import Comparison, MetricResult

SAME_OR_BETTER, WORSE, USAGE = 0, 1, 2
QUICK = ("ttft_s", "itl_message_s", "tpot_s", "e2e_s", "output_tokens_per_s", "goodput", "success")


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="hold one run, or several, against another: ratios, intervals, verdicts",
        description="Holds B against A. Each is the directory of a run, or of several runs of one system (paired in "
        "order of their names, as they were interleaved). Ratios are B / A with 95% bootstrap intervals.",
        epilog="Exit codes: 0 B is nowhere worse than A, 1 B is worse in some metric, 2 nothing was compared.",
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="ttft_s.p99, or ttft_s for all of its statistics; may be repeated (default: "
        f"{', '.join(QUICK)}; all: every one)",
    )
    parser.add_argument(
        "--margin-percent", type=float, default=2.0, help="a difference within it is none (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from bench.results.comparing import METRICS, ComparisonError, compare
    from bench.results.store import StoreError

    metrics: Sequence[str] = arguments.metric or QUICK
    if "all" in metrics:
        metrics = METRICS
    if not arguments.margin_percent >= 0:
        print("baton bench compare: --margin-percent is 0 or more", file=sys.stderr)
        return USAGE
    try:
        comparison = compare(
            read_runs(arguments.a),
            read_runs(arguments.b),
            metrics=metrics,
            seed=arguments.seed,
            margin=arguments.margin_percent / 100,
        )
    except (StoreError, ComparisonError) as error:
        print(f"baton bench compare: {error}", file=sys.stderr)
        return USAGE
    if arguments.json:
        print(json.dumps(comparison.as_json(), indent=2, allow_nan=False))
    else:
        _print(comparison)
    return exit_code(comparison)


def exit_code(comparison: Comparison) -> int:
    from bench.results.comparing import Verdict

    return WORSE if any(result.verdict is Verdict.A_BETTER for result in comparison.results) else SAME_OR_BETTER


def read_runs(directory: Path) -> list[Any]:
    """The run in the directory, or those in the directories below it, by name with numbers in their order. Raises
    ``StoreError``."""
    from bench.results.store import RUN, StoreError, read_run

    if (directory / RUN).exists():
        return [read_run(directory)]
    found = sorted((path.parent for path in directory.glob(f"*/{RUN}")), key=lambda path: _natural(path.name))
    if not found:
        raise StoreError(directory, "there is no run here, nor in its directories", "Give the directory of a run")
    return [read_run(path) for path in found]


def _natural(name: str) -> list[tuple[int, str]]:
    """``block-2`` before ``block-10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _print(comparison: Comparison) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print(table(comparison))
    for note in dict.fromkeys(result.note for result in comparison.results if result.note):
        names = ", ".join(result.name for result in comparison.results if result.note == note)
        console.print(f"cannot tell {names}: {note}", style="dim", markup=False)
    console.print(standing(comparison), markup=False)


def table(comparison: Comparison) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from bench.results.comparing import Verdict

    found = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=escape(f"B = {comparison.b_label} against A = {comparison.a_label}"),
    )
    for title in ("metric", "A", "B", "B / A", "95% interval", "verdict"):
        found.add_column(title, justify="left" if title in ("metric", "verdict") else "right", no_wrap=True)
    colours = {Verdict.A_BETTER: "red", Verdict.B_BETTER: "green", Verdict.NO_DIFFERENCE: "cyan"}
    for result in comparison.results:
        found.add_row(
            result.name,
            _value(result, result.a),
            _value(result, result.b),
            "-" if result.ratio is None else f"{result.ratio:.3f}x",
            _interval(result),
            result.verdict.value,
            style=colours.get(result.verdict),
        )
    return found


def standing(comparison: Comparison) -> str:
    """What the table is worth, in one sentence."""
    from bench.results.comparing import PAIRS_FOR_A_CLAIM

    pairs = f"{comparison.pair_count} pair{'' if comparison.pair_count == 1 else 's'} of runs"
    if comparison.is_claim:
        return f"{pairs}, nothing against them: what is decided may be claimed."
    if comparison.warnings:
        return f"{pairs}, with warnings: an indication, no claim."
    return f"{pairs}: an indication; a claim takes {PAIRS_FOR_A_CLAIM} interleaved pairs."


def _value(result: MetricResult, value: float | None) -> str:
    if value is None:
        return "-"
    if result.difference is not None:
        return f"{value:.1%}"
    if "_s." in result.name:
        return f"{value * 1e3:.1f} ms"
    return f"{value:.2f}/s"


def _interval(result: MetricResult) -> str:
    if result.low is None or result.high is None:
        return "-"
    if result.difference is not None:
        return f"{result.difference * 100:+.1f} [{result.low * 100:+.1f}, {result.high * 100:+.1f}] points"
    return f"[{result.low:.3f}, {result.high:.3f}]"

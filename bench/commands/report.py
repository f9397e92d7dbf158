"""``baton bench report``: makes the HTML report of saved runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from baton.cli import exits

RUN_FILE = "run.json"
MOST_RUNS = 500
"""More than that is a mistaken directory, not a sweep."""


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="make the HTML report of saved runs",
        description="Makes one HTML file of saved runs: of one, of a sweep of rates, of several systems. Runs with "
        "the same label are one system. The file opens anywhere and fetches nothing.",
        epilog="Exit codes: 0 written, 2 a directory has no run or a run cannot be read. What is on the page: "
        "docs/workbench/reports.md",
    )
    _add_arguments(parser)
    parser.set_defaults(run=_run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help=f"a directory with {RUN_FILE}, or one with such directories in it, at any depth",
    )
    parser.add_argument("--out", type=Path, help="the file (default: report.html in the first DIR)")
    parser.add_argument("--title", help="the page's title (default: the systems and the workload)")


def find_runs(directories: Iterable[Path]) -> list[Path]:
    """The directories of runs, in the order given, those within one directory by name; each once. Raises
    ``ValueError`` for a directory without any.
    """
    found: dict[Path, None] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        runs = (
            [directory] if (directory / RUN_FILE).is_file() else sorted(p.parent for p in directory.rglob(RUN_FILE))
        )
        if not runs:
            raise ValueError(f"{directory} has no run: no {RUN_FILE} in it or below it")
        found |= {run.resolve(): None for run in runs}
    if len(found) > MOST_RUNS:
        raise ValueError(f"{len(found)} runs are more than one report holds ({MOST_RUNS}): name fewer")
    return list(found)


def write_report(directories: Sequence[Path], *, out: Path | None, title: str | None) -> Path:
    """Renders and writes; returns the file. Raises ``ValueError`` or ``StoreError`` for what cannot be read."""
    from bench.results.report import render
    from bench.results.store import read_run

    runs = [read_run(directory) for directory in find_runs(directories)]
    page = out if out is not None else directories[0] / "report.html"
    text = render(runs, title=title)
    fresh = page.with_name(f".{page.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(page)
    return page


def _run(options: argparse.Namespace) -> int:
    from bench.results.store import StoreError

    try:
        page = write_report(options.directories, out=options.out, title=options.title)
    except (ValueError, StoreError, OSError) as error:
        print(f"baton bench report: {error}", file=sys.stderr)
        return exits.USAGE
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="baton bench report")
    _add_arguments(parser)
    return _run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())

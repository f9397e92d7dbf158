"""``baton bench``: the workbench's verbs. Loaded by name from ``baton/__main__.py`` where baton-serve is installed.

Owns no behaviour: each verb is a module of ``bench.commands`` with ``add_command(subparsers)``. Only the verb that
was asked for is loaded: the others are known by name and by one line.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from baton.cli import exits

VERBS = {
    "run": "send a workload to a server and measure it",
    "golden": "a server with exactly known times, to judge a load generator by",
    "report": "the HTML report of one run, a sweep, or several systems",
    "compare": "two runs, with intervals and a verdict",
    "peer": "start a system to compare Baton with",
    "calibrate": "fit the cost model to an engine",
    "simulate": "a workload on the real router and simulated engines, in virtual time",
}
EXTRA = ("aiohttp", "numpy", "plotly", "pyarrow", "scipy")
"""What the extra ``bench`` of the package brings."""


def add_commands(subparsers: Any, arguments: Sequence[str] = ()) -> None:
    """``arguments``: of the whole command line; the verb in them is loaded, if there is one."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure a service: load, reports, peers, calibration, simulation",
        description="The workbench: an open-loop load generator, reports, peers, calibration and simulation.",
    )
    verbs = parser.add_subparsers(metavar="verb", required=True, title="verbs")
    asked_for = arguments[1] if len(arguments) > 1 and arguments[0] == "bench" else None
    for verb, summary in VERBS.items():
        if verb == asked_for:
            _load(verb, verbs)
        else:
            verbs.add_parser(verb, help=summary)


def _load(verb: str, verbs: Any) -> None:
    """Adds the verb, and lets it say in one line which package it misses."""
    importlib.import_module(f"bench.commands.{verb}").add_command(verbs)
    parser: argparse.ArgumentParser = verbs.choices[verb]
    run = parser.get_default("run")
    if run is None:  # a verb with verbs of its own
        return

    def checked(parsed: argparse.Namespace) -> int:
        try:
            return int(run(parsed))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in EXTRA:
                raise
            hint = f"pip install 'baton-serve[bench]' ({', '.join(EXTRA)})"
            print(f"baton bench {verb} needs {error.name}: {hint}", file=sys.stderr)
            return exits.USAGE

    parser.set_defaults(run=checked)

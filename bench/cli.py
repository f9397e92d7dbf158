"""``baton bench``: the workbench's verbs. Loaded by name from ``baton/__main__.py`` where baton-serve is installed.

Owns no behaviour: each verb is a module of ``bench.commands`` with ``add_command(subparsers)``.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

VERBS = ("run", "golden", "report", "compare", "peer", "calibrate", "simulate")


def add_commands(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure a service: load, reports, peers, calibration, simulation",
        description="The workbench: an open-loop load generator, reports, peers, calibration and simulation.",
    )
    verbs = parser.add_subparsers(metavar="verb", required=True, title="verbs")
    for verb in VERBS:
        importlib.import_module(f"bench.commands.{verb}").add_command(verbs)

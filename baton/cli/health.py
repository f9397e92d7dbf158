"""``baton health``: exits 0 when a request could be placed now; for scripts and container probes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.client import DEFAULT_ADDRESS, BatonClient
from baton.errors import BatonError


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("health", help="say whether requests can be served now")
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port of the router (default %(default)s)")
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait up to S seconds for it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        with event_loop.runner() as runner:
            is_serving = runner.run(_is_serving(arguments.address, arguments.wait))
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    if is_serving:
        print("serving")
        return exits.OK
    print(f"baton: {arguments.address} is not serving", file=sys.stderr)
    return exits.UNAVAILABLE


async def _is_serving(address: str, wait_s: float) -> bool:
    async with BatonClient(address) as client:
        if wait_s <= 0:
            return await client.is_serving(timeout=5)
        try:
            await client.wait_until_serving(timeout=wait_s)
        except BatonError:
            return False
        return True

"""``baton health``: exits 0 when a request could be placed now; for scripts and container probes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.cli.arguments import add_connection_arguments, add_json_argument, addresses_of, client_of
from baton.cli.json_lines import json_line
from baton.errors import BatonError

CHECK_TIMEOUT_S = 5.0


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "health", help="say whether requests can be served now", description="Exits 0 if requests can be served now."
    )
    add_connection_arguments(parser)
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait up to S seconds for it")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        with event_loop.runner() as runner:
            is_serving = runner.run(_is_serving(arguments))
    except (OSError, ValueError) as error:
        return exits.usage(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    if arguments.json:
        print(json_line({"event": "health", "addresses": addresses_of(arguments), "is_serving": is_serving}))
    elif is_serving:
        print("serving")
    if not is_serving:
        print(f"baton: {arguments.address} is not serving", file=sys.stderr)
    return exits.OK if is_serving else exits.UNAVAILABLE


async def _is_serving(arguments: argparse.Namespace) -> bool:
    async with client_of(arguments) as client:
        if arguments.wait <= 0:
            return await client.is_serving(timeout=CHECK_TIMEOUT_S)
        try:
            await client.wait_until_serving(timeout=arguments.wait)
        except BatonError:
            return False
        return True

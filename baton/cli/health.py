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
from baton.handshake import TLS_KEY

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
            problem = runner.run(_problem(arguments))
    except (OSError, ValueError) as error:
        return exits.usage(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    is_serving = problem is None
    if arguments.json:
        print(json_line({"event": "health", "addresses": addresses_of(arguments), "is_serving": is_serving}))
    elif is_serving:
        print("serving")
    if problem is None:
        return exits.OK
    why = f": {problem.message}" if TLS_KEY in problem.metadata else ""
    print(f"baton: {arguments.address} is not serving{why}", file=sys.stderr)
    return exits.UNAVAILABLE


async def _problem(arguments: argparse.Namespace) -> BatonError | None:
    async with client_of(arguments) as client:
        if arguments.wait > 0:
            try:
                await client.wait_until_serving(timeout=arguments.wait)
            except BatonError as error:
                return error.__cause__ if isinstance(error.__cause__, BatonError) else error
            return None
        return await client.serving_problem(timeout=CHECK_TIMEOUT_S)

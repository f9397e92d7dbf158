"""``python -m router --config FILE``: a router on its own, for running it by hand or under any supervisor.

Owns the command line, the signals and the exit status: 0 stopped, 2 cannot serve as configured. The first SIGTERM or
SIGINT drains, the second ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from baton import event_loop
from baton.log_lines import log_to_stderr
from baton.secret import SECRET_VARIABLE, secret_from_environment
from router import collector
from router.config import ConfigError, RouterConfig
from router.server import RouterEndpoint, ServerError, endpoint_line, run_router

CANNOT_SERVE = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description=f"Needs {SECRET_VARIABLE} (64 hex digits).")
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help=".json or .toml, see router.config"
    )
    arguments = parser.parse_args(argv)
    try:
        config = RouterConfig.load(arguments.config)
        secret = secret_from_environment(os.environ)
        log_to_stderr(config.log_level)
        with event_loop.runner() as runner:
            runner.run(serve_until_signal(config, secret))
    except (ConfigError, ServerError, ValueError) as error:
        print(f"router: {error}", file=sys.stderr)
        return CANNOT_SERVE
    return 0


async def serve_until_signal(config: RouterConfig, secret: bytes) -> None:
    """Serves until a signal, and says where on standard output in one JSON line."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    def on_ready(endpoint: RouterEndpoint) -> None:
        collector.settle()
        print(endpoint_line(endpoint), flush=True)

    await run_router(config, secret=secret, stop=stop, hurry=hurry, on_ready=on_ready)


if __name__ == "__main__":
    sys.exit(main())

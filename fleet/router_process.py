"""The router as a supervised process: ``python -m fleet.router_process --config '{...}'`` (or a file's path).

Composes ``router.server.run_router`` with the supervisor's lifeline; owns nothing else. The cluster's secret comes by
environment. Exits non-zero when it cannot serve, having said why.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from baton import event_loop
from baton.log_lines import log_to_stderr
from baton.secret import secret_from_environment
from fleet.lifeline import Reports, die_with_parent
from fleet.toml_table import ConfigError
from router import collector
from router.config import RouterConfig
from router.server import RouterEndpoint, ServerError, run_router

log = logging.getLogger("baton.router")


def read_config(text: str) -> RouterConfig:
    """From JSON, or from a file with it. Raises ``ValueError``."""
    if not text.lstrip().startswith("{"):
        return RouterConfig.load(Path(text))
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ConfigError("--config must hold one object")
    return RouterConfig.from_mapping(data)


async def _main(config: RouterConfig, secret: bytes, reports: Reports) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    def on_ready(endpoint: RouterEndpoint) -> None:
        collector.settle()
        reports.ready(asdict(endpoint))

    await run_router(config, secret=secret, stop=stop, hurry=hurry, on_ready=on_ready)


def main() -> int:
    die_with_parent()
    reports = Reports()
    parser = argparse.ArgumentParser(prog="fleet.router_process", description=__doc__)
    parser.add_argument("--config", required=True, help="JSON of RouterConfig, or the path of a file with it")
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config)
        secret = secret_from_environment(os.environ)
        log_to_stderr(config.log_level)
        with event_loop.runner() as runner:
            runner.run(_main(config, secret, reports))
    except (ServerError, ValueError, ImportError, OSError) as error:
        print(f"router: {error}", file=sys.stderr, flush=True)
        reports.failed(str(error))
        return 1
    except Exception as error:
        log.exception("a bug in Baton")
        reports.failed(f"{type(error).__name__}: see the log")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``baton up``, ``baton down``, ``baton status`` and ``baton demo``: arguments, output and exit codes.

Owns no process; see ``commands.py``. Imported by ``baton/__main__.py`` where the server is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from baton import event_loop
from baton.admin_client import AdminClient
from baton.cli import exits
from baton.cli.phase_table import phase_lines
from baton.client import DEFAULT_ADDRESS, BatonClient, Chunk, Finished, Tls
from baton.errors import BatonError
from baton.request import ChatMessage, StopConditions
from fleet import commands, preflight
from fleet.config import FleetConfig, load_config
from fleet.ray_fleet import RayUnavailable
from fleet.state_dir import FleetRecord, StateDir
from fleet.supervisor import AlreadyRunning, supervise
from fleet.toml_table import ConfigError

DEFAULT_CONFIG = "deploy/baton.toml"
DEFAULT_WAIT_S = 600.0
DEMO_PROMPT = "What is the capital of France? Say one sentence about it."
DEMO_TOKEN_COUNT = 96

Expected = (
    ConfigError,
    AlreadyRunning,
    preflight.CannotStart,
    commands.StartFailed,
    commands.StopFailed,
    RayUnavailable,
)


def add_commands(subparsers: Any) -> None:
    up = subparsers.add_parser(
        "up", help="start a cluster", description="Starts a cluster and returns when it serves; it runs on."
    )
    _config_argument(up)
    up.add_argument(
        "--wait-s", type=float, default=DEFAULT_WAIT_S, metavar="S", help="longest wait for it (default %(default)g)"
    )
    up.add_argument("--foreground", action="store_true", help="stay, and stop the cluster on Ctrl-C")
    up.set_defaults(run=run_up)
    down = subparsers.add_parser("down", help="stop the cluster that `up` started")
    _config_argument(down)
    down.set_defaults(run=run_down)
    status = subparsers.add_parser("status", help="say what runs, and where")
    _config_argument(status)
    status.set_defaults(run=run_status)
    demo = subparsers.add_parser(
        "demo", help="start a cluster, stream one answer, show where the time went, stop the cluster"
    )
    _config_argument(demo)
    demo.add_argument("--wait-s", type=float, default=DEFAULT_WAIT_S, metavar="S", help=argparse.SUPPRESS)
    demo.add_argument("--prompt", default=DEMO_PROMPT, help="what to ask (default: %(default)s)")
    demo.set_defaults(run=run_demo)


def _config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, metavar="FILE", help="the cluster's TOML file (default %(default)s)"
    )


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def run_up(arguments: argparse.Namespace) -> int:
    return _guarded(lambda: _up(load_config(arguments.config), arguments.wait_s, arguments.foreground))


def run_down(arguments: argparse.Namespace) -> int:
    return _guarded(lambda: _down(load_config(arguments.config)))


def run_status(arguments: argparse.Namespace) -> int:
    return _guarded(lambda: _status(load_config(arguments.config)))


def run_demo(arguments: argparse.Namespace) -> int:
    return _guarded(lambda: _demo(load_config(arguments.config), arguments.wait_s, arguments.prompt))


def _guarded(command: Callable[[], Awaitable[int]]) -> int:
    """Runs it; what can be expected to go wrong becomes two lines at most."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    async def run() -> int:
        return await command()

    try:
        # Ray's processes die with the thread that started them, so everything runs on this one.
        with event_loop.runner() as runner:
            return runner.run(run())
    except Expected as error:
        print(f"baton: {error}", file=sys.stderr)
        return exits.USAGE if isinstance(error, ConfigError) else exits.FAILED
    except BatonError as error:
        return exits.report(error, "")
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("baton: interrupted", file=sys.stderr)
        return exits.INTERRUPTED


async def _up(config: FleetConfig, wait_s: float, is_foreground: bool) -> int:
    if is_foreground:
        commands.sweep(commands.refuse_running(config), say)
        preflight.check(config)
        await supervise(config, say)
        return exits.OK
    async with _interruptible():
        record = await commands.start(config, say, wait_s=wait_s)
    print(f"\nBaton serves {config.model.name} at {record.address}")
    print("\n".join(next_steps(record, has_tls=bool(config.router.tls_certificate_path))))
    return exits.OK


def next_steps(record: FleetRecord, *, has_tls: bool = False) -> list[str]:
    """Commands that work as they stand: what is not where they look by themselves is named. But the CA of a router's
    certificate, which only its owner knows. Pure."""
    address = "" if record.address == DEFAULT_ADDRESS else f" --address {record.address}"
    address += " --tls-ca FILE" if has_tls else ""
    config = "" if record.config_path == DEFAULT_CONFIG else f" --config {shlex.quote(record.config_path)}"
    return [
        f'  try   baton generate "What is the capital of France?" --phases{address}',
        f"  watch baton top{address}",
        f"  stop  baton down{config}",
    ]


async def _down(config: FleetConfig) -> int:
    if await commands.stop(config, say):
        print("Baton is stopped; no process of it is left")
    else:
        print(f"no Baton is running from {config.state_path}")
    return exits.OK


async def _status(config: FleetConfig) -> int:
    record = StateDir(config.state_path).read_record()
    if record is None:
        print(f"no Baton is running from {config.state_path}")
        return exits.UNAVAILABLE
    print("\n".join(status_lines(record)))
    if record.supervisor_pid == 0:  # on a joined Ray nobody keeps the record: ask the router
        async with AdminClient(record.admin_address) as admin, aclosing(admin.watch()) as views:
            view = await anext(views)
        print("\n".join(f"  the router sees {each.worker_id}: {each.health}" for each in view.workers))
        return exits.OK if view.is_serving else exits.UNAVAILABLE
    return exits.OK if record.is_ready else exits.UNAVAILABLE


def status_lines(record: FleetRecord) -> list[str]:
    """For people. Pure."""
    ray = f", Ray at {record.ray_address}" if record.ray_address else ""
    health = "ready" if record.is_ready else "not ready"
    lines = [f"{record.name}: {health}, at {record.address} (admin {record.admin_address}), {record.runner}{ray}"]
    for member in record.members:
        endpoint = member["endpoint"] or {}
        where = f"{endpoint.get('address', '')}, process {endpoint['pid']}" if endpoint.get("pid") else ""
        detail = f"failures {member['failure_count']}: {member['detail']}" if member["failure_count"] else ""
        lines.append(f"  {member['name']:<12} {member['state']:<9} {where}{detail}".rstrip())
    return lines


async def _demo(config: FleetConfig, wait_s: float, prompt: str) -> int:
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    is_started = False
    tls = _tls_of(config)  # BEFORE anything is started: it may raise
    async with _interruptible():
        try:
            record = await commands.start(config, say, wait_s=wait_s, dies_with_us=True)
            is_started = True
            print(f"\n  up after {loop.time() - began_at:.1f} s, at {record.address}\n\n> {prompt}\n", flush=True)
            await _one_answer(record.address, prompt, tls)
        finally:
            if is_started:
                print(flush=True)
                # Shielded: a Ctrl-C while stopping must not leave half a cluster.
                await asyncio.shield(asyncio.ensure_future(_down(config)))
    return exits.OK


def _tls_of(config: FleetConfig) -> Tls | None:
    """What it takes to call our own router; whom to trust is in the environment. Raises ``ConfigError``."""
    if not config.router.tls_certificate_path:
        return None
    try:
        return Tls.from_environment() or Tls()
    except ValueError as error:
        raise ConfigError(str(error)) from None


async def _one_answer(address: str, prompt: str, tls: Tls | None) -> None:
    loop = asyncio.get_running_loop()
    async with BatonClient(address, tls=tls) as client:
        began_at = loop.time()
        events = client.chat(
            [ChatMessage("user", prompt)],
            timeout=120.0,
            stop=StopConditions(max_output_token_count=DEMO_TOKEN_COUNT),
        )
        async with aclosing(events):
            async for event in events:
                match event:
                    case Chunk():
                        print(event.text, end="", flush=True)
                    case Finished():
                        print("\n")
                        print("\n".join(phase_lines(event, loop.time() - began_at)))


@asynccontextmanager
async def _interruptible() -> AsyncIterator[None]:
    """SIGTERM and Ctrl-C cancel this task once, so that its cleaning up is run, and not interrupted again."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    is_cancelled = False

    def cancel() -> None:
        nonlocal is_cancelled
        if not is_cancelled:
            is_cancelled = True
            print("\nbaton: interrupted; stopping what was started", file=sys.stderr, flush=True)
            task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        for number in numbers:
            with contextlib.suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(number)

"""``baton top``: a live table of the workers and of where the time of the last requests went."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from baton import event_loop
from baton.cli import exits
from baton.cli.arguments import UsageError, add_connection_arguments, add_json_argument, addresses_of, security_of
from baton.cli.json_lines import json_line, status_as_json
from baton.errors import BatonError
from baton.status_client import ServiceStatus, StatusClient, WorkerStatus

if TYPE_CHECKING:
    from rich.console import Group

ONCE_TIMEOUT_S = 5.0
_BAR_WIDTH = 10
_WIDE, _WIDE_FROM = 140, 110
_NARROW_BELOW = 92


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "top",
        help="watch the workers and the phases, live",
        description="Shows one router's workers and where the time of its last requests went, until Ctrl-C.",
    )
    add_connection_arguments(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between frames (0.1 to 60)")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.json and importlib.util.find_spec("rich") is None:
        print("baton: `baton top` needs the package rich: pip install rich, or use --json", file=sys.stderr)
        return exits.FAILED
    try:
        with event_loop.runner() as runner:
            return runner.run(_watch(arguments))
    except BatonError as error:
        return exits.report(error, arguments.address, as_json=arguments.json)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        return exits.usage(error)
    except KeyboardInterrupt:
        return exits.OK  # the way to leave a live display


async def _watch(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= 60:
        raise UsageError("--interval must be 0.1 to 60 seconds")
    addresses = addresses_of(arguments)
    if len(addresses) != 1:
        raise UsageError("--address must be one router's host:port; each tells its own")
    timeout_s = ONCE_TIMEOUT_S if arguments.once else None
    async with (
        StatusClient(addresses[0], **security_of(arguments)) as client,
        aclosing(client.watch(interval_s=arguments.interval, timeout=timeout_s)) as statuses,
    ):
        await (_print_json if arguments.json else _draw)(statuses, arguments)
    return exits.OK


async def _print_json(statuses: AsyncGenerator[ServiceStatus, None], arguments: argparse.Namespace) -> None:
    async for status in statuses:
        print(json_line(status_as_json(status)), flush=True)
        if arguments.once:
            return


async def _draw(statuses: AsyncGenerator[ServiceStatus, None], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)  # into a pipe or a file: nothing is cut off
    if arguments.once or not console.is_terminal:
        async for status in statuses:
            console.print(frame(status, arguments.address, console.width))
            if arguments.once:
                return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        async for status in statuses:
            live.update(frame(status, arguments.address, console.width), refresh=True)


def frame(status: ServiceStatus, address: str, width: int = 140) -> Group:
    """One picture of the cluster, as something rich can print. A narrow one leaves out bars, refusals and
    quarantined pulls."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    serving = Text("serving", "bold green") if status.is_serving else Text("not serving", "bold red")
    head = Text.assemble(
        ("baton ", "bold"),
        f"{address}  ",
        serving,
        f"  in flight {status.in_flight_count}  queued {status.queued_count}  "
        f"finished {status.finished_count}  failed {status.failed_count}",
    )
    workers = Table(title="workers", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    workers.add_column("worker", no_wrap=True)
    for title in ("role", "health"):
        workers.add_column(title)
    for title in ("assigned", "running", "waiting"):
        workers.add_column(title, justify="right", max_width=None if width >= _NARROW_BELOW else 4)
    workers.add_column("KV blocks", no_wrap=True)
    workers.add_column("leases", justify="right")
    for title in ("GB/s", "again"):
        workers.add_column(title, justify="right", no_wrap=True)
    is_wide = width >= _WIDE_FROM
    if is_wide:
        for title in ("no room", "quarantine"):
            workers.add_column(title, justify="right", no_wrap=True)
    for worker in status.workers:
        workers.add_row(
            worker.worker_id,
            worker.role,
            Text(worker.health, "green" if worker.health == "ready" else "yellow"),
            str(worker.assigned_count),
            str(worker.running_count),
            str(worker.waiting_count),
            _kv_usage(worker, has_bar=is_wide),
            str(worker.held_lease_count),
            f"{worker.kv_bytes_per_s / 1e9:.2f}" if worker.kv_bytes_per_s else "–",
            f"{worker.recomputed_share:.1%}" if worker.recomputed_share else "–",
            *((_count(worker.no_room_count), _count(worker.quarantined_pull_count)) if is_wide else ()),
        )
    phases = Table(
        title="phases of the last requests",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    phases.add_column("phase")
    for title in ("p50 ms", "p95 ms", "samples"):
        phases.add_column(title, justify="right")
    for phase in status.phases:
        name = phase.name.replace("_", " ").replace("kv ", "KV ")
        is_empty = phase.sample_count == 0
        phases.add_row(
            name,
            "–" if is_empty else f"{phase.p50_s * 1e3:.1f}",
            "–" if is_empty else f"{phase.p95_s * 1e3:.1f}",
            str(phase.sample_count),
        )
    return Group(head, workers, phases)


def _count(count: int) -> str:
    return str(count) if count else "–"


def _kv_usage(worker: WorkerStatus, *, has_bar: bool) -> str:
    if worker.block_count == 0:
        return "–"
    said = f"{worker.used_block_count}/{worker.block_count}"
    share = worker.used_block_count / worker.block_count
    filled = round(share * _BAR_WIDTH)
    bar = f"{'█' * filled}{'·' * (_BAR_WIDTH - filled)} " if has_bar else ""
    return f"{bar}{share:>4.0%} {said}"

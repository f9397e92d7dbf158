"""``baton top``: a live table of the workers and of where the time of the last requests went."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from baton import event_loop
from baton.admin_client import DEFAULT_ADMIN_ADDRESS, AdminClient, ClusterView, WorkerView
from baton.cli import exits
from baton.errors import BatonError

if TYPE_CHECKING:
    from rich.console import Group

_BAR_WIDTH = 10
_WIDE, _WIDE_FROM = 140, 110
_NARROW_BELOW = 92


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("top", help="watch the workers and the phases, live")
    parser.add_argument(
        "--address", default=DEFAULT_ADMIN_ADDRESS, help="host:port of the router's admin API (default %(default)s)"
    )
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between frames (0.1 to 60)")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import rich  # noqa: F401
    except ImportError:
        print("baton: `baton top` needs the package rich: pip install baton-serve, or rich alone", file=sys.stderr)
        return exits.FAILED
    if not 0.1 <= arguments.interval <= 60:
        print("baton: --interval must be 0.1 to 60 seconds", file=sys.stderr)
        return exits.USAGE
    try:
        with event_loop.runner() as runner:
            return runner.run(_watch(arguments))
    except BatonError as error:
        return exits.report(error, arguments.address)
    except KeyboardInterrupt:
        return exits.OK  # the way to leave a live display


async def _watch(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)  # into a pipe or a file: nothing is cut off
    async with AdminClient(arguments.address) as client:
        snapshots = client.watch(interval_s=arguments.interval)
        async with aclosing(snapshots):
            if arguments.once:
                async with asyncio.timeout(5):
                    console.print(frame(await anext(snapshots), arguments.address, console.width))
                return exits.OK
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                async for view in snapshots:
                    live.update(frame(view, arguments.address, console.width), refresh=True)
    return exits.OK


def frame(view: ClusterView, address: str, width: int = 140) -> Group:
    """One picture of the cluster, as something rich can print. A narrow one leaves out bars and addresses."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    serving = Text("serving", "bold green") if view.is_serving else Text("not serving", "bold red")
    head = Text.assemble(
        ("baton ", "bold"),
        f"{address}  ",
        serving,
        f"  in flight {view.in_flight_count}  queued {view.queued_count}  "
        f"finished {view.finished_count}  failed {view.failed_count}",
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
        workers.add_column("no room", justify="right", no_wrap=True)
        workers.add_column("address")
    for worker in view.workers:
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
            *([str(worker.no_room_count) if worker.no_room_count else "–", worker.address] if is_wide else []),
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
    for phase in view.phases:
        name = phase.name.replace("_", " ").replace("kv ", "KV ")
        is_empty = phase.sample_count == 0
        phases.add_row(
            name,
            "–" if is_empty else f"{phase.p50_ms:.1f}",
            "–" if is_empty else f"{phase.p95_ms:.1f}",
            str(phase.sample_count),
        )
    return Group(head, workers, phases)


def _kv_usage(worker: WorkerView, *, has_bar: bool) -> str:
    if worker.block_count == 0:
        return "–"
    said = f"{worker.used_block_count}/{worker.block_count}"
    share = worker.used_block_count / worker.block_count
    filled = round(share * _BAR_WIDTH)
    bar = f"{'█' * filled}{'·' * (_BAR_WIDTH - filled)} " if has_bar else ""
    return f"{bar}{share:>4.0%} {said}"

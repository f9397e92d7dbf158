"""The ``baton`` command. ``generate``, ``chat``, ``models``, ``top`` and ``health`` need only the client and
the public API; the commands that run a cluster come from the fleet, where it is installed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence

from baton import __version__

BENCH_RUN_EXPERIMENTS = "-event_engine_client"
"""What gRPC is told in the process of ``baton bench run``, which starts no server that could inherit it. gRPC 1.85
reads a client's sockets in threads of its event engine, which wake the completion queue's thread, which wakes ours;
without them that thread reads itself: about 0.7 instead of 0.8 of a core at 10,000 messages/s."""
# Both are read once, when grpc is imported: just below.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its remarks, as on handshakes, are not for people
if sys.argv[1:3] == ["bench", "run"]:
    os.environ.setdefault("GRPC_EXPERIMENTS", BENCH_RUN_EXPERIMENTS)

from baton.cli import chat, exits, generate, health, key, models, top  # noqa: E402

_FLEET_VERBS = ("up", "down", "status", "demo")
_NEEDS_FLEET = "The commands that run a cluster (up, down, status, demo) and the workbench (bench) need baton-serve."
_EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong command line or request, 3 not reachable or cannot serve now, "
    "4 the deadline passed, 5 not permitted (API key), 130 interrupted, 141 the reader of our output has gone."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows fewer characters than a model must not end an answer.
            stream.reconfigure(errors="backslashreplace")
    has_fleet = _is_installed("fleet.cli")
    if not has_fleet and arguments and arguments[0] in (*_FLEET_VERBS, "bench"):
        print(f"baton: `baton {arguments[0]}` needs baton-serve: pip install baton-serve", file=sys.stderr)
        return exits.USAGE
    parser = _parser(has_fleet, arguments)
    parsed = parser.parse_args(arguments)  # argparse itself exits with 2 on a usage error
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # `baton generate ... | head -1`: the answer was cancelled on the way here. What the interpreter still flushes
        # when it ends must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.PIPE_CLOSED
    return code


def _parser(has_fleet: bool, arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Baton: gRPC inference with disaggregated prefill and decode.",
        epilog=_EXIT_CODES if has_fleet else f"{_NEEDS_FLEET} {_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"baton {__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True, title="commands")
    for command in (generate, chat, models, top, health, key):
        command.add_command(subparsers)
    if has_fleet:
        # By name, so that the client's package never depends on the server's.
        importlib.import_module("fleet.cli").add_commands(subparsers)
        # It is given the arguments, and loads of itself only what they ask for.
        importlib.import_module("bench.cli").add_commands(subparsers, arguments)
    return parser


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


if __name__ == "__main__":
    sys.exit(main())

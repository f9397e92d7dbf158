"""Exit codes of the ``baton`` command, and the one line that an error becomes.

0 done                   3 not reachable, or cannot serve now: try again     130 interrupted
1 failed                 4 the deadline passed                               141 who read our output has gone
2 wrong command line     5 not permitted: the API key
  or request
"""

from __future__ import annotations

import sys

from baton.cli.json_lines import error_as_json, json_line
from baton.errors import BatonError, ModelNotFound, StatusName
from baton.handshake import TLS_KEY

OK = 0
FAILED = 1
USAGE = 2
UNAVAILABLE = 3
DEADLINE = 4
DENIED = 5
INTERRUPTED = 130
PIPE_CLOSED = 141

_CODES = {
    StatusName.INVALID_ARGUMENT: USAGE,
    StatusName.UNAVAILABLE: UNAVAILABLE,
    StatusName.RESOURCE_EXHAUSTED: UNAVAILABLE,
    StatusName.ABORTED: UNAVAILABLE,
    StatusName.DEADLINE_EXCEEDED: DEADLINE,
    StatusName.UNAUTHENTICATED: DENIED,
    StatusName.PERMISSION_DENIED: DENIED,
}


def exit_code(error: BatonError) -> int:
    return USAGE if isinstance(error, ModelNotFound) else _CODES.get(error.status, FAILED)


def error_line(error: BatonError, address: str) -> str:
    """One line: what happened, and what to do where that is not already said."""
    line = f"baton: {error.message}".replace("\n", " ")
    if error.status is StatusName.UNAVAILABLE and "transport" in error.metadata and TLS_KEY not in error.metadata:
        return f"baton: no Baton answers at {address}; start one with `baton up` or name it with --address"
    if len(error.violations) > 1:
        line += "; also " + "; ".join(f"{v.field} {v.description}" for v in error.violations[1:])
    return line


def report(error: BatonError, address: str, *, as_json: bool = False) -> int:
    """Prints the line to stderr, as JSON also to stdout, and returns the exit code."""
    if as_json:
        print(json_line(error_as_json(error)), flush=True)
    print(error_line(error, address), file=sys.stderr)
    return exit_code(error)


def usage(error: OSError | ValueError) -> int:
    """The same for a file that cannot be read, or a number that no message can carry."""
    print(f"baton: {error}", file=sys.stderr)
    return USAGE

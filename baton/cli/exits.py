"""Exit codes of the ``baton`` command, and the one line that an error becomes."""

from __future__ import annotations

import sys

from baton.errors import BatonError, StatusName

OK = 0
FAILED = 1
USAGE = 2
UNAVAILABLE = 3
DEADLINE = 4
INTERRUPTED = 130

_CODES = {
    StatusName.INVALID_ARGUMENT: USAGE,
    StatusName.NOT_FOUND: USAGE,
    StatusName.UNAVAILABLE: UNAVAILABLE,
    StatusName.RESOURCE_EXHAUSTED: UNAVAILABLE,
    StatusName.ABORTED: UNAVAILABLE,
    StatusName.DEADLINE_EXCEEDED: DEADLINE,
}


def exit_code(error: BatonError) -> int:
    return _CODES.get(error.status, FAILED)


def error_line(error: BatonError, address: str) -> str:
    """One line: what happened, and what to do where that is not already said."""
    line = f"baton: {error.message}".replace("\n", " ")
    if error.status is StatusName.UNAVAILABLE and "transport" in error.metadata:
        return f"baton: no Baton answers at {address}; start one with `baton up` or name it with --address"
    if len(error.violations) > 1:
        line += "; also " + "; ".join(f"{v.field} {v.description}" for v in error.violations[1:])
    return line


def report(error: BatonError, address: str) -> int:
    """Prints the line to stderr and returns the exit code."""
    print(error_line(error, address), file=sys.stderr)
    return exit_code(error)

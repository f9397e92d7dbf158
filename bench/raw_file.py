"""How a long benchmark keeps what it measures: a line of JSON per record, written at once, so that a run cut short
loses nothing; and how it ends when it is told to.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, TextIO


def write(raw: TextIO, document: dict[str, Any]) -> None:
    """Appends one record and gives it to the system."""
    raw.write(json.dumps(document, separators=(",", ":")) + "\n")
    raw.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of a run, whole or cut short. Raises ``ValueError`` for a line that is not JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def say(line: str) -> None:
    """Progress, beside what goes to standard output."""
    print(line, file=sys.stderr, flush=True)


def end_on_sigterm() -> None:
    """A terminated benchmark must still end its servers: SIGTERM unwinds the stack, with the shell's exit status."""
    signal.signal(signal.SIGTERM, _raise_exit)


def _raise_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)

"""The child's side of being supervised: it dies with its parent, and says when it is ready.

Owns the report pipe of this process. The parent's side is ``child_process.py``. Without a supervisor (started by
hand), everything here does nothing.

Reports are JSON objects, one per line: ``{"progress": "..."}``, ``{"ready": {...}}``, ``{"failed": "..."}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
from collections.abc import Mapping
from typing import Any

PARENT_VARIABLE = "BATON_FLEET_PARENT_PID"
REPORT_VARIABLE = "BATON_FLEET_REPORT_FD"

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """First thing in a supervised process: the kernel kills it when the supervisor dies, however that dies.

    Done here and not between fork and exec by the parent, because code between the two is unsafe in a parent with
    threads (gRPC, Ray). The signal belongs to the parent's *thread* that forked: supervisors fork from a thread that
    lives as long as they do.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the call above: then no signal will ever come
        os._exit(1)


class Reports:
    """Writes to the supervisor's pipe. A pipe nobody reads any more is no reason to fail."""

    def __init__(self) -> None:
        number = os.environ.pop(REPORT_VARIABLE, "")
        self._fd: int | None = int(number) if number else None
        if self._fd is not None:
            os.set_inheritable(self._fd, False)  # an engine process must not hold the pipe open

    def progress(self, text: str) -> None:
        """A step that takes long has begun."""
        self._write({"progress": text})

    def ready(self, endpoint: Mapping[str, Any]) -> None:
        self._write({"ready": dict(endpoint)})

    def failed(self, text: str) -> None:
        """Why this process is about to end, for people. Never holds prompt or output text."""
        self._write({"failed": text})

    def _write(self, message: Mapping[str, Any]) -> None:
        if self._fd is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._fd, json.dumps(message).encode() + b"\n")

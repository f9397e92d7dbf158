"""The generator's priority: it shares a machine with what it measures, and has to send and stamp on time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

GENERATOR_NICENESS = -10


@contextlib.contextmanager
def ahead_of_the_servers() -> Iterator[int]:
    """Runs this process before others that want its core, where that is allowed; yields its main thread's niceness.

    For the time of a load only, and while nothing is started: what is started inherits it. Where it is not allowed
    the generator stays where it is, and its lag tells.
    """
    before = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in _threads()}
    _set({thread: min(niceness, GENERATOR_NICENESS) for thread, niceness in before.items()})
    try:
        yield os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        usual = before[os.getpid()]
        _set({thread: before.get(thread, usual) for thread in _threads()})


def _threads() -> list[int]:
    """Linux sets the priority of a thread, not of a process; those of a gRPC channel that is open count as well."""
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _set(wanted: dict[int, int]) -> None:
    for thread, niceness in wanted.items():
        with contextlib.suppress(PermissionError, ProcessLookupError):  # not allowed, or ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, niceness)

"""Which processes belong to a fleet, as the kernel tells it. Reads /proc; ends a process only when told which.

A process is named by its number and its start time together: a number alone may have been reused.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from fleet.state_dir import process_start

ProcessName = tuple[int, str]


def descendants(root_pid: int) -> frozenset[ProcessName]:
    """The process and everything below it that lives now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    queue = [root_pid]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, [])
    return frozenset((pid, start) for pid in found if (start := process_start(pid)))


def alive(processes: Iterable[ProcessName]) -> frozenset[ProcessName]:
    """Those that still are; zombies are not."""
    return frozenset((pid, start) for pid, start in processes if start and process_start(pid) == start)


def named(command: str, processes: Iterable[ProcessName]) -> frozenset[ProcessName]:
    """Those whose command name, as the kernel has it, is ``command``."""
    found = set()
    for pid, start in processes:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip() == command:
                found.add((pid, start))
    return frozenset(found)


def kill(processes: Iterable[ProcessName]) -> None:
    for pid, _ in alive(processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])

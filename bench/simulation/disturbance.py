"""How much of the machine others used, moment by moment, while something was measured. Linux only.

Others are all processes but this one and its descendants: another user's build, the kernel's own work, a hypervisor's
theft. What they take makes steps long, and is no property of the engine.
"""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import MachineClock

PERIOD_S = 0.5
"""The kernel counts in hundredths: shorter spans would be mostly rounding."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Others:
    """From the sample before it until ``until`` (CLOCK_MONOTONIC), others used ``core_share`` of one core."""

    until: float
    core_share: float


def others_during(samples: Sequence[Others], start: float, end: float) -> float:
    """The largest share in any span that touches [start, end]; 0 where nothing was sampled."""
    first = bisect_left(samples, start, key=lambda each: each.until)
    largest = 0.0
    for sample in samples[first:]:
        largest = max(largest, sample.core_share)
        if sample.until >= end:
            break
    return largest


class Watch:
    """``run`` samples until cancelled. The processes to call ours are those alive when it begins."""

    def __init__(self) -> None:
        self.samples: list[Others] = []

    async def run(self) -> None:
        ours = descendants(os.getpid())
        before, used, at = _read(ours)
        while True:
            await asyncio.sleep(PERIOD_S)
            now, now_used, until = _read(ours)
            machine_s = now.busy_s - before.busy_s + now.steal_s - before.steal_s
            share = max(0.0, machine_s - (now_used - used)) / (until - at)
            self.samples.append(Others(until, round(share, 3)))
            before, used, at = now, now_used, until


def _read(pids: Sequence[int]) -> tuple[MachineClock, float, float]:
    """Of the machine, of the processes, and when; as close together as can be."""
    return MachineClock.read(), _cpu_s(pids), time.monotonic()


def descendants(root: int) -> list[int]:
    """Process ids of ``root`` and all that came from it and live."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _cpu_s(pids: Sequence[int]) -> float:
    total = 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """From the state on; empty for a process that is gone. Its name may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

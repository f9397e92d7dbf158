"""The machine a run was taken on, and what happened on it meanwhile: what ``bench/machine.py`` tells, and the rest of
what a reader needs to judge a figure. Linux; what cannot be read is None and never guessed."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.machine import MachineClock, machine_facts

_CGROUPS = Path("/sys/fs/cgroup")
_NO_MEMORY_LIMIT = 2**60
_PACKAGES = ("uvloop", "numpy", "protobuf", "aiohttp", "grpcio", "baton-serve", "baton-client")


def environment_facts() -> dict[str, Any]:
    """What holds for the whole run. Names no host and no path."""
    return {
        **machine_facts(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "cgroup": cgroup_limits(),
        "generator_packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "is_virtual_machine": "hypervisor" in (_read(Path("/proc/cpuinfo")) or "").partition("flags")[2][:4096],
    }


@dataclass(frozen=True, slots=True)
class Watch:
    """Counters of machine and generator at one moment."""

    clock: MachineClock
    context_switch_count: int | None
    """Of the whole machine."""
    throttled_s: float | None
    """By which the cgroup's CPU limit held its processes back."""
    own: resource.struct_rusage

    @classmethod
    def start(cls) -> Watch:
        return cls(
            clock=MachineClock.read(),
            context_switch_count=_field(Path("/proc/stat"), "ctxt"),
            throttled_s=_throttled_s(),
            own=resource.getrusage(resource.RUSAGE_SELF),
        )

    def since(self) -> dict[str, Any]:
        """What happened since: shares of all cores' time, counts, the generator's own CPU time."""
        now = Watch.start()
        own_cpu_s = now.own.ru_utime + now.own.ru_stime - self.own.ru_utime - self.own.ru_stime
        use = now.clock.use_since(self.clock, own_cpu_s)
        return {
            "busy_share": use.busy_share,
            "steal_share": use.steal_share,
            "context_switch_count": _difference(now.context_switch_count, self.context_switch_count),
            "cgroup_throttled_s": _difference(now.throttled_s, self.throttled_s),
            "generator_cpu_s": own_cpu_s,
            "generator_voluntary_switch_count": now.own.ru_nvcsw - self.own.ru_nvcsw,
            "generator_involuntary_switch_count": now.own.ru_nivcsw - self.own.ru_nivcsw,
            "load_average": [round(load, 2) for load in os.getloadavg()],
        }


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def cgroup_limits() -> dict[str, str | None]:
    """``cpu_max``: quota and period in microseconds; ``memory_max``: bytes; "max" is no limit. Of cgroup v2 or v1."""
    cpu_max = _read(_own_cgroup() / "cpu.max")
    quota, period = (_read(_own_cgroup("cpu") / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if cpu_max is None and quota is not None:
        cpu_max = f"{'max' if quota == '-1' else quota} {period}"
    memory_max = _read(_own_cgroup() / "memory.max") or _read(_own_cgroup("memory") / "memory.limit_in_bytes")
    if memory_max is not None and memory_max.isdigit() and int(memory_max) >= _NO_MEMORY_LIMIT:
        memory_max = "max"  # as v1 spells it
    return {"cpu_max": cpu_max, "memory_max": memory_max}


def _throttled_s() -> float | None:
    if (microseconds := _field(_own_cgroup() / "cpu.stat", "throttled_usec")) is not None:
        return microseconds / 1e6
    nanoseconds = _field(_own_cgroup("cpu") / "cpu.stat", "throttled_time")
    return None if nanoseconds is None else nanoseconds / 1e9


def _own_cgroup(controller: str = "") -> Path:
    """Of this process; ``controller`` is v1's, without it v2. Where it is not told, the root's."""
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _CGROUPS / controller / path.lstrip("/")
    return _CGROUPS / controller


def _field(path: Path, name: str) -> int | None:
    for line in (_read(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

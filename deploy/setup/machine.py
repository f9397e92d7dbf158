"""Whether this machine can run Baton at all, asked before anything is downloaded.

Pure questions over what the caller read from the machine, and one function that reads and asks them all.
Never changes anything.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from deploy.setup.console import StepFailed

PYTHON = (3, 11)
"""The lock pins wheels for this version of CPython."""
MIN_GLIBC = (2, 28)
"""The oldest C library that the wheels of vLLM, torch and NIXL accept (manylinux_2_28)."""
FRESH_DISK_BYTES = 6 * 10**9
"""Environment 3.6 GB, pip's downloads 1.5 GB, model and its conversion 0.6 GB, and some room."""
REFRESH_DISK_BYTES = 10**9


def check_python(version: tuple[int, int], executable: str) -> None:
    if version != PYTHON:
        wanted = f"{PYTHON[0]}.{PYTHON[1]}"
        raise StepFailed(
            f"{executable} is Python {version[0]}.{version[1]}; the lock is made for Python {wanted}",
            f"install Python {wanted} and run make again, or name one: make PYTHON=/path/to/python{wanted} ...",
        )


def check_platform(system: str, machine: str, glibc: tuple[int, int] | None) -> None:
    """``glibc`` is None where the C library is another one (musl, for example)."""
    if system != "Linux" or machine != "x86_64":
        raise StepFailed(
            f"this is {system} on {machine}; the CPU lock holds wheels for Linux on x86_64 only",
            "use a Linux x86_64 machine, or a virtual machine of that kind",
        )
    if glibc is None or glibc < MIN_GLIBC:
        found = "not glibc" if glibc is None else f"glibc {glibc[0]}.{glibc[1]}"
        raise StepFailed(
            f"the C library is {found}; the wheels need glibc {MIN_GLIBC[0]}.{MIN_GLIBC[1]} or newer",
            "use a newer distribution (Debian 11, Ubuntu 20.04, RHEL 8.5 and later do; Alpine does not)",
        )


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The instruction set flags of the first processor in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def check_cpu(flags: frozenset[str]) -> None:
    if not flags & {"avx2", "avx512f"}:
        raise StepFailed(
            "this processor has neither AVX2 nor AVX-512; vLLM's CPU kernels need one of them",
            "use a processor from 2015 or later; in a virtual machine, pass the host's CPU model through",
        )


def check_disk(path: Path, free_bytes: int, needed_bytes: int, purpose: str) -> None:
    if free_bytes < needed_bytes:
        raise StepFailed(
            f"{path} has {free_bytes / 1e9:.1f} GB free; {purpose} needs about {needed_bytes / 1e9:.0f} GB",
            "free some space there, or move it: the environment with make VENV=/elsewhere/venv, "
            "the model with BATON_HOME=/elsewhere",
        )


def free_bytes_at(path: Path) -> int:
    """Free space of the filesystem that will hold ``path``, which need not exist yet."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def check_machine() -> None:
    """Raises ``StepFailed`` for the first reason found why Baton cannot run here."""
    check_python(sys.version_info[:2], sys.executable)
    check_platform(platform.system(), platform.machine(), _glibc())
    check_cpu(cpu_flags(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")))


def _glibc() -> tuple[int, int] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) if name == "glibc" else None
    except (ValueError, OSError):
        return None

"""Child processes of a benchmark: started on given cores, counted with all their descendants, ended without a rest.

A process belongs to a ``Child`` if it is a descendant, or is in its session, or has its mark in the
environment, or was once seen to belong. One of these alone would miss some: a lost engine core has another
parent, Ray makes sessions of its own, and vLLM writes its process title over its environment. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "BATON_BENCH_CHILD"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
if sys.argv[2]:
    os.sched_setaffinity(0, [int(core) for core in sys.argv[2].split(",")])
os.execvp(sys.argv[3], sys.argv[3:])
"""
# Asks for SIGTERM, not SIGKILL, when we die: a vLLM server then still ends its engine core. In a launcher and
# not in a preexec_fn, because gRPC runs threads in the benchmark and code between fork and exec could hang.


class ChildError(RuntimeError):
    """A child did not start, did not become ready or could not be ended; the message carries its log's end."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds of a tree so far, by command name."""

    by_command: Mapping[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.by_command.values())

    def since(self, earlier: Cpu) -> Cpu:
        spent = {
            name: round(seconds - earlier.by_command.get(name, 0.0), 2) for name, seconds in self.by_command.items()
        }
        return Cpu({name: seconds for name, seconds in spent.items() if seconds > 0})


@dataclass(frozen=True, slots=True)
class _Process:
    """One line of /proc/*/stat; zombies are left out."""

    pid: int
    command: str
    parent_pid: int
    session_id: int
    cpu_ticks: int
    started_ticks: int


def _all_processes() -> Iterator[_Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            text = (entry / "stat").read_text()
            command, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            if fields[0] in ("Z", "X"):
                continue
            # utime, stime, and both of reaped children
            ticks = sum(int(field) for field in fields[11:15])
            yield _Process(int(entry.name), command, int(fields[1]), int(fields[3]), ticks, int(fields[19]))


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or another user's
        return []


class Child:
    """One started command and its descendants. ``stop`` is the one way out; it is safe to call twice."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        cores: Sequence[int] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_grace_s: float = 15.0,
    ) -> None:
        """Starts ``command`` at once, its output to ``log_path``, on ``cores`` (None: all of ours)."""
        self.name = name
        self.log_path = log_path
        self._stop_signal = stop_signal
        self._stop_grace_s = stop_grace_s
        self._mark = secrets.token_hex(8)
        self._known: set[tuple[int, int]] = set()
        core_list = ",".join(str(core) for core in cores or ())
        launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(os.getpid()), core_list]
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 commands are built here, not taken from input
                [*launcher, *command],
                env={**environment, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def pids(self) -> list[int]:
        """All live processes of the tree, this one included."""
        return [process.pid for process in self._processes()]

    def _processes(self) -> list[_Process]:
        everything = {process.pid: process for process in _all_processes()}
        mark = f"{_MARK}={self._mark}".encode()
        root = self._process.pid
        ours: dict[int, _Process] = {}
        for pid, process in everything.items():
            is_known = (pid, process.started_ticks) in self._known
            if is_known or root in (pid, process.session_id) or mark in _environment(pid):
                ours[pid] = process
        while True:
            found = {
                pid: process for pid, process in everything.items() if pid not in ours and process.parent_pid in ours
            }
            if not found:
                break
            ours |= found
        self._known |= {(pid, process.started_ticks) for pid, process in ours.items()}
        return list(ours.values())

    def cpu(self) -> Cpu:
        """CPU time of the tree, that of ended and reaped descendants included."""
        by_command: dict[str, float] = {}
        for process in self._processes():
            seconds = process.cpu_ticks / _TICKS_PER_S
            by_command[process.command] = by_command.get(process.command, 0.0) + seconds
        return Cpu(by_command)

    def by_process(self) -> dict[int, tuple[str, int, float]]:
        """Command name, parent and CPU seconds so far of every live process of the tree."""
        return {p.pid: (p.command, p.parent_pid, p.cpu_ticks / _TICKS_PER_S) for p in self._processes()}

    def pin(self, cores: Sequence[int]) -> int:
        """Moves every thread of the tree to ``cores``, as ``taskset -a`` would; how many were moved."""
        moved = 0
        for pid in self.pids():
            for task in (Path("/proc") / str(pid) / "task").iterdir():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task.name), cores)
                    moved += 1
        return moved

    def stop(self) -> None:
        """Ends the tree: ``stop_signal`` to the command, then SIGKILL to whatever is left. Raises if
        something stays."""
        if self.is_running():
            self._process.send_signal(self._stop_signal)
        deadline = time.monotonic() + self._stop_grace_s
        while self.pids() and time.monotonic() < deadline:
            self._process.poll()  # reaps it, so that it leaves /proc
            time.sleep(0.1)
        kill_deadline = time.monotonic() + 5.0
        while left := self.pids():
            if time.monotonic() > kill_deadline:
                raise ChildError(f"{self.name}: processes {left} do not end")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)
        self._process.wait(timeout=5.0)

    def log_tail(self, line_count: int = 15) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-line_count:])

    def failed(self, what: str) -> ChildError:
        return ChildError(f"{self.name} {what}; end of {self.log_path}:\n{self.log_tail()}")

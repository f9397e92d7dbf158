"""One supervised child process: started, listened to, ended, with nothing of it left behind.

Owns the process, its process group, its report pipe and its log file. Decides nothing. Must be used on an event
loop whose thread outlives the children: the kernel's parent-death signal belongs to the thread that forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fleet
from fleet.lifeline import PARENT_VARIABLE, REPORT_VARIABLE

LOG_BYTES_MAX = 16 << 20
REPORT_BYTES_MAX = 1 << 20
SOURCE_ROOT = str(Path(fleet.__file__).resolve().parent.parent)
"""Where this program is imported from; its children import the same one."""


class Listener(Protocol):
    """Who wants to know what became of a launched member. All calls come on the launcher's loop."""

    def on_progress(self, text: str) -> None: ...
    def on_ready(self, endpoint: Mapping[str, Any]) -> None: ...
    def on_unready(self) -> None: ...
    def on_exit(self, detail: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start a member. ``env`` is added to this process's own and may hold the secret: not in ``repr``."""

    name: str
    module: str
    """Run as ``python -m module``."""
    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    fingerprint: str = ""


class ChildProcess:
    """A running child. Reports to ``listener``; ``on_exit`` comes exactly once, when nothing of its group is left."""

    def __init__(self, spec: ChildSpec, log_path: Path, listener: Listener) -> None:
        """Starts it. Raises ``OSError`` if that is not possible."""
        self.spec = spec
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._failure = ""
        reader, writer = os.pipe()
        try:
            with _open_log(log_path) as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module with our own arguments
                    [sys.executable, "-m", spec.module, *spec.arguments],
                    env={**_inherited(), **_env(spec, writer)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writer,),
                    start_new_session=True,  # its own group, which ends as a whole, and no Ctrl-C from our terminal
                )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._reader = reader
        os.set_blocking(reader, False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(reader, self._on_report)
        self._loop.add_reader(self._pidfd, self._on_death)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask_to_stop(self) -> None:
        """SIGTERM to the process alone: it stops its own engine in order."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its whole group."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _on_report(self) -> None:
        try:
            data = os.read(self._reader, 65536)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._reader)
            return
        self._buffer += data
        if len(self._buffer) > REPORT_BYTES_MAX:
            self._buffer = b""
        while (end := self._buffer.find(b"\n")) >= 0:
            line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return
        match message:
            case {"progress": str(text)}:
                self._listener.on_progress(text)
            case {"ready": dict(endpoint)}:
                self._listener.on_ready({**endpoint, "pid": self.pid})
            case {"failed": str(text)}:
                self._failure = text

    def _on_death(self) -> None:
        self._on_report()  # what it said last may still be in the pipe
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._reader)
        os.close(self._pidfd)
        os.close(self._reader)
        # Before it is reaped: as long as it is a zombie its number cannot belong to anyone else's group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        said = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        self._listener.on_exit(f"{said}: {self._failure}" if self._failure else said)


def _inherited() -> dict[str, str]:
    """Our own environment, without what belongs to Ray: a worker has no business with its token."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _env(spec: ChildSpec, report_fd: int) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH", "")
    roots = [SOURCE_ROOT, *(each for each in inherited.split(os.pathsep) if each and each != SOURCE_ROOT)]
    return {
        "PYTHONPATH": os.pathsep.join(roots),
        "PYTHONUNBUFFERED": "1",
        **spec.env,
        PARENT_VARIABLE: str(os.getpid()),
        REPORT_VARIABLE: str(report_fd),
    }


def _open_log(path: Path) -> Any:
    """Appends; a log that grew too long is kept once as ``.old`` and begun anew."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(path.suffix + ".old"))
    return path.open("ab")

"""How the set-up talks: one line per step, a sign of life in every long one, and failures that say what to do.

Owns the output and the running of child commands; knows nothing about what the steps are for. Standard
library only, like everything in this folder that runs before the environment exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

QUIET_S = 5.0
"""On a pipe (a log file, a build server) progress is printed at most this often."""


class StepFailed(Exception):
    """A step that cannot work: what is wrong, and what the person in front of it can do."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


def say(text: str) -> None:
    print(text, flush=True)


class Progress:
    """One long step. On a terminal its line is rewritten; on a pipe a new line comes every few seconds.

    Starts a thread that keeps the elapsed time moving; ``close`` ends it.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._detail = ""
        self._started = time.monotonic()
        self._printed = self._started
        self._is_terminal = sys.stdout.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        say(f"  {title} ...")
        self._thread.start()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def update(self, detail: str) -> None:
        self._detail = detail

    def close(self, result: str = "done") -> None:
        self._done.set()
        self._thread.join()
        if self._is_terminal:
            print("\r\033[K", end="")
        say(f"  {self._title}: {result} ({self.elapsed_s:.0f} s)")

    def _beat(self) -> None:
        while not self._done.wait(0.5):
            line = f"    {self.elapsed_s:4.0f} s  {self._detail}"
            if self._is_terminal:
                width = os.get_terminal_size().columns if sys.stdout.isatty() else 100
                print("\r\033[K" + line[: width - 1], end="", flush=True)
            elif time.monotonic() - self._printed >= QUIET_S:
                self._printed = time.monotonic()
                say(line)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A ``Progress`` that is closed whatever happens."""
    step = Progress(title)
    try:
        yield step
    except BaseException:
        step.close("failed")
        raise
    step.close()


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Runs a command, appends its output to ``log`` and returns it.

    Raises ``subprocess.CalledProcessError`` with the output if it fails. The child is ended if we are interrupted.
    """
    lines: list[str] = []
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(  # noqa: S603 - our own argument lists, no shell
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(env) if env is not None else None,
            cwd=cwd,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                sink.write(line)
                if on_line is not None:
                    on_line(line.strip())
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    output = "".join(lines)
    if code != 0:
        raise subprocess.CalledProcessError(code, list(command), output)
    return output


@contextlib.contextmanager
def only_one(lock_path: Path, doing: str) -> Iterator[None]:
    """Holds a file lock, so that two set-ups of the same thing take turns instead of corrupting it."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  waiting: another process is {doing}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main_guard(main: Callable[[], None]) -> None:
    """Runs a script's main; a failed step ends it with its two sentences and exit status 1. SIGTERM interrupts like
    Ctrl-C, so that the command in progress is ended with us."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except StepFailed as failure:
        print(f"\n  cannot go on: {failure.what}\n  what to do:   {failure.remedy}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\n  interrupted; run the same command again to go on from here\n", file=sys.stderr, flush=True)
        sys.exit(130)

"""Children of a benchmark: nothing of them is left, however they hide, and all their CPU time is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.children import Child

DETACHES = """
import os, subprocess, sys, time
# A grandchild in its own session, its parent ended, that ignores SIGTERM: as a lost engine core might.
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}],"
                  " start_new_session=True)"], start_new_session=True).wait()
print("ready", flush=True)
time.sleep(600)
"""
HIDES = """
# Writes over its own environment, as a process title does, in a child of a session of its own.
import ctypes, subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    time.sleep(600)
start, end = (int(f) for f in open("/proc/self/stat").read().rpartition(")")[2].split()[47:49])
ctypes.memset(start, 0, end - start)
print("ready", flush=True)
time.sleep(600)
"""
BURNS = """
import time, subprocess, sys
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"]).wait()
    print("ready", flush=True)
    time.sleep(600)
end = time.process_time() + 0.5
while time.process_time() < end: pass
"""


def start(tmp_path: Path, code: str, cores: list[int] | None = None, *, stop_grace_s: float = 15.0) -> Child:
    script = tmp_path / "script.py"
    script.write_text(code)
    return Child(
        "script",
        [sys.executable, str(script)],
        environment=os.environ,
        log_path=tmp_path / "log",
        cores=cores,
        stop_grace_s=stop_grace_s,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """A zombie that init has yet to reap has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def is_ready(child: Child) -> bool:
    return "ready" in child.log_tail()


def test_a_detached_grandchild_that_ignores_sigterm_is_ended_too(tmp_path: Path) -> None:
    child = start(tmp_path, DETACHES, stop_grace_s=1.0)
    wait_until(lambda: is_ready(child))
    pids = child.pids()
    assert len(pids) == 2
    stopped_at = time.monotonic()
    child.stop()
    assert time.monotonic() - stopped_at >= 1.0, "killed before its time to end by itself was over"
    assert child.pids() == []
    assert not any(lives(pid) for pid in pids)
    child.stop()  # twice is harmless


def test_a_child_that_wrote_over_its_environment_is_found_and_ended(tmp_path: Path) -> None:
    child = start(tmp_path, HIDES, stop_grace_s=1.0)
    wait_until(lambda: is_ready(child))
    pids = child.pids()
    assert len(pids) == 2
    hidden = max(pids)
    assert b"BATON_BENCH_CHILD" not in Path(f"/proc/{hidden}/environ").read_bytes()
    child.stop()  # SIGTERM ends the parent alone: what is left has another parent and no mark
    assert not any(lives(pid) for pid in pids)


def test_cpu_time_of_ended_descendants_is_counted(tmp_path: Path) -> None:
    child = start(tmp_path, BURNS)
    try:
        before = child.cpu()
        wait_until(lambda: is_ready(child))
        assert child.cpu().since(before).total_s >= 0.45
    finally:
        child.stop()


def test_a_child_runs_on_its_cores_and_can_be_moved(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    child = start(tmp_path, "import time; print('ready', flush=True); time.sleep(600)", cores=[core])
    try:
        wait_until(lambda: is_ready(child))
        assert os.sched_getaffinity(child.pid) == {core}
        everything = os.sched_getaffinity(0)
        assert child.pin(sorted(everything)) >= 1
        assert os.sched_getaffinity(child.pid) == everything
    finally:
        child.stop()


def test_a_child_ends_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from bench.children import Child\n"
        "c = Child('s', [sys.executable, '-c', 'import time; time.sleep(600)'], environment=os.environ,"
        f" log_path=Path({str(tmp_path / 'log')!r}))\n"
        "print(c.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(0.3)  # past the launcher's exec
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: not lives(pid))

"""The generator's priority: every thread of it while a load runs, and none afterwards."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from bench.generator.priority import GENERATOR_NICENESS, ahead_of_the_servers


def test_every_thread_runs_ahead_for_the_time_of_a_load_where_that_is_allowed() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, args=(30.0,))
    thread.start()
    try:
        before = _niceness()
        with ahead_of_the_servers() as niceness:
            during = _niceness()
        assert _niceness() == before
    finally:
        ended.set()
        thread.join()
    assert during[os.getpid()] == niceness
    is_allowed = os.geteuid() == 0
    assert set(during.values()) == (
        {min(GENERATOR_NICENESS, *before.values())} if is_allowed else set(before.values())
    )


def _niceness() -> dict[int, int]:
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}

"""Real child processes: what they say is heard, and nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleet.child_process import SOURCE_ROOT, ChildProcess, ChildSpec
from fleet.state_dir import process_start

DEADLINE_S = 60.0


class Heard:
    """A listener that can be waited on."""

    def __init__(self) -> None:
        self.progress: list[str] = []
        self.ready: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self.exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_progress(self, text: str) -> None:
        self.progress.append(text)

    def on_ready(self, endpoint: Mapping[str, Any]) -> None:
        self.ready.set_result(endpoint)

    def on_unready(self) -> None:
        raise AssertionError("a process does not say this")

    def on_exit(self, detail: str) -> None:
        self.exit.set_result(detail)


@pytest.fixture
def stand_in(tmp_path: Path) -> Any:
    """Makes a module of a text and returns the spec that runs it."""

    def make(body: str) -> ChildSpec:
        (tmp_path / "stand_in.py").write_text(
            "from fleet.lifeline import Reports, die_with_parent\n"
            "die_with_parent()\nreports = Reports()\nimport os, signal, subprocess, sys, time\n"
            + textwrap.dedent(body)
        )
        return ChildSpec("stand-in", "stand_in", (), {"PYTHONPATH": f"{SOURCE_ROOT}:{tmp_path}"})

    return make


async def _gone(pid: int) -> bool:
    while process_start(pid):  # noqa: ASYNC110  # somebody else's child; who asks has a deadline
        await asyncio.sleep(0.02)
    return True


async def test_a_child_is_heard_and_its_end_is_told_once(stand_in: Any, tmp_path: Path) -> None:
    heard = Heard()
    spec = stand_in("reports.progress('loading'); reports.ready({'address': 'here'}); time.sleep(0.2); sys.exit(3)")
    child = ChildProcess(spec, tmp_path / "log", heard)
    async with asyncio.timeout(DEADLINE_S):
        assert await heard.ready == {"address": "here", "pid": child.pid}
        assert await heard.exit == "exit code 3"
    assert heard.progress == ["loading"]


async def test_why_it_failed_is_part_of_how_it_ended(stand_in: Any, tmp_path: Path) -> None:
    heard = Heard()
    ChildProcess(stand_in("reports.failed('port 1 is taken'); sys.exit(1)"), tmp_path / "log", heard)
    async with asyncio.timeout(DEADLINE_S):
        assert await heard.exit == "exit code 1: port 1 is taken"


async def test_killing_a_child_ends_its_own_children_too(stand_in: Any, tmp_path: Path) -> None:
    heard = Heard()
    spec = stand_in(
        "grandchild = subprocess.Popen(['sleep', '600'])\nreports.ready({'grandchild': grandchild.pid})\n"
        "time.sleep(600)"
    )
    child = ChildProcess(spec, tmp_path / "log", heard)
    async with asyncio.timeout(DEADLINE_S):
        grandchild = (await heard.ready)["grandchild"]
        os.kill(child.pid, signal.SIGKILL)  # the child alone, as the kernel's memory killer would
        assert await heard.exit == "signal SIGKILL"
        assert await _gone(grandchild)


async def test_a_child_dies_with_its_supervisor_however_that_dies(stand_in: Any, tmp_path: Path) -> None:
    stand_in("reports.ready({}); time.sleep(600)")
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from fleet.child_process import ChildProcess, ChildSpec
        class Heard:
            def on_progress(self, text): pass
            def on_ready(self, endpoint): print(endpoint["pid"], flush=True)
            def on_exit(self, detail): pass
        async def main():
            spec = ChildSpec("stand-in", "stand_in", (), {{"PYTHONPATH": "{SOURCE_ROOT}:{tmp_path}"}})
            ChildProcess(spec, Path("{tmp_path}/log"), Heard())
            await asyncio.sleep(600)
        asyncio.run(main())
        """)
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(parent), stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": SOURCE_ROOT}
    )
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        child_pid = int(await process.stdout.readline())
        assert process_start(child_pid)
        process.kill()
        await process.wait()
        assert await _gone(child_pid)


async def test_a_child_does_not_inherit_what_belongs_to_ray(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not for workers")
    heard = Heard()
    ChildProcess(stand_in("reports.ready({'token': os.environ.get('RAY_AUTH_TOKEN')})"), tmp_path / "log", heard)
    async with asyncio.timeout(DEADLINE_S):
        assert (await heard.ready)["token"] is None
        await heard.exit

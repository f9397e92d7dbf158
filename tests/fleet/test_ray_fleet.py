"""Fleets on Ray, through the ``baton`` command, with simulated engines: on our own Ray, and on two joined nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from simulated_fleet import ANSWER_S, PROMPT, Answer, expected_tokens, generate, simulated_config

from baton.client import BatonClient, Chunk, Finished
from baton.request import OutputOptions, StopConditions
from fleet import process_tree
from fleet.child_process import SOURCE_ROOT
from fleet.config import FleetConfig
from fleet.state_dir import FleetRecord, StateDir, process_start

pytest.importorskip("ray")

COMMAND_S = 250.0
"""Ray takes three seconds to start, and many more on a machine that is busy with engines."""
SOON_S = 120.0
ROUTERS = ("router", "router-1")
TOO_SLOW = "The current node timed out during startup"
"""What Ray says when its node was not there within 30 s, a limit that is written into it."""
TRY_COUNT = 3


async def baton(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "baton",
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": SOURCE_ROOT, **(env or {})},
    )
    async with asyncio.timeout(COMMAND_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def record_of(config: FleetConfig) -> FleetRecord:
    record = StateDir(config.state_path).read_record()
    assert record is not None
    return record


def members(config: FleetConfig) -> dict[str, Any]:
    return {member["name"]: member["endpoint"] for member in record_of(config).members}


async def until_new_process(config: FleetConfig, name: str, old_pid: int) -> dict[str, Any]:
    """Polls the record, which is how everybody outside the supervisor learns of it."""
    async with asyncio.timeout(SOON_S):
        while True:
            endpoint = members(config)[name]
            if endpoint is not None and endpoint["pid"] != old_pid:
                return dict(endpoint)
            await asyncio.sleep(0.05)


@asynccontextmanager
async def up(config: FleetConfig, env: Mapping[str, str] | None = None) -> AsyncIterator[str]:
    """Runs the fleet between ``baton up`` and ``baton down``. Yields the public address."""
    try:
        for _ in range(TRY_COUNT):
            code, output = await baton("up", "--config", config.source, "--wait-s", "150", env=env)
            if TOO_SLOW not in output:
                break
        assert code == 0, output
        yield record_of(config).address
    finally:
        code, output = await baton("down", "--config", config.source, env=env)
    assert code == 0, output
    assert "no process of it is left" in output


@pytest.mark.timeout(900)
async def test_on_our_own_ray_everything_that_can_die_comes_back_and_down_leaves_nothing(tmp_path: Path) -> None:
    config = simulated_config(tmp_path, cluster='runner = "ray"', decode="count = 2", step_s=0.02)
    async with up(config) as address:
        supervisor_pid = record_of(config).supervisor_pid
        family = process_tree.descendants(supervisor_pid)
        assert (await generate(address, 30)).tokens == expected_tokens(30)
        assert _hosts_listened_on(family) <= {"0100007F", "0000000000000000FFFF00000100007F"}

        code, output = await baton("up", "--config", config.source)
        assert code == 1
        assert "is running already" in output
        code, output = await baton("status", "--config", config.source)
        assert code == 0
        assert "decode-1" in output

        before = members(config)
        niceness = {name: os.getpriority(os.PRIO_PROCESS, endpoint["pid"]) for name, endpoint in before.items()}
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert set(niceness.values()) == {own}, "a worker gives way to nobody on its core"

        # A worker's process, while it streams.
        answer = Answer(address, 150)
        streaming = asyncio.create_task(answer.stream())
        await answer.until(5)
        for name in ("decode-0", "decode-1"):  # one of them has the stream; each in turn, so one is always there
            os.kill(before[name]["pid"], signal.SIGKILL)
            fresh = await until_new_process(config, name, before[name]["pid"])
            assert fresh["actor_pid"] == before[name]["actor_pid"], "the actor lives, and restarts its process itself"
        await streaming
        assert answer.tokens == expected_tokens(150)

        # An actor: its process dies with it, and Ray brings it back.
        before = members(config)
        os.kill(before["prefill-0"]["actor_pid"], signal.SIGKILL)
        fresh = await until_new_process(config, "prefill-0", before["prefill-0"]["pid"])
        assert fresh["actor_pid"] != before["prefill-0"]["actor_pid"]
        assert not process_start(before["prefill-0"]["pid"]), "no worker outlives its actor"

        # The supervisor actor, and then Ray's head: a running stream does not notice.
        answer = Answer(address, 150)
        streaming = asyncio.create_task(answer.stream())
        await answer.until(5)
        os.kill(_by_name(supervisor_pid, "ray::Supervisor"), signal.SIGKILL)
        os.kill(_by_name(supervisor_pid, "gcs_server"), signal.SIGKILL)
        await streaming
        assert answer.tokens == expected_tokens(150)
        assert answer.finished is not None
        assert answer.finished.phases.attempt_count == 1
        family |= process_tree.descendants(supervisor_pid)
    assert not process_tree.alive(family)
    log = (StateDir(config.state_path).logs / "supervisor.log").read_text()
    assert "SIGTERM" not in log, "Ray's handler took the signal of `baton down` for a crash"
    assert _own_lines(log)[-1] == "stopping"


async def _in_the_foreground(config: FleetConfig, log: Path, is_there: Callable[[int], bool]) -> Process:
    """The command, once its process is where it is to be."""
    for _ in range(TRY_COUNT):
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "baton", "up", "--foreground", "--config", config.source),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": SOURCE_ROOT},
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(COMMAND_S):
                while process.returncode is None and not is_there(process.pid):  # noqa: ASYNC110 - the process's own
                    await asyncio.sleep(0.05)
        except BaseException:
            process_tree.kill(process_tree.descendants(process.pid))
            raise
        if process.returncode is None:
            return process
        said = await asyncio.to_thread(log.read_text)
        assert TOO_SLOW in said, said
    raise AssertionError(f"Ray was slower than its own limit {TRY_COUNT} times")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_fleet_in_the_foreground_ends_clean_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """To the whole group, Ray included, as Ctrl-C and service managers do it; and to the one while Ray starts."""
    config = simulated_config(tmp_path, cluster='runner = "ray"')
    log = tmp_path / "log"
    for is_early in (True, False) if number == signal.SIGTERM else (False,):
        process = await _in_the_foreground(config, log, _has_head if is_early else lambda _: _is_ready(config))
        family: frozenset[process_tree.ProcessName] = frozenset()
        try:
            if not is_early:  # Ray's monitor reports its end to us before it ends: the signal to all made that a race
                family |= process_tree.descendants(process.pid)
                await _end(_by_name(process.pid, "autoscaler/_private/monitor.py"))
                # Which also gives the report time to arrive.
                status_code, status = await baton("status", "--config", config.source)
                assert status_code == 0, status
            (os.kill if is_early else os.killpg)(process.pid, number)
            async with asyncio.timeout(SOON_S):
                while process.returncode is None:  # Ray, when it has only begun, grows meanwhile
                    family |= process_tree.descendants(process.pid)
                    await asyncio.sleep(0.05)
            code = process.returncode
            assert len(family) > 2
            said = log.read_text()
            assert code == 0, said
            assert _own_lines(said)[-1] == "  stopping"
            assert "autoscaler" not in said, "a signal that somebody sent is no failure of Ray's"
            assert number.name not in said, "no stack dump"
            assert StateDir(config.state_path).read_last_record() is None
            assert not process_tree.alive(family)
        finally:
            process_tree.kill(family | process_tree.descendants(process.pid))
            await process.wait()


@pytest.mark.timeout(900)
async def test_on_two_nodes_each_role_runs_where_its_resources_are(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    nodes = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("ray_two_nodes.py")),
        str(token),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    family: frozenset[process_tree.ProcessName] = frozenset()
    try:
        async with asyncio.timeout(COMMAND_S):
            said = json.loads(await nodes.stdout.readline())
        config = simulated_config(
            tmp_path,
            cluster='runner = "ray"\nbind_host = "node"',
            ray=f'address = "{said["address"]}"\nnamespace = "two-nodes"',
            prefill='resources = {"node-a" = 0.1}',
            decode='resources = {"node-b" = 0.1}',
        )
        async with up(config, env) as address:
            family = process_tree.descendants(nodes.pid)
            placed = {name: endpoint["node_id"] for name, endpoint in members(config).items()}
            assert placed["prefill-0"] == said["nodes"]["node-a"]
            assert placed["decode-0"] == said["nodes"]["node-b"]
            answer = await generate(address, 30)
            assert answer.tokens == expected_tokens(30)
            code, output = await baton("status", "--config", config.source, env=env)
            assert code == 0
            assert "the router sees prefill-0: ready" in output
            pids = [endpoint["pid"] for endpoint in members(config).values()]
        assert not [pid for pid in pids if process_start(pid)]
    finally:
        nodes.stdin.close()
        try:
            async with asyncio.timeout(SOON_S):
                await nodes.wait()
        finally:
            process_tree.kill(family)


@pytest.mark.timeout(900)
async def test_with_two_routers_a_stream_whose_router_is_killed_goes_on_at_the_other(tmp_path: Path) -> None:
    """Either way round; and the killed one comes back, kept by its actor, while nothing else is restarted."""
    cluster = 'runner = "ray"\nrouter_count = 2'
    config = simulated_config(tmp_path, cluster=cluster, decode="count = 2", step_s=0.02)
    async with up(config):
        for killed, other in (ROUTERS, ROUTERS[::-1]):
            before = members(config)
            for name in ROUTERS:
                assert (await generate(before[name]["address"], 30)).tokens == expected_tokens(30)
            tokens, resume_count = await _resumed(before[killed], before[other])
            assert (tokens, resume_count) == (expected_tokens(150), 1)
            fresh = await until_new_process(config, killed, before[killed]["pid"])
            assert fresh["actor_pid"] == before[killed]["actor_pid"]
            after = members(config)
            assert {name for name in before if after[name]["pid"] != before[name]["pid"]} == {killed}
        code, output = await baton("status", "--config", config.source)
        assert code == 0, output
        assert "router-1" in output


async def _resumed(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[int], int]:
    """The tokens of a resumable answer whose router, the first, is killed meanwhile; and how often it was resumed."""
    tokens: list[int] = []
    resume_count = 0
    async with BatonClient([first["address"], second["address"]]) as client:
        events = client.generate(
            PROMPT,
            timeout=ANSWER_S,
            stop=StopConditions(max_output_token_count=150),
            output=OutputOptions(wants_text=False, wants_token_ids=True),
            resume=True,
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Chunk):
                    if len(tokens) < 5 <= len(tokens) + event.token_count:
                        os.kill(first["pid"], signal.SIGKILL)
                    tokens += event.token_ids
                elif isinstance(event, Finished):
                    resume_count = event.resume_count
        assert client.address == second["address"]
    return tokens, resume_count


FAILS_HALF_WAY = """
import subprocess, sys
from pathlib import Path
import ray
from fleet.config import load_config
from fleet.ray_fleet import RayUnavailable
from fleet.state_dir import StateDir, process_start
from fleet.supervisor import make_fleet

def init(**options):
    started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
    raise RuntimeError("only so far")

started, ray.init = [], init
config = load_config(Path(sys.argv[1]))
try:
    make_fleet(config, StateDir(config.state_path)).connect()
except RayUnavailable as error:
    print(error, started[0].wait(60))
"""


async def test_a_ray_that_fails_half_way_leaves_no_process(tmp_path: Path) -> None:
    config = simulated_config(tmp_path, cluster='runner = "ray"')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FAILS_HALF_WAY, config.source),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE_ROOT},
    )
    async with asyncio.timeout(SOON_S):
        output, _ = await process.communicate()
    assert "Ray could not be started: only so far" in output.decode()
    assert output.decode().endswith(" -9\n")


def _own_lines(said: str) -> list[str]:
    """Without what Ray tells of processes that ended, which it prints when it likes."""
    return [line for line in said.splitlines() if "(raylet)" not in line]


async def _end(pid: int) -> None:
    started = process_start(pid)
    os.kill(pid, signal.SIGTERM)
    async with asyncio.timeout(SOON_S):
        while process_start(pid) == started:  # noqa: ASYNC110 - somebody else's child
            await asyncio.sleep(0.05)


def _is_ready(config: FleetConfig) -> bool:
    record = StateDir(config.state_path).read_record()
    return record is not None and record.is_ready


def _has_head(root_pid: int) -> bool:
    """Ray's head process runs: the rest of Ray's start is yet to come."""
    return bool(process_tree.named("gcs_server", process_tree.descendants(root_pid)))


def _by_name(root_pid: int, name: str) -> int:
    for pid, _ in process_tree.descendants(root_pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if name in command:
                return pid
    raise AssertionError(f"there is no {name} below {root_pid}")


def _hosts_listened_on(processes: frozenset[process_tree.ProcessName]) -> set[str]:
    """Local addresses, as the kernel writes them, of the listening TCP sockets of these processes."""
    inodes = set()
    for pid, _ in process_tree.alive(processes):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                link = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    hosts = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                hosts.add(fields[1].rpartition(":")[0])
    assert hosts
    return hosts

"""What ``baton up``, ``down``, ``status`` and ``demo`` do: start a supervisor, follow it, end it, and say so.

Owns nothing that runs: the supervisor does. ``cli.py`` has the arguments and the exit codes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from baton.admin_client import AdminClient
from baton.client import BatonClient
from baton.errors import BatonError
from fleet import preflight, process_tree
from fleet.child_process import SOURCE_ROOT
from fleet.config import FleetConfig
from fleet.lifeline import PARENT_VARIABLE
from fleet.members import is_router
from fleet.ray_fleet import RayFleet
from fleet.state_dir import FleetRecord, StateDir, process_start
from fleet.supervisor import AlreadyRunning, make_fleet, supervise

FOLLOW_INTERVAL_S = 0.1
SERVING_TIMEOUT_S = 15.0
STOP_MARGIN_S = 30.0
DEATH_CHECK_COUNT = 60
LOG_TAIL_LINE_COUNT = 12

Say = Callable[[str], None]


class StartFailed(Exception):
    """The fleet did not come up; the message says which member, why, and where its log is."""


class StopFailed(Exception):
    """Something of the fleet is left."""


async def start(config: FleetConfig, say: Say, *, wait_s: float, dies_with_us: bool = False) -> FleetRecord:
    """Starts the fleet detached from this process and waits until it serves. On failure nothing of it is left.

    Raises ``AlreadyRunning``, ``CannotStart``, ``ConfigError``, ``StartFailed``, ``RayUnavailable``.
    """
    state = refuse_running(config)
    sweep(state, say)
    preflight.check(config)
    if config.cluster.runner == "ray" and config.cluster.ray.address:
        async with _deadline(wait_s):
            record = await supervise(config, say, until_ready=True)
        if not record.is_ready:
            raise StartFailed(_why(record, state))
        record = replace(record, supervisor_pid=0, supervisor_start="")
        state.write_record(record)
        await _until_serving(record)
    else:
        supervisor = _spawn_supervisor(config, state, dies_with_us)
        try:
            async with _deadline(wait_s):
                record = await _follow_start(supervisor, state, say)
            await _until_serving(record)
        except BaseException:
            await _end_supervisor(supervisor.pid, config, say)
            supervisor.wait()
            raise
    return record


def refuse_running(config: FleetConfig) -> StateDir:
    """Raises ``AlreadyRunning`` if this state directory has a live fleet."""
    state = StateDir(config.state_path)
    record = state.read_record()
    if record is not None:
        raise AlreadyRunning(
            f"{record.name} is running already, started with {record.config_path} and serving at {record.address}; "
            f"stop it with `baton down --config {shlex.quote(record.config_path)}`, or give this one another "
            "cluster.state_dir and other ports"
        )
    return state


def sweep(state: StateDir, say: Say) -> None:
    """Ends what is left of a fleet whose supervisor was killed: Ray's own agents outlive it by minutes."""
    record = state.read_last_record()
    if record is None or state.read_record() is not None:
        return
    left = process_tree.alive((int(pid), str(start)) for pid, start in record.family)
    if left:
        say(f"ending {len(left)} processes that an earlier fleet left")
        process_tree.kill(left)
    state.remove_record()


async def stop(config: FleetConfig, say: Say) -> bool:
    """Stops the fleet of this state directory and sees that nothing is left. False: there was none.

    Raises ``StopFailed`` naming what could not be ended, ``RayUnavailable``.
    """
    state = StateDir(config.state_path)
    record = state.read_record()
    if record is None:
        sweep(state, say)
        return False
    if record.supervisor_pid == 0:
        await _stop_on_joined_ray(config, state, say)
    else:
        await _end_supervisor(record.supervisor_pid, config, say)
    state.remove_record()
    return True


def _spawn_supervisor(config: FleetConfig, state: StateDir, dies_with_us: bool) -> subprocess.Popen[bytes]:
    state.logs.mkdir(exist_ok=True, mode=0o700)
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    inherited = env.get("PYTHONPATH", "")
    env["PYTHONPATH"] = f"{SOURCE_ROOT}{os.pathsep}{inherited}" if inherited else SOURCE_ROOT
    if dies_with_us:
        env[PARENT_VARIABLE] = str(os.getpid())
    with (state.logs / "supervisor.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own module with our own arguments
            [sys.executable, "-m", "fleet.supervisor", "--config", config.source],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C here is not for it
        )


async def _follow_start(supervisor: subprocess.Popen[bytes], state: StateDir, say: Say) -> FleetRecord:
    said_count = 0
    while True:
        has_ended = supervisor.poll() is not None  # before reading: its last words count
        record = state.read_record()
        if record is not None and record.supervisor_pid == supervisor.pid:
            for line in record.said[said_count:]:
                say(line)
            said_count = max(said_count, len(record.said))
            if record.is_ready:
                return record
            if record.is_failed:
                raise StartFailed(_why(record, state))
        if has_ended:
            log = state.logs / "supervisor.log"
            raise StartFailed(f"the supervisor ended before the fleet was ready; the end of {log}:\n{_tail(log)}")
        await asyncio.sleep(FOLLOW_INTERVAL_S)


def _why(record: FleetRecord, state: StateDir) -> str:
    failing = [member for member in record.members if member["failure_count"]]
    if not failing:
        return f"the fleet did not become ready; see the logs in {state.logs}"
    worst = max(failing, key=lambda member: int(member["failure_count"]))
    log = state.logs / f"{worst['name']}.log"
    return f"{worst['name']} does not start: {worst['detail']}. The end of {log}:\n{_tail(log)}"


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "  (no log)"
    return "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINE_COUNT:])


async def until_router_sees(admin_address: str, worker_ids: Collection[str], timeout_s: float) -> bool:
    """Whether the router could place requests on all of them in time: a ready worker is one it has heard of, too.
    Raises ``BatonError`` when the router cannot be asked."""
    async with AdminClient(admin_address) as admin, aclosing(admin.watch(interval_s=FOLLOW_INTERVAL_S)) as views:
        try:
            async with asyncio.timeout(timeout_s):
                async for view in views:
                    if set(worker_ids) <= {worker.worker_id for worker in view.workers if worker.health == "ready"}:
                        return True
        except TimeoutError:
            pass
    return False


async def _until_serving(record: FleetRecord) -> None:
    workers = [str(member["name"]) for member in record.members if not is_router(str(member["name"]))]
    try:
        # A cluster without one of them serves as well, so the time is all that this may cost; but what comes first
        # should not be placed as if that one did not exist.
        await until_router_sees(record.admin_address, workers, SERVING_TIMEOUT_S)
        # At the admin address, which has the same health: the public one may ask for a certificate that we lack.
        async with BatonClient(record.admin_address) as client:
            await client.wait_until_serving(timeout=SERVING_TIMEOUT_S)
    except BatonError as error:
        raise StartFailed(
            f"all workers are ready, and the router at {record.address} does not serve: {error.message}"
        ) from error


async def _end_supervisor(pid: int, config: FleetConfig, say: Say) -> None:
    """SIGTERM, the deadlines of its members, SIGKILL; and then whatever it left."""
    state = StateDir(config.state_path)
    family = process_tree.descendants(pid)
    start_time = process_start(pid)
    timeout_s = 2 * config.cluster.stop_deadline_s + config.router.stop_grace_s + STOP_MARGIN_S
    record = state.read_record()
    said_count = len(record.said) if record else 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while start_time and process_start(pid) == start_time:
                family |= process_tree.descendants(pid)
                record = state.read_record()
                if record is not None:
                    for line in record.said[said_count:]:
                        say(line)
                    said_count = max(said_count, len(record.said))
                await asyncio.sleep(FOLLOW_INTERVAL_S)
    # What a killed parent leaves dies of the parent-death signal, a moment later.
    for _ in range(DEATH_CHECK_COUNT):
        if not process_tree.alive(family):
            break
        await asyncio.sleep(FOLLOW_INTERVAL_S)
    left = process_tree.alive(family)
    if left:
        say(f"{len(left)} processes did not end in time and are killed")
        process_tree.kill(left)
        await asyncio.sleep(0.5)
    still = process_tree.alive(family)
    if still:
        raise StopFailed(f"these processes could not be ended: {', '.join(str(each) for each, _ in sorted(still))}")


async def _stop_on_joined_ray(config: FleetConfig, state: StateDir, say: Say) -> None:
    fleet = make_fleet(config, state)
    if not isinstance(fleet, RayFleet):
        raise StopFailed('this fleet was started on a Ray cluster; say which with --config (cluster.runner = "ray")')
    say(f"joining Ray at {config.cluster.ray.address}")
    fleet.connect()
    say("stopping")
    left = await fleet.stop_actors()
    fleet.disconnect()
    if left:
        raise StopFailed(f"these actors are still there: {', '.join(left)}")


@contextlib.asynccontextmanager
async def _deadline(wait_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(wait_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise StartFailed(f"not ready within {wait_s:g} s; give it longer with --wait-s") from None

"""The supervisor process of one fleet: ``python -m fleet.supervisor --config FILE``, or ``baton up --foreground``.

Owns the fleet, and the record by which other commands find it. With ``runner = "local"`` it is the parent of all
processes; with a Ray of its own it is that Ray's parent. Either way nothing outlives it, however it ends. A Ray that
was joined needs no such process: its detached actors stay when ``supervise`` returns with the fleet ready.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from baton.log_lines import log_to_stderr
from fleet import process_tree
from fleet.config import FleetConfig, check_model_directory, load_config
from fleet.keeper import MemberState
from fleet.lifeline import die_with_parent
from fleet.local_fleet import LocalFleet
from fleet.members import members_of, policy_of
from fleet.ray_fleet import RayFleet, RayUnavailable
from fleet.state_dir import FleetRecord, StateDir, process_start
from fleet.toml_table import ConfigError

log = logging.getLogger("baton.fleet")

FOLLOW_S = 2.0
SAID_LINE_COUNT = 200

Fleet = LocalFleet | RayFleet


class AlreadyRunning(Exception):
    """Another supervisor has this state directory."""


def make_fleet(config: FleetConfig, state: StateDir) -> Fleet:
    """Raises ``ConfigError`` for a secret that cannot be used."""
    secret = state.secret(config.cluster.secret_file)
    members, policy = members_of(config, secret), policy_of(config)
    if config.cluster.runner == "local":
        return LocalFleet(members, policy, secret, state.logs)
    return RayFleet(config, members, policy, secret, log_dir=state.logs, token_file=state.ray_token_file())


class Supervision:
    """One fleet from start to stop, told to a record and to ``say``."""

    def __init__(self, config: FleetConfig, state: StateDir, say: Callable[[str], None]) -> None:
        self._config, self._state, self._say = config, state, say
        self.fleet = make_fleet(config, state)
        self.record = FleetRecord(
            name=config.cluster.name,
            runner=config.cluster.runner,
            config_path=config.source,
            supervisor_pid=os.getpid(),
            supervisor_start=process_start(os.getpid()),
            address=config.router.listen_address,
            admin_address=config.router.admin_address,
            ray_namespace=config.cluster.ray.namespace,
        )

    async def run(self, stop: asyncio.Event, *, until_ready: bool = False) -> None:
        """Until ``stop`` is set; with ``until_ready`` also until the fleet is ready or has failed, and it stays.

        Whatever happens otherwise, the fleet is stopped on the way out.
        """
        self._state.write_record(self.record)
        stays = False
        try:
            if self._config.cluster.runner == "ray":
                where = self._config.cluster.ray.address
                self._tell(f"joining Ray at {where}" if where else "starting Ray on this machine")
            await self.fleet.start()
            version = 0
            stopping = asyncio.create_task(stop.wait(), name="stop.wait")
            try:
                while not stop.is_set():
                    version = await self._follow(version, stopping)
                    if until_ready and (self.record.is_ready or self.record.is_failed):
                        stays = self.record.is_ready
                        return
            finally:
                stopping.cancel()
        finally:
            if stays and isinstance(self.fleet, RayFleet):
                self.fleet.disconnect()
            if not stays:
                self._tell("stopping")
                await self.fleet.stop()
                self._state.remove_record()

    async def _follow(self, version: int, stopping: asyncio.Task[Any]) -> int:
        following = asyncio.create_task(self.fleet.changed(version, FOLLOW_S), name="follow the fleet")
        await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            return version
        following.result()
        now = self.fleet.version  # of the lines read here, which may be newer than what woke us
        for line in self.fleet.lines_after(version):
            self._tell(line, write=False)
        self._refresh()
        return now

    def _refresh(self) -> None:
        """Brings the record up to date with the fleet, and writes it if anything is new."""
        states = self.fleet.states()
        router = next((row.endpoint for row in states if row.endpoint and "admin_address" in row.endpoint), None)
        fresh = replace(
            self.record,
            members=[_row(row) for row in states],
            family=sorted([pid, start] for pid, start in process_tree.descendants(os.getpid())),
            is_ready=self.fleet.is_ready,
            is_failed=bool(self.fleet.alarmed),
            ray_address=self.fleet.ray_address,
            address=router["address"] if router else self.record.address,
            admin_address=router["admin_address"] if router else self.record.admin_address,
        )
        if fresh != self.record or self._state.read_record() != fresh:
            self.record = fresh
            self._state.write_record(fresh)

    def _tell(self, line: str, *, write: bool = True) -> None:
        self._say(line)
        self.record = replace(self.record, said=[*self.record.said, line][-SAID_LINE_COUNT:])
        if write:
            self._state.write_record(self.record)


def _row(row: MemberState) -> dict[str, Any]:
    # The secret is in none of these; the endpoint is what the member said of itself.
    return asdict(row)


async def supervise(config: FleetConfig, say: Callable[[str], None], *, until_ready: bool = False) -> FleetRecord:
    """Runs the fleet until SIGTERM or SIGINT. Returns the last record. Raises ``AlreadyRunning``, ``ConfigError``,
    ``RayUnavailable``."""
    if config.uses_real_model:
        check_model_directory(config)
    state = StateDir(config.state_path)
    try:
        lock = state.lock()
    except BlockingIOError:
        raise AlreadyRunning(f"a fleet is running already from {state.path}; stop it with `baton down`") from None
    try:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)
        supervision = Supervision(config, state, say)
        await supervision.run(stop, until_ready=until_ready)
        return supervision.record
    finally:
        os.close(lock)


def main() -> int:
    die_with_parent()  # only where whoever started us asked for it: `baton demo` does, `baton up` does not
    parser = argparse.ArgumentParser(prog="fleet.supervisor", description=__doc__)
    parser.add_argument("--config", required=True, type=Path)
    arguments = parser.parse_args()
    log_to_stderr(logging.WARNING)
    try:
        config = load_config(arguments.config)
        asyncio.run(supervise(config, lambda line: print(line, flush=True)))
    except (ConfigError, AlreadyRunning, RayUnavailable) as error:
        print(f"baton: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

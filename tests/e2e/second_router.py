"""Another router over the workers of a running fleet, configured otherwise: it starts in the time of a process, and a
fleet in that of engines. Tests nothing itself."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patience import START_S, WITHIN_S

from baton.admin_client import AdminClient
from baton.errors import BatonError
from baton.secret import SECRET_VARIABLE
from bench.fleet_under_test import FleetUnderTest
from bench.real_fleet import free_ports
from fleet.roster_client import RosterClient


@asynccontextmanager
async def second_router(fleet: FleetUnderTest, folder: Path, **changes: Any) -> AsyncIterator[str]:
    """Its public address, once it knows all workers. ``changes``: of the configuration of the fleet's own."""
    listen, admin, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    addresses: dict[str, Any] = {"listen_address": listen, "admin_address": admin, "metrics_address": metrics}
    file = folder / "router.json"
    file.write_text(json.dumps(asdict(replace(fleet.config.router, **addresses, **changes))), encoding="utf-8")
    log = folder / "router.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router", "--config", str(file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, SECRET_VARIABLE: fleet.secret.hex()},
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            said = await process.stdout.readline()  # where it listens
        assert said, log.read_text(errors="replace")[-3000:]
        async with asyncio.timeout(WITHIN_S):
            await _introduce(fleet, admin)
        yield listen
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _introduce(fleet: FleetUnderTest, admin_address: str) -> None:
    roster = RosterClient(admin_address, fleet.secret)
    workers = [
        {name: str(endpoint[name]) for name in ("worker_id", "address", "role", "epoch")}
        for endpoint in fleet.endpoints().values()
    ]
    try:
        while True:
            with suppress(BatonError):  # not within its two seconds
                await roster.publish(workers)
                break
    finally:
        await roster.close()
    client = AdminClient(admin_address, secret=fleet.secret)
    async with client, aclosing(client.watch(interval_s=0.1)) as views:
        async for view in views:
            if [worker.health for worker in view.workers] == ["ready"] * len(workers):
                return

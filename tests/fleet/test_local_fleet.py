"""Router and workers as real processes on this machine, with simulated engines: start, answer, hurt, stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from simulated_fleet import Answer, expected_tokens, generate, simulated_config, until_ready, until_replaced

from baton.admin_client import AdminClient
from fleet import process_tree
from fleet.config import FleetConfig
from fleet.local_fleet import LocalFleet
from fleet.members import members_of, policy_of
from fleet.state_dir import process_start

SECRET = bytes(range(32))


@asynccontextmanager
async def running(config: FleetConfig, log_dir: Path) -> AsyncIterator[LocalFleet]:
    """A local fleet in this process; when it ends, no process below us may be left that was not there before."""
    before = process_tree.descendants(os.getpid())
    fleet = LocalFleet(members_of(config, SECRET), policy_of(config), SECRET, log_dir)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.stop()
    left = process_tree.alive(process_tree.descendants(os.getpid()) - before)
    assert not left, f"processes left behind: {left}"


async def test_a_fleet_starts_answers_exactly_and_leaves_nothing(tmp_path: Path) -> None:
    async with running(simulated_config(tmp_path), tmp_path / "logs") as fleet:
        endpoints = await until_ready(fleet)
        answer = await generate(endpoints["router"]["address"], 40)
        assert answer.tokens == expected_tokens(40)
        assert answer.finished is not None
        assert answer.finished.phases.prefill_worker_id == "prefill-0"
        assert answer.finished.phases.decode_worker_id == "decode-0"
        pids = [endpoint["pid"] for endpoint in endpoints.values()]
    assert not [pid for pid in pids if _exists(pid)]


async def test_a_stream_outlives_the_decode_worker_it_streams_from(tmp_path: Path) -> None:
    config = simulated_config(tmp_path, decode="count = 2", step_s=0.02)
    async with running(config, tmp_path / "logs") as fleet:
        endpoints = await until_ready(fleet)
        answer = Answer(endpoints["router"]["address"], 120)
        streaming = asyncio.create_task(answer.stream())
        await answer.until(10)
        victim = await _busy_worker(endpoints)
        os.kill(endpoints[victim]["pid"], signal.SIGKILL)
        await streaming
        assert answer.tokens == expected_tokens(120)
        assert answer.finished is not None
        assert answer.finished.phases.attempt_count == 2
        fresh = await until_replaced(fleet, victim, endpoints[victim]["pid"])
        assert fresh["epoch"] != endpoints[victim]["epoch"]
        again = await generate(endpoints["router"]["address"], 20)
        assert again.tokens == expected_tokens(20)


async def test_the_only_worker_of_a_role_comes_back_and_service_resumes_by_itself(tmp_path: Path) -> None:
    async with running(simulated_config(tmp_path), tmp_path / "logs") as fleet:
        endpoints = await until_ready(fleet)
        address = endpoints["router"]["address"]
        for name in ("prefill-0", "decode-0"):
            os.kill(endpoints[name]["pid"], signal.SIGKILL)
            await until_replaced(fleet, name, endpoints[name]["pid"])
            assert (await generate(address, 20)).tokens == expected_tokens(20)


async def test_a_killed_router_comes_back_and_is_told_its_workers(tmp_path: Path) -> None:
    async with running(simulated_config(tmp_path), tmp_path / "logs") as fleet:
        endpoints = await until_ready(fleet)
        os.kill(endpoints["router"]["pid"], signal.SIGKILL)
        await until_replaced(fleet, "router", endpoints["router"]["pid"])
        fresh = await until_ready(fleet)
        assert (await generate(fresh["router"]["address"], 20)).tokens == expected_tokens(20)
        assert fresh["decode-0"]["pid"] == endpoints["decode-0"]["pid"], "workers are not touched by a router's death"


async def test_every_socket_of_a_fleet_is_on_loopback(tmp_path: Path) -> None:
    async with running(simulated_config(tmp_path), tmp_path / "logs") as fleet:
        endpoints = await until_ready(fleet)
        inodes = {inode for endpoint in endpoints.values() for inode in _socket_inodes(endpoint["pid"])}
        listening = [(host, inode) for host, inode in _listening() if inode in inodes]
        assert len(listening) >= 7  # three of the router, two of each worker
        assert {host for host, _ in listening} <= {"0100007F", "0000000000000000FFFF00000100007F"}


def _exists(pid: int) -> bool:
    return bool(process_start(pid))


async def _busy_worker(endpoints: dict[str, Any]) -> str:
    """The decode worker that has the request."""
    async with AdminClient(endpoints["router"]["admin_address"]) as admin:
        async for view in admin.watch(interval_s=0.1):
            for worker in view.workers:
                if worker.role == "decode" and worker.assigned_count:
                    return worker.worker_id
    raise AssertionError("the watch ended")


def _socket_inodes(pid: int) -> set[str]:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _listening() -> list[tuple[str, str]]:
    """Local address, as the kernel writes it, and inode of every listening TCP socket."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                host = fields[1].rpartition(":")[0]
                # tcp6 writes four words, each little-endian; ::ffff:127.0.0.1 reads so:
                found.append((host, fields[9]))
    return found

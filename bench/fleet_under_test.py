"""A fleet to drive and to hurt: starts one from a configuration, audits its books, kills its workers.

Runs a ``LocalFleet`` (the same processes as under Ray, without Ray) inside the caller's event loop. Everything it
started is gone when the context ends.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from baton.admin_client import AdminClient, ClusterView
from baton.client import BatonClient
from baton.request import Role
from baton.secret import TOKEN_KEY, cluster_token
from baton.worker.v1 import worker_pb2, worker_pb2_grpc
from fleet.config import FleetConfig
from fleet.local_fleet import LocalFleet
from fleet.members import ROUTER_MODULE, Member, members_of, policy_of

POLL_S = 0.02
LISTENING = "AioServer."
"""gRPC's own tasks that wait for calls to come: one for each method, made as methods are first used."""
LEG_STREAM = "LegStream._write"
"""A worker's task of one router's stream of legs."""
TASKS_OF_A_CALL = ("_schedule_rpc_coro", "_handle_exceptions")
"""gRPC's own, of each call that runs."""


@dataclass(frozen=True, slots=True)
class Books:
    """What one worker still holds, by its engine's own count."""

    running_count: int
    waiting_count: int
    used_block_count: int
    held_lease_count: int
    tasks: Counter[str]
    """Tasks of the worker's loop by coroutine."""


class FleetUnderTest:
    """Made by ``running_fleet``."""

    def __init__(self, config: FleetConfig, fleet: LocalFleet, secret: bytes) -> None:
        self.config = config
        self.secret = secret
        self._fleet = fleet
        self._metadata = ((TOKEN_KEY, cluster_token(secret)),)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._killed: set[int] = set()

    @property
    def address(self) -> str:
        """host:port of the public API."""
        return self.config.router.listen_address

    def client(self) -> BatonClient:
        return BatonClient(self.address)

    def admin(self) -> AdminClient:
        return AdminClient(self.config.router.admin_address, secret=self.secret)

    def endpoints(self) -> dict[str, Mapping[str, object]]:
        """Ready workers by id."""
        found: dict[str, Mapping[str, object]] = {}
        for state in self._fleet.states():
            if state.endpoint is not None and "worker_id" in state.endpoint:
                found[str(state.endpoint["worker_id"])] = state.endpoint
        return found

    def routers(self) -> dict[str, Mapping[str, object]]:
        """Ready routers by name."""
        return {
            state.name: state.endpoint
            for state in self._fleet.states()
            if state.endpoint is not None and "admin_address" in state.endpoint
        }

    def ids(self, role: Role) -> list[str]:
        return sorted(name for name, endpoint in self.endpoints().items() if endpoint["role"] == role.value)

    def pid(self, worker_id: str) -> int:
        return int(str(self.endpoints()[worker_id]["pid"]))

    def kill(self, worker_id: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signals the worker's process alone, as the kernel or a person would; returns its pid."""
        pid = self.pid(worker_id)
        os.kill(pid, number)
        if number is signal.SIGKILL:
            self._killed.add(pid)
        return pid

    async def books(self) -> dict[str, Books]:
        """The audited load of every ready worker."""
        found: dict[str, Books] = {}
        for worker_id, endpoint in self.endpoints().items():
            address = str(endpoint["address"])
            channel = self._channels.setdefault(address, grpc.aio.insecure_channel(address))
            stub = worker_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[no-untyped-call]
            answer = await stub.GetLoad(worker_pb2.GetLoadRequest(), metadata=self._metadata, timeout=30.0)
            load = answer.load
            found[worker_id] = Books(
                load.running_count,
                load.waiting_count,
                load.used_block_count,
                load.held_lease_count,
                _tasks_of_requests(answer.task_counts),
            )
        return found

    async def cluster(self) -> ClusterView:
        """One snapshot from the router."""
        async with self.admin() as admin, aclosing(admin.watch(interval_s=1.0)) as views:
            return await anext(views)

    async def quiet_after_s(self, baseline: Mapping[str, Books] | None, timeout_s: float) -> float:
        """Seconds until every worker holds nothing and has no task more than at ``baseline``, if that is given, and
        the router has nothing in flight.

        Raises ``AssertionError`` naming what is left when ``timeout_s`` passes first.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            now = await self.books()
            left = {
                worker_id: held
                for worker_id, held in now.items()
                if (held.running_count, held.waiting_count, held.used_block_count, held.held_lease_count)
                != (0, 0, 0, 0)
                or (baseline is not None and held.tasks - baseline[worker_id].tasks)
            }
            in_flight_count = 0 if left else (await self.cluster()).in_flight_count
            if not left and in_flight_count == 0:
                return loop.time() - began
            if loop.time() - began > timeout_s:
                raise AssertionError(f"not at rest after {timeout_s} s: {in_flight_count} in flight, {left}")
            await asyncio.sleep(POLL_S)

    async def until_ready(self, timeout_s: float) -> None:
        """Returns once every member of the fleet is ready, killed ones as other processes, and the router would place
        a request."""
        async with asyncio.timeout(timeout_s):
            version = -1
            while not self._fleet.is_ready or self._has_killed():
                version = await self._fleet.changed(version, 1.0)
                if self._fleet.alarmed:
                    raise AssertionError(f"a member keeps failing: {self._fleet.alarmed}")
            async with self.client() as client:
                await client.wait_until_serving(timeout=timeout_s)
            wanted_count = sum(pool.count for pool in self.config.pools.values())
            async with self.admin() as admin, aclosing(admin.watch(interval_s=0.1)) as views:
                async for view in views:
                    epochs = {(name, str(endpoint["epoch"])) for name, endpoint in self.endpoints().items()}
                    ready = {(each.worker_id, each.epoch) for each in view.workers if each.health == "ready"}
                    if len(ready) >= wanted_count and ready >= epochs:
                        return

    def _has_killed(self) -> bool:
        """Whether a process that was killed is still taken for a ready worker."""
        return any(int(str(endpoint["pid"])) in self._killed for endpoint in self.endpoints().values())

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        await self._fleet.stop()


@asynccontextmanager
async def running_fleet(
    config: FleetConfig,
    *,
    start_timeout_s: float = 240.0,
    router_module: str = ROUTER_MODULE,
    router_env: Mapping[str, str] | None = None,
) -> AsyncIterator[FleetUnderTest]:
    """A ready fleet; stopped, to the last process, on leaving. ``router_module``: run in place of the router's own,
    with ``router_env`` in its environment."""
    secret = secrets.token_bytes(32)
    members = [
        member if member.role is not None else _router_as(member, router_module, router_env or {})
        for member in members_of(config, secret)
    ]
    with tempfile.TemporaryDirectory(prefix="baton-fleet-") as folder:
        fleet = LocalFleet(members, policy_of(config), secret, Path(folder))
        under_test = FleetUnderTest(config, fleet, secret)
        await fleet.start()
        try:
            try:
                await under_test.until_ready(start_timeout_s)
            except BaseException:
                print(_last_words(Path(folder)))
                raise
            yield under_test
        finally:
            await under_test.close()


def _router_as(member: Member, module: str, env: Mapping[str, str]) -> Member:
    return replace(member, child=replace(member.child, module=module, env={**member.child.env, **env}))


def _last_words(folder: Path) -> str:
    """The end of every process's log, for a fleet that would not start."""
    return "\n".join(
        f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(folder.glob("*.log"))
    )


def _tasks_of_requests(counts: Mapping[str, int]) -> Counter[str]:
    """Those that requests may leave behind. A router's stream of legs is not one of them: it stays for as long as the
    router knows the worker, whichever of them decoded first, with a task of its own and those of its call."""
    tasks = Counter({name: n for name, n in counts.items() if not name.startswith(LISTENING)})
    stream_count = tasks.pop(LEG_STREAM, 0)
    tasks.subtract(dict.fromkeys(TASKS_OF_A_CALL, stream_count))
    return tasks

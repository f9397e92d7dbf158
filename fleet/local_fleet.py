"""A fleet of plain child processes: router and workers of one machine, without Ray.

Owns a keeper and its processes, and the client that tells the router who is ready. Nothing of it outlives the
process it runs in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.child_process import ChildProcess, Listener
from fleet.keeper import Keeper, Launched, MemberState
from fleet.members import Member, is_router
from fleet.reconcile import Policy
from fleet.roster_client import RosterClient


class RosterPublisher:
    """Publishes to every router that is ready. Owns a client for each."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._clients: dict[str, RosterClient] = {}  # by the router's admin address

    async def publish(self, endpoints: Sequence[Mapping[str, Any]]) -> None:
        """``endpoints`` of all ready members. Without a router among them there is nobody to tell. Raises what one of
        them raised, once all were told."""
        routers = {str(each["admin_address"]) for each in endpoints if "admin_address" in each}
        for gone in self._clients.keys() - routers:
            await self._clients.pop(gone).close()
        for address in routers - self._clients.keys():
            self._clients[address] = RosterClient(address, self._secret)
        workers = [each for each in endpoints if "worker_id" in each]
        told = await asyncio.gather(
            *(self._clients[address].publish(workers) for address in sorted(routers)), return_exceptions=True
        )
        for result in told:
            if result is not None:
                raise result

    async def close(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()


class LocalFleet:
    """``start``, then follow ``changed``; ``stop`` returns when no process is left. Same surface as ``RayFleet``."""

    def __init__(self, members: Sequence[Member], policy: Policy, secret: bytes, log_dir: Path) -> None:
        self._members = {member.name: member for member in members}
        self._log_dir = log_dir
        self._publisher = RosterPublisher(secret)
        self._stop_timeout_s = policy.stop_deadline_s + max(member.stop_grace_s for member in members)
        self.keeper = Keeper(
            [member.desired for member in members], policy, self._launch, publish=self._publisher.publish
        )
        self._run: asyncio.Task[None] | None = None

    @property
    def ray_address(self) -> str:
        return ""

    @property
    def is_ready(self) -> bool:
        return self.keeper.is_ready

    @property
    def alarmed(self) -> tuple[MemberState, ...]:
        return self.keeper.alarmed

    @property
    def version(self) -> int:
        return self.keeper.version

    def states(self) -> tuple[MemberState, ...]:
        return self.keeper.states()

    def lines_after(self, version: int) -> tuple[str, ...]:
        return self.keeper.lines_after(version)

    async def changed(self, version: int, timeout_s: float) -> int:
        if self._run is not None and self._run.done():
            self._run.result()  # the keeper itself failed: a bug, not to be slept over
        return await self.keeper.changed(version, timeout_s)

    async def start(self) -> None:
        self._run = asyncio.create_task(self.keeper.run(), name="local-fleet")

    async def stop(self) -> None:
        """The routers first: they refuse new requests and let the running ones finish on workers. Idempotent."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if not run.done():
                routers = [name for name in self._members if is_router(name)]
                await asyncio.gather(*(self.keeper.stop_member(name, self._stop_timeout_s + 5) for name in routers))
                self.keeper.stop()
                async with asyncio.timeout(self._stop_timeout_s + 5):
                    await asyncio.shield(run)
        finally:
            # Cancelling the keeper kills what is left.
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await run
            await self._publisher.close()

    def _launch(self, name: str, listener: Listener) -> Launched:
        return ChildProcess(self._members[name].child, self._log_dir / f"{name}.log", listener)

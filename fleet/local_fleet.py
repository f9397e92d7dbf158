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
from fleet.members import ROUTER, Member
from fleet.reconcile import Policy
from fleet.roster_client import RosterClient


class RosterPublisher:
    """Publishes to whichever router is ready. Owns the client of the present one."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._client: RosterClient | None = None
        self._router: Mapping[str, Any] | None = None

    async def publish(self, endpoints: Sequence[Mapping[str, Any]]) -> None:
        """``endpoints`` of all ready members. Without a router among them there is nobody to tell."""
        router = next((each for each in endpoints if "admin_address" in each), None)
        if router is None:
            return
        if self._client is None or router != self._router:
            await self.close()
            self._client, self._router = RosterClient(router["admin_address"], self._secret), router
        await self._client.publish([each for each in endpoints if "worker_id" in each])

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
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
        """The router first: it refuses new requests and lets the running ones finish on their workers. Idempotent."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if not run.done():
                await self.keeper.stop_member(ROUTER, self._stop_timeout_s + 5)
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

"""The two kinds of Ray actor of a fleet. docs/decisions/0008-ray-actors-keep-processes.md says why they are such.

A ``ProcessActor`` keeps one process (a worker, or the router) on its node: it restarts it at once and by itself, with
no Ray involved. The ``SupervisorActor`` keeps the process actors and tells the router who is ready. Requests pass
through neither. Both run their own event loop in a thread that lives as long as the actor: children carry the
parent-death signal of the thread that forked them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError

from fleet.child_process import ChildProcess, ChildSpec, Listener
from fleet.keeper import Keeper, Launched, MemberState
from fleet.local_fleet import RosterPublisher
from fleet.members import Member, is_router
from fleet.reconcile import Policy

T = TypeVar("T")

SUPERVISOR = "baton-supervisor"
POLL_S = 5.0
"""How long a question for news may stay unanswered when there is none."""
POLL_MARGIN_S = 5.0
RETRY_S = 0.1
SETTLE_S = 20.0
"""A supervisor that Ray restarted has this long to find the workers again before it tells the router who is gone."""
OWN_WORDS = ("starting", "ready")
"""Lines of a process actor that the supervisor's own lines say already."""
CALL_THREAD_COUNT = 16
"""Calls of one actor at once; each long poll holds one."""


@dataclass(frozen=True, slots=True)
class Placing:
    """What the actors of a fleet have in common."""

    namespace: str
    home_node_id: str
    """Where the fleet was started. Router and supervisor stay there, so that the admin API stays on loopback."""
    log_dir: str
    """Empty: in the temporary directory of each node."""
    env: Mapping[str, str]
    is_host_node: bool
    """Workers listen on their node's address instead of the configured host."""


def actor_name(member_name: str) -> str:
    return f"baton-{member_name}"


class _LoopThread:
    """An event loop in a thread of its own, for the life of the process."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name=name, daemon=True).start()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)


class ProcessActor:
    """Keeps one process. All calls may be repeated."""

    def __init__(self, child: ChildSpec, policy: Policy, log_dir: str, is_host_node: bool) -> None:
        node_host = ray.util.get_node_ip_address()
        if is_host_node and child.module == "fleet.worker_process":
            child = replace(child, arguments=(*child.arguments, "--bind-host", node_host))
        self._child = child
        self._log = (
            Path(log_dir or Path(tempfile.gettempdir()) / f"baton-{os.getuid()}" / "logs") / f"{child.name}.log"
        )
        self._node_id = ray.get_runtime_context().get_node_id()
        self._incarnation = secrets.token_hex(8)
        self._stop_timeout_s = policy.stop_deadline_s
        self._thread = _LoopThread(f"keeper of {child.name}")
        self._thread.call(self._start(policy), 30)

    async def _start(self, policy: Policy) -> None:
        from fleet.reconcile import Desired

        self._keeper = Keeper([Desired(self._child.name, self._child.fingerprint)], policy, self._launch)
        self._run = asyncio.create_task(self._keeper.run(), name=f"keeper of {self._child.name}")

    def _launch(self, name: str, listener: Listener) -> Launched:
        return ChildProcess(self._child, self._log, listener)

    def news(self, incarnation: str, version: int, timeout_s: float) -> dict[str, Any]:
        """The state, as soon as it is past ``version`` of this ``incarnation``, or after ``timeout_s``."""
        return self._thread.call(self._news(incarnation, version, timeout_s), timeout_s + POLL_MARGIN_S)

    async def _news(self, incarnation: str, version: int, timeout_s: float) -> dict[str, Any]:
        since = version if incarnation == self._incarnation else -1
        await self._keeper.changed(since, timeout_s)
        row = next((row for row in self._keeper.states() if row.name == self._child.name), None)
        return {
            "incarnation": self._incarnation,
            "version": self._keeper.version,
            "endpoint": self._endpoint(row),
            "lines": [line.partition(": ")[2] for line in self._keeper.lines_after(since)],
            "alarmed": bool(self._keeper.alarmed),
            "detail": row.detail if row is not None else "",
            "failure_count": row.failure_count if row is not None else 0,
        }

    def _endpoint(self, row: MemberState | None) -> dict[str, Any] | None:
        if row is None or row.state != "ready" or row.endpoint is None:
            return None
        return {**row.endpoint, "actor_pid": os.getpid(), "node_id": self._node_id}

    def stop(self, timeout_s: float) -> bool:
        """Ends the process in order. True: nothing is left."""

        async def stop() -> bool:
            self._keeper.stop()
            done, _ = await asyncio.wait([self._run], timeout=timeout_s)
            return bool(done)

        return self._thread.call(stop(), timeout_s + POLL_MARGIN_S)


class _ActorRun:
    """A launched member that is a ``ProcessActor``: creates or finds it, and follows its news."""

    def __init__(self, member: Member, policy: Policy, placing: Placing, listener: Listener) -> None:
        self._member, self._policy, self._placing, self._listener = member, policy, placing, listener
        self._handle: Any = None
        self._is_stop_wanted = False
        self._is_known = False
        self.alarm: MemberState | None = None
        self._task = asyncio.create_task(self._follow(), name=f"follow {member.name}")

    def ask_to_stop(self) -> None:
        if not self._is_stop_wanted:
            self._is_stop_wanted = True
            self._stopping = asyncio.create_task(self._stop(), name=f"stop {self._member.name}")

    def kill(self) -> None:
        """The actor's process dies, and its child with it."""
        if self._handle is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._handle, no_restart=True)

    async def _stop(self) -> None:
        timeout_s = self._policy.stop_deadline_s + self._member.stop_grace_s + 1
        if self._is_known:  # one that was never placed has nothing to stop
            with contextlib.suppress(Exception):
                await _answer(self._handle.stop.remote(timeout_s), timeout_s + POLL_MARGIN_S)
        self.kill()

    async def _follow(self) -> None:
        try:
            detail = await self._until_dead()
        except Exception as error:
            detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.kill()
        self._listener.on_exit(detail)

    async def _until_dead(self) -> str:
        self._handle = create_process_actor(self._member, self._policy, self._placing)
        incarnation, version = "", -1
        silence_count = 0
        while True:
            try:
                news = await _answer(self._handle.news.remote(incarnation, version, POLL_S), POLL_S + POLL_MARGIN_S)
            except ActorDiedError as error:
                return "stopped" if self._is_stop_wanted else f"its actor died: {str(error).splitlines()[0]}"
            except (RayActorError, TimeoutError):
                # Restarting, not yet placed, or its node is out of reach. Ray restarts it; the keeper has a deadline.
                self._listener.on_unready()
                silence_count += 1
                if silence_count == 1 and not incarnation:
                    self._listener.on_progress(f"waiting for a Ray node with {_wanted(self._member)}")
                await asyncio.sleep(RETRY_S)
                continue
            silence_count = 0
            self._is_known = True
            incarnation, version = news["incarnation"], news["version"]
            for line in news["lines"]:
                if line not in OWN_WORDS:
                    self._listener.on_progress(line)
            self.alarm = self._alarm(news)
            if news["endpoint"] is None:
                self._listener.on_unready()
            else:
                self._listener.on_ready(news["endpoint"])

    def _alarm(self, news: Mapping[str, Any]) -> MemberState | None:
        if not news["alarmed"]:
            return None
        return MemberState(self._member.name, "exited", news["failure_count"], news["detail"], None)


class SupervisorActor:
    """Keeps the process actors, publishes the roster. Started anew by Ray it finds its actors by name and goes on."""

    def __init__(self, members: Sequence[Member], policy: Policy, secret: bytes, placing: Placing) -> None:
        self._members = {member.name: member for member in members}
        self._policy = policy
        self._placing = placing
        self._publisher = RosterPublisher(secret)
        self._incarnation = secrets.token_hex(8)
        self._runs: dict[str, _ActorRun] = {}
        self._thread = _LoopThread("supervisor")
        self._thread.call(self._start(), 30)

    async def _start(self) -> None:
        # Twice the time of the processes inside, and more: the actors' own keepers must be the first to act.
        patient = replace(
            self._policy,
            start_deadline_s=2 * self._policy.start_deadline_s + 60,
            stop_deadline_s=self._policy.stop_deadline_s + 2 * POLL_MARGIN_S,
        )
        desired = [member.desired for member in self._members.values()]
        self._keeper = Keeper(desired, patient, self._launch, publish=self._publisher.publish, settle_s=SETTLE_S)
        self._run = asyncio.create_task(self._keeper.run(), name="supervisor")

    def _launch(self, name: str, listener: Listener) -> Launched:
        run = self._runs[name] = _ActorRun(self._members[name], self._policy, self._placing, listener)
        return run

    def news(self, incarnation: str, version: int, timeout_s: float) -> dict[str, Any]:
        """The fleet's state, as soon as it is past ``version``, or after ``timeout_s``."""
        return self._thread.call(self._news(incarnation, version, timeout_s), timeout_s + POLL_MARGIN_S)

    async def _news(self, incarnation: str, version: int, timeout_s: float) -> dict[str, Any]:
        since = version if incarnation == self._incarnation else -1
        await self._keeper.changed(since, timeout_s)
        inside = tuple(run.alarm for run in self._runs.values() if run.alarm is not None)
        return {
            "incarnation": self._incarnation,
            "version": self._keeper.version,
            "states": self._keeper.states(),
            "lines": self._keeper.lines_after(since),
            "alarmed": (*self._keeper.alarmed, *inside),
            "is_ready": self._keeper.is_ready,
            "pid": os.getpid(),
        }

    def stop(self, timeout_s: float) -> bool:
        """Stops the routers, then the workers. True: every actor is gone."""

        async def stop() -> bool:
            routers = [name for name in self._members if is_router(name)]
            await asyncio.gather(*(self._keeper.stop_member(name, timeout_s) for name in routers))
            self._keeper.stop()
            done, _ = await asyncio.wait([self._run], timeout=timeout_s)
            await self._publisher.close()
            return bool(done)

        return self._thread.call(stop(), 2 * timeout_s + POLL_MARGIN_S)


def create_process_actor(member: Member, policy: Policy, placing: Placing) -> Any:
    """The member's actor: the one that exists by its name, or a new one. Detached, and restarted by Ray for ever."""
    options: dict[str, Any] = {
        "name": actor_name(member.name),
        "namespace": placing.namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": CALL_THREAD_COUNT,
        "num_cpus": member.cpu_count,
        "num_gpus": member.gpu_count,
        "resources": dict(member.resources),
        "runtime_env": {"env_vars": dict(placing.env)},
    }
    if member.role is None:
        options["scheduling_strategy"] = at_home(placing)
    elif placing.is_host_node:
        member = _with_peers(member)
    actor = ray.remote(ProcessActor).options(**options)
    return actor.remote(member.child, policy, placing.log_dir, placing.is_host_node)


def at_home(placing: Placing) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=placing.home_node_id, soft=False)


def _with_peers(member: Member) -> Member:
    """Its engine may pull KV from every node of the cluster as it is now."""
    import json

    hosts = sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    flag, text = member.child.arguments
    arguments = json.loads(text)
    known = arguments["engine"]["peer_hosts"]
    arguments["engine"]["peer_hosts"] = [*known, *(host for host in hosts if host not in known)]
    return replace(member, child=replace(member.child, arguments=(flag, json.dumps(arguments, sort_keys=True))))


async def _answer(ref: Any, timeout_s: float) -> Any:
    """Awaits a Ray call. Raises what the call raised, or ``TimeoutError``."""
    return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout_s)


def _wanted(member: Member) -> str:
    parts = [f"{member.cpu_count:g} CPU"] if member.cpu_count else []
    if member.gpu_count:
        parts.append(f"{member.gpu_count:g} GPU")
    parts += [f"{amount:g} {name}" for name, amount in member.resources.items()]
    return " and ".join(parts) or "anything at all"

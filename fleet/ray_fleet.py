"""A fleet on Ray, seen from the process that starts it: brings Ray up or joins it, and follows the supervisor actor.

Owns the local Ray if it started one: that Ray's processes carry the parent-death signal of this process's main
thread, so nothing of it outlives us. On a Ray it joined it owns nothing: the detached actors go on without us.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fleet import process_tree
from fleet.child_process import SOURCE_ROOT
from fleet.config import FleetConfig
from fleet.keeper import MemberState
from fleet.members import Member
from fleet.reconcile import Policy
from fleet.state_dir import process_start
from fleet.toml_table import ConfigError

POLL_S = 2.0
POLL_MARGIN_S = 8.0
RETRY_S = 0.2
GONE_CHECK_COUNT = 25


class RayUnavailable(Exception):
    """Ray cannot be started or joined; the message says what to do."""


def local_ray_environment(config: FleetConfig, token_file: Path) -> dict[str, str]:
    """Variables of the Ray that we start, variable by variable with the reason. Set before ``import ray``."""
    return {
        # Its name is about other systems; what it does when 0 is to keep 127.0.0.1 as the node's address instead of
        # looking up one that the network can reach. With it every socket of Ray listens on loopback only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Whoever reaches Ray's ports runs code as us: even on loopback, other users of this machine must not.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # Without its head Ray would end our workers after a minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(int(config.cluster.ray.outage_tolerance_s)),
        # Ray runs its workers at nice 15, and their children inherit it: the engine would give way to everything else
        # on its core.
        "RAY_worker_niceness": "0",
        # Its monitor takes a Ctrl-C or a service manager's signal to everybody for a failure, which the driver prints
        # into our output, stack and all. There is no autoscaler here; whoever ended Ray knows.
        "RAY_DEDUP_LOGS_SKIP_REGEX": r"^The autoscaler failed with the following error:\nTerminated with signal",
        # A Ray that somebody else runs on this machine is not ours to join by accident.
        "RAY_ADDRESS": "",
    }


class RayFleet:
    """Same surface as ``LocalFleet``. One per process: Ray itself is a singleton."""

    def __init__(
        self,
        config: FleetConfig,
        members: Sequence[Member],
        policy: Policy,
        secret: bytes,
        *,
        log_dir: Path,
        token_file: Path,
    ) -> None:
        self._config = config
        self._members = tuple(members)
        self._policy = policy
        self._secret = secret
        self._log_dir = log_dir
        self._token_file = token_file
        self._supervisor: Any = None
        self._session_dir = ""
        self._raylet: frozenset[process_tree.ProcessName] = frozenset()
        """Of our own Ray, once started."""
        self.ray_address = config.cluster.ray.address
        # What the supervisor last said.
        self._incarnation = ""
        self._version_there = -1
        self._version = 0
        self._states: tuple[MemberState, ...] = tuple(MemberState(m.name, "waiting", 0, "", None) for m in members)
        self._said: list[tuple[int, str]] = []
        self._is_ready = False
        self._alarmed: tuple[MemberState, ...] = ()

    @property
    def is_local(self) -> bool:
        """Ray is ours."""
        return not self._config.cluster.ray.address

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def alarmed(self) -> tuple[MemberState, ...]:
        return self._alarmed

    @property
    def version(self) -> int:
        return self._version

    def states(self) -> tuple[MemberState, ...]:
        return self._states

    def lines_after(self, version: int) -> tuple[str, ...]:
        return tuple(text for at, text in self._said if at > version)

    async def start(self) -> None:
        """Brings up Ray, which blocks for about three seconds, and the supervisor. Raises ``RayUnavailable``."""
        self.connect()
        self._supervisor = self._create_supervisor()

    def connect(self) -> None:
        """Starts or joins Ray. To be called on the main thread: the processes of a local Ray die with the thread."""
        settings = self._config.cluster.ray
        if self.is_local:
            os.environ.update(local_ray_environment(self._config, self._token_file))
        try:
            import ray
        except ImportError as error:
            raise RayUnavailable(
                f'Ray is not installed here ({error}); install it, or set cluster.runner = "local"'
            ) from error
        options: dict[str, Any] = {"namespace": settings.namespace, "log_to_driver": False, "logging_level": "error"}
        try:
            with _sigterm_kept():
                if self.is_local:
                    cpu_count = settings.num_cpus or int(sum(member.cpu_count for member in self._members))
                    context = ray.init(
                        address="local",
                        num_cpus=max(1, cpu_count),
                        resources=_named_resources(self._members),
                        include_dashboard=False,
                        object_store_memory=settings.object_store_bytes,
                        _temp_dir=str(ray_temp_dir()),
                        **options,
                    )
                    self._session_dir = context.address_info["session_dir"]
                    self.ray_address = context.address_info["gcs_address"]
                    self._raylet = process_tree.named("raylet", process_tree.descendants(os.getpid()))
                else:
                    ray.init(address=settings.address, **options)
        except Exception as error:
            if self.is_local:
                self.disconnect()  # a start that failed half way leaves processes
            what = "Ray could not be started" if self.is_local else f"Ray at {settings.address} could not be joined"
            raise RayUnavailable(
                f"{what}: {error}. "
                + (
                    f"Its logs are under {ray_temp_dir()}."
                    if self.is_local
                    else "Is it running, is this machine one of its nodes, and is its token in RAY_AUTH_TOKEN(_PATH)?"
                )
            ) from error

    def find_supervisor(self) -> Any:
        """The supervisor of a fleet that runs on the Ray we are connected to, or None."""
        import ray

        from fleet.ray_actors import SUPERVISOR

        try:
            return ray.get_actor(SUPERVISOR, namespace=self._config.cluster.ray.namespace)
        except ValueError:
            return None

    def _create_supervisor(self) -> Any:
        import ray

        from fleet.ray_actors import CALL_THREAD_COUNT, SUPERVISOR, Placing, SupervisorActor, at_home

        if self.find_supervisor() is not None:
            namespace = self._config.cluster.ray.namespace
            raise ConfigError(
                f"cluster.ray.namespace: a fleet runs in {namespace!r} already; stop it with `baton down`, or give "
                "this one another namespace"
            )
        env = {"PYTHONPATH": SOURCE_ROOT}
        placing = Placing(
            namespace=self._config.cluster.ray.namespace,
            home_node_id=ray.get_runtime_context().get_node_id(),
            log_dir=str(self._log_dir) if self.is_local else "",
            env=env,
            is_host_node=self._config.cluster.bind_host == "node",
        )
        actor = ray.remote(SupervisorActor).options(
            name=SUPERVISOR,
            namespace=placing.namespace,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=CALL_THREAD_COUNT,
            num_cpus=0,
            runtime_env={"env_vars": env},
            scheduling_strategy=at_home(placing),
        )
        return actor.remote(self._members, self._policy, self._secret, placing)

    async def changed(self, version: int, timeout_s: float) -> int:
        """Waits for news of the supervisor, at most ``timeout_s``. A supervisor that is being restarted has none."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._version <= version and (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            await self._ask(min(left_s, POLL_S))
        return self._version

    async def _ask(self, timeout_s: float) -> None:
        from ray.exceptions import RayError

        try:
            ref = self._supervisor.news.remote(self._incarnation, self._version_there, timeout_s)
            news = await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout_s + POLL_MARGIN_S)
        except (RayError, TimeoutError):
            await asyncio.sleep(RETRY_S)
            return
        if (news["incarnation"], news["version"]) == (self._incarnation, self._version_there):
            return
        self._incarnation, self._version_there = news["incarnation"], news["version"]
        self._version += 1
        self._states, self._is_ready, self._alarmed = news["states"], news["is_ready"], news["alarmed"]
        self._said += [(self._version, line) for line in news["lines"]]
        del self._said[:-256]

    async def stop(self) -> None:
        """Ends every actor of the fleet, and Ray if it is ours. Idempotent."""
        import ray

        if not ray.is_initialized():
            return
        try:
            if not self.is_local:
                await self.stop_actors()
            elif self._supervisor is not None:
                # All else ends with our Ray. Nothing more is asked of it: a signal to our whole process group has
                # ended its raylet, too, and Ray's blocking calls then wait for ever.
                await self._stop_in_order(self._supervisor)
        finally:
            self.disconnect()

    async def _stop_in_order(self, supervisor: Any) -> None:
        """The router, then the workers. Returns when they have ended, cannot be asked, or are late."""
        grace_s = max(member.stop_grace_s for member in self._members)
        timeout_s = self._policy.stop_deadline_s + grace_s + POLL_MARGIN_S
        with contextlib.suppress(Exception):
            stopping = asyncio.wrap_future(supervisor.stop.remote(timeout_s).future())
            try:
                async with asyncio.timeout(2 * timeout_s + POLL_MARGIN_S):
                    while not stopping.done() and self._has_raylet():
                        await asyncio.wait([stopping], timeout=RETRY_S)
            finally:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)  # looked at, whatever it is

    def _has_raylet(self) -> bool:
        """False: the raylet of our own Ray is gone, its actors with it, and a call to one is never answered."""
        return not self._raylet or bool(process_tree.alive(self._raylet))

    async def stop_actors(self) -> tuple[str, ...]:
        """The router, then the workers, in order; whatever is left after the deadlines is killed. Returns the names
        of actors that are there even so."""
        import ray

        from fleet.ray_actors import SUPERVISOR, actor_name

        supervisor = self._supervisor or self.find_supervisor()
        if supervisor is not None:
            await self._stop_in_order(supervisor)
        namespace = self._config.cluster.ray.namespace
        # The supervisor first, or it would start the others anew.
        for name in (SUPERVISOR, *(actor_name(member.name) for member in self._members)):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
        names = {SUPERVISOR, *(actor_name(member.name) for member in self._members)}
        left: tuple[str, ...] = ()
        for _ in range(GONE_CHECK_COUNT):
            there = ray.util.list_named_actors(all_namespaces=True)
            left = tuple(sorted(e["name"] for e in there if e["namespace"] == namespace and e["name"] in names))
            if not left:
                break
            await asyncio.sleep(RETRY_S)
        return left

    def disconnect(self) -> None:
        """Leaves Ray, which ends it if it is ours."""
        import ray

        family = process_tree.descendants(os.getpid()) if self.is_local else frozenset()
        ray.shutdown()
        # Ray's agents notice only minutes later that their raylet is gone. Everything of ours ended before.
        process_tree.kill(family - {(os.getpid(), process_start(os.getpid()))})
        if self._session_dir:
            shutil.rmtree(self._session_dir, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Around ``ray.init``, on the main thread: SIGTERM means afterwards what it meant before.

    Ray's C++ core takes it for a crash: it installs a handler that prints the stack and aborts. A SIGTERM that comes
    meanwhile waits. Ray's threads keep the signal blocked, which is right: ours is the thread that handles it.
    """
    handler = signal.getsignal(signal.SIGTERM)
    _children_take_sigterm()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)  # BEFORE it is let through
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@functools.cache
def _children_take_sigterm() -> None:
    """A mask is inherited, through exec too: without this nothing that Ray starts could be ended with SIGTERM."""
    unblock = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.register_at_fork(after_in_child=unblock)


def ray_temp_dir() -> Path:
    """Short, since Ray puts Unix sockets under it, whose paths may have 107 bytes; per user, mode 0700."""
    path = Path(tempfile.gettempdir()) / f"baton-ray-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise RayUnavailable(f"{path} belongs to somebody else; remove it or set TMPDIR")
    path.chmod(0o700)
    return path


def _named_resources(members: Sequence[Member]) -> dict[str, float]:
    """A Ray of our own has whatever resources the workers name: there is only this one node."""
    total: dict[str, float] = {}
    for member in members:
        for name, amount in member.resources.items():
            total[name] = total.get(name, 0.0) + amount
    return total

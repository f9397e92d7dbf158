"""Who is there: workers, roles, load, health, and what this router has placed on each.

Owns the set of workers, one client and one watch task for each, and the counts of assigned work. The set is the
fleet's to give (``set_workers``); the last one is kept when the fleet falls silent. Never places anything, and is
never in a request's path: a leg whose connection breaks fails by itself.

    set_workers --> dial, ask who it is --> CONNECTING --> a report at least every interval: READY
                         ^                                   | no report for silence_s: SUSPECT, gets nothing new
                         |                                   | no report for lost_s: LOST, and its legs are told
                         '--------- backoff <--------- stream broken: LOST at once, but its legs are not told:
                                                       a leg's own call breaks with the connection, or goes on

A worker that left the set, or whose process was replaced, stays known until nothing of this router is on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from baton.errors import BatonError, engine_failed
from baton.leg import WorkerInfo, WorkerLoad
from baton.request import Role
from router.cluster_view import Assigned, ClusterView, Health, WorkerIdentity, WorkerSpec, WorkerView
from router.worker_client import Connect, WorkerClient

__all__ = ["Roster", "RosterLimits"]

logger = logging.getLogger(__name__)

NOTHING = Assigned()


@dataclass(frozen=True, slots=True)
class RosterLimits:
    """Raises ``ValueError`` naming the key."""

    load_interval_s: float = 0.2
    """Longest time between reports, as asked of workers."""
    silence_s: float = 1.0
    """Without a report for so long, a worker gets nothing new."""
    lost_s: float = 2.0
    """And for so long: what it has is started elsewhere."""
    dial_timeout_s: float = 5.0
    backoff_min_s: float = 0.05
    backoff_max_s: float = 1.0
    max_worker_count: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.load_interval_s < self.silence_s <= self.lost_s:
            raise ValueError(
                f"load_interval_s ({self.load_interval_s}) must be below silence_s ({self.silence_s}), and that at "
                f"most lost_s ({self.lost_s})"
            )
        if not 0 < self.backoff_min_s <= self.backoff_max_s or not self.dial_timeout_s > 0:
            raise ValueError("backoff_min_s must be above 0 and at most backoff_max_s; dial_timeout_s above 0")
        if self.max_worker_count < 1:
            raise ValueError(f"max_worker_count is {self.max_worker_count}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Known:
    """What the router knows of one worker. Changed only by the functions below."""

    spec: WorkerSpec
    role: Role
    health: Health = Health.CONNECTING
    info: WorkerInfo | None = None
    load: WorkerLoad | None = None
    is_drain_wanted: bool = False
    identity: WorkerIdentity = field(init=False, compare=False, repr=False)
    """Of ``spec`` and ``info``; made once, since every request asks for it many times."""

    def __post_init__(self) -> None:
        epoch = self.spec.epoch if self.info is None else self.info.epoch
        object.__setattr__(self, "identity", WorkerIdentity(self.spec.worker_id, epoch))


def named_again(known: Known, spec: WorkerSpec) -> Known:
    """The fleet named it again. A role set by hand stays until the fleet itself wants another one than before."""
    role = spec.role if spec.role is not known.spec.role else known.role
    return replace(known, spec=spec, role=role)


def connected(known: Known, info: WorkerInfo) -> Known:
    """It said who it is; ready only with its first report."""
    return replace(known, info=info, load=None, health=Health.CONNECTING)


def heard(known: Known, load: WorkerLoad) -> Known:
    is_draining = load.is_draining or known.is_drain_wanted
    return replace(known, load=load, health=Health.DRAINING if is_draining else Health.READY)


def silent(known: Known) -> Known:
    return known if known.health is Health.LOST else replace(known, health=Health.SUSPECT)


def broken(known: Known) -> Known:
    return replace(known, health=Health.CONNECTING if known.info is None else Health.LOST)


def lost(known: Known) -> Known:
    return replace(known, health=Health.LOST)


def drain_wanted(known: Known) -> Known:
    health = Health.DRAINING if known.health is Health.READY else known.health
    return replace(known, is_drain_wanted=True, health=health)


@dataclass(eq=False, slots=True)
class _Entry:
    """One worker's place in the roster, with the resources that go with it."""

    known: Known
    client: WorkerClient
    task: asyncio.Task[None] | None = None
    silence_timer: asyncio.TimerHandle | None = None
    assigned: dict[WorkerIdentity, Assigned] = field(default_factory=dict)
    is_named: bool = True
    """In the fleet's last set."""
    seen: WorkerView | None = None
    """The last view of it, and of what: it holds as long as both are the same objects."""
    seen_of: tuple[Known, Assigned] | None = None

    @property
    def is_idle(self) -> bool:
        return not self.assigned

    def view(self) -> WorkerView:
        known = self.known
        assigned = self.assigned.get(known.identity, NOTHING)
        seen, seen_of = self.seen, self.seen_of
        if seen is None or seen_of is None or seen_of[0] is not known or seen_of[1] is not assigned:
            self.seen_of = (known, assigned)
            seen = self.seen = WorkerView(
                identity=known.identity,
                address=known.spec.address,
                role=known.role,
                health=known.health,
                info=known.info,
                load=known.load,
                assigned=assigned,
            )
        return seen


class Roster:
    """``close`` ends every task and client."""

    def __init__(self, connect: Connect, limits: RosterLimits = RosterLimits()) -> None:
        self._connect = connect
        self._limits = limits
        # The mutable state: entries by worker id, those that are leaving, and who wants to be told what.
        self._entries: dict[str, _Entry] = {}
        self._leaving: set[_Entry] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._on_change: list[Callable[[], None]] = []
        self._on_readiness: list[Callable[[], None]] = []
        self._on_connected: list[Callable[[WorkerIdentity, WorkerInfo], None]] = []
        self._on_lost: list[Callable[[WorkerIdentity], None]] = []
        self._on_forgotten: list[Callable[[WorkerIdentity], None]] = []
        self._is_closed = False

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            key = f"{entry.known.health.value} {entry.known.role.value}"
            counts[key] = counts.get(key, 0) + 1
        what = ", ".join(f"{count} {key}" for key, count in sorted(counts.items()))
        return f"<Roster [{what or 'nobody'} | {len(self._leaving)} leaving]>"

    # Questions

    def view(self) -> ClusterView:
        """The workers of the fleet's last set, by id."""
        return ClusterView(tuple([self._entries[worker_id].view() for worker_id in sorted(self._entries)]))

    def client(self, worker: WorkerIdentity) -> WorkerClient:
        """Raises ENGINE_FAILED when this process is not, or no longer, known."""
        entry = self._entry_of(worker)
        if entry is None:
            raise engine_failed(worker.worker_id, "is not known any more")
        return entry.client

    def is_known(self, worker: WorkerIdentity) -> bool:
        return self._entry_of(worker) is not None

    def is_lost(self, worker: WorkerIdentity) -> bool:
        """Whether this process is believed dead, or replaced by another: what is started there may wait for ever."""
        entry = self._entry_of(worker)
        return entry is None or entry.known.identity != worker or entry.known.health is Health.LOST

    # Effects

    def on_change(self, call: Callable[[], None]) -> None:
        """``call`` after every change that placement could care about: of workers, their health, role and load, and
        of what is on them, where that became less."""
        self._on_change.append(call)

    def on_readiness(self, call: Callable[[], None]) -> None:
        """``call`` after every change of workers, their health or role: of those alone, which are rare."""
        self._on_readiness.append(call)

    def on_connected(self, call: Callable[[WorkerIdentity, WorkerInfo], None]) -> None:
        """``call`` each time a process said who it is: on the first connection and on every further one."""
        self._on_connected.append(call)

    def on_lost(self, call: Callable[[WorkerIdentity], None]) -> None:
        """``call`` when a process is believed dead, with what was on it."""
        self._on_lost.append(call)

    def on_forgotten(self, call: Callable[[WorkerIdentity], None]) -> None:
        """``call`` when a process is gone for good: its cache is no more."""
        self._on_forgotten.append(call)

    def set_workers(self, specs: Iterable[WorkerSpec]) -> None:
        """Replaces the set. Idempotent. Raises ``ValueError`` for a repeated id or too many workers."""
        named = list(specs)
        by_id = {spec.worker_id: spec for spec in named}
        if len(by_id) != len(named):
            raise ValueError("a worker id is named twice")
        if len(by_id) > self._limits.max_worker_count:
            raise ValueError(f"{len(by_id)} workers; at most {self._limits.max_worker_count} are allowed")
        if self._is_closed:
            return
        for worker_id in [worker_id for worker_id in self._entries if worker_id not in by_id]:
            self._dismiss(worker_id)
        for worker_id, spec in by_id.items():
            entry = self._entries.get(worker_id)
            if entry is not None and _is_other_process(entry.known, spec):
                self._dismiss(worker_id)
                entry = None
            entry = entry or self._taken_back(spec)
            if entry is None:
                self._admit(spec)
            else:
                entry.known = named_again(entry.known, spec)
        self._changed()

    def set_role(self, worker_id: str, role: Role) -> None:
        """From the next placement on. Raises ``KeyError`` for an unknown worker."""
        entry = self._entries[worker_id]
        entry.known = replace(entry.known, role=role)
        self._changed()

    def drain(self, worker_id: str) -> int:
        """Nothing new goes there. Returns how many requests are still on it. Raises ``KeyError``."""
        entry = self._entries[worker_id]
        entry.known = drain_wanted(entry.known)
        self._changed()
        return sum(assigned.request_count for assigned in entry.assigned.values())

    def doubt(self, worker: WorkerIdentity) -> None:
        """A leg failed there: nothing new goes there until its next report, if one comes."""
        entry = self._entry_of(worker)
        if entry is not None and entry.known.identity == worker and entry.known.health is Health.READY:
            self._update(entry, silent(entry.known))

    def assign(self, worker: WorkerIdentity, more: Assigned, *, sign: int = 1) -> None:
        """Adds to what this router has on a process; ``sign`` -1 takes the same away again."""
        entry = self._entry_of(worker)
        if entry is None:
            assert sign < 0, "placed on a worker that is not known"
            return
        had = entry.assigned.get(worker, NOTHING)
        has = Assigned(
            had.prefill_count + sign * more.prefill_count,
            had.prefill_token_count + sign * more.prefill_token_count,
            had.decode_count + sign * more.decode_count,
            had.decode_token_count + sign * more.decode_token_count,
            had.held_count + sign * more.held_count,
        )
        if has == NOTHING:
            entry.assigned.pop(worker, None)
        else:
            entry.assigned[worker] = has
        if sign < 0:
            if not entry.is_named and entry.is_idle:
                self._close_entry(entry)
            self._tell(self._on_change)  # there is room: of who is ready nothing changed

    async def close(self) -> None:
        """Ends every watch and every connection. Idempotent."""
        self._is_closed = True
        for entry in [*self._entries.values(), *self._leaving]:
            self._close_entry(entry)
        self._entries.clear()
        while self._closing:
            await asyncio.wait(self._closing)

    # Parts

    def _admit(self, spec: WorkerSpec) -> None:
        entry = _Entry(Known(spec, spec.role), self._connect(spec))
        self._entries[spec.worker_id] = entry
        entry.task = asyncio.create_task(self._watch(entry), name=f"watch {spec.worker_id}")

    def _taken_back(self, spec: WorkerSpec) -> _Entry | None:
        """The entry of a process that had left the set and is in it again, with what is still on it: a second entry
        for the same process would be given back what only the first one has."""
        candidates = [
            entry
            for entry in self._leaving
            if entry.known.spec.worker_id == spec.worker_id and not _is_other_process(entry.known, spec)
        ]
        if not candidates:
            return None
        # Another may have met this process as the successor of its own, whose work it still has.
        entry = next((each for each in candidates if each.known.identity in each.assigned), candidates[0])
        self._leaving.discard(entry)
        self._entries[spec.worker_id] = entry
        entry.is_named = True
        return entry

    def _dismiss(self, worker_id: str) -> None:
        entry = self._entries.pop(worker_id)
        entry.is_named = False
        if entry.is_idle:
            self._close_entry(entry)
        else:
            self._leaving.add(entry)

    def _close_entry(self, entry: _Entry) -> None:
        self._leaving.discard(entry)
        self._tell_forgotten(entry.known.identity)
        task = asyncio.create_task(_shut(entry), name=f"leave {entry.known.spec.worker_id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _entry_of(self, worker: WorkerIdentity) -> _Entry | None:
        """The entry that has work of this very process, or else that is connected to it: the present one of that id,
        or a leaving one."""
        entry = self._entries.get(worker.worker_id)
        if not self._leaving:  # nearly always
            has_it = entry is not None and (entry.known.identity == worker or worker in entry.assigned)
            return entry if has_it else None
        candidates = [*([entry] if entry is not None else []), *self._leaving]
        having_work = (each for each in candidates if worker in each.assigned)
        return next(having_work, next((each for each in candidates if each.known.identity == worker), None))

    # The watch: one task per worker reads reports; one timer per worker notices when there are none.

    async def _watch(self, entry: _Entry) -> None:
        worker_id = entry.known.spec.worker_id
        backoff_s = self._limits.backoff_min_s
        while True:
            try:
                self._connected(entry, await entry.client.info(timeout_s=self._limits.dial_timeout_s))
                async with aclosing(entry.client.watch_load(self._limits.load_interval_s)) as loads:
                    async for load in loads:
                        self._heard(entry, load)
                        backoff_s = self._limits.backoff_min_s
            except BatonError as error:
                logger.debug("worker %s: %s", worker_id, error)
            except Exception:
                logger.exception("watching worker %s failed", worker_id)
            self._update(entry, broken(entry.known))
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._limits.backoff_max_s)

    def _connected(self, entry: _Entry, info: WorkerInfo) -> None:
        worker_id = entry.known.spec.worker_id
        if info.worker_id != worker_id:
            raise engine_failed(worker_id, f"at {entry.known.spec.address} answers {info.worker_id}")
        before = entry.known.identity
        is_replaced = entry.known.info is not None and entry.known.info.epoch != info.epoch
        self._set_silence_timer(entry, self._limits.silence_s, self._fell_silent)
        self._update(entry, connected(entry.known, info))
        if is_replaced:
            logger.info("worker %s is a new process", worker_id)
            self._tell_lost(before)
            self._tell_forgotten(before)
        for call in self._on_connected:  # AFTER its predecessor is forgotten
            call(entry.known.identity, info)

    def _heard(self, entry: _Entry, load: WorkerLoad) -> None:
        if load.epoch != entry.known.identity.epoch:
            raise engine_failed(entry.known.spec.worker_id, "is a new process")
        self._set_silence_timer(entry, self._limits.silence_s, self._fell_silent)
        self._update(entry, heard(entry.known, load))

    def _fell_silent(self, entry: _Entry) -> None:
        self._set_silence_timer(entry, self._limits.lost_s - self._limits.silence_s, self._stayed_silent)
        self._update(entry, silent(entry.known))

    def _stayed_silent(self, entry: _Entry) -> None:
        entry.silence_timer = None
        logger.warning("worker %s was silent for %g s", entry.known.spec.worker_id, self._limits.lost_s)
        self._update(entry, lost(entry.known))
        self._tell_lost(entry.known.identity)

    def _set_silence_timer(self, entry: _Entry, delay_s: float, call: Callable[[_Entry], None]) -> None:
        if entry.silence_timer is not None:
            entry.silence_timer.cancel()
        entry.silence_timer = asyncio.get_running_loop().call_later(delay_s, call, entry)

    def _update(self, entry: _Entry, known: Known) -> None:
        if known == entry.known:
            return
        was, entry.known = entry.known, known
        if was.health is not known.health:
            logger.info("worker %s is %s", known.spec.worker_id, known.health.value)
        if was.health is not known.health or was.info is not known.info:
            self._changed()
        else:
            self._tell(self._on_change)  # its load alone

    # Telling

    def _changed(self) -> None:
        self._tell(self._on_readiness)
        self._tell(self._on_change)

    @staticmethod
    def _tell(calls: list[Callable[[], None]]) -> None:
        for call in calls:
            call()

    def _tell_lost(self, worker: WorkerIdentity) -> None:
        for call in self._on_lost:
            call(worker)

    def _tell_forgotten(self, worker: WorkerIdentity) -> None:
        for call in self._on_forgotten:
            call(worker)


def _is_other_process(known: Known, spec: WorkerSpec) -> bool:
    """Whether the fleet means another process than before. It may lag behind what the worker itself said."""
    is_new_epoch = spec.epoch not in (known.spec.epoch, known.identity.epoch)
    return spec.address != known.spec.address or is_new_epoch


async def _shut(entry: _Entry) -> None:
    if entry.silence_timer is not None:
        entry.silence_timer.cancel()
        entry.silence_timer = None
    if entry.task is not None:
        entry.task.cancel()
        with suppress(asyncio.CancelledError):
            await entry.task
    await entry.client.close()

"""KV transfer between simulated engines: what a pull needs to know, how long it takes, when it fails.

Owns the registry of simulated engines in this process. Moves no bytes: a pull checks that the source still holds
the KV, takes the time of the link by the event loop's clock, checks again, and tells the source. The content that
arrives is the source's, so a pull that got somebody else's KV shows in the output.

An engine in another process cannot be seen from here. A ``SimNetwork`` that ``spans_processes`` believes the
parameters then: the pull takes the time for the bytes and succeeds, and freeing the source's blocks is left
to its ledger (the router's ReleaseKv, or the lease). One that does not treats an unknown source as gone.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.errors import ticket_refused
from baton.leg import RecomputeReason
from kvtransfer.faults import Fault, FaultDice, FaultPlan, Operation
from kvtransfer.transfer_params import SimulatedParams, TransferLimits, validate_transfer_params

DEPARTED_LIMIT = 1024
INTRODUCED_LIMIT = 4096


def simulated_params(params: Mapping[str, Any]) -> SimulatedParams:
    """``DecodeJob.pull`` as a simulated engine understands it. Raises ``BatonError`` TICKET_REFUSED otherwise."""
    match validate_transfer_params(params, TransferLimits()):
        case SimulatedParams() as valid:
            return valid
        case _:
            raise ticket_refused("params", "not of a simulated engine")


@dataclass(frozen=True, slots=True)
class Link:
    """A connection between two engines: seconds = ``latency_s`` + bytes / ``bytes_per_s``."""

    latency_s: float = 0.001
    bytes_per_s: float = 0.7e9
    """Stock NIXL between two CPU engines on one host moved 45 MB in about 60 ms, measured on a 2-core machine;
    its raw library reaches about 10e9 there."""

    def __post_init__(self) -> None:
        if not self.latency_s >= 0 or not self.bytes_per_s > 0:
            raise ValueError(f"a link takes time and moves bytes: got {self}")

    def transfer_s(self, byte_count: int) -> float:
        return self.latency_s + byte_count / self.bytes_per_s


class PullFailed(Exception):
    """The KV did not arrive, or must not be trusted. The puller recomputes; nothing was adopted."""

    def __init__(self, why: str, reason: RecomputeReason = RecomputeReason.FAILED) -> None:
        super().__init__(why)
        self.reason = reason


class PullGivenUp(Exception):
    """A posted read is late and cannot be taken back: the request ends, and its blocks when the read does."""


class Damage(enum.Enum):
    """What may come of a read besides what was held."""

    STALE = "stale"
    """The hold ended while it was read, and another request's KV was in the blocks."""
    CORRUPT = "corrupt"


class Misfortune:
    """The faults of simulated pulls: those of a plan, and with ``damage_probability`` damage to what arrives."""

    def __init__(self, plan: FaultPlan, damage_probability: float = 0.0) -> None:
        self.dice = FaultDice(plan)
        self.damage_probability = damage_probability
        self.damaged: Counter[Damage] = Counter()
        self._generator = random.Random(f"{plan.seed}/damage")  # noqa: S311 reproducible misfortune

    @property
    def plan(self) -> FaultPlan:
        return self.dice.plan

    def damage(self) -> Damage | None:
        if self._generator.random() >= self.damage_probability:
            return None
        damage = self._generator.choice(list(Damage))
        self.damaged[damage] += 1
        return damage


@dataclass(frozen=True, slots=True)
class HeldContent:
    """What a source holds under a handle: a digest that stands for the KV of ``token_count`` tokens."""

    token_count: int
    content: int = field(repr=False)


class PullSource(Protocol):
    """What the network needs of an engine whose KV is pulled."""

    def held_content(self, handle: str) -> HeldContent | None:
        """None when the handle is unknown: released, expired, already pulled, or the engine is dead."""

    def note_pulled(self, handle: str) -> None:
        """A peer has the KV now: free it. Idempotent."""


class SimNetwork:
    """The engines of this process by id, and the links between them.

    Faults for tests: ``cut_off`` makes pulls from an engine fail until ``reconnect``.
    """

    def __init__(
        self, link: Link = Link(), *, spans_processes: bool = True, misfortune: Misfortune | None = None
    ) -> None:
        self.link = link
        self.misfortune = misfortune
        self.spans_processes = spans_processes
        self._sources: dict[str, PullSource] = {}
        self._departed: OrderedDict[str, None] = OrderedDict()
        self._cut_off: set[str] = set()
        self.introduced: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Pairs of puller and source that have shaken hands."""

    def join(self, engine_id: str, source: PullSource) -> None:
        """Raises ``ValueError`` if another live engine has this id."""
        if self._sources.get(engine_id, source) is not source:
            raise ValueError(f"engine id {engine_id!r} is taken in this network; give each engine its own")
        self._departed.pop(engine_id, None)
        self._sources[engine_id] = source

    def leave(self, engine_id: str, source: PullSource) -> None:
        """Idempotent. A departed engine is remembered, so that it is not taken for one in another process."""
        if self._sources.get(engine_id) is source:
            del self._sources[engine_id]
            self._departed[engine_id] = None
            while len(self._departed) > DEPARTED_LIMIT:
                self._departed.popitem(last=False)

    def cut_off(self, engine_id: str) -> None:
        self._cut_off.add(engine_id)

    def reconnect(self, engine_id: str) -> None:
        self._cut_off.discard(engine_id)

    def pull(self, params: SimulatedParams, puller_id: str = "") -> SimulatedPull:
        """A pull that has not begun."""
        return SimulatedPull(self, params, puller_id)

    def fault(self, operation: Operation) -> Fault | None:
        return None if self.misfortune is None else self.misfortune.dice.draw(operation)

    def note_pulled(self, params: SimulatedParams) -> None:
        """Tells the source, if it is in this process, that nobody needs the KV any more."""
        source = self._sources.get(params.engine_id)
        if source is not None and params.engine_id not in self._cut_off:
            source.note_pulled(params.handle)

    def content(self, params: SimulatedParams, reason: RecomputeReason = RecomputeReason.FAILED) -> int | None:
        """What the source holds; None for an engine in another process: unseen. Raises ``PullFailed``, with
        ``reason`` where the source lives and holds nothing."""
        source = self._sources.get(params.engine_id)
        if params.engine_id in self._cut_off:
            raise PullFailed("source unreachable")
        if source is None:
            if self.spans_processes and params.engine_id not in self._departed:
                return None
            raise PullFailed("source gone")
        held = source.held_content(params.handle)
        if held is None:
            raise PullFailed("source holds nothing under this handle", reason)
        if held.token_count != params.token_count:
            raise PullFailed(f"source holds {held.token_count} tokens, not {params.token_count}")
        return held.content

    def __repr__(self) -> str:
        return f"<SimNetwork {len(self._sources)} engines, {len(self._cut_off)} cut off>"


Sleep = Callable[[float], Awaitable[None]]


class SimulatedPull:
    """One pull. ``busy_until`` tells, on the loop's clock, until when its read may still write to the blocks of the
    puller: whoever ends a pull early keeps them from others until then."""

    def __init__(self, network: SimNetwork, params: SimulatedParams, puller_id: str) -> None:
        self._network = network
        self._params = params
        self._pair = (puller_id, params.engine_id)
        self.busy_until = 0.0

    async def run(
        self, byte_count: int, *, timeout_s: float, extra_s: float = 0.0, sleep: Sleep = asyncio.sleep
    ) -> int | None:
        """Takes ``extra_s`` until its read is posted, then the time of the link. Returns the content that came.

        ``sleep`` lets the puller's own death end the wait; what it raises comes through.

        ``None`` for an engine in another process: content unseen. Raises ``PullFailed``, after one latency,
        when the source is gone or holds nothing under the handle, and at the end of the transfer when
        that happened meanwhile; ``PullGivenUp`` when ``timeout_s`` have passed and the read is not over. On success
        the source has freed the KV.
        """
        loop = asyncio.get_running_loop()
        due_at = loop.time() + timeout_s
        link = self._network.link
        await self._shake_hands(due_at, sleep)
        try:
            held = self._network.content(self._params)
        except PullFailed:
            await sleep(link.latency_s)
            raise
        await sleep(min(extra_s, timeout_s))
        if loop.time() >= due_at:
            raise PullFailed("its turn did not come in time", RecomputeReason.TIMED_OUT)
        match self._network.fault(Operation.POST):
            case Fault.FAIL:
                raise PullFailed("the read was not posted")
            case Fault.HANG:
                await sleep(self._hang_s)
            case Fault.TIME_OUT:
                await self._give_up(due_at, sleep)
        transfer_s = link.transfer_s(byte_count)
        self.busy_until = loop.time() + transfer_s
        if self.busy_until > due_at:
            await sleep(max(0.0, due_at - loop.time()))
            raise PullGivenUp
        arrived = await self._read(held, transfer_s, sleep)
        match self._network.fault(Operation.POLL):
            case Fault.FAIL:
                self.busy_until = 0.0
                raise PullFailed("the read failed")
            case Fault.HANG:
                await sleep(self._hang_s)
            case Fault.TIME_OUT:
                await self._give_up(due_at, sleep)
        match self._network.fault(Operation.RELEASE):
            case Fault.HANG:
                await sleep(self._hang_s)
            case Fault.FAIL | Fault.TIME_OUT:
                await self._give_up(due_at, sleep)  # as long as a handle is not given back, its read is not over
        self.busy_until = 0.0
        self._verify(arrived)
        if self._network.fault(Operation.NOTIFY) in (None, Fault.HANG):
            self._network.note_pulled(self._params)
        return arrived

    @property
    def _hang_s(self) -> float:
        assert self._network.misfortune is not None
        return self._network.misfortune.plan.hang_s

    async def _shake_hands(self, due_at: float, sleep: Sleep) -> None:
        introduced = self._network.introduced
        if self._pair in introduced:
            return
        match self._network.fault(Operation.HANDSHAKE):
            case Fault.FAIL:
                await sleep(self._network.link.latency_s)
                raise PullFailed("the handshake failed")
            case Fault.HANG:
                await sleep(self._hang_s)
            case Fault.TIME_OUT:
                await sleep(max(0.0, due_at - asyncio.get_running_loop().time()))
                raise PullFailed("the handshake did not end", RecomputeReason.TIMED_OUT)  # nothing was posted
        introduced[self._pair] = None
        while len(introduced) > INTRODUCED_LIMIT:
            introduced.popitem(last=False)

    async def _give_up(self, due_at: float, sleep: Sleep) -> None:
        """The read is posted and does not end: waits for the deadline."""
        assert self._network.misfortune is not None
        now = asyncio.get_running_loop().time()
        self.busy_until = now + self._network.misfortune.plan.stuck_s
        await sleep(max(0.0, min(due_at, self.busy_until) - now))
        if self.busy_until > due_at:
            raise PullGivenUp

    async def _read(self, held: int | None, transfer_s: float, sleep: Sleep) -> int | None:
        misfortune = self._network.misfortune
        damage = None if misfortune is None or held is None else misfortune.damage()
        await sleep(transfer_s / 2)
        if damage is Damage.STALE:
            self._network.note_pulled(self._params)  # as if its time had come: the blocks are another request's
        await sleep(transfer_s / 2)
        return held if damage is None or held is None else held ^ 0x5EED

    def _verify(self, arrived: int | None) -> None:
        """Raises ``PullFailed`` unless what was held is still held, AFTER it was read, and is what arrived."""
        held = self._network.content(self._params, RecomputeReason.STALE)
        if arrived != held:
            self._network.note_pulled(self._params)
            raise PullFailed("what arrived is not what was held", RecomputeReason.CORRUPT)

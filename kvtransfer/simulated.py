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
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.errors import ticket_refused
from kvtransfer.transfer_params import SimulatedParams, TransferLimits, validate_transfer_params

DEPARTED_LIMIT = 1024


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

    def __init__(self, link: Link = Link(), *, spans_processes: bool = True) -> None:
        self.link = link
        self.spans_processes = spans_processes
        self._sources: dict[str, PullSource] = {}
        self._departed: OrderedDict[str, None] = OrderedDict()
        self._cut_off: set[str] = set()

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

    async def pull(
        self,
        params: SimulatedParams,
        byte_count: int,
        *,
        extra_s: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> int | None:
        """Takes the time of the link, plus ``extra_s``, and returns the content that arrived.

        ``sleep`` lets the puller's own death end the wait; what it raises comes through.

        ``None`` for an engine in another process: content unseen. Raises ``PullFailed``, after one latency,
        when the source is gone or holds nothing under the handle, and at the end of the transfer when
        that happened meanwhile. On success the source has freed the KV.
        """
        try:
            self._content(params)
        except PullFailed:
            await sleep(self.link.latency_s)
            raise
        await sleep(self.link.transfer_s(byte_count) + extra_s)
        content = self._content(params)  # again: what was freed during the read is not provably valid
        self.note_pulled(params)
        return content

    def note_pulled(self, params: SimulatedParams) -> None:
        """Tells the source, if it is in this process, that nobody needs the KV any more."""
        source = self._sources.get(params.engine_id)
        if source is not None and params.engine_id not in self._cut_off:
            source.note_pulled(params.handle)

    def _content(self, params: SimulatedParams) -> int | None:
        source = self._sources.get(params.engine_id)
        if params.engine_id in self._cut_off:
            raise PullFailed("source unreachable")
        if source is None:
            if self.spans_processes and params.engine_id not in self._departed:
                return None
            raise PullFailed("source gone")
        held = source.held_content(params.handle)
        if held is None:
            raise PullFailed("source holds nothing under this handle")
        if held.token_count != params.token_count:
            raise PullFailed(f"source holds {held.token_count} tokens, not {params.token_count}")
        return held.content

    def __repr__(self) -> str:
        return f"<SimNetwork {len(self._sources)} engines, {len(self._cut_off)} cut off>"

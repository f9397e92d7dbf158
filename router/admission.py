"""Who may start now, who waits, who is turned away: a bounded waiting room in front of placement.

Owns the waiting requests and the places given out. A request is admitted together with its placement, and only
when its decode worker has room, so that no prefill is spent on an answer that nobody can continue. Never queues
beyond its limit and never lets anyone wait without a deadline.

    enter --> a place now? --yes--> Place .................. close() gives it back, and the next ones are let in
                  | no
                  v
               full? --yes--> QUEUE_FULL, retry_after
                  | no
                  v
    [retries first, then priority, then order of arrival] --> Place
                  |            '- no worker ready for no_worker_s, or short of the deadline --> NO_WORKER
                  '- waited for max_wait_s --> QUEUE_FULL

The first in line is served first: a request that would fit does not overtake one that does not, except where the
latter waits for a worker other than those that failed it.

A request whose decode was refused for want of KV blocks keeps its place and waits here, too (``wait_for_room``),
ahead of all that have none: its KV is held elsewhere meanwhile. Larger priority first, then order of arrival; as many
as have places, and each until its own deadline.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baton.errors import BatonError, draining, no_worker, queue_full
from baton.request import PlacementMode, Role
from router.affinity import AffinityLimits, PrefixIndex
from router.budgets import queue_budget
from router.cluster_view import Assigned, ClusterView, WorkerIdentity
from router.placement import Placement, PlacementAsk, PlacementPolicy, place
from router.room import Room, RoomAsk, candidates, find_room, room_of
from router.roster import Roster
from router.samples.sample_group import SampleGroup, Seat

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 30.0
RATE_WINDOW_COUNT = 64
"""Recent departures that the estimate of ``retry_after_s`` looks at."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Raises ``ValueError`` naming the key."""

    queue_limit: int = 256
    """Requests that may wait; 0 turns away what cannot start at once. Retries of running requests do not count."""
    max_in_flight_count: int = 512
    """Requests with a place."""
    max_wait_s: float = 60.0
    """Longest wait of a request, whatever its deadline."""
    no_worker_s: float = 10.0
    """Longest wait while no worker is ready at all."""
    exclusion_s: float = 0.5
    """A request does not go back to a process that failed it for so long; then it may, if no other is to be had."""
    room_retry_s: float = 1.0
    """A decode refused for want of KV blocks waits for a report of other room, and at most so long before a worker
    that refused it is asked again: a report may lag behind."""
    reply_margin_s: float = 0.25
    """A wait in vain ends this long before the deadline, so that its reason still reaches the caller."""

    def __post_init__(self) -> None:
        if self.queue_limit < 0 or self.max_in_flight_count < 1:
            raise ValueError("queue_limit must be 0 or more, and max_in_flight_count at least 1")
        for key in ("max_wait_s", "no_worker_s", "exclusion_s", "room_retry_s", "reply_margin_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be positive")


@dataclass(frozen=True, slots=True)
class RoomView:
    """The waiting room at one moment."""

    waiting_count: int
    """New requests, each of their samples; retries do not count."""
    ahead_count: int
    """Those that are served before the one that asks."""
    in_flight_count: int
    """Places given out, one for each sample."""
    departures_per_s: float
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class AdmitNow:
    placement: Placement


@dataclass(frozen=True, slots=True)
class WaitInLine:
    pass


@dataclass(frozen=True, slots=True)
class Shed:
    error: BatonError


def admit(
    room: RoomView,
    limits: AdmissionLimits,
    find_place: Callable[[], Placement | None],
    *,
    is_retry: bool = False,
    sample_count: int = 1,
) -> AdmitNow | WaitInLine | Shed:
    """What happens to a request that arrives now. ``find_place`` is asked only if nobody is ahead. Pure.
    ``sample_count``: places that it asks for; 0 for one whose place somebody in line asks for already."""
    if room.is_draining and not is_retry:
        return Shed(draining())
    if sample_count == 0 and not is_retry:
        return WaitInLine()
    if room.ahead_count == 0 and (is_retry or fits_in_flight(room.in_flight_count, sample_count, limits)):
        placement = find_place()
        if placement is not None:
            return AdmitNow(placement)
    # The only one to wait waits, also with more samples than may wait: nobody could tell it when to come again.
    is_full = room.waiting_count + sample_count > limits.queue_limit
    is_only_one = room.waiting_count == 0 and limits.queue_limit > 0
    if not is_retry and is_full and not is_only_one:
        return Shed(queue_full(room.waiting_count, limits.queue_limit, retry_after_s(room)))
    return WaitInLine()


def fits_in_flight(in_flight_count: int, sample_count: int, limits: AdmissionLimits) -> bool:
    """Whether so many more may have a place. Alone, a request with more samples than there may be does not wait for
    ever."""
    return in_flight_count == 0 or in_flight_count + sample_count <= limits.max_in_flight_count


def retry_after_s(room: RoomView) -> float:
    """When the queue of now will have been served, at the pace of late."""
    if room.departures_per_s <= 0:
        return 1.0
    return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, (room.waiting_count + 1) / room.departures_per_s))


@dataclass(frozen=True, slots=True)
class Entry:
    """A request at the door."""

    prompt_token_ids: tuple[int, ...] = field(repr=False)
    max_output_token_count: int
    priority: int
    session_id: str
    deadline_at: float
    tenant: str = ""
    is_retry: bool = False
    """It had a place and lost its worker: it goes first, and is not turned away."""
    excluded: frozenset[WorkerIdentity] = frozenset()
    needs_recompute: bool = False
    seat: Seat | None = None
    """Of one of several samples. The first to come asks for the places of all, as any request. Those that follow were
    counted with it: they go first, and are not turned away."""

    @property
    def goes_first(self) -> bool:
        return self.is_retry or (self.seat is not None and not self.seat.is_lead and self.seat.group.is_counted)

    @property
    def asked_count(self) -> int:
        """Places that are counted when it is let in: none for a sample whose group another asks for, behind which it
        waits, or asked for."""
        if self.seat is None:
            return 1
        group = self.seat.group
        return group.sample_count if group.asks_for_all(self.seat.sample_index) else 0

    @property
    def sample_count(self) -> int:
        """Places that it still needs on its worker."""
        if self.seat is None:
            return 1
        return self.seat.group.kept_count if self.seat.is_lead else 1

    @property
    def session_key(self) -> str:
        """Its session, told from another tenant's of the same id. Empty: none. No tenant has a slash in its name."""
        return f"{self.tenant}/{self.session_id}" if self.session_id else ""


class Place:
    """A request's place: its placement, and what is counted for it on its workers until ``close``."""

    def __init__(
        self,
        admission: Admission,
        placement: Placement,
        prompt_token_count: int,
        kept: Assigned,
        room_rank: tuple[int, int],
        *,
        share: Assigned | None = None,
        group: SampleGroup | None = None,
        is_counted_alone: bool = True,
    ) -> None:
        """``share``: of ``kept``, what is kept for each further sample of ``group``, which is None for a sample that
        is no group's first."""
        self.placement = placement
        self.room_rank = room_rank
        """Its turn among those that wait for room: the same however often it is refused."""
        self.refused: dict[WorkerIdentity, Room | None] = {}
        """Decode workers that had no room for it, and what was known of their room then."""
        self._admission = admission
        self._kept = kept
        self._share = share
        self._group = group
        self._is_counted_alone = is_counted_alone
        self._prefill: Assigned | None = (
            None if placement.prefill is None else Assigned(prefill_count=1, prefill_token_count=prompt_token_count)
        )
        self._held = Assigned()
        self._is_open = True

    def prefill_answered(self) -> None:
        """The prompt is computed: it does not delay others any more, though its KV may be held. Idempotent."""
        if self._prefill is not None and self._is_open:
            assert self.placement.prefill is not None
            self._held = Assigned(held_count=1)
            self._admission.roster.assign(self.placement.prefill, self._held)
        self._prefill_over()

    @property
    def decode_worker_id(self) -> str:
        return self.placement.decode.worker_id

    def give_share(self) -> None:
        """See ``sample_group.LeadPlace``."""
        assert self._share is not None, "only a first sample's place keeps shares"
        if self._is_open:
            self._kept = _less(self._kept, self._share)
            self._admission.roster.assign(self.placement.decode, self._share, sign=-1)

    def move(self, decode: WorkerIdentity) -> None:
        """What is kept for it is kept on another decode worker from now on."""
        before = self.placement.decode
        if self._is_open and decode != before:
            self._admission.roster.assign(decode, self._kept)
            self.placement = replace(self.placement, decode=decode)
            self._admission.roster.assign(before, self._kept, sign=-1)

    def close(self) -> None:
        """Gives the place back and lets the next ones in. Idempotent."""
        if self._is_open:
            self._is_open = False
            if self._group is not None and self._group.lead is self:
                self._group.lead = None
            self._prefill_over()
            held, self._held = self._held, Assigned()
            if held.held_count:
                assert self.placement.prefill is not None
                self._admission.roster.assign(self.placement.prefill, held, sign=-1)
            self._admission.left(self.placement, self._kept, is_counted_alone=self._is_counted_alone)

    def _prefill_over(self) -> None:
        taken, self._prefill = self._prefill, None
        if taken is not None:
            assert self.placement.prefill is not None
            self._admission.roster.assign(self.placement.prefill, taken, sign=-1)


@dataclass(eq=False, slots=True)
class _Waiter:
    entry: Entry
    chain: tuple[int, ...]
    relaxed_at: float
    given: asyncio.Future[Place]


@dataclass(eq=False, slots=True)
class _RoomWaiter:
    place: Place
    wanted_block_count: int
    barred: frozenset[WorkerIdentity]
    given: asyncio.Future[WorkerIdentity]

    @property
    def ask(self) -> RoomAsk:
        return RoomAsk(self.wanted_block_count, self.barred, self.place.refused)


class Turn:
    """A request's turn in line, from ``Admission.join`` to ``leave``.

    Whoever joined leaves, however it ends: a task that is cancelled before its first step has not begun to wait.
    """

    def __init__(self, admission: Admission, waiter: _Waiter, joined_at: float) -> None:
        self._admission = admission
        self._waiter = waiter
        self._joined_at = joined_at
        self._is_taken = False
        loop = asyncio.get_running_loop()
        self._relax = loop.call_at(waiter.relaxed_at, admission.pump) if waiter.entry.excluded else None

    async def place(self) -> Place:
        """Waits for a place; it is then the caller's to close. Cancelled, ``leave`` gives up turn and place.

        Raises NO_WORKER, before the deadline; QUEUE_FULL after ``max_wait_s``. Past the deadline it goes on
        waiting: that is for the owner of the deadline to end.
        """
        given, loop = self._waiter.given, asyncio.get_running_loop()
        for give_up_at, give_up in self._admission.ends_of_patience(self._waiter.entry, self._joined_at):
            await asyncio.wait((given,), timeout=max(0.0, give_up_at - loop.time()))
            if given.done():
                break
            give_up()
        place = await given
        self._is_taken = True
        return place

    def leave(self) -> None:
        """Idempotent. A place that was given in this moment and not taken is not lost."""
        if self._relax is not None:
            self._relax.cancel()
        given = self._waiter.given
        if not self._is_taken and given.done() and not given.cancelled() and given.exception() is None:
            self._is_taken = True
            given.result().close()
        self._admission.leave(self._waiter)


class Admission:
    """One per router, on one loop. ``close`` turns everyone away."""

    def __init__(
        self,
        roster: Roster,
        *,
        rng: random.Random,
        limits: AdmissionLimits | None = None,
        policy: PlacementPolicy | None = None,
        affinity: AffinityLimits | None = None,
    ) -> None:
        self.roster = roster
        self.limits = limits or AdmissionLimits()
        self.policy = policy or PlacementPolicy()
        self._rng = rng
        # The mutable state: who waits, in the order of service; how many have a place; when the last ones left.
        self._waiters: list[tuple[tuple[bool, int, int], _Waiter]] = []
        self._orders = itertools.count()
        # Those with a place that wait for room, and what was given to such since the report that it was taken from.
        self._room_waiters: list[tuple[tuple[int, int], _RoomWaiter]] = []
        self._promised: dict[WorkerIdentity, tuple[Room | None, int]] = {}
        self._in_flight_count = 0
        self._departures: list[float] = []
        self._index = PrefixIndex(affinity or AffinityLimits())
        self._is_draining = False
        self._is_pumping = False
        self._needs_pump = False
        roster.on_change(self.pump)
        roster.on_forgotten(self._index.forget)

    def __repr__(self) -> str:
        return f"<Admission [{self._in_flight_count} in flight | {self.waiting_count} waiting]>"

    # Questions

    @property
    def waiting_count(self) -> int:
        return len(self._waiters)

    @property
    def room_waiting_count(self) -> int:
        """Requests with a place and held KV that wait for a decode worker with room."""
        return len(self._room_waiters)

    @property
    def in_flight_count(self) -> int:
        """Requests with a place."""
        return self._in_flight_count

    @property
    def could_serve(self) -> bool:
        """Whether a worker is ready that a request could be placed on, now or when its turn comes."""
        return not self._is_draining and _can_serve(self.roster.view(), self.policy)

    # Effects

    def samples(self, sample_count: int) -> SampleGroup:
        """The samples of one request; the caller closes it when nothing of them is left."""
        return SampleGroup(sample_count, self._samples_left)

    def drain(self) -> None:
        """Takes no new requests; those that wait and those that run go on, retries included."""
        self._is_draining = True

    def try_enter(self, entry: Entry) -> Place | None:
        """A place at once, or None: then ``join``, before anything else is awaited. Raises QUEUE_FULL or DRAINING."""
        if entry.seat is not None:
            entry.seat.group.asks(entry.seat.sample_index)
        chain = self._index.chain(entry.prompt_token_ids, entry.tenant)
        room = self._room(entry)
        match admit(
            room,
            self.limits,
            lambda: self._find(entry, chain),
            is_retry=entry.goes_first,
            sample_count=entry.asked_count,
        ):
            case AdmitNow(placement):
                return self._take(entry, chain, placement)
            case Shed(error):
                raise error
        return None

    def join(self, entry: Entry) -> Turn:
        """Puts a request in line, at once: the next one at the door already counts it. The caller leaves the line."""
        now = asyncio.get_running_loop().time()
        chain = self._index.chain(entry.prompt_token_ids, entry.tenant)
        waiter = _Waiter(entry, chain, now + self.limits.exclusion_s, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiters, (_rank(entry, next(self._orders)), waiter), key=_rank_of)
        return Turn(self, waiter, now)

    def leave(self, waiter: _Waiter) -> None:
        """Out of the line; ``Turn.leave`` calls this."""
        self._waiters = [item for item in self._waiters if item[1] is not waiter]
        self.pump()  # the next one may have waited for nothing but this one's turn

    async def wait_for_room(
        self,
        place: Place,
        wanted_block_count: int,
        *,
        refused_by: WorkerIdentity,
        barred: frozenset[WorkerIdentity],
        otherwise: BatonError | None,
    ) -> WorkerIdentity:
        """A decode worker with room, to which the place was moved. Cancelling gives up the turn.

        Raises ``otherwise`` at once if it is given and no decode worker is large enough, and NO_WORKER when none is
        left to wait for. Has no deadline of its own: that is its owner's.
        """
        loop = asyncio.get_running_loop()
        waiter = _RoomWaiter(place, wanted_block_count, barred, loop.create_future())
        if otherwise is not None and not candidates(self.roster.view(), waiter.ask):
            raise otherwise
        place.refused[refused_by] = next(
            (room_of(worker) for worker in self.roster.view().workers if worker.identity == refused_by), None
        )
        bisect.insort(self._room_waiters, (place.room_rank, waiter), key=_rank_of)
        ready_at = loop.time()
        try:
            while True:
                self.pump()
                await asyncio.wait((waiter.given,), timeout=self.limits.room_retry_s)
                if waiter.given.done():
                    return waiter.given.result()
                left = candidates(self.roster.view(), waiter.ask)
                if any(worker.is_ready for worker in left):
                    ready_at = loop.time()
                elif not left or loop.time() - ready_at >= self.limits.no_worker_s:
                    raise no_worker(Role.DECODE.value, 0)
                # No news for so long: a report may have been older than the refusal, or a leg may never have come.
                place.refused.clear()
                self._promised.clear()
        finally:
            self._room_waiters = [item for item in self._room_waiters if item[1] is not waiter]
            self.pump()

    def pump(self) -> None:
        """Lets in whoever can be. Called after each change of the cluster and each place given back."""
        if self._is_pumping:  # giving a place tells the roster, which tells us
            self._needs_pump = True
            return
        self._is_pumping = True
        try:
            while True:
                self._needs_pump = False
                self._give_room()
                self._let_in()
                if not self._needs_pump:
                    return
        finally:
            self._is_pumping = False

    def left(self, placement: Placement, kept: Assigned, *, is_counted_alone: bool = True) -> None:
        """A place was given back; ``Place.close`` calls this. Samples are counted by their group."""
        self._in_flight_count -= is_counted_alone
        self._departures.append(asyncio.get_running_loop().time())
        del self._departures[:-RATE_WINDOW_COUNT]
        self.roster.assign(placement.decode, kept, sign=-1)  # tells of the change, which pumps

    def close(self) -> None:
        """Turns everyone away who waits. Idempotent."""
        self._is_draining = True
        waiters, self._waiters = self._waiters, []
        for _, waiter in waiters:
            waiter.given.set_exception(draining())

    # Parts

    def _give_room(self) -> None:
        if not self._room_waiters and not self._promised:
            return
        view = self.roster.view()
        rooms = {worker.identity: room_of(worker) for worker in view.workers}
        # A promise lasts until the worker reports again: then the leg is in its books, or did not come. Looked at
        # also while nobody waits: a worker that is idle once more reports what it did when the promise was made.
        self._promised = {who: was for who, was in self._promised.items() if rooms.get(who) == was[0]}
        for item in list(self._room_waiters):
            waiter = item[1]
            promised = {who: count for who, (_, count) in self._promised.items()}
            decode = find_room(view, waiter.ask, promised)
            if decode is not None:
                count = promised.get(decode, 0) + waiter.wanted_block_count
                self._promised[decode] = rooms[decode], count
                self._room_waiters.remove(item)
                waiter.place.move(decode)
                waiter.given.set_result(decode)
            elif find_room(view, waiter.ask, promised, forgives=True) is None:
                return  # the first in line: nobody overtakes, but where only its own refusals hold it up

    def _let_in(self) -> None:
        for item in list(self._waiters):
            waiter, entry = item[1], item[1].entry
            if not entry.goes_first and entry.asked_count == 0:
                continue  # until the sample is let in, or gone, that asks for its place
            if not entry.goes_first and (
                self._room_waiters or not fits_in_flight(self._in_flight_count, entry.asked_count, self.limits)
            ):
                return
            if entry.excluded and asyncio.get_running_loop().time() >= waiter.relaxed_at:
                entry = replace(entry, excluded=frozenset())
            placement = self._find(waiter.entry, waiter.chain)
            if placement is None and entry is not waiter.entry:
                placement = self._find(entry, waiter.chain)
            if placement is not None:
                self._waiters.remove(item)
                waiter.given.set_result(self._take(entry, waiter.chain, placement))
            elif not entry.excluded or self._find(replace(entry, excluded=frozenset()), waiter.chain) is None:
                # The first in line: nobody overtakes. One that waits for nothing but a worker other than those that
                # failed it is no such; where there is room for it nowhere, it is, or a thousand requests that lost
                # their workers at once would each be looked at whenever anything changes.
                return

    def _find(self, entry: Entry, chain: tuple[int, ...]) -> Placement | None:
        ask = PlacementAsk(
            prompt_token_count=len(entry.prompt_token_ids),
            max_output_token_count=entry.max_output_token_count,
            cached_token_counts=self._index.cached_token_counts(chain),
            session_worker_ids=self._index.session_worker_ids(entry.session_key),
            excluded=entry.excluded,
            needs_recompute=entry.needs_recompute,
            sample_count=entry.sample_count,
            near="" if entry.seat is None else entry.seat.near,
            has_room_kept=entry.seat is not None
            and entry.seat.group.keeps_room_on(entry.seat.near, entry.seat.sample_index),
        )
        return place(self.roster.view(), ask, self._rng, self.policy)

    def _take(self, entry: Entry, chain: tuple[int, ...], placement: Placement) -> Place:
        prompt_token_count = len(entry.prompt_token_ids)
        seat, sample_count = entry.seat, entry.sample_count
        ask = PlacementAsk(prompt_token_count, entry.max_output_token_count, sample_count=sample_count)
        share = Assigned(decode_count=1, decode_token_count=ask.answer_token_count(self.policy))
        kept = Assigned(decode_count=sample_count, decode_token_count=ask.kept_token_count(self.policy))
        if seat is not None and not seat.is_lead and placement.decode.worker_id == seat.near:
            kept = share  # the prompt's blocks are there already, and counted
        self._in_flight_count += 1 if seat is None else seat.group.count()
        given = Place(
            self,
            placement,
            prompt_token_count,
            kept,
            (-entry.priority, next(self._orders)),
            share=share,
            group=seat.group if seat is not None and seat.is_lead else None,
            is_counted_alone=seat is None,
        )
        workers = [placement.decode]
        self.roster.assign(placement.decode, kept)
        if seat is not None and seat.is_lead:
            seat.group.lead = given
        elif seat is not None:
            seat.group.started(seat.sample_index)  # AFTER its own is counted: in between nobody gets in
        if placement.mode is PlacementMode.SPLIT and placement.prefill is not None:
            workers.append(placement.prefill)
            prefill = Assigned(prefill_count=1, prefill_token_count=prompt_token_count)
            self.roster.assign(placement.prefill, prefill)
        self._index.note(chain, entry.session_key, workers)
        return given

    def _room(self, entry: Entry) -> RoomView:
        now = asyncio.get_running_loop().time()
        rank = _rank(entry, next(self._orders))
        window_s = now - self._departures[0] if self._departures else 0.0
        return RoomView(
            waiting_count=sum(waiter.entry.asked_count for _, waiter in self._waiters if not waiter.entry.goes_first),
            # Whoever waits for room is ahead of all that hold no KV yet, but not of those that lost theirs.
            ahead_count=(0 if entry.goes_first else len(self._room_waiters))
            + sum(each < rank and not waiter.entry.excluded for each, waiter in self._waiters),
            in_flight_count=self._in_flight_count,
            departures_per_s=len(self._departures) / window_s if window_s > 0 else 0.0,
            is_draining=self._is_draining,
        )

    def _samples_left(self, place_count: int) -> None:
        self._in_flight_count -= place_count
        self.pump()

    def ends_of_patience(self, entry: Entry, now: float) -> list[tuple[float, Callable[[], None]]]:
        """When to look whether waiting still makes sense, in order."""
        limits = self.limits
        budget = queue_budget(
            now,
            entry.deadline_at,
            max_wait_s=limits.max_wait_s,
            no_worker_s=limits.no_worker_s,
            reply_margin_s=limits.reply_margin_s,
        )
        looks = [
            (budget.no_worker_at, self._give_up_if_no_worker),
            (budget.last_word_at, self._give_up_if_no_worker),
            (budget.give_up_at, self._give_up),
        ]
        return sorted(looks, key=lambda look: look[0])

    def _give_up_if_no_worker(self) -> None:
        view = self.roster.view()
        if not _can_serve(view, self.policy):
            raise no_worker(Role.DECODE.value, len(view.ready(Role.DECODE)))

    def _give_up(self) -> None:
        self._give_up_if_no_worker()
        raise queue_full(self.waiting_count, self.limits.queue_limit, MIN_RETRY_AFTER_S)


def _rank(entry: Entry, order: int) -> tuple[bool, int, int]:
    """Smaller is served first."""
    return (not entry.goes_first, -entry.priority, order)


def _less(kept: Assigned, share: Assigned) -> Assigned:
    return replace(
        kept,
        decode_count=kept.decode_count - share.decode_count,
        decode_token_count=kept.decode_token_count - share.decode_token_count,
    )


def _rank_of(item: tuple[tuple[int, ...], object]) -> tuple[int, ...]:
    return item[0]


def _can_serve(view: ClusterView, policy: PlacementPolicy) -> bool:
    return bool(view.ready(Role.DECODE) or (policy.serves_without_decoder and view.ready()))

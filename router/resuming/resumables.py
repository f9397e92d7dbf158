"""Resumable generations: each runs in a task of its own, and calls come and go to read what it made.

Owns those tasks, their replay windows and their time without a reader. A generation that nobody reads is cancelled
when its grace is over, and a finished one forgotten; one whose caller never got its resume token ends at once with
the call, for nobody could come back to it.

    open --> running, read --cut--> running, detached --grace--> cancelled
                  |   ^------attach------'      |
                  v                             v
             ended, read ---cut---------> ended, kept ---grace--> forgotten

One reader at a time, and the newest is right: a connection that was cut may look open here for minutes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.errors import (
    BatonError,
    Reason,
    attached_elsewhere,
    deadline_exceeded,
    draining,
    internal,
    resume_unknown,
    too_many_resumable,
)
from baton.request import OutputOptions
from baton.timeline import Phase
from router.answering import Admitted, Completed, Piece, PromptPart, RelayEvent
from router.resuming.replay_window import Cursor, ReplayWindow, SharedBytes, WindowLimits, trim_largest

logger = logging.getLogger(__name__)

_NOT_WORTH_REPEATING = frozenset({Reason.DEADLINE_EXCEEDED, Reason.INVALID_REQUEST, Reason.PROMPT_TOO_LONG})
"""Ends that another router, asked to continue, would come to as well."""


@dataclass(frozen=True, slots=True)
class ResumeLimits:
    window: WindowLimits = WindowLimits(max_bytes=1024 * 1024, max_token_count=16_384)
    max_count: int = 1024
    """Generations kept at once, the finished ones that wait for their grace included."""
    total_bytes: int = 256 * 1024 * 1024
    """Of all windows together, and beyond it of each no more than its newest ``GUARANTEED_TOKEN_COUNT`` tokens."""
    default_grace_s: float = 30.0
    max_grace_s: float = 300.0

    def grace_s(self, asked_s: float | None) -> float:
        return min(self.default_grace_s if asked_s is None else asked_s, self.max_grace_s)


@dataclass(frozen=True, slots=True)
class About:
    """What a call that attaches must know of a generation."""

    generation_id: str
    identity: str
    output: OutputOptions
    model: str
    prompt_token_count: int
    deadline_at: float
    """The loop's time."""
    grace_s: float
    resume_token: str = field(repr=False)
    formerly: str = ""
    """The generation that this one goes on with, elsewhere begun. Asked to go on with that one again, this one makes
    place: its caller never heard of it, and may meanwhile have had other tokens from the first."""


class Resumable:
    """One generation. Made by ``Resumables.open``."""

    def __init__(
        self,
        about: About,
        window: ReplayWindow,
        on_forgotten: Callable[[Resumable], None],
        phase_of: Callable[[str], Phase | None],
    ) -> None:
        self.about = about
        self.window = window
        self._on_forgotten = on_forgotten
        self._phase_of = phase_of
        # The mutable state: who reads, what is known of the start, and the clock of the grace.
        self._reader = 0
        self._is_read = False
        self._is_admitted = False
        self._has_caller_token = False
        self._is_delivered = False
        self._is_forgotten = False
        self._is_abandoned = False
        self._is_given_up = False
        self._grace: asyncio.TimerHandle | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "running" if self.is_running else "ended"
        return f"<Resumable {self.about.generation_id} {state}, {'read' if self._is_read else 'detached'}>"

    # Questions

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def task(self) -> asyncio.Task[None]:
        """While it runs."""
        assert self._task is not None, "it runs"
        return self._task

    @property
    def is_read(self) -> bool:
        return self._is_read

    @property
    def is_abandoned(self) -> bool:
        """Its grace ended while it ran."""
        return self._is_abandoned

    @property
    def is_delivered(self) -> bool:
        """It ended, and all of it was written to a reader: kept only for the case that the reader did not get it."""
        return self._is_delivered and not self._is_read

    @property
    def _has_its_own_end(self) -> bool:
        """One that is not the router's: that is worth to be read to it, while the router drains."""
        last = self.window.last
        is_the_routers = isinstance(last, BatonError) and last.reason is Reason.DRAINING
        return self._is_admitted and last is not None and not is_the_routers

    @property
    def could_continue(self) -> bool:
        """Whether it failed in a way that need not befall a continuation."""
        last = self.window.last
        return isinstance(last, BatonError) and last.reason not in _NOT_WORTH_REPEATING

    # Effects

    def start(self, events: AsyncGenerator[RelayEvent, None]) -> None:
        self._task = asyncio.create_task(self._run(events), name=f"{self.about.generation_id} resumable")
        self._task.add_done_callback(self._ended)
        self._start_grace()  # until somebody reads

    async def read(
        self, next_indices: Sequence[int], *, until: float | None = None
    ) -> AsyncGenerator[RelayEvent, None]:
        """``Admitted Piece* Completed`` from ``next_indices`` on, or a raised ``BatonError``. Takes over from whoever
        reads. ``until``: the loop's time; after it this call ends, and not the generation.

        Raises what ended the generation, and INVALID_REQUEST and RESUME_TOO_LATE of the window, ATTACHED_ELSEWHERE,
        DRAINING (ABORTED once it gave tokens), RESUME_UNKNOWN when it is cancelled meanwhile. Closing it leaves the
        generation without a reader.
        """
        loop = asyncio.get_running_loop()
        cursor = self.window.cursor(next_indices)  # BEFORE taking over: who asks wrongly disturbs nobody
        self._reader += 1
        me = self._reader
        has_sent_tokens = False
        self._is_read = True
        self._stop_grace()
        self._tell()
        alarm = None if until is None else loop.call_at(until, self._tell)
        try:
            while not self._is_admitted and self.window.last is None:
                self._check_right(me, cursor, until, has_sent_tokens)
                await self._news()
            if self._is_admitted:
                yield Admitted(self.about.generation_id)
                self._has_caller_token = True
            while True:
                self._check_right(me, cursor, until, has_sent_tokens)
                piece = self.window.take(cursor)
                if piece is not None:
                    has_sent_tokens |= bool(piece.token_ids)
                    yield piece  # whoever writes it gives others their turn
                elif self.window.is_behind(cursor):
                    await asyncio.sleep(0)  # others' turn: it has been at many pieces that this reader has
                elif isinstance(self.window.last, BatonError):
                    raise self.window.last
                elif self.window.last is not None:
                    yield self.window.last
                    self._is_delivered = True
                    return
                else:
                    await self._news()
        finally:
            if alarm is not None:
                alarm.cancel()
            if me == self._reader:
                self._detached()

    def give_up(self) -> None:
        """Tells whoever reads to go on elsewhere (DRAINING); the generation goes on until it is closed."""
        self._is_given_up = True
        self._tell()

    def forget(self) -> None:
        """Ends it, whatever it is doing. Idempotent."""
        if self._is_forgotten:
            return
        self._is_forgotten = True
        self._stop_grace()
        if self.is_running:
            self.task.cancel()
        self.window.end(resume_unknown())
        if not self._is_read:
            self.window.clear()
        self._on_forgotten(self)
        self._tell()

    # Parts

    async def _run(self, events: AsyncGenerator[RelayEvent, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    match event:
                        case Piece():
                            self.window.put(event)
                        case Admitted():
                            self._is_admitted = True
                        case Completed():
                            self._end(event)
                        case PromptPart():
                            raise AssertionError("a resumable request has no prompt part")
                    self._tell()
        except BatonError as error:
            self._end(error)
        except Exception as error:
            logger.exception("request %s: a bug in its pipeline", self.about.generation_id)
            self._end(internal(f"the pipeline raised {type(error).__name__}", self.about.generation_id))
        finally:
            self._end(resume_unknown())  # the first end counts: this one only for what was cancelled
            self._tell()

    def _ended(self, task: asyncio.Task[None]) -> None:
        # A cancelled task has its error, that its frames, and those this: kept, they would wait for the collector.
        self._task = None

    def _end(self, last: Completed | BatonError) -> None:
        if self.window.last is None:
            self.window.end(last)
            if not self._is_read and not self._is_forgotten:
                self._start_grace()  # anew: the grace of an answer's end is from its last token

    def _check_right(self, me: int, cursor: Cursor, until: float | None, has_sent_tokens: bool) -> None:
        """That this reader may still read."""
        if me != self._reader:
            raise attached_elsewhere()
        if self._is_given_up and not self._has_its_own_end:
            # Once this call sent tokens, to send it again would repeat them.
            sent = self.window.token_count_before(cursor) if has_sent_tokens else 0
            raise draining(sent, advice="resume at another")
        if until is not None and asyncio.get_running_loop().time() >= until:
            raise deadline_exceeded(self._phase().value, self.window.token_count_before(cursor))

    def _phase(self) -> Phase:
        """Where the time of a call that reads goes now."""
        if self.window.last is not None:
            return Phase.DECODE  # all that is left is to be read
        return self._phase_of(self.about.generation_id) or (Phase.DECODE if self._is_admitted else Phase.QUEUE)

    def _detached(self) -> None:
        self._is_read = False
        if self._is_forgotten:
            self.window.clear()
        elif not self._has_caller_token:
            self.forget()
        else:
            self._start_grace()

    def _start_grace(self) -> None:
        self._stop_grace()
        loop = asyncio.get_running_loop()
        # Nobody can come back after its token is over: that, too, is the deadline and the grace.
        over_at = min(loop.time(), self.about.deadline_at) + self.about.grace_s
        self._grace = loop.call_at(over_at, self._grace_over)

    def _stop_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _grace_over(self) -> None:
        self._is_abandoned = self.window.last is None
        self.forget()

    async def _news(self) -> None:
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(told)
        await told

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for told in waiting:
            if not told.done():
                told.set_result(None)


class Resumables:
    """Every resumable generation of this router, by id. ``close`` ends them all."""

    def __init__(
        self,
        limits: ResumeLimits | None = None,
        *,
        on_abandoned: Callable[[], None] = lambda: None,
        phase_of: Callable[[str], Phase | None] = lambda generation_id: None,
    ) -> None:
        """``phase_of``: asked, by its id, where a generation is that runs; None for one that has no flight."""
        self.limits = limits or ResumeLimits()
        self._on_abandoned = on_abandoned
        self._phase_of = phase_of
        self._shared = SharedBytes(self.limits.total_bytes, make_room=self._make_room)
        self._by_id: dict[str, Resumable] = {}
        self._kept: dict[Resumable, None] = {}  # in order of age
        self._ending: set[asyncio.Task[None]] = set()  # forgotten, and not yet at rest

    def __repr__(self) -> str:
        return f"<Resumables {self.kept_count} kept, {self.running_count} running, {self.used_bytes} bytes>"

    # Questions

    @property
    def kept_count(self) -> int:
        return len(self._kept)

    @property
    def running_count(self) -> int:
        return sum(each.is_running for each in self._kept)

    @property
    def detached_count(self) -> int:
        """Running without a reader."""
        return sum(each.is_running and not each.is_read for each in self._kept)

    @property
    def used_bytes(self) -> int:
        """Of all windows."""
        return self._shared.used_bytes

    def find(self, generation_id: str) -> Resumable | None:
        """The generation of this id, and none that goes on with it: of that the caller may have no token."""
        found = self._by_id.get(generation_id)
        return found if found is not None and found.about.generation_id == generation_id else None

    # Effects

    def open(
        self,
        about: About,
        events: Callable[[], AsyncGenerator[RelayEvent, None]],
        *,
        first_indices: Sequence[int] = (0,),
    ) -> Resumable:
        """Starts one. Raises TOO_MANY_RESUMABLE, before ``events`` is called, and what that raises; the generation
        that this one goes on with is then left as it is."""
        before = self._by_id.get(about.formerly) if about.formerly else None
        self._check_place(before)
        source = events()  # BEFORE anything is forgotten or kept: it may raise
        if before is not None:
            before.forget()
        self._make_place()
        window = ReplayWindow(
            self.limits.window, self._shared, about.output.max_chunk_token_count, tuple(first_indices)
        )
        resumable = Resumable(about, window, self._forgotten, self._phase_of)
        self._kept[resumable] = None
        for generation_id in _ids(about):
            self._by_id[generation_id] = resumable
        resumable.start(source)
        return resumable

    def cancel(self, generation_id: str) -> bool:
        """Ends it, or what goes on with it here. Whether it was running."""
        resumable = self._by_id.get(generation_id)
        if resumable is None:
            return False
        was_running = resumable.window.last is None  # its task may still be on its way out after that
        resumable.forget()
        return was_running

    def goodbyes(self) -> list[Callable[[], None]]:
        """What tells the readers of each running one to go on elsewhere (DRAINING)."""
        return [resumable.give_up for resumable in self._kept]

    async def close(self) -> None:
        """Ends everything and waits. Idempotent."""
        for resumable in [*self._kept]:
            resumable.forget()
        while self._ending:
            await asyncio.wait(self._ending)

    # Parts

    def _make_place(self) -> None:
        """There is some to be had: ``_check_place`` said so."""
        if self.kept_count >= self.limits.max_count:
            next(each for each in self._kept if each.is_delivered).forget()  # the oldest

    def _check_place(self, leaving: Resumable | None) -> None:
        if self.kept_count - (leaving is not None) < self.limits.max_count:
            return
        if any(each.is_delivered for each in self._kept):
            return
        raise too_many_resumable(self.kept_count, self.limits.max_count, min(self.limits.default_grace_s, 1.0))

    def _make_room(self, target_bytes: int) -> None:
        """Over the bound of all windows: first goes what a reader had whole, then what ended and nobody reads, each
        oldest first; then the largest windows become smaller. One that runs or is read is never forgotten for it."""
        ended = [each for each in self._kept if each.window.last is not None and not each.is_read]
        for resumable in sorted(ended, key=lambda each: not each.is_delivered):  # stable
            if self.used_bytes <= target_bytes:
                return
            resumable.forget()
        trim_largest([each.window for each in self._kept], self._shared, target_bytes)

    def _forgotten(self, resumable: Resumable) -> None:
        self._kept.pop(resumable, None)
        for generation_id in _ids(resumable.about):
            if self._by_id.get(generation_id) is resumable:
                del self._by_id[generation_id]
        if resumable.is_abandoned:
            self._on_abandoned()
        if resumable.is_running:
            self._ending.add(resumable.task)
            resumable.task.add_done_callback(self._ending.discard)


def _ids(about: About) -> tuple[str, ...]:
    return (about.generation_id, about.formerly) if about.formerly else (about.generation_id,)

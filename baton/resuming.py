"""How a client goes on with a stream that was cut: what it has, where it tries next, and when it gives up. Pure.

One ``Continuity`` per generation. It keeps the token ids received (as many as the answer has, which the context
bounds), checks every attachment against the one grammar, and decides; who owns the calls does what it says.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from baton.errors import BatonError, HandshakeFailed, Reason, StatusName
from baton.events import Chunk, Event, Finished, Started
from baton.stream_grammar import StreamGrammar


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """How hard a client tries to attach again. A round asks every address once, the one of the cut first."""

    max_round_count: int = 12
    """Rounds in a row that bring no token; the first one without delay."""
    first_delay_s: float = 0.1
    """Before the second round; doubles with each, and half of it is drawn, so that callers of a restarted router do
    not come back in one wave."""
    max_delay_s: float = 2.0


DEFAULT_POLICY = ResumePolicy()


@dataclass(frozen=True, slots=True)
class NextTry:
    """Wait, then ask this address."""

    delay_s: float
    address_index: int


class Continuity:
    """Of one generation, over its attachments."""

    def __init__(
        self,
        *,
        address_count: int,
        address_index: int,
        sample_count: int,
        is_resumable: bool,
        wants_token_ids: bool,
        rng: random.Random,
        policy: ResumePolicy = DEFAULT_POLICY,
    ) -> None:
        """``wants_token_ids``: whether the caller does; the wire has them in any case where it is resumable."""
        self._address_count = address_count
        self._is_resumable = is_resumable
        self._wants_token_ids = wants_token_ids
        self._rng = rng
        self._policy = policy
        self._grammar = StreamGrammar(sample_count)
        self._token_ids: list[list[int]] = [[] for _ in range(sample_count)]
        # What changes with every attachment.
        self.address_index = address_index
        self.home_index = address_index
        """Where it was last attached, and so where it runs."""
        self.resume_token = ""
        self.resume_count = 0
        self._is_taken = False
        self._try_count = 0  # since the last token
        self._first_index = address_index  # where the tries of this cut began
        self._original: BatonError | None = None

    @property
    def is_attaching_again(self) -> bool:
        """The next call goes on with a generation, instead of beginning one."""
        return bool(self.resume_token)

    @property
    def may_still_run(self) -> bool:
        """Whether a server computes on, for nobody, if nobody tells it to stop. What another call of ours took over
        has its reader: a cancel would end that one's."""
        return bool(self.resume_token) and not self._grammar.is_finished and not self._is_taken

    @property
    def next_token_indices(self) -> tuple[int, ...]:
        return self._grammar.next_token_indices

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """So far, of each sample."""
        return tuple(tuple(ids) for ids in self._token_ids)

    def take(self, event: Event) -> Event | None:
        """Checks what came and keeps what a resume needs. Returns what the caller gets: None for the ``Started`` of a
        later attachment. Raises INTERNAL."""
        is_again = self.is_attaching_again and isinstance(event, Started)
        self._grammar.check(event)
        if not self._is_resumable:
            return event
        match event:
            case Started():
                self.resume_token = event.resume_token
                self.home_index = self.address_index
                if is_again:
                    self.resume_count += 1
                    return None
            case Chunk():
                self._try_count = 0
                self._token_ids[event.sample_index].extend(event.token_ids)
                if not self._wants_token_ids and event.token_ids:
                    return dataclasses.replace(event, token_ids=())
            case Finished() if self.resume_count:
                return dataclasses.replace(event, resume_count=self.resume_count)
        return event

    def check_end(self) -> None:
        self._grammar.check_end()

    def is_over_despite(self, error: BatonError) -> bool:
        """``Finished`` came, and only the status behind it was lost with the connection: the caller lacks nothing."""
        return self._grammar.is_finished and _is_cut(error)

    def broken(self, error: BatonError) -> BatonError:
        """The error as it ends this stream: of what came already, nobody may be told that nothing did."""
        self._is_taken |= error.reason is Reason.ATTACHED_ELSEWHERE
        return self._grammar.broken(error)

    def after(self, error: BatonError, *, remaining_s: float) -> NextTry:
        """What to do about a call that failed. Raises what the caller is to see where nothing is left to do."""
        if not self.is_attaching_again:
            return self._elsewhere(error, remaining_s)
        if error.reason in (Reason.DEADLINE_EXCEEDED, Reason.ATTACHED_ELSEWHERE):
            raise self.broken(error)
        if self._grammar.is_started:
            # Read too slowly (RESUME_TOO_LATE), the window moved on: the tokens are here, so a continuation serves.
            if not _is_cut(error) and error.reason is not Reason.RESUME_TOO_LATE:
                raise self._grammar.broken(error)
            self._original = error
            if self._try_count == 0:
                # One that drains will not take us back.
                self._first_index = self.address_index + (error.reason is Reason.DRAINING)
        elif not _is_cut(error):
            raise self._given_up() from error
        next_try = self._next_try(error, remaining_s)
        if next_try is None:
            raise self._given_up() from error
        self._grammar.attach_again()
        return next_try

    def _elsewhere(self, error: BatonError, remaining_s: float) -> NextTry:
        """A call that was refused before it began may be sent again: to each other address once. One that was *lost*
        before it began may have begun unseen; where it is resumable, the caller wants to see no cuts, and what began
        unseen ends with its grace."""
        if self._grammar.is_started or error.status is not StatusName.UNAVAILABLE:
            raise self._grammar.broken(error)
        if self._try_count == 0:
            self._first_index = self.address_index + 1  # this one has just refused
        next_try = self._next_try(error, remaining_s)
        is_lost = "transport" in error.metadata and not isinstance(error, HandshakeFailed)
        may_insist = self._is_resumable and is_lost
        if next_try is None or (self._try_count >= self._address_count and not may_insist):
            raise error
        return next_try

    def _next_try(self, error: BatonError, remaining_s: float) -> NextTry | None:
        """None: enough was tried, or the time left is less than what is to be waited."""
        round_index, place = divmod(self._try_count, self._address_count)
        if round_index >= self._policy.max_round_count:
            return None
        delay_s = self._delay_s(round_index) if place == 0 else 0.0
        if error.status is StatusName.RESOURCE_EXHAUSTED:
            delay_s = max(delay_s, error.retry_after_s or 0.0)
        if delay_s >= remaining_s:
            return None
        self._try_count += 1
        self.address_index = (self._first_index + place) % self._address_count
        return NextTry(delay_s, self.address_index)

    def _delay_s(self, round_index: int) -> float:
        if round_index == 0:
            return 0.0
        longest_s = min(self._policy.max_delay_s, self._policy.first_delay_s * 2.0 ** (round_index - 1))
        return float(longest_s * self._rng.uniform(0.5, 1.0))

    def _given_up(self) -> BatonError:
        assert self._original is not None
        error = self._grammar.broken(self._original)
        error.metadata["resume_try_count"] = str(self._try_count)
        return error


_MAY_GO_ON = frozenset({Reason.DRAINING, Reason.ATTEMPTS_EXHAUSTED, Reason.STALLED})
"""What ended at one router, and may go on from its tokens with new attempts, there or at another."""
_TORN = frozenset({"INTERNAL", "UNKNOWN"})
"""What gRPC says of a connection that was reset in the middle of a message, depending on where."""


def _is_cut(error: BatonError) -> bool:
    """Whether the generation may still be there, or a router may go on with it. So may one that is full (QUEUE_FULL),
    which it may say after ``Started``, too: a continuation is placed after it was accepted."""
    is_torn = error.reason is Reason.INTERNAL and error.metadata.get("transport") in _TORN
    # A handshake that failed: at this address, and after it was good somewhere.
    return error.is_retryable or error.reason in _MAY_GO_ON or is_torn or isinstance(error, HandshakeFailed)

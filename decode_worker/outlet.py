"""What the legs of one stream have to say and its reader has not been told yet.

Pure. Nothing is held back and nothing waits for a slow reader: what comes of a leg is merged with what waits of it.
Bounded by what the legs in hand may say in all: each by its own ``max_token_count``. What leaves at once is bounded,
too, so that no message is too large for its reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.errors import BatonError
from baton.leg import DecodeDone, DecodeEvent, KvAdopted, Stepped
from baton.request import LegFinish, TokenLogprobs

MAX_LEG_TOKEN_COUNT = 1024
"""Tokens of one leg that leave at once: with logprobs of the 20 likeliest some 300 KB."""
MAX_BYTES = 1024 * 1024
"""No leg is added to what leaves at once beyond about so much; a reader takes 16 MiB."""
_TOKEN_BYTES, _LOGPROBS_BYTES, _TOP_BYTES, _LEG_BYTES = 4, 16, 16, 16
"""About what they are on the wire."""


@dataclass(slots=True)
class Waiting:
    """Of one leg; told in this order."""

    leg_number: int
    adopted: KvAdopted | None = None
    token_ids: list[int] = field(default_factory=list, repr=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list, repr=False)
    """Empty, or one of each token."""
    finish: LegFinish | None = None
    failure: BatonError | None = None

    @property
    def is_tokens_only(self) -> bool:
        return self.adopted is None and self.finish is None and self.failure is None and not self.logprobs

    @property
    def byte_count(self) -> int:
        top_count = len(self.logprobs[0].top) if self.logprobs else 0
        each = _LOGPROBS_BYTES + top_count * _TOP_BYTES if self.logprobs else 0
        return _LEG_BYTES + len(self.token_ids) * (_TOKEN_BYTES + each)

    def first(self, token_count: int) -> Waiting:
        """Takes off the beginning, which has no end in it."""
        begun = Waiting(self.leg_number, self.adopted, self.token_ids[:token_count], self.logprobs[:token_count])
        self.adopted = None
        del self.token_ids[:token_count], self.logprobs[:token_count]
        return begun


class Outlet:
    """One stream's. Many legs add, one writer takes."""

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}

    def __len__(self) -> int:
        """Legs that have something to say."""
        return len(self._waiting)

    def add(self, leg_number: int, event: DecodeEvent) -> None:
        waiting = self._of(leg_number)
        match event:
            case Stepped():
                waiting.token_ids += event.token_ids
                waiting.logprobs += event.logprobs
            case KvAdopted():
                waiting.adopted = event
            case DecodeDone():
                waiting.finish = event.finish

    def fail(self, leg_number: int, failure: BatonError) -> None:
        self._of(leg_number).failure = failure

    def forget(self, leg_number: int) -> None:
        """Nobody listens to it any more."""
        self._waiting.pop(leg_number, None)

    def take(self) -> list[Waiting]:
        """What leaves now, those who waited longest first; what is too much for once stays."""
        taken: list[Waiting] = []
        byte_count = 0
        for leg_number in list(self._waiting):
            waiting = self._waiting[leg_number]
            if len(waiting.token_ids) > MAX_LEG_TOKEN_COUNT:
                waiting = waiting.first(MAX_LEG_TOKEN_COUNT)
            else:
                del self._waiting[leg_number]
            taken.append(waiting)
            byte_count += waiting.byte_count
            if byte_count >= MAX_BYTES:
                break
        return taken

    def _of(self, leg_number: int) -> Waiting:
        waiting = self._waiting.get(leg_number)
        if waiting is None:
            waiting = self._waiting[leg_number] = Waiting(leg_number)
        return waiting

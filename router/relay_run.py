"""One run of the relay: a generator of events, with a direct line for the tokens.

Whoever reads the events with no stage in between may ask for the direct line: while it waits for the next event, a
piece of tokens is handed to it by a call, where the worker's message is dealt with, instead of waking its task, the
generator's frames and all. It may decline, at any moment: the piece then goes the usual way, behind nothing, since
the line is used only while nothing waits. The first tokens, what follows a refusal and every end go the usual way.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from baton.metrics import RouterMetrics
from router.answering import Piece, RelayEvent
from router.outbox import Outbox

DirectLine = Callable[[Piece, float], bool]
"""Takes a piece, made at a time of the loop; False: not now. Raises nothing."""


class TokenMeter:
    """Counts the tokens of one run as they leave."""

    __slots__ = ("_metrics", "sent_at")

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self.sent_at: float | None = None
        """The last ones; None: none were sent."""

    def sent(self, token_count: int, now: float) -> None:
        self._metrics.tokens_sent(token_count, None if self.sent_at is None else now - self.sent_at)
        self.sent_at = now


class RelayRun(AsyncGenerator[RelayEvent, None]):
    """What ``Relay.run`` returns."""

    def __init__(
        self,
        events: AsyncGenerator[RelayEvent, None],
        outbox: Outbox,
        meter: TokenMeter,
        clock: Callable[[], float],
    ) -> None:
        self._events = events
        self._outbox = outbox
        self._meter = meter
        self._clock = clock
        self._line: DirectLine | None = None

    def deliver_to(self, line: DirectLine) -> None:
        """Before the first event is asked for."""
        self._line = line
        self._outbox.line = self._pass

    def _pass(self, piece: Piece) -> bool:
        line, meter = self._line, self._meter
        if line is None or meter.sent_at is None or not piece.token_ids:
            return False
        now = self._clock()
        if not line(piece, now):
            return False
        meter.sent(len(piece.token_ids), now)
        return True

    def __anext__(self) -> Any:
        return self._events.__anext__()

    def asend(self, value: None) -> Any:
        return self._events.asend(value)

    def athrow(self, *error: Any) -> Any:
        return self._events.athrow(*error)

    def aclose(self) -> Awaitable[None]:  # type: ignore[override]  # the generator's own, not another around it
        self._line = None
        self._outbox.line = None
        return self._events.aclose()

"""Facts on their way to one request's handoff.

Owns nothing but the order, which is that of arrival. Nothing waits to be put: whoever says a fact may be about to be
cancelled, or reads a connection that others are on. Bounded all the same: a leg's facts are acted on where they are
said, and come here only while others wait, until the flight's next turn; the others are a few per leg.
"""

from __future__ import annotations

import asyncio
from collections import deque

from router.handoff_words import Fact


class FactQueue:
    """Many writers, one reader, one loop."""

    def __init__(self) -> None:
        self._facts: deque[Fact] = deque()
        self.waiting = self._facts
        """For others to look whether there are any."""
        self._came = asyncio.Event()

    def __len__(self) -> int:
        return len(self._facts)

    def put_now(self, fact: Fact) -> None:
        self._facts.append(fact)
        self._came.set()

    def nudge(self) -> None:
        """Something is to be looked at that is no fact."""
        self._came.set()

    async def next(self) -> Fact | None:
        """None: nudged."""
        if not self._facts:
            await self._came.wait()
        self._came.clear()
        return self._facts.popleft() if self._facts else None

    def drain(self) -> list[Fact]:
        """All that is there, now."""
        facts = list(self._facts)
        self._facts.clear()
        return facts

"""Facts on their way to one request's handoff.

Owns nothing but the order, which is that of arrival. What ends something (an answer, a failure, a deadline) is never
refused and never waits, since whoever says it may be about to be cancelled. Bounded: a leg that brings tokens faster
than they are handled waits, and the facts that do not wait are a few per leg.
"""

from __future__ import annotations

import asyncio
from collections import deque

from router.handoff_words import Fact

MAX_WAITING_COUNT = 64


class FactQueue:
    """Many writers, one reader, one loop."""

    def __init__(self) -> None:
        self._facts: deque[Fact] = deque()
        self._came = asyncio.Event()
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._facts)

    def put_now(self, fact: Fact) -> None:
        self._facts.append(fact)
        self._came.set()

    async def put(self, fact: Fact) -> None:
        """Waits for room. Cancelled meanwhile, the fact is not put."""
        while len(self._facts) >= MAX_WAITING_COUNT:
            self._left.clear()
            await self._left.wait()
        self.put_now(fact)

    async def next(self) -> Fact:
        while not self._facts:
            self._came.clear()
            await self._came.wait()
        self._left.set()
        return self._facts.popleft()

    def drain(self) -> list[Fact]:
        """All that is there, now."""
        facts = list(self._facts)
        self._facts.clear()
        self._left.set()
        return facts

"""The end of every call that a router which stops still has: told in turn, and waited for while calls still end.

Told all at once, thousands of calls would all do their first step, then all their second: none had its status until
nearly all had, and a limit in seconds cut off every one. So a slice is told at a time, and what is waited for is
progress, with a bound that grows with the number of calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

SLICE_COUNT = 32
"""Calls told in one turn of the loop."""
TICK_S = 0.01
"""Between two slices, and between two looks at how many calls are left."""
PATIENT_TICK_COUNT = 100
"""So many looks (a second; longer where the loop is busy) without the end of any call: those that are left read
nothing. Of looks, not of time: of a loop that is held up for seconds every call is late, and none is stuck."""
PER_CALL_S = 0.01
"""At most, for each call there is; one takes less than a millisecond."""
LEAST_S = 5.0
MOST_S = 60.0


def longest_goodbyes_s(call_count: int) -> float:
    """``LEAST_S`` to ``MOST_S``: how long the goodbyes of so many calls take at most."""
    return min(LEAST_S + PER_CALL_S * call_count, MOST_S)


async def say_goodbyes(words: Iterable[Callable[[], object]], call_count: Callable[[], int]) -> None:
    """Calls each of ``words``, which end what runs, and returns when no call is left (``call_count``), none ends any
    more, or ``longest_goodbyes_s`` have passed. Every word is said in any case."""
    left = list(words)
    left.reverse()
    now = asyncio.get_running_loop().time
    open_count = call_count()
    ends_at = now() + longest_goodbyes_s(max(open_count, len(left)))
    still_count = 0
    while (left or open_count) and still_count < PATIENT_TICK_COUNT and now() < ends_at:
        for _ in range(min(SLICE_COUNT, len(left))):
            left.pop()()
        await asyncio.sleep(TICK_S)
        before, open_count = open_count, call_count()
        still_count = still_count + 1 if open_count == before and not left else 0
    while left:
        left.pop()()

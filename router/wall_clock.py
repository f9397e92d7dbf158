"""The time of day, for what outlives its process: when a resume token ends, on whichever router it is shown.

Everything else in the router goes by the loop's time. Passed in as ``Now``, so that tests set it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Now = Callable[[], float]
"""Seconds since 1970, UTC."""


def wall_clock() -> float:
    return time.time()

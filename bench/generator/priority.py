"""The generator's priority: it shares a machine with what it measures, and has to send and stamp on time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

GENERATOR_NICENESS = -10


@contextlib.contextmanager
def ahead_of_the_servers() -> Iterator[int]:
    """Runs this process before others that want its core, where that is allowed; yields its niceness.

    For the time of a load only, and while nothing is started: what is started inherits it. Where it is not allowed
    the generator stays where it is, and its lag tells.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, min(before, GENERATOR_NICENESS))
    try:
        yield os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)

"""How many calls of one kind may be open at once: more are refused with a reason, before gRPC would without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import too_many_calls

ROOM_S = 1.0
"""When a caller may ask again who came while as many calls ran as may."""


class CallPlaces:
    """One per kind of call and server."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.taken_count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A place for the length of the block. Raises QUEUE_FULL."""
        if self.taken_count >= self._most:
            raise too_many_calls(self.taken_count, self._most, ROOM_S)
        self.taken_count += 1
        try:
            yield
        finally:
            self.taken_count -= 1

"""The file of API keys, followed: a key that is added, replaced or taken out counts for the next call, without a
restart. Calls that run go on.

The file is looked at about once a second, in a thread: no call waits for a disk. What cannot be used changes nothing
and is told once, until the file changes again.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from pathlib import Path

from router.callers import ApiKeys, ApiKeysError

LOOK_EVERY_S = 1.0
MAX_READ_COUNT = 10
"""So often it is read at the start while it is being written."""

logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int, int]


class KeyFile:
    """One file of keys. ``keys``: as it was last usable."""

    def __init__(self, path: Path) -> None:
        """Reads it. Raises ``ApiKeysError``."""
        self.path = path
        for _ in range(MAX_READ_COUNT):
            self._read = self._seen = _stamp(path)  # BEFORE it is read
            keys = self._whole(self._read)
            if keys is not None:
                self.keys = keys
                return
        raise ApiKeysError(f"{path} is being written; start again when it is done")

    def __repr__(self) -> str:
        return f"<KeyFile {self.path} {self.keys!r}>"

    def look(self) -> ApiKeys | None:
        """The keys, if the file changed since it was read, and rests since the last look and while it is read: half a
        file may be a good one with fewer keys. Raises ``ApiKeysError`` once for each change; ``keys`` are then the
        old ones."""
        seen, self._seen = _stamp(self.path), self._seen
        if seen != self._seen:
            self._seen = seen
            return None
        if seen == self._read:
            return None
        before, self._read = self._read, seen  # BEFORE it is read: what cannot be used is told once
        keys = self._whole(seen)
        if keys is None:
            self._read = before
            return None
        self.keys = keys
        return keys

    def _whole(self, stamp: _Stamp | None) -> ApiKeys | None:
        """None: a writer came in between, and what was read, good or bad, may be half of it. Raises
        ``ApiKeysError``."""
        try:
            keys = ApiKeys.load(self.path)
        except ApiKeysError:
            if _stamp(self.path) == stamp:
                raise
            return None
        return keys if _stamp(self.path) == stamp else None

    async def follow(self, take: Callable[[ApiKeys], None]) -> None:
        """Looks until cancelled, and has every new set taken, on this loop."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                keys = await asyncio.to_thread(self.look)
                if keys is not None:
                    take(keys)
                    logger.info("API keys read again: %r", keys)
            except ApiKeysError as error:
                logger.warning("the API keys stay as they were (%r): %s", self.keys, error)
            except Exception as error:
                # A key that is taken out must count tomorrow, too. Where it came from, not its text: that may quote.
                where = "".join(traceback.format_tb(error.__traceback__))
                logger.error("the API keys were not followed this time: %s at\n%s", type(error).__name__, where)


def _stamp(path: Path) -> _Stamp | None:
    """Changes with every write and replacement; the change time also where a copy keeps the time of writing. None: no
    such file, or none that we may look at, which reading it puts into words."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

"""The last so many ids of something: tickets that were used, legs that were given up.

Bounded: the oldest are forgotten. Size the bound above what can matter at once: tickets decoded within a lease, legs
given up while their prefill is still under way.
"""

from __future__ import annotations


class RecentIds:
    """Raises ``ValueError`` for a bound below 1."""

    def __init__(self, max_count: int) -> None:
        if max_count < 1:
            raise ValueError(f"max_count is {max_count}; remember at least 1")
        self.max_count = max_count
        self._ids: dict[str, None] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, an_id: str) -> bool:
        return an_id in self._ids

    def add(self, an_id: str) -> None:
        self._ids[an_id] = None
        if len(self._ids) > self.max_count:
            del self._ids[next(iter(self._ids))]

"""The samples of one request, as admission and placement see them: n answers, one door.

Owns how many places the samples have together and which are spoken for but not taken. All are counted when sample 0
is admitted, so that n answers need the room of n: the call has n places until ``close``, and sample 0's decode worker
keeps blocks and running slots for all of them. A sample that starts takes its share from sample 0's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class LeadPlace(Protocol):
    """Sample 0's place while it has one."""

    @property
    def decode_worker_id(self) -> str: ...

    def give_share(self) -> None:
        """What is kept for one more sample is kept no longer: that sample keeps it now."""


class SampleGroup:
    """One per request with several samples. ``close`` when nothing of any of them is left."""

    def __init__(self, sample_count: int, give_back: Callable[[int], None]) -> None:
        """``give_back`` is told how many places are free again."""
        if sample_count < 2:
            raise ValueError(f"sample_count is {sample_count}; one sample needs no group")
        self.sample_count = sample_count
        self._give_back = give_back
        # The mutable state: whether the places are counted and which sample asks for all of them, which
        # samples found theirs, and sample 0's place.
        self.is_counted = False
        self._asking: int | None = None
        self._started: set[int] = {0}
        self.lead: LeadPlace | None = None

    def __repr__(self) -> str:
        return f"<SampleGroup [{len(self._started)} of {self.sample_count} started]>"

    @property
    def kept_count(self) -> int:
        """Samples whose room sample 0's place keeps: its own, and those that have not started."""
        return 1 + self.sample_count - len(self._started)

    def asks(self, sample_index: int) -> None:
        """This sample comes to the door. The first to come asks for the places of all: sample 0, but where a call
        goes on with answers of which that one had ended."""
        if self._asking is None:
            self._asking = sample_index

    def asks_for_all(self, sample_index: int) -> bool:
        """Whether this sample's turn is that of all of them."""
        return not self.is_counted and self._asking in (None, sample_index)

    def count(self) -> int:
        """Places to count now: all of them, the first time."""
        if self.is_counted:
            return 0
        self.is_counted = True
        return self.sample_count

    def keeps_room_on(self, worker_id: str, sample_index: int) -> bool:
        """Whether room for this sample is kept on this worker."""
        return sample_index not in self._started and self.lead is not None and self.lead.decode_worker_id == worker_id

    def started(self, sample_index: int) -> None:
        """The sample has a place of its own. Idempotent: a retry takes nothing from sample 0."""
        if sample_index not in self._started:
            self._started.add(sample_index)
            if self.lead is not None:
                self.lead.give_share()

    def close(self) -> None:
        """All places are given back. Idempotent."""
        if self.is_counted:
            self.is_counted = False
            self._give_back(self.sample_count)


@dataclass(frozen=True, slots=True)
class Seat:
    """One sample among its group. The others follow sample 0: they start once its KV is in place, on the worker that
    has it."""

    group: SampleGroup
    sample_index: int
    near: str = ""
    """Id of the worker whose cache has the prompt; empty for sample 0."""
    on_adopted: Callable[[str], None] = lambda worker_id: None
    """Told the decode worker's id when the KV is in place there."""

    @property
    def is_lead(self) -> bool:
        return self.sample_index == 0

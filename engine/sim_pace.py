"""How long the steps of a simulated engine really take: noise, and neighbours that share the machine.

Owns the arithmetic of time, not the clock: callers pass ``now``. A ``Row`` is a few steps that an engine computes one
after another; their works are fixed when it begins, their ends move whenever a neighbour begins or rests. Pure.

    speed of an engine = product over neighbours in a step of (1 - share lost to that neighbour)

The share is measured for one neighbour; for more than one the product is our extrapolation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

RESOLUTION_S = 2e-9
"""A timer may fire the loop's resolution early: what ends within it has ended."""

ShareLost = Callable[[bool, bool], float]
"""(is_prefill, neighbour_is_prefill) -> share of its speed that an engine loses, 0 or more and below 1."""
Ratio = Callable[[str], float]
"""Kind of step ("prefill", "decode" or "mixed") -> drawn ratio of its time to the model's."""


class Row:
    """Steps under way. ``works_s``: seconds of each at full speed."""

    __slots__ = ("_done_s", "_ends", "_since", "_speed", "_work_ends")

    def __init__(self, now: float, works_s: Sequence[float], speed: float) -> None:
        self._work_ends = list(accumulate(works_s))
        self._ends: list[float] = []
        self._done_s = 0.0
        self._since = now
        self._speed = speed

    def __len__(self) -> int:
        return len(self._work_ends)

    def end_at(self, index: int) -> float:
        """When the step ends, or ended, if nothing changes any more."""
        if index < len(self._ends):
            return self._ends[index]
        return self._since + (self._work_ends[index] - self._done_s) / self._speed

    def under_way(self, now: float) -> int:
        """The step that is being computed; the last one where all are over."""
        for index in range(len(self._ends), len(self)):
            if self.end_at(index) > now + RESOLUTION_S:
                return index
        return len(self) - 1

    def retime(self, now: float, speed: float) -> None:
        """From now on it goes at another speed; what has ended has ended."""
        for index in range(len(self._ends), len(self)):
            if (end := self.end_at(index)) > now + RESOLUTION_S:
                break
            self._ends.append(end)
        self._done_s += (now - self._since) * self._speed
        self._since, self._speed = now, speed


@dataclass(eq=False, slots=True)
class Core:
    """What one engine computes on. ``on_speed`` is told that its speed has changed."""

    machine: Machine
    on_speed: Callable[[], None]
    stepping: bool | None = None
    """None at rest; otherwise whether the step is of prompts."""

    def begin(self, *, is_prefill: bool) -> None:
        self._set(is_prefill)

    def rest(self) -> None:
        self._set(None)

    def speed(self) -> float:
        """Raises ``AssertionError`` at rest."""
        assert self.stepping is not None
        speed = 1.0
        for other in self.machine.cores:
            if other is not self and other.stepping is not None:
                speed *= 1.0 - self.machine.share_lost(self.stepping, other.stepping)
        return speed

    def _set(self, stepping: bool | None) -> None:
        if stepping is self.stepping:
            return
        self.stepping = stepping
        for other in self.machine.cores:
            if other is not self and other.stepping is not None:
                other.on_speed()


class Machine:
    """Engines that slow each other down while they compute."""

    def __init__(self, share_lost: ShareLost = lambda _own, _others: 0.0) -> None:
        self.share_lost = share_lost
        self.cores: list[Core] = []

    def core(self, on_speed: Callable[[], None]) -> Core:
        core = Core(self, on_speed)
        self.cores.append(core)
        return core

    def leave(self, core: Core) -> None:
        """Idempotent."""
        if core in self.cores:
            core.rest()
            self.cores.remove(core)


@dataclass(eq=False, slots=True, kw_only=True)
class Pace:
    """What makes a simulated engine keep a real one's time; without one its steps take what the cost model says.

    With a pace the engine also does what vLLM does under Baton's connector: pulls happen at the beginning of a step,
    one after another, and every running request waits for them (docs/decisions/0013); a waiting request is taken in
    only where the step's budget of tokens reaches it.
    """

    machine: Machine
    ratio: Ratio = lambda _kind: 1.0
    pulled_step_s: Callable[[int], float] = lambda _pull_count: 0.0
    """What a step takes longer that pulled, beside the pulls."""
    look_ahead_step_count: int = 32
    """Steps of decoding that are computed at once while nothing comes or ends; what they say reaches the router
    together, and each token's own time whoever listens (``on_tokens``). 1: every step by itself."""
    is_exact: Callable[[str], bool] = lambda _leg_id: False
    """Whether the tokens of a leg must reach the router one by one: its caller may leave at any moment."""
    on_tokens: Callable[[str, int, Sequence[float], int], None] = lambda _leg, _index, _ends_at, _sequence_count: None
    """(leg, index in the answer of its first new token, end of the step of each, sequences of those steps), of every
    token, in order of a leg."""

    def __post_init__(self) -> None:
        if self.look_ahead_step_count < 1:
            raise ValueError(f"look_ahead_step_count is {self.look_ahead_step_count}; it must be at least 1")

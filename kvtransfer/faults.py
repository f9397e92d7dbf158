"""Which operation of a transfer goes wrong, and how: drawn by a seeded generator, counted, and nothing else.

For tests and soaks only. A plan comes from an engine's configuration and from nowhere else: no message of any
protocol has a field for it. Pure: whoever asks performs the fault (``connector_faults.py`` around NIXL,
``simulated.py`` for simulated engines).
"""

from __future__ import annotations

import enum
import math
import random
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any


class Operation(enum.Enum):
    """What a transfer library is asked for."""

    REGISTER = "register"
    """Memory made known to the library, once, when an engine starts."""
    HANDSHAKE = "handshake"
    """First contact with a peer."""
    POST = "post"
    POLL = "poll"
    NOTIFY = "notify"
    RELEASE = "release"
    """Giving the handle of a transfer back."""


class Fault(enum.Enum):
    FAIL = "fail"
    """The error that the library itself would give."""
    TIME_OUT = "time_out"
    """Does not complete for ``stuck_s``, far beyond every deadline, and cannot be taken back meanwhile."""
    HANG = "hang"
    """Blocks its caller for ``hang_s``, then goes on as if nothing had been."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """What goes wrong. Raises ``ValueError`` naming the key and the fix.

    ``allow_faults`` must be given as well, so that no plan is left in a deployment by accident.
    """

    allow_faults: bool = False
    probability: float
    """Of a fault, each time one of ``operations`` is asked for."""
    operations: Collection[str] = tuple(each.value for each in Operation if each is not Operation.REGISTER)
    kinds: Collection[str] = tuple(each.value for each in Fault)
    """Drawn from evenly."""
    seed: int = 0
    hang_s: float = 0.05
    stuck_s: float = 20.0

    def __post_init__(self) -> None:
        if self.allow_faults is not True:
            raise ValueError(
                "transfer_faults.allow_faults: is not true; faults are for tests, so say allow_faults = true beside "
                "them, or take the table out"
            )
        _within("probability", self.probability, 0, 1)
        _within("hang_s", self.hang_s, 0, 10)
        _within("stuck_s", self.stuck_s, 0, 600)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"transfer_faults.seed: is {self.seed!r}; give a whole number")
        for key, kind in (("operations", Operation), ("kinds", Fault)):
            object.__setattr__(self, key, _names(key, getattr(self, key), [each.value for each in kind]))

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> FaultPlan:
        """The plan that a table of a configuration file describes."""
        known = [each.name for each in fields(cls)]
        for key in table:
            if key not in known:
                raise ValueError(f"transfer_faults.{key}: is not known; known here: {', '.join(known)}")
        if "probability" not in table:
            raise ValueError("transfer_faults.probability: is missing; give one between 0 and 1")
        return cls(**table)

    def __str__(self) -> str:
        return (
            f"{', '.join(self.operations)} at {self.probability:g} each ({', '.join(self.kinds)}), seed {self.seed}"
        )


class FaultDice:
    """Draws by a plan, and counts. Each operation has a sequence of its own, so that the order in which two of them
    come does not change what either gets. May be asked from several threads."""

    def __init__(self, plan: FaultPlan) -> None:
        self.asked: Counter[Operation] = Counter()
        self.drawn: Counter[tuple[Operation, Fault]] = Counter()
        self._lock = threading.Lock()
        self.follow(plan)

    def follow(self, plan: FaultPlan) -> None:
        """Draws by this plan from now on, from its beginning. What was counted stays counted."""
        generators = {
            Operation(name): random.Random(f"{plan.seed}/{name}")  # noqa: S311 reproducible misfortune
            for name in plan.operations
        }
        with self._lock:
            self.plan = plan
            self._kinds = tuple(Fault(name) for name in plan.kinds)
            self._generators = generators

    def draw(self, operation: Operation) -> Fault | None:
        """The fault that strikes this time, if one does."""
        with self._lock:
            self.asked[operation] += 1
            generator = self._generators.get(operation)
            if generator is None or generator.random() >= self.plan.probability:
                return None
            fault = generator.choice(self._kinds)
            self.drawn[operation, fault] += 1
            return fault

    def counts(self) -> dict[str, int]:
        """Faults so far, as ``post.fail``; and how often each operation was asked for, as ``post``."""
        with self._lock:
            asked = {operation.value: count for operation, count in self.asked.items()}
            return asked | {f"{each.value}.{fault.value}": count for (each, fault), count in self.drawn.items()}


def _within(key: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"transfer_faults.{key}: is {value!r}; give a number")
    if not low <= value <= high:
        raise ValueError(f"transfer_faults.{key}: is {value:g}; give one between {low:g} and {high:g}")


def _names(key: str, value: object, known: list[str]) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not value:
        raise ValueError(f"transfer_faults.{key}: is {value!r}; give a list of {', '.join(known)}")
    for name in value:
        if name not in known:
            raise ValueError(f"transfer_faults.{key}: has {name!r}; known here: {', '.join(known)}")
    return tuple(value)

"""What the session's fixture hands to the tests of the service."""

from __future__ import annotations

from dataclasses import dataclass

from bench.fleet_under_test import Books, FleetUnderTest
from bench.questions import Questions


@dataclass(frozen=True)
class Service:
    """The running fleet, what it held when it had nothing to do, and questions with known answers."""

    fleet: FleetUnderTest
    baseline: dict[str, Books]
    questions: Questions

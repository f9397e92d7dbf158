"""A sample of the interleavings that ``make soak`` runs by the thousand, and proof that they can fail."""

from __future__ import annotations

import pytest

from baton.leg import Stepped
from bench.simulated_deaths import run_interleavings
from engine.sim import SimEngine

SEED = 1_000_000


def test_no_promise_is_broken_whatever_befalls_the_fleet() -> None:
    report = run_interleavings(250, SEED, lambda _: None)
    assert not report.failures, report.failures
    assert sum(row["scenarios"] for row in report.rows) == 250
    assert all(row["requests"] for row in report.rows)


def test_a_token_said_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = SimEngine.decode

    async def stuttering(self: SimEngine, job: object):  # type: ignore[no-untyped-def]
        async for event in decode(self, job):  # type: ignore[arg-type]
            yield event
            if isinstance(event, Stepped) and len(event.token_ids) == 1 and event.token_ids[0] % 7 == 0:
                yield event

    monkeypatch.setattr(SimEngine, "decode", stuttering)
    assert run_interleavings(30, SEED, lambda _: None).failures

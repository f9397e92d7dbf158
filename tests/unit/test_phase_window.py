"""The recent past in constant memory."""

from __future__ import annotations

from baton.timeline import Phase, PhaseDurations
from router.phase_window import NAMES, PhaseWindow


def durations(prefill_s: float) -> PhaseDurations:
    seconds = dict.fromkeys(Phase, 0.0) | {Phase.PREFILL: prefill_s}
    return PhaseDurations(seconds, prefill_s, prefill_s / 2)


def test_percentiles_are_of_the_window_and_in_the_documented_order() -> None:
    window = PhaseWindow()
    for n in range(101):
        window.finished(durations(n / 100), now=0.0)
    statistics = window.statistics(now=1.0)
    assert [s.name for s in statistics] == list(NAMES)
    prefill = next(s for s in statistics if s.name == "prefill")
    assert (prefill.sample_count, prefill.p50_s, prefill.p95_s) == (101, 0.5, 0.95)
    assert next(s for s in statistics if s.name == "time_to_first_token").p50_s == 0.25


def test_old_samples_and_samples_beyond_the_bound_are_forgotten() -> None:
    window = PhaseWindow(max_sample_count=10, max_age_s=60.0)
    for n in range(25):
        window.gap(float(n), now=float(n))
    gaps = next(s for s in window.statistics(now=24.0) if s.name == "inter_token_latency")
    assert (gaps.sample_count, gaps.p50_s) == (10, 19.5)
    assert all(s.sample_count == 0 and s.p95_s == 0.0 for s in window.statistics(now=1000.0))

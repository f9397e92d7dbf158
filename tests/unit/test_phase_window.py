"""The recent past in constant memory."""

from __future__ import annotations

from baton.request import Handover, PlacementMode
from baton.timeline import Phase, PhaseDurations
from baton.transfer_report import TransferReport
from router.answering import PhaseReport
from router.phase_window import NAMES, PhaseWindow, TransferStatistics


def report(
    prefill_s: float = 0.0, *, transfer_s: float = 0.0, worker: str = "d", transfer: TransferReport | None = None
) -> PhaseReport:
    seconds = dict.fromkeys(Phase, 0.0) | {Phase.PREFILL: prefill_s, Phase.KV_TRANSFER: transfer_s}
    durations = PhaseDurations(seconds, prefill_s + transfer_s, prefill_s / 2)
    return PhaseReport(
        durations, transfer or TransferReport(), Handover.NONE, "p", worker, 1, PlacementMode.SPLIT, "split"
    )


def test_percentiles_are_of_the_window_and_in_the_documented_order() -> None:
    window = PhaseWindow()
    for n in range(101):
        window.finished(report(n / 100), 10, now=0.0)
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


def test_transfers_are_told_per_worker_as_bandwidth_and_share_computed_again_and_grow_old() -> None:
    window = PhaseWindow(max_sample_count=2, max_age_s=60.0)
    for _ in range(3):  # the first is pushed out
        window.finished(report(transfer_s=0.5, worker="d0", transfer=TransferReport(kv_bytes=1000)), 40, now=0.0)
    window.finished(report(worker="d1", transfer=TransferReport(recomputed_token_count=10)), 40, now=0.0)
    window.finished(report(worker="d1"), 60, now=1.0)
    window.finished(report(worker=""), 60, now=1.0)  # prefill alone: nobody decoded
    assert window.transfers(now=2.0) == {
        "d0": TransferStatistics(kv_bytes_per_s=2000.0, recomputed_share=0.0),
        "d1": TransferStatistics(kv_bytes_per_s=0.0, recomputed_share=0.1),
    }
    assert window.transfers(now=60.5) == {"d1": TransferStatistics()}
    assert window.transfers(now=1000.0) == {}

"""The account of a request's transfer: added up over attempts, and told to Prometheus number by number."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from baton.leg import KvAdopted, RecomputeReason
from baton.metrics import Outcome, RouterMetrics
from baton.timeline import PHASES, PhaseDurations
from baton.transfer_report import TransferReport

PULLED = KvAdopted(0.1, 0.2, 0.3, 1000, 7, 0, 0.0, 0, pull_count=1, post_s=0.01, wire_s=0.02, verify_s=0.03)
FAILED = KvAdopted(
    0.1, 0.2, 0.3, 10, 2, 40, 0.0, 0,
    recompute_reason=RecomputeReason.STALE, pull_count=2, post_s=1.0, wire_s=2.0, verify_s=4.0,
)  # fmt: skip
DURATIONS = PhaseDurations(dict.fromkeys(PHASES, 0.0), 0.0, None)


def test_attempts_add_up_and_a_later_success_does_not_hide_why_one_failed() -> None:
    both = TransferReport(1010, 9, 3, 1.01, 2.02, 4.03, 40, RecomputeReason.STALE)
    assert TransferReport().plus(FAILED).plus(PULLED) == both
    assert TransferReport().plus(PULLED).plus(FAILED).recompute_reason is RecomputeReason.STALE


def test_the_bandwidth_is_of_the_wire_and_absent_where_nothing_moved() -> None:
    assert TransferReport().plus(PULLED).wire_bytes_per_s == 50_000
    assert TransferReport().wire_bytes_per_s is None


def test_prometheus_is_told_each_number_of_a_request_that_pulled_and_none_of_one_that_did_not() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.request_ended(Outcome.OK, DURATIONS, transfer=TransferReport())
    metrics.request_ended(Outcome.OK, DURATIONS, transfer=TransferReport().plus(FAILED))
    sample = registry.get_sample_value
    for part, seconds in (("post", 1.0), ("wire", 2.0), ("verify", 4.0)):
        assert sample("baton_kv_transfer_part_seconds_sum", {"part": part}) == seconds
        assert sample("baton_kv_transfer_part_seconds_count", {"part": part}) == 1
    assert sample("baton_kv_pulls_total") == 2
    assert sample("baton_kv_descriptors_total") == 2
    assert sample("baton_kv_transfer_bytes_total") == 10
    assert sample("baton_recomputed_tokens_total") == 40
    assert {reason: sample("baton_recomputes_total", {"reason": reason.value}) for reason in RecomputeReason} == {
        reason: float(reason is RecomputeReason.STALE) for reason in RecomputeReason
    }

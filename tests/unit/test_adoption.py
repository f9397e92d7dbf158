"""How a decode's beginning is accounted for, whatever brought the KV."""

from __future__ import annotations

from dataclasses import dataclass

from baton.leg import KvAdopted, RecomputeReason
from engine.adoption import Pull, StartTimes, kv_adopted
from engine.protocol import DecodeJob

TIMES = StartTimes(arrived_at=10.0, scheduled_at=10.5, first_token_at=10.6)


@dataclass(frozen=True)
class Record:
    is_ok: bool = True
    started_at: float = 10.1
    in_place_at: float = 10.3
    transfer_bytes: int = 5000
    descriptor_count: int = 30
    block_count: int = 3
    post_s: float = 0.01
    wire_s: float = 0.15
    verify_s: float = 0.02
    reason: str = ""


def adopted(token_count: int, *, pulls: bool, cached: int = 0, pull: Pull | None = None) -> KvAdopted:
    job = DecodeJob("leg", tuple(range(token_count)), pull={"some": "params"} if pulls else None)
    return kv_adopted(
        job, TIMES, told_at=10.7, cached_token_count=cached, block_token_count=128, pull=pull, is_with_tokens=True
    )


def test_without_a_pull_the_time_is_waiting_and_computing_the_prompt() -> None:
    local = adopted(300, pulls=False, cached=256)
    assert (round(local.wait_s, 6), round(local.prefill_s, 6)) == (0.5, 0.1)
    assert (local.transfer_s, local.transfer_bytes, local.first_step_s) == (0, 0, 0)
    assert local.cached_token_count == 256


def test_a_pull_divides_the_time_into_wait_transfer_wait_and_step() -> None:
    pulled = adopted(301, pulls=True, cached=300, pull=Record())
    parts = (pulled.wait_s, pulled.transfer_s, pulled.decode_wait_s, pulled.first_step_s)
    assert [round(part, 6) for part in parts] == [0.1, 0.2, 0.2, 0.2]
    assert round(sum(parts), 6) == 0.7  # from arrival to the telling
    assert (pulled.transfer_bytes, pulled.descriptor_count) == (5000, 30)
    assert (pulled.recomputed_token_count, pulled.cached_token_count) == (0, 0)


def test_blocks_that_were_not_missing_count_as_cached_here() -> None:
    assert adopted(301, pulls=True, cached=300, pull=Record(block_count=1)).cached_token_count == 256
    assert adopted(257, pulls=True, cached=256, pull=None).cached_token_count == 256


def test_a_failed_pull_says_how_much_was_computed_here_instead() -> None:
    failed = adopted(301, pulls=True, cached=128, pull=Record(is_ok=False, reason="failed"))
    assert failed.recomputed_token_count == 300 - 128
    assert failed.cached_token_count == 128
    assert (failed.transfer_bytes, failed.descriptor_count) == (0, 0)


def test_the_account_of_a_transfer_is_the_pulls_own() -> None:
    pulled = adopted(301, pulls=True, cached=300, pull=Record())
    assert (pulled.post_s, pulled.wire_s, pulled.verify_s) == (0.01, 0.15, 0.02)
    assert (pulled.pull_count, pulled.recompute_reason) == (1, None)
    assert adopted(257, pulls=True, cached=256, pull=None).pull_count == 0


def test_a_pull_that_is_not_used_says_why() -> None:
    for reason in RecomputeReason:
        failed = adopted(301, pulls=True, pull=Record(is_ok=False, reason=reason.value))
        assert (failed.recompute_reason, failed.pull_count) == (reason, 1)

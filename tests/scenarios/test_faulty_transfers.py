"""Every operation of a transfer goes wrong, and every answer stays right: the soak's scenarios, a sample of each."""

from __future__ import annotations

import pytest

from baton.leg import RecomputeReason
from baton.testing import in_virtual_time
from bench.simulated_faults import PROBABILITIES, run_faults, run_scenario
from bench.virtual_cluster import Heard, virtual_cluster
from kvtransfer.faults import FaultPlan
from kvtransfer.simulated import Damage, Misfortune, SimulatedPull

SEED = 5_000
HASTY = {"pull_timeout_s": 2.0}


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_answers_stay_exact_and_nothing_is_left_under_faults(probability: float) -> None:
    report = run_faults(320, SEED, lambda _: None, (probability,))
    assert report.failures == []
    assert "complete" in report.rows[0]["outcomes"]
    assert report.rows[0]["KV recomputed because"] != "none"


def test_the_same_seed_is_the_same_scenario() -> None:
    assert run_scenario(SEED, 1 / 4) == run_scenario(SEED, 1 / 4)


def test_without_the_proof_that_what_came_is_what_was_held_these_scenarios_would_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SimulatedPull, "_verify", lambda *_: None)
    report = run_faults(320, SEED, lambda _: None, (1 / 4,))
    assert any("right answer" in failure.what for failure in report.failures)


async def heard_under(plan: FaultPlan, damage: Damage | None = None) -> Heard:
    """One request, alone, of which every pull meets the fault; and then the books balance."""
    misfortune = Misfortune(plan)
    if damage is not None:
        misfortune.damage = lambda: damage  # type: ignore[method-assign]
    async with virtual_cluster(1, 2, sim=HASTY, rest_s=30.0, misfortune=misfortune) as cluster:
        return await cluster.exact(cluster.request(100, 8))


def always(operation: str, kind: str) -> FaultPlan:
    return FaultPlan(allow_faults=True, probability=1.0, operations=[operation], kinds=[kind])


NO_FAULT = FaultPlan(allow_faults=True, probability=0.0)


@pytest.mark.parametrize("operation", ["handshake", "post", "poll"])
@in_virtual_time
async def test_a_failed_pull_is_recomputed_within_its_attempt(operation: str) -> None:
    heard = await heard_under(always(operation, "fail"))
    assert heard.report.attempt_count == 1
    assert heard.report.transfer.recompute_reason is RecomputeReason.FAILED


@in_virtual_time
async def test_a_first_contact_that_does_not_end_is_taken_back_and_recomputed() -> None:
    heard = await heard_under(always("handshake", "time_out"))
    assert heard.report.attempt_count == 1
    assert heard.report.transfer.recompute_reason is RecomputeReason.TIMED_OUT


@pytest.mark.parametrize("operation", ["post", "poll", "release"])
@in_virtual_time
async def test_a_read_that_does_not_end_is_given_up_and_the_request_goes_on_without(
    operation: str,
) -> None:
    heard = await heard_under(always(operation, "time_out"))
    assert heard.report.attempt_count == 2
    assert heard.report.placement_reason == "recompute"


@pytest.mark.parametrize("operation", ["handshake", "post", "poll", "notify", "release"])
@in_virtual_time
async def test_what_only_hangs_costs_time_and_nothing_else(operation: str) -> None:
    heard = await heard_under(always(operation, "hang"))
    assert heard.report.attempt_count == 1
    assert heard.report.transfer.recompute_reason is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Damage.STALE, RecomputeReason.STALE), (Damage.CORRUPT, RecomputeReason.CORRUPT)],
)
@in_virtual_time
async def test_damaged_kv_is_recomputed_and_named(damage: Damage, reason: RecomputeReason) -> None:
    heard = await heard_under(NO_FAULT, damage)
    assert heard.report.transfer.recompute_reason is reason


@in_virtual_time
async def test_the_blocks_of_a_pull_given_up_are_nobodys_until_its_read_is_over() -> None:
    misfortune = Misfortune(always("post", "time_out"))
    async with virtual_cluster(1, 1, sim=HASTY, rest_s=30.0, misfortune=misfortune) as cluster:
        await cluster.exact(cluster.request(100, 8))
        load = cluster.processes["decode-0"].engine.load()
        assert load.quarantined_pull_count == 1
        assert load.used_block_count >= 7, "a hundred tokens and the answer, sixteen a block"

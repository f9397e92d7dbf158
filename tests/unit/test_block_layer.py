"""The block layer end to end, without a model: a sample of the soak's section ``validity``."""

from __future__ import annotations

from bench.validity_blocks import EXPECTED_REASONS, KINDS, BlockLayer, Counts, run_blocks


def test_every_kind_of_damage_is_found_and_nothing_else() -> None:
    counts = run_blocks(damaged_count=len(KINDS) * 40, clean_count=1500, seed=3)
    assert not counts.missed
    assert not counts.false_alarms
    for (kind, reason), count in counts.reasons.items():
        assert reason in EXPECTED_REASONS[kind]
        assert count == 40


def test_damage_would_have_done_harm() -> None:
    """A trial that changes nothing proves nothing: all but the wrong record put other bytes where they do not belong,
    and of the stale ones those that were not read in full before."""
    counts = run_blocks(damaged_count=len(KINDS) * 20, clean_count=0, seed=4)
    for kind in KINDS[:4]:
        assert counts.harmful[kind] == 20
    assert counts.harmful["stale"] >= 15
    assert counts.harmful["expired"] == 20


def test_nothing_stays_held_after_a_trial() -> None:
    layer = BlockLayer(seed=5)
    counts = Counts()
    for kind in (*KINDS, None):
        layer.trial(counts, kind)
        assert layer.keeper.held_count == 0
    layer.close()

"""The page of the soak section ``validity``: written whatever was found, and it says so when nothing was proven."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from bench import evidence, validity
from bench.validity_engines import ROUND, Moment, StopCounts, moments
from bench.validity_nixl import NixlCounts


def stops(*, wrong: int = 0, late: int = 0, reason: str = "stale", notices: int = 0) -> StopCounts:
    counts = StopCounts(trial_count=16, stop_count=1, reused_count=16, late_count=late, wrong_count=wrong)
    counts.reasons[reason] += 16
    counts.by_moment[Moment.QUEUED.value, reason] += 16
    counts.wrong_by_moment[Moment.QUEUED.value] += wrong
    counts.expired_notice_count = notices
    return counts


async def judged(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, stopped: StopCounts, control: StopCounts
) -> tuple[bool, str, dict[str, Any]]:
    """The section with a small block layer, and everything that needs NIXL or an engine made up."""
    nixl = NixlCounts(clean_count=1, race_count=9, race_overwritten_count=2, check_s=[0.0001])
    nixl.race_reasons["used"] += 9

    async def run_stops(*args: Any, **named: Any) -> tuple[StopCounts, StopCounts]:
        return stopped, control

    async def run_stock_stops(*args: Any, **named: Any) -> StopCounts:
        return stops(wrong=16, reason="used", notices=16)

    monkeypatch.setattr(validity, "run_nixl", lambda **_: nixl)
    monkeypatch.setattr(validity, "run_stops", run_stops)
    monkeypatch.setattr(validity, "run_stock_stops", run_stock_stops)
    monkeypatch.setattr(validity, "make_tiny_model", lambda folder: folder)
    monkeypatch.setattr(validity, "hash_gb_per_s", lambda: 10.0)
    monkeypatch.setattr(evidence, "write", functools.partial(evidence.write, folder=folder))
    parser = argparse.ArgumentParser()
    validity.add_options(parser)
    # A limit so short that the costs are left out.
    options = parser.parse_args(["--damaged", "14", "--clean", "50", "--validity-limit-s", "0"])
    is_kept = await validity.run(options)
    return is_kept, (folder / "validity.md").read_text(), json.loads((folder / "validity.json").read_text())


@pytest.mark.asyncio
async def test_trials_that_were_late_and_refused_beside_controls_that_were_wrong_keep_the_promise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    is_kept, page, twin = await judged(
        monkeypatch, tmp_path, stopped=stops(late=16), control=stops(wrong=16, reason="used")
    )
    assert is_kept
    assert "PROVE NOTHING" not in page
    assert "16 pulls in 1 stops (500 were asked for: no time)" in page
    assert "costs was not measured this time" in page
    assert "'race_reasons': {'used': 9}" in str(twin)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("stopped", "control", "says"),
    [
        (stops(late=16), stops(reason="used"), "PROVE NOTHING for: checks taken out"),
        (stops(), stops(wrong=16, reason="used"), "PROVE NOTHING for: stopped engines"),
        (stops(late=16, wrong=1), stops(wrong=16, reason="used"), "BROKEN"),
        (stops(late=16, reason="corrupt"), stops(wrong=16, reason="used"), "BROKEN"),
    ],
    ids=["a control that is right", "no read after the reuse", "a wrong answer", "caught by the digests alone"],
)
async def test_what_proves_nothing_or_breaks_the_promise_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: StopCounts, control: StopCounts, says: str
) -> None:
    is_kept, page, _ = await judged(monkeypatch, tmp_path, stopped=stopped, control=control)
    assert not is_kept
    assert says in page


def test_every_moment_has_its_turn_within_the_default_number_of_stops() -> None:
    assert {moments(number) for number in range(32)} == set(Moment)
    assert moments(0) is ROUND[0]

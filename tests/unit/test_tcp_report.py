"""The TCP section says of a measurement what it says, and judges against the best of the raw streams."""

from __future__ import annotations

from typing import Any

from bench.tcp_pairs import STREAM
from bench.tcp_report import tcp_section


def readings(path: str, layout: str, elapsed_s: float, **rest: Any) -> list[dict[str, Any]]:
    record = {"record": "tcp read", "path": path, "layout": layout, "byte_count": 45 << 20, "elapsed_s": elapsed_s}
    return [{**record, **rest, "round": number} for number in range(8)]


def verdict_of(elapsed_s: float) -> str:
    streams = readings(STREAM, "small calls", 0.040) + readings(STREAM, "large calls", 0.020)
    ours = readings("baton", "adjacent", elapsed_s, wire_s=0.02)
    (row,) = [line for line in tcp_section([*streams, *ours], seed=1)[2].splitlines() if "Baton" in line]
    return row


def test_a_read_is_judged_by_the_fastest_raw_stream() -> None:
    assert "0.80 [0.80, 0.80]; goal ≥ 0.60: **surely met**" in verdict_of(0.025)
    assert "0.50 [0.50, 0.50]; goal ≥ 0.60: **missed**" in verdict_of(0.040)
    assert "| 1.00 [1.00, 1.00] |" in verdict_of(0.040)  # the read alone


def test_without_readings_there_is_no_section() -> None:
    assert tcp_section([{"record": "read"}, {"record": "tcp idle", "path": "baton", "cpu_share": {}}], seed=1) == []

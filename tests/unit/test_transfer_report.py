"""The transfer figures' page: ratios the right way round, goals judged by them, and a miss called a miss."""

from __future__ import annotations

from typing import Any

import pytest

from bench.transfer_report import render

MIB = 1 << 20
RUN: dict[str, Any] = {
    "record": "run",
    "is_quick": True,
    "seed": 1,
    "model": "tiny",
    "order": ["baton", "engine", "stock-pd"],
    "titles": {"baton": "Baton", "engine": "one engine", "stock-pd": "stock"},
    "machine": {
        "core_count": 2,
        "cpu_model": "a CPU",
        "memory_gib": 8,
        "kernel": "6",
        "commit": "c",
        "at": "now",
        "packages": {"nixl": "1"},
    },
}


def read(path: str, layout: str, elapsed_s: float, byte_count: int = 45 * MIB) -> dict[str, Any]:
    ours = {"wire_s": elapsed_s / 2, "verify_s": elapsed_s / 4} if path != "raw" else {}
    return {
        "record": "read",
        "path": path,
        "layout": layout,
        "byte_count": byte_count,
        "round": 0,
        "elapsed_s": elapsed_s,
        "descriptor_count": 30,
        **ours,
    }


def request(system: str, *, ttft_s: float, exposed_s: float | None, token_count: int = 2000) -> dict[str, Any]:
    """Two prefill steps of one second together, then decode steps of 20 ms, on another engine if there is one."""
    decode_pid, decode_from = (1, 1.0) if exposed_s is None else (2, 1.0 + exposed_s)
    steps = [
        {"pid": 1, "began_at": 0.0, "ended_at": 0.5, "token_count": token_count // 2},
        {"pid": 1, "began_at": 0.5, "ended_at": 1.0, "token_count": token_count // 2},
    ]
    for number in range(4):
        began_at = decode_from + 0.02 * number
        steps.append({"pid": decode_pid, "began_at": began_at, "ended_at": began_at + 0.02, "token_count": 1})
    return {
        "record": "request",
        "system": system,
        "block": 0,
        "prompt_token_count": token_count,
        "sent_at": 0.0,
        "token_at": [ttft_s, ttft_s + 0.03],
        "steps": steps,
        "ended_at": 5.0,
    }


def line_with(page: str, *words: str) -> str:
    (line,) = [line for line in page.splitlines() if all(word in line for word in words)]
    return line


def verdicts(page: str, size: str) -> list[str]:
    """The row of the goal: by the read, by asked to usable without digests and with them."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {size} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


RAW = [
    read("raw", size, s) for size, s in (("98304", 0.006), ("1048576", 0.004), ("memcpy", 0.003)) for _ in range(4)
]


def test_bandwidth_is_judged_against_the_best_raw_descriptor_size() -> None:
    page = render([RUN, *RAW, *[read("baton", "adjacent", 0.004) for _ in range(4)]])
    assert "1024 KiB" in line_with(page, "raw NIXL,", "KiB each")
    assert verdicts(page, "45.0 MiB")[2] == "1.00 [1.00, 1.00]; goal ≥ 0.85: **surely met**"


def test_each_meaning_of_bandwidth_has_a_verdict_of_its_own() -> None:
    ours = [read("baton", "adjacent", 0.008) for _ in range(4)]  # of it, the read: half
    without = [read("baton-without-digests", "adjacent", 0.0045) for _ in range(4)]
    page = render([RUN, *RAW, *ours, *without])
    assert verdicts(page, "45.0 MiB") == [
        "1.00 [1.00, 1.00]; goal ≥ 0.85: **surely met**",
        "0.89 [0.89, 0.89]; goal ≥ 0.85: **surely met**",
        "0.50 [0.50, 0.50]; goal ≥ 0.85: **missed**",
    ]
    assert line_with(page, "45.0 MiB, adjacent", "ms").endswith("| 1.78 [1.78, 1.78] |")


def test_less_than_the_goals_size_is_shown_without_a_verdict() -> None:
    small = [read(path, layout, 0.001, 3 * MIB) for path, layout in (("raw", "98304"), ("raw", "memcpy"))] * 4
    page = render([RUN, *small, *[read("baton", "adjacent", 0.002, 3 * MIB)] * 4])
    assert "goal" not in line_with(page, "Baton, adjacent")


def test_the_exposed_handoff_lies_between_two_engines_and_is_compared_with_both_forms_of_stock() -> None:
    requests = [request("baton", ttft_s=1.0, exposed_s=0.01) for _ in range(4)]
    requests += [request("stock-pd", ttft_s=1.2, exposed_s=0.02) for _ in range(4)]
    requests += [request("stock-pd-as-shipped", ttft_s=1.2, exposed_s=0.04) for _ in range(4)]
    requests += [request("engine", ttft_s=1.0, exposed_s=None) for _ in range(4)]
    page = render([RUN, *requests])
    tuned, as_shipped = "0.50 [0.50, 0.50]; goal ≤ 0.33: **missed**", "0.25 [0.25, 0.25]; goal ≤ 0.33: **surely met**"
    assert f"| 2000 tokens | 10.0 ms | 20.0 ms | {tuned} | 40.0 ms | {as_shipped} | 1.0%" in page
    assert "goal ≤ 1.05: **surely met**" in page
    assert "2000.0 /s | 2000.0 /s | 1.00 [1.00, 1.00]; goal ≥ 0.97: **surely met**" in page


@pytest.mark.parametrize(("worker_share", "said"), [(0.004, "met"), (0.015, "missed")])
def test_an_idle_worker_is_its_engine_and_the_process_that_owns_it(worker_share: float, said: str) -> None:
    processes = [
        {"pid": 1, "parent_pid": 0, "command": "python", "cpu_share": 0.5},
        {"pid": 2, "parent_pid": 1, "command": "python", "cpu_share": worker_share},
        {"pid": 3, "parent_pid": 2, "command": "VLLM::EngineCor", "cpu_share": 0.01},
    ]
    idle = {"record": "idle system", "system": "baton", "block": 0, "processes": processes}
    assert f"**{said}**" in line_with(render([RUN, idle]), "system: Baton")


def test_a_file_without_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no record of a run"):
        render([])

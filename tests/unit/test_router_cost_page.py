"""The words of the router's cost page follow from its figures: a run cannot leave a verdict of another run behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.router_cost_page import verdict, write_page


def stream_turns(
    router_us: float, send_us: float = 40.0, pace: str = "25 ms", others: float = 0.0
) -> list[dict[str, Any]]:
    return [
        {
            "system": system,
            "stream_count": 64,
            "pace": pace,
            "window_s": 2.0,
            "token_count": 5000,
            "message_count": 5000,
            "cpu_s": us * 5000 / 1e6,
            "others_share": others,
        }
        for system, us in (("send", send_us), ("relay", 70.0), ("router", router_us))
    ]


def request_turns(router_us: float, router_ttft_s: float, at_once: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "system": system,
            "output_token_count": 16,
            "at_once": at_once,
            "request_count": 100,
            "cpu_s": us * 100 / 1e6,
            "ttft_p50_s": ttft_s,
            "worker_p50_s": 0.00002,
        }
        for system, us, ttft_s in (("relay", 6000.0, 0.002), ("router", router_us, router_ttft_s))
    ]


@pytest.mark.parametrize(("router_us", "said"), [(52.0, "met"), (52.1, "MISSED")])
def test_natural_pace_is_judged_by_the_sending_floor_of_the_same_run(router_us: float, said: str) -> None:
    line = verdict(stream_turns(router_us), [])[2]
    assert f"{router_us:.1f} us a token, 1.30x" in line
    assert line.endswith(f"at most 1.3x sending: {said}.")


@pytest.mark.parametrize(("router_us", "said"), [(10.0, "met"), (10.1, "MISSED")])
def test_a_saturated_router_is_judged_by_microseconds(router_us: float, said: str) -> None:
    assert verdict(stream_turns(router_us, pace="saturated"), [])[2].endswith(f"at most 10 us: {said}.")


@pytest.mark.parametrize(("router_us", "said"), [(7500.0, "met"), (7501.0, "MISSED")])
def test_a_request_is_judged_by_the_bare_calls(router_us: float, said: str) -> None:
    assert f"at most 1.25x: {said}; " in verdict(stream_turns(50.0), request_turns(router_us, 0.0029))[3]


@pytest.mark.parametrize(
    ("ttft_s", "said"), [(0.0029, "to the bare calls met"), (0.0031, "to the bare calls MISSED")]
)
def test_what_is_added_to_the_first_token_is_told_over_both_floors(ttft_s: float, said: str) -> None:
    line = verdict(stream_turns(50.0), request_turns(7000.0, ttft_s))[3]
    assert f"{said}, to the worker MISSED" in line


def test_the_first_token_is_not_judged_where_requests_wait_for_each_other() -> None:
    assert "not asked under load" in verdict(stream_turns(50.0), request_turns(7000.0, 0.01, at_once=8))[3]


@pytest.mark.parametrize(("others", "said"), [(0.05, ": a quiet machine"), (0.06, "NOT a quiet machine")])
def test_a_run_beside_others_says_so(others: float, said: str) -> None:
    assert said in verdict(stream_turns(50.0, others=others), [])[-2]


def test_a_run_replaces_all_that_was_said_of_the_run_before_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "evidence").mkdir()
    page = tmp_path / "benchmarks" / "router-cost.md"
    page.write_text("# Cost\n\nWords.\n\n<!-- measured -->\nof old\n<!-- /measured -->\n\n## More words\n")
    for router_us, said in ((80.0, "MISSED"), (45.0, "met")):
        write_page(stream_turns(router_us), request_turns(7000.0, 0.0029), docs=tmp_path)
        text = page.read_text()
        assert text.startswith("# Cost\n\nWords.\n\n<!-- measured -->\n")
        assert text.endswith("<!-- /measured -->\n\n## More words\n")
        assert "of old" not in text
        assert text.count("Verdict of this run") == 1
        assert text.count(f"at most 1.3x sending: {said}") == 2  # in the words and in the table

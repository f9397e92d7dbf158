"""A sample of the fuzzing, and that it would see what it looks for. ``python -m bench.soak fuzz`` has the million."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.testing import run_virtual
from baton.v1 import generation_pb2 as pb
from bench.fuzz import (
    MOST_SLOW_COUNT,
    Findings,
    _ask,
    _ask_slow_again,
    _Rest,
    delays_of,
    faults_of,
    fuzz_part,
    growth_faults,
    trend_faults,
)
from bench.fuzz_mutations import CORPUS, GENERATE, METHODS, RESUME, WATCHWORD, Case, case_of
from bench.fuzz_target import Ending, fuzz_target
from router.server import RouterEndpoint

SEED = 5
QUICK: dict[str, Any] = {"judge_machine": False, "tool_parser": "", "reasoning_parser": ""}
"""Time and memory are the machine's as well, and parsers take seconds to start: the soak has all three."""
NO_PARSERS: dict[str, Any] = {"tool_parser": "", "reasoning_parser": ""}


def test_the_same_number_is_the_same_case_and_others_are_others() -> None:
    cases = [case_of(number, SEED) for number in range(300)]
    assert cases == [case_of(number, SEED) for number in range(300)]
    assert len({case.data for case in cases}) > 200
    assert {case.path for case in cases} == set(METHODS) == set(CORPUS)
    assert any(not case.is_parsed for case in cases)
    assert any(case.prelude for case in cases)


async def test_mutated_requests_to_the_handlers_find_nothing() -> None:
    found = await fuzz_part(range(2500), seed=SEED, by_wire=False, **QUICK)
    assert found["faults"] == []
    assert found["count"] == 2500
    assert found["outcomes"]["OK"] > 200
    assert {name.split()[-1] for name in found["outcomes"]} >= {
        "INVALID_REQUEST",
        "MODEL_NOT_FOUND",
        "RESUME_DENIED",
        "PROMPT_TOO_LONG",
    }


async def test_mutated_requests_over_sockets_find_nothing() -> None:
    found = await fuzz_part(range(10_000, 10_600), seed=SEED, by_wire=True, **QUICK)
    assert found["faults"] == []
    assert found["count"] == 600


async def test_a_resume_token_of_the_case_itself_is_put_into_its_request(tmp_path: Path) -> None:
    numbers = (number for number in range(2000) if (case := case_of(number, SEED)).path == RESUME and case.prelude)
    findings = Findings()
    async with fuzz_target(tmp_path, **NO_PARSERS) as target:
        for number in numbers:
            case = case_of(number, SEED)
            findings.note(case, await target.run(case))
    assert findings.fault_count == 0, findings.faults
    assert findings.outcomes["OK"] > 20


async def test_a_bug_in_the_router_is_found(tmp_path: Path) -> None:
    async with fuzz_target(tmp_path, **NO_PARSERS) as target:

        def broken(*_: object) -> Any:
            raise KeyError("bug")

        target.router.relay.run = broken  # type: ignore[method-assign, assignment]
        findings = Findings()
        for number in range(200):
            case = case_of(number, SEED)
            findings.note(case, await target.run(case))
    assert any("INTERNAL" in fault for fault in findings.faults)


CASE = Case(1, GENERATE, b"", 2.0, None, None, True, True)


def started(count: int = 0) -> Any:
    return pb.GenerateResponse(started=pb.Started(prompt_token_count=count))


def chunk(first: int, count: int) -> Any:
    return pb.GenerateResponse(chunk=pb.Chunk(first_token_index=first, token_count=count))


def finished(count: int) -> Any:
    return pb.GenerateResponse(finished=pb.Finished(usage=pb.Usage(output_token_count=count)))


WRONG: dict[str, Callable[[], Ending]] = {
    "ended with INTERNAL": lambda: Ending("INTERNAL", "INTERNAL"),
    "ended with UNKNOWN": lambda: Ending("UNKNOWN"),
    "ended with ABORTED INVALID_REQUEST": lambda: Ending("ABORTED", "INVALID_REQUEST"),
    "ended with UNAVAILABLE NO_WORKER": lambda: Ending("UNAVAILABLE", "NO_WORKER"),
    "without a field violation": lambda: Ending("INVALID_ARGUMENT", "INVALID_REQUEST"),
    "repeats the prompt": lambda: Ending("INVALID_ARGUMENT", "PROMPT_TOO_LONG", text=f"no {WATCHWORD}"),
    "left the handler": lambda: Ending("CANCELLED", "by gRPC", bug="KeyError left the handler"),
    "OK without an answer": lambda: Ending(messages=[]),
    "the stream was SC": lambda: Ending(messages=[started(), chunk(0, 1)]),
    "the stream was CF": lambda: Ending(messages=[chunk(0, 1), finished(1)]),
    "a chunk began at 2, not at 1": lambda: Ending(
        messages=[started(), chunk(0, 1), chunk(2, 1), finished(2)]
    ),
    "2 tokens were sent and 3 billed": lambda: Ending(messages=[started(), chunk(0, 2), finished(3)]),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_must_not_be_is_seen(fault: str) -> None:
    assert any(fault in each for each in faults_of(CASE, WRONG[fault]()))


def test_what_may_be_is_no_fault() -> None:
    good = [started(), chunk(0, 2), chunk(2, 1), finished(3)]
    assert list(faults_of(CASE, Ending(messages=good))) == []
    assert list(faults_of(CASE, Ending("NOT_FOUND", "MODEL_NOT_FOUND"))) == []
    assert list(faults_of(CASE, Ending("CANCELLED", "by gRPC"))) == []


LATE = Ending("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", seconds=4.5)
LONG_TURN = Ending("NOT_FOUND", "MODEL_NOT_FOUND", longest_turn_s=1.0)


def test_what_took_long_is_seen_and_is_no_fault_yet() -> None:
    assert "ended 2.50 s after its deadline" in list(delays_of(CASE, LATE))
    assert any("kept the event loop" in each for each in delays_of(CASE, LONG_TURN))
    assert list(delays_of(CASE, Ending("NOT_FOUND", "MODEL_NOT_FOUND", seconds=3.0, longest_turn_s=0.05))) == []
    findings = Findings()
    findings.note(CASE, LATE)
    assert findings.fault_count == 0
    assert list(findings.slow) == [CASE.number]


class Slow:
    """Answers some cases late, each as often as told."""

    endpoint = RouterEndpoint("127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1")

    def __init__(self, times: dict[int, int]) -> None:
        self.times = times

    async def run(self, case: Case) -> Ending:
        self.times[case.number] -= 1
        return Ending("CANCELLED", "by gRPC", seconds=1000.0 if self.times[case.number] >= 0 else 0.0)


async def test_a_case_is_slow_if_it_is_slow_each_time_it_is_asked_again_alone() -> None:
    findings = Findings(slow={1: "case 1: late", 2: "case 2: late", 3: "case 3: late"})
    target: Any = Slow({1: 0, 2: 2, 3: 3})
    await _ask_slow_again(target, SEED, False, findings)
    assert [fault.split(":")[0] for fault in findings.faults] == ["case 3"]


async def test_a_part_of_which_everything_is_slow_is_at_fault() -> None:
    findings = Findings(slow=dict.fromkeys(range(MOST_SLOW_COUNT + 1), "late"))
    target: Any = Slow(dict.fromkeys(range(MOST_SLOW_COUNT + 1), 0))
    await _ask_slow_again(target, SEED, False, findings)
    assert findings.faults == [
        f"{MOST_SLOW_COUNT + 1} cases took long, more than the {MOST_SLOW_COUNT} that are asked again"
    ]


async def test_of_many_cases_more_may_be_slow_at_first() -> None:
    findings = Findings(count=100_000, slow=dict.fromkeys(range(1000), "late"))
    target: Any = Slow(dict.fromkeys(range(1000), 0))
    await _ask_slow_again(target, SEED, False, findings)
    assert findings.faults == []
    assert set(target.times.values()) == {-1}, "each was asked again, once"


def test_a_case_that_never_ends_is_a_fault() -> None:
    class Hanging(Slow):
        async def run(self, case: Case) -> Ending:
            await asyncio.get_running_loop().create_future()
            raise AssertionError("never")

    async def part() -> Findings:
        findings = Findings()
        target: Any = Hanging({})
        channel: Any = None
        await _ask(target, channel, CASE, False, findings)
        return findings

    assert run_virtual(part()).faults == ["case 1 (Generate): had not ended after 120 s"]


@pytest.mark.parametrize(
    ("objects", "mebibytes", "found"),
    [
        ((50_000, 50_000, 50_000), (100, 100, 100), ""),
        ((50_000, 51_500, 53_000), (100, 100, 100), "objects grow on"),
        ((50_000, 54_000, 55_500), (100, 100, 100), ""),  # a cache that fills up
        ((50_000, 50_000, 51_500), (100, 100, 100), "objects grow on"),
        ((50_000, 50_000, 50_700), (100, 100, 100), ""),
        ((50_000, 50_000, 50_000), (100, 124, 148), "bytes grow on"),
        ((50_000, 50_000, 50_000), (100, 150, 174), ""),
    ],
)
def test_what_grows_on_to_the_last_third_is_a_leak_and_a_cache_is_none(
    objects: tuple[int, ...], mebibytes: tuple[int, ...], found: str
) -> None:
    rests = [_Rest(size << 20, count, 30) for size, count in zip(mebibytes, objects, strict=True)]
    faults = list(trend_faults(rests, 150_000))
    assert len(faults) == bool(found)
    assert all(found in fault for fault in faults)


def test_a_leak_is_seen() -> None:
    before = _Rest(100 << 20, 50_000, 30)
    assert list(growth_faults(before, _Rest(120 << 20, 52_000, 30))) == []
    for after in (_Rest(400 << 20, 50_000, 30), _Rest(100 << 20, 90_000, 30), _Rest(100 << 20, 50_000, 31)):
        assert len(list(growth_faults(before, after))) == 1

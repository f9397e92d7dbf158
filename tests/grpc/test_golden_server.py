"""The load generator against a server whose answers are known: counts exactly, and stamps no message before its time.

Times are compared with what the server noted when it sent each message, on the same clock, and not with the script: a
server that the machine made late is no error of the generator. The machine can also take the processor from the
generator between a message's arrival and its stamp. How often it does, and so how exact the times are, is for a
benchmark to say (docs/benchmarks/schedule-lag.md). An error in the generator's own arithmetic, though, is in EVERY
message: it is in the smallest difference, too, which no machine enlarges by enlarging all but one of a thousand.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest

from baton.__main__ import BENCH_RUN_EXPERIMENTS
from baton.client import BatonClient
from baton.errors import BatonError
from baton.event_loop import runner
from baton.request import StopConditions
from bench.generator.baton_target import BatonTarget
from bench.generator.golden import Behaviour, Ending, GoldenRecord, GoldenScript
from bench.generator.golden_judge import Judgement, judge
from bench.generator.golden_server import GoldenProcess, golden_process
from bench.generator.openai_target import OpenAiTarget
from bench.generator.sender import RunState, send_plan
from bench.generator.target import Target, TargetEvent, Tokens
from bench.results.records import Outcome, RequestRecord
from bench.traffic.plan import Plan, PlannedRequest

TOLERANCE_S = 1.5e-3
"""The least that a message takes from one process to the other, on a slow machine."""
MODEL = "golden"
ROOT = Path(__file__).resolve().parents[2]

TargetOf = Callable[[GoldenProcess], Target]


def over_http(server: GoldenProcess) -> Target:
    return OpenAiTarget(server.url, MODEL)


def over_grpc(server: GoldenProcess) -> Target:
    return BatonTarget(server.grpc_address)


BOTH = pytest.mark.parametrize("target_of", [over_http, over_grpc])


def plan_of(count: int, *, rate_per_s: float, output_token_count: int, kinds: int = 1, **fields: object) -> Plan:
    """Request i has behaviour i modulo ``kinds``; every prompt is another."""
    requests = tuple(
        PlannedRequest(
            index=index,
            at_s=index / rate_per_s,
            prompt_token_ids=(index % kinds, 1000 + index, *range(30)),
            output_token_count=output_token_count,
            **fields,  # type: ignore[arg-type]
        )
        for index in range(count)
    )
    return Plan(name="test", requests=requests, duration_s=count / rate_per_s, facts={})


def until_all_ended(server: GoldenProcess) -> None:
    """That a caller has left, a server learns when it learns it."""
    ends_at = time.monotonic() + 60
    is_over = False
    while not is_over:
        assert time.monotonic() < ends_at, "the server still serves who has left"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{server.url}/golden/records"
        ) as reply:
            is_over = all(GoldenRecord.from_json(fields).ending for fields in json.loads(reply.read()))


def send(
    plan: Plan, server: GoldenProcess, target_of: TargetOf, *, timeout_s: float = 60.0
) -> tuple[list[RequestRecord], list[GoldenRecord], Judgement]:
    """Sends ``plan`` on the loop that ``baton bench run`` uses."""
    states: list[RunState] = []

    async def run() -> list[RequestRecord]:
        target = target_of(server)
        try:
            return await send_plan(plan, target, timeout_s=timeout_s, observer=states.append)
        finally:
            await target.close()

    with runner() as loop_runner:
        records = loop_runner.run(run())
    until_all_ended(server)
    notes = server.drain()
    return records, notes, judge(plan, records, notes, zero_at_s=states[0].started_at_s)


BEHAVIOURS = (
    Behaviour(),
    Behaviour(Ending.REFUSE),
    Behaviour(Ending.ERROR, 3),
    Behaviour(Ending.TRUNCATE, 4),
    Behaviour(Ending.DISCONNECT, 2),
    Behaviour(Ending.SURPLUS),
)
OUTCOMES = (
    Outcome.OK,
    Outcome.REFUSED,
    Outcome.ERROR,
    Outcome.INCOMPLETE,
    Outcome.ERROR,
    Outcome.INCOMPLETE,
)


@BOTH
def test_every_request_ends_in_one_outcome_and_every_token_is_counted(target_of: TargetOf) -> None:
    script = GoldenScript(
        ttft_s=0.02, gap_s=0.005, tokens_per_message=(1, 3, 2), gap_jitter_share=0.5, behaviours=BEHAVIOURS
    )
    plan = plan_of(8 * len(BEHAVIOURS), rate_per_s=100.0, output_token_count=24, kinds=len(BEHAVIOURS))
    with golden_process(script) as server:
        records, notes, judgement = send(plan, server, target_of)
    assert judgement.miscounts == []
    assert [record.outcome for record in records] == [
        OUTCOMES[index % len(OUTCOMES)] for index in range(len(records))
    ]
    assert Counter(len(record.message_at_s) for record in records[2::6]) == {3: 8}, "messages before an error count"
    whole = records[0::6]
    assert [record.output_token_count for record in whole] == [24] * 8
    assert [record.message_token_counts for record in whole] == [[1, 3, 2] * 4] * 8
    assert [record.output_token_count for record in records[5::6]] == [25] * 8
    assert all(record.output_token_count == 0 for record in records[1::6])
    assert len(notes) == len(plan.requests)


@BOTH
def test_a_server_that_falls_silent_is_left_when_the_time_is_over(target_of: TargetOf) -> None:
    plan = plan_of(4, rate_per_s=100.0, output_token_count=24)
    with golden_process(GoldenScript(ttft_s=0.02, gap_s=0.005, behaviours=(Behaviour(Ending.STALL, 5),))) as server:
        records, notes, judgement = send(plan, server, target_of, timeout_s=1.0)
    assert judgement.miscounts == []
    assert [record.outcome for record in records] == [Outcome.TIMEOUT] * 4
    assert [note.ending for note in notes] == ["left"] * 4


@BOTH
def test_a_caller_who_leaves_is_counted_and_leaves_at_the_server_too(target_of: TargetOf) -> None:
    plan = plan_of(6, rate_per_s=50.0, output_token_count=3000, cancel_after_s=1.5)
    with golden_process(GoldenScript(ttft_s=0.02, gap_s=0.02)) as server:
        records, notes, judgement = send(plan, server, target_of)
    assert [record.outcome for record in records] == [Outcome.CANCELLED] * 6
    # On a machine that stands still for so long, a request is cancelled before it is on its way.
    assert [fault for fault in judgement.miscounts if not fault.endswith("never reached the server")] == []
    assert {note.ending for note in notes} == {"left"}


@BOTH
def test_facts_of_the_server_reach_the_record(target_of: TargetOf) -> None:
    plan = plan_of(2, rate_per_s=50.0, output_token_count=3)
    with golden_process(GoldenScript(ttft_s=0.02, gap_s=0.01)) as server:
        records, _, _ = send(plan, server, target_of)
    assert [record.prompt_token_count for record in records] == [32, 32]
    if target_of is over_grpc:
        assert records[0].phases_s is not None
        assert records[0].phases_s["prefill"] == pytest.approx(0.02)
        assert records[0].phases_s["decode"] == pytest.approx(0.02)
        assert records[0].kv_transfer_bytes == 32_000
        assert records[0].decode_worker_id == "golden"


def faults(judgement: Judgement) -> list[str]:
    """What is in every message."""
    found = list(judgement.miscounts)
    for name, errors in (
        ("TTFT", judgement.ttft_error_s),
        ("ITL", judgement.gap_error_s),
        ("time of a message", judgement.message_delay_s),
    ):
        least_s = min(map(abs, errors))
        if least_s > TOLERANCE_S:
            found.append(f"{name}: the least error is {least_s * 1e3:.2f} ms")
    if min(judgement.message_delay_s) < 0:
        found.append("a message was stamped before it was sent")
    return found


def judged(target_of: TargetOf) -> list[str]:
    plan = plan_of(60, rate_per_s=40.0, output_token_count=40)
    script = GoldenScript(ttft_s=0.05, gap_s=0.02, gap_jitter_share=0.5, tokens_per_message=(1, 1, 2))
    with golden_process(script) as server:
        return faults(send(plan, server, target_of)[2])


@BOTH
def test_times_are_those_at_which_the_server_sent(target_of: TargetOf) -> None:
    assert judged(target_of) == []


class Dawdling:
    """A generator whose clock is 2 ms ahead."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        async with aclosing(self._target.generate(request, timeout_s=timeout_s)) as events:
            async for event in events:
                yield Tokens(event.at_s + 0.002, event.token_count) if isinstance(event, Tokens) else event

    async def close(self) -> None:
        await self._target.close()


def test_a_generator_whose_clock_is_two_milliseconds_ahead_is_caught() -> None:
    found = judged(lambda server: Dawdling(over_http(server)))
    assert [fault.partition(":")[0] for fault in found] == ["TTFT", "time of a message"], "all gaps are late alike"


def test_the_generator_reads_its_sockets_with_one_thread_less_and_nobody_else_does() -> None:
    """gRPC reads the variable when it is imported, so it has to be set before."""
    script = "import os, sys; import baton.__main__; print(os.environ.get('GRPC_EXPERIMENTS', 'none'))"
    said = [
        subprocess.run(
            [sys.executable, "-c", script, *words],
            env={name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        for words in (["bench", "run"], ["bench", "peer"], ["up"])
    ]
    assert said == [BENCH_RUN_EXPERIMENTS, "none", "none"]


async def test_the_server_speaks_http_as_others_expect_it() -> None:
    prompt = [0, 7, 8]
    with golden_process(GoldenScript(ttft_s=0.01, gap_s=0.001), model="tiny") as server:
        async with aiohttp.ClientSession(server.url) as session:
            models = await (await session.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["tiny"]
            assert (await session.get("/health")).status == 200
            assert "vllm:num_requests_running" in await (await session.get("/metrics")).text()
            order = {"prompt": prompt, "max_tokens": 3}
            whole = await (await session.post("/v1/completions", json=order)).json()
            assert whole["choices"][0]["text"] == " the the the"
            assert whole["usage"] == {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
            chat = {"messages": [{"role": "user", "content": "Hello, you."}], "max_tokens": 2, "stream": True}
            text = await (await session.post("/v1/chat/completions", json=chat)).text()
            assert text.count('"content":" the"') == 2
            assert text.endswith("data: [DONE]\n\n")
            assert (await session.post("/v1/completions", json={"prompt": []})).status == 400
            assert (await session.get("/nothing")).status == 404


async def test_the_server_speaks_grpc_as_baton_does() -> None:
    with golden_process(GoldenScript(ttft_s=0.01, gap_s=0.001, behaviours=BEHAVIOURS)) as server:
        async with BatonClient(server.grpc_address) as client:
            assert await client.is_serving(timeout=60)
            stop = StopConditions(max_output_token_count=4, ignore_eos=True)
            events = [event async for event in client.generate([0, 9], timeout=60, stop=stop)]
            assert [type(event).__name__ for event in events] == ["Started", *["Chunk"] * 4, "Finished"]
            with pytest.raises(BatonError, match="refused"):
                [event async for event in client.generate([1, 9], timeout=60, stop=stop)]
        await asyncio.sleep(0)
        assert [note.ending for note in server.drain()] == ["complete", "refuse"]

"""The load generator against a target whose times are known to the millisecond: it must report exactly those."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence

import pytest

from baton.testing import run_virtual
from bench.children import Cpu
from bench.load import Block, LoadPlan, Record, held_up_gaps_ms
from bench.targets import ServerNotes, TargetError, TargetEvent, TokenEvent

PLAN = LoadPlan(
    alone_counts={64: 3, 512: 2},
    alone_output_token_count=5,
    stream_count=2,
    stream_output_token_count=20,
    stream_run_count=2,
    arrival_count=2,
    arrival_interval_s=0.5,
    flow_token_count=3,
    timeout_s=60.0,
)


class GoldenTarget:
    """First token after 1 ms per prompt token, then one each 20 ms; a long prompt holds all streams up for its time.

    ``fail_at``: the request (by number) that breaks after two tokens.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self._fail_at = fail_at
        self._held_until = 0.0

    async def generate(
        self, prompt_token_ids: Sequence[int], max_token_count: int, *, timeout_s: float
    ) -> AsyncGenerator[TargetEvent, None]:
        loop = asyncio.get_running_loop()
        number = len(self.prompts)
        self.prompts.append(tuple(prompt_token_ids))
        if len(prompt_token_ids) == PLAN.arrival_prompt_token_count:
            self._held_until = loop.time() + 2.0
        await asyncio.sleep(len(prompt_token_ids) / 1000)
        for token in range(max_token_count):
            if token:
                await asyncio.sleep(max(0.020, self._held_until - loop.time()))
            if number == self._fail_at and token == 2:
                raise TargetError("broke after 2 tokens")
            yield TokenEvent(loop.time(), 1)
        yield ServerNotes({"number": number})

    async def close(self) -> None:
        pass


def run_block(target: GoldenTarget, seed: int = 1, *, plan: LoadPlan = PLAN) -> Block:
    cpu_s = 0.0

    def cpu() -> Cpu:
        nonlocal cpu_s
        cpu_s += 0.5  # half a second between two readings
        return Cpu({"golden": cpu_s})

    async def scenario() -> Block:
        block = Block(
            target,
            plan,
            system="golden",
            block=0,
            round_number=0,
            rng=random.Random(seed),
            vocabulary=range(10, 1000),
            cpu=cpu,
        )
        await block.warm_up()
        await block.alone()
        await block.streams()
        return block

    return run_virtual(scenario())


def of_role(block: Block, role: str) -> list[Record]:
    return [record for record in block.records if record.role == role]


def test_requests_alone_report_the_exact_first_token_time_gaps_and_counts() -> None:
    block = run_block(GoldenTarget())
    alone = of_role(block, "alone")
    assert sorted(record.prompt_token_count for record in alone) == [64, 64, 64, 512, 512]
    for record in alone:
        assert record.ttft_s == pytest.approx(record.prompt_token_count / 1000, abs=1e-3)
        assert record.gaps_ms == pytest.approx([20.0] * 4, abs=1.0)
        assert record.e2e_s == pytest.approx(record.prompt_token_count / 1000 + 0.08, abs=1e-3)
        assert record.token_counts == []  # one token a message
        assert record.cpu_s == pytest.approx(0.5)
        assert record.notes is not None
        assert record.error is None


def test_long_prompts_arrive_at_their_intended_times_once_every_stream_flows() -> None:
    block = run_block(GoldenTarget())
    streams, arrivals = of_role(block, "stream"), of_role(block, "arrival")
    assert [len(record.gaps_ms) for record in streams] == [19, 19, 19, 19]
    streams, arrivals = [r for r in streams if r.run == 1], [r for r in arrivals if r.run == 1]
    assert arrivals[1].intended_at - arrivals[0].intended_at == pytest.approx(0.5, abs=1e-3)
    third_token_at = max((record.first_at or 0.0) + 0.040 for record in streams)
    assert arrivals[0].intended_at == pytest.approx(third_token_at, abs=0.025)
    assert all(record.sent_at - record.intended_at < 1e-3 for record in arrivals)


def test_only_gaps_that_end_after_the_first_arrival_count_as_held_up() -> None:
    block = run_block(GoldenTarget())
    gaps = held_up_gaps_ms(block.records)
    assert set(gaps) == {("golden", 0, 0), ("golden", 0, 1)}  # two runs, the streams of each together
    for held in gaps.values():
        # 2 streams of 20 tokens, 3 of them before the arrival: at most 17 gaps each.
        assert 30 <= len(held) <= 34
        ranked = sorted(held)
        # Held up once for what is left of two seconds, then for the half second that the second arrival adds.
        assert ranked[-2:] == pytest.approx([1990.0] * 2, abs=15.0)
        assert ranked[-4:-2] == pytest.approx([500.0] * 2, abs=25.0)
        assert ranked[-5] == pytest.approx(20.0, abs=1.0)


def test_prompts_are_unique_and_the_same_for_every_system_of_a_round() -> None:
    one, other, next_round = GoldenTarget(), GoldenTarget(), GoldenTarget()
    run_block(one, seed=1)
    run_block(other, seed=1)
    run_block(next_round, seed=2)
    assert one.prompts == other.prompts
    assert one.prompts != next_round.prompts
    heads = [prompt[:16] for prompt in one.prompts]
    assert len(set(heads)) == len(heads)


def test_a_request_that_breaks_is_kept_with_what_it_got_and_has_no_end_to_end_time() -> None:
    block = run_block(GoldenTarget(fail_at=4))  # after three of warm-up, the second alone
    (broken,) = [record for record in block.records if record.error is not None]
    assert broken.role == "alone"
    assert broken.error == "broke after 2 tokens"
    assert len(broken.gaps_ms) == 1
    assert broken.e2e_s is None
    assert len(of_role(block, "alone")) == 5


def test_streams_that_never_flow_do_not_hang_the_block() -> None:
    block = run_block(GoldenTarget(fail_at=8))  # 3 of warm-up, 5 alone, then the first stream
    first_run = [record for record in of_role(block, "stream") if record.run == 0]
    assert [record.error is None for record in first_run] == [False, True]
    assert [record.run for record in of_role(block, "arrival")] == [1, 1]

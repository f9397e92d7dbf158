"""What the simulated engine keeps of the sampling modes: least lengths, logprobs, tenants, answers that go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from baton.leg import DecodeDone, KvAdopted, Stepped
from baton.request import EngineStop, LegFinish, TokenLogprobs
from baton.testing import in_virtual_time
from engine.protocol import DecodeJob, PrefillJob
from engine.sim import SimConfig, SimEngine, SimNetwork, TokenRule, simulated_answer

PROMPT = tuple(range(100, 140))
RULE = TokenRule(eos_probability=0.3)


@asynccontextmanager
async def two_engines() -> AsyncIterator[tuple[SimEngine, SimEngine]]:
    network = SimNetwork()
    pair = [SimEngine(SimConfig(engine_id=each, block_token_count=16, tokens=RULE), network) for each in ("p", "d")]
    for engine in pair:
        await engine.start()
    yield pair[0], pair[1]
    for engine in pair:
        await engine.close()


async def said(engine: SimEngine, job: DecodeJob) -> tuple[KvAdopted, list[int], list[TokenLogprobs], LegFinish]:
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async with aclosing(engine.decode(job)) as events:
        adopted, *steps, done = [event async for event in events]
    assert isinstance(adopted, KvAdopted)
    assert isinstance(done, DecodeDone)
    for step in steps:
        assert isinstance(step, Stepped)
        token_ids += step.token_ids
        logprobs += step.logprobs
    return adopted, token_ids, logprobs, done.finish


def least(count: int, least_count: int) -> EngineStop:
    return EngineStop(count, min_token_count=least_count)


@in_virtual_time
async def test_an_answer_does_not_end_before_its_least_length_wherever_it_goes_on() -> None:
    whole = simulated_answer(PROMPT, 60, RULE, min_token_count=30)
    assert len(simulated_answer(PROMPT, 60, RULE)) < 20 < 30 <= len(whole) < 60
    async with two_engines() as (p, d):
        for emitted in (0, 1, 12, 29):
            ids = (*PROMPT, *whole[:emitted])
            alone = DecodeJob("alone", ids, stop=least(60 - emitted, 30), output_token_count=emitted)
            _, rest, _, finish = await said(d, alone)
            assert (tuple(rest), finish) == (whole[emitted:], LegFinish.STOP)
            first = await p.prefill(
                PrefillJob("prefill", ids, stop=least(60 - emitted, 30), output_token_count=emitted)
            )
            assert first.held is not None
            handed_over = DecodeJob(
                "decode",
                (*ids, first.first_token_id),
                stop=least(59 - emitted, 30),
                pull=first.held.params,
                output_token_count=emitted + 1,
            )
            _, rest, _, finish = await said(d, handed_over)
            assert (first.first_token_id, *rest) == whole[emitted:]
            await p.release(first.held.handle)


@in_virtual_time
async def test_emitted_tokens_taken_for_prompt_would_be_noticed() -> None:
    whole = simulated_answer(PROMPT, 60, RULE, min_token_count=30)
    async with two_engines() as (_, d):
        _, rest, _, _ = await said(d, DecodeJob("leg", (*PROMPT, *whole[:12]), stop=least(48, 30)))
        assert tuple(rest) != whole[12:]


@in_virtual_time
async def test_logprobs_are_one_per_token_and_the_same_wherever_it_is_drawn() -> None:
    async with two_engines() as (p, d):
        stop = least(20, 20)
        _, tokens, expected, _ = await said(d, DecodeJob("alone", PROMPT, stop=stop, top_logprob_count=3))
        assert [each.top[0] for each in expected] == [
            (token_id, each.logprob) for token_id, each in zip(tokens, expected, strict=True)
        ]
        assert all(len(each.top) == 3 for each in expected)
        first = await p.prefill(PrefillJob("prefill", PROMPT, stop=stop, top_logprob_count=3))
        assert first.held is not None
        assert first.first_logprobs is not None
        ids = (*PROMPT, first.first_token_id)
        job = DecodeJob(
            "decode", ids, stop=least(19, 20), pull=first.held.params, output_token_count=1, top_logprob_count=3
        )
        _, _, rest, _ = await said(d, job)
        assert [first.first_logprobs, *rest] == expected
        await p.release(first.held.handle)
        _, _, none, _ = await said(d, DecodeJob("unasked", PROMPT, stop=stop))
        assert none == []
        _, _, drawn, _ = await said(d, DecodeJob("drawn", PROMPT, stop=stop, top_logprob_count=0))
        assert [(each.logprob, each.top) for each in drawn] == [(each.logprob, ()) for each in expected]


@in_virtual_time
async def test_tenants_share_no_prefix() -> None:
    async with two_engines() as (_, d):
        cached = []
        for tenant in ("a", "a", "b", "", ""):
            adopted, _, _, _ = await said(d, DecodeJob("leg", PROMPT, stop=EngineStop(1), tenant=tenant))
            cached.append(adopted.cached_token_count)
        assert cached == [0, 32, 0, 0, 32]

"""Two real engines in float32, where an answer does not depend on what else is in the batch.

In bfloat16 one engine alone already answers differently, on CPU, with other requests in its batch: sums of
different shapes round differently. So what must hold under concurrency is checked in float32.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from engine_pair import (
    Pair,
    alone,
    becomes_true,
    continuation,
    decoded,
    is_idle,
    kv_of,
    prefilled,
    prompt,
    running_pair,
    stop,
)
from step_log import LOG_VARIABLE, LOGGED_SCHEDULER, Step, steps_of

from baton.leg import KvAdopted, RecomputeReason, Stepped
from baton.request import LegFinish, Sampling
from engine.protocol import DecodeJob

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CONFIGURED_LEASE_S = 1.0


@pytest.fixture(scope="module")
def step_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps") / "steps.jsonl"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(step_log: Path) -> AsyncIterator[Pair]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(LOG_VARIABLE, str(step_log))
        logged = {"scheduler_cls": LOGGED_SCHEDULER}
        async with running_pair(dtype="float32", lease_s=CONFIGURED_LEASE_S, extra_args=logged) as both:
            yield both


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_left(pair: Pair) -> AsyncIterator[None]:
    yield
    await is_idle(pair.prefiller)
    await is_idle(pair.decoder)


async def test_many_answers_at_once_stay_apart(pair: Pair) -> None:
    prompts = [prompt(count, seed=7) for count in (1, 30, 127, 128, 200, 256, 257, 300, 384, 600)]
    expected = [await alone(pair.decoder, ids) for ids in prompts]

    async def both(ids: tuple[int, ...]) -> list[int]:
        first = await prefilled(pair.prefiller, ids)
        adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
        await pair.prefiller.release(kv_of(first).handle)
        assert adopted.recomputed_token_count == 0
        return [first.first_token_id, *rest]

    assert await asyncio.gather(*map(both, prompts)) == expected


async def test_the_two_phases_may_swap_engines(pair: Pair) -> None:
    """A role is a decision, not a property: what decoded a moment ago prefills now."""
    ids = prompt(333, seed=8)
    expected = await alone(pair.prefiller, ids)
    first = await prefilled(pair.decoder, ids)
    adopted, rest, _ = await decoded(pair.prefiller, continuation(ids, first))
    await pair.decoder.release(kv_of(first).handle)
    assert [first.first_token_id, *rest] == expected
    assert adopted.transfer_bytes > 0


async def test_held_kv_that_nobody_fetches_expires_and_its_ticket_with_it(pair: Pair) -> None:
    ids = prompt(300, seed=9)
    expected = await alone(pair.decoder, ids)
    kept = await prefilled(pair.prefiller, prompt(200, seed=19))
    # The engines' own clocks run in real time. A lease that is said counts, and not that of the configuration.
    await asyncio.sleep(1.5 * CONFIGURED_LEASE_S)
    assert (await pair.prefiller.load_now()).used_block_count == 2
    await pair.prefiller.release(kv_of(kept).handle)
    await is_idle(pair.prefiller)
    first = await prefilled(pair.prefiller, ids, lease_s=0.5)
    await is_idle(pair.prefiller)
    # Those blocks belong to others now.
    await pair.prefiller.reset_prefix_cache()
    intruder = await prefilled(pair.prefiller, prompt(300, seed=10))
    adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
    assert [first.first_token_id, *rest] == expected
    assert adopted.recomputed_token_count == 300
    await pair.prefiller.release(kv_of(intruder).handle)


async def test_a_seeded_answer_does_not_depend_on_how_many_steps_its_prompt_took(pair: Pair) -> None:
    """A step that computes part of a prompt draws a token that nobody sees: it must cost the seed nothing."""
    ids = prompt(3000, seed=11)
    sampling = Sampling(temperature=1.0, seed=7)
    await pair.decoder.reset_prefix_cache()
    in_two_steps = await decoded(pair.decoder, DecodeJob("cold", ids, sampling, stop(8)))
    in_one_step = await decoded(pair.decoder, DecodeJob("warm", ids, sampling, stop(8)))
    assert in_two_steps[0].cached_token_count == 0
    assert in_one_step[0].cached_token_count > 2048 - 128
    assert in_two_steps[1] == in_one_step[1]
    other = await decoded(pair.decoder, DecodeJob("other", ids, Sampling(temperature=1.0, seed=8), stop(8)))
    assert other[1] != in_one_step[1], "the seed is used"


async def test_a_handed_over_request_is_computed_in_its_first_step_beside_a_running_stream(
    pair: Pair, step_log: Path
) -> None:
    """Neither it nor the stream waits: the pull, its proof and the forward pass are one step, which is the stream's
    next one. Told by steps, not by time."""
    ids = prompt(300, seed=12)
    first = await prefilled(pair.prefiller, ids)
    await decoded(pair.decoder, continuation(ids, first))  # the engines have met now, and the digests are there
    await pair.decoder.reset_prefix_cache()
    (adopted, tokens, _), steps = await _beside_a_stream(
        pair, step_log, decoded(pair.decoder, continuation(ids, first))
    )
    assert (adopted.recomputed_token_count, adopted.transfer_bytes) == (0, kv_of(first).kv_bytes)
    (name,) = {each for step in steps for each in step.token_counts if each.startswith("decode.")}
    its_steps = [step for step in steps if name in step.token_counts or name in step.waiting]
    assert [step.token_counts.get(name) for step in its_steps] == [1] * len(tokens)
    await pair.prefiller.release(kv_of(first).handle)
    assert [first.first_token_id, *tokens] == await alone(pair.decoder, ids)


async def test_a_pull_that_takes_its_time_holds_up_no_step_of_the_others(pair: Pair, step_log: Path) -> None:
    ids = prompt(300, seed=13)
    first = await prefilled(pair.prefiller, ids)
    # A contact that must fail first: nobody listens there for an engine of this name.
    lost = continuation(ids, first, remote_engine_id="an-engine-of-an-earlier-life")
    (adopted, tokens, _), steps = await _beside_a_stream(pair, step_log, decoded(pair.decoder, lost))
    assert adopted.recompute_reason is RecomputeReason.FAILED
    (name,) = {each for step in steps for each in step.token_counts if each.startswith("decode.")}
    assert name in next(step for step in steps if name in step.token_counts or name in step.waiting).waiting
    await pair.prefiller.release(kv_of(first).handle)
    assert [first.first_token_id, *tokens] == await alone(pair.decoder, ids)


async def _beside_a_stream(
    pair: Pair, step_log: Path, handed_over: Awaitable[tuple[KvAdopted, list[int], LegFinish]]
) -> tuple[tuple[KvAdopted, list[int], LegFinish], list[Step]]:
    """What came of it, and the steps of the decode engine meanwhile, in each of which the stream had its token."""
    seen = 0

    async def read() -> None:
        nonlocal seen
        job = DecodeJob("stream", prompt(50, seed=14), stop=stop(2000))
        async with aclosing(pair.decoder.decode(job)) as events:
            async for event in events:
                seen += isinstance(event, Stepped)

    async def is_running() -> bool:
        return seen > 3

    stream = asyncio.create_task(read())
    try:
        await becomes_true(is_running)
        step_count = len(steps_of(step_log, pair.decoder.process_id))
        outcome = await handed_over
        steps = steps_of(step_log, pair.decoder.process_id)[step_count:]
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    (name,) = {each for step in steps for each in step.token_counts if each.startswith("stream.")}
    assert all(step.token_counts.get(name) == 1 for step in steps)
    return outcome, steps

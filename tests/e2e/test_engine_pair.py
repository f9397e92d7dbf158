"""Two real engines, one core each: a prompt computed by one and continued by the other.

The oracle is one engine doing both phases from an empty cache.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from engine_pair import (
    BLOCK,
    MODEL_PATH,
    TRY_COUNT,
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
    while_it_computes,
)
from patience import WITHIN_S
from prometheus_client import CollectorRegistry

from baton.errors import BatonError, Reason
from baton.leg import DecodeOrder, KvAdopted, RecomputeReason, Stepped
from baton.request import EngineStop, LegFinish, Sampling
from baton.secret import TOKEN_KEY, cluster_token
from baton.worker.v1 import worker_pb2 as pb
from baton.worker.v1 import worker_pb2_grpc
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.hosting import HostConfig, WorkerHost
from engine.protocol import DecodeJob, Prefilled, PrefillJob
from router.leg_messages_client import decode_request

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]
SECRET = bytes(range(32))
LEGS = {1, 2, 3, 4, 5, 6}
LEG_TOKEN_COUNT = 40


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    async with running_pair() as both:
        yield both


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_left(pair: Pair) -> AsyncIterator[None]:
    """Every test leaves both engines as it found them: no request, no held KV, no used block."""
    yield
    await is_idle(pair.prefiller)
    await is_idle(pair.decoder)


@pytest.mark.parametrize("token_count", [1, 2, 64, 127, 128, 129, 255, 256, 257, 383, 384, 512, 1000, 2000])
async def test_a_handed_over_answer_is_the_answer_of_one_engine(pair: Pair, token_count: int) -> None:
    ids = prompt(token_count)
    expected = await alone(pair.decoder, ids)
    await pair.prefiller.reset_prefix_cache()
    first = await prefilled(pair.prefiller, ids)
    adopted, rest, finish = await decoded(pair.decoder, continuation(ids, first))
    await pair.prefiller.release(kv_of(first).handle)
    assert [first.first_token_id, *rest] == expected
    assert finish is LegFinish.LENGTH
    block_count = -(-token_count // BLOCK)
    assert adopted.recomputed_token_count == 0
    assert adopted.cached_token_count == 0
    assert adopted.transfer_bytes == kv_of(first).kv_bytes == block_count * BLOCK * 23_040
    assert adopted.descriptor_count > 0
    assert adopted.transfer_s > 0
    assert adopted.prefill_s == 0


@pytest.mark.parametrize(("token_count", "cached"), [(256, 256), (300, 256)])
async def test_only_what_the_decoder_lacks_is_pulled(pair: Pair, token_count: int, cached: int) -> None:
    ids = prompt(token_count, seed=3)
    expected = await alone(pair.decoder, ids)
    for attempt in range(2):
        first = await prefilled(pair.prefiller, ids)
        adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
        await pair.prefiller.release(kv_of(first).handle)
        assert [first.first_token_id, *rest] == expected
        assert adopted.recomputed_token_count == 0
        assert adopted.cached_token_count == (cached if attempt else 0)
        # Only whole blocks are kept for reuse, so the part block of 300 tokens travels again.
        pulled_block_count = -(-token_count // BLOCK) - adopted.cached_token_count // BLOCK
        assert adopted.transfer_bytes == pulled_block_count * BLOCK * 23_040
        await is_idle(pair.prefiller)


async def test_a_dead_ticket_costs_a_computation_and_never_a_wrong_token(pair: Pair) -> None:
    ids = prompt(300, seed=4)
    expected = await alone(pair.decoder, ids)
    first = await prefilled(pair.prefiller, ids)
    held = kv_of(first).params
    other = await prefilled(pair.prefiller, prompt(300, seed=44))
    others = kv_of(other).params
    for wrong, reason in (
        ({"remote_engine_id": "an-engine-of-an-earlier-life"}, RecomputeReason.FAILED),
        ({"hold_nonce": held["hold_nonce"] ^ 1}, RecomputeReason.EXPIRED),
        ({"hold_slot": others["hold_slot"]}, RecomputeReason.EXPIRED),
        ({"hold_slot": 40_000}, RecomputeReason.FAILED),
        ({"remote_block_ids": others["remote_block_ids"]}, RecomputeReason.CORRUPT),
        ({"remote_block_ids": [held["remote_block_ids"][0][::-1]]}, RecomputeReason.CORRUPT),
    ):
        await pair.decoder.reset_prefix_cache()
        adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first, **wrong))
        assert [first.first_token_id, *rest] == expected
        assert (adopted.recompute_reason, adopted.pull_count) == (reason, 1)
        assert adopted.recomputed_token_count == 300
        assert adopted.transfer_bytes == 0
    # All that spoilt none of it: what was held still is.
    await pair.decoder.reset_prefix_cache()
    adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
    assert [first.first_token_id, *rest] == expected
    assert (adopted.recompute_reason, adopted.recomputed_token_count) == (None, 0)
    assert adopted.verify_s > 0
    await pair.prefiller.release(kv_of(first).handle)
    await pair.prefiller.release(kv_of(other).handle)


async def test_kv_that_was_released_is_never_used_whatever_lies_there_now(pair: Pair) -> None:
    ids = prompt(300, seed=45)
    expected = await alone(pair.decoder, ids)
    first = await prefilled(pair.prefiller, ids)
    await pair.prefiller.release(kv_of(first).handle)
    await is_idle(pair.prefiller)
    adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
    assert [first.first_token_id, *rest] == expected
    assert (adopted.recompute_reason, adopted.transfer_bytes) == (RecomputeReason.EXPIRED, 0)


async def test_a_hold_ends_with_its_lease_if_nobody_releases_it(pair: Pair) -> None:
    ids = prompt(300, seed=46)
    expected = await alone(pair.decoder, ids)
    first = await prefilled(pair.prefiller, ids, lease_s=0.5)
    await is_idle(pair.prefiller)
    adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
    assert [first.first_token_id, *rest] == expected
    assert adopted.recompute_reason is RecomputeReason.EXPIRED


async def test_a_malformed_ticket_is_refused_and_the_engine_lives(pair: Pair) -> None:
    ids = prompt(200, seed=5)
    first = await prefilled(pair.prefiller, ids)
    for wrong in (
        {"remote_block_ids": [[1]]},
        {"remote_block_ids": [[1, "2"]]},
        {"remote_num_tokens": 199},
        {"remote_host": "192.0.2.1"},
        {"remote_port": True},
        {"tp_size": 2},
        {"unheard_of": 1},
    ):
        with pytest.raises(BatonError) as refused:
            await decoded(pair.decoder, continuation(ids, first, **wrong))
        assert refused.value.reason is Reason.TICKET_REFUSED
    await pair.decoder.check_health()
    await pair.prefiller.release(kv_of(first).handle)


async def test_a_pull_does_not_wait_for_a_prefill_that_computes(pair: Pair) -> None:
    warm = await prefilled(pair.prefiller, prompt(20, seed=40))
    await decoded(pair.decoder, continuation(prompt(20, seed=40), warm))  # the first read of a pair needs both sides
    await pair.prefiller.release(kv_of(warm).handle)
    ids = prompt(1000, seed=41)
    first = await prefilled(pair.prefiller, ids)

    async def pulled() -> None:
        await pair.decoder.reset_prefix_cache()
        adopted, _, _ = await decoded(pair.decoder, continuation(ids, first, count=4))
        assert adopted.recomputed_token_count == 0
        assert adopted.transfer_bytes == kv_of(first).kv_bytes

    await while_it_computes(pair.prefiller, 420, pulled)
    await pair.prefiller.release(kv_of(first).handle)


async def test_a_pull_leaves_the_blocks_to_whoever_holds_the_lease(pair: Pair) -> None:
    ids = prompt(300, seed=43)
    first = await prefilled(pair.prefiller, ids)
    await decoded(pair.decoder, continuation(ids, first))
    assert (await pair.prefiller.load_now()).used_block_count == 3
    await pair.prefiller.release(kv_of(first).handle)


async def test_a_release_frees_held_blocks_at_once_and_once(pair: Pair) -> None:
    first = await prefilled(pair.prefiller, prompt(500, seed=6))
    other = await prefilled(pair.prefiller, prompt(200, seed=6))
    assert (await pair.prefiller.load_now()).used_block_count == 4 + 2
    await pair.prefiller.release(kv_of(first).handle)

    async def only_the_other_is_held() -> bool:
        return bool((await pair.prefiller.load_now()).used_block_count == 2)

    await becomes_true(only_the_other_is_held)
    await pair.prefiller.release(kv_of(first).handle)
    await pair.prefiller.release("never-heard-of")
    assert (await pair.prefiller.load_now()).used_block_count == 2
    await pair.prefiller.release(kv_of(other).handle)


async def test_a_first_token_that_ends_the_answer_holds_nothing(pair: Pair) -> None:
    ids = prompt(300, seed=8)
    first = await prefilled(pair.prefiller, ids)
    await pair.prefiller.release(kv_of(first).handle)
    await is_idle(pair.prefiller)
    stopped = await pair.prefiller.prefill(
        PrefillJob("stop", ids, stop=stop(10, stop_token_ids=(first.first_token_id,)))
    )
    assert (stopped.finish, stopped.held) == (LegFinish.STOP, None)
    assert stopped.first_token_id == first.first_token_id
    only = await pair.prefiller.prefill(PrefillJob("one", ids, stop=stop(1)))
    assert (only.finish, only.held) == (LegFinish.LENGTH, None)
    await is_idle(pair.prefiller)


async def test_the_models_own_end_token_stops_unless_ignored(pair: Pair) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tuple(tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False))
    first = await pair.prefiller.prefill(PrefillJob("ask", ids, stop=EngineStop(64)))
    job = DecodeJob("answer", (*ids, first.first_token_id), stop=EngineStop(63), pull=kv_of(first).params)
    _, rest, finish = await decoded(pair.decoder, job)
    await pair.prefiller.release(kv_of(first).handle)
    answer = [first.first_token_id, *rest]
    assert "Paris" in tokenizer.decode(answer)
    assert finish is LegFinish.STOP
    assert answer[-1] == tokenizer.eos_token_id
    # The prompt ends where the answer did: the very first token is now the end token.
    to_the_end = (*ids, *answer[:-1])
    ended = await pair.prefiller.prefill(PrefillJob("end", to_the_end, stop=EngineStop(64)))
    assert (ended.finish, ended.held, ended.first_token_id) == (LegFinish.STOP, None, tokenizer.eos_token_id)
    await is_idle(pair.prefiller)
    going_on = await pair.prefiller.prefill(PrefillJob("on", to_the_end, stop=stop(64)))
    assert going_on.finish is None
    await pair.prefiller.release(kv_of(going_on).handle)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.3, 1.0])
async def test_a_cancelled_prefill_frees_its_blocks(pair: Pair, after_s: float) -> None:
    for number in range(TRY_COUNT):
        job = PrefillJob("cancelled", prompt(3000, seed=int(after_s * 100) + 10 + 1000 * number), stop=stop(10))
        task = asyncio.create_task(pair.prefiller.prefill(job))
        await asyncio.sleep(after_s)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, Prefilled):  # the machine stood still meanwhile, and it was over
            await pair.prefiller.release(kv_of(outcome).handle)
        await is_idle(pair.prefiller)
        if not isinstance(outcome, Prefilled):
            assert isinstance(outcome, asyncio.CancelledError)
            return
    raise AssertionError(f"{TRY_COUNT} prompts were over before they were cancelled")


async def test_a_prefill_cancelled_at_its_very_end_holds_nothing(pair: Pair) -> None:
    ids = prompt(20, seed=20)
    for delay_ms in range(5, 45, 3):
        task = asyncio.create_task(pair.prefiller.prefill(PrefillJob("late", ids, stop=stop(10))))
        await asyncio.sleep(delay_ms / 1000)
        task.cancel()
        try:
            first = await task
        except asyncio.CancelledError:
            continue
        await pair.prefiller.release(kv_of(first).handle)
    await is_idle(pair.prefiller)


async def test_a_decode_closed_midway_frees_its_blocks(pair: Pair) -> None:
    ids = prompt(300, seed=11)
    first = await prefilled(pair.prefiller, ids, count=2000)
    async with aclosing(pair.decoder.decode(continuation(ids, first, count=2000))) as events:
        seen = [await anext(events) for _ in range(4)]
    await pair.prefiller.release(kv_of(first).handle)
    assert isinstance(seen[0], KvAdopted)
    assert all(isinstance(event, Stepped) for event in seen[1:])
    await is_idle(pair.decoder)


async def test_a_decode_cancelled_around_its_pull_frees_both_sides(pair: Pair) -> None:
    for delay_ms in (0, 1, 2, 3, 5, 8, 12, 20):
        ids = prompt(700, seed=30 + delay_ms)
        first = await prefilled(pair.prefiller, ids)
        task = asyncio.create_task(decoded(pair.decoder, continuation(ids, first, count=2000)))
        await asyncio.sleep(delay_ms / 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):  # it has many seconds to go
            await task
        await is_idle(pair.decoder)
        await pair.prefiller.release(kv_of(first).handle)
        await is_idle(pair.prefiller)


async def test_load_counts_what_runs(pair: Pair) -> None:
    ids = prompt(300, seed=13)
    async with aclosing(pair.decoder.decode(DecodeJob("local", ids, stop=stop(2000)))) as events:
        assert isinstance(await anext(events), KvAdopted)
        await anext(events)
        await anext(events)
        load = pair.decoder.load()
        assert (load.running_count, load.waiting_count) == (1, 0)
        # Of the prompt; how much longer it is by now is a matter of the machine.
        assert 3 <= load.used_block_count <= (await pair.decoder.load_now()).used_block_count <= 4096 // BLOCK
    await is_idle(pair.decoder)
    assert pair.decoder.load().running_count == 0


async def test_a_prompt_that_cannot_fit_is_refused_before_it_costs_anything(pair: Pair) -> None:
    with pytest.raises(BatonError) as refused:
        await pair.prefiller.prefill(PrefillJob("long", prompt(4096), stop=stop(2)))
    assert refused.value.reason is Reason.PROMPT_TOO_LONG
    with pytest.raises(BatonError) as refused:
        await decoded(pair.decoder, DecodeJob("alien", (49_152,), stop=stop(2)))
    assert refused.value.reason is Reason.INVALID_REQUEST
    with pytest.raises(BatonError) as refused:
        await decoded(pair.decoder, DecodeJob("odd", prompt(5), sampling=Sampling(top_p=0.0), stop=stop(2)))
    assert refused.value.reason is Reason.INVALID_REQUEST


async def test_a_seeded_sample_of_one_engine_repeats(pair: Pair) -> None:
    ids = prompt(40, seed=14)
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, seed=7)
    jobs = [DecodeJob("sampled", ids, sampling=replace(sampling, seed=seed), stop=stop(16)) for seed in (7, 7, 8)]
    first, again, other = [(await decoded(pair.decoder, job))[1] for job in jobs]
    assert first == again
    assert first != other


async def test_a_step_of_the_real_engine_is_one_message(pair: Pair) -> None:
    """To all its requests: from when all of them have begun until the first has ended, no message is of fewer."""
    worker = DecodeWorker(pair.decoder, worker_id="decode-0", epoch="e1", secret=SECRET)
    attach = [partial(add_decode_service, worker=worker)]
    host = WorkerHost(HostConfig(), secret=SECRET, registry=CollectorRegistry(), attach=attach)
    try:
        await host.start()
        for number in range(TRY_COUNT):
            messages = await _messages_of_legs(host.address, f"round-{number}")
            begun = next(index for index, legs in enumerate(messages) if set().union(*messages[: index + 1]) == LEGS)
            whole = list(itertools.takewhile(lambda legs: legs == LEGS, messages[begun:]))
            # On a quiet machine all but a few. What was sent leg by leg would have none.
            if len(whole) >= LEG_TOKEN_COUNT // 2:
                return
    finally:
        await host.stop(0)
        await worker.close()
    raise AssertionError([len(legs) for legs in messages])


async def _messages_of_legs(address: str, name: str) -> list[set[int]]:
    """Which legs each message was about."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = worker_pb2_grpc.DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.DecodeMany(metadata=((TOKEN_KEY, cluster_token(SECRET)),))
        starts = []
        for number in sorted(LEGS):
            order = DecodeOrder(f"{name}.{number}", prompt(20, number), Sampling(), stop(LEG_TOKEN_COUNT))
            starts.append(pb.LegStart(leg_number=number, order=decode_request(order), timeout_s=WITHIN_S))
        await call.write(pb.DecodeManyRequest(starts=starts))
        messages: list[set[int]] = []
        finished: set[int] = set()
        async with asyncio.timeout(WITHIN_S):
            while finished != LEGS:
                message = await call.read()
                messages.append({*message.leg_numbers, *(each.leg_number for each in message.news)})
                finished |= {each.leg_number for each in message.news if each.events.HasField("finished")}
                await call.write(pb.DecodeManyRequest(taken_response_count=len(messages)))
        call.cancel()
        return messages

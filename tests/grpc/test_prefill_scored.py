"""A prompt's logprobs on the internal wire: in bounded parts, whole, and nothing held for a router that left."""

from __future__ import annotations

import asyncio

import pytest
from test_grpc_worker_client import RULE, eventually, hosted, prefill_order

from baton.errors import BatonError, Reason
from baton.leg import PrefillOrder, PromptLogprobs
from baton.request import EngineStop, Sampling
from engine.sim import simulated_answer
from prefill_worker.service import MAX_PART_BYTES, scores_to_proto

PROMPT = tuple(20 + index % 4000 for index in range(6000))


def order(count: int, **changes: object) -> PrefillOrder:
    values: dict[str, object] = {"stop": EngineStop(max_token_count=5), "lease_s": 60.0, **changes}
    return PrefillOrder("g.1", PROMPT, Sampling(), prompt_logprob_count=count, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 20])
async def test_scores_of_a_long_prompt_cross_the_wire_whole(count: int) -> None:
    async with hosted("p") as [(_, client)]:
        reply = await client.prefill(order(count), timeout_s=60)
        assert reply.prompt_logprobs == RULE.prompt_logprobs(PROMPT, count)
        assert reply.first_token_id == simulated_answer(PROMPT, 1, RULE)[0]
        assert reply.ticket
        assert await client.release_kv(reply.ticket_id, timeout_s=60)


async def test_parts_are_bounded_and_in_order() -> None:
    scores = RULE.prompt_logprobs(PROMPT, 20)
    parts = list(scores_to_proto(scores))
    assert len(parts) > 5
    assert max(part.ByteSize() for part in parts) <= MAX_PART_BYTES
    joined = PromptLogprobs(20)
    for part in parts:
        joined.extend(part.logprobs, part.ranks, part.top_token_ids, part.top_logprobs)
    assert joined == scores


async def test_a_prefill_without_scores_brings_none() -> None:
    async with hosted("p") as [(_, client)]:
        reply = await client.prefill(prefill_order(), timeout_s=60)
        assert reply.prompt_logprobs is None
        await client.release_kv(reply.ticket_id, timeout_s=60)


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.06, 0.08, 0.1, 0.15])
async def test_a_router_that_gives_up_in_the_middle_leaves_nothing_held(after_s: float) -> None:
    async with hosted("p") as [(worker, client)]:
        task = asyncio.create_task(client.prefill(order(20, lease_s=600.0), timeout_s=60))
        await asyncio.sleep(after_s)
        task.cancel()
        (reply,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(reply, BaseException):
            await client.release_kv(reply.ticket_id, timeout_s=60)
        await eventually(worker.is_idle)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (order(21), "prompt_logprob_count"),
        (order(-1), "prompt_logprob_count"),
        (order(1, output_token_count=3), "prompt_logprob_count"),
    ],
)
async def test_orders_that_make_no_sense_are_refused_before_the_engine(wrong: PrefillOrder, field: str) -> None:
    async with hosted("p") as [(_, client)]:
        with pytest.raises(BatonError) as caught:
            await client.prefill(wrong, timeout_s=60)
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert caught.value.violations[0].field == field


def test_packed_logprobs_are_a_sequence_with_nothing_for_the_first() -> None:
    scores = RULE.prompt_logprobs(PROMPT[:3], 2)
    assert scores[0] is None
    assert scores[1] is not None
    assert len(scores[1].top) == 2
    assert len(scores) == 3
    with pytest.raises(ValueError, match="not of the same tokens"):
        scores.extend([0.0], [1], [1], [0.0])

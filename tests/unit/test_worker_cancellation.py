"""Whenever a leg is cut short, nothing of it stays: cancelled at every await, closed early, its engine dead."""

from __future__ import annotations

import asyncio
import itertools
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import aclosing
from typing import Any

import pytest
from worker_pair import PROMPT, a_pair, decode_order, events_of, prefill_order, refusal

from baton.errors import BatonError, Reason
from baton.leg import DecodeOrder
from baton.request import EngineStop, Sampling
from baton.testing import in_virtual_time


@types.coroutine
def cancelled_at(coroutine: Coroutine[Any, Any, Any], which: int) -> Generator[Any, Any, Any]:
    """Runs ``coroutine`` and cancels its task when it suspends for the ``which``-th time."""
    steps, value, error = coroutine.__await__(), None, None
    for count in itertools.count(1):
        try:
            waited_for = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value
        if count == which:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        value = error = None
        try:
            value = yield waited_for
        except BaseException as thrown:
            error = thrown
    raise AssertionError


async def awaits_survived(scenario: Callable[[], Coroutine[Any, Any, Any]], settle: Callable[[], None]) -> int:
    """Cancels ``scenario`` at its first await, then its second, and so on until it completes; how many there were."""
    for which in itertools.count(1):
        assert which < 2000
        task = asyncio.ensure_future(_run(scenario(), which))
        try:
            await task
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)
            settle()
            continue
        return which - 1
    raise AssertionError


async def _run(coroutine: Coroutine[Any, Any, Any], which: int) -> Any:
    return await cancelled_at(coroutine, which)


@in_virtual_time
async def test_a_prefill_cancelled_at_any_await_leaves_no_lease_no_block_and_no_leg() -> None:
    async with a_pair() as pair:

        async def scenario() -> None:
            reply = await pair.prefill.prefill(prefill_order(lease_s=60.0))
            await pair.prefill.release_kv(reply.ticket_id)

        assert await awaits_survived(scenario, pair.assert_nothing_is_left) >= 4


@in_virtual_time
async def test_a_decode_cancelled_at_any_await_leaves_no_block_and_no_leg() -> None:
    async with a_pair() as pair:

        def settle() -> None:
            assert pair.decode.running_count == 0
            assert pair.decode_engine.load().used_block_count == 0
            assert pair.decode_engine.load().running_count == pair.decode_engine.load().waiting_count == 0

        numbers = itertools.count()

        async def scenario() -> None:
            # Another prompt each time: nothing is in a prefix cache, so that each decode pulls.
            prompt = (next(numbers) + 10, *PROMPT)
            reply = await pair.prefill.prefill(prefill_order(prompt_token_ids=prompt))
            try:
                await events_of(pair.decode, decode_order(reply, prompt_token_ids=(*prompt, reply.first_token_id)))
            finally:
                await pair.prefill.release_kv(reply.ticket_id)

        assert await awaits_survived(scenario, settle) >= 10


@in_virtual_time
async def test_a_decode_whose_generator_is_closed_early_frees_everything_at_once() -> None:
    async with a_pair() as pair:
        for event_count in range(1, 6):
            async with aclosing(pair.decode.decode(DecodeOrder("leg", PROMPT, Sampling(), EngineStop(8)))) as events:
                for _ in range(event_count):
                    await anext(events)
                assert pair.decode.running_count == 1
            pair.assert_nothing_is_left()
        assert pair.metric("baton_worker_legs_total", phase="decode", outcome="cancelled") == 5


@in_virtual_time
async def test_an_engine_that_dies_fails_what_is_in_hand_with_a_typed_error() -> None:
    async with a_pair() as pair:
        prefill = asyncio.create_task(pair.prefill.prefill(prefill_order()))
        decode = asyncio.create_task(events_of(pair.decode, DecodeOrder("leg", PROMPT, Sampling(), EngineStop(100))))
        await asyncio.sleep(0.001)
        pair.prefill_engine.kill()
        pair.decode_engine.kill()
        for task in (prefill, decode):
            with pytest.raises(BatonError) as caught:
                await task
            assert caught.value.reason is Reason.ENGINE_FAILED


@in_virtual_time
async def test_a_foreign_exception_is_named_by_its_type_and_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_pair() as pair:

        async def leaky(_: Any) -> Any:
            raise KeyError("the prompt: I love you")

        monkeypatch.setattr(pair.prefill_engine, "prefill", leaky)
        error = await refusal(pair.prefill.prefill(prefill_order()))
        assert error.reason is Reason.ENGINE_FAILED
        assert "KeyError" in error.message
        assert "love" not in error.message

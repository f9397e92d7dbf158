"""Prefill and decode workers in virtual time: what they refuse, hold, and let go of."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from contextlib import aclosing
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from worker_pair import PROMPT, RULE, SECRET, a_pair, decode_order, events_of, prefill_order, refusal, tokens_of

from baton.errors import BatonError, Reason
from baton.leg import DecodeDone, DecodeOrder, KvAdopted
from baton.metrics import WorkerMetrics
from baton.request import EngineStop, LegFinish, Sampling, Structure, StructureKind
from baton.testing import in_virtual_time, run_virtual
from decode_worker.config import DecodeLimits
from engine.load_board import LoadBoard
from engine.sim import simulated_answer
from kvtransfer.ticket import TransferLimits, open_ticket, seal
from prefill_worker.config import PrefillLimits

# The way it goes when all goes well ------------------------------------------------------------------------------


@in_virtual_time
async def test_a_request_prefilled_here_and_decoded_there_reads_as_if_computed_in_one_place() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order())
        assert pair.prefill.held_lease_count == 1
        events = await events_of(pair.decode, decode_order(reply))
        assert isinstance(events[0], KvAdopted)
        assert events[0].transfer_bytes > 0
        assert events[0].recomputed_token_count == 0
        assert events[-1] == DecodeDone(LegFinish.LENGTH)
        alone = await events_of(pair.decode, DecodeOrder("leg-3", PROMPT, Sampling(), EngineStop(max_token_count=8)))
        assert (
            [reply.first_token_id, *tokens_of(events)] == tokens_of(alone) == list(simulated_answer(PROMPT, 8, RULE))
        )
        assert await pair.prefill.release_kv(reply.ticket_id)
        assert not await pair.prefill.release_kv(reply.ticket_id)
        assert pair.metric("baton_worker_legs_total", phase="prefill", outcome="ok") == 1
        assert pair.metric("baton_worker_legs_total", phase="decode", outcome="ok") == 2
        assert pair.metric("baton_worker_decode_tokens_total") == 15
        assert pair.metric("baton_worker_decode_seconds_count") == 2
        assert pair.metric("baton_worker_decode_seconds_sum") > 0


@in_virtual_time
async def test_a_first_token_that_is_the_last_leaves_nothing_held() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order(stop=EngineStop(max_token_count=1)))
        assert (reply.finish, reply.ticket, reply.ticket_id) == (LegFinish.LENGTH, b"", "")
        first = reply.first_token_id
        reply = await pair.prefill.prefill(prefill_order(stop=EngineStop(8, stop_token_ids=(first,))))
        assert (reply.finish, reply.ticket) == (LegFinish.STOP, b"")
        pair.assert_nothing_is_left()


# Leases ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_lease_that_nobody_releases_ends_on_time_exactly_once() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order(lease_s=10.0))
        await asyncio.sleep(9.99)
        assert (pair.prefill.held_lease_count, pair.prefill_engine.held_count) == (1, 1)
        await asyncio.sleep(0.02)
        assert (pair.prefill.held_lease_count, pair.prefill_engine.held_count) == (0, 0)
        assert not await pair.prefill.release_kv(reply.ticket_id)
        assert not await pair.prefill.extend_lease(reply.ticket_id, 5.0)
        await asyncio.sleep(100)
        assert pair.metric("baton_worker_expired_leases_total") == 1


@in_virtual_time
async def test_each_of_many_leases_ends_at_its_own_time() -> None:
    async with a_pair() as pair:
        started = asyncio.get_running_loop().time()
        replies = await asyncio.gather(
            *(
                pair.prefill.prefill(prefill_order(leg_id=f"leg-{lease_s}", lease_s=lease_s))
                for lease_s in (30, 10, 20)
            )
        )
        assert len({reply.ticket_id for reply in replies}) == 3
        assert asyncio.get_running_loop().time() - started < 5
        for left, at in ((3, 9), (2, 15), (1, 25), (0, 36)):
            await asyncio.sleep(started + at - asyncio.get_running_loop().time())
            assert pair.prefill.held_lease_count == left


@in_virtual_time
async def test_an_extended_lease_lasts_longer_but_never_beyond_the_longest_hold() -> None:
    async with a_pair(PrefillLimits(max_hold_s=25.0)) as pair:
        reply = await pair.prefill.prefill(prefill_order(lease_s=10.0))
        for _ in range(5):
            await asyncio.sleep(4)
            assert await pair.prefill.extend_lease(reply.ticket_id, 10.0)
        await asyncio.sleep(4.9)
        assert pair.prefill.held_lease_count == 1
        await asyncio.sleep(0.2)
        assert pair.prefill.held_lease_count == 0
        for bad in (0.0, -1.0, 26.0, math.nan, math.inf):
            assert (await refusal(pair.prefill.extend_lease("t", bad))).reason is Reason.INVALID_REQUEST


@in_virtual_time
async def test_an_extension_that_shortens_is_kept_on_time_too() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order(lease_s=50.0))
        await asyncio.sleep(1)  # the reaper sleeps until the old end
        assert await pair.prefill.extend_lease(reply.ticket_id, 2.0)
        await asyncio.sleep(2.01)
        assert pair.prefill.held_lease_count == 0


@in_virtual_time
async def test_a_decode_after_the_lease_recomputes_instead_of_trusting_the_ticket() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order(lease_s=1.0))
        await asyncio.sleep(2)
        events = await events_of(pair.decode, decode_order(reply))
        assert events[0].recomputed_token_count > 0
        assert [reply.first_token_id, *tokens_of(events)] == list(simulated_answer(PROMPT, 8, RULE))


@in_virtual_time
async def test_an_engine_slow_to_release_delays_no_other_lease_and_close_waits_for_it() -> None:
    async with a_pair() as pair:
        await pair.prefill.prefill(prefill_order(lease_s=1.0))
        release, let_go = pair.prefill_engine.release, []

        async def slow(handle: str) -> None:
            await asyncio.sleep(20)
            let_go.append(handle)
            await release(handle)

        pair.prefill_engine.release = slow  # type: ignore[method-assign]
        reply = await pair.prefill.prefill(prefill_order(leg_id="leg-9", lease_s=2.0))
        await asyncio.sleep(5)
        assert pair.prefill.held_lease_count == 0
        assert not await pair.prefill.release_kv(reply.ticket_id)
        assert let_go == []
    assert len(let_go) == 2


@in_virtual_time
async def test_a_dead_engine_does_not_stop_the_reaper_and_its_failures_are_counted() -> None:
    async with a_pair() as pair:
        await pair.prefill.prefill(prefill_order(lease_s=1.0))
        await pair.prefill.prefill(prefill_order(leg_id="leg-2", lease_s=3.0))
        pair.prefill_engine.kill()
        await asyncio.sleep(2)
        assert pair.prefill.held_lease_count == 1
        await asyncio.sleep(2)
        assert pair.prefill.held_lease_count == 0
        assert pair.metric("baton_worker_failed_releases_total") == 2
        error = await refusal(pair.prefill.prefill(prefill_order()))
        assert error.reason is Reason.ENGINE_FAILED


# Tickets ---------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_every_wrong_ticket_is_refused_typed_counted_and_leaves_the_right_one_usable() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order())
        ticket = open_ticket(reply.ticket, SECRET)
        first = reply.first_token_id
        other = (*PROMPT[:7], PROMPT[7] + 1, *PROMPT[8:], first)
        wrong: list[tuple[str, DecodeOrder]] = [
            ("format", decode_order(reply, ticket=b"nonsense")),
            ("signature", decode_order(reply, ticket=seal(ticket, bytes(32)))),
            ("signature", decode_order(reply, ticket=reply.ticket[:-1])),
            ("prompt_token_count", decode_order(reply, prompt_token_ids=PROMPT)),
            ("prompt_token_count", decode_order(reply, prompt_token_ids=(*PROMPT, first, first))),
            ("first_token", decode_order(reply, prompt_token_ids=(*PROMPT, first + 1))),
            ("prompt_digest", decode_order(reply, prompt_token_ids=other)),
            ("tenant", decode_order(reply, tenant="somebody")),
            (
                "own_worker",
                decode_order(reply, ticket=seal(dataclasses.replace(ticket, worker_id="decode-0"), SECRET)),
            ),
        ]
        for check, order in wrong:
            error = await refusal(events_of(pair.decode, order))
            assert (error.reason, error.metadata["check"]) == (Reason.TICKET_REFUSED, check)
            assert pair.metric("baton_worker_refused_tickets_total", check=check) >= 1
        assert (await events_of(pair.decode, decode_order(reply)))[0].recomputed_token_count == 0
        error = await refusal(events_of(pair.decode, decode_order(reply)))
        assert error.metadata["check"] == "replayed"
        await pair.prefill.release_kv(reply.ticket_id)


@in_virtual_time
async def test_kv_is_handed_over_within_a_tenant_only() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order(tenant="ours"))
        for stranger in ("", "our", "ours "):
            error = await refusal(events_of(pair.decode, decode_order(reply, tenant=stranger)))
            assert error.metadata["check"] == "tenant"
        adopted, *_ = await events_of(pair.decode, decode_order(reply, tenant="ours"))
        assert adopted.recomputed_token_count == 0
        await pair.prefill.release_kv(reply.ticket_id)


@in_virtual_time
async def test_only_the_tickets_of_allowed_workers_are_accepted() -> None:
    async with a_pair(decode_limits=DecodeLimits(allowed_prefill_workers=("prefill-7",))) as pair:
        reply = await pair.prefill.prefill(prefill_order())
        error = await refusal(events_of(pair.decode, decode_order(reply)))
        assert error.metadata["check"] == "worker"


@in_virtual_time
async def test_an_engine_whose_parameters_no_puller_would_accept_fails_here_and_holds_nothing() -> None:
    async with a_pair(PrefillLimits(transfer=TransferLimits(max_token_count=10))) as pair:
        error = await refusal(pair.prefill.prefill(prefill_order()))
        assert error.reason is Reason.INTERNAL
        pair.assert_nothing_is_left()


# Orders ----------------------------------------------------------------------------------------------------------

BAD_ORDERS: list[tuple[str, dict[str, Any]]] = [
    ("leg_id", {"leg_id": ""}),
    ("leg_id", {"leg_id": "x" * 129}),
    ("leg_id", {"leg_id": "a b"}),
    ("prompt_token_ids", {"prompt_token_ids": ()}),
    ("prompt_token_ids", {"prompt_token_ids": (1, -1)}),
    ("prompt_token_ids", {"prompt_token_ids": (1, RULE.vocab_size)}),
    ("prompt", {"prompt_token_ids": (1,) * 8192}),
    ("stop.max_token_count", {"stop": EngineStop(0)}),
    ("stop.max_token_count", {"stop": EngineStop(8192 - len(PROMPT) + 1)}),
    ("stop.stop_token_ids", {"stop": EngineStop(3, stop_token_ids=(RULE.vocab_size,))}),
    ("stop.stop_token_ids", {"stop": EngineStop(3, stop_token_ids=(1,) * 1025)}),
    ("sampling.temperature", {"sampling": Sampling(temperature=math.nan)}),
    ("sampling.temperature", {"sampling": Sampling(temperature=-0.1)}),
    ("sampling.top_p", {"sampling": Sampling(top_p=0.0)}),
    ("sampling.top_k", {"sampling": Sampling(top_k=-1)}),
    ("sampling.min_p", {"sampling": Sampling(min_p=1.5)}),
    ("sampling.seed", {"sampling": Sampling(seed=-1)}),
    ("sampling.temperature", {"sampling": Sampling(temperature=2.1)}),
    ("sampling.presence_penalty", {"sampling": Sampling(presence_penalty=2.1)}),
    ("sampling.presence_penalty", {"sampling": Sampling(presence_penalty=math.nan)}),
    ("sampling.frequency_penalty", {"sampling": Sampling(frequency_penalty=-2.1)}),
    ("sampling.repetition_penalty", {"sampling": Sampling(repetition_penalty=0.0)}),
    ("sampling.repetition_penalty", {"sampling": Sampling(repetition_penalty=math.inf)}),
    ("sampling.logit_bias", {"sampling": Sampling(logit_bias=((RULE.vocab_size, 1.0),))}),
    ("sampling.logit_bias", {"sampling": Sampling(logit_bias=((1, 1.0), (1, 2.0)))}),
    ("sampling.logit_bias", {"sampling": Sampling(logit_bias=((1, math.nan),))}),
    ("sampling.logit_bias", {"sampling": Sampling(logit_bias=((1, -math.inf),))}),
    ("sampling.logit_bias", {"sampling": Sampling(logit_bias=tuple((each, 1.0) for each in range(1025)))}),
    ("sampling.allowed_token_ids", {"sampling": Sampling(allowed_token_ids=(-1,))}),
    ("sampling.allowed_token_ids", {"sampling": Sampling(allowed_token_ids=(1,) * (RULE.vocab_size + 1))}),
    ("sampling.allowed_token_ids", {"sampling": Sampling(allowed_token_ids=(5,), bad_token_sequences=((5,),))}),
    ("sampling.bad_token_sequences", {"sampling": Sampling(bad_token_sequences=((),))}),
    ("sampling.bad_token_sequences", {"sampling": Sampling(bad_token_sequences=((1, RULE.vocab_size),))}),
    ("sampling.bad_token_sequences", {"sampling": Sampling(bad_token_sequences=((1,) * 17,))}),
    ("sampling.bad_token_sequences", {"sampling": Sampling(bad_token_sequences=((1,),) * 65)}),
    ("sampling.structure", {"sampling": Sampling(structure=Structure(StructureKind.REGEX, "(" * 99))}),
    ("stop.min_token_count", {"stop": EngineStop(3, min_token_count=-1)}),
    ("stop.min_token_count", {"stop": EngineStop(3, min_token_count=8193)}),
    ("output_token_count", {"output_token_count": -1}),
    ("output_token_count", {"output_token_count": len(PROMPT)}),
    ("top_logprob_count", {"top_logprob_count": 21}),
    ("top_logprob_count", {"top_logprob_count": -1}),
    ("tenant", {"tenant": "x" * 129}),
]


@pytest.mark.parametrize(("field", "changes"), BAD_ORDERS, ids=lambda value: str(value)[:40])
def test_an_order_that_breaks_a_rule_never_reaches_the_engine(
    field: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with a_pair() as pair:

            def no_engine(*_: Any) -> Any:
                raise AssertionError("the engine saw a bad order")

            monkeypatch.setattr(pair.prefill_engine, "prefill", no_engine)
            monkeypatch.setattr(pair.decode_engine, "decode", no_engine)
            order = DecodeOrder("leg-1", PROMPT, Sampling(), EngineStop(8))
            for error in (
                await refusal(pair.prefill.prefill(prefill_order(**changes))),
                await refusal(events_of(pair.decode, dataclasses.replace(order, **changes))),
            ):
                assert error.status.value == "INVALID_ARGUMENT"
                assert [violation.field for violation in error.violations] == [field]
            assert pair.metric("baton_worker_legs_total", phase="prefill", outcome="rejected") == 1
            assert pair.metric("baton_worker_legs_total", phase="decode", outcome="rejected") == 1

    run_virtual(scenario())


@in_virtual_time
async def test_every_broken_rule_is_listed_and_leases_have_a_range() -> None:
    async with a_pair() as pair:
        order = prefill_order(leg_id="", lease_s=3601.0, stop=EngineStop(0))
        error = await refusal(pair.prefill.prefill(order))
        assert {v.field for v in error.violations} == {"leg_id", "lease_s", "stop.max_token_count"}
        for bad in (0.0, -1.0, math.nan, math.inf):
            error = await refusal(pair.prefill.prefill(prefill_order(lease_s=bad)))
            assert [v.field for v in error.violations] == ["lease_s"]


@in_virtual_time
async def test_what_does_not_fit_is_refused_with_a_time_to_come_back_and_nothing_queues_here() -> None:
    async with a_pair(PrefillLimits(max_leg_count=2), DecodeLimits(max_leg_count=1)) as pair:
        tasks = [asyncio.create_task(pair.prefill.prefill(prefill_order(leg_id=f"leg-{i}"))) for i in range(2)]
        await asyncio.sleep(0)
        assert pair.prefill.running_count == 2
        error = await refusal(pair.prefill.prefill(prefill_order(leg_id="leg-3")))
        assert (error.reason, error.status.value) == (Reason.QUEUE_FULL, "RESOURCE_EXHAUSTED")
        assert error.retry_after_s is not None
        await asyncio.gather(*tasks)
        async with aclosing(pair.decode.decode(DecodeOrder("d", PROMPT, Sampling(), EngineStop(8)))) as events:
            await anext(events)
            error = await refusal(events_of(pair.decode, DecodeOrder("e", PROMPT, Sampling(), EngineStop(8))))
            assert error.reason is Reason.QUEUE_FULL


@in_virtual_time
async def test_a_prefill_is_refused_before_it_computes_when_its_kv_might_find_no_place() -> None:
    async with a_pair(PrefillLimits(max_held_count=2)) as pair:
        await pair.prefill.prefill(prefill_order())
        second = asyncio.create_task(pair.prefill.prefill(prefill_order(leg_id="leg-2")))
        await asyncio.sleep(0)
        assert (await refusal(pair.prefill.prefill(prefill_order(leg_id="leg-3")))).reason is Reason.QUEUE_FULL
        reply = await second
        await pair.prefill.release_kv(reply.ticket_id)
        await pair.prefill.prefill(prefill_order(leg_id="leg-3"))


# Drain and load --------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_draining_refuses_new_legs_and_waits_for_legs_and_leases() -> None:
    async with a_pair() as pair:
        reply = await pair.prefill.prefill(prefill_order(lease_s=10.0))
        running = asyncio.create_task(pair.prefill.prefill(prefill_order(leg_id="leg-2", lease_s=5.0)))
        await asyncio.sleep(0)
        assert await pair.prefill.drain(0.001) == 2
        assert (await refusal(pair.prefill.prefill(prefill_order()))).reason is Reason.DRAINING
        started = asyncio.get_running_loop().time()
        assert await pair.prefill.drain(60.0) == 0  # the second lease ends by itself after 5 s, the first after 10
        assert 9 < asyncio.get_running_loop().time() - started < 11
        assert (await running).ticket_id != reply.ticket_id

        stream = asyncio.create_task(events_of(pair.decode, DecodeOrder("l", PROMPT, Sampling(), EngineStop(8))))
        await asyncio.sleep(0)
        assert await pair.decode.drain(60.0) == 0
        assert stream.done() or await stream
        error = await refusal(events_of(pair.decode, DecodeOrder("m", PROMPT, Sampling(), EngineStop(8))))
        assert error.reason is Reason.DRAINING


@in_virtual_time
async def test_closing_lets_go_of_all_and_a_prefill_that_ends_after_it_holds_nothing() -> None:
    async with a_pair() as pair:
        await pair.prefill.prefill(prefill_order())
        late = asyncio.create_task(pair.prefill.prefill(prefill_order(leg_id="leg-2")))
        await asyncio.sleep(0)
        await pair.prefill.close()
        await pair.prefill.close()
        assert pair.prefill_engine.held_count == 0
        with pytest.raises(BatonError):
            await late
        pair.assert_nothing_is_left()


@in_virtual_time
async def test_the_load_board_counts_legs_and_leases_and_wakes_who_waits_for_a_change() -> None:
    async with a_pair() as pair:
        board = LoadBoard(
            pair.prefill_engine, [pair.prefill], epoch="e1", metrics=WorkerMetrics(CollectorRegistry(), "w")
        )
        loop = asyncio.get_running_loop()
        before, started = board.version, loop.time()
        await board.wait_past(before, 5.0)
        assert loop.time() - started == pytest.approx(5.0)
        task = asyncio.create_task(pair.prefill.prefill(prefill_order()))
        started = loop.time()
        await board.wait_past(before, 5.0)
        assert loop.time() == started
        load = board.current()
        assert load.running_count + load.waiting_count == 1
        reply = await task
        load = board.current()
        assert (load.running_count, load.waiting_count, load.held_lease_count) == (0, 0, 1)
        assert load.used_block_count > 0
        await pair.prefill.release_kv(reply.ticket_id)
        assert board.current().held_lease_count == 0
        await board.drain(1.0)
        assert board.current().is_draining


@in_virtual_time
async def test_a_worker_says_what_it_is_doing_and_no_prompt() -> None:
    async with a_pair() as pair:
        await pair.prefill.prefill(prefill_order())
        assert repr(pair.prefill) == "<PrefillWorker prefill-0 [0 prefilling | 1 held, 0 letting go]>"
        assert repr(pair.decode) == "<DecodeWorker decode-0 [0 decoding | 0 tickets used]>"


@in_virtual_time
async def test_a_caller_that_never_saw_the_answer_releases_by_the_name_of_its_leg() -> None:
    async with a_pair() as pair:
        await pair.prefill.prefill(prefill_order(leg_id="lost-answer", lease_s=3000.0))
        assert await pair.prefill.release_kv("lost-answer")
        pair.assert_nothing_is_left()


@in_virtual_time
async def test_a_release_that_overtakes_its_prefill_is_kept_until_the_kv_is_held() -> None:
    async with a_pair() as pair:
        running = asyncio.create_task(pair.prefill.prefill(prefill_order(leg_id="given-up", lease_s=3000.0)))
        await asyncio.sleep(0.001)
        assert not await pair.prefill.release_kv("given-up")
        with pytest.raises(BatonError, match="released before it was ready"):
            await running
        pair.assert_nothing_is_left()


@in_virtual_time
async def test_releases_of_ids_too_long_for_any_leg_are_not_remembered() -> None:
    async with a_pair() as pair:
        assert not await pair.prefill.release_kv("x" * 129)
        assert not await pair.prefill.release_kv("x" * 128)
        assert len(pair.prefill._released_early) == 1

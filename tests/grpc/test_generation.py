"""GenerationService over real sockets: router, workers and simulated engines in one process."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from sim_cluster import CONTEXT, FAST, MODEL, RULE, SECRET, TOKENIZER, SimCluster, sim_cluster

from baton.client import BatonClient, Chunk, Event, Finished, Started
from baton.errors import BatonError, Reason, StatusName
from baton.request import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    OutputOptions,
    PlacementMode,
    Prompt,
    Sampling,
    StopConditions,
    TokenPrompt,
)
from baton.sync_client import BatonClientSync
from baton.timeline import Phase
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from engine.cost import CostModel, DecodeCost
from engine.sim_config import PhaseDelays
from engine.sim_tokens import TokenRule, simulated_answer
from router.grpc_worker_client import GrpcWorkerClient

PROMPT = "Once upon a time there was a small model"
BOTH = OutputOptions(wants_token_ids=True)


async def collect(client: BatonClient, prompt: str | list[int] | Prompt, **options: Any) -> list[Event]:
    options.setdefault("timeout", 60)
    async with aclosing(client.generate(prompt, **options)) as events:
        return [event async for event in events]


def said(events: list[Event]) -> tuple[str, tuple[int, ...], Finished]:
    finished = events[-1]
    assert isinstance(finished, Finished)
    chunks = [event for event in events if isinstance(event, Chunk)]
    ids = tuple(token_id for chunk in chunks for token_id in chunk.token_ids)
    return "".join(chunk.text for chunk in chunks), ids, finished


def answer_to(text: str, count: int, rule: TokenRule = RULE) -> tuple[int, ...]:
    return simulated_answer(TOKENIZER.encode(text), count, rule)


def at_most(count: int, **stop: Any) -> StopConditions:
    return StopConditions(max_output_token_count=count, **stop)


async def test_text_ids_usage_and_phases_of_a_split_answer(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        events = await collect(client, PROMPT, stop=at_most(40), output=BOTH)
        expected = answer_to(PROMPT, 40)
        text, ids, finished = said(events)
        prompt_token_count = len(TOKENIZER.encode(PROMPT))
        assert isinstance(events[0], Started)
        assert (events[0].model, events[0].prompt_token_count) == (MODEL, prompt_token_count)
        assert ids == expected
        assert text == TOKENIZER.decode(expected)
        assert finished.reason is FinishReason.MAX_OUTPUT_TOKENS
        assert (finished.usage.prompt_token_count, finished.usage.output_token_count) == (prompt_token_count, 40)
        phases = finished.phases
        assert phases.placement_mode is PlacementMode.SPLIT
        assert (phases.prefill_worker_id, phases.decode_worker_id) == ("prefill-0", "decode-0")
        assert phases.kv_transfer_bytes > 0
        assert phases.attempt_count == 1


async def test_the_client_gets_only_what_it_asked_for(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        text, ids, _ = said(await collect(client, PROMPT, stop=at_most(5)))
        assert text
        assert ids == ()
        only_ids = OutputOptions(wants_text=False, wants_token_ids=True)
        text, ids, _ = said(await collect(client, PROMPT, stop=at_most(5), output=only_ids))
        assert (text, ids) == ("", answer_to(PROMPT, 5))


async def test_text_token_and_chat_prompts_of_the_same_tokens_get_the_same_answer(tmp_path: Path) -> None:
    chat = ChatPrompt((ChatMessage("user", "hi"),))
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        answers = {
            said(await collect(client, prompt, stop=at_most(8), output=BOTH))[1]
            for prompt in (chat, rendered, TokenPrompt(TOKENIZER.encode(rendered)))
        }
        assert answers == {answer_to(rendered, 8)}


async def test_one_token_is_answered_by_prefill_alone(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        _, ids, finished = said(await collect(client, PROMPT, stop=at_most(1), output=BOTH))
        assert ids == answer_to(PROMPT, 1)
        assert finished.phases.placement_mode is PlacementMode.PREFILL_ONLY
        assert finished.phases.decode_worker_id == ""


async def test_an_answer_that_fills_the_context_says_so(tmp_path: Path) -> None:
    prompt = [5] * (CONTEXT - 3)
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        for stop in (StopConditions(), at_most(4)):
            _, ids, finished = said(await collect(client, prompt, stop=stop, output=BOTH))
            assert len(ids) == 3
            assert finished.reason is FinishReason.CONTEXT_FULL
        _, _, finished = said(await collect(client, prompt, stop=at_most(3)))
        assert finished.reason is FinishReason.MAX_OUTPUT_TOKENS


async def test_workers_with_less_context_than_the_model_set_the_limit(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim={"max_context_token_count": 512}) as cluster,
        BatonClient(cluster.endpoint.address) as client,
    ):
        with pytest.raises(BatonError) as refused:
            await collect(client, [5] * 512)
        assert refused.value.metadata["max_prompt_token_count"] == "511"
        _, _, finished = said(await collect(client, [5] * 510))
        assert (finished.usage.output_token_count, finished.reason) == (2, FinishReason.CONTEXT_FULL)


async def test_a_stop_sequence_across_tokens_ends_the_text_before_it_and_frees_everything(tmp_path: Path) -> None:
    whole = TOKENIZER.decode(answer_to(PROMPT, 60))
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        windows = [whole[start : start + 3] for start in range(len(whole) - 3)]
        # A replacement character stands for bytes that a later token may yet complete: not one to stop at.
        sequences = [window for window in windows if "\ufffd" not in window]
        assert len(sequences) > 10
        for sequence in sequences[:2] + sequences[5::5]:
            stop = at_most(60, stop_sequences=("never there", sequence))
            events = await collect(client, PROMPT, stop=stop, output=BOTH)
            text, ids, finished = said(events)
            assert text == whole[: whole.index(sequence)]
            assert finished.reason is FinishReason.STOP
            assert finished.matched_stop_sequence == sequence
            assert len(ids) == finished.usage.output_token_count < 60
            assert sequence in TOKENIZER.decode(ids)
            assert sequence not in TOKENIZER.decode(ids[:-1])
            await cluster.until_balanced()


async def test_a_stop_token_is_counted_and_sent_as_id_but_not_as_text(tmp_path: Path) -> None:
    expected = answer_to(PROMPT, 40)
    stop_token_id = expected[12]
    cut = expected[: expected.index(stop_token_id) + 1]
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        stop = at_most(40, stop_token_ids=(stop_token_id,))
        text, ids, finished = said(await collect(client, PROMPT, stop=stop, output=BOTH))
        assert ids == cut
        assert text == TOKENIZER.decode(cut[:-1])
        assert finished.reason is FinishReason.STOP
        assert finished.matched_stop_token_id == stop_token_id


async def test_the_models_end_of_sequence_ends_it_unless_told_otherwise(tmp_path: Path) -> None:
    prompt_token_count = len(TOKENIZER.encode(PROMPT))
    rule = TokenRule(
        vocab_size=RULE.vocab_size,
        special_token_count=3,
        eos_token_id=2,
        eos_when=lambda n: n == prompt_token_count + 4,
    )
    async with (
        sim_cluster(tmp_path, sim={"tokens": rule}) as cluster,
        BatonClient(cluster.endpoint.address) as client,
    ):
        text, ids, finished = said(await collect(client, PROMPT, stop=at_most(9), output=BOTH))
        assert len(ids) == 5
        assert ids[-1] == 2
        assert "<|im_end|>" not in text
        assert (finished.reason, finished.matched_stop_token_id) == (FinishReason.STOP, 2)
        _, ids, finished = said(await collect(client, PROMPT, stop=at_most(9, ignore_eos=True), output=BOTH))
        assert len(ids) == 9
        assert finished.reason is FinishReason.MAX_OUTPUT_TOKENS


async def test_no_chunk_has_more_tokens_than_asked_for_and_none_holds_half_a_character(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        one = OutputOptions(wants_token_ids=True, max_chunk_token_count=1)
        events = await collect(client, PROMPT, stop=at_most(50), output=one)
        assert all(event.token_count <= 1 for event in events if isinstance(event, Chunk))
        assert said(events)[0] == TOKENIZER.decode(answer_to(PROMPT, 50))


async def test_the_client_without_an_event_loop_gives_the_same_answers_and_errors(tmp_path: Path) -> None:
    def converse(address: str) -> tuple[list[Event], Reason]:
        with BatonClientSync(address) as client:
            events = list(client.generate(PROMPT, timeout=60, stop=at_most(6), output=BOTH))
            leaving = client.chat([("user", "hi")], timeout=60)
            assert isinstance(next(leaving), Started)
            leaving.close()
            with pytest.raises(BatonError) as refused:
                list(client.generate("", timeout=60))
            return events, refused.value.reason

    async with sim_cluster(tmp_path) as cluster:
        events, reason = await asyncio.to_thread(converse, cluster.endpoint.address)
        assert said(events)[1] == answer_to(PROMPT, 6)
        assert reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    ("prompt", "options", "reason", "word"),
    [
        ("", {}, Reason.INVALID_REQUEST, "prompt"),
        ([], {}, Reason.INVALID_REQUEST, "token_ids.ids"),
        ([1, 10**6], {}, Reason.INVALID_REQUEST, "token_ids.ids[1]"),
        ([-1], {}, Reason.INVALID_REQUEST, "token_ids.ids[0]"),
        (ChatPrompt(()), {}, Reason.INVALID_REQUEST, "chat.messages"),
        (ChatPrompt((ChatMessage("robot", "x"),)), {}, Reason.INVALID_REQUEST, "chat.messages[0]"),
        ("hi", {"sampling": Sampling(temperature=math.nan)}, Reason.INVALID_REQUEST, "sampling.temperature"),
        ("hi", {"sampling": Sampling(top_p=-1.0)}, Reason.INVALID_REQUEST, "sampling.top_p"),
        ("hi", {"stop": StopConditions(0)}, Reason.INVALID_REQUEST, "max_output_token_count"),
        ("hi", {"priority": 1000}, Reason.INVALID_REQUEST, "priority"),
        ("hi", {"model": "gpt-9"}, Reason.MODEL_NOT_FOUND, "gpt-9"),
        ([5] * CONTEXT, {}, Reason.PROMPT_TOO_LONG, str(CONTEXT - 1)),
        ("word " * 20_000, {}, Reason.PROMPT_TOO_LONG, str(CONTEXT - 1)),
        ("w" * 7_000_000, {}, Reason.PROMPT_TOO_LONG, "at least"),
        (ChatPrompt((ChatMessage("user", "word " * 20_000),)), {}, Reason.PROMPT_TOO_LONG, str(CONTEXT - 1)),
        ("w" * (64 << 20), {}, Reason.INVALID_REQUEST, "too large"),
    ],
    ids=lambda value: f"{str(value)[:20]}",
)
async def test_bad_input_gets_a_typed_answer_and_harms_nobody(
    tmp_path: Path, prompt: str | list[int] | Prompt, options: dict[str, Any], reason: Reason, word: str
) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        with pytest.raises(BatonError) as refused:
            await collect(client, prompt, **options)
        assert refused.value.reason is reason
        assert word in str(refused.value)
        assert all(worker.engine.load().used_block_count == 0 for worker in cluster.workers.values())
        assert said(await collect(client, PROMPT, stop=at_most(3), output=BOTH))[1] == answer_to(PROMPT, 3)


async def test_every_violation_of_a_request_arrives(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        with pytest.raises(BatonError) as refused:
            await collect(client, "", sampling=Sampling(temperature=9.0, top_k=-2), stop=StopConditions(0))
        assert [violation.field for violation in refused.value.violations] == [
            "prompt",
            "sampling.temperature",
            "sampling.top_k",
            "stop.max_output_token_count",
        ]


SLOW = CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.02, per_context_token_s=0.0, per_sequence_s=0.0))


async def test_a_deadline_names_its_phase_and_leaves_nothing_behind(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_deadline_s": 1.0, "default_deadline_s": 1.0}
    async with (
        sim_cluster(tmp_path, sim={"cost": SLOW}, **limits) as cluster,
        BatonClient(cluster.endpoint.address) as client,
    ):
        with pytest.raises(BatonError) as passed:
            await collect(client, PROMPT)  # the router's limit: of a caller's own, gRPC may speak before the router
        assert passed.value.status is StatusName.DEADLINE_EXCEEDED
        assert passed.value.metadata["phase"] == "decode"
        assert int(passed.value.metadata["emitted_token_count"]) > 5
        with cluster.standing():
            await cluster.until_balanced()
            with pytest.raises(BatonError) as passed:
                await collect(client, PROMPT, timeout=0.2)
            assert passed.value.status is StatusName.DEADLINE_EXCEEDED
            await cluster.until_balanced()


async def test_a_longer_deadline_than_allowed_is_cut_and_an_absent_one_is_filled_in(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_deadline_s": 0.4, "default_deadline_s": 0.3}
    async with sim_cluster(tmp_path, sim={"cost": SLOW}, **limits) as cluster:
        async with BatonClient(cluster.endpoint.address) as client:
            with pytest.raises(BatonError) as passed:
                await collect(client, PROMPT, timeout=60)  # more than the whole answer takes
            assert passed.value.reason is Reason.DEADLINE_EXCEEDED
        async with grpc.aio.insecure_channel(cluster.endpoint.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                _ = [response async for response in stub.Generate(pb.GenerateRequest(text=PROMPT))]
            assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_storm_of_cancels_leaves_the_books_balanced(tmp_path: Path) -> None:
    rng = random.Random(7)

    async def one(client: BatonClient) -> None:
        leave_after = rng.randrange(0, 12)
        async with aclosing(client.generate(PROMPT, timeout=60, stop=at_most(500))) as events:
            async for _ in events:
                leave_after -= 1
                if leave_after < 0:
                    return

    async def cut(client: BatonClient) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.random() * 0.1):
                await collect(client, PROMPT, stop=at_most(500))

    async with sim_cluster(tmp_path) as cluster:
        async with BatonClient(cluster.endpoint.address) as client:
            storm = [asyncio.create_task(one(client) if n % 2 else cut(client)) for n in range(60)]
            await cluster.until(lambda: sum(task.done() for task in storm) >= 30, "half of them have left")
            with cluster.standing():  # none of the others ends by itself
                for task in storm:
                    task.cancel()
                await asyncio.wait(storm)
                assert any(task.cancelled() for task in storm)
                assert all(task.cancelled() or task.exception() is None for task in storm)
                await cluster.until_balanced()
            assert said(await collect(client, PROMPT, stop=at_most(3), output=BOTH))[1] == answer_to(PROMPT, 3)
        async with BatonClient(cluster.endpoint.address) as client:
            tasks = [asyncio.create_task(collect(client, PROMPT, stop=at_most(500))) for _ in range(10)]
            await cluster.until(lambda: cluster.server.generation.call_count == 10, "ten calls")
            with cluster.standing():
                await client.close()  # a disconnect of all at once
                await asyncio.gather(*tasks, return_exceptions=True)
                await cluster.until_balanced()


async def test_phases_add_up_to_no_less_than_the_work_and_no_more_than_the_clients_clock_says(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster, BatonClient(cluster.endpoint.address) as client:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        _, _, finished = said(await collect(client, PROMPT, stop=at_most(40)))
        client_s = loop.time() - began_at
        work_s = FAST.prefill.base_s + 39 * SLOW.decode.base_s
        assert work_s - 1e-3 < finished.phases.total_s < client_s
        assert sum(finished.phases.seconds.values()) == pytest.approx(finished.phases.total_s)


PHASE_DELAYS = {
    Phase.QUEUE: ("prefill-0", "queue"),
    Phase.PREFILL: ("prefill-0", "prefill"),
    Phase.HANDOFF_WAIT: ("decode-0", "queue"),
    Phase.KV_TRANSFER: ("decode-0", "transfer"),
    Phase.DECODE_WAIT: ("decode-0", "decode_wait"),
    Phase.DECODE: ("decode-0", "decode"),
}


@pytest.mark.parametrize("phase", list(Phase))
async def test_a_delay_put_into_one_phase_shows_in_that_phase_alone(tmp_path: Path, phase: Phase) -> None:
    delay_s = 0.3
    worker_id, delayed = PHASE_DELAYS[phase]
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:

        async def least() -> dict[Phase, float]:
            """Of three, for each phase: what a busy machine adds now and then is not the request's."""
            seen = [said(await collect(client, PROMPT, stop=at_most(2)))[2].phases for _ in range(3)]
            return {each: min(phases[each] for phases in seen) for each in Phase}

        cluster.workers[worker_id].engine.extra_delay_s = PhaseDelays(**{delayed: delay_s})
        after = await least()
        assert after[phase] >= delay_s - 1e-3
        assert all(after[each] < delay_s / 2 for each in Phase if each is not phase), after


async def test_a_refused_call_is_retried_by_grpc_because_nothing_was_sent_yet(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        await collect(client, "warm", stop=at_most(1))
        cluster.server.generation.begin_drain()
        ended = cluster.server.generation.ended_count
        with pytest.raises(BatonError) as refused:
            await collect(client, PROMPT)
        assert refused.value.reason is Reason.DRAINING
        assert cluster.server.generation.ended_count - ended == 3  # headers before the status would make it 1


async def test_without_a_worker_a_call_is_unavailable_before_its_deadline(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, max_no_worker_wait_s=0.05) as cluster,
        BatonClient(cluster.endpoint.address) as client,
    ):
        cluster.set_workers()
        with pytest.raises(BatonError) as refused:
            await collect(client, PROMPT)
        assert refused.value.status is StatusName.UNAVAILABLE
        assert refused.value.reason is Reason.NO_WORKER
        cluster.set_workers(*cluster.workers)
        assert said(await collect(client, PROMPT, stop=at_most(3), output=BOTH))[1] == answer_to(PROMPT, 3)


async def test_the_address_of_a_worker_that_cannot_be_reached_is_not_the_callers_to_know(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, max_attempt_count=1) as cluster, BatonClient(cluster.endpoint.address) as client:
        nobody = GrpcWorkerClient("127.0.0.1:1", SECRET)
        cluster.server.roster._entries["prefill-0"].client.prefill = nobody.prefill  # type: ignore[method-assign]
        try:
            with pytest.raises(BatonError) as failed:
                await client.complete("hi", timeout=60)
        finally:
            await nobody.close()
    assert failed.value.reason is Reason.ATTEMPTS_EXHAUSTED
    assert "the connection to a worker was lost" in failed.value.message
    assert "127.0.0.1:1" not in failed.value.message + str(failed.value.metadata)


async def test_a_worker_that_dies_in_mid_stream_is_not_seen_by_the_client(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, decode_count=2, sim={"cost": SLOW}) as cluster,
        BatonClient(cluster.endpoint.address) as client,
    ):
        ids: list[int] = []
        finished: Finished | None = None
        async with aclosing(client.generate(PROMPT, timeout=60, stop=at_most(30), output=BOTH)) as events:
            async for event in events:
                match event:
                    case Chunk():
                        ids += event.token_ids
                        if len(ids) == 10:
                            _kill_the_busy_decoder(cluster)
                    case Finished():
                        finished = event
        assert tuple(ids) == answer_to(PROMPT, 30)
        assert finished is not None
        assert finished.phases.attempt_count == 2
        for worker in [w for w in cluster.workers.values() if w.is_gone]:
            del cluster.workers[worker.worker_id]  # a dead process has no books


def _kill_the_busy_decoder(cluster: SimCluster) -> None:
    for worker in cluster.workers.values():
        if worker.worker_id.startswith("decode") and worker.board.current().running_count:
            worker.is_gone = True
            worker.engine.kill()

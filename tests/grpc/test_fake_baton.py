"""The fake Baton and both clients over real sockets: it says what it was told to, and knows what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.client import Answer, BatonClient, Chunk, Event, Finished, PromptPart, Started, chat_prompt
from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    Interrupted,
    InvalidRequest,
    ModelNotFound,
    NotPermitted,
    Overloaded,
    PromptTooLong,
    Reason,
    ResumeFailed,
    Unauthenticated,
    Unavailable,
    attempts_exhausted,
    queue_full,
)
from baton.pytest_plugin import fake_baton  # noqa: F401  # here baton-client is not installed, but its tree
from baton.request import (
    ChatMessage,
    FinishReason,
    OutputOptions,
    ResumeOptions,
    Sampling,
    StopConditions,
    TextPrompt,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from baton.sync_client import BatonClientSync
from baton.testing import FakeBaton
from baton.testing.fake_service import FakeState, attach

BOTH = OutputOptions(wants_token_ids=True)
QUICK: dict[str, Any] = {"timeout": 60.0}


class Blocking:
    """The client of threads, spoken to like the other one, so that one test tries both."""

    def __init__(self, client: BatonClientSync) -> None:
        self._client = client

    async def complete(self, *arguments: Any, **options: Any) -> Answer:
        return await asyncio.to_thread(self._client.complete, *arguments, **options)

    async def complete_chat(self, *arguments: Any, **options: Any) -> Answer:
        return await asyncio.to_thread(self._client.complete_chat, *arguments, **options)

    async def events(self, *arguments: Any, limit: int = 10**6, **options: Any) -> list[Event]:
        def read() -> list[Event]:
            found: list[Event] = []
            with closing(self._client.generate(*arguments, **options)) as stream:
                for event in stream:
                    found.append(event)
                    if len(found) == limit:
                        break
            return found

        return await asyncio.to_thread(read)

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(getattr(self._client, name), *arguments, **options)

        return call


class Waiting(BatonClient):
    async def events(self, *arguments: Any, limit: int = 10**6, **options: Any) -> list[Event]:
        found: list[Event] = []
        async with aclosing(self.generate(*arguments, **options)) as stream:
            async for event in stream:
                found.append(event)
                if len(found) == limit:
                    break
        return found


@pytest.fixture
def fake() -> Iterator[FakeBaton]:
    with FakeBaton() as one:
        yield one


@pytest.fixture(params=["async", "sync"])
async def client(request: pytest.FixtureRequest, fake: FakeBaton) -> AsyncIterator[Any]:
    if request.param == "async":
        async with Waiting(fake.address) as waiting:
            yield waiting
    else:
        with BatonClientSync(fake.address) as blocking:
            yield Blocking(blocking)


# Answers


async def test_without_a_script_it_says_what_it_was_told(client: Any) -> None:
    events = await client.events("hi there", **QUICK)
    assert [type(event) for event in events] == [Started, Chunk, Chunk, Chunk, Chunk, Finished]
    assert "".join(event.text for event in events) == "You said: hi there"
    assert (events[0].model, events[0].prompt_token_count, events[0].resume_token) == ("fake", 8, "")
    answer = await client.complete_chat([("system", "be kind"), ("user", "Hello!")], **QUICK)
    assert answer.text == "You said: Hello!"


async def test_answers_come_in_their_order_and_chunks_as_they_were_given(fake: FakeBaton, client: Any) -> None:
    fake.will_answer("one two")
    fake.will_answer("th", "re", "e", reason=FinishReason.CONTEXT_FULL, cached_prompt_token_count=1)
    first = await client.events("x", output=BOTH, **QUICK)
    chunks = [event for event in first if isinstance(event, Chunk)]
    assert [(each.first_token_index, each.text, each.token_count) for each in chunks] == [
        (0, "one", 3),
        (3, " two", 4),
    ]
    assert chunks[0].token_ids == (ord("o"), ord("n"), ord("e"))
    second = await client.complete("x", **QUICK)
    assert (second.text, second.reason, second.usage.cached_prompt_token_count) == (
        "three",
        FinishReason.CONTEXT_FULL,
        1,
    )
    assert second.usage.output_token_count == 5
    assert second.phases.total_s == pytest.approx(0.010)


async def test_thinking_and_tool_calls_have_fields_of_their_own(fake: FakeBaton, client: Any) -> None:
    call = ToolCall("call-1", "weather", '{"city": "Ulm"}')
    fake.will_answer("I look it up.", reasoning="Where is Ulm?", tool_calls=[call])
    answer = await client.complete_chat(
        [{"role": "user", "content": "How is the weather in Ulm?"}],
        tools=[{"name": "weather", "parameters": {"type": "object"}}],
        tool_choice="required",
        template_arguments={"enable_thinking": True},
        **QUICK,
    )
    assert (answer.reasoning_text, answer.text, answer.tool_calls) == ("Where is Ulm?", "I look it up.", (call,))
    assert answer.reason is FinishReason.TOOL_CALLS
    assert answer.message() == ChatMessage(
        "assistant", "I look it up.", tool_calls=(call,), reasoning="Where is Ulm?"
    )
    asked = fake.requests[0].prompt
    assert asked == chat_prompt(
        [("user", "How is the weather in Ulm?")],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        tool_choice=ToolChoice.REQUIRED,
        template_arguments={"enable_thinking": True},
    )


async def test_the_pieces_of_a_tool_call_are_the_call(fake: FakeBaton, client: Any) -> None:
    fake.will_answer("", tool_calls=[ToolCall("call-1", "f", '{"a": 1}'), ToolCall("call-2", "g", "{}")])
    events = await client.events(chat_prompt([("user", "x")], tools=[{"name": "f"}, {"name": "g"}]), **QUICK)
    pieces: list[ToolCallDelta] = [
        delta for event in events if isinstance(event, Chunk) for delta in event.tool_call_deltas
    ]
    assert [(each.index, each.id, each.name) for each in pieces if each.id] == [
        (0, "call-1", "f"),
        (1, "call-2", "g"),
    ]
    assert "".join(each.arguments_json for each in pieces if each.index == 0) == '{"a": 1}'


async def test_samples_are_told_apart(fake: FakeBaton, client: Any) -> None:
    fake.will_answer(samples=["one two", ["th", "ree"]])
    answer = await client.complete("x", sample_count=3, sampling=Sampling(temperature=1.0), **QUICK)
    assert [sample.text for sample in answer.samples] == ["one two", "three", "three"]
    assert [sample.token_count for sample in answer.samples] == [7, 5, 5]
    assert answer.usage.output_token_count == 17


async def test_logprobs_the_prompt_and_its_logprobs_come_where_they_are_asked_for(client: Any) -> None:
    output = OutputOptions(top_logprob_count=2, echo_prompt=True, prompt_logprob_count=0)
    events = await client.events("hi", output=output, **QUICK)
    (part,) = (event for event in events if isinstance(event, PromptPart))
    assert (part.text, [each.rank for each in part.logprobs]) == ("hi", [0, 1])
    chunk = next(event for event in events if isinstance(event, Chunk))
    assert [len(each.top) for each in chunk.logprobs] == [2] * chunk.token_count
    answer = await client.complete("hi", output=output, **QUICK)
    assert (answer.prompt_text, len(answer.prompt_logprobs)) == ("hi", 2)
    assert answer.finished.cumulative_logprob == -0.5 * answer.usage.output_token_count


async def test_an_answer_ends_where_the_request_says(fake: FakeBaton, client: Any) -> None:
    for _ in range(3):
        fake.will_answer("one two three")
    cut = await client.complete("x", stop=StopConditions(max_output_token_count=5), **QUICK)
    assert (cut.text, cut.reason) == ("one t", FinishReason.MAX_OUTPUT_TOKENS)
    stopped = await client.complete("x", stop=StopConditions(stop_sequences=("two",)), output=BOTH, **QUICK)
    assert (stopped.text, stopped.reason) == ("one ", FinishReason.STOP)
    assert stopped.samples[0].matched_stop_sequence == "two"
    assert stopped.usage.output_token_count == len(stopped.token_ids) == 7
    token = await client.complete("x", stop=StopConditions(stop_token_ids=(ord("t"),)), **QUICK)
    assert (token.text, token.finished.matched_stop_token_id) == ("one ", ord("t"))


async def test_models_and_tokens(client: Any) -> None:
    (model,) = await client.list_models(**QUICK)
    assert (model.name, model.capabilities.has_tools) == ("fake", True)
    assert await client.get_model("fake", **QUICK) == model
    with pytest.raises(ModelNotFound) as missing:
        await client.get_model("gpt", **QUICK)
    assert missing.value.metadata["available"] == "fake"
    count = await client.count_tokens(chat_prompt([("user", "hi")]), **QUICK)
    ids = await client.tokenize(chat_prompt([("user", "hi")]), **QUICK)
    assert (count.token_count, count.fits) == (len(ids), True)
    assert await client.detokenize(ids, **QUICK) == "<user>hi\n<assistant>"
    with pytest.raises(InvalidRequest):
        await client.count_tokens("", **QUICK)


# Faults


async def test_refusals_come_before_anything_and_leave_the_answer_for_later(fake: FakeBaton, client: Any) -> None:
    fake.will_answer("at last")
    fake.will_refuse(count=2)
    for _ in range(2):
        with pytest.raises(Overloaded) as refused:
            await client.complete("x", **QUICK)
        assert refused.value.is_retryable
        assert refused.value.retry_after_s is not None
    assert (await client.complete("x", **QUICK)).text == "at last"
    assert len(fake.requests) == 3


async def test_what_is_unavailable_is_sent_again_by_grpc_up_to_three_times(fake: FakeBaton, client: Any) -> None:
    fake.will_refuse(Reason.NO_WORKER, count=2)
    assert (await client.complete("x", **QUICK)).text == "You said: x"
    assert len(fake.requests) == 3
    fake.will_refuse(Reason.NO_WORKER, count=3)
    with pytest.raises(Unavailable) as refused:
        await client.complete("x", **QUICK)
    assert refused.value.is_retryable


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.STALLED, Interrupted),
        (Reason.INTERNAL, InternalError),
        (Reason.DEADLINE_EXCEEDED, DeadlineExceeded),
        (Reason.PERMISSION_DENIED, NotPermitted),
    ],
)
async def test_a_failure_after_tokens_is_of_the_class_that_says_what_to_do(
    fake: FakeBaton, client: Any, reason: Reason, kind: type[BatonError]
) -> None:
    fake.will_fail(reason, after_tokens=3)
    with pytest.raises(kind) as failed:
        await client.complete("x", **QUICK)
    assert (failed.value.reason, failed.value.is_retryable) == (reason, False)
    assert fake.calls[0].sent_token_count == 3


async def test_a_cut_without_resume_is_one_to_start_over_from(fake: FakeBaton, client: Any) -> None:
    fake.will_cut(after_tokens=3)
    with pytest.raises(Interrupted) as cut:
        await client.complete("x", **QUICK)
    assert cut.value.metadata["emitted_token_count"] == "3"


async def test_cuts_with_resume_are_not_seen(fake: FakeBaton, client: Any) -> None:
    fake.will_answer("Hello big world")
    for count in (3, 2, 0, 1):
        fake.will_cut(after_tokens=count)
    events = await client.events("x", resume=True, **QUICK)
    assert "".join(event.text for event in events) == "Hello big world"
    assert sum(isinstance(event, Started) for event in events) == 1
    assert events[-1].resume_count == 4
    assert all(event.token_ids == () for event in events if isinstance(event, Chunk)), "nobody asked for them"
    assert [call.next_token_indices for call in fake.calls_of("ResumeGenerate")] == [(3,), (5,), (5,), (6,)]


async def test_samples_go_on_each_from_its_own_token(fake: FakeBaton, client: Any) -> None:
    fake.will_answer(samples=["one two", "three four"])
    fake.will_cut(after_tokens=4)
    answer = await client.complete(
        "x", sample_count=2, sampling=Sampling(temperature=1.0), resume=True, output=BOTH, **QUICK
    )
    assert [sample.text for sample in answer.samples] == ["one two", "three four"]
    assert fake.calls_of("ResumeGenerate")[0].next_token_indices == (3, 1)


async def test_what_a_restarted_server_forgot_is_gone_on_with_from_the_continuation(fake: FakeBaton) -> None:
    fake.will_cut(after_tokens=4)
    async with BatonClient(fake.address) as client:
        text = ""
        async for event in client.generate("x", resume=True, **QUICK):
            if isinstance(event, Started):
                fake.will_forget()  # before the cut is read, and so before the resume
            text += event.text
    assert text == "You said: x"
    assert fake.calls[1].request == fake.requests[0], "its continuation"


@pytest.mark.parametrize("how", ["forget", "restart"])
async def test_a_continuation_gets_the_rest_of_what_its_generation_was_told_to_answer(
    fake: FakeBaton, how: str
) -> None:
    fake.will_answer("one two")
    fake.will_answer("of another request")
    fake.will_stall(after_tokens=4) if how == "restart" else fake.will_cut(after_tokens=4)
    async with BatonClient(fake.address) as client:
        text = ""
        async for event in client.generate("x", resume=True, **QUICK):
            text += event.text
            if how == "forget" and isinstance(event, Started):
                fake.will_forget()
            if how == "restart" and text == "one " and isinstance(event, Chunk):
                await asyncio.to_thread(fake.stop)
                fake.start()
        assert text == "one two"
        assert (await client.complete("x", **QUICK)).text == "of another request"


async def test_a_refusal_may_be_for_one_method_and_is_otherwise_for_streams(fake: FakeBaton, client: Any) -> None:
    fake.will_refuse(Reason.PERMISSION_DENIED)
    fake.will_refuse(Reason.INTERNAL, method="CountTokens")
    fake.will_refuse(Reason.RESUME_DENIED, method="CancelGeneration")
    assert [model.name for model in await client.list_models(**QUICK)] == ["fake"]
    with pytest.raises(InternalError):
        await client.count_tokens("x", **QUICK)
    with pytest.raises(ResumeFailed):
        await client.cancel_generation("fake-resume-0", **QUICK)
    assert not await client.cancel_generation("fake-resume-0", **QUICK)
    with pytest.raises(NotPermitted):
        await client.complete("x", **QUICK)
    assert (await client.complete("x", **QUICK)).text == "You said: x"
    with pytest.raises(ValueError, match="must be one of Generate, "):
        fake.will_refuse(method="count_tokens")


async def test_a_failure_that_a_resume_can_heal_is_healed(fake: FakeBaton, client: Any) -> None:
    fake.will_fail(attempts_exhausted(3, 2, "decode", "worker d0: lost"), after_tokens=2)
    assert (await client.complete("x", resume=True, **QUICK)).resume_count == 1


async def test_a_stall_ends_with_the_callers_time(fake: FakeBaton, client: Any) -> None:
    fake.will_stall(after_tokens=2)
    with pytest.raises(DeadlineExceeded):
        await client.complete("x", timeout=1.0)
    await asyncio.to_thread(fake.wait_until, lambda fake: fake.calls[0].was_left)


async def test_who_leaves_is_seen_and_a_resumable_generation_is_cancelled(fake: FakeBaton, client: Any) -> None:
    fake.will_stall(after_tokens=4)
    await client.events("x y z", limit=2, **QUICK)
    await asyncio.to_thread(fake.wait_until, lambda fake: fake.calls[0].was_left)
    assert fake.calls_of("CancelGeneration") == (), "a plain one ends with its call"
    fake.will_stall(after_tokens=4)
    await client.events("x y z", limit=2, resume=ResumeOptions(grace_s=60.0), **QUICK)
    (cancel,) = fake.calls_of("CancelGeneration")
    assert cancel.resume_token.startswith("fake-resume-")


async def test_delays_are_only_where_they_were_asked_for(fake: FakeBaton, client: Any) -> None:
    fake.will_answer("late", delay_s=60.0)
    with pytest.raises(DeadlineExceeded):
        await client.complete("x", timeout=0.2)
    fake.will_answer("two chunks", chunk_delay_s=0.001)
    assert (await client.complete("x", **QUICK)).text == "two chunks"


async def test_not_serving_refuses_and_health_says_so() -> None:
    async with FakeBaton() as fake, BatonClient(fake.address) as client:
        assert await client.is_serving(timeout=60)
        fake.set_serving(False)
        assert not await client.is_serving(timeout=60)
        with pytest.raises(Unavailable) as refused:
            await client.complete("x", **QUICK)
        assert refused.value.reason is Reason.DRAINING


async def test_the_second_address_takes_what_the_first_refuses_loses_or_forgot() -> None:
    async with FakeBaton() as first, FakeBaton() as second, BatonClient([first.address, second.address]) as client:
        first.set_serving(False)
        assert (await client.complete("x", **QUICK)).text == "You said: x"
        assert (client.address, len(second.requests)) == (second.address, 1)
        second.will_cut(after_tokens=4)
        second.set_serving(True)
        first.set_serving(True)
        request = asyncio.create_task(client.complete("hello", resume=True, **QUICK))
        await asyncio.to_thread(second.wait_until, lambda fake: len(fake.requests) == 2 and fake.calls[-1].is_over)
        assert (await request).text == "You said: hello"
        await asyncio.to_thread(second.stop)
        assert (await client.list_models(**QUICK))[0].name == "fake"
        assert client.address == first.address


async def test_a_stopped_fake_cuts_everything_and_comes_back_where_it_was() -> None:
    async with FakeBaton() as fake, BatonClient(fake.address) as client:
        fake.will_stall(after_tokens=4)
        stream = client.generate("hello", resume=True, **QUICK)
        text = ""
        async for event in stream:
            text += event.text
            if len(text) == 4:
                await asyncio.to_thread(fake.stop)
                fake.start()
        assert text == "You said: hello"


async def test_a_server_that_goes_away_is_a_lost_connection_and_no_cancelled_task(
    fake: FakeBaton, client: Any
) -> None:
    """grpc.aio raises CancelledError for a call that the other side cancelled: nobody cancelled this task."""
    fake.will_stall(after_tokens=4)
    request = asyncio.create_task(client.complete("x", **QUICK))
    await asyncio.to_thread(
        fake.wait_until, lambda fake: len(fake.calls) == 1 and fake.calls[0].sent_token_count == 4
    )
    await asyncio.to_thread(fake.stop)
    with pytest.raises((Interrupted, Unavailable)):
        await request
    assert not request.cancelled()


async def test_a_call_that_the_server_cancels_is_lost() -> None:
    async def cancelled(_: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "")

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Generate": grpc.unary_stream_rpc_method_handler(cancelled)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.v1.GenerationService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with BatonClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(Unavailable) as lost:
                await client.complete("x", **QUICK)
            assert lost.value.metadata["transport"] == "CANCELLED"
    finally:
        await server.stop(0)


async def test_a_closed_client_ends_its_streams_and_resumes_nothing(fake: FakeBaton) -> None:
    fake.will_stall(after_tokens=4)
    client = BatonClient(fake.address)
    stream = client.generate("hello", resume=True, **QUICK)
    assert isinstance(await anext(stream), Started)
    assert isinstance(await anext(stream), Chunk)
    await client.close()
    with pytest.raises(Interrupted):
        await anext(stream)
    assert fake.calls_of("ResumeGenerate") == ()
    assert len(fake.calls_of("CancelGeneration")) == 1
    await client.close()
    await stream.aclose()
    assert len(fake.calls_of("CancelGeneration")) == 1, "one goodbye is enough"


@pytest.mark.parametrize("how", ["break", "raise"])
async def test_a_loop_left_inside_the_client_s_block_ends_the_generation(fake: FakeBaton, how: str) -> None:
    """The loop's generator is closed by the event loop, which comes to it only after the client was closed."""
    fake.will_stall(after_tokens=4)
    with suppress(ZeroDivisionError):
        async with BatonClient(fake.address) as client:
            async for event in client.generate("hello", resume=ResumeOptions(grace_s=60.0), **QUICK):
                if isinstance(event, Chunk):
                    if how == "raise":
                        raise ZeroDivisionError
                    break
    (cancel,) = fake.calls_of("CancelGeneration")
    assert cancel.resume_token.startswith("fake-resume-")


async def test_a_closed_client_of_threads_says_goodbye_to_what_is_open(fake: FakeBaton) -> None:
    for _ in range(2):
        fake.will_stall(after_tokens=4)

    def leave() -> list[BatonError]:
        found: list[BatonError] = []
        with BatonClientSync(fake.address) as client:
            streams = [client.generate("hello", resume=True, **QUICK) for _ in range(2)]
            for stream in streams:
                assert isinstance(next(stream), Started)
                assert isinstance(next(stream), Chunk)
        for stream in streams:
            with pytest.raises(Interrupted) as ended:
                next(stream)
            found.append(ended.value)
        return found

    assert len(await asyncio.to_thread(leave)) == 2
    assert len({call.resume_token for call in fake.calls_of("CancelGeneration")}) == 2
    assert (len(fake.calls_of("CancelGeneration")), fake.calls_of("ResumeGenerate")) == (2, ())


async def test_a_client_closed_between_two_tries_makes_no_third(fake: FakeBaton) -> None:
    fake.will_cut(after_tokens=4)
    fake.will_refuse(queue_full(1, 1, 60.0))
    client = BatonClient(fake.address)
    request = asyncio.create_task(client.complete("hello", timeout=600, resume=True))
    await asyncio.to_thread(
        fake.wait_until, lambda fake: any(call.is_over for call in fake.calls_of("ResumeGenerate"))
    )
    await client.close()
    with pytest.raises(Interrupted):
        await request
    assert [call.method for call in fake.calls] == ["Generate", "ResumeGenerate", "CancelGeneration"]


async def test_whom_another_reader_replaced_does_not_end_the_other_s_generation(fake: FakeBaton, client: Any) -> None:
    fake.will_fail(Reason.ATTACHED_ELSEWHERE, after_tokens=4)
    with pytest.raises(ResumeFailed):
        await client.complete("hello", resume=True, **QUICK)
    await client.close()  # which waits for goodbyes
    assert [call.method for call in fake.calls] == ["Generate"]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_generation_is_cancelled_wherever_it_runs(kind: str) -> None:
    async with FakeBaton() as first, FakeBaton() as second:
        second.will_stall(after_tokens=4)
        async with BatonClient(second.address) as reader:
            stream = reader.generate("hello", resume=True, **QUICK)
            started = await anext(stream)
            assert isinstance(started, Started)
            addresses = [first.address, second.address]
            if kind == "async":
                async with BatonClient(addresses) as other:
                    assert await other.cancel_generation(started.resume_token, timeout=60)
                    assert other.address == second.address
                    assert not await other.cancel_generation(started.resume_token, timeout=60)
            else:
                with BatonClientSync(addresses) as blocking:
                    cancel = blocking.cancel_generation
                    assert await asyncio.to_thread(cancel, started.resume_token, timeout=60)
                    assert not await asyncio.to_thread(cancel, started.resume_token, timeout=60)
            assert len(first.calls_of("CancelGeneration")) == 2
            await stream.aclose()


async def test_whoever_reads_a_generation_that_is_cancelled_is_told(fake: FakeBaton) -> None:
    fake.will_stall(after_tokens=4)
    async with BatonClient(fake.address) as reader, BatonClient(fake.address) as other:
        stream = reader.generate("hello", resume=True, tenant="us", **QUICK)
        started = await anext(stream)
        assert isinstance(started, Started)
        for token, tenant in ((started.resume_token, "them"), ("made-up", "us")):
            with pytest.raises(ResumeFailed) as refused:
                await other.cancel_generation(token, tenant=tenant, timeout=60)
            assert refused.value.reason is Reason.RESUME_DENIED
        fake.set_serving(False)  # a drain waits for what runs: ending it is welcome
        assert await other.cancel_generation(started.resume_token, tenant="us", timeout=60)
        with pytest.raises(ResumeFailed) as ended:
            [event async for event in stream]
        assert ended.value.reason is Reason.RESUME_UNKNOWN


async def test_a_prompt_too_long_is_not_counted_but_refused_as_a_generation_would_be() -> None:
    async with FakeBaton(max_context_token_count=20) as fake, BatonClient(fake.address) as client:
        assert (await client.count_tokens("x" * 19, **QUICK)).token_count == 19
        for ask in (client.count_tokens, client.tokenize):
            with pytest.raises(PromptTooLong):
                await ask("x" * 20, **QUICK)


async def test_who_asks_for_ids_alone_gets_the_calls_of_tools_too(fake: FakeBaton) -> None:
    fake.will_answer("", tool_calls=[ToolCall("call_1", "weather", '{"city":"Ulm"}')])
    ids = OutputOptions(wants_text=False, wants_token_ids=True)
    async with BatonClient(fake.address) as client:
        stream = client.chat([("user", "hi")], tools=[{"name": "weather"}], output=ids, **QUICK)
        chunks = [event async for event in stream if isinstance(event, Chunk)]
    assert {chunk.text for chunk in chunks} == {""}
    assert "".join(delta.arguments_json for chunk in chunks for delta in chunk.tool_call_deltas) == '{"city":"Ulm"}'


async def test_a_call_asks_every_address_though_others_move_the_first_meanwhile() -> None:
    async with FakeBaton() as first, FakeBaton() as second, BatonClient([first.address, second.address]) as client:
        first.set_serving(False)
        asking = asyncio.create_task(client.list_models(**QUICK))
        await asyncio.to_thread(first.wait_until, lambda fake: bool(fake.calls))
        client._index = 1  # as another call that was answered at the second leaves it
        assert [model.name for model in await asking] == ["fake"]


async def test_a_router_too_full_to_go_on_is_asked_again_also_after_it_said_started(
    fake: FakeBaton, client: Any
) -> None:
    fake.will_cut(after_tokens=4)
    fake.will_fail(queue_full(1, 1, 0.01))
    answer = await client.complete("hello", resume=True, **QUICK)
    assert (answer.text, answer.resume_count) == ("You said: hello", 2)


# Requests


async def test_credentials_make_the_channel(tmp_path: Path) -> None:
    """Those of a call travel on channels with credentials alone, and here they are the key that is asked for."""
    local = grpc.LocalConnectionType.UDS
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    attach(FakeState("fake", 8192, "of-the-call"), server)
    address = f"unix:{tmp_path}/fake.sock"
    server.add_secure_port(address, grpc.local_server_credentials(local))
    server.start()
    try:
        credentials = grpc.composite_channel_credentials(
            grpc.local_channel_credentials(local), grpc.access_token_call_credentials("of-the-call")
        )
        async with BatonClient(address, credentials=credentials) as client:
            assert (await client.complete("x", **QUICK)).text == "You said: x"
        with BatonClientSync(address, credentials=credentials) as blocking:
            answer = await asyncio.to_thread(blocking.complete, "x", **QUICK)
        assert answer.text == "You said: x"
    finally:
        server.stop(0)


async def test_keys_are_asked_for_and_sent() -> None:
    async with FakeBaton(api_key="open sesame") as fake:
        async with BatonClient(fake.address) as client:
            with pytest.raises(Unauthenticated):
                await client.complete("x", **QUICK)
        async with BatonClient(fake.address, api_key="open sesame") as client:
            assert (await client.complete("x", **QUICK)).text == "You said: x"
            assert "sesame" not in repr(client)


@pytest.mark.parametrize("key", ["", " padded", "new\nline", "grüße"])
async def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be printable ASCII") as refused:
        BatonClient("127.0.0.1:1", api_key=key)
    assert not key.strip() or key.strip() not in str(refused.value)


async def test_what_was_asked_is_there_typed(fake: FakeBaton, client: Any) -> None:
    await client.complete("x", tenant="shop", stop=StopConditions(max_output_token_count=3), **QUICK)
    (call,) = fake.calls
    assert (call.method, call.sent_token_count, call.is_over, call.was_left) == ("Generate", 3, True, False)
    assert call.timeout_s is not None
    assert 30 < call.timeout_s < 65, "gRPC rounds deadlines"
    (request,) = fake.requests
    assert (request.prompt, request.tenant, request.stop.max_output_token_count) == (TextPrompt("x"), "shop", 3)


async def test_a_wrong_request_is_refused_as_a_server_would(fake: FakeBaton, client: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await client.complete("", sampling=Sampling(temperature=9.0), priority=1000, **QUICK)
    assert [each.field for each in refused.value.violations] == ["prompt", "sampling.temperature", "priority"]
    with pytest.raises(PromptTooLong):
        await client.complete("x" * 9000, **QUICK)
    with pytest.raises(ModelNotFound):
        await client.complete("x", model="gpt", **QUICK)


async def test_resume_tokens_that_are_not_its_own_are_denied(fake: FakeBaton) -> None:
    from baton.status import from_rpc_error
    from baton.v1 import generation_pb2 as pb
    from baton.v1 import generation_pb2_grpc as pb_grpc

    async with grpc.aio.insecure_channel(fake.address) as channel:
        stub: Any = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        for token, reason in (("stolen", Reason.RESUME_DENIED), ("fake-resume-99", Reason.RESUME_UNKNOWN)):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await anext(aiter(stub.ResumeGenerate(pb.ResumeGenerateRequest(resume_token=token))))
            error = from_rpc_error(failed.value)
            assert (error.reason, type(error)) == (reason, ResumeFailed)


def test_the_fixture_is_a_fake_that_listens(fake_baton: FakeBaton) -> None:  # noqa: F811
    with BatonClientSync(fake_baton.address) as client:
        assert client.complete("x", **QUICK).text == "You said: x"


def test_a_fake_that_was_not_started_says_so_and_what_is_waited_for_has_an_end(fake: FakeBaton) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = FakeBaton().address
    with pytest.raises(TimeoutError, match="calls so far"):
        fake.wait_until(lambda fake: len(fake.calls) > 0, timeout_s=0.01)

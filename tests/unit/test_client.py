"""The client's own rules: the grammar of a stream, conversions, and a deadline on every call."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.call_proto import asked, resume_to_proto
from baton.client import (
    SERVICE_CONFIG,
    BatonClient,
    Chunk,
    Finished,
    PhaseTimings,
    PromptPart,
    Started,
    StreamGrammar,
    TokenLogprob,
    channel_options,
    chat_prompt,
    event_from_proto,
    prompt_of,
    request_to_proto,
)
from baton.errors import BatonError, Reason, StatusName, deadline_exceeded, engine_failed, queue_full
from baton.events import AnswerBuilder
from baton.leg import RecomputeReason
from baton.request import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    Handover,
    OutputOptions,
    PlacementMode,
    ResumeOptions,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
    Usage,
)
from baton.resuming import Continuity
from baton.sync_client import BatonClientSync
from baton.timeline import PHASES, Phase, PhaseDurations
from baton.transfer_report import TransferReport
from baton.v1 import generation_pb2 as pb
from router.answering import Completed, PhaseReport, Piece
from router.resuming.service_resuming import continuation_from_proto, request_digest
from router.service_events import chunk_to_proto, finished_to_proto, started_to_proto
from router.service_messages import request_from_proto

STARTED = Started("gen-1", "tiny", 3)
FINISHED = Finished(
    FinishReason.STOP,
    None,
    None,
    Usage(3, 2, 0),
    PhaseTimings(
        dict.fromkeys(PHASES, 0.0), None, TransferReport(), Handover.NONE, "p", "d", 1, PlacementMode.SPLIT, "split"
    ),
)


def check_all(*events: Started | Chunk | Finished) -> None:
    grammar = StreamGrammar()
    for event in events:
        grammar.check(event)
    grammar.check_end()


def chunk(first: int, count: int) -> Chunk:
    return Chunk(first, "", (), count)


def test_started_chunks_finished_is_the_grammar() -> None:
    check_all(STARTED, chunk(0, 1), chunk(1, 2), chunk(3, 0), FINISHED)
    check_all(STARTED, FINISHED)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [STARTED],
        [FINISHED],
        [chunk(0, 1), FINISHED],
        [STARTED, STARTED, FINISHED],
        [STARTED, chunk(1, 1), FINISHED],
        [STARTED, chunk(0, 2), chunk(1, 1), FINISHED],
        [STARTED, FINISHED, chunk(0, 1)],
        [STARTED, FINISHED, FINISHED],
    ],
)
def test_a_gap_a_repeat_or_a_wrong_order_is_an_error_and_not_an_answer(
    events: list[Started | Chunk | Finished],
) -> None:
    with pytest.raises(BatonError) as failed:
        check_all(*events)
    assert failed.value.reason is Reason.INTERNAL


def test_a_connection_lost_after_tokens_came_is_not_one_to_retry() -> None:
    lost = engine_failed("127.0.0.1:1", "connection reset")
    grammar = StreamGrammar()
    grammar.check(STARTED)
    assert grammar.broken(lost) is lost
    assert lost.status is StatusName.UNAVAILABLE
    grammar.check(chunk(0, 3))
    broken = grammar.broken(lost)
    assert (broken.status, broken.metadata["emitted_token_count"]) == (StatusName.ABORTED, "3")
    shed = grammar.broken(queue_full(1, 1, 1.0))
    assert (shed.status, shed.is_retryable) == (StatusName.ABORTED, False), "tokens came: it is not the same call"
    late = deadline_exceeded("decode", 3)
    assert grammar.broken(late) is late


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.inf, math.nan])
async def test_a_timeout_that_is_none_is_refused_before_anything_is_sent(timeout: float) -> None:
    async with BatonClient("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="timeout"):
            client.generate("hi", timeout=timeout)


async def test_a_server_that_is_not_there_is_unavailable_within_the_timeout() -> None:
    async with BatonClient("127.0.0.1:1") as client:
        with pytest.raises(BatonError) as failed:
            await anext(client.generate("hi", timeout=60))
        assert failed.value.status is StatusName.UNAVAILABLE
        assert not await client.is_serving(timeout=60)


def test_only_unavailable_is_retried() -> None:
    (method,) = SERVICE_CONFIG["methodConfig"]
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]  # type: ignore[index]


def test_a_proxy_from_the_environment_is_not_asked_for_loopback() -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options("127.0.0.1:50051")
    assert ("grpc.enable_http_proxy", 0) in channel_options("[::1]:50051")
    assert ("grpc.enable_http_proxy", 0) not in channel_options("baton.example:50051")


calls = st.builds(ToolCall, st.text(), st.text(), st.text())
finite = st.floats(allow_nan=False, allow_infinity=False)
int32 = st.integers(-(2**31), 2**31 - 1)


@given(
    prompt=st.one_of(
        st.builds(TextPrompt, st.text()),
        st.builds(TokenPrompt, st.lists(int32).map(tuple)),
        st.builds(
            ChatPrompt,
            messages=st.lists(st.builds(ChatMessage, *[st.text()] * 2, st.lists(calls, max_size=2).map(tuple))).map(
                tuple
            ),
            tools=st.lists(st.builds(Tool, st.text(), st.text(), st.text()), max_size=2).map(tuple),
            tool_choice=st.sampled_from(ToolChoice),
            tool_name=st.text(),
            template_arguments_json=st.text(),
            keep_reasoning_in_text=st.booleans(),
        ),
    ),
    sampling=st.builds(
        Sampling,
        finite,
        finite,
        int32,
        finite,
        st.none() | st.integers(-(2**63), 2**63 - 1),
        finite,
        finite,
        finite,
        logit_bias=st.lists(st.tuples(int32, finite), max_size=3).map(tuple),
        allowed_token_ids=st.lists(int32, max_size=3).map(tuple),
        bad_token_sequences=st.lists(st.lists(int32, max_size=3).map(tuple), max_size=3).map(tuple),
        structure=st.none()
        | st.just(Structure(StructureKind.JSON_OBJECT))
        | st.builds(
            Structure,
            st.sampled_from([StructureKind.JSON_SCHEMA, StructureKind.REGEX, StructureKind.GRAMMAR]),
            st.text(),
        )
        | st.builds(Structure, st.just(StructureKind.CHOICE), choices=st.lists(st.text(), max_size=3).map(tuple)),
    ),
    stop=st.builds(
        StopConditions,
        st.none() | int32,
        st.lists(st.text()).map(tuple),
        st.lists(int32).map(tuple),
        st.booleans(),
        int32,
    ),
    output=st.sampled_from(
        [
            OutputOptions(),
            OutputOptions(False, True, 1),
            OutputOptions(True, True, 7),
            OutputOptions(max_chunk_token_count=0, top_logprob_count=0),
            OutputOptions(top_logprob_count=-7),
            OutputOptions(echo_prompt=True, prompt_logprob_count=0),
        ]
    ),
    sample_count=int32.filter(bool),
    resume=st.sampled_from([None, ResumeOptions(), ResumeOptions(0.0), ResumeOptions(7.25)]),
)
def test_a_request_arrives_as_it_was_meant(
    prompt: TextPrompt | TokenPrompt | ChatPrompt,
    sampling: Sampling,
    stop: StopConditions,
    output: OutputOptions,
    sample_count: int,
    resume: ResumeOptions | None,
) -> None:
    message = request_to_proto(
        prompt,
        model="m",
        sampling=sampling,
        stop=stop,
        output=output,
        priority=-3,
        session_id="s",
        correlation_id="c",
        tenant="t",
        sample_count=sample_count,
        resume=resume,
    )
    received, violations = request_from_proto(pb.GenerateRequest.FromString(message.SerializeToString()))
    assert violations == []
    assert received == GenerateRequest(prompt, "m", sampling, stop, output, -3, "s", "c", "t", sample_count, resume)


def test_a_bare_request_means_greedy_text_until_the_model_stops() -> None:
    received, _ = request_from_proto(pb.GenerateRequest(text="hi"))
    assert received == GenerateRequest(TextPrompt("hi"))


@pytest.mark.parametrize(
    ("asked", "meant"), [(-1, -1), (0, 0), (1, 1), (1024, 1024), (1025, 1024), (2**31 - 1, 1024)]
)
def test_more_than_1024_tokens_in_a_chunk_mean_1024_and_what_is_sealed_is_what_was_sent(
    asked: int, meant: int
) -> None:
    message = pb.GenerateRequest(text="hi", output=pb.OutputOptions(max_chunk_token_count=asked))
    sent = message.SerializeToString(deterministic=True)
    received, violations = request_from_proto(message)
    assert (received.output.max_chunk_token_count, violations) == (meant, [])
    resumed = continuation_from_proto(pb.ResumeGenerateRequest(continuation=pb.Continuation(request=message)))
    assert resumed is not None
    assert resumed.request == received
    assert resumed.digest == hashlib.sha256(sent).hexdigest() == request_digest(message)


def test_a_list_that_is_there_and_empty_and_a_structure_of_no_kind_are_violations() -> None:
    sampling = pb.Sampling(allowed_token_ids=pb.TokenIds(), structure=pb.StructuredOutput())
    request, violations = request_from_proto(pb.GenerateRequest(text="hi", sampling=sampling))
    assert [violation.field for violation in violations] == ["sampling.allowed_token_ids", "sampling.structure"]
    assert "json_schema, json_object, regex, choice, grammar" in violations[1].description
    assert request.sampling == Sampling()


def test_an_unknown_output_content_is_a_violation() -> None:
    message = pb.GenerateRequest(text="hi", output=pb.OutputOptions(content=17))  # type: ignore[arg-type]
    _, violations = request_from_proto(message)
    assert [violation.field for violation in violations] == ["output.content"]


def test_events_arrive_as_they_were_sent_and_the_phases_keep_their_sum() -> None:
    seconds = {phase: 0.001 * (n + 1) / 3 for n, phase in enumerate(PHASES)}
    report = PhaseReport(
        PhaseDurations(seconds, sum(seconds.values()), 0.0015),
        TransferReport(1 << 33, 60, 2, 0.001, 0.25, 0.002, 5, RecomputeReason.CORRUPT),
        Handover.OUTPUT_INJECTION,
        "p-0",
        "d-0",
        2,
        PlacementMode.LOCAL,
        "recompute",
    )
    sent = finished_to_proto(Completed(FinishReason.CONTEXT_FULL, "###", 0, Usage(7, 5, 3), report, -12.5))
    finished = event_from_proto(sent)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.CONTEXT_FULL
    assert (finished.matched_stop_sequence, finished.matched_stop_token_id) == ("###", 0)
    assert finished.usage == Usage(7, 5, 3)
    phases = finished.phases
    assert phases.total_s == pytest.approx(sum(seconds.values()), abs=1e-8)
    assert phases[Phase.KV_TRANSFER] == pytest.approx(seconds[Phase.KV_TRANSFER], abs=1e-9)
    assert (phases.kv_transfer_bytes, phases.attempt_count, phases.recomputed_token_count) == (1 << 33, 2, 5)
    assert (phases.transfer, phases.handover) == (report.transfer, Handover.OUTPUT_INJECTION)
    assert phases.transfer.wire_bytes_per_s == (1 << 33) / 0.25
    assert finished.cumulative_logprob == -12.5
    assert phases.placement_mode is PlacementMode.LOCAL
    assert event_from_proto(started_to_proto("gen-1", "tiny", 3, time_allowed_s=30)) == Started(
        "gen-1", "tiny", 3, time_allowed_s=30.0
    )
    both = OutputOptions(wants_token_ids=True)
    assert event_from_proto(chunk_to_proto(Piece(4, (7, 8), "hi", None), both)) == Chunk(4, "hi", (7, 8), 2)
    only_text = event_from_proto(chunk_to_proto(Piece(4, (7, 8), "hi", None), OutputOptions()))
    assert only_text == Chunk(4, "hi", (), 2)
    logprobs = (TokenLogprobs(-0.5, 2, ((8, -0.25), (7, -0.5))), TokenLogprobs(-1.0, 1))
    with_logprobs = event_from_proto(chunk_to_proto(Piece(4, (7, 8), "hi", None, logprobs), OutputOptions()))
    entries = (TokenLogprob(7, -0.5, 2, ((8, -0.25), (7, -0.5))), TokenLogprob(8, -1.0, 1, ()))
    assert with_logprobs == Chunk(4, "hi", (), 2, entries)


@pytest.mark.parametrize("handover", list(Handover))
@pytest.mark.parametrize("reason", [None, *RecomputeReason])
def test_every_word_of_a_transfer_has_one_on_the_wire(handover: Handover, reason: RecomputeReason | None) -> None:
    transfer = TransferReport(recompute_reason=reason)
    durations = PhaseDurations(dict.fromkeys(PHASES, 0.0), 0.0, None)
    report = PhaseReport(durations, transfer, handover, "", "", 1, PlacementMode.SPLIT, "split")
    finished = event_from_proto(finished_to_proto(Completed(FinishReason.STOP, None, None, Usage(1, 1, 0), report)))
    assert isinstance(finished, Finished)
    assert (finished.phases.handover, finished.phases.transfer) == (handover, transfer)
    assert finished.cumulative_logprob is None


def test_logprobs_that_are_not_one_for_each_token_are_a_broken_stream() -> None:
    grammar = StreamGrammar()
    grammar.check(STARTED)
    with pytest.raises(BatonError, match="1 logprobs came with 2 tokens"):
        grammar.check(Chunk(0, "hi", (), 2, (TokenLogprob(7, -0.5, 1, ()),)))


def test_values_of_a_newer_server_are_tolerated() -> None:
    response = pb.GenerateResponse(finished=pb.Finished(reason=99))  # type: ignore[arg-type]
    finished = event_from_proto(response)
    assert isinstance(finished, Finished)
    assert finished.reason is None
    assert event_from_proto(pb.GenerateResponse()) is None


def test_prompts_take_text_ids_and_messages() -> None:
    assert prompt_of("hi") == TextPrompt("hi")
    assert prompt_of([1, 2]) == TokenPrompt((1, 2))
    assert chat_prompt([("user", "hi"), ChatMessage("assistant", "yes")]).messages[0] == ChatMessage("user", "hi")


def test_messages_and_tools_are_taken_as_people_have_them() -> None:
    call = {"id": "c", "name": "f", "arguments_json": "{}"}
    schema = {"type": "object"}
    prompt = chat_prompt(
        [
            {"role": "assistant", "content": None, "tool_calls": [call, ToolCall("d", "g", "{}")]},
            {"role": "tool", "content": "42", "tool_call_id": "c", "name": "f"},
        ],
        tools=[Tool("a"), {"name": "b"}, {"type": "function", "function": {"name": "c", "parameters": schema}}],
        tool_choice="required",
        tool_name="c",
        template_arguments={"enable_thinking": False},
    )
    assert prompt.messages == (
        ChatMessage("assistant", "", (ToolCall("c", "f", "{}"), ToolCall("d", "g", "{}"))),
        ChatMessage("tool", "42", tool_call_id="c", name="f"),
    )
    assert prompt.tools == (Tool("a"), Tool("b"), Tool("c", "", '{"type": "object"}'))
    assert (prompt.tool_choice, prompt.tool_name) == (ToolChoice.REQUIRED, "c")
    assert prompt.template_arguments_json == '{"enable_thinking": false}'


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "context": "secret"}, "a message has no context; it has role, content"),
        ({"content": "secret"}, "a message needs role"),
        (["user", "secret", "secret"], "a message is a ChatMessage, a pair"),
        ({"role": "assistant", "tool_calls": [{"id": "c", "function": "secret"}]}, "a tool call has no function"),
    ],
)
def test_what_is_no_message_is_refused_without_repeating_it(message: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        chat_prompt([message])
    assert "secret" not in str(refused.value)


def test_resuming_asks_for_token_ids_and_nothing_else_does() -> None:
    for output, content in (
        (None, pb.OutputOptions.CONTENT_BOTH),
        (OutputOptions(), pb.OutputOptions.CONTENT_BOTH),
        (OutputOptions(wants_text=False, wants_token_ids=True), pb.OutputOptions.CONTENT_TOKEN_IDS),
    ):
        call = asked("hi", 1.0, {"output": output, "resume": True})
        assert call.message.output.content == content
        assert call.message.HasField("resume")
    plain = asked("hi", 1.0, {})
    assert (plain.message, plain.is_resumable) == (pb.GenerateRequest(text="hi"), False)


def test_a_resume_says_what_is_here_and_brings_what_another_router_needs() -> None:
    call = asked("hi", 1.0, {"resume": True, "tenant": "shop", "sample_count": 2})
    state = Continuity(
        address_count=1,
        address_index=0,
        sample_count=2,
        is_resumable=True,
        wants_token_ids=False,
        rng=random.Random(1),
    )
    for event in (Started("g", "m", 1, "token"), Chunk(0, "x", (7, 8), 2, sample_index=1)):
        state.take(event)
    message = resume_to_proto(call.message, state)
    assert (message.resume_token, message.tenant) == ("token", "shop")
    assert (message.next_token_index, list(message.next_token_indices)) == (0, [0, 2])
    assert message.continuation.request == call.message
    assert [list(each.ids) for each in message.continuation.samples] == [[], [7, 8]]


def test_nothing_that_was_said_is_shown_by_accident() -> None:
    secret = "the secret"
    finished = dataclasses.replace(FINISHED, matched_stop_sequence=secret, tool_calls=(ToolCall("c", "f", secret),))
    started = Started("g", "m", 1, secret)
    chunk_ = Chunk(0, secret, (7,), 1, reasoning_text=secret)
    builder = AnswerBuilder()
    for event in (started, PromptPart(0, secret, (), 1), chunk_, finished):
        assert secret not in repr(event)
        builder.add(event)
    answer = builder.answer()
    assert (answer.text, answer.prompt_text) == (secret, secret)
    assert secret not in repr(answer)
    assert secret not in repr(asked(secret, 1.0, {}))


@pytest.mark.parametrize("addresses", [[], [""], ""])
def test_a_client_without_an_address_is_refused(addresses: Any) -> None:
    with pytest.raises(ValueError, match="at least one address"):
        BatonClientSync(addresses)


def test_virtual_time_imports_no_grpc_and_the_fake_does_when_it_is_asked_for() -> None:
    script = (
        "import sys\n"
        "from baton.testing import in_virtual_time, run_virtual\n"
        "assert not {'grpc', 'google.protobuf'} & set(sys.modules)\n"
        "from baton.testing import FakeBaton, FakeCall\n"
        "assert 'grpc' in sys.modules\n"
        "import baton.testing\n"
        "assert not hasattr(baton.testing, 'FakeOther')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_client_and_its_command_import_nothing_of_the_server() -> None:
    script = (
        "import sys, baton.client, baton.admin_client, baton.__main__\n"
        "bad = {'tokenizers', 'jinja2', 'prometheus_client', 'ray', 'vllm', 'torch', 'rich', 'uvloop',"
        " 'grpc_status', 'google.rpc', 'router', 'fleet', 'engine'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

"""Each field of each request: taken at both ends of its range with an effect that shows, and refused beyond them.

The effect is seen in the jobs that the simulated engines are given, or in the answer. A refusal must name the field,
the value, the bound and what to do. Tools are test_conformance_tools.py's; test_conformance_register.py walks the
descriptors: a field without a test, or a test without a field, fails.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from field_register import Register
from raw_calls import GENERATION, MODELS, STATUS, Outcome, ask, generate
from sim_cluster import CONTEXT, RULE, TOKENIZER, SimCluster, sim_cluster
from test_modes_api import overhear
from tokenizers.processors import TemplateProcessing

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.v1 import status_pb2 as status
from engine.protocol import DecodeJob, PrefillJob
from engine.sim_tokens import simulated_answer
from router.tiny_model import END_ID, START_ID, tiny_tokenizer, write_tiny_model

TEXT = "Once upon a time there was a small model"
IDS = TOKENIZER.encode(TEXT)
VOCABULARY = TOKENIZER.vocab_size
BOTH = pb.OutputOptions.CONTENT_BOTH
FIX = re.compile(r"must|ask|[Cc]heck|no more than|at most|at least|give|leave|send|set |name |say |allow|add ")
"""A word that says what to do."""
OF_THE_VOCABULARY = f"; must be 0 to {VOCABULARY - 1}, a token id of tiny"
Job = PrefillJob | DecodeJob
register = Register()
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: Any) -> AsyncIterator[SimCluster]:
    directory: Path = tmp_path_factory.mktemp("model")
    async with sim_cluster(directory, max_message_bytes=64 * 2**20) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(cluster: SimCluster) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(cluster.endpoint.address, options=options) as channel:
        yield channel


@pytest_asyncio.fixture(loop_scope="module")
async def jobs(cluster: SimCluster) -> AsyncIterator[list[Job]]:
    """What the engines are given during a test."""
    heard: list[Job] = []
    engines: list[Any] = [worker.engine for worker in cluster.workers.values()]
    before = [(engine.prefill, engine.decode) for engine in engines]
    overhear(cluster, heard)
    yield heard
    for engine, (prefill, decode) in zip(engines, before, strict=True):
        engine.prefill, engine.decode = prefill, decode


def request(**changes: Any) -> pb.GenerateRequest:
    base = pb.GenerateRequest(stop=pb.StopConditions(max_output_token_count=4, ignore_eos=True))
    if not {"text", "token_ids", "chat"} & set(changes):
        base.text = TEXT
    base.MergeFrom(pb.GenerateRequest(**changes))
    return base


def sampled(**sampling: Any) -> pb.GenerateRequest:
    return request(sampling=pb.Sampling(**sampling))


def assert_refused(outcome: Outcome, field: str, value: str, *, rest: str | None = None) -> None:
    """``value``: as the description must show it; ``rest``: all of it that comes then, the bound and what to do, of
    the only violation."""
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), outcome
    assert field in outcome.violations, outcome.violations
    description = outcome.violations[field]
    assert value in description, description
    assert FIX.search(description), description
    if rest is not None:
        assert outcome.violations == {field: value + rest}
    assert not outcome.has_headers


# Numbers: one table.


@dataclass(frozen=True)
class Number:
    """``make`` gives a request with the value. What became of it is read from the engines' jobs (``seen``) or from
    the answer (``told``). ``rest``: what a refusal says after the value."""

    make: Callable[[Any], pb.GenerateRequest]
    taken: tuple[Any, ...]
    refused: tuple[Any, ...]
    named: str
    rest: str
    seen: Callable[[Job], Any] | None = None
    told: Callable[[Outcome], Any] | None = None


def of_sampling(name: str) -> Callable[[Any], pb.GenerateRequest]:
    return lambda value: sampled(**{name: value})


def job_sampling(name: str) -> Callable[[Job], Any]:
    return lambda job: getattr(job.sampling, name)


def _sampling_number(name: str, taken: tuple[Any, ...], refused: tuple[Any, ...], rest: str) -> Number:
    return Number(of_sampling(name), taken, refused, f"sampling.{name}", rest, job_sampling(name))


def past(value: float, towards: float) -> float:
    return math.nextafter(value, towards)


MOST = 2**31 - 1
NUMBERS: dict[str, Number] = {
    "Sampling.temperature": _sampling_number(
        "temperature",
        (0.0, 0.01, 2.0),
        (past(0, -1), past(2, 3), math.nan, math.inf),
        "; must be 0 to 2, where 0 is greedy",
    ),
    "Sampling.top_p": _sampling_number(
        "top_p",
        (past(0, 1), 1.0),
        (0.0, past(1, 2), math.nan),
        "; must be greater than 0 and at most 1, where 1 keeps all",
    ),
    "Sampling.top_k": _sampling_number("top_k", (0, 1, MOST), (-1, -MOST), "; must be 1 or more, or 0 to keep all"),
    "Sampling.min_p": _sampling_number(
        "min_p", (0.0, 1.0), (past(0, -1), past(1, 2), math.inf), "; must be 0 to 1, where 0 drops none"
    ),
    "Sampling.seed": _sampling_number(
        "seed", (0, 2**63 - 1), (-1, -(2**63)), f"; must be 0 to {2**63 - 1}, or absent for a draw of its own"
    ),
    "Sampling.presence_penalty": _sampling_number(
        "presence_penalty", (-2.0, 2.0), (past(-2, -3), past(2, 3)), "; must be -2 to 2, where 0 is none"
    ),
    "Sampling.frequency_penalty": _sampling_number(
        "frequency_penalty", (-2.0, 2.0), (past(-2, -3), past(2, 3), math.nan), "; must be -2 to 2, where 0 is none"
    ),
    "Sampling.repetition_penalty": _sampling_number(
        "repetition_penalty",
        (0.01, 100.0),
        (past(0.01, 0), 0.0, past(100, 101)),
        "; must be 0.01 to 100, where 1 is none",
    ),
    "TokenBias.token_id": Number(
        lambda value: sampled(logit_bias=[pb.TokenBias(token_id=value, bias=1)]),
        (0, VOCABULARY - 1),
        (-1, VOCABULARY),
        "sampling.logit_bias[0].token_id",
        f"; must be 0 to {VOCABULARY - 1}, a token id of tiny",
        lambda job: job.sampling.logit_bias[0][0],
    ),
    "TokenBias.bias": Number(
        lambda value: sampled(logit_bias=[pb.TokenBias(token_id=5, bias=value)]),
        (-100.0, 100.0),
        (past(-100, -101), past(100, 101), math.nan),
        "sampling.logit_bias[0].bias",
        "; must be -100 to 100, where 0 is none",
        lambda job: job.sampling.logit_bias[0][1],
    ),
    "GenerateRequest.priority": Number(
        lambda value: request(priority=value),
        (-100, 100),
        (-101, 101),
        "priority",
        "; must be -100 to 100",
        lambda job: job.priority,
    ),
    "StopConditions.max_output_token_count": Number(
        lambda value: pb.GenerateRequest(text=TEXT, stop=pb.StopConditions(max_output_token_count=value)),
        (1, 2, CONTEXT - len(IDS)),
        (0, -1),
        "stop.max_output_token_count",
        "; must be at least 1, or absent for what the context has left",
        told=lambda outcome: outcome.finished.usage.output_token_count,
    ),
    "StopConditions.min_output_token_count": Number(
        lambda value: request(stop=pb.StopConditions(min_output_token_count=value)),
        (0, 4),
        (-1, 5),
        "stop.min_output_token_count",
        "; must be 0 to max_output_token_count, which is 4",
        lambda job: job.stop.min_token_count,
    ),
    "OutputOptions.top_logprob_count": Number(
        lambda value: request(output=pb.OutputOptions(top_logprob_count=value)),
        (0, 20),
        (-1, 21),
        "output.top_logprob_count",
        "; must be 0 to 20, or absent for no logprobs",
        lambda job: job.top_logprob_count,
        lambda outcome: one_of({len(each.top) for chunk in outcome.chunks for each in chunk.logprobs}),
    ),
    "OutputOptions.prompt_logprob_count": Number(
        lambda value: request(output=pb.OutputOptions(prompt_logprob_count=value)),
        (0, 20),
        (-1, 21),
        "output.prompt_logprob_count",
        "; must be 0 to 20, or absent for no logprobs of the prompt",
        told=lambda outcome: one_of({len(each.top) for each in prompt_logprobs(outcome)[1:]}),
    ),
    "OutputOptions.max_chunk_token_count": Number(
        lambda value: request(output=pb.OutputOptions(max_chunk_token_count=value)),
        (1, 1024, 1025, MOST),  # what it does, where tokens have waited, is told by test_conformance_times.py
        (0, -1),
        "output.max_chunk_token_count",
        "; must be 1 or more (above 1024 means 1024), or absent for the default",
    ),
    "GenerateRequest.sample_count": Number(
        lambda value: request(sample_count=value, sampling=pb.Sampling(temperature=1)),
        (1, 16),
        (-1, 17),
        "sample_count",
        "; must be 1 to 16. For more, send several requests.",
        told=lambda outcome: len({chunk.sample_index for chunk in outcome.chunks}),
    ),
}


def prompt_logprobs(outcome: Outcome) -> list[pb.TokenLogprobs]:
    return [each for m in outcome.messages if m.WhichOneof("event") == "prompt" for each in m.prompt.logprobs]


def one_of(values: set[Any]) -> Any:
    [value] = values
    return value


def shown(value: Any) -> str:
    """How a description shows a number."""
    if isinstance(value, float) and math.isnan(value):
        return "is not a number"
    return f"is {value:g}" if isinstance(value, float) and float(f"{value:g}") in (value, math.inf) else f"is {value}"


@pytest.mark.parametrize("field", NUMBERS)
async def test_a_number_is_taken_at_both_ends_and_reaches_the_engine(
    field: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    number = NUMBERS[field]
    for value in number.taken:
        jobs.clear()
        outcome = await generate(channel, number.make(value))
        assert outcome.finished.usage.output_token_count >= 1
        assert jobs
        if number.seen is not None:
            assert {number.seen(job) for job in jobs} == {value}
        if number.told is not None:
            assert number.told(outcome) == value


@pytest.mark.parametrize("field", NUMBERS)
async def test_a_number_beyond_an_end_is_refused_by_name_value_bound_and_fix(
    field: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    number = NUMBERS[field]
    for value in number.refused:
        assert_refused(await generate(channel, number.make(value)), number.named, shown(value), rest=number.rest)
    assert not jobs, "what is refused costs nothing"


for _field in NUMBERS:
    register.add(_field, "test_a_number_is_taken_at_both_ends_and_reaches_the_engine")


# Lists and texts: how many, and how long.


@dataclass(frozen=True)
class Length:
    """``make`` gives a request with so many elements, bytes or characters."""

    make: Callable[[int], pb.GenerateRequest]
    taken: tuple[int, ...]
    refused: tuple[int, ...]
    named: str
    says: str
    """All of a refusal, ``{}`` being the length."""
    seen: Callable[[Job], int] | None = None
    says_empty: str = ""
    """The same, where there is none at all."""


def texts(count: int) -> list[str]:
    return [f"~{index}" for index in range(count)]


LENGTHS: dict[str, Length] = {
    "Sampling.logit_bias": Length(
        lambda count: sampled(logit_bias=[pb.TokenBias(token_id=index % VOCABULARY) for index in range(count)]),
        (1, VOCABULARY),
        (1025,),
        "sampling.logit_bias",
        "has {} entries; at most 1024. Leave the others out.",
        lambda job: len(job.sampling.logit_bias),
    ),
    "Sampling.allowed_token_ids": Length(
        lambda count: sampled(allowed_token_ids=pb.TokenIds(ids=range(count))),
        (1, VOCABULARY),
        (0,),
        "sampling.allowed_token_ids",
        "",
        lambda job: len(job.sampling.allowed_token_ids),
        says_empty="is empty; give at least one token id, or leave it out for all",
    ),
    "Sampling.bad_token_sequences": Length(
        lambda count: sampled(bad_token_sequences=[pb.TokenIds(ids=[5])] * count),
        (1, 64),
        (65,),
        "sampling.bad_token_sequences",
        "has {} sequences; at most 64",
        lambda job: len(job.sampling.bad_token_sequences),
    ),
    "TokenIds.ids": Length(
        lambda count: sampled(bad_token_sequences=[pb.TokenIds(ids=[5] * count)]),
        (1, 16),
        (0, 17),
        "sampling.bad_token_sequences[0].ids",
        "has {} tokens; must have 1 to 16",
        lambda job: len(job.sampling.bad_token_sequences[0]),
    ),
    "StopConditions.stop_sequences": Length(
        lambda count: request(stop=pb.StopConditions(stop_sequences=texts(count))),
        (0, 16),
        (17,),
        "stop.stop_sequences",
        "has {} sequences; at most 16",
    ),
    "a stop sequence": Length(
        lambda count: request(stop=pb.StopConditions(stop_sequences=["~" * count])),
        (1, 256),
        (0, 257),
        "stop.stop_sequences[0]",
        "has {} bytes; must have 1 to 256",
    ),
    "a stop sequence of several bytes a character": Length(
        lambda count: request(stop=pb.StopConditions(stop_sequences=["🔥" * (count // 4) + "~" * (count % 4)])),
        (256,),
        (257,),
        "stop.stop_sequences[0]",
        "has {} bytes; must have 1 to 256",
    ),
    "StopConditions.stop_token_ids": Length(
        lambda count: request(stop=pb.StopConditions(stop_token_ids=[0] * count)),
        (0, 64),
        (65,),
        "stop.stop_token_ids",
        "has {} ids; at most 64",
        lambda job: len(job.stop.stop_token_ids),
    ),
    "GenerateRequest.session_id": Length(
        lambda count: request(session_id="s" * count), (0, 128), (129,), "session_id", "has {} bytes; at most 128"
    ),
    "GenerateRequest.correlation_id": Length(
        lambda count: request(correlation_id="c" * count),
        (0, 128),
        (129,),
        "correlation_id",
        "has {} bytes; at most 128",
    ),
    "GenerateRequest.tenant": Length(
        lambda count: request(tenant="t" * count),
        (0, 1, 64),
        (65,),
        "tenant",
        "has {} characters; must be 1 to 64 letters, digits or any of _ . -, or absent",
        lambda job: len(job.tenant),
    ),
    "Chat.messages": Length(
        lambda count: request(chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * count)),
        (1, 130),
        (0, 1025),
        "chat.messages",
        "has {} entries; at most 1024. Leave the others out.",
        says_empty="is empty; give at least one message",
    ),
    "ChatMessage.role": Length(
        lambda count: request(chat=pb.Chat(messages=[pb.ChatMessage(role="r" * count)])),
        (),
        (0, 65),
        "chat.messages[0].role",
        "has {} bytes; at most 64",
        says_empty='is empty; say "system", "user" or "assistant"',
    ),
    "Choices.texts": Length(
        lambda count: structured(pb.StructuredOutput(choice=pb.Choices(texts=texts(count)))),
        (1, 256),
        (0, 257),
        "sampling.structure.choice",
        "has {} choices; give 1 to 256 texts, none empty, of 65536 bytes at most",
        lambda job: 0 if job.sampling.structure is None else len(job.sampling.structure.choices),
    ),
}  # fmt: skip


def structured(structure: pb.StructuredOutput) -> pb.GenerateRequest:
    """One that may end before its most, as a structure does."""
    stop = pb.StopConditions(max_output_token_count=4)
    return pb.GenerateRequest(text=TEXT, stop=stop, sampling=pb.Sampling(structure=structure))


@pytest.mark.parametrize("field", LENGTHS)
async def test_a_list_or_text_is_taken_at_both_ends_of_its_length(
    field: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    length = LENGTHS[field]
    for count in length.taken:
        jobs.clear()
        outcome = await generate(channel, length.make(count))
        assert outcome.finished.usage.output_token_count >= 1
        if length.seen is not None:
            assert {length.seen(job) for job in jobs} == {count}


@pytest.mark.parametrize("field", LENGTHS)
async def test_a_list_or_text_that_is_too_long_or_too_short_is_refused(
    field: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    length = LENGTHS[field]
    for count in length.refused:
        says = length.says_empty if count == 0 and length.says_empty else length.says.format(count)
        assert_refused(await generate(channel, length.make(count)), length.named, says, rest="")
    assert not jobs


for _field in LENGTHS:
    if "." in _field:
        register.add(_field, "test_a_list_or_text_is_taken_at_both_ends_of_its_length")


# One by one: what is no number and no length.


@register.shows("GenerateRequest.text", "StopConditions.ignore_eos")
async def test_text_is_tokenised_and_answered(channel: grpc.aio.Channel) -> None:
    outcome = await generate(channel, request(output=pb.OutputOptions(content=BOTH)))
    assert outcome.token_ids == simulated_answer(IDS, 4, RULE, ignore_eos=True)
    other = await generate(channel, request(text=TEXT[:-1], output=pb.OutputOptions(content=BOTH)))
    assert other.token_ids == simulated_answer(TOKENIZER.encode(TEXT[:-1]), 4, RULE, ignore_eos=True)
    assert other.token_ids != outcome.token_ids
    for empty in (request(text=""), pb.GenerateRequest()):
        rest = "; set text, token_ids or chat with at least one token"
        assert_refused(await generate(channel, empty), "prompt", "is empty", rest=rest)


@register.shows("GenerateRequest.token_ids")
async def test_token_ids_are_used_as_they_are_and_must_be_of_the_vocabulary(
    channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    for ids in ([0], [VOCABULARY - 1], list(IDS)):
        jobs.clear()
        assert (await generate(channel, request(token_ids=pb.TokenIds(ids=ids)))).finished
        assert list(jobs[0].prompt_token_ids) == ids
    for ids, place in (([-1], 0), ([5, VOCABULARY], 1)):
        refused = await generate(channel, request(token_ids=pb.TokenIds(ids=ids)))
        assert_refused(refused, f"token_ids.ids[{place}]", f"is {ids[place]}", rest=OF_THE_VOCABULARY)
    empty = await generate(channel, request(token_ids=pb.TokenIds()))
    assert_refused(empty, "token_ids.ids", "is empty", rest="; give at least one token id")
    most, beyond = (request(token_ids=pb.TokenIds(ids=[5] * count)) for count in (CONTEXT - 1, CONTEXT))
    assert (await generate(channel, most)).finished.usage.output_token_count == 1
    assert (await generate(channel, beyond)).reason == "PROMPT_TOO_LONG"


@register.shows("GenerateRequest.model")
async def test_the_model_may_be_named(channel: grpc.aio.Channel) -> None:
    assert (await generate(channel, request(model="tiny"))).started.model == "tiny"
    for name in ("Tiny", "tiny ", "\0"):
        refused = await generate(channel, request(model=name))
        assert (refused.reason, refused.metadata["available"]) == ("MODEL_NOT_FOUND", "tiny")


@register.shows("GenerateRequest.sampling", "GenerateRequest.stop", "GenerateRequest.output")
async def test_without_options_an_answer_is_greedy_text_to_the_end_of_the_context(
    channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    prompt = pb.TokenIds(ids=[5] * (CONTEXT - 6))
    outcome = await generate(channel, pb.GenerateRequest(token_ids=prompt))
    assert outcome.finished.reason == pb.FINISH_REASON_CONTEXT_FULL
    assert outcome.finished.usage.output_token_count == 6
    assert outcome.said
    assert not outcome.token_ids
    assert all(job.sampling.is_greedy for job in jobs)


@register.shows("GenerateRequest.chat", "ChatMessage.content", "ChatMessage.role")
async def test_a_chat_is_rendered_by_the_template(channel: grpc.aio.Channel, jobs: list[Job]) -> None:
    messages = [pb.ChatMessage(role=role, content=f"I am {role}") for role in ("system", "user", "assistant", "user")]
    assert (await generate(channel, request(chat=pb.Chat(messages=messages)))).finished
    rendered = "".join(f"<|im_start|>{each.role}\n{each.content}<|im_end|>\n" for each in messages)
    assert jobs[0].prompt_token_ids == TOKENIZER.encode(rendered + "<|im_start|>assistant\n")
    stranger = pb.Chat(messages=[pb.ChatMessage(role="pirate", content="arr")])
    assert_refused(
        await generate(channel, request(chat=stranger)), "chat.messages[0]", "roles are system, user and assistant"
    )


@register.shows("GenerateRequest.correlation_id")
async def test_a_correlation_id_is_in_the_log_line(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for name in ("find-me", "another"):
            outcome = await generate(channel, request(correlation_id=name))
            assert not any(name in str(message) for message in outcome.messages)
    for name in ("find-me", "another"):
        assert sum(name in line.getMessage() for line in caplog.records) == 1


@register.shows("GenerateRequest.session_id")
async def test_requests_of_a_session_go_to_the_same_workers(tmp_path: Path) -> None:
    async with (
        # A worker that a busy machine keeps from reporting for a second gets no requests, of this session or any.
        sim_cluster(tmp_path, prefill_count=3, decode_count=3, worker_silence_s=30.0) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        places = set()

        def is_idle() -> bool:
            workers = cluster.server.roster.view().workers
            loads = [view.load for view in workers]
            return all(view.assigned.request_count == 0 for view in workers) and all(
                load is not None and load.running_count + load.waiting_count + load.used_block_count == 0
                for load in loads
            )

        for number in range(8):
            phases = (await generate(channel, request(text=f"{number} {TEXT}", session_id="s"))).finished.phases
            places.add((phases.prefill_worker_id, phases.decode_worker_id))
            await cluster.until(is_idle, "load reports that say so: under load a session may move")
        assert len(places) == 1


@register.shows("GenerateRequest.tenant")
async def test_a_tenant_has_letters_digits_and_a_few_signs(channel: grpc.aio.Channel, jobs: list[Job]) -> None:
    assert (await generate(channel, request(tenant="Blue_1.x-y"))).finished
    assert {job.tenant for job in jobs} == {"Blue_1.x-y"}
    for tenant in ("a b", "a/b", "é", "\n", "a\n"):
        rest = "; must be 1 to 64 letters, digits or any of _ . -, or absent"
        assert_refused(
            await generate(channel, request(tenant=tenant)), "tenant", f"has {len(tenant)} characters", rest=rest
        )


@register.shows("OutputOptions.content")
async def test_content_says_what_chunks_carry(channel: grpc.aio.Channel) -> None:
    ids = simulated_answer(IDS, 4, RULE, ignore_eos=True)
    text = TOKENIZER.decode(ids)
    for content, said in (
        (pb.OutputOptions.CONTENT_UNSPECIFIED, (text, ())),
        (pb.OutputOptions.CONTENT_TEXT, (text, ())),
        (pb.OutputOptions.CONTENT_TOKEN_IDS, ("", ids)),
        (pb.OutputOptions.CONTENT_BOTH, (text, ids)),
    ):
        outcome = await generate(channel, request(output=pb.OutputOptions(content=content)))
        assert (outcome.said, outcome.token_ids) == said
    unknown = await generate(channel, request(output=pb.OutputOptions(content=99)))  # type: ignore[arg-type]
    assert_refused(unknown, "output.content", "is 99;")


@register.shows("OutputOptions.echo_prompt")
async def test_the_prompt_is_told_back_in_the_form_of_the_answer(channel: grpc.aio.Channel) -> None:
    for content, said in ((0, (TEXT, [])), (pb.OutputOptions.CONTENT_TOKEN_IDS, ("", list(IDS)))):
        output = pb.OutputOptions(echo_prompt=True, content=content)  # type: ignore[arg-type]
        outcome = await generate(channel, request(output=output))
        parts = [each.prompt for each in outcome.messages if each.WhichOneof("event") == "prompt"]
        assert "".join(part.text for part in parts) == said[0]
        assert [token_id for part in parts for token_id in part.token_ids] == said[1]
        assert sum(part.token_count for part in parts) == len(IDS)
        assert outcome.finished
    resumed = request(output=pb.OutputOptions(echo_prompt=True), resume=pb.ResumeOptions())
    assert_refused(await generate(channel, resumed), "output.echo_prompt", "resum")


@register.shows("OutputOptions.prompt_logprob_count", "OutputOptions.top_logprob_count")
async def test_logprobs_come_of_what_was_asked_and_where_absent_of_nothing(channel: grpc.aio.Channel) -> None:
    for of_answer in (None, 0, 3):
        for of_prompt in (None, 0, 3):
            output = pb.OutputOptions(top_logprob_count=of_answer, prompt_logprob_count=of_prompt)
            outcome = await generate(channel, request(output=output))
            answer = [len(each.top) for chunk in outcome.chunks for each in chunk.logprobs]
            assert answer == ([] if of_answer is None else [of_answer] * 4)
            prompt = [len(each.top) for each in prompt_logprobs(outcome)]
            assert prompt == ([] if of_prompt is None else [0] + [of_prompt] * (len(IDS) - 1))
            assert outcome.finished.HasField("cumulative_logprob") is (of_answer is not None)
    resumed = request(output=pb.OutputOptions(prompt_logprob_count=0), resume=pb.ResumeOptions())
    assert_refused(await generate(channel, resumed), "output.prompt_logprob_count", "resum")


@register.shows("GenerateRequest.sample_count")
async def test_so_many_samples_come_and_greedy_ones_are_refused(channel: grpc.aio.Channel) -> None:
    outcome = await generate(channel, request(sample_count=3, sampling=pb.Sampling(temperature=1)))
    assert {chunk.sample_index for chunk in outcome.chunks} == {0, 1, 2}
    assert (await generate(channel, request(sample_count=0))).finished.samples == [], "0 counts as 1"
    rest = (
        " with sampling.temperature 0, which draws the same answer 2 times; set a temperature of at least 1e-05, or "
        "sample_count 1"
    )
    assert_refused(await generate(channel, request(sample_count=2)), "sample_count", "is 2", rest=rest)


@register.shows("Sampling.seed")
async def test_sample_i_is_drawn_with_seed_plus_i_which_must_be_a_seed(
    channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    most = 2**63 - 1
    for seed in (0, most - 2):
        jobs.clear()
        drawn = pb.Sampling(temperature=1, seed=seed)
        assert (await generate(channel, request(sample_count=3, sampling=drawn))).finished
        assert {job.sampling.seed for job in jobs} == {seed, seed + 1, seed + 2}
    drawn = pb.Sampling(temperature=1, seed=most - 1)
    rest = f"; with sample_count 3 the last sample is drawn with seed + 2, which must be at most {most}"
    refused = await generate(channel, request(sample_count=3, sampling=drawn))
    assert_refused(refused, "sampling.seed", f"is {most - 1}", rest=rest)


@register.shows("Sampling.temperature", "Sampling.logit_bias", "Sampling.allowed_token_ids")
async def test_tiny_temperatures_and_lists_reach_the_engine_as_they_are(
    channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    for asked in (
        0.00001,
        past(0.00001, 0),
        0.001,
    ):  # raised or greedy in the engine: what that makes of it is its own
        jobs.clear()
        assert (await generate(channel, sampled(temperature=asked))).finished
        assert {job.sampling.temperature for job in jobs} == {asked}
    least = request(sample_count=2, sampling=pb.Sampling(temperature=0.00001))
    assert len((await generate(channel, least)).finished.samples) == 2
    least.sampling.temperature = past(0.00001, 0)
    assert list((await generate(channel, least)).violations) == ["sample_count"]
    jobs.clear()
    lists = pb.Sampling(
        logit_bias=[pb.TokenBias(token_id=7, bias=-1.5), pb.TokenBias(token_id=3)],
        allowed_token_ids=pb.TokenIds(ids=[9, 4, 200]),
        bad_token_sequences=[pb.TokenIds(ids=[1, 2]), pb.TokenIds(ids=[4])],
    )
    assert (await generate(channel, request(sampling=lists))).finished
    for job in jobs:
        assert dict(job.sampling.logit_bias) == {7: -1.5, 3: 0.0}
        assert set(job.sampling.allowed_token_ids) == {9, 4, 200}
        assert set(job.sampling.bad_token_sequences) == {(1, 2), (4,)}
    twice = [pb.TokenBias(token_id=4, bias=1)] * 2
    for sampling, field, says in (
        (pb.Sampling(logit_bias=twice), "sampling.logit_bias", "names a token twice; add its biases up"),
        # As many entries as there may be, though the vocabulary has no more: the count is not what is wrong.
        (pb.Sampling(logit_bias=twice * 512), "sampling.logit_bias", "names a token twice; add its biases up"),
        (
            pb.Sampling(allowed_token_ids=pb.TokenIds(ids=[4, 4])),
            "sampling.allowed_token_ids.ids",
            "names a token twice; name each once",
        ),
        (
            pb.Sampling(allowed_token_ids=pb.TokenIds(ids=[4, VOCABULARY])),
            "sampling.allowed_token_ids.ids[1]",
            f"is {VOCABULARY}{OF_THE_VOCABULARY}",
        ),
        (
            pb.Sampling(bad_token_sequences=[pb.TokenIds(ids=[4, -1])]),
            "sampling.bad_token_sequences[0].ids[1]",
            f"is -1{OF_THE_VOCABULARY}",
        ),
    ):
        assert_refused(await generate(channel, request(sampling=sampling)), field, says, rest="")


@register.shows("StopConditions.stop_sequences")
async def test_any_of_16_stop_sequences_ends_the_answer_and_the_first_found_is_named(
    channel: grpc.aio.Channel,
) -> None:
    ids = simulated_answer(IDS, 30, RULE, ignore_eos=True)
    whole = TOKENIZER.decode(ids)
    at = next(at for at in range(10, 25) if whole[at : at + 2].isascii() and whole[at : at + 2].isprintable()
              and whole.index(whole[at : at + 2]) == at)  # fmt: skip
    wanted = whole[at : at + 2]
    stop = pb.StopConditions(max_output_token_count=30, ignore_eos=True)
    for sequences in ([*texts(15), wanted], [wanted, *texts(15)]):
        del stop.stop_sequences[:]
        stop.stop_sequences.extend(sequences)
        outcome = await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop))
        assert (outcome.said, outcome.finished.matched_stop_sequence) == (whole[:at], wanted)
        assert outcome.finished.reason == pb.FINISH_REASON_STOP
    del stop.stop_sequences[:]
    stop.stop_sequences.extend(texts(16))
    outcome = await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop))
    assert (outcome.said, outcome.finished.reason) == (whole, pb.FINISH_REASON_MAX_OUTPUT_TOKENS)


@register.shows("StopConditions.min_output_token_count")
async def test_nothing_ends_an_answer_before_its_least(channel: grpc.aio.Channel) -> None:
    ids = simulated_answer(IDS, 4, RULE, ignore_eos=True)
    for least, count in ((0, 2), (1, 2), (2, 4), (3, 4), (4, 4)):
        stop = pb.StopConditions(stop_token_ids=[ids[1]], min_output_token_count=least)
        outcome = await generate(channel, request(stop=stop, output=pb.OutputOptions(content=BOTH)))
        wanted = simulated_answer(IDS, 4, RULE, ignore_eos=True, stop_token_ids=(ids[1],), min_token_count=least)
        assert outcome.token_ids == wanted
        assert len(wanted) == count


@register.shows("Chat.messages", "ChatMessage.role")
async def test_1024_messages_are_read_and_counted_and_roles_are_the_templates(
    channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    message = request(chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * 1024))
    outcome = await generate(channel, message)
    assert outcome.reason == "PROMPT_TOO_LONG", "which was counted: they are not too many"
    assert int(outcome.metadata["prompt_token_count"]) >= CONTEXT
    template = tmp_path / "any.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    async with (
        sim_cluster(tmp_path / "model", chat_template_path=str(template)) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as there,
    ):
        heard: list[Job] = []
        overhear(cluster, heard)
        for role in ("r" * 64, "é" * 32):
            heard.clear()
            chat = pb.Chat(messages=[pb.ChatMessage(role=role, content="hi")])
            assert (await generate(there, request(chat=chat))).finished
            assert heard[0].prompt_token_ids == TOKENIZER.encode(f"{role}: hi\n")


@register.shows("StopConditions.stop_token_ids")
async def test_a_stop_token_ends_the_answer_and_must_be_of_the_vocabulary(channel: grpc.aio.Channel) -> None:
    ids = simulated_answer(IDS, 4, RULE, ignore_eos=True)
    outcome = await generate(channel, request(stop=pb.StopConditions(stop_token_ids=[ids[1]])))
    assert (outcome.finished.usage.output_token_count, outcome.finished.matched_stop_token_id) == (2, ids[1])
    for outside in (-1, VOCABULARY):
        refused = await generate(channel, request(stop=pb.StopConditions(stop_token_ids=[outside])))
        assert_refused(refused, "stop.stop_token_ids[0]", f"is {outside}", rest=OF_THE_VOCABULARY)


@register.shows("StopConditions.ignore_eos")
async def test_the_models_end_is_ignored_only_on_request(tmp_path: Path) -> None:
    ending = {"tokens": replace(RULE, eos_probability=0.5)}
    async with (
        sim_cluster(tmp_path, sim=ending) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        for ignored in (False, True):
            stop = pb.StopConditions(max_output_token_count=50, ignore_eos=ignored)
            outcome = await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop))
            assert (outcome.finished.usage.output_token_count == 50) is ignored


def padded(size: int) -> str:
    """A JSON schema of so many bytes."""
    text = '{"type": "object", "description": "%s"}'
    return text % ("x" * (size - len(text) + 2))


STRUCTURES: dict[str, tuple[list[pb.StructuredOutput], list[tuple[pb.StructuredOutput, str]]]] = {
    "json_schema": (
        [pb.StructuredOutput(json_schema='{"type": "object"}'), pb.StructuredOutput(json_schema=padded(65_536))],
        [
            (pb.StructuredOutput(json_schema="[1]"), "is not a JSON object"),
            (pb.StructuredOutput(json_schema="{"), "is not JSON"),
            (pb.StructuredOutput(json_schema=""), "is empty"),
            (pb.StructuredOutput(json_schema=padded(65_537)), "has 65537 bytes"),
        ],
    ),
    "regex": (
        [pb.StructuredOutput(regex="[a-z]+"), pb.StructuredOutput(regex="(" * 32 + ")" * 32)],
        [(pb.StructuredOutput(regex="(" * 33 + ")" * 33), "32"), (pb.StructuredOutput(regex="a\0"), "has a NUL")],
    ),
    "choice": (
        [
            pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no"])),
            pb.StructuredOutput(choice=pb.Choices(texts=["x" * 65_535, "y"])),
        ],
        [
            (pb.StructuredOutput(choice=pb.Choices(texts=["yes", ""])), "has an empty choice"),
            (pb.StructuredOutput(choice=pb.Choices(texts=["x" * 65_535, "yz"])), "has 65537 bytes"),
        ],
    ),
    "grammar": (
        [pb.StructuredOutput(grammar='start: "a"'), pb.StructuredOutput(grammar="a" * 65_536)],
        [
            (pb.StructuredOutput(grammar="a" * 65_537), "has 65537 bytes"),
            (pb.StructuredOutput(grammar=" "), "is empty"),
        ],
    ),
}
REMEDIES = {
    "json_schema": "; give a JSON object of at most 65536 bytes",
    "regex": "; give an expression of at most 65536 bytes with fewer brackets and repeats",
    "choice": "; give 1 to 256 texts, none empty, of 65536 bytes at most",
    "grammar": "; give a grammar of at most 65536 bytes with fewer brackets and repeats",
}


@pytest.mark.parametrize("kind", STRUCTURES)
@register.shows("Sampling.structure", *(f"StructuredOutput.{kind}" for kind in STRUCTURES), "Choices.texts")
async def test_a_structure_reaches_the_engine_as_it_is_and_a_broken_one_does_not(
    kind: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    good, bad = STRUCTURES[kind]
    for structure in good:
        jobs.clear()
        assert (await generate(channel, structured(structure))).finished
        assert jobs
        for job in jobs:
            held_to = job.sampling.structure
            assert held_to is not None
            assert held_to.kind.value == kind
            wanted = getattr(structure, kind)
            assert held_to.choices == tuple(wanted.texts) if kind == "choice" else held_to.text == wanted
    jobs.clear()
    for structure, says in bad:
        refused = await generate(channel, structured(structure))
        assert_refused(refused, f"sampling.structure.{kind}", says)
        assert refused.violations[f"sampling.structure.{kind}"].endswith(REMEDIES[kind])
    assert not jobs


@register.shows("Sampling.structure")
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stop": pb.StopConditions(ignore_eos=True)}, "stop.ignore_eos"),
        ({"stop": pb.StopConditions(min_output_token_count=1)}, "stop.min_output_token_count"),
        ({"sampling": pb.Sampling(allowed_token_ids=pb.TokenIds(ids=[5]))}, "sampling.allowed_token_ids"),
        ({"sampling": pb.Sampling(bad_token_sequences=[pb.TokenIds(ids=[5])])}, "sampling.bad_token_sequences"),
    ],
)
async def test_what_contradicts_a_structure_is_refused_beside_it(
    changes: dict[str, Any], field: str, channel: grpc.aio.Channel
) -> None:
    message = structured(pb.StructuredOutput(regex="a"))
    message.MergeFrom(pb.GenerateRequest(**changes))
    refused = await generate(channel, message)
    assert list(refused.violations) == [field]
    assert_refused(refused, field, "is set with sampling.structure")
    message.sampling.ClearField("structure")
    assert (await generate(channel, message)).finished, "alone it is fine"


@register.shows("StructuredOutput.json_object", "Sampling.structure")
async def test_any_json_object_may_be_asked_for_and_nothing_that_contradicts_it(
    channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    structure = pb.StructuredOutput(json_object=pb.JsonObject())
    stop = pb.StopConditions(max_output_token_count=4)
    sampling = pb.Sampling(structure=structure)
    assert (await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop, sampling=sampling))).finished
    assert {job.sampling.structure.kind.value for job in jobs if job.sampling.structure} == {"json_object"}
    assert_refused(await generate(channel, request(sampling=sampling)), "stop.ignore_eos", "leave one out")
    empty = await generate(channel, sampled(structure=pb.StructuredOutput()))
    assert_refused(empty, "sampling.structure", "of no kind")


@register.shows("GenerateRequest.resume", "ResumeOptions.grace")
async def test_a_resumable_answer_says_its_grace_cut_to_the_servers_most(channel: grpc.aio.Channel) -> None:
    for asked_ms, given_ms in ((1, 1), (2000, 2000), (10**9, 300_000)):
        options = pb.ResumeOptions()
        options.grace.FromMilliseconds(asked_ms)
        outcome = await generate(channel, request(resume=options))
        assert outcome.started.resume_grace.ToMilliseconds() == given_ms
        await cancelled(channel, outcome.started.resume_token)
    default = await generate(channel, request(resume=pb.ResumeOptions()))
    assert default.started.resume_grace.ToMilliseconds() == 30_000
    await cancelled(channel, default.started.resume_token)
    for seconds in (0, -1):
        options = pb.ResumeOptions()
        options.grace.FromSeconds(seconds)
        assert_refused(await generate(channel, request(resume=options)), "resume.grace", f"is {seconds}")


async def cancelled(channel: grpc.aio.Channel, token: str, tenant: str = "") -> Outcome:
    message = pb.CancelGenerationRequest(resume_token=token, tenant=tenant)
    return await ask(channel, f"/{GENERATION}/CancelGeneration", message)


async def resumed(channel: grpc.aio.Channel, message: pb.ResumeGenerateRequest) -> Outcome:
    return await ask(channel, f"/{GENERATION}/ResumeGenerate", message)


@register.shows(
    "ResumeGenerateRequest.resume_token",
    "ResumeGenerateRequest.next_token_index",
    "ResumeGenerateRequest.tenant",
    "CancelGenerationRequest.resume_token",
    "CancelGenerationRequest.tenant",
)
async def test_an_answer_goes_on_at_the_token_asked_for_by_its_own_tenant(channel: grpc.aio.Channel) -> None:
    whole = await generate(
        channel, request(tenant="blue", resume=pb.ResumeOptions(), output=pb.OutputOptions(content=BOTH))
    )
    for index in range(5):
        message = pb.ResumeGenerateRequest(
            resume_token=whole.started.resume_token, next_token_index=index, tenant="blue"
        )
        outcome = await resumed(channel, message)
        assert outcome.token_ids == whole.token_ids[index:]
        assert outcome.finished.reason == whole.finished.reason
    for index in (4, 5):  # all of it, and all of it with the text that was held back to its end
        message.next_token_index = index
        outcome = await resumed(channel, message)
        assert (outcome.said if index == 5 else "", outcome.token_ids) == ("", ())
        assert outcome.finished.usage == whole.finished.usage
    for index, rest in (
        (-1, "; must be 0 or more, the index of the first token that you lack"),
        (6, None),
    ):
        message.next_token_index = index
        assert_refused(await resumed(channel, message), "next_token_index", f"is {index}", rest=rest)
    message.next_token_index, message.tenant = 0, "red"
    assert (await resumed(channel, message)).reason == "RESUME_DENIED"
    assert (await resumed(channel, pb.ResumeGenerateRequest(tenant="blue"))).reason == "RESUME_DENIED"
    assert (await cancelled(channel, whole.started.resume_token, "red")).reason == "RESUME_DENIED"
    assert not (await cancelled(channel, whole.started.resume_token, "blue")).messages[0].was_running


@register.shows("ResumeGenerateRequest.next_token_indices")
async def test_each_sample_goes_on_at_an_index_of_its_own(channel: grpc.aio.Channel) -> None:
    begun = request(
        sample_count=2,
        sampling=pb.Sampling(temperature=1, seed=1),
        resume=pb.ResumeOptions(),
        output=pb.OutputOptions(content=BOTH),
    )
    whole = await generate(channel, begun)
    message = pb.ResumeGenerateRequest(resume_token=whole.started.resume_token, next_token_indices=[1, 3])
    outcome = await resumed(channel, message)
    first: dict[int, int] = {}
    for chunk in outcome.chunks:
        first.setdefault(chunk.sample_index, chunk.first_token_index)
    assert first == {0: 1, 1: 3}
    for indices in ([1], [1, 2, 3], [-1, 0]):
        del message.next_token_indices[:]
        message.next_token_indices.extend(indices)
        outcome = await resumed(channel, message)
        assert outcome.reason == "INVALID_REQUEST"
        assert any(field.startswith("next_token_ind") for field in outcome.violations)
    await cancelled(channel, whole.started.resume_token)


@register.shows("ResumeGenerateRequest.continuation", "Continuation.request", "Continuation.samples")
async def test_a_continuation_goes_on_where_the_generation_is_gone(tmp_path: Path, channel: Any) -> None:
    begun = request(resume=pb.ResumeOptions(), output=pb.OutputOptions(content=BOTH))
    whole = await generate(channel, begun)
    token = whole.started.resume_token
    message = pb.ResumeGenerateRequest(resume_token=token, next_token_index=2)
    async with (
        sim_cluster(tmp_path) as other,  # another router of the cluster: the same secret
        grpc.aio.insecure_channel(other.endpoint.address) as there,
    ):
        assert (await resumed(there, message)).reason == "RESUME_UNKNOWN"
        message.continuation.request.CopyFrom(begun)
        message.continuation.samples.add(ids=whole.token_ids[:2])
        outcome = await resumed(there, message)
        assert outcome.token_ids == whole.token_ids[2:]
        await cancelled(there, outcome.started.resume_token)
        message.continuation.request.priority = 1
        assert (await resumed(there, message)).reason == "RESUME_DENIED"
        message.continuation.request.priority = 0
        message.continuation.samples[0].ids.append(5)
        refused = await resumed(there, message)
        assert refused.reason == "INVALID_REQUEST"
    await cancelled(channel, token)


# ModelService and StatusService.


@register.shows(
    "GetModelRequest.name", "CountTokensRequest.model", "TokenizeRequest.model", "DetokenizeRequest.model"
)
async def test_every_call_about_a_model_may_name_it(channel: grpc.aio.Channel) -> None:
    for make, method in (
        (lambda name: models.GetModelRequest(name=name), "GetModel"),
        (lambda name: models.CountTokensRequest(model=name, text="a"), "CountTokens"),
        (lambda name: models.TokenizeRequest(model=name, text="a"), "Tokenize"),
        (lambda name: models.DetokenizeRequest(model=name, token_ids=pb.TokenIds(ids=[5])), "Detokenize"),
    ):
        for name, reason in (("", ""), ("tiny", ""), ("other", "MODEL_NOT_FOUND")):
            assert (await ask(channel, f"/{MODELS}/{method}", make(name))).reason == reason


@register.shows("CountTokensRequest.text", "CountTokensRequest.chat", "TokenizeRequest.text", "TokenizeRequest.chat")
async def test_texts_and_chats_are_counted_and_tokenised(channel: grpc.aio.Channel) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    rendered = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    for prompt, ids in (({"text": TEXT}, IDS), ({"chat": chat}, rendered)):
        counted = await ask(channel, f"/{MODELS}/CountTokens", models.CountTokensRequest(**prompt))
        assert counted.messages[0].token_count == len(ids)
        tokens = await ask(channel, f"/{MODELS}/Tokenize", models.TokenizeRequest(**prompt))
        assert tuple(tokens.messages[0].token_ids) == ids
    for method, empty in (("CountTokens", models.CountTokensRequest()), ("Tokenize", models.TokenizeRequest())):
        assert_refused(await ask(channel, f"/{MODELS}/{method}", empty), "prompt", "is empty")


@register.shows("TokenizeRequest.add_special_tokens", "CountTokensRequest.text", "GenerateRequest.text")
async def test_special_tokens_are_added_unless_they_are_asked_to_be_left_out(tmp_path: Path) -> None:
    """By a tokenizer that adds one; the tiny one adds none."""
    adding = tiny_tokenizer()
    adding.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", START_ID)])
    adding.save(str(write_tiny_model(tmp_path / "adding") / "tokenizer.json"))
    async with (
        sim_cluster(tmp_path / "tiny", model_dir=str(tmp_path / "adding")) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        for added, ids in ((None, (START_ID, *IDS)), (True, (START_ID, *IDS)), (False, IDS)):
            message = models.TokenizeRequest(text=TEXT)
            if added is not None:
                message.add_special_tokens = added
            assert tuple((await ask(channel, f"/{MODELS}/Tokenize", message)).messages[0].token_ids) == ids
        counted = await ask(channel, f"/{MODELS}/CountTokens", models.CountTokensRequest(text=TEXT))
        assert counted.messages[0].token_count == len(IDS) + 1
        assert (await generate(channel, request())).started.prompt_token_count == len(IDS) + 1
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        rendered = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        for added in (True, False):
            message = models.TokenizeRequest(chat=chat, add_special_tokens=added)
            tokens = (await ask(channel, f"/{MODELS}/Tokenize", message)).messages[0].token_ids
            assert tuple(tokens) == rendered, "a template writes its own"


@register.shows("DetokenizeRequest.token_ids", "DetokenizeRequest.keep_special_tokens")
async def test_ids_become_text_with_special_tokens_only_on_request(channel: grpc.aio.Channel) -> None:
    for kept, text in ((False, TEXT), (True, TEXT + "<|im_end|>")):
        message = models.DetokenizeRequest(token_ids=pb.TokenIds(ids=[*IDS, END_ID]), keep_special_tokens=kept)
        assert (await ask(channel, f"/{MODELS}/Detokenize", message)).messages[0].text == text
    most = await ask(
        channel, f"/{MODELS}/Detokenize", models.DetokenizeRequest(token_ids=pb.TokenIds(ids=[5] * CONTEXT))
    )
    assert most.messages[0].text
    for ids, field, value in (
        ([5] * (CONTEXT + 1), "token_ids.ids", f"has {CONTEXT + 1} ids"),
        ([VOCABULARY], "token_ids.ids[0]", f"is {VOCABULARY};"),
        ([], "token_ids.ids", "is empty"),
    ):
        message = models.DetokenizeRequest(token_ids=pb.TokenIds(ids=ids))
        assert_refused(await ask(channel, f"/{MODELS}/Detokenize", message), field, value)


@register.shows("WatchStatusRequest.interval")
async def test_an_interval_of_the_status_is_within_its_bounds(channel: grpc.aio.Channel) -> None:
    """How often it comes is told by test_conformance_watch.py, in virtual time."""
    for interval_us, says in (
        (99_999, "is 0.099999 s"),
        (60_000_001, "is 60.000001 s"),
        (0, "is 0.0 s"),
        (-1_000_000, "is -1.0 s"),
    ):
        message = status.WatchStatusRequest()
        message.interval.FromMicroseconds(interval_us)
        outcome = await ask(channel, f"/{STATUS}/WatchStatus", message)
        assert_refused(outcome, "interval", says, rest="; must be 0.1 to 60 s, or absent for 1 s")

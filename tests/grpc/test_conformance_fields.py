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

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.v1 import status_pb2 as status
from engine.protocol import DecodeJob, PrefillJob
from engine.sim_tokens import simulated_answer
from router.tiny_model import END_ID

TEXT = "Once upon a time there was a small model"
IDS = TOKENIZER.encode(TEXT)
VOCABULARY = TOKENIZER.vocab_size
BOTH = pb.OutputOptions.CONTENT_BOTH
FIX = re.compile(r"must|ask|[Cc]heck|no more than|at most|at least|give|leave|send|set |name |say |allow|add ")
"""A word that says what to do."""
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


def assert_refused(outcome: Outcome, field: str, value: str) -> None:
    """``value``: as the description must show it."""
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), outcome
    assert field in outcome.violations, outcome.violations
    description = outcome.violations[field]
    assert value in description, description
    assert FIX.search(description), description
    assert not outcome.has_headers


# Numbers: one table.


@dataclass(frozen=True)
class Number:
    """``make`` gives a request with the value; ``seen`` reads it back from a job, None: the answer has it."""

    make: Callable[[Any], pb.GenerateRequest]
    taken: tuple[Any, ...]
    refused: tuple[Any, ...]
    named: str
    seen: Callable[[Job], Any] | None = None


def of_sampling(name: str) -> Callable[[Any], pb.GenerateRequest]:
    return lambda value: sampled(**{name: value})


def job_sampling(name: str) -> Callable[[Job], Any]:
    return lambda job: getattr(job.sampling, name)


def _sampling_number(name: str, taken: tuple[Any, ...], refused: tuple[Any, ...]) -> Number:
    return Number(of_sampling(name), taken, refused, f"sampling.{name}", job_sampling(name))


def past(value: float, towards: float) -> float:
    return math.nextafter(value, towards)


MOST = 2**31 - 1
NUMBERS: dict[str, Number] = {
    "Sampling.temperature": _sampling_number("temperature", (0.0, 0.01, 2.0), (past(0, -1), past(2, 3), math.nan)),
    "Sampling.top_p": _sampling_number("top_p", (past(0, 1), 1.0), (0.0, past(1, 2), math.nan)),
    "Sampling.top_k": _sampling_number("top_k", (0, 1, MOST), (-1,)),
    "Sampling.min_p": _sampling_number("min_p", (0.0, 1.0), (past(0, -1), past(1, 2), math.inf)),
    "Sampling.seed": _sampling_number("seed", (0, 2**63 - 1), (-1, -(2**63))),
    "Sampling.presence_penalty": _sampling_number("presence_penalty", (-2.0, 2.0), (past(-2, -3), past(2, 3))),
    "Sampling.frequency_penalty": _sampling_number("frequency_penalty", (-2.0, 2.0), (past(-2, -3), math.nan)),
    "Sampling.repetition_penalty": _sampling_number("repetition_penalty", (0.01, 100.0), (0.0, past(100, 101))),
    "TokenBias.token_id": Number(
        lambda value: sampled(logit_bias=[pb.TokenBias(token_id=value, bias=1)]),
        (0, VOCABULARY - 1),
        (-1, VOCABULARY),
        "sampling.logit_bias[0].token_id",
        lambda job: job.sampling.logit_bias[0][0],
    ),
    "TokenBias.bias": Number(
        lambda value: sampled(logit_bias=[pb.TokenBias(token_id=5, bias=value)]),
        (-100.0, 100.0),
        (past(-100, -101), past(100, 101), math.nan),
        "sampling.logit_bias[0].bias",
        lambda job: job.sampling.logit_bias[0][1],
    ),
    "GenerateRequest.priority": Number(
        lambda value: request(priority=value), (-100, 100), (-101, 101), "priority", lambda job: job.priority
    ),
    "StopConditions.max_output_token_count": Number(
        lambda value: pb.GenerateRequest(text=TEXT, stop=pb.StopConditions(max_output_token_count=value)),
        (1, MOST),
        (0, -1),
        "stop.max_output_token_count",
    ),
    "StopConditions.min_output_token_count": Number(
        lambda value: request(stop=pb.StopConditions(min_output_token_count=value)),
        (0, 4),
        (-1, 5),
        "stop.min_output_token_count",
        lambda job: job.stop.min_token_count,
    ),
    "OutputOptions.top_logprob_count": Number(
        lambda value: request(output=pb.OutputOptions(top_logprob_count=value)),
        (0, 20),
        (-1, 21),
        "output.top_logprob_count",
        lambda job: job.top_logprob_count,
    ),
    "OutputOptions.prompt_logprob_count": Number(
        lambda value: request(output=pb.OutputOptions(prompt_logprob_count=value)),
        (0, 20),
        (-1, 21),
        "output.prompt_logprob_count",
    ),
    "OutputOptions.max_chunk_token_count": Number(
        lambda value: request(output=pb.OutputOptions(max_chunk_token_count=value)),
        (1, MOST),
        (0, -1),
        "output.max_chunk_token_count",
    ),
    "GenerateRequest.sample_count": Number(
        lambda value: request(sample_count=value, sampling=pb.Sampling(temperature=1)),
        (0, 1, 16),
        (-1, 17),
        "sample_count",
    ),
}


def shown(value: Any) -> str:
    """How a description shows a number."""
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    return f"is {value:g};" if isinstance(value, float) and float(f"{value:g}") == value else f"is {value}"


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


@pytest.mark.parametrize("field", NUMBERS)
async def test_a_number_beyond_an_end_is_refused_by_name_value_bound_and_fix(
    field: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    number = NUMBERS[field]
    for value in number.refused:
        assert_refused(await generate(channel, number.make(value)), number.named, shown(value))
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
    shows_count: bool = True
    seen: Callable[[Job], int] | None = None


def texts(count: int) -> list[str]:
    return [f"~{index}" for index in range(count)]


LENGTHS: dict[str, Length] = {
    "Sampling.logit_bias": Length(
        lambda count: sampled(logit_bias=[pb.TokenBias(token_id=index % 300) for index in range(count)]),
        (1, 300),
        (1025,),
        "sampling.logit_bias",
        seen=lambda job: len(job.sampling.logit_bias),
    ),
    "Sampling.allowed_token_ids": Length(
        lambda count: sampled(allowed_token_ids=pb.TokenIds(ids=range(count))),
        (1, VOCABULARY),
        (0,),
        "sampling.allowed_token_ids",
        shows_count=False,
        seen=lambda job: len(job.sampling.allowed_token_ids),
    ),
    "Sampling.bad_token_sequences": Length(
        lambda count: sampled(bad_token_sequences=[pb.TokenIds(ids=[5])] * count),
        (1, 64),
        (65,),
        "sampling.bad_token_sequences",
        seen=lambda job: len(job.sampling.bad_token_sequences),
    ),
    "TokenIds.ids": Length(
        lambda count: sampled(bad_token_sequences=[pb.TokenIds(ids=[5] * count)]),
        (1, 16),
        (0, 17),
        "sampling.bad_token_sequences[0].ids",
        seen=lambda job: len(job.sampling.bad_token_sequences[0]),
    ),
    "StopConditions.stop_sequences": Length(
        lambda count: request(stop=pb.StopConditions(stop_sequences=texts(count))),
        (0, 16),
        (17,),
        "stop.stop_sequences",
    ),
    "a stop sequence": Length(
        lambda count: request(stop=pb.StopConditions(stop_sequences=["~" * count])),
        (1, 256),
        (0, 257),
        "stop.stop_sequences[0]",
    ),
    "StopConditions.stop_token_ids": Length(
        lambda count: request(stop=pb.StopConditions(stop_token_ids=[0] * count)),
        (0, 64),
        (65,),
        "stop.stop_token_ids",
        seen=lambda job: len(job.stop.stop_token_ids),
    ),
    "GenerateRequest.session_id": Length(
        lambda count: request(session_id="s" * count), (0, 128), (129,), "session_id"
    ),
    "GenerateRequest.correlation_id": Length(
        lambda count: request(correlation_id="c" * count), (0, 128), (129,), "correlation_id"
    ),
    "GenerateRequest.tenant": Length(
        lambda count: request(tenant="t" * count),
        (0, 1, 64),
        (65,),
        "tenant",
        shows_count=False,
        seen=lambda job: len(job.tenant),
    ),
    "Chat.messages": Length(
        lambda count: request(chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * count)),
        (1, 130),
        (0, 1025),
        "chat.messages",
        shows_count=False,
    ),
    "ChatMessage.role": Length(
        lambda count: request(chat=pb.Chat(messages=[pb.ChatMessage(role="r" * count)])),
        (),
        (0, 65),
        "chat.messages[0].role",
        shows_count=False,
    ),
    "Choices.texts": Length(
        lambda count: sampled(structure=pb.StructuredOutput(choice=pb.Choices(texts=texts(count)))) if count else
        sampled(structure=pb.StructuredOutput(choice=pb.Choices())),
        (),
        (0, 257),
        "sampling.structure.choice",
        shows_count=False,
    ),
}  # fmt: skip


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
        assert_refused(
            await generate(channel, length.make(count)), length.named, f"has {count} " if length.shows_count else ""
        )
    assert not jobs


for _field in LENGTHS:
    if "." in _field:
        register.add(_field, "test_a_list_or_text_is_taken_at_both_ends_of_its_length")


# One by one: what is no number and no length.


@register.shows("GenerateRequest.text", "StopConditions.ignore_eos")
async def test_text_is_tokenised_and_answered(channel: grpc.aio.Channel) -> None:
    outcome = await generate(channel, request(output=pb.OutputOptions(content=BOTH)))
    assert outcome.token_ids == simulated_answer(IDS, 4, RULE, ignore_eos=True)
    assert_refused(await generate(channel, request(text="")), "prompt", "is empty")
    assert_refused(await generate(channel, pb.GenerateRequest()), "prompt", "is empty")


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
        assert_refused(refused, f"token_ids.ids[{place}]", f"is {ids[place]};")
    assert_refused(await generate(channel, request(token_ids=pb.TokenIds())), "token_ids.ids", "is empty")


@register.shows("GenerateRequest.model")
async def test_the_model_may_be_named(channel: grpc.aio.Channel) -> None:
    assert (await generate(channel, request(model="tiny"))).started.model == "tiny"
    assert (await generate(channel, request(model="Tiny"))).reason == "MODEL_NOT_FOUND"


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
        await generate(channel, request(correlation_id="find-me"))
    assert sum("find-me" in line.getMessage() for line in caplog.records) == 1


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
    for tenant in ("a b", "a/b", "é", "\n"):
        assert_refused(await generate(channel, request(tenant=tenant)), "tenant", "letters, digits")


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


@register.shows("OutputOptions.max_chunk_token_count")
async def test_no_chunk_has_more_tokens_than_asked(channel: grpc.aio.Channel) -> None:
    stop = pb.StopConditions(max_output_token_count=60, ignore_eos=True)
    for most in (1, 7):
        output = pb.OutputOptions(max_chunk_token_count=most)
        outcome = await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop, output=output))
        assert max(chunk.token_count for chunk in outcome.chunks) <= most
        assert sum(chunk.token_count for chunk in outcome.chunks) == 60


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
async def test_logprobs_come_for_as_many_of_the_likeliest_as_asked(channel: grpc.aio.Channel) -> None:
    for count in (0, 3):
        output = pb.OutputOptions(top_logprob_count=count, prompt_logprob_count=count)
        outcome = await generate(channel, request(output=output))
        answer = [each for chunk in outcome.chunks for each in chunk.logprobs]
        assert [len(each.top) for each in answer] == [count] * 4
        prompt = [each for m in outcome.messages if m.WhichOneof("event") == "prompt" for each in m.prompt.logprobs]
        assert [len(each.top) for each in prompt] == [0] + [count] * (len(IDS) - 1)
    resumed = request(output=pb.OutputOptions(prompt_logprob_count=0), resume=pb.ResumeOptions())
    assert_refused(await generate(channel, resumed), "output.prompt_logprob_count", "resum")


@register.shows("GenerateRequest.sample_count")
async def test_so_many_samples_come_and_greedy_ones_are_refused(channel: grpc.aio.Channel) -> None:
    outcome = await generate(channel, request(sample_count=3, sampling=pb.Sampling(temperature=1)))
    assert {chunk.sample_index for chunk in outcome.chunks} == {0, 1, 2}
    assert_refused(await generate(channel, request(sample_count=2)), "sample_count", "is 2 ")


@register.shows("StopConditions.stop_token_ids")
async def test_a_stop_token_ends_the_answer_and_must_be_of_the_vocabulary(channel: grpc.aio.Channel) -> None:
    ids = simulated_answer(IDS, 4, RULE, ignore_eos=True)
    outcome = await generate(channel, request(stop=pb.StopConditions(stop_token_ids=[ids[1]])))
    assert (outcome.finished.usage.output_token_count, outcome.finished.matched_stop_token_id) == (2, ids[1])
    for outside in (-1, VOCABULARY):
        refused = await generate(channel, request(stop=pb.StopConditions(stop_token_ids=[outside])))
        assert_refused(refused, "stop.stop_token_ids[0]", f"is {outside};")


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


STRUCTURES: dict[str, tuple[pb.StructuredOutput, pb.StructuredOutput]] = {
    "json_schema": (
        pb.StructuredOutput(json_schema='{"type": "object"}'),
        pb.StructuredOutput(json_schema="[1]"),
    ),
    "regex": (pb.StructuredOutput(regex="[a-z]+"), pb.StructuredOutput(regex="(" * 40)),
    "choice": (
        pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no"])),
        pb.StructuredOutput(choice=pb.Choices(texts=["yes", ""])),
    ),
    "grammar": (pb.StructuredOutput(grammar='start: "a"'), pb.StructuredOutput(grammar="a" * 65_537)),
}


@pytest.mark.parametrize("kind", STRUCTURES)
@register.shows("Sampling.structure", *(f"StructuredOutput.{kind}" for kind in STRUCTURES), "Choices.texts")
async def test_a_structure_reaches_the_engine_and_a_broken_one_does_not(
    kind: str, channel: grpc.aio.Channel, jobs: list[Job]
) -> None:
    good, bad = STRUCTURES[kind]
    stop = pb.StopConditions(max_output_token_count=4)
    outcome = await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop, sampling=pb.Sampling(structure=good)))
    assert outcome.finished
    assert {job.sampling.structure.kind.value for job in jobs if job.sampling.structure} == {kind}
    refused = await generate(channel, pb.GenerateRequest(text=TEXT, stop=stop, sampling=pb.Sampling(structure=bad)))
    assert_refused(refused, f"sampling.structure.{kind}", "")


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
    for index in (-1, 7):
        message.next_token_index = index
        assert_refused(await resumed(channel, message), "next_token_index", f"is {index}")
    message.next_token_index, message.tenant = 0, "red"
    assert (await resumed(channel, message)).reason == "RESUME_DENIED"
    assert (await resumed(channel, pb.ResumeGenerateRequest())).reason in ("RESUME_DENIED", "INVALID_REQUEST")
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


@register.shows("TokenizeRequest.add_special_tokens")
async def test_special_tokens_are_left_out_on_request(channel: grpc.aio.Channel) -> None:
    for added in (True, False):
        message = models.TokenizeRequest(text=TEXT, add_special_tokens=added)
        # The tiny tokenizer adds none; with one that does, tests/unit/test_tokenizer.py shows the difference.
        assert tuple((await ask(channel, f"/{MODELS}/Tokenize", message)).messages[0].token_ids) == IDS


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
async def test_the_status_comes_as_often_as_asked(channel: grpc.aio.Channel) -> None:
    for interval_ms in (100, 60_000):
        message = status.WatchStatusRequest()
        message.interval.FromMilliseconds(interval_ms)
        outcome = await ask(channel, f"/{STATUS}/WatchStatus", message, timeout=0.45)
        assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (len(outcome.messages) > 1) is (interval_ms == 100)
    for interval_ms in (99, 60_001, -1000):
        message = status.WatchStatusRequest()
        message.interval.FromMilliseconds(interval_ms)
        assert_refused(await ask(channel, f"/{STATUS}/WatchStatus", message), "interval", "is ")

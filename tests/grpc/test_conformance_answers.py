"""Each field of each response, seen with the right value in a real answer.

A few calls are made once, each for what only it can show; then every field has a test of its own, by its name.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from field_register import Register
from raw_calls import GENERATION, MODELS, STATUS, Outcome, ask, generate
from sim_cluster import CONTEXT, MODEL, RULE, TOKENIZER, SimCluster, sim_cluster

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.v1 import status_pb2 as status
from engine.sim_config import PhaseDelays
from engine.sim_tokens import EMPTY_CONTENT, extend_content, simulated_answer
from router.tiny_model import CHAT_TEMPLATE, END_ID

TEXT = "Once upon a time there was a small model that told the time of every phase"
IDS = TOKENIZER.encode(TEXT)
COUNT = 12
ANSWER = simulated_answer(IDS, COUNT, RULE, ignore_eos=True)
STOP = pb.StopConditions(max_output_token_count=COUNT, ignore_eos=True)
BOTH = pb.OutputOptions.CONTENT_BOTH
register = Register()


@dataclass
class Answers:
    """What each call ended with."""

    plain: Outcome
    """Split, with ids and logprobs, resumable, with a deadline of a minute."""
    echoed: Outcome
    stopped_by_text: Outcome
    stopped_by_token: Outcome
    full: Outcome
    prefill_only: Outcome
    samples: Outcome
    samples_stopped: Outcome
    resumed: Outcome
    cancels: list[Outcome] = field(default_factory=list)
    cached: Outcome | None = None
    local: Outcome | None = None
    recomputed: Outcome | None = None
    retried: Outcome | None = None
    model: Any = None
    listed: Any = None
    counted: Any = None
    tokenized: Any = None
    detokenized: Any = None
    watched: Any = None
    """While a request ran."""
    rested: Any = None
    """After all."""

    def of(self, name: str) -> Outcome:
        outcome = getattr(self, name)
        assert isinstance(outcome, Outcome)
        return outcome


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(tmp_path_factory: Any) -> AsyncIterator[Answers]:
    directory: Path = tmp_path_factory.mktemp("answers")
    delays = PhaseDelays(transfer=0.02, decode_wait=0.01, decode=0.002, prefill=0.01)
    async with (
        sim_cluster(directory / "split", sim={"extra_delay_s": delays}) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        found = await _of_a_split_cluster(cluster, channel)
        found.recomputed = await _recomputed(cluster, channel)
    async with (
        sim_cluster(directory / "local", placement="local") as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        found.local = await generate(channel, request())
    async with (
        sim_cluster(directory / "two", decode_count=2, sim={"extra_delay_s": PhaseDelays(decode=0.02)}) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        found.retried = await _retried(cluster, channel)
    yield found


def request(**changes: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": TEXT, "stop": STOP, **changes})


def stopping(**stop: Any) -> pb.GenerateRequest:
    message = request(output=pb.OutputOptions(content=BOTH, top_logprob_count=0))
    message.stop.MergeFrom(pb.StopConditions(**stop))
    return message


def _stop_text() -> str:
    """Printable text of one token in the middle of the answer, which nothing before it has."""
    texts = [TOKENIZER.decode((token_id,)) for token_id in ANSWER]
    return next(each for at, each in enumerate(texts) if at > 2 and each.isprintable() and each.isascii() and each
                and each not in TOKENIZER.decode(ANSWER[:at]))  # fmt: skip


async def _of_a_split_cluster(cluster: SimCluster, channel: grpc.aio.Channel) -> Answers:
    drawn = pb.Sampling(temperature=1, seed=5)
    plain = await generate(
        channel,
        request(resume=pb.ResumeOptions(), output=pb.OutputOptions(content=BOTH, top_logprob_count=2)),
    )
    going_on = pb.ResumeGenerateRequest(resume_token=plain.started.resume_token, next_token_index=5)
    samples_stopped = stopping(stop_token_ids=[ANSWER[4]])
    samples_stopped.sample_count = 2
    samples_stopped.sampling.CopyFrom(drawn)
    found = Answers(
        plain=plain,
        echoed=await generate(
            channel, request(output=pb.OutputOptions(content=BOTH, echo_prompt=True, prompt_logprob_count=2))
        ),
        stopped_by_text=await generate(channel, stopping(stop_sequences=[_stop_text()])),
        stopped_by_token=await generate(channel, stopping(stop_token_ids=[ANSWER[4]])),
        full=await generate(channel, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (CONTEXT - 3)))),
        prefill_only=await generate(channel, request(stop=pb.StopConditions(max_output_token_count=1))),
        samples=await generate(
            channel,
            request(sample_count=2, sampling=drawn, output=pb.OutputOptions(content=BOTH, top_logprob_count=0)),
        ),
        samples_stopped=await generate(channel, samples_stopped),
        resumed=await ask(channel, f"/{GENERATION}/ResumeGenerate", going_on),
    )
    running = await _begun(channel)
    found.watched = await _status(channel)
    cancel = pb.CancelGenerationRequest(resume_token=running.resume_token)
    for _ in range(2):
        found.cancels.append(await ask(channel, f"/{GENERATION}/CancelGeneration", cancel))
    await cluster.until_balanced()
    found.rested = await _status(channel)
    found.model = (await ask(channel, f"/{MODELS}/GetModel", models.GetModelRequest())).messages[0]
    found.listed = (await ask(channel, f"/{MODELS}/ListModels", models.ListModelsRequest())).messages[0]
    found.counted = (await ask(channel, f"/{MODELS}/CountTokens", models.CountTokensRequest(text=TEXT))).messages[0]
    found.tokenized = (await ask(channel, f"/{MODELS}/Tokenize", models.TokenizeRequest(text=TEXT))).messages[0]
    ids = models.DetokenizeRequest(token_ids=pb.TokenIds(ids=IDS))
    found.detokenized = (await ask(channel, f"/{MODELS}/Detokenize", ids)).messages[0]
    return found


async def _begun(channel: grpc.aio.Channel) -> pb.Started:
    """A resumable generation that runs on, without a reader."""
    message = request(resume=pb.ResumeOptions(), stop=pb.StopConditions(max_output_token_count=1000, ignore_eos=True))
    make: Any = channel.unary_stream(
        f"/{GENERATION}/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    call = make(message, timeout=60)
    started: pb.Started = (await call.read()).started
    for _ in range(3):
        await call.read()
    call.cancel()
    return started


async def _status(channel: grpc.aio.Channel) -> status.WatchStatusResponse:
    """The newest of a few: what is told is a load report old."""
    message = status.WatchStatusRequest()
    message.interval.FromMilliseconds(100)
    newest: status.WatchStatusResponse = (
        await ask(channel, f"/{STATUS}/WatchStatus", message, timeout=0.35)
    ).messages[-1]
    return newest


async def _recomputed(cluster: SimCluster, channel: grpc.aio.Channel) -> Outcome:
    """Its KV is let go of before it is pulled."""
    engine: Any = cluster.workers["prefill-0"].engine
    prefill = engine.prefill

    async def forgetful(job: Any) -> Any:
        prefilled = await prefill(job)
        engine._drop_held(prefilled.held.handle)
        return prefilled

    engine.prefill = forgetful
    outcome = await generate(channel, request())
    engine.prefill = prefill
    return outcome


async def _retried(cluster: SimCluster, channel: grpc.aio.Channel) -> Outcome:
    """The worker that decodes it dies after its first tokens."""
    make: Any = channel.unary_stream(
        f"/{GENERATION}/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    call = make(request(output=pb.OutputOptions(content=BOTH)), timeout=60)
    messages = [await call.read() for _ in range(4)]
    busy = [worker for worker in cluster.workers.values() if worker.role.value == "decode"]
    victim = next(worker for worker in busy if worker.engine.load().running_count)
    victim.engine.kill()
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return Outcome(await call.code(), "", messages, {}, True)


def seconds(duration: Any) -> float:
    return float(duration.ToNanoseconds() / 1e9)


def phases(outcome: Outcome | None) -> pb.PhaseTimings:
    assert outcome is not None
    return outcome.finished.phases


def logprobs(outcome: Outcome) -> list[pb.TokenLogprobs]:
    return [each for chunk in outcome.chunks for each in chunk.logprobs]


def prompts(outcome: Outcome) -> list[pb.Prompt]:
    return [each.prompt for each in outcome.messages if each.WhichOneof("event") == "prompt"]


def events(outcome: Outcome) -> str:
    letters = {"started": "S", "prompt": "P", "chunk": "C", "finished": "F"}
    return "".join(letters[each.WhichOneof("event")] for each in outcome.messages)


def near(value: float, wanted: float) -> bool:
    return math.isclose(value, wanted, rel_tol=1e-9, abs_tol=1e-9)


def contiguous(outcome: Outcome) -> bool:
    at = 0
    for chunk in outcome.chunks:
        if chunk.first_token_index != at:
            return False
        at += chunk.token_count
    return at == outcome.finished.usage.output_token_count


def rule_logprobs(prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
    content, found = extend_content(EMPTY_CONTENT, prompt), []
    for token_id in answer:
        found.append(RULE.logprobs(content, token_id, 0).logprob)
        content = extend_content(content, (token_id,))
    return found


SIX = ("queue", "prefill", "handoff_wait", "kv_transfer", "decode_wait", "decode")
LOGPROBS = rule_logprobs(IDS, ANSWER)

SEEN: dict[str, Callable[[Answers], Any]] = {
    "GenerateResponse.started": lambda a: events(a.plain).startswith("S") and events(a.plain).count("S") == 1,
    "GenerateResponse.prompt": lambda a: "SP" in events(a.echoed) and "CP" not in events(a.echoed),
    "GenerateResponse.chunk": lambda a: "SC" in events(a.plain),
    "GenerateResponse.finished": lambda a: events(a.plain).endswith("CF") and events(a.plain).count("F") == 1,
    "ResumeGenerateResponse.started": lambda a: events(a.resumed)[0] == "S",
    "ResumeGenerateResponse.chunk": lambda a: a.resumed.token_ids == ANSWER[5:],
    "ResumeGenerateResponse.finished": lambda a: a.resumed.finished.reason == a.plain.finished.reason,
    "CancelGenerationResponse.was_running": lambda a: [each.messages[0].was_running for each in a.cancels] == [
        True, False],
    "Started.generation_id": lambda a: a.plain.started.generation_id.startswith("gen-")
    and a.plain.started.generation_id == a.resumed.started.generation_id != a.echoed.started.generation_id,
    "Started.model": lambda a: a.plain.started.model == MODEL,
    "Started.prompt_token_count": lambda a: a.plain.started.prompt_token_count == len(IDS),
    "Started.resume_token": lambda a: a.plain.started.resume_token and not a.echoed.started.resume_token,
    "Started.resume_grace": lambda a: seconds(a.plain.started.resume_grace) == 30
    and not a.echoed.started.HasField("resume_grace"),
    "Started.time_allowed": lambda a: 19 < seconds(a.plain.started.time_allowed) < 20,
    "Prompt.first_token_index": lambda a: [each.first_token_index for each in prompts(a.echoed)] == [
        sum(before.token_count for before in prompts(a.echoed)[:at]) for at in range(len(prompts(a.echoed)))],
    "Prompt.text": lambda a: "".join(each.text for each in prompts(a.echoed)) == TEXT,
    "Prompt.token_ids": lambda a: tuple(i for each in prompts(a.echoed) for i in each.token_ids) == IDS,
    "Prompt.token_count": lambda a: sum(each.token_count for each in prompts(a.echoed)) == len(IDS),
    "Prompt.logprobs": lambda a: [p.token_id for each in prompts(a.echoed) for p in each.logprobs] == list(IDS)
    and prompts(a.echoed)[0].logprobs[0].rank == 0 and not prompts(a.echoed)[0].logprobs[0].top,
    "Chunk.first_token_index": lambda a: contiguous(a.plain) and a.resumed.chunks[0].first_token_index == 5,
    "Chunk.text": lambda a: a.plain.said == TOKENIZER.decode(ANSWER),
    "Chunk.token_ids": lambda a: a.plain.token_ids == ANSWER,
    "Chunk.token_count": lambda a: sum(each.token_count for each in a.plain.chunks) == COUNT,
    "Chunk.logprobs": lambda a: [each.token_id for each in logprobs(a.plain)] == list(ANSWER),
    "Chunk.sample_index": lambda a: {each.sample_index for each in a.samples.chunks} == {0, 1},
    "TokenLogprobs.token_id": lambda a: [each.token_id for each in logprobs(a.plain)] == list(ANSWER),
    "TokenLogprobs.logprob": lambda a: all(
        near(each.logprob, wanted) for each, wanted in zip(logprobs(a.plain), LOGPROBS, strict=True)),
    "TokenLogprobs.rank": lambda a: {each.rank for each in logprobs(a.plain)} == {1},
    "TokenLogprobs.top": lambda a: {len(each.top) for each in logprobs(a.plain)} == {2},
    "TopLogprob.token_id": lambda a: all(each.top[0].token_id == each.token_id for each in logprobs(a.plain)),
    "TopLogprob.logprob": lambda a: all(
        each.top[0].logprob == each.logprob > each.top[1].logprob for each in logprobs(a.plain)),
    "Finished.reason": lambda a: [getattr(a, name).finished.reason for name in (
        "plain", "stopped_by_text", "stopped_by_token", "full")] == [
        pb.FINISH_REASON_MAX_OUTPUT_TOKENS, pb.FINISH_REASON_STOP, pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_CONTEXT_FULL],
    "Finished.matched_stop_sequence": lambda a: a.stopped_by_text.finished.matched_stop_sequence == _stop_text()
    and not a.plain.finished.matched_stop_sequence,
    "Finished.matched_stop_token_id": lambda a: a.stopped_by_token.finished.matched_stop_token_id == ANSWER[4]
    and not a.plain.finished.HasField("matched_stop_token_id"),
    "Finished.usage": lambda a: a.plain.finished.usage.output_token_count == COUNT,
    "Finished.phases": lambda a: a.plain.finished.HasField("phases"),
    "Finished.cumulative_logprob": lambda a: near(a.plain.finished.cumulative_logprob, sum(LOGPROBS))
    and not a.echoed.finished.HasField("cumulative_logprob"),
    "Finished.samples": lambda a: len(a.samples.finished.samples) == 2 and not a.plain.finished.samples,
    "SampleResult.sample_index": lambda a: [each.sample_index for each in a.samples.finished.samples] == [0, 1],
    "SampleResult.reason": lambda a: {each.reason for each in a.samples.finished.samples} == {
        pb.FINISH_REASON_MAX_OUTPUT_TOKENS} and a.samples_stopped.finished.samples[0].reason == pb.FINISH_REASON_STOP,
    "SampleResult.matched_stop_token_id": lambda a: a.samples_stopped.finished.samples[0].matched_stop_token_id ==
    ANSWER[4] and not a.samples.finished.samples[0].HasField("matched_stop_token_id"),
    "SampleResult.output_token_count": lambda a: [
        each.output_token_count for each in a.samples.finished.samples] == [COUNT, COUNT],
    "SampleResult.cumulative_logprob": lambda a: near(
        a.samples.finished.samples[0].cumulative_logprob, sum(LOGPROBS)),
    "Usage.prompt_token_count": lambda a: a.plain.finished.usage.prompt_token_count == len(IDS),
    "Usage.output_token_count": lambda a: (a.stopped_by_token.finished.usage.output_token_count,
                                           a.samples.finished.usage.output_token_count) == (5, 2 * COUNT),
    "PhaseTimings.queue": lambda a: seconds(phases(a.plain).queue) >= 0,
    "PhaseTimings.prefill": lambda a: seconds(phases(a.plain).prefill) >= 0.01,
    "PhaseTimings.handoff_wait": lambda a: phases(a.plain).HasField("handoff_wait"),
    "PhaseTimings.kv_transfer": lambda a: seconds(phases(a.plain).kv_transfer) >= 0.02
    and seconds(phases(a.prefill_only).kv_transfer) == 0,
    "PhaseTimings.decode_wait": lambda a: seconds(phases(a.plain).decode_wait) >= 0.01,
    "PhaseTimings.decode": lambda a: seconds(phases(a.plain).decode) >= 0.002 * (COUNT - 1),
    "PhaseTimings.time_to_first_token": lambda a: 0.01 <= seconds(phases(a.plain).time_to_first_token) <= sum(
        seconds(getattr(phases(a.plain), name)) for name in SIX),
    "PhaseTimings.kv_transfer_byte_count": lambda a: phases(a.plain).kv_transfer_byte_count > 0
    and phases(a.local).kv_transfer_byte_count == 0,
    "PhaseTimings.prefill_worker_id": lambda a: phases(a.plain).prefill_worker_id == "prefill-0",
    "PhaseTimings.decode_worker_id": lambda a: (
        phases(a.plain).decode_worker_id, phases(a.prefill_only).decode_worker_id) == ("decode-0", ""),
    "PhaseTimings.attempt_count": lambda a: (
        phases(a.plain).attempt_count, phases(a.retried).attempt_count) == (1, 2),
    "PhaseTimings.placement_mode": lambda a: [phases(each).placement_mode for each in (
        a.plain, a.local, a.prefill_only)] == [
        pb.PLACEMENT_MODE_SPLIT, pb.PLACEMENT_MODE_LOCAL, pb.PLACEMENT_MODE_PREFILL_ONLY],
    "PhaseTimings.placement_reason": lambda a: phases(a.plain).placement_reason == "split",
    "PhaseTimings.recomputed_token_count": lambda a: (
        phases(a.plain).recomputed_token_count, phases(a.recomputed).recomputed_token_count) == (0, len(IDS)),
    "PhaseTimings.handover_mode": lambda a: [phases(each).handover_mode for each in (a.plain, a.prefill_only)] == [
        pb.HANDOVER_MODE_OUTPUT_INJECTION, pb.HANDOVER_MODE_NONE],
    "PhaseTimings.kv_transfer_descriptor_count": lambda a: phases(a.plain).kv_transfer_descriptor_count > 0
    and phases(a.local).kv_transfer_descriptor_count == 0,
    "PhaseTimings.kv_pull_count": lambda a: (phases(a.plain).kv_pull_count, phases(a.local).kv_pull_count) == (1, 0),
    "PhaseTimings.kv_post": lambda a: phases(a.plain).HasField("kv_post"),
    "PhaseTimings.kv_wire": lambda a: 0 <= seconds(phases(a.plain).kv_wire) <= seconds(phases(a.plain).kv_transfer),
    "PhaseTimings.kv_verify": lambda a: phases(a.plain).HasField("kv_verify"),
    "PhaseTimings.recompute_reason": lambda a: (
        phases(a.plain).recompute_reason, phases(a.recomputed).recompute_reason) == (
        pb.RECOMPUTE_REASON_UNSPECIFIED, pb.RECOMPUTE_REASON_FAILED),
    "ListModelsResponse.models": lambda a: list(a.listed.models) == [a.model.model],
    "GetModelResponse.model": lambda a: a.model.HasField("model"),
    "Model.name": lambda a: a.model.model.name == MODEL,
    "Model.max_context_token_count": lambda a: a.model.model.max_context_token_count == CONTEXT,
    "Model.vocab_size": lambda a: a.model.model.vocab_size == TOKENIZER.vocab_size,
    "Model.special_tokens": lambda a: len(a.model.model.special_tokens) == 3,
    "Model.end_token_ids": lambda a: list(a.model.model.end_token_ids) == [END_ID],
    "Model.chat_template": lambda a: a.model.model.chat_template == CHAT_TEMPLATE,
    "Model.capabilities": lambda a: a.model.model.HasField("capabilities"),
    "SpecialToken.token_id": lambda a: [each.token_id for each in a.model.model.special_tokens] == [0, 1, 2],
    "SpecialToken.text": lambda a: a.model.model.special_tokens[2].text == "<|im_end|>",
    "Capabilities.has_chat": lambda a: a.model.model.capabilities.has_chat,
    "Capabilities.max_sample_count": lambda a: a.model.model.capabilities.max_sample_count == 16,
    "Capabilities.max_top_logprob_count": lambda a: a.model.model.capabilities.max_top_logprob_count == 20,
    "Capabilities.has_resume": lambda a: a.model.model.capabilities.has_resume,
    "CountTokensResponse.token_count": lambda a: a.counted.token_count == len(IDS),
    "CountTokensResponse.max_prompt_token_count": lambda a: a.counted.max_prompt_token_count == CONTEXT - 1,
    "TokenizeResponse.token_ids": lambda a: tuple(a.tokenized.token_ids) == IDS,
    "DetokenizeResponse.text": lambda a: a.detokenized.text == TEXT,
    "WatchStatusResponse.is_serving": lambda a: a.rested.is_serving,
    "WatchStatusResponse.queued_count": lambda a: a.rested.queued_count == 0,
    "WatchStatusResponse.in_flight_count": lambda a: a.watched.in_flight_count >= 0,
    "WatchStatusResponse.finished_count": lambda a: a.rested.finished_count > a.watched.finished_count - 1 >= 8,
    "WatchStatusResponse.failed_count": lambda a: a.rested.failed_count <= a.rested.finished_count,
    "WatchStatusResponse.workers": lambda a: [each.worker_id for each in a.rested.workers] == [
        "decode-0", "prefill-0"],
    "WatchStatusResponse.phases": lambda a: [each.name for each in a.rested.phases] == [
        *SIX, "time_to_first_token", "inter_token_latency", "end_to_end"],
    "WorkerStatus.worker_id": lambda a: {each.worker_id for each in a.rested.workers} == {"decode-0", "prefill-0"},
    "WorkerStatus.role": lambda a: [each.role for each in a.rested.workers] == [
        status.WORKER_ROLE_DECODE, status.WORKER_ROLE_PREFILL],
    "WorkerStatus.health": lambda a: {each.health for each in a.rested.workers} == {status.WORKER_HEALTH_READY},
    "WorkerStatus.assigned_count": lambda a: (
        a.watched.workers[0].assigned_count, a.rested.workers[0].assigned_count) == (1, 0),
    "WorkerStatus.running_count": lambda a: (
        a.watched.workers[0].running_count, a.rested.workers[0].running_count) == (1, 0),
    "WorkerStatus.waiting_count": lambda a: a.watched.workers[0].waiting_count == 0,
    "WorkerStatus.used_block_count": lambda a: a.watched.workers[0].used_block_count > 0 ==
    a.rested.workers[0].used_block_count,
    "WorkerStatus.block_count": lambda a: a.rested.workers[0].block_count == 1024,
    "WorkerStatus.held_lease_count": lambda a: a.rested.workers[1].held_lease_count == 0,
    "WorkerStatus.kv_bytes_per_s": lambda a: a.rested.workers[0].kv_bytes_per_s > 0 ==
    a.rested.workers[1].kv_bytes_per_s,
    "WorkerStatus.recomputed_share": lambda a: a.rested.workers[0].recomputed_share == 0,
    "WorkerStatus.no_room_count": lambda a: a.rested.workers[0].no_room_count == 0,
    "WorkerStatus.quarantined_pull_count": lambda a: a.rested.workers[0].quarantined_pull_count == 0,
    "PhaseStatistics.name": lambda a: a.rested.phases[0].name == "queue",
    "PhaseStatistics.sample_count": lambda a: a.rested.phases[0].sample_count >= 8,
    "PhaseStatistics.p50": lambda a: seconds(a.rested.phases[1].p50) >= 0.01,
    "PhaseStatistics.p95": lambda a: seconds(a.rested.phases[1].p95) >= seconds(a.rested.phases[1].p50),
}  # fmt: skip
"""Whether a field was seen with the right value."""

for _field in SEEN:
    register.add(_field, "test_a_field_of_an_answer_has_the_right_value")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", SEEN)
async def test_a_field_of_an_answer_has_the_right_value(name: str, answers: Answers) -> None:
    assert SEEN[name](answers)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_six_phases_add_up_to_the_time_from_receipt_to_the_last_message(answers: Answers) -> None:
    for name in ("plain", "echoed", "local", "recomputed", "retried", "prefill_only"):
        timings = phases(answers.of(name))
        assert all(seconds(getattr(timings, each)) >= 0 for each in SIX)
        assert sum(seconds(getattr(timings, each)) for each in SIX) >= seconds(timings.time_to_first_token) > 0


@register.shows("Usage.cached_prompt_token_count")
async def test_tokens_found_in_the_prefills_cache_are_counted(tmp_path: Path) -> None:
    async def nothing() -> None:
        """What is cached counts as used: the books cannot be seen to balance."""

    message = request(text=TEXT * 4, stop=pb.StopConditions(max_output_token_count=1))
    async with (
        sim_cluster(tmp_path, sim={"enable_prefix_caching": True}) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        cluster.until_balanced = nothing  # type: ignore[method-assign]
        first = await generate(channel, message)
        second = await generate(channel, message)
    assert first.finished.usage.cached_prompt_token_count == 0
    cached = second.finished.usage.cached_prompt_token_count
    assert 0 < cached < first.started.prompt_token_count
    assert cached % 16 == 0, "whole blocks"


@register.shows("SampleResult.matched_stop_sequence")
async def test_each_sample_says_which_stop_sequence_ended_it(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        message = stopping(stop_sequences=[_stop_text()])
        message.sample_count = 2
        message.sampling.CopyFrom(pb.Sampling(temperature=1, seed=5))
        outcome = await generate(channel, message)
        assert [each.matched_stop_sequence for each in outcome.finished.samples] == [_stop_text()] * 2


async def test_a_wrong_value_is_noticed(tmp_path: Path) -> None:
    """The suite itself, broken on purpose: an engine that says another token, and a table that lacks a field."""
    async with (
        sim_cluster(tmp_path, sim={"tokens": replace(RULE, scripted=lambda position: 7)}) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        wrong = await generate(channel, request(output=pb.OutputOptions(content=BOTH, top_logprob_count=0)))
    found = Answers(wrong, wrong, wrong, wrong, wrong, wrong, wrong, wrong, wrong)
    for name in ("Chunk.token_ids", "Chunk.text", "Finished.reason", "TokenLogprobs.logprob", "Finished.samples"):
        assert not SEEN[name](found), name

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
from drawn_apart import drawn_apart
from field_register import Register
from raw_calls import GENERATION, MODELS, STATUS, Outcome, ask, generate
from sim_cluster import CONTEXT, FAST, MODEL, RULE, TOKENIZER, SimCluster, sim_cluster

from baton.request import TokenLogprobs
from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.v1 import status_pb2 as status
from engine.sim_config import PhaseDelays
from engine.sim_tokens import EMPTY_CONTENT, TokenRule, extend_content, simulated_answer
from router.tiny_model import CHAT_TEMPLATE, END_ID, write_tiny_model

TEXT = "Once upon a time there was a small model that told the time of every phase"
IDS = TOKENIZER.encode(TEXT)
COUNT = 12
ANSWER = simulated_answer(IDS, COUNT, RULE, ignore_eos=True)
STOP = pb.StopConditions(max_output_token_count=COUNT, ignore_eos=True)
BOTH = pb.OutputOptions.CONTENT_BOTH
register = Register()


class Ranked(TokenRule):
    """Tokens are not always the likeliest: their ranks differ."""

    __slots__ = ()

    def logprobs(self, content: int, token_id: int, top_count: int) -> TokenLogprobs:
        return replace(TokenRule.logprobs(self, content, token_id, top_count), rank=1 + token_id % 5)


RANKED = Ranked(vocab_size=RULE.vocab_size, special_token_count=RULE.special_token_count, eos_token_id=END_ID)


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
    short: Outcome | None = None
    model: Any = None
    chatless: Any = None
    """The model of a server without a template, and with engines of a smaller context."""
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
        sim_cluster(directory / "split", sim={"extra_delay_s": delays, "tokens": RANKED}) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        found = await _of_a_split_cluster(cluster, channel)
        found.recomputed = await _recomputed(cluster, channel)
    async with (
        sim_cluster(directory / "local", placement="local") as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        found.local = await generate(channel, request())
    (write_tiny_model(directory / "chatless") / "chat_template.jinja").unlink()
    chatless: dict[str, Any] = {
        "model_dir": str(directory / "chatless"),
        "max_context_token_count": 100,
        "max_resumable_count": 0,
    }
    async with (
        sim_cluster(directory / "short", local_prompt_token_count=len(IDS), **chatless) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        found.short = await generate(channel, request())
        found.chatless = (await ask(channel, f"/{MODELS}/GetModel", models.GetModelRequest())).messages[0]
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
    engine = cluster.workers["decode-0"].engine
    fast, engine.extra_delay_s = engine.extra_delay_s, PhaseDelays(decode=0.05)  # it runs on, whatever pauses
    running = await _begun(channel)
    found.watched = await _status(channel, lambda told: told.workers[0].running_count == 1)
    cancel = pb.CancelGenerationRequest(resume_token=running.resume_token)
    for _ in range(2):
        found.cancels.append(await ask(channel, f"/{GENERATION}/CancelGeneration", cancel))
    await cluster.until_balanced()
    engine.extra_delay_s = fast
    found.rested = await _status(channel, lambda told: told.workers[0].used_block_count == 0)
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


async def _status(
    channel: grpc.aio.Channel, is_new: Callable[[status.WatchStatusResponse], bool]
) -> status.WatchStatusResponse:
    """The first that ``is_new``: what is told of workers is a load report old."""
    message = status.WatchStatusRequest()
    message.interval.FromMilliseconds(100)
    make: Any = channel.unary_stream(
        f"/{STATUS}/WatchStatus",
        request_serializer=status.WatchStatusRequest.SerializeToString,
        response_deserializer=status.WatchStatusResponse.FromString,
    )
    call = make(message, timeout=60)
    told: status.WatchStatusResponse
    async for told in call:
        if is_new(told):
            break
    call.cancel()
    return told


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


def rule_prompt_logprobs(prompt: tuple[int, ...], top_count: int) -> list[pb.TokenLogprobs]:
    content, found = EMPTY_CONTENT, []
    for index, token_id in enumerate(prompt):
        found.append(told_logprobs(content, token_id, top_count) if index else pb.TokenLogprobs(token_id=token_id))
        content = extend_content(content, (token_id,))
    return found


def rule_answer_logprobs(top_count: int) -> list[pb.TokenLogprobs]:
    content, found = extend_content(EMPTY_CONTENT, IDS), []
    for token_id in ANSWER:
        found.append(told_logprobs(content, token_id, top_count))
        content = extend_content(content, (token_id,))
    return found


def told_logprobs(content: int, token_id: int, top_count: int) -> pb.TokenLogprobs:
    """As a message, what the simulated engines of this file say of a token."""
    said = RANKED.logprobs(content, token_id, top_count)
    top = [pb.TopLogprob(token_id=top_id, logprob=logprob) for top_id, logprob in said.top]
    return pb.TokenLogprobs(token_id=token_id, logprob=said.logprob, rank=said.rank, top=top)


def _stop_index() -> int:
    """Of the token that completes ``_stop_text``."""
    return next(at for at in range(COUNT) if _stop_text() in TOKENIZER.decode(ANSWER[: at + 1]))


BLOCKS = -(-len(IDS) // 16)
SPECIAL = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
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
    "Started.time_allowed": lambda a: 0 < seconds(a.plain.started.time_allowed) <= 59.95,
    "Prompt.first_token_index": lambda a: [each.first_token_index for each in prompts(a.echoed)] == [
        sum(before.token_count for before in prompts(a.echoed)[:at]) for at in range(len(prompts(a.echoed)))],
    "Prompt.text": lambda a: "".join(each.text for each in prompts(a.echoed)) == TEXT,
    "Prompt.token_ids": lambda a: tuple(i for each in prompts(a.echoed) for i in each.token_ids) == IDS,
    "Prompt.token_count": lambda a: sum(each.token_count for each in prompts(a.echoed)) == len(IDS),
    "Prompt.logprobs": lambda a: [p for each in prompts(a.echoed) for p in each.logprobs] == rule_prompt_logprobs(
        IDS, 2),
    "Chunk.first_token_index": lambda a: contiguous(a.plain) and a.resumed.chunks[0].first_token_index == 5,
    "Chunk.text": lambda a: a.plain.said == TOKENIZER.decode(ANSWER),
    "Chunk.token_ids": lambda a: a.plain.token_ids == ANSWER,
    "Chunk.token_count": lambda a: sum(each.token_count for each in a.plain.chunks) == COUNT,
    "Chunk.logprobs": lambda a: logprobs(a.plain) == rule_answer_logprobs(2),
    "Chunk.sample_index": lambda a: {each.sample_index for each in a.samples.chunks} == {0, 1},
    "TokenLogprobs.token_id": lambda a: [each.token_id for each in logprobs(a.plain)] == list(ANSWER),
    "TokenLogprobs.logprob": lambda a: all(
        near(each.logprob, wanted) for each, wanted in zip(logprobs(a.plain), LOGPROBS, strict=True)),
    "TokenLogprobs.rank": lambda a: [each.rank for each in logprobs(a.plain)] == [1 + each % 5 for each in ANSWER],
    "TokenLogprobs.top": lambda a: [list(each.top) for each in logprobs(a.plain)] == [
        list(each.top) for each in rule_answer_logprobs(2)],
    "TopLogprob.token_id": lambda a: [[top.token_id for top in each.top] for each in logprobs(a.plain)] == [
        [each, (each + 1) % TOKENIZER.vocab_size] for each in ANSWER],
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
    "Finished.usage": lambda a: a.plain.finished.usage == pb.Usage(prompt_token_count=len(
        IDS), output_token_count=COUNT),
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
    "Usage.prompt_token_count": lambda a: [each.finished.usage.prompt_token_count for each in (
        a.plain, a.samples, a.full, a.resumed)] == [len(IDS), len(IDS), CONTEXT - 3, len(IDS)],
    "Usage.output_token_count": lambda a: [each.finished.usage.output_token_count for each in (
        a.plain, a.stopped_by_token, a.stopped_by_text, a.full, a.prefill_only, a.samples, a.samples_stopped,
        a.resumed)
    ] == [COUNT, 5, _stop_index() + 1, 3, 1, 2 * COUNT, 10, COUNT],
    "PhaseTimings.prefill": lambda a: seconds(phases(a.plain).prefill) >= 0.01,
    "PhaseTimings.kv_transfer": lambda a: seconds(phases(a.plain).kv_transfer) >= 0.02
    and seconds(phases(a.prefill_only).kv_transfer) == 0,
    "PhaseTimings.decode_wait": lambda a: seconds(phases(a.plain).decode_wait) >= 0.01,
    "PhaseTimings.decode": lambda a: seconds(phases(a.plain).decode) >= 0.002 * (COUNT - 1),
    "PhaseTimings.time_to_first_token": lambda a: 0.01 <= seconds(phases(a.plain).time_to_first_token) <= sum(
        seconds(getattr(phases(a.plain), name)) for name in SIX),
    "PhaseTimings.kv_transfer_byte_count": lambda a: (
        phases(a.plain).kv_transfer_byte_count, phases(a.local).kv_transfer_byte_count) == (
        BLOCKS * 16 * FAST.kv_bytes_per_token, 0),
    "PhaseTimings.prefill_worker_id": lambda a: phases(a.plain).prefill_worker_id == "prefill-0",
    "PhaseTimings.decode_worker_id": lambda a: (
        phases(a.plain).decode_worker_id, phases(a.prefill_only).decode_worker_id) == ("decode-0", ""),
    "PhaseTimings.attempt_count": lambda a: (
        phases(a.plain).attempt_count, phases(a.retried).attempt_count) == (1, 2),
    "PhaseTimings.placement_mode": lambda a: [phases(each).placement_mode for each in (
        a.plain, a.local, a.prefill_only)] == [
        pb.PLACEMENT_MODE_SPLIT, pb.PLACEMENT_MODE_LOCAL, pb.PLACEMENT_MODE_PREFILL_ONLY],
    "PhaseTimings.placement_reason": lambda a: [phases(each).placement_reason for each in (
        a.plain, a.local, a.short)] == [
        "split", "policy", "short_prompt"],
    "PhaseTimings.recomputed_token_count": lambda a: (
        phases(a.plain).recomputed_token_count, phases(a.recomputed).recomputed_token_count) == (0, len(IDS)),
    "PhaseTimings.handover_mode": lambda a: [phases(each).handover_mode for each in (a.plain, a.prefill_only)] == [
        pb.HANDOVER_MODE_OUTPUT_INJECTION, pb.HANDOVER_MODE_NONE],
    "PhaseTimings.kv_transfer_descriptor_count": lambda a: (
        phases(a.plain).kv_transfer_descriptor_count, phases(a.local).kv_transfer_descriptor_count) == (BLOCKS, 0),
    "PhaseTimings.kv_pull_count": lambda a: (phases(a.plain).kv_pull_count, phases(a.local).kv_pull_count) == (1, 0),
    "PhaseTimings.recompute_reason": lambda a: (
        phases(a.plain).recompute_reason, phases(a.recomputed).recompute_reason) == (
        pb.RECOMPUTE_REASON_UNSPECIFIED, pb.RECOMPUTE_REASON_FAILED),
    "ListModelsResponse.models": lambda a: list(a.listed.models) == [a.model.model],
    "GetModelResponse.model": lambda a: a.model.model == a.listed.models[0] and a.model.model.name == MODEL,
    "Model.name": lambda a: a.model.model.name == MODEL,
    "Model.max_context_token_count": lambda a: [each.model.max_context_token_count for each in (
        a.model, a.chatless)] == [CONTEXT, 100],
    "Model.vocab_size": lambda a: a.model.model.vocab_size == TOKENIZER.vocab_size,
    "Model.special_tokens": lambda a: [(
        each.token_id, each.text) for each in a.model.model.special_tokens] == list(SPECIAL.items()),
    "Model.end_token_ids": lambda a: list(a.model.model.end_token_ids) == [END_ID],
    "Model.chat_template": lambda a: [each.model.chat_template for each in (a.model, a.chatless)] == [
        CHAT_TEMPLATE, ""],
    "Model.capabilities": lambda a: a.model.model.capabilities == models.Capabilities(
        has_chat=True, max_sample_count=16, max_top_logprob_count=20, has_resume=True),
    "SpecialToken.token_id": lambda a: [each.token_id for each in a.model.model.special_tokens] == [0, 1, 2],
    "SpecialToken.text": lambda a: [each.text for each in a.model.model.special_tokens] == list(SPECIAL.values()),
    "Capabilities.has_chat": lambda a: [each.model.capabilities.has_chat for each in (a.model, a.chatless)] == [
        True, False],
    "Capabilities.max_sample_count": lambda a: a.model.model.capabilities.max_sample_count == 16,
    "Capabilities.max_top_logprob_count": lambda a: a.model.model.capabilities.max_top_logprob_count == 20,
    "Capabilities.has_resume": lambda a: [
        each.model.capabilities.has_resume for each in (a.model, a.chatless)] == [True, False],
    "CountTokensResponse.token_count": lambda a: a.counted.token_count == len(IDS),
    "CountTokensResponse.max_prompt_token_count": lambda a: a.counted.max_prompt_token_count == CONTEXT - 1,
    "TokenizeResponse.token_ids": lambda a: tuple(a.tokenized.token_ids) == IDS,
    "DetokenizeResponse.text": lambda a: a.detokenized.text == TEXT,
    "WatchStatusResponse.is_serving": lambda a: a.rested.is_serving,
    "WatchStatusResponse.finished_count": lambda a: a.rested.finished_count == 12,
    "WatchStatusResponse.failed_count": lambda a: a.rested.failed_count == 1,
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
    "WorkerStatus.used_block_count": lambda a: (a.watched.workers[0].used_block_count, a.rested.workers[
        0].used_block_count) == (
        -(-(len(IDS) + 1000) // 16), 0),
    "WorkerStatus.block_count": lambda a: a.rested.workers[0].block_count == 1024,
    "PhaseStatistics.name": lambda a: a.rested.phases[0].name == "queue",
    "PhaseStatistics.sample_count": lambda a: {each.name: each.sample_count for each in a.rested.phases}[
        "end_to_end"] == 9,
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


@register.shows("Usage.cached_prompt_token_count", "GenerateRequest.tenant")
async def test_tokens_found_in_the_prefills_cache_are_counted_as_that_engine_counts_them(tmp_path: Path) -> None:
    async def nothing() -> None:
        """What is cached counts as used: the books cannot be seen to balance."""

    def asked(length: int, **changes: Any) -> pb.GenerateRequest:
        stop = pb.StopConditions(max_output_token_count=2, ignore_eos=True)
        return pb.GenerateRequest(**{"token_ids": pb.TokenIds(ids=range(100, 100 + length)), "stop": stop, **changes})

    async with (
        sim_cluster(tmp_path, sim={"enable_prefix_caching": True}) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        cluster.until_balanced = nothing  # type: ignore[method-assign]
        engine: Any = cluster.workers["prefill-0"].engine
        evidence: list[int] = []
        prefill = engine.prefill

        async def heard(job: Any) -> Any:
            prefilled = await prefill(job)
            evidence.append(prefilled.cached_token_count)
            return prefilled

        engine.prefill = heard
        drawn = pb.Sampling(temperature=1)
        for message, count in (
            (asked(50), 0),
            (asked(50), 48),  # three whole blocks of 16
            (asked(48), 32),  # not all of it: the last token is computed, and its block
            (asked(70), 48),
            (asked(70), 64),
            (asked(70, tenant="blue"), 0),  # what others asked is not for them
            (asked(70, tenant="blue"), 64),
            (asked(70, output=pb.OutputOptions(prompt_logprob_count=0)), 0),
            (asked(70, sample_count=3, sampling=drawn), 64),
        ):
            evidence.clear()
            usage = (await generate(channel, message)).finished.usage
            assert (usage.cached_prompt_token_count, evidence) == (count, [count])
            assert usage.prompt_token_count == len(message.token_ids.ids)


@register.shows(
    "Chunk.sample_index",
    *(
        f"SampleResult.{name}"
        for name in (
            "sample_index",
            "reason",
            "matched_stop_sequence",
            "matched_stop_token_id",
            "output_token_count",
            "cumulative_logprob",
        )
    ),
)
async def test_samples_that_differ_are_told_apart_in_everything(tmp_path: Path) -> None:
    says = {5: TOKENIZER.encode(" over the lazy dog, and the dog does"), 6: (50, 51, 52, 53, 54, 55, 9, 60, 61),
            7: TOKENIZER.encode("the time of every phase. Once upon a time there was")}  # fmt: skip
    message = request(
        sample_count=3,
        sampling=pb.Sampling(temperature=1, seed=5),
        output=pb.OutputOptions(content=BOTH, top_logprob_count=0),
        stop=pb.StopConditions(
            max_output_token_count=len(says[5]), stop_token_ids=[9], stop_sequences=["phase."], ignore_eos=True
        ),
    )
    async with (
        sim_cluster(tmp_path) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        with drawn_apart(cluster, says):
            outcome = await generate(channel, message)
    of_sample = [[chunk for chunk in outcome.chunks if chunk.sample_index == index] for index in range(3)]
    said = ["".join(chunk.text for chunk in chunks) for chunks in of_sample]
    ids = [tuple(token_id for chunk in chunks for token_id in chunk.token_ids) for chunks in of_sample]
    before_stop = TOKENIZER.encode("the time of every phase.")
    assert said == [TOKENIZER.decode(says[5]), TOKENIZER.decode(says[6][:6]), "the time of every "]
    assert ids == [says[5], says[6][:7], before_stop]
    finished = outcome.finished
    ends = [(e.sample_index, e.reason, e.matched_stop_sequence, e.matched_stop_token_id) for e in finished.samples]
    assert ends == [
        (0, pb.FINISH_REASON_MAX_OUTPUT_TOKENS, "", 0),
        (1, pb.FINISH_REASON_STOP, "", 9),
        (2, pb.FINISH_REASON_STOP, "phase.", 0),
    ]
    assert [each.HasField("matched_stop_token_id") for each in finished.samples] == [False, True, False]
    assert [each.output_token_count for each in finished.samples] == [len(each) for each in ids]
    for chunks, each in zip(of_sample, finished.samples, strict=True):
        assert near(each.cumulative_logprob, sum(one.logprob for chunk in chunks for one in chunk.logprobs))
        assert [one.token_id for chunk in chunks for one in chunk.logprobs] == list(ids[each.sample_index])
        at = 0
        for chunk in chunks:
            assert chunk.first_token_index == at
            at += chunk.token_count
    assert (finished.reason, finished.cumulative_logprob) == (
        finished.samples[0].reason,
        finished.samples[0].cumulative_logprob,
    )
    assert (finished.usage.prompt_token_count, finished.usage.output_token_count) == (len(IDS), sum(map(len, ids)))


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

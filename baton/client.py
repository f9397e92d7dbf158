"""Calls Baton from Python: typed events in, typed errors out, a deadline on every call.

    async with BatonClient("127.0.0.1:50051") as client:
        async for event in client.generate("Once upon a time", timeout=30):
            if isinstance(event, Chunk):
                print(event.text, end="", flush=True)

Owns one gRPC channel; reuse a client, it carries many calls at once. Depends on grpcio and protobuf alone. Calls that
were refused before they were admitted are retried by gRPC itself (UNAVAILABLE only, three attempts, with the server's
push-back); a call that has begun to answer is never sent twice.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from baton.errors import BatonError, Reason, StatusName, internal
from baton.leg import RecomputeReason
from baton.request import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    Handover,
    OutputOptions,
    PlacementMode,
    Prompt,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from baton.status import from_rpc_error
from baton.timeline import PHASES, Phase
from baton.transfer_report import TransferReport
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"

SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "baton.v1.GenerationService"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # A client stops retrying once half of its recent calls failed: retries must not add to an outage.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # A long prompt's prefill is silence: without pings a dead peer would be noticed only by the deadline.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", -1),  # the server says what is too long, and how long it may be
)

_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_MAX_OUTPUT_TOKENS: FinishReason.MAX_OUTPUT_TOKENS,
    pb.FINISH_REASON_CONTEXT_FULL: FinishReason.CONTEXT_FULL,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}
_MODES = {
    pb.PLACEMENT_MODE_SPLIT: PlacementMode.SPLIT,
    pb.PLACEMENT_MODE_LOCAL: PlacementMode.LOCAL,
    pb.PLACEMENT_MODE_PREFILL_ONLY: PlacementMode.PREFILL_ONLY,
}
_HANDOVERS = {
    pb.HANDOVER_MODE_NONE: Handover.NONE,
    pb.HANDOVER_MODE_OUTPUT_INJECTION: Handover.OUTPUT_INJECTION,
}
_RECOMPUTE_REASONS = {
    pb.RECOMPUTE_REASON_FAILED: RecomputeReason.FAILED,
    pb.RECOMPUTE_REASON_TIMED_OUT: RecomputeReason.TIMED_OUT,
    pb.RECOMPUTE_REASON_EXPIRED: RecomputeReason.EXPIRED,
    pb.RECOMPUTE_REASON_STALE: RecomputeReason.STALE,
    pb.RECOMPUTE_REASON_CORRUPT: RecomputeReason.CORRUPT,
}


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    generation_id: str
    model: str
    prompt_token_count: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely one token of the answer was in the model's own distribution, before temperature, penalties and
    masks; natural logarithms."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), likeliest first: as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the answer. ``token_ids`` only if asked for; ``token_count`` always."""

    first_token_index: int
    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    token_count: int
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    """One of each token if asked for; otherwise empty."""


@dataclass(frozen=True, slots=True)
class PhaseTimings:
    """Where the time went, seconds. The phases sum to the server's time from receipt to last message."""

    seconds: dict[Phase, float]
    time_to_first_token_s: float | None
    transfer: TransferReport
    handover: Handover | None
    """None: a way this client does not know."""
    prefill_worker_id: str
    decode_worker_id: str
    attempt_count: int
    placement_mode: PlacementMode | None
    """None: a mode this client does not know."""
    placement_reason: str

    def __getitem__(self, phase: Phase) -> float:
        return self.seconds[phase]

    @property
    def total_s(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def kv_transfer_bytes(self) -> int:
        return self.transfer.kv_bytes

    @property
    def recomputed_token_count(self) -> int:
        return self.transfer.recomputed_token_count


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason | None
    """None: a reason this client does not know."""
    matched_stop_sequence: str | None
    matched_stop_token_id: int | None
    usage: Usage
    phases: PhaseTimings
    cumulative_logprob: float | None = None
    """Of all tokens of the answer, if logprobs were asked for."""


Event = Started | Chunk | Finished


class BatonClient:
    """A client of one Baton. Use as an async context manager, or ``await close()``."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, options: Sequence[tuple[str, Any]] = ()) -> None:
        """``address``: host:port. ``options``: gRPC channel options over Baton's own. Must be made inside the
        event loop that uses it. Connects at the first call."""
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=[*channel_options(address), *options])
        self._stub = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(
        self,
        prompt: str | Sequence[int] | Prompt,
        *,
        timeout: float,
        model: str = "",
        sampling: Sampling | None = None,
        stop: StopConditions | None = None,
        output: OutputOptions | None = None,
        priority: int = 0,
        session_id: str = "",
        correlation_id: str = "",
        tenant: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Streams ``Started Chunk* Finished``. ``prompt``: text, or token ids. ``timeout``: seconds for the whole
        call, required; the server stops all work when it passes. Leaving the loop, closing the generator or
        cancelling the task cancels the call and frees what it held.

        Raises ``BatonError``: its ``status`` says whether to retry, its ``reason`` why, ``violations`` which
        fields. Raises ``ValueError`` for a timeout that is not positive and finite.
        """
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be positive and finite seconds, not {timeout}")
        message = request_to_proto(
            prompt_of(prompt),
            model=model,
            sampling=sampling,
            stop=stop,
            output=output,
            priority=priority,
            session_id=session_id,
            correlation_id=correlation_id,
            tenant=tenant,
        )
        return self._events(message, timeout)

    def chat(
        self, messages: Sequence[ChatMessage | tuple[str, str]], *, timeout: float, **options: Any
    ) -> AsyncGenerator[Event, None]:
        """Like ``generate`` for a conversation, oldest message first: ``[("user", "Hello!")]``. ``options``: the
        other keywords of ``generate``."""
        return self.generate(chat_prompt(messages), timeout=timeout, **options)

    async def _events(self, message: pb.GenerateRequest, timeout: float) -> AsyncGenerator[Event, None]:
        call = self._stub.Generate(message, timeout=timeout)
        grammar = StreamGrammar()
        try:
            async for response in call:
                event = event_from_proto(response)
                if event is not None:
                    grammar.check(event)
                    yield event
            grammar.check_end()
        except grpc.RpcError as error:
            raise grammar.broken(from_rpc_error(error, peer=self.address)) from None
        finally:
            call.cancel()  # a finished call ignores it; an abandoned one must not run on

    async def wait_until_serving(self, *, timeout: float) -> None:
        """Returns once the server could place a request. Raises UNAVAILABLE when ``timeout`` seconds pass first."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout
        while not await self.is_serving(timeout=max(0.05, give_up_at - loop.time())):
            if loop.time() >= give_up_at:
                raise BatonError(
                    Reason.NO_WORKER, StatusName.UNAVAILABLE, f"{self.address} was not serving within {timeout:g} s"
                )
            await asyncio.sleep(0.1)

    async def is_serving(self, *, timeout: float) -> bool:
        """Whether the server could place a request now; False also when it cannot be reached."""
        # The health protocol by hand: two one-field messages are not worth a dependency.
        check: Any = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            reply: bytes = await check(b"", timeout=timeout)
        except grpc.RpcError:
            return False
        return reply == b"\x08\x01"  # field 1 (status) = 1 (SERVING)

    async def close(self) -> None:
        """Cancels what is open. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<BatonClient {self.address}>"


class StreamGrammar:
    """Checks ``Started Chunk* Finished`` and that no token is missing or repeated. Raises INTERNAL."""

    def __init__(self) -> None:
        self._is_started = self._is_finished = False
        self._next_index = 0

    def check(self, event: Event) -> None:
        if self._is_finished or self._is_started == isinstance(event, Started):
            raise internal(f"the server sent {type(event).__name__} out of order")
        match event:
            case Started():
                self._is_started = True
            case Chunk():
                if event.first_token_index != self._next_index:
                    raise internal(f"token {self._next_index} was expected and {event.first_token_index} came")
                if event.logprobs and len(event.logprobs) != event.token_count:
                    raise internal(f"{len(event.logprobs)} logprobs came with {event.token_count} tokens")
                self._next_index += event.token_count
            case Finished():
                self._is_finished = True

    def broken(self, error: BatonError) -> BatonError:
        """The error that ends this stream. UNAVAILABLE says that nothing was sent, so a connection lost after tokens
        came is ABORTED: whoever retries at once would repeat them."""
        if error.status is not StatusName.UNAVAILABLE or self._next_index == 0:
            return error
        metadata = {**error.metadata, "emitted_token_count": str(self._next_index)}
        message = f"{error.message}, after {self._next_index} tokens; start over"
        return BatonError(error.reason, StatusName.ABORTED, message, metadata=metadata)

    def check_end(self) -> None:
        if not self._is_finished:
            raise internal("the server ended the stream with OK but without Finished")


def channel_options(address: str) -> list[tuple[str, Any]]:
    options = list(CHANNEL_OPTIONS)
    host = address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        options.append(("grpc.enable_http_proxy", 0))  # a proxy from the environment cannot reach our loopback
    return options


def prompt_of(prompt: str | Sequence[int] | Prompt) -> Prompt:
    match prompt:
        case str():
            return TextPrompt(prompt)
        case TextPrompt() | TokenPrompt() | ChatPrompt():
            return prompt
        case _:
            return TokenPrompt(tuple(prompt))


def chat_prompt(messages: Sequence[ChatMessage | tuple[str, str]]) -> ChatPrompt:
    return ChatPrompt(tuple(m if isinstance(m, ChatMessage) else ChatMessage(*m) for m in messages))


def request_to_proto(
    prompt: Prompt,
    *,
    model: str = "",
    sampling: Sampling | None = None,
    stop: StopConditions | None = None,
    output: OutputOptions | None = None,
    priority: int = 0,
    session_id: str = "",
    correlation_id: str = "",
    tenant: str = "",
) -> pb.GenerateRequest:
    """The message. Raises ``ValueError`` for numbers that no message can carry."""
    message = pb.GenerateRequest(
        model=model, priority=priority, session_id=session_id, correlation_id=correlation_id, tenant=tenant
    )
    match prompt:
        case TextPrompt(text):
            message.text = text
        case TokenPrompt(token_ids):
            message.token_ids.ids.extend(token_ids)
            message.token_ids.SetInParent()
        case ChatPrompt(messages):
            message.chat.messages.extend(pb.ChatMessage(role=m.role, content=m.content) for m in messages)
            message.chat.SetInParent()
    if sampling is not None:
        message.sampling.CopyFrom(
            pb.Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=sampling.seed,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=sampling.repetition_penalty,
                logit_bias=[pb.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
                allowed_token_ids=(
                    pb.TokenIds(ids=sampling.allowed_token_ids) if sampling.allowed_token_ids else None
                ),
                bad_token_sequences=[pb.TokenIds(ids=each) for each in sampling.bad_token_sequences],
                structure=None if sampling.structure is None else _structure_to_proto(sampling.structure),
            )
        )
    if stop is not None:
        message.stop.CopyFrom(
            pb.StopConditions(
                max_output_token_count=stop.max_output_token_count,
                stop_sequences=stop.stop_sequences,
                stop_token_ids=stop.stop_token_ids,
                ignore_eos=stop.ignore_eos,
                min_output_token_count=stop.min_output_token_count,
            )
        )
    if output is not None:
        message.output.CopyFrom(
            pb.OutputOptions(
                content={
                    (True, True): pb.OutputOptions.CONTENT_BOTH,
                    (False, True): pb.OutputOptions.CONTENT_TOKEN_IDS,
                }.get((output.wants_text, output.wants_token_ids), pb.OutputOptions.CONTENT_TEXT),
                max_chunk_token_count=output.max_chunk_token_count,
                top_logprob_count=output.top_logprob_count,
            )
        )
    return message


def _structure_to_proto(structure: Structure) -> pb.StructuredOutput:
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return pb.StructuredOutput(json_schema=structure.text)
        case StructureKind.JSON_OBJECT:
            return pb.StructuredOutput(json_object=pb.JsonObject())
        case StructureKind.REGEX:
            return pb.StructuredOutput(regex=structure.text)
        case StructureKind.CHOICE:
            return pb.StructuredOutput(choice=pb.Choices(texts=structure.choices))
        case StructureKind.GRAMMAR:
            return pb.StructuredOutput(grammar=structure.text)


def event_from_proto(response: pb.GenerateResponse) -> Event | None:
    """None for an event of a newer server."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(started.generation_id, started.model, started.prompt_token_count)
        case "chunk":
            chunk = response.chunk
            return Chunk(
                chunk.first_token_index,
                chunk.text,
                tuple(chunk.token_ids),
                chunk.token_count,
                tuple(
                    TokenLogprob(
                        each.token_id, each.logprob, each.rank, tuple((t.token_id, t.logprob) for t in each.top)
                    )
                    for each in chunk.logprobs
                ),
            )
        case "finished":
            return _finished_from_proto(response.finished)
    return None


def _finished_from_proto(finished: pb.Finished) -> Finished:
    phases = finished.phases
    seconds = {phase: getattr(phases, phase.value).ToNanoseconds() / 1e9 for phase in PHASES}
    has_first = phases.HasField("time_to_first_token")
    return Finished(
        reason=_REASONS.get(finished.reason),
        matched_stop_sequence=finished.matched_stop_sequence or None,
        matched_stop_token_id=finished.matched_stop_token_id if finished.HasField("matched_stop_token_id") else None,
        usage=Usage(
            finished.usage.prompt_token_count,
            finished.usage.output_token_count,
            finished.usage.cached_prompt_token_count,
        ),
        phases=PhaseTimings(
            seconds=seconds,
            time_to_first_token_s=phases.time_to_first_token.ToNanoseconds() / 1e9 if has_first else None,
            transfer=TransferReport(
                kv_bytes=phases.kv_transfer_byte_count,
                descriptor_count=phases.kv_transfer_descriptor_count,
                pull_count=phases.kv_pull_count,
                post_s=phases.kv_post.ToNanoseconds() / 1e9,
                wire_s=phases.kv_wire.ToNanoseconds() / 1e9,
                verify_s=phases.kv_verify.ToNanoseconds() / 1e9,
                recomputed_token_count=phases.recomputed_token_count,
                recompute_reason=_RECOMPUTE_REASONS.get(phases.recompute_reason),
            ),
            handover=_HANDOVERS.get(phases.handover_mode),
            prefill_worker_id=phases.prefill_worker_id,
            decode_worker_id=phases.decode_worker_id,
            attempt_count=phases.attempt_count,
            placement_mode=_MODES.get(phases.placement_mode),
            placement_reason=phases.placement_reason,
        ),
        cumulative_logprob=finished.cumulative_logprob if finished.HasField("cumulative_logprob") else None,
    )

"""The services of a fake Baton: real gRPC messages over real sockets, said from a script."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from baton.errors import (
    BatonError,
    FieldViolation,
    draining,
    invalid_request,
    model_not_found,
    no_api_key,
    resume_denied,
    resume_unknown,
)
from baton.request import ChatPrompt, FinishReason, GenerateRequest, Prompt, TextPrompt, ToolCall, ToolCallDelta
from baton.request_proto import chat_from_proto, request_from_proto
from baton.status import to_rpc_status
from baton.testing.fake_rules import check_request
from baton.testing.fake_script import (
    VOCAB_SIZE,
    FakeCall,
    FakeSample,
    FakeToken,
    Fault,
    Scripted,
    decode,
    echo_of,
    encode,
    rendered,
    sample_of,
    words,
)
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

MAX_KEPT_GENERATION_COUNT = 1000
TOKEN_PREFIX = "fake-resume-"  # noqa: S105  # the beginning of what is made up
DEFAULT_GRACE_S = 30.0
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"

R = TypeVar("R")

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_OUTPUT_TOKENS: pb.FINISH_REASON_MAX_OUTPUT_TOKENS,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


@dataclass(slots=True)
class _Generation:
    """One answer, which calls attach to."""

    generation_id: str
    resume_token: str
    message: pb.GenerateRequest
    request: GenerateRequest
    script: Scripted
    samples: tuple[FakeSample, ...]
    is_running: bool = True


@dataclass(slots=True)
class FakeState:
    """What a fake knows; every access holds ``changed``."""

    model: str
    max_context_token_count: int
    api_key: str | None
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_serving: bool = True
    answers: deque[Scripted] = field(default_factory=deque)
    faults: deque[Fault] = field(default_factory=deque)
    calls: list[FakeCall] = field(default_factory=list)
    generations: dict[str, _Generation] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def note(self, call: FakeCall) -> FakeCall:
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()
        return call


class _Serving:
    """What both services do with a call before they look at it."""

    def __init__(self, state: FakeState) -> None:
        self._state = state

    def _begin(self, method: str, context: Any, **facts: Any) -> FakeCall:
        remaining_s = context.time_remaining()
        # Without a deadline gRPC says a time beyond anybody's life.
        timeout_s = None if remaining_s is None or remaining_s > 1e8 else float(remaining_s)
        return self._state.note(FakeCall(method, timeout_s=timeout_s, **facts))

    def _admit(self, context: Any) -> None:
        """Raises UNAUTHENTICATED or DRAINING."""
        expected = self._state.api_key
        if expected is not None and dict(context.invocation_metadata()).get("authorization") != f"Bearer {expected}":
            raise no_api_key()
        if not self._state.is_serving:
            raise draining()

    def _end(self, call: FakeCall) -> None:
        with self._state.changed:
            call.is_over = True
            self._state.changed.notify_all()


class FakeGenerationService(_Serving, generation_pb2_grpc.GenerationServiceServicer):
    """Generate, ResumeGenerate and CancelGeneration."""

    def Generate(self, message: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        request, violations = request_from_proto(message)
        call = self._begin("Generate", context, request=request)
        try:
            self._admit(context)
            if violations:
                raise invalid_request(violations)
            room = self._check(request)
            fault = self._next_fault()
            generation = self._new_generation(message, request, room)
            yield from self._stream(generation, call, context, fault, [0] * len(generation.samples))
        except BatonError as error:
            _refuse(context, error)
        finally:
            self._end(call)

    def ResumeGenerate(self, message: pb.ResumeGenerateRequest, context: Any) -> Iterator[pb.ResumeGenerateResponse]:
        indices = tuple(message.next_token_indices) or (message.next_token_index,)
        request = None
        if message.HasField("continuation"):
            request, _ = request_from_proto(message.continuation.request)
        call = self._begin(
            "ResumeGenerate",
            context,
            request=request,
            resume_token=message.resume_token,
            next_token_indices=indices,
        )
        try:
            self._admit(context)
            fault = self._next_fault()
            generation = self._found(message, request, indices)
            for event in self._stream(generation, call, context, fault, list(indices)):
                yield pb.ResumeGenerateResponse.FromString(event.SerializeToString())
        except BatonError as error:
            _refuse(context, error)
        finally:
            self._end(call)

    def CancelGeneration(self, message: pb.CancelGenerationRequest, context: Any) -> pb.CancelGenerationResponse:
        call = self._begin("CancelGeneration", context, resume_token=message.resume_token)
        try:
            self._admit(context)
            with self._state.changed:
                generation = self._state.generations.pop(message.resume_token, None)
            return pb.CancelGenerationResponse(was_running=generation is not None and generation.is_running)
        except BatonError as error:
            _refuse(context, error)
        finally:
            self._end(call)

    def _check(self, request: GenerateRequest) -> int:
        """Returns the tokens that the context has left for an answer."""
        length = len(rendered(request.prompt))
        most = self._state.max_context_token_count
        check_request(request, model=self._state.model, max_context_token_count=most, prompt_length=length)
        return most - length

    def _next_fault(self) -> Fault | None:
        """Raises the error of a call that is refused before it is admitted."""
        with self._state.changed:
            fault = self._state.faults.popleft() if self._state.faults else None
        if fault is not None and fault.after_token_count is None and fault.error is not None:
            raise fault.error
        return fault

    def _new_generation(self, message: pb.GenerateRequest, request: GenerateRequest, room: int) -> _Generation:
        state = self._state
        with state.changed:
            script = state.answers.popleft() if state.answers else Scripted((words(echo_of(request.prompt)),))
            number = next(state.numbers)
            generation = _Generation(
                f"fake-{number}",
                f"{TOKEN_PREFIX}{number}" if request.resume is not None else "",
                message,
                request,
                script,
                tuple(sample_of(script, request, index, room) for index in range(request.sample_count)),
            )
            if generation.resume_token:
                state.generations[generation.resume_token] = generation
                while len(state.generations) > MAX_KEPT_GENERATION_COUNT:
                    del state.generations[next(iter(state.generations))]
        return generation

    def _found(
        self, message: pb.ResumeGenerateRequest, request: GenerateRequest | None, indices: Sequence[int]
    ) -> _Generation:
        """What the token stands for, or, with a continuation, what another fake would go on with."""
        if not message.resume_token.startswith(TOKEN_PREFIX):
            raise resume_denied()
        with self._state.changed:
            generation = self._state.generations.get(message.resume_token)
        if generation is None:
            if request is None:
                raise resume_unknown()
            generation = self._new_generation(message.continuation.request, request, self._check(request))
        if message.tenant != generation.request.tenant:
            raise resume_denied()
        if message.HasField("continuation"):
            if message.continuation.request != generation.message:
                raise resume_denied()
            received = tuple(tuple(each.ids) for each in message.continuation.samples)
            whole = tuple(tuple(token.token_id for token in sample.tokens) for sample in generation.samples)
            if [len(each) for each in received] != list(indices) or any(
                ids != tokens[: len(ids)] for ids, tokens in zip(received, whole, strict=True)
            ):
                problem = "are not the tokens that were sent, as many as next_token_index says"
                raise invalid_request([FieldViolation("continuation.samples", problem)])
        lengths = [len(sample.tokens) for sample in generation.samples]
        if len(indices) != len(lengths) or any(not 0 <= n <= most for n, most in zip(indices, lengths, strict=True)):
            raise invalid_request([FieldViolation("next_token_index", f"must be 0 to {lengths}, one of each sample")])
        return generation

    def _stream(
        self, generation: _Generation, call: FakeCall, context: Any, fault: Fault | None, indices: list[int]
    ) -> Iterator[pb.GenerateResponse]:
        ended = threading.Event()
        if not context.add_callback(ended.set):
            ended.set()
        limit = None if fault is None else fault.after_token_count or 0
        script, request = generation.script, generation.request
        try:
            _wait(ended, script.delay_s)
            yield _started(generation, self._state.model, call.timeout_s)
            if not call.method.startswith("Resume"):
                yield from _prompt_parts(request)
            while any(at < len(sample.tokens) for at, sample in zip(indices, generation.samples, strict=True)):
                for index, sample in enumerate(generation.samples):
                    tokens = _next_tokens(sample, indices[index], request.output.max_chunk_token_count)
                    if limit is not None:
                        tokens = tokens[: limit - call.sent_token_count]
                    if tokens:
                        _wait(ended, script.chunk_delay_s)
                        yield _chunk(tokens, indices[index], index, request)
                        indices[index] += len(tokens)
                        with self._state.changed:
                            call.sent_token_count += len(tokens)
                            self._state.changed.notify_all()
                    if limit is not None and call.sent_token_count >= limit:
                        assert fault is not None
                        _break(context, fault, ended)
            if fault is not None:  # after more tokens than the answer has: at its end
                _break(context, fault, ended)
            with self._state.changed:
                generation.is_running = False
            yield _finished(generation)
        except GeneratorExit:
            call.was_left = True
            raise
        except _CallerLeft:
            call.was_left = True
            return


class FakeModelService(_Serving, model_pb2_grpc.ModelServiceServicer):
    """One model, whose tokens are characters."""

    def ListModels(self, message: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        return self._answered("ListModels", context, lambda: model_pb2.ListModelsResponse(models=[self._model("")]))

    def GetModel(self, message: model_pb2.GetModelRequest, context: Any) -> model_pb2.GetModelResponse:
        return self._answered(
            "GetModel", context, lambda: model_pb2.GetModelResponse(model=self._model(message.name))
        )

    def CountTokens(self, message: model_pb2.CountTokensRequest, context: Any) -> model_pb2.CountTokensResponse:
        return self._answered(
            "CountTokens",
            context,
            lambda: model_pb2.CountTokensResponse(
                token_count=len(self._prompt(message)),
                max_prompt_token_count=self._state.max_context_token_count - 1,
            ),
        )

    def Tokenize(self, message: model_pb2.TokenizeRequest, context: Any) -> model_pb2.TokenizeResponse:
        return self._answered(
            "Tokenize", context, lambda: model_pb2.TokenizeResponse(token_ids=encode(self._prompt(message)))
        )

    def Detokenize(self, message: model_pb2.DetokenizeRequest, context: Any) -> model_pb2.DetokenizeResponse:
        def answer() -> model_pb2.DetokenizeResponse:
            self._model(message.model)
            if any(not 0 <= each < VOCAB_SIZE for each in message.token_ids.ids):
                raise invalid_request([FieldViolation("token_ids.ids", f"must be 0 to {VOCAB_SIZE - 1}")])
            return model_pb2.DetokenizeResponse(text=decode(message.token_ids.ids))

        return self._answered("Detokenize", context, answer)

    def _answered(self, method: str, context: Any, answer: Callable[[], R]) -> R:
        call = self._begin(method, context)
        try:
            self._admit(context)
            return answer()
        except BatonError as error:
            _refuse(context, error)
        finally:
            self._end(call)

    def _prompt(self, message: model_pb2.CountTokensRequest | model_pb2.TokenizeRequest) -> str:
        self._model(message.model)
        violations: list[FieldViolation] = []
        prompt: Prompt = TextPrompt(message.text)
        if message.WhichOneof("prompt") == "chat":
            prompt = chat_from_proto(message.chat, violations)
            assert isinstance(prompt, ChatPrompt)
        check_request(
            GenerateRequest(prompt),
            model=self._state.model,
            max_context_token_count=VOCAB_SIZE,  # a prompt too long to generate from may be counted
            prompt_length=1,
        )
        if violations:
            raise invalid_request(violations)
        return rendered(prompt)

    def _model(self, name: str) -> model_pb2.Model:
        """Raises MODEL_NOT_FOUND."""
        if name and name != self._state.model:
            raise model_not_found(name, [self._state.model])
        return model_pb2.Model(
            name=self._state.model,
            max_context_token_count=self._state.max_context_token_count,
            vocab_size=VOCAB_SIZE,
            chat_template=CHAT_TEMPLATE,
            capabilities=model_pb2.Capabilities(
                has_chat=True,
                has_tools=True,
                tool_parser="fake",
                reasoning_parser="fake",
                max_sample_count=16,
                max_top_logprob_count=20,
                has_resume=True,
            ),
        )


def attach(state: FakeState, server: grpc.Server) -> None:
    """Adds the services and health."""
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(FakeGenerationService(state), server)  # type: ignore[no-untyped-call]
    model_pb2_grpc.add_ModelServiceServicer_to_server(FakeModelService(state), server)  # type: ignore[no-untyped-call]

    def check(_: bytes, __: Any) -> bytes:
        return b"\x08\x01" if state.is_serving else b"\x08\x02"  # field 1 (status): SERVING or NOT_SERVING

    handlers: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers),))


class _CallerLeft(Exception):
    """The call is over for the one who made it."""


def _wait(ended: threading.Event, delay_s: float) -> None:
    if ended.wait(delay_s) if delay_s > 0 else ended.is_set():
        raise _CallerLeft


def _break(context: Any, fault: Fault, ended: threading.Event) -> NoReturn:
    if fault.is_stall:
        ended.wait()
        raise _CallerLeft
    if fault.error is not None:
        raise fault.error
    _lose(context)


def _lose(context: Any) -> NoReturn:
    """As a lost connection looks to the caller: UNAVAILABLE, and nobody who says why."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    raise AssertionError("context.abort returned")


def _refuse(context: Any, error: BatonError) -> NoReturn:
    code, text, trailers = to_rpc_status(error)
    context.set_trailing_metadata(trailers)
    context.abort(code, text)
    raise AssertionError("context.abort returned")


def _next_tokens(sample: FakeSample, at: int, limit: int) -> tuple[FakeToken, ...]:
    """To the end of the chunk, at most ``limit``."""
    end = at
    while end < min(at + limit, len(sample.tokens)):
        end += 1
        if sample.tokens[end - 1].ends_chunk:
            break
    return sample.tokens[at:end]


def _started(generation: _Generation, model: str, timeout_s: float | None) -> pb.GenerateResponse:
    started = pb.Started(
        generation_id=generation.generation_id,
        model=model,
        prompt_token_count=len(rendered(generation.request.prompt)),
        resume_token=generation.resume_token,
    )
    resume = generation.request.resume
    if resume is not None:
        started.resume_grace.CopyFrom(_duration(DEFAULT_GRACE_S if resume.grace_s is None else resume.grace_s))
    if timeout_s is not None:
        started.time_allowed.CopyFrom(_duration(timeout_s))
    return pb.GenerateResponse(started=started)


def _prompt_parts(request: GenerateRequest) -> Iterator[pb.GenerateResponse]:
    output = request.output
    if not output.echo_prompt and output.prompt_logprob_count is None:
        return
    text = rendered(request.prompt)
    ids = encode(text)
    part = pb.Prompt(token_count=len(ids))
    if output.echo_prompt and output.wants_text:
        part.text = text
    if output.echo_prompt and output.wants_token_ids:
        part.token_ids.extend(ids)
    if output.prompt_logprob_count is not None:
        part.logprobs.add(token_id=ids[0], rank=0)
        part.logprobs.extend(_logprobs(each, output.prompt_logprob_count) for each in ids[1:])
    yield pb.GenerateResponse(prompt=part)


def _chunk(
    tokens: Sequence[FakeToken], first: int, sample_index: int, request: GenerateRequest
) -> pb.GenerateResponse:
    output = request.output
    chunk = pb.Chunk(first_token_index=first, token_count=len(tokens), sample_index=sample_index)
    if output.wants_text:
        chunk.text = "".join(token.text for token in tokens)
        chunk.reasoning_text = "".join(token.reasoning_text for token in tokens)
        chunk.tool_call_deltas.extend(
            pb.ToolCallDelta(index=each.index, id=each.id, name=each.name, arguments_json=each.arguments_json)
            for each in _joined(tokens)
        )
    if output.wants_token_ids:
        chunk.token_ids.extend(token.token_id for token in tokens)
    if output.top_logprob_count is not None:
        chunk.logprobs.extend(_logprobs(token.token_id, output.top_logprob_count) for token in tokens)
    return pb.GenerateResponse(chunk=chunk)


def _joined(tokens: Sequence[FakeToken]) -> list[ToolCallDelta]:
    found: list[ToolCallDelta] = []
    for delta in (token.delta for token in tokens if token.delta is not None):
        if found and found[-1].index == delta.index:
            found[-1] = replace(found[-1], arguments_json=found[-1].arguments_json + delta.arguments_json)
        else:
            found.append(delta)
    return found


def _logprobs(token_id: int, top_count: int) -> pb.TokenLogprobs:
    """Every token is the likeliest; those after it are the next code points."""
    return pb.TokenLogprobs(
        token_id=token_id,
        logprob=-0.5,
        rank=1,
        top=[
            pb.TopLogprob(token_id=(token_id + place) % VOCAB_SIZE, logprob=-0.5 - place)
            for place in range(top_count)
        ],
    )


def _finished(generation: _Generation) -> pb.GenerateResponse:
    first = generation.samples[0]
    has_logprobs = generation.request.output.top_logprob_count is not None
    finished = pb.Finished(
        reason=_REASONS[first.reason],
        matched_stop_sequence=first.matched_stop_sequence or "",
        matched_stop_token_id=first.matched_stop_token_id,
        usage=pb.Usage(
            prompt_token_count=len(rendered(generation.request.prompt)),
            output_token_count=sum(len(sample.tokens) for sample in generation.samples),
            cached_prompt_token_count=generation.script.cached_prompt_token_count,
        ),
        phases=pb.PhaseTimings(
            queue=_duration(0.001),
            prefill=_duration(0.002),
            handoff_wait=_duration(0.001),
            kv_transfer=_duration(0.001),
            decode_wait=_duration(0.001),
            decode=_duration(0.004),
            time_to_first_token=_duration(0.003),
            kv_pull_count=1,
            prefill_worker_id="fake-prefill",
            decode_worker_id="fake-decode",
            attempt_count=1,
            placement_mode=pb.PLACEMENT_MODE_SPLIT,
            placement_reason="fake",
            handover_mode=pb.HANDOVER_MODE_OUTPUT_INJECTION,
        ),
        cumulative_logprob=-0.5 * len(first.tokens) if has_logprobs else None,
        tool_calls=_tool_calls(first.tool_calls),
    )
    if len(generation.samples) > 1:
        finished.samples.extend(
            pb.SampleResult(
                sample_index=index,
                reason=_REASONS[sample.reason],
                matched_stop_sequence=sample.matched_stop_sequence or "",
                matched_stop_token_id=sample.matched_stop_token_id,
                output_token_count=len(sample.tokens),
                cumulative_logprob=-0.5 * len(sample.tokens) if has_logprobs else None,
                tool_calls=_tool_calls(sample.tool_calls),
            )
            for index, sample in enumerate(generation.samples)
        )
    return pb.GenerateResponse(finished=finished)


def _tool_calls(calls: Sequence[ToolCall]) -> list[pb.ToolCall]:
    return [pb.ToolCall(id=each.id, name=each.name, arguments_json=each.arguments_json) for each in calls]


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration

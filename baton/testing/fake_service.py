"""The services of a fake Baton: real gRPC messages over real sockets, said from a script."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import grpc

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
from baton.request import ChatPrompt, GenerateRequest, Prompt, TextPrompt
from baton.request_proto import chat_from_proto, request_from_proto
from baton.status import to_rpc_status
from baton.testing.fake_proto import (
    FakeGeneration,
    chunk_to_proto,
    finished_to_proto,
    prompt_to_proto,
    started_to_proto,
)
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
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"

METHODS = (
    *("Generate", "ResumeGenerate", "CancelGeneration"),
    *("ListModels", "GetModel", "CountTokens", "Tokenize", "Detokenize"),
)
"""Of the public API, except for watching the status."""

R = TypeVar("R")


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
    generations: dict[str, FakeGeneration] = field(default_factory=dict)
    told: dict[str, tuple[pb.GenerateRequest, Scripted]] = field(default_factory=dict)
    """By resume token, what was asked and scripted. Outlives the generations, as the model outlives its router: it
    would go on with the same answer."""
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

    def _admit(self, context: Any, *, while_draining: bool = False) -> None:
        """Raises UNAUTHENTICATED or, unless ``while_draining``, DRAINING."""
        expected = self._state.api_key
        if expected is not None and dict(context.invocation_metadata()).get("authorization") != f"Bearer {expected}":
            raise no_api_key()
        if not self._state.is_serving and not while_draining:
            raise draining()

    def _next_fault(self, method: str = "") -> Fault | None:
        """Takes it. Raises the error of a call that is refused before it is admitted."""
        state = self._state
        with state.changed:
            fault = next((each for each in state.faults if each.method == method), None)
            if fault is not None:
                state.faults.remove(fault)  # the first that equals it, which it is
        if fault is not None and fault.after_token_count is None and fault.error is not None:
            raise fault.error
        return fault

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
            self._admit(context, while_draining=True)  # ending what runs is what a drain waits for
            self._next_fault("CancelGeneration")
            if not message.resume_token.startswith(TOKEN_PREFIX):
                raise resume_denied()
            with self._state.changed:
                asked, _ = self._state.told.get(message.resume_token, (None, None))
                if asked is not None and asked.tenant != message.tenant:
                    raise resume_denied()
                generation = self._state.generations.pop(message.resume_token, None)
                if generation is None:
                    return pb.CancelGenerationResponse()
                generation.is_cancelled = True
                for reader in generation.readers:
                    reader.set()
                return pb.CancelGenerationResponse(was_running=generation.is_running)
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

    def _new_generation(
        self, message: pb.GenerateRequest, request: GenerateRequest, room: int, resume_token: str = ""
    ) -> FakeGeneration:
        """``resume_token``: of the one that it goes on with."""
        state = self._state
        with state.changed:
            asked, script = state.told.get(resume_token, (None, None))
            if script is None or asked != message:  # another fake's token, or of another request
                script = state.answers.popleft() if state.answers else Scripted((words(echo_of(request.prompt)),))
            number = next(state.numbers)
            generation = FakeGeneration(
                f"fake-{number}",
                f"{TOKEN_PREFIX}{number}" if request.resume is not None else "",
                message,
                request,
                script,
                tuple(sample_of(script, request, index, room) for index in range(request.sample_count)),
            )
            if generation.resume_token:
                state.generations[generation.resume_token] = generation
                state.told[generation.resume_token] = (message, script)
                for kept in (state.generations, state.told):
                    while len(kept) > MAX_KEPT_GENERATION_COUNT:
                        del kept[next(iter(kept))]
        return generation

    def _found(
        self, message: pb.ResumeGenerateRequest, request: GenerateRequest | None, indices: Sequence[int]
    ) -> FakeGeneration:
        """What the token stands for, or, with a continuation, what another fake would go on with."""
        if not message.resume_token.startswith(TOKEN_PREFIX):
            raise resume_denied()
        with self._state.changed:
            generation = self._state.generations.get(message.resume_token)
        if generation is None:
            if request is None:
                raise resume_unknown()
            room = self._check(request)
            asked = message.continuation.request
            generation = self._new_generation(asked, request, room, message.resume_token)
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
        self, generation: FakeGeneration, call: FakeCall, context: Any, fault: Fault | None, indices: list[int]
    ) -> Iterator[pb.GenerateResponse]:
        ended = threading.Event()
        if not context.add_callback(ended.set):
            ended.set()
        with self._state.changed:
            generation.readers.add(ended)
            if generation.is_cancelled:
                ended.set()
        limit = None if fault is None else fault.after_token_count or 0
        script, request = generation.script, generation.request
        try:
            _wait(ended, script.delay_s)
            yield started_to_proto(generation, self._state.model, call.timeout_s)
            if not call.method.startswith("Resume"):
                yield from prompt_to_proto(request)
            while any(at < len(sample.tokens) for at, sample in zip(indices, generation.samples, strict=True)):
                for index, sample in enumerate(generation.samples):
                    tokens = _next_tokens(sample, indices[index], request.output.max_chunk_token_count)
                    if limit is not None:
                        tokens = tokens[: limit - call.sent_token_count]
                    if tokens:
                        _wait(ended, script.chunk_delay_s)
                        yield chunk_to_proto(tokens, indices[index], index, request)
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
            yield finished_to_proto(generation)
        except GeneratorExit:
            call.was_left = True
            raise
        except _CallerLeft:
            if generation.is_cancelled and context.is_active():
                raise resume_unknown() from None
            call.was_left = True
            return
        finally:
            with self._state.changed:
                generation.readers.discard(ended)


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
            self._next_fault(method)
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
            max_context_token_count=self._state.max_context_token_count,
            prompt_length=len(rendered(prompt)),
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

"""The client for programs without an event loop: the same calls, events and errors as ``baton.client``.

    with BatonClientSync("127.0.0.1:50051") as client:
        for chunk in client.generate("Once upon a time", timeout=30):
            print(chunk.text, end="", flush=True)

Thread-safe, as gRPC channels are; each call blocks its own thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from baton.call_proto import (
    Asked,
    GenerateOptions,
    asked,
    cancel_to_proto,
    checked_timeout,
    count_to_proto,
    detokenize_to_proto,
    resume_to_proto,
    tokenize_to_proto,
)
from baton.channels import DEFAULT_ADDRESS, addresses_of, call_metadata, channel_options
from baton.errors import BatonError, StatusName
from baton.event_proto import event_from_proto, model_from_proto
from baton.events import Answer, Event, Started, collect_sync
from baton.handshake import Security
from baton.models import Model, TokenCount
from baton.prompts import MessageLike, TemplateArgument, ToolLike, chat_prompt
from baton.request import ChatPrompt, Prompt, TextPrompt, ToolChoice
from baton.resuming import DEFAULT_POLICY, Continuity, ResumePolicy
from baton.status import from_rpc_error
from baton.tls import Tls, Transport, transport_of
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = ["BatonClientSync", "collect_sync"]

GOODBYE_S = 2.0
"""As of ``baton.client``."""


class _Peer:
    """One address: its channel, which connects at the first call, and what is called there."""

    def __init__(self, address: str, channel: grpc.Channel, security: Security | None) -> None:
        self.address = address
        self.security = security
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        self.models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]

    def failure(self, error: grpc.RpcError) -> BatonError:
        """What a call that failed says."""
        return from_rpc_error(error, peer=self.address, security=self.security)


@dataclass(slots=True)
class _Open:
    """A stream that somebody reads, or left without closing it."""

    tenant: str
    call: Any = None
    """The present attachment's."""


class BatonClientSync:
    """A client of one Baton. Use as a context manager, or ``close()``."""

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | bool | None = None,
        allow_plaintext_api_key: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        resume_policy: ResumePolicy = DEFAULT_POLICY,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """As ``BatonClient``. ``clock``: seconds, by which timeouts are shared out among tries."""
        self.addresses = addresses_of(address)
        self._metadata = call_metadata(api_key)
        self._policy = resume_policy
        self._rng = rng or random.Random()  # noqa: S311  # delays are no secret
        self._clock = clock
        transport = transport_of(
            self.addresses,
            tls=tls,
            credentials=credentials,
            api_key=api_key,
            allow_plaintext_api_key=allow_plaintext_api_key,
        )
        self._peers = tuple(
            _Peer(each, _channel(each, transport, options), transport.security) for each in self.addresses
        )
        # What changes: which address answered last (any thread may say so; each value is a good one).
        self._index = 0
        self._closed = threading.Event()
        # The open streams. Who takes one out says goodbye to it: its own end, or close(). Without a lock: a dict's
        # pop is one step, and the garbage collector may end a generator while this thread is in the middle of one.
        self._open: dict[Continuity, _Open] = {}

    @property
    def address(self) -> str:
        """Where the next call goes."""
        return self._peers[self._index].address

    def generate(
        self, prompt: str | Sequence[int] | Prompt, *, timeout: float, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Streams ``Started PromptPart* Chunk* Finished``. Closing the generator cancels the generation. Raises
        ``BatonError``, and ``ValueError`` as ``BatonClient.generate`` does."""
        return self._events(asked(prompt, timeout, options))

    def chat(
        self,
        messages: Sequence[MessageLike],
        *,
        timeout: float,
        tools: Sequence[ToolLike] = (),
        tool_choice: ToolChoice | str = ToolChoice.AUTO,
        tool_name: str = "",
        template_arguments: dict[str, TemplateArgument] | None = None,
        keep_reasoning_in_text: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """Like ``generate`` for a conversation, oldest message first; see ``BatonClient.chat``."""
        prompt = chat_prompt(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            tool_name=tool_name,
            template_arguments=template_arguments,
            keep_reasoning_in_text=keep_reasoning_in_text,
        )
        return self._events(asked(prompt, timeout, options))

    def complete(
        self, prompt: str | Sequence[int] | Prompt, *, timeout: float, **options: Unpack[GenerateOptions]
    ) -> Answer:
        """``generate``, read to its end."""
        with closing(self.generate(prompt, timeout=timeout, **options)) as stream:
            return collect_sync(stream)

    def complete_chat(self, messages: Sequence[MessageLike], *, timeout: float, **options: Any) -> Answer:
        """``chat``, read to its end. ``options``: the other keywords of ``chat``."""
        with closing(self.chat(messages, timeout=timeout, **options)) as stream:
            return collect_sync(stream)

    def cancel_generation(self, resume_token: str, *, timeout: float, tenant: str = "") -> bool:
        """Ends a resumable generation now, whoever reads it. Returns whether it was running."""
        request = cancel_to_proto(resume_token, tenant)
        # One router does not know what runs at another, and says so with False.
        reply = self._unary(
            lambda peer: peer.generation.CancelGeneration, request, timeout, is_enough=lambda reply: reply.was_running
        )
        return bool(reply.was_running)

    def list_models(self, *, timeout: float) -> tuple[Model, ...]:
        """Every served model."""
        reply = self._unary(lambda peer: peer.models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(model_from_proto(each) for each in reply.models)

    def get_model(self, name: str = "", *, timeout: float) -> Model:
        """One model; without a name the server's only one. Raises ``ModelNotFound``."""
        reply = self._unary(lambda peer: peer.models.GetModel, model_pb2.GetModelRequest(name=name), timeout)
        return model_from_proto(reply.model)

    def count_tokens(self, prompt: str | TextPrompt | ChatPrompt, *, timeout: float, model: str = "") -> TokenCount:
        """Tokens that a prompt would have; for a conversation give ``chat_prompt(messages)``."""
        reply = self._unary(lambda peer: peer.models.CountTokens, count_to_proto(prompt, model), timeout)
        return TokenCount(reply.token_count, reply.max_prompt_token_count)

    def tokenize(
        self,
        prompt: str | TextPrompt | ChatPrompt,
        *,
        timeout: float,
        model: str = "",
        add_special_tokens: bool = True,
    ) -> tuple[int, ...]:
        """The token ids that ``generate`` would use."""
        request = tokenize_to_proto(prompt, model=model, add_special_tokens=add_special_tokens)
        return tuple(self._unary(lambda peer: peer.models.Tokenize, request, timeout).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, timeout: float, model: str = "", keep_special_tokens: bool = False
    ) -> str:
        """Their text."""
        request = detokenize_to_proto(token_ids, model=model, keep_special_tokens=keep_special_tokens)
        return str(self._unary(lambda peer: peer.models.Detokenize, request, timeout).text)

    def _unary(
        self,
        method: Callable[[_Peer], Any],
        request: Any,
        timeout: float,
        *,
        is_enough: Callable[[Any], bool] = lambda _: True,
    ) -> Any:
        """At the address that answered last, then at the others: all of these calls may be repeated. ``is_enough``:
        of a reply, whether the others need not be asked; without one, what could not be reached is raised: it might
        have said otherwise."""
        give_up_at = self._clock() + checked_timeout(timeout)
        first, found, failure = self._index, None, None  # other threads move the index meanwhile
        for place in range(len(self._peers)):
            index = (first + place) % len(self._peers)
            peer = self._peers[index]
            try:
                reply = method(peer)(request, timeout=max(0.001, give_up_at - self._clock()), metadata=self._metadata)
            except grpc.RpcError as error:
                failure = peer.failure(error)
                if failure.status is not StatusName.UNAVAILABLE:
                    raise failure from None
            else:
                if is_enough(reply):
                    self._index = index
                    return reply
                found = reply
        if failure is not None:
            raise failure
        return found

    def _events(self, call: Asked) -> Generator[Event, None, None]:
        give_up_at = self._clock() + call.timeout_s
        state = Continuity(
            address_count=len(self._peers),
            address_index=self._index,
            sample_count=call.sample_count,
            is_resumable=call.is_resumable,
            wants_token_ids=call.wants_token_ids,
            rng=self._rng,
            policy=self._policy,
        )
        stream = self._open[state] = _Open(call.message.tenant)
        try:
            while True:
                peer = self._peers[state.address_index]
                try:
                    yield from self._attached(call, state, stream, give_up_at)
                    return
                except grpc.RpcError as error:
                    failure = peer.failure(error)
                if state.is_over_despite(failure):
                    return
                if self._closed.is_set():
                    raise state.broken(failure)
                next_try = state.after(failure, remaining_s=give_up_at - self._clock())
                if self._closed.wait(next_try.delay_s):
                    raise state.broken(failure)
        finally:
            is_ours = self._open.pop(state, None) is not None
            if is_ours and state.may_still_run:
                self._wait_for(self._goodbye_to(state, stream.tenant))

    def _attached(
        self, call: Asked, state: Continuity, opened: _Open, give_up_at: float
    ) -> Generator[Event, None, None]:
        """One call's events. Raises what gRPC raises, and INTERNAL for a server out of its grammar."""
        peer = self._peers[state.address_index]
        left_s = max(0.001, give_up_at - self._clock())
        if state.is_attaching_again:
            stream = peer.generation.ResumeGenerate(
                resume_to_proto(call.message, state), timeout=left_s, metadata=self._metadata
            )
        else:
            stream = peer.generation.Generate(call.message, timeout=left_s, metadata=self._metadata)
        opened.call = stream
        try:
            for response in stream:
                event = event_from_proto(response)
                if event is None:
                    continue
                if isinstance(event, Started):
                    self._index = state.address_index
                event = state.take(event)
                if event is not None:
                    yield event
            state.check_end()
        finally:
            stream.cancel()  # a finished call ignores it; an abandoned one must not run on

    def _goodbye_to(self, state: Continuity, tenant: str) -> Any:
        """Nobody reads this generation any more: without this it would be computed for all of its grace. None: the
        channel was closed meanwhile."""
        peer = self._peers[state.home_index]
        request = cancel_to_proto(state.resume_token, tenant)
        try:
            return peer.generation.CancelGeneration.future(request, timeout=GOODBYE_S, metadata=self._metadata)
        except ValueError:
            return None

    def _wait_for(self, goodbye: Any) -> None:
        """Its call has its own deadline. One that fails is left to its grace."""
        if goodbye is not None:
            with suppress(grpc.FutureCancelledError):
                goodbye.exception()

    def close(self) -> None:
        """Cancels what is open, for which it waits ``GOODBYE_S`` at most. Idempotent."""
        self._closed.set()
        goodbyes = []
        while self._open:
            try:
                state, stream = self._open.popitem()
            except KeyError:  # the last one ended in its own thread
                break
            if stream.call is not None:
                stream.call.cancel()
            if state.may_still_run:
                goodbyes.append(self._goodbye_to(state, stream.tenant))
        for goodbye in goodbyes:  # BEFORE the channels, which carry them. All began now, and end in their time
            self._wait_for(goodbye)
        for peer in self._peers:
            peer.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BatonClientSync {', '.join(self.addresses)}>"


def _channel(address: str, transport: Transport, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    every = [*options, *transport.options, *channel_options(address)]  # of two of one name gRPC takes the FIRST
    if transport.credentials is None:
        return grpc.insecure_channel(address, options=every)
    return grpc.secure_channel(address, transport.credentials, options=every)

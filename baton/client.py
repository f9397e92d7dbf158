"""Calls Baton from Python: typed events in, typed errors out, a deadline on every call.

    async with BatonClient("127.0.0.1:50051") as client:
        async for chunk in client.generate("Once upon a time", timeout=30):
            print(chunk.text, end="", flush=True)
        answer = await client.complete_chat([("user", "Hello!")], timeout=30)

Reuse a client, it carries many calls at once. Depends on grpcio and protobuf alone. Calls that were refused before
they were admitted are retried by gRPC itself (UNAVAILABLE only, three attempts, with the server's push-back), and
then sent to the next address, if there are several. A generation that has begun to answer is never begun again; with
``resume=True`` it is gone on with after a cut, here or at the next address, unseen by who reads it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

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
from baton.channels import (
    CHANNEL_OPTIONS,
    DEFAULT_ADDRESS,
    SERVICE_CONFIG,
    addresses_of,
    call_metadata,
    channel_options,
)
from baton.errors import BatonError, Reason, StatusName
from baton.event_proto import event_from_proto, model_from_proto
from baton.events import (
    Answer,
    Chunk,
    Event,
    Finished,
    PhaseTimings,
    PromptPart,
    SampleAnswer,
    SampleResult,
    Started,
    TokenLogprob,
    collect,
)
from baton.handshake import Security
from baton.models import Capabilities, Model, TokenCount
from baton.prompts import MessageLike, TemplateArgument, ToolLike, chat_prompt, prompt_of
from baton.request import ChatPrompt, Prompt, TextPrompt, ToolChoice
from baton.request_proto import request_to_proto
from baton.resuming import DEFAULT_POLICY, Continuity, ResumePolicy
from baton.status import from_rpc_error
from baton.stream_grammar import StreamGrammar
from baton.tls import Tls, Transport, transport_of
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = [
    "CHANNEL_OPTIONS",
    "DEFAULT_ADDRESS",
    "SERVICE_CONFIG",
    "Answer",
    "BatonClient",
    "Capabilities",
    "Chunk",
    "Event",
    "Finished",
    "GenerateOptions",
    "Model",
    "PhaseTimings",
    "PromptPart",
    "ResumePolicy",
    "SampleAnswer",
    "SampleResult",
    "Started",
    "StreamGrammar",
    "Tls",
    "TokenCount",
    "TokenLogprob",
    "channel_options",
    "chat_prompt",
    "collect",
    "event_from_proto",
    "prompt_of",
    "request_to_proto",
]

GOODBYE_S = 2.0
"""How long the cancel of a resumable generation that its reader left may take, and all of them when the client is
closed. After that its grace ends it."""


class _Peer:
    """One address: its channel, which connects at the first call, and what is called there."""

    def __init__(self, address: str, channel: grpc.aio.Channel, security: Security | None) -> None:
        self.address = address
        self.security = security
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        self.models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        # The health protocol by hand: two one-field messages are not worth a dependency.
        self.health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")

    def failure(self, error: grpc.RpcError) -> BatonError:
        """What a call that failed says."""
        return from_rpc_error(error, peer=self.address, security=self.security)


@dataclass(slots=True)
class _Open:
    """A stream that somebody reads, or left without our knowing yet."""

    tenant: str
    call: Any = None
    """The present attachment's."""


class BatonClient:
    """A client of one Baton. Use as an async context manager, or ``await close()``."""

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
    ) -> None:
        """``address``: host:port, or several of routers of one cluster: the first that answers is used, the others
        are where calls go that it refuses or loses. ``tls``: how to speak TLS, or True: as ``Tls()`` says;
        ``credentials``: gRPC's own instead. ``api_key``: sent with every call, and without TLS to this machine alone,
        unless ``allow_plaintext_api_key``. ``options``: gRPC channel options over Baton's own. ``rng``: draws the
        delays before tries to resume. Must be made inside the event loop that uses it. Connects at the first call.

        Raises ``ValueError`` for what contradicts itself, for a key that others could read on its way, and
        (``TlsFilesError``) for files of TLS that cannot be used."""
        self.addresses = addresses_of(address)
        self._metadata = call_metadata(api_key)
        self._policy = resume_policy
        self._rng = rng or random.Random()  # noqa: S311  # delays are no secret
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
        # What changes: which address answered last, the open streams, and cancels under way. Who takes a stream out
        # of ``_open`` says goodbye to it: its own end, or close(), which may come first. The generator of a loop that
        # was left by ``break`` is closed by the event loop a moment later.
        self._index = 0
        self._closing = asyncio.Event()
        self._open: dict[Continuity, _Open] = {}
        self._goodbyes: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where the next call goes."""
        return self._peers[self._index].address

    def generate(
        self, prompt: str | Sequence[int] | Prompt, *, timeout: float, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """Streams ``Started PromptPart* Chunk* Finished``. ``prompt``: text, or token ids. ``timeout``: seconds for
        the whole call, resumes included; the server stops all work when it passes. Leaving the loop, closing the
        generator or cancelling the task cancels the generation and frees what it held.

        Raises ``BatonError``: its class and ``is_retryable`` say what to do, its ``reason`` why, ``violations`` which
        fields. Raises ``ValueError`` for a timeout that is not positive and finite.
        """
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
    ) -> AsyncGenerator[Event, None]:
        """Like ``generate`` for a conversation, oldest message first: ``[("user", "Hello!")]``; see
        ``baton.prompts`` for what is a message and a tool."""
        prompt = chat_prompt(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            tool_name=tool_name,
            template_arguments=template_arguments,
            keep_reasoning_in_text=keep_reasoning_in_text,
        )
        return self._events(asked(prompt, timeout, options))

    async def complete(
        self, prompt: str | Sequence[int] | Prompt, *, timeout: float, **options: Unpack[GenerateOptions]
    ) -> Answer:
        """``generate``, read to its end."""
        async with aclosing(self.generate(prompt, timeout=timeout, **options)) as stream:
            return await collect(stream)

    async def complete_chat(self, messages: Sequence[MessageLike], *, timeout: float, **options: Any) -> Answer:
        """``chat``, read to its end. ``options``: the other keywords of ``chat``."""
        async with aclosing(self.chat(messages, timeout=timeout, **options)) as stream:
            return await collect(stream)

    async def cancel_generation(self, resume_token: str, *, timeout: float, tenant: str = "") -> bool:
        """Ends a resumable generation now, whoever reads it. Returns whether it was running."""
        request = cancel_to_proto(resume_token, tenant)
        # One router does not know what runs at another, and says so with False.
        reply = await self._unary(
            lambda peer: peer.generation.CancelGeneration, request, timeout, is_enough=lambda reply: reply.was_running
        )
        return bool(reply.was_running)

    async def list_models(self, *, timeout: float) -> tuple[Model, ...]:
        """Every served model."""
        reply = await self._unary(lambda peer: peer.models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(model_from_proto(each) for each in reply.models)

    async def get_model(self, name: str = "", *, timeout: float) -> Model:
        """One model; without a name the server's only one. Raises ``ModelNotFound``."""
        request = model_pb2.GetModelRequest(name=name)
        reply = await self._unary(lambda peer: peer.models.GetModel, request, timeout)
        return model_from_proto(reply.model)

    async def count_tokens(
        self, prompt: str | TextPrompt | ChatPrompt, *, timeout: float, model: str = ""
    ) -> TokenCount:
        """Tokens that a prompt would have; for a conversation give ``chat_prompt(messages)``."""
        request = count_to_proto(prompt, model)
        reply = await self._unary(lambda peer: peer.models.CountTokens, request, timeout)
        return TokenCount(reply.token_count, reply.max_prompt_token_count)

    async def tokenize(
        self,
        prompt: str | TextPrompt | ChatPrompt,
        *,
        timeout: float,
        model: str = "",
        add_special_tokens: bool = True,
    ) -> tuple[int, ...]:
        """The token ids that ``generate`` would use."""
        request = tokenize_to_proto(prompt, model=model, add_special_tokens=add_special_tokens)
        reply = await self._unary(lambda peer: peer.models.Tokenize, request, timeout)
        return tuple(reply.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, timeout: float, model: str = "", keep_special_tokens: bool = False
    ) -> str:
        """Their text."""
        request = detokenize_to_proto(token_ids, model=model, keep_special_tokens=keep_special_tokens)
        reply = await self._unary(lambda peer: peer.models.Detokenize, request, timeout)
        return str(reply.text)

    async def _unary(
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
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + checked_timeout(timeout)
        first, found, failure = self._index, None, None  # other calls move the index meanwhile
        for place in range(len(self._peers)):
            index = (first + place) % len(self._peers)
            peer = self._peers[index]
            try:
                reply = await method(peer)(
                    request, timeout=max(0.001, give_up_at - loop.time()), metadata=self._metadata
                )
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

    async def _events(self, call: Asked) -> AsyncGenerator[Event, None]:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + call.timeout_s
        state = Continuity(
            address_count=len(self._peers),
            address_index=self._index,
            sample_count=call.sample_count,
            is_resumable=call.is_resumable,
            wants_token_ids=call.wants_token_ids,
            rng=self._rng,
            policy=self._policy,
        )
        has_left = False
        stream = self._open[state] = _Open(call.message.tenant)
        try:
            while True:
                try:
                    async with aclosing(self._attached(call, state, stream, give_up_at)) as events:
                        async for event in events:
                            yield event
                    return
                except _Cut as cut:
                    # From None: what broke the transport is in the error; its own text says nothing more.
                    failure = cut.error
                if state.is_over_despite(failure):
                    return
                if self._closing.is_set():
                    raise state.broken(failure)
                next_try = state.after(failure, remaining_s=give_up_at - loop.time())
                if await self._is_closed_within(next_try.delay_s):
                    raise state.broken(failure)
        except GeneratorExit:
            has_left = True
            raise
        finally:
            is_ours = self._open.pop(state, None) is not None
            if is_ours and state.may_still_run:
                goodbye = self._say_goodbye(state, stream.tenant)
                if has_left:  # who cancels or fails must not wait; close() does
                    await asyncio.shield(goodbye)

    async def _is_closed_within(self, delay_s: float) -> bool:
        try:
            async with asyncio.timeout(delay_s):
                await self._closing.wait()
        except TimeoutError:
            return False
        return True

    async def _attached(
        self, call: Asked, state: Continuity, opened: _Open, give_up_at: float
    ) -> AsyncGenerator[Event, None]:
        """One call's events. Raises ``_Cut`` for a call that failed, and INTERNAL for a server out of its grammar."""
        peer = self._peers[state.address_index]
        left_s = max(0.001, give_up_at - asyncio.get_running_loop().time())
        if state.is_attaching_again:
            stream = peer.generation.ResumeGenerate(
                resume_to_proto(call.message, state), timeout=left_s, metadata=self._metadata
            )
        else:
            stream = peer.generation.Generate(call.message, timeout=left_s, metadata=self._metadata)
        opened.call = stream
        try:
            async for response in stream:
                event = event_from_proto(response)
                if event is None:
                    continue
                if isinstance(event, Started):
                    self._index = state.address_index
                event = state.take(event)
                if event is not None:
                    yield event
            state.check_end()
        except grpc.RpcError as error:
            raise _Cut(peer.failure(error)) from None
        except asyncio.CancelledError:
            # grpc.aio raises this for a call that the *other* side cancelled, too. Nobody cancelled this task then.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _Cut(_ended_by_peer(peer.address)) from None
        finally:
            stream.cancel()  # a finished call ignores it; an abandoned one must not run on

    def _say_goodbye(self, state: Continuity, tenant: str) -> asyncio.Task[None]:
        """Nobody reads this generation any more: without this it would be computed for all of its grace."""
        peer = self._peers[state.home_index]
        request = cancel_to_proto(state.resume_token, tenant)

        async def cancel() -> None:
            try:
                await peer.generation.CancelGeneration(request, timeout=GOODBYE_S, metadata=self._metadata)
            except grpc.RpcError:
                return  # it cannot be reached; its grace ends it

        task = asyncio.get_running_loop().create_task(cancel(), name="baton-client cancels a generation")
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)
        return task

    async def wait_until_serving(self, *, timeout: float) -> None:
        """Returns once a server could place a request. Raises UNAVAILABLE when ``timeout`` seconds pass first."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout
        while (problem := await self.serving_problem(timeout=max(0.05, give_up_at - loop.time()))) is not None:
            if loop.time() >= give_up_at:
                where = ", ".join(self.addresses)
                raise BatonError(
                    Reason.NO_WORKER,
                    StatusName.UNAVAILABLE,
                    f"{where} was not serving within {timeout:g} s: {problem.message}",
                    metadata=problem.metadata,
                ) from problem
            await asyncio.sleep(0.1)

    async def is_serving(self, *, timeout: float) -> bool:
        """Whether a server could place a request now; False also when none can be reached."""
        return await self.serving_problem(timeout=timeout) is None

    async def serving_problem(self, *, timeout: float) -> BatonError | None:
        """Why no server could place a request now, as the first address has it; None: one could."""
        problems = await asyncio.gather(*(_serving_problem(peer, timeout) for peer in self._peers))
        return None if None in problems else problems[0]

    async def close(self) -> None:
        """Cancels what is open, for which it waits ``GOODBYE_S`` at most. Idempotent."""
        self._closing.set()
        while self._open:
            state, stream = self._open.popitem()
            if stream.call is not None:
                stream.call.cancel()
            if state.may_still_run:
                self._say_goodbye(state, stream.tenant)
        if self._goodbyes:  # BEFORE the channels, which carry them
            await asyncio.wait(self._goodbyes, timeout=GOODBYE_S)
        await asyncio.gather(*(peer.channel.close() for peer in self._peers))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<BatonClient {', '.join(self.addresses)}>"


class _Cut(Exception):
    """A call failed; whether that is the end is another's to say."""

    def __init__(self, error: BatonError) -> None:
        super().__init__(error.reason.value)
        self.error = error


def _ended_by_peer(address: str) -> BatonError:
    return BatonError(
        Reason.ENGINE_FAILED,
        StatusName.UNAVAILABLE,
        f"lost the connection to the server {address}: the call was cancelled from outside",
        metadata={"worker_id": address, "transport": "CANCELLED"},
    )


def _channel(address: str, transport: Transport, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
    every = [*options, *transport.options, *channel_options(address)]  # of two of one name gRPC takes the FIRST
    if transport.credentials is None:
        return grpc.aio.insecure_channel(address, options=every)
    return grpc.aio.secure_channel(address, transport.credentials, options=every)


async def _serving_problem(peer: _Peer, timeout: float) -> BatonError | None:
    try:
        reply: bytes = await peer.health(b"", timeout=timeout)
    except grpc.RpcError as error:
        return peer.failure(error)
    if reply == b"\x08\x01":  # field 1 (status) = 1 (SERVING)
        return None
    return BatonError(Reason.NO_WORKER, StatusName.UNAVAILABLE, f"{peer.address} has no worker to place requests on")

"""A caller of the raw stub who is cut off and comes back: keeps what a caller must keep, and checks the grammar.

For tests and for the soak. It trusts nothing: a gap, a repeat, a second Started or anything after Finished is an
``AssertionError``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from baton.errors import BatonError, Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc

_AGAIN = frozenset(
    {
        *(Reason.DRAINING, Reason.NO_WORKER, Reason.QUEUE_FULL, Reason.ATTEMPTS_EXHAUSTED),
        *(Reason.STALLED, Reason.TOO_MANY_RESUMABLE),
    }
)
_CUT = frozenset(
    {
        *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED),
        *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN),
    }
)
"""What gRPC makes of a connection that was reset in the middle of a message, depending on where."""


def channel_to(address: str) -> grpc.aio.Channel:
    """Its own connection, made again soon after a cut; no retry but the caller's own."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 250),
        ],
    )


@dataclass
class Heard:
    """What a caller keeps of one generation with one sample."""

    request: pb.GenerateRequest
    token: str = ""
    generation_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    next_index: int = 0
    has_tail: bool = False
    finished: pb.Finished | None = None
    calls: Counter[str] = field(default_factory=Counter)
    """Calls by kind."""
    ends: Counter[str] = field(default_factory=Counter)
    """How calls ended."""
    resumes: Counter[str] = field(default_factory=Counter)
    """What a ResumeGenerate became: attached to the generation that was there, or continued as another one."""

    def take(self, response: Any) -> None:
        assert self.finished is None, "an event after the last"
        match response.WhichOneof("event"):
            case "started":
                self.token = response.started.resume_token
                if self.generation_ids:
                    is_same = response.started.generation_id == self.generation_ids[-1]
                    self.resumes["attached" if is_same else "continued"] += 1
                self.generation_ids.append(response.started.generation_id)
            case "chunk":
                chunk = response.chunk
                assert not self.has_tail, "a chunk after the last"
                assert chunk.first_token_index == self.next_index, (
                    f"a gap or a repeat: {chunk.first_token_index} came, {self.next_index} was next"
                )
                assert len(chunk.token_ids) == chunk.token_count
                self.token_ids += chunk.token_ids
                self.text += chunk.text
                self.has_tail = chunk.token_count == 0
                self.next_index += chunk.token_count or 1
            case "finished":
                self.finished = response.finished

    def resume_request(self, *, has_continuation: bool = True) -> pb.ResumeGenerateRequest:
        message = pb.ResumeGenerateRequest(
            resume_token=self.token, next_token_index=self.next_index, tenant=self.request.tenant
        )
        if has_continuation:
            message.continuation.request.CopyFrom(self.request)
            message.continuation.samples.add(ids=self.token_ids)
        return message


class ResumingCaller:
    """Asks ``channels`` in turn: the next one after each cut."""

    def __init__(
        self,
        channels: Sequence[grpc.aio.Channel],
        *,
        timeout_s: float = 60.0,
        pause_s: float = 0.05,
        max_call_count: int = 200,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._stubs = [pb_grpc.GenerationServiceStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._max_call_count = max_call_count
        self._metadata = metadata

    async def ask(
        self,
        request: pb.GenerateRequest,
        *,
        first: int = 0,
        on_chunk: Callable[[Heard], None] = lambda heard: None,
        heard: Heard | None = None,
    ) -> Heard:
        """The whole answer, however often it is cut. ``first``: whom to ask first. Raises the ``BatonError`` that a
        resume cannot help."""
        heard = heard or Heard(request)
        for number in range(first, first + self._max_call_count):
            stub = self._stubs[number % len(self._stubs)]
            try:
                await self._once(stub, heard, on_chunk)
            except grpc.aio.AioRpcError as error:
                if not _may_resume(error):
                    raise from_rpc_error(error) from error
                heard.ends[_word(error)] += 1
            if heard.finished is not None:
                heard.ends["finished"] += 1
                return heard
            await asyncio.sleep(self._pause_s)
        raise AssertionError(f"not finished after {self._max_call_count} calls: {heard.ends}")

    async def _once(self, stub: Any, heard: Heard, on_chunk: Callable[[Heard], None]) -> None:
        options: dict[str, Any] = {"timeout": self._timeout_s, "metadata": self._metadata}
        if heard.token:
            heard.calls["ResumeGenerate"] += 1
            call = stub.ResumeGenerate(heard.resume_request(), **options)
        else:
            heard.calls["Generate"] += 1
            call = stub.Generate(heard.request, **options)
        try:
            async for response in call:
                heard.take(response)
                on_chunk(heard)
        finally:
            call.cancel()


def _may_resume(error: grpc.aio.AioRpcError) -> bool:
    told = _told(error)
    return error.code() in _CUT if told is None else told.reason in _AGAIN


def _told(error: grpc.aio.AioRpcError) -> BatonError | None:
    """What the server said, if it was the server."""
    has_details = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    return from_rpc_error(error) if has_details else None


def _word(error: grpc.aio.AioRpcError) -> str:
    told = _told(error)
    return f"cut ({error.code().name})" if told is None else told.reason.value

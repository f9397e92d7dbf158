"""A Baton that says what it was told to, for the tests of whoever calls one.

    def test_the_reply_is_shown(fake_baton):
        fake_baton.will_answer("Hello there!")
        show_reply(fake_baton.address)
        assert fake_baton.requests[0].stop.max_output_token_count == 100

A real gRPC server on a free port of this machine, whose threads serve coroutine tests and others alike. It checks
requests as a server does, echoes what it has no answer for, waits only where it was told to, and does everything in
the order of its script: answers are taken by the next generations, faults by the next calls of Generate and
ResumeGenerate, or of the method that ``will_refuse`` names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc

from baton.errors import BatonError, Reason, StatusName, queue_full
from baton.request import FinishReason, GenerateRequest, ToolCall
from baton.testing.fake_script import FakeCall, Fault, Scripted, words
from baton.testing.fake_service import METHODS, FakeState, attach

MAX_CALL_COUNT = 64
"""Calls that are served at once; each has a thread while it runs."""

_STATUSES = {
    Reason.INVALID_REQUEST: StatusName.INVALID_ARGUMENT,
    Reason.PROMPT_TOO_LONG: StatusName.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: StatusName.NOT_FOUND,
    Reason.QUEUE_FULL: StatusName.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_RESUMABLE: StatusName.RESOURCE_EXHAUSTED,
    Reason.NO_ROOM: StatusName.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_EXCEEDED: StatusName.DEADLINE_EXCEEDED,
    Reason.TICKET_REFUSED: StatusName.FAILED_PRECONDITION,
    Reason.UNAUTHENTICATED: StatusName.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: StatusName.PERMISSION_DENIED,
    Reason.RESUME_UNKNOWN: StatusName.NOT_FOUND,
    Reason.RESUME_DENIED: StatusName.PERMISSION_DENIED,
    Reason.RESUME_TOO_LATE: StatusName.OUT_OF_RANGE,
    Reason.ATTACHED_ELSEWHERE: StatusName.ABORTED,
    Reason.READER_TOO_SLOW: StatusName.ABORTED,
    Reason.INTERNAL: StatusName.INTERNAL,
}
"""Of the others the status is UNAVAILABLE before the first token and ABORTED after it."""


class FakeBaton:
    """Use as a context manager, also ``async with``; or ``start`` and ``stop``."""

    def __init__(
        self, *, model: str = "fake", max_context_token_count: int = 8192, api_key: str | None = None
    ) -> None:
        """``api_key``: what callers must send; None: nothing. One token is one character; its id, the code point."""
        self._state = FakeState(model, max_context_token_count, api_key)
        self._server: grpc.Server | None = None
        self._port = 0

    # Server

    @property
    def address(self) -> str:
        """host:port; the same again after ``stop`` and ``start``."""
        if not self._port:
            raise RuntimeError("the fake was not started: use it as a context manager, or call start()")
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens. Raises RuntimeError where the port of an earlier start is taken meanwhile."""
        server = grpc.server(
            ThreadPoolExecutor(max_workers=MAX_CALL_COUNT, thread_name_prefix="fake-baton"),
            options=[("grpc.so_reuseport", 0)],  # two fakes must not share a port
        )
        attach(self._state, server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Cuts every connection and forgets every generation, as a killed router does. Script and records stay, also
        what each generation was told to answer: a continuation goes on with that. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(grace=0).wait()
        with self._state.changed:
            self._state.generations.clear()

    def set_serving(self, is_serving: bool) -> None:
        """Not serving: health says so, and new calls are refused with DRAINING."""
        self._state.is_serving = is_serving

    # Script

    def will_answer(
        self,
        *chunks: str,
        samples: Sequence[str | Sequence[str]] = (),
        reasoning: str = "",
        tool_calls: Sequence[ToolCall] = (),
        reason: FinishReason | None = None,
        cached_prompt_token_count: int = 0,
        delay_s: float = 0.0,
        chunk_delay_s: float = 0.0,
    ) -> None:
        """The next generation's answer: one text comes in words, several come as they are. ``samples``: one text, or
        list of chunks, of each. ``reasoning`` goes before it, ``tool_calls`` after it. ``reason``: if not what
        follows. ``delay_s`` passes before the first event, ``chunk_delay_s`` before each chunk."""
        given: Sequence[str | Sequence[str]] = samples or ((chunks[0] if len(chunks) == 1 else chunks),)
        texts = tuple(words(each) if isinstance(each, str) else tuple(each) for each in given)
        script = Scripted(
            texts, reasoning, tuple(tool_calls), reason, cached_prompt_token_count, delay_s, chunk_delay_s
        )
        with self._state.changed:
            self._state.answers.append(script)

    def will_refuse(self, error: BatonError | Reason | None = None, *, count: int = 1, method: str = "") -> None:
        """The next ``count`` calls, before they are admitted. Default: QUEUE_FULL, and calls of Generate and
        ResumeGenerate; ``method`` names one of the API, such as "CancelGeneration" or "CountTokens". Mind that gRPC
        itself sends a call that was refused with UNAVAILABLE up to three times: each time is a call. Raises
        ValueError for a method that is none."""
        if method and method not in METHODS:
            raise ValueError(f"method is {method!r}; must be one of {', '.join(METHODS)}")
        refusal = queue_full(1, 1, 0.01) if error is None else _error(error, 0)
        self._add(*[Fault(None, refusal, method=method)] * count)

    def will_fail(self, error: BatonError | Reason, *, after_tokens: int = 0) -> None:
        """The next stream, after so many tokens; with 0 after it was admitted."""
        self._add(Fault(after_tokens, _error(error, after_tokens)))

    def will_cut(self, *, after_tokens: int = 0) -> None:
        """The next stream ends as a lost connection ends it, after so many tokens of its own; a resumable generation
        can be attached to again. (Other calls on the connection go on: ``stop`` cuts them all.)"""
        self._add(Fault(after_tokens, None))

    def will_stall(self, *, after_tokens: int = 0) -> None:
        """Of the next stream nothing comes after so many tokens, until its caller leaves or its deadline passes."""
        self._add(Fault(after_tokens, None, is_stall=True))

    def will_forget(self) -> None:
        """Every generation, as a restarted router does: to go on takes a continuation, which gets the rest of what
        the generation was told to answer."""
        with self._state.changed:
            self._state.generations.clear()

    # What was asked

    @property
    def calls(self) -> tuple[FakeCall, ...]:
        """Every call so far, refused ones included, in the order in which they came."""
        with self._state.changed:
            return tuple(self._state.calls)

    @property
    def requests(self) -> tuple[GenerateRequest, ...]:
        """Those of ``Generate``."""
        return tuple(call.request for call in self.calls_of("Generate") if call.request is not None)

    def calls_of(self, method: str) -> tuple[FakeCall, ...]:
        """Those of one method, by its name in the API."""
        return tuple(call for call in self.calls if call.method == method)

    def wait_until(self, is_so: Callable[[FakeBaton], bool], *, timeout_s: float = 5.0) -> None:
        """Blocks this thread until it is so, asked at every call and chunk. Raises TimeoutError."""
        with self._state.changed:
            if not self._state.changed.wait_for(lambda: is_so(self), timeout_s):
                raise TimeoutError(f"not within {timeout_s:g} s; calls so far: {[c.method for c in self.calls]}")

    def _add(self, *faults: Fault) -> None:
        with self._state.changed:
            self._state.faults.extend(faults)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def __repr__(self) -> str:
        return f"<FakeBaton {self._state.model} [{len(self._state.calls)} calls]>"


def _error(error: BatonError | Reason, after_tokens: int) -> BatonError:
    if isinstance(error, BatonError):
        return error
    status = _STATUSES.get(error, StatusName.ABORTED if after_tokens else StatusName.UNAVAILABLE)
    metadata = {"emitted_token_count": str(after_tokens)} if after_tokens else {}
    return BatonError(error, status, f"{error.value}, as the test says", metadata=metadata)

"""What is fuzzed: a whole router in front of simulated engines, called in its own process or over its sockets.

In process a case takes the way of a call without the wire: bytes, the method's deserialiser, its handler, its
serialiser. That is the server's own registration, taken down as it attaches its services; nothing is left out but
HTTP/2. A context stands where gRPC's would; it fails and blocks as that does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.rpc import error_details_pb2, status_pb2

from baton.errors import BatonError
from baton.request import Role
from bench.fuzz_mutations import METHODS, TOKEN_MARK, Case
from bench.virtual_cluster import ProcessClient, WorkerProcess
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.sim import SimConfig, SimEngine, SimNetwork, TokenRule
from router.config import RouterConfig
from router.server import RouterEndpoint, RouterServer
from router.tiny_model import END_ID, tiny_tokenizer, write_tiny_model

SECRET = bytes(range(32))
CONTEXT = 160
DEFAULT_DEADLINE_S = 20.0
DETAILS_KEY = "grpc-status-details-bin"
_TEMPLATE = Path(__file__).resolve().parent.parent / "deploy" / "templates" / "chatml-tools.jinja"
_COST = CostModel(
    prefill=PrefillCost(base_s=2e-4, per_token_s=0.0, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=2e-4, per_context_token_s=0.0, per_sequence_s=0.0),
)


@dataclass(slots=True)
class Ending:
    """How a case ended. ``status`` "CANCELLED": the caller left."""

    status: str = "OK"
    reason: str = ""
    text: str = field(default="", repr=False)
    details: bytes = field(default=b"", repr=False)
    violation_count: int = 0
    messages: list[Any] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    longest_turn_s: float = 0.0
    """CPU time of the handler's longest stretch without a rest; 0 over sockets, where nobody sees it."""
    bug: str = ""
    """What the handler raised that is no end of a call."""


class Context:
    """Stands where ``grpc.aio.ServicerContext`` would, for one call."""

    def __init__(self, case: Case, serialize: Callable[[Any], bytes], parse: Callable[[bytes], Any]) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._deadline_at = None if case.timeout_s is None else loop.time() + case.timeout_s
        self._case = case
        self._serialize = serialize
        self._parse = parse
        self._is_done = False
        self.ending = Ending()
        self.leave: Callable[[], object] = lambda: None
        self._callbacks: list[Callable[[Any], None]] = []

    def time_remaining(self) -> float | None:
        return None if self._deadline_at is None else max(0.0, self._deadline_at - self._loop.time())

    async def write(self, message: Any) -> None:
        if self._is_done:
            raise grpc.aio.InternalError("the call has ended")
        self.ending.messages.append(self._parse(self._serialize(message)))
        if len(self.ending.messages) == self._case.cancel_after_message_count:
            self.leave()
        if not self._case.does_read and len(self.ending.messages) > 1:
            await self._loop.create_future()  # as flow control does: until the call is over
        await asyncio.sleep(0)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        if self._is_done:
            raise grpc.aio.InternalError("the call has ended")
        self._is_done = True
        self.ending.status, self.ending.text = code.name, details
        _read_details(self.ending, dict(trailing_metadata).get(DETAILS_KEY))
        raise grpc.aio.AbortError("Locally aborted.")

    def done(self) -> bool:
        return self._is_done

    def cancelled(self) -> bool:
        return False  # so says gRPC's own after a client's cancel

    def cancel(self) -> bool:
        self.leave()
        return True

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def send_initial_metadata(self, metadata: Any) -> None:
        await asyncio.sleep(0)

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    def end(self) -> None:
        self._is_done = True
        for callback in self._callbacks:
            callback(self)


class _Timed:
    """Awaits a coroutine and takes the CPU time of each of its turns."""

    def __init__(self, work: Coroutine[Any, Any, Any], ending: Ending) -> None:
        self._work = work
        self._ending = ending

    def __await__(self) -> Generator[Any, Any, Any]:
        work, ending = self._work, self._ending
        send: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            began_at = time.thread_time()
            try:
                waited_for = send(value)
            except StopIteration as end:
                return end.value
            finally:
                ending.longest_turn_s = max(ending.longest_turn_s, time.thread_time() - began_at)
            try:
                value = yield waited_for
                send = work.send
            except BaseException as error:  # a cancellation: the work's to handle
                value, send = error, work.throw


class _NotedRouter(RouterServer):
    """Takes down what is attached to its servers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.handlers: dict[str, Any] = {}

    def _server(self, *options: Any) -> grpc.aio.Server:
        server: Any = super()._server(*options)
        add = server.add_generic_rpc_handlers

        def noted(handlers: Any) -> None:
            for each in handlers:
                for path in METHODS:
                    found = each.service(_Asked(path))
                    if found is not None:
                        self.handlers[path] = found
            add(handlers)

        server.add_generic_rpc_handlers = noted
        return server  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Asked:
    method: str
    invocation_metadata: tuple[Any, ...] = ()


class FuzzTarget:
    """One router and its workers."""

    def __init__(self, router: _NotedRouter, workers: list[WorkerProcess], endpoint: RouterEndpoint) -> None:
        self.router = router
        self.workers = workers
        self.endpoint = endpoint
        missing = set(METHODS) - set(router.handlers)
        if missing:
            raise RuntimeError(f"not served: {sorted(missing)}")

    async def run(self, case: Case) -> Ending:
        """The case in this process. Never raises but what is a bug of the harness."""
        data = case.data
        if case.prelude is not None:
            prelude = replace(
                case,
                path="/baton.v1.GenerationService/Generate",
                data=case.prelude,
                timeout_s=10.0,
                cancel_after_s=None,
                cancel_after_message_count=3,
                does_read=True,
                prelude=None,
            )
            data = with_token(case, token_of(await self._call(prelude, prelude.data)))
        return await self._call(case, data)

    async def _call(self, case: Case, data: bytes) -> Ending:
        if len(data) > self.router.config.max_message_bytes:
            return Ending("RESOURCE_EXHAUSTED", "by gRPC")  # as it does before anybody sees the message
        handler = self.router.handlers[case.path]
        parse = message_factory.GetMessageClass(METHODS[case.path].output_type).FromString
        context = Context(case, handler.response_serializer, parse)
        ending = context.ending
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        task = asyncio.create_task(self._serve(handler, data, context))
        has_left = False

        def leave() -> None:
            nonlocal has_left
            has_left = True
            task.cancel()

        context.leave = leave
        timers = []
        if case.cancel_after_s is not None:
            timers.append(loop.call_later(case.cancel_after_s, leave))
        if case.timeout_s is not None:
            timers.append(loop.call_later(case.timeout_s, task.cancel))  # as gRPC does at the caller's deadline
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
            ending.status, ending.reason = ("CANCELLED" if has_left else "DEADLINE_EXCEEDED"), "by gRPC"
        except Exception as error:
            ending.status, ending.bug = "UNKNOWN", f"{type(error).__name__} left the handler"
        finally:
            for timer in timers:
                timer.cancel()
            context.end()
        ending.seconds = loop.time() - began_at
        return ending

    async def _serve(self, handler: Any, data: bytes, context: Context) -> None:
        began_at = time.thread_time()
        request = handler.request_deserializer(data)
        context.ending.longest_turn_s = time.thread_time() - began_at
        serve: Callable[[Any, Any], Coroutine[Any, Any, Any]] = handler.unary_stream or handler.unary_unary
        with suppress(grpc.aio.AbortError):
            answer = await _Timed(serve(request, context), context.ending)
            if handler.unary_stream is None:
                await context.write(answer)

    async def call_by_wire(self, channel: grpc.aio.Channel, case: Case) -> Ending:
        """The case over a socket."""
        data = case.data
        if case.prelude is not None:
            prelude = replace(case, path="/baton.v1.GenerationService/Generate", timeout_s=10.0, cancel_after_s=None,
                              cancel_after_message_count=3, does_read=True)  # fmt: skip
            data = with_token(case, token_of(await self._wire(channel, prelude, case.prelude)))
        return await self._wire(channel, case, data)

    async def _wire(self, channel: grpc.aio.Channel, case: Case, data: bytes) -> Ending:
        method = METHODS[case.path]
        parse = message_factory.GetMessageClass(method.output_type).FromString
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        ending = Ending()
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        call: Any = make(case.path, request_serializer=bytes, response_deserializer=parse)(
            data, timeout=case.timeout_s
        )
        timer = None if case.cancel_after_s is None else loop.call_later(case.cancel_after_s, call.cancel)
        try:
            if method.server_streaming:
                async for message in call:
                    ending.messages.append(message)
                    if len(ending.messages) == case.cancel_after_message_count:
                        call.cancel()
                    if not case.does_read:
                        break
                if not case.does_read and not call.done():
                    await asyncio.sleep(case.timeout_s or 0.0)
                    call.cancel()
            else:
                ending.messages.append(await call)
        except grpc.aio.AioRpcError as error:
            ending.status, ending.text = error.code().name, error.details() or ""
            _read_details(ending, dict(error.trailing_metadata() or ()).get(DETAILS_KEY))
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            ending.status = "CANCELLED"
        finally:
            if timer is not None:
                timer.cancel()
        if not case.does_read and ending.status == "OK":
            ending.status = "CANCELLED"
        is_too_large = ending.status == "RESOURCE_EXHAUSTED" and "larger than max" in ending.text
        if not ending.reason and (ending.status in ("CANCELLED", "DEADLINE_EXCEEDED") or is_too_large):
            ending.reason = "by gRPC"
        ending.seconds = loop.time() - began_at
        return ending

    def books(self) -> dict[str, int]:
        """What must be nothing at rest."""
        found = {
            "calls": self.router.generation.call_count,
            "queued": self.router.relay.queued_count,
            "placed": sum(view.assigned.request_count for view in self.router.roster.view().workers),
        }
        for worker in self.workers:
            for name, count in worker.books().items():
                found[f"{worker.worker_id}: {name}"] = count
        return {name: count for name, count in found.items() if count}

    async def at_rest(self, limit_s: float) -> dict[str, int]:
        """Waits until the books are empty. Returns what is in them after ``limit_s``, nothing if all is well."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit_s
        while (left := self.books()) and loop.time() < until:  # noqa: ASYNC110  # books have no bell
            await asyncio.sleep(0.02)
        return left

    async def engines_alive(self) -> bool:
        try:
            for worker in self.workers:
                await worker.engine.check_health()
        except BatonError:
            return False
        return True


def token_of(ending: Ending) -> str:
    for message in ending.messages:
        if message.WhichOneof("event") == "started":
            return str(message.started.resume_token)
    return ""


def with_token(case: Case, token: str) -> bytes:
    if case.spoils_token and token:
        at = case.number % len(token)
        token = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
    if not case.is_parsed:
        return case.data.replace(TOKEN_MARK.encode(), token.encode())
    message = message_factory.GetMessageClass(METHODS[case.path].input_type).FromString(case.data)
    if message.resume_token == TOKEN_MARK:  # type: ignore[attr-defined]
        message.resume_token = token  # type: ignore[attr-defined]
    return bytes(message.SerializeToString())


def _read_details(ending: Ending, data: str | bytes | None) -> None:
    if not isinstance(data, bytes):
        return
    ending.details = data
    for each in status_pb2.Status.FromString(data).details:
        if each.type_url.endswith("ErrorInfo"):
            info = error_details_pb2.ErrorInfo.FromString(each.value)
            ending.reason = info.reason if info.domain == "baton" else f"of {info.domain!r}"
        elif each.type_url.endswith("BadRequest"):
            ending.violation_count = len(error_details_pb2.BadRequest.FromString(each.value).field_violations)


@asynccontextmanager
async def fuzz_target(directory: Path, **config: Any) -> AsyncIterator[FuzzTarget]:
    """A prefill and two decode workers behind one router; ``config``: changes to the router's."""
    write_tiny_model(directory, max_context_token_count=CONTEXT)
    tokenizer = tiny_tokenizer()
    sim = SimConfig(
        engine_id="set-later",
        model_name="tiny",
        block_token_count=16,
        block_count=2048,
        max_context_token_count=CONTEXT,
        enable_prefix_caching=False,  # cached blocks count as used: the books could not be seen to balance
        cost=_COST,
        tokens=TokenRule(vocab_size=tokenizer.get_vocab_size(), special_token_count=3, eos_token_id=END_ID),
    )
    network = SimNetwork()
    workers = []
    for worker_id, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE)):
        engine = SimEngine(replace(sim, engine_id=worker_id), network)
        workers.append(WorkerProcess(worker_id, role, "e1", engine))
    by_id = {worker.worker_id: worker for worker in workers}
    options: dict[str, Any] = {
        "model_name": "tiny",
        "model_dir": str(directory),
        "listen_address": "127.0.0.1:0",
        "admin_address": "127.0.0.1:0",
        "metrics_address": "127.0.0.1:0",
        "default_deadline_s": DEFAULT_DEADLINE_S,
        "max_deadline_s": 60.0,
        "worker_silence_s": 30.0,  # a machine that is busy fuzzing is no worker that died
        "resume_grace_s": 0.5,  # what is kept for a caller's return is over soon after the last call
        "max_resume_grace_s": 1.0,
        "lease_s": 600.0,  # no timer may do what an explicit release must
        "log_level": "ERROR",
        # So that chats with tools and values for the template come as far as they can; vLLM's own parsers.
        "chat_template_path": str(_TEMPLATE),
        "template_arguments": ("enable_thinking",),
        "tool_parser": "hermes",
        "reasoning_parser": "qwen3",
        **config,
    }
    router = _NotedRouter(
        RouterConfig(**options), secret=SECRET, connect=lambda spec: ProcessClient(by_id[spec.worker_id])
    )
    starts: list[Awaitable[None]] = [worker.start() for worker in workers]
    await asyncio.gather(*starts)
    try:
        endpoint = await router.start()
        router.roster.set_workers([worker.spec for worker in workers])
        async with asyncio.timeout(20):
            while len(router.roster.view().ready()) < len(workers):  # noqa: ASYNC110  # the roster has no bell for it
                await asyncio.sleep(0.01)
        yield FuzzTarget(router, workers, endpoint)
    finally:
        await router.close()
        for worker in workers:
            await worker.close()

"""Every reason that docs/errors.md names, from a real call over a socket, with all that the page promises of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import grpc.aio
import pytest
from raw_calls import GENERATION, MODELS, Outcome, ask, generate
from sim_cluster import SimCluster, sim_cluster
from test_errors_page import LINES
from test_worker_services import PROMPT, SECRET, a_worker, decode_request, prefill_request

from baton.secret import TOKEN_KEY, cluster_token
from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.worker.v1 import worker_pb2
from decode_worker.reservations import BlockBook
from engine.sim import SimNetwork
from engine.sim_config import PhaseDelays

SLOW_STEPS = {"extra_delay_s": PhaseDelays(decode=0.05)}
SLOW_PREFILL = {"extra_delay_s": PhaseDelays(prefill=5.0)}
HELLO = pb.GenerateRequest(text="hello", stop=pb.StopConditions(max_output_token_count=40, ignore_eos=True))
WITH_IDS = pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH)
WORKER_TOKEN = ((TOKEN_KEY, cluster_token(SECRET)),)


@asynccontextmanager
async def served(directory: Path, **options: Any) -> AsyncIterator[tuple[SimCluster, grpc.aio.Channel]]:
    async with (
        sim_cluster(directory, **options) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address) as channel,
    ):
        yield cluster, channel


class Stream:
    """A Generate or ResumeGenerate that the test reads step by step."""

    def __init__(self, channel: grpc.aio.Channel, request: Any, method: str = "Generate", **options: Any) -> None:
        response: Any = pb.GenerateResponse if method == "Generate" else pb.ResumeGenerateResponse
        make: Any = channel.unary_stream(
            f"/{GENERATION}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        self.call: Any = make(request, timeout=60, **options)
        self.token_count = 0

    async def started(self) -> pb.Started:
        message = await self.call.read()
        started: pb.Started = message.started
        return started

    async def chunk(self) -> pb.Chunk:
        chunk: pb.Chunk = (await self.call.read()).chunk
        self.token_count += chunk.token_count
        return chunk

    async def rest(self) -> Outcome:
        """Reads to the end."""
        messages: list[Any] = []
        try:
            while (message := await self.call.read()) is not grpc.aio.EOF:
                messages.append(message)
                self.token_count += message.chunk.token_count
        except grpc.aio.AioRpcError:
            pass  # told below
        return Outcome(
            await self.call.code(),
            await self.call.details() or "",
            messages,
            dict(await self.call.trailing_metadata() or ()),
            True,
        )


def resumable(count: int = 200, **changes: Any) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_output_token_count=count, ignore_eos=True)
    return pb.GenerateRequest(text="hello", stop=stop, resume=pb.ResumeOptions(), output=WITH_IDS, **changes)


# Of the public API. Each returns what the call ended with; what is promised of it is checked below.


async def invalid_request(directory: Path) -> Outcome:
    async with served(directory) as (_, channel):
        outcome = await generate(channel, pb.GenerateRequest(text="hello", priority=101))
        assert outcome.violations == {"priority": "is 101; must be -100 to 100"}
        return outcome


async def prompt_too_long(directory: Path) -> Outcome:
    async with served(directory) as (_, channel):
        outcome = await generate(channel, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 2048)))
        assert outcome.metadata == {"prompt_token_count": "2048", "max_prompt_token_count": "2047"}
        return outcome


async def prompt_too_long_for_the_cache(directory: Path) -> Outcome:
    async with served(directory) as (cluster, channel):
        cluster.workers["decode-0"].decode._book = BlockBook(8)
        outcome = await generate(channel, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 500), stop=HELLO.stop))
        assert outcome.metadata["block_count"] == "8"
        return outcome


async def model_not_found(directory: Path) -> Outcome:
    async with served(directory) as (_, channel):
        outcome = await generate(channel, pb.GenerateRequest(text="hello", model="other"))
        assert outcome.metadata == {"model": "other", "available": "tiny"}
        other = await ask(channel, f"/{MODELS}/GetModel", models.GetModelRequest(name="other"))
        assert (other.code, other.metadata) == (outcome.code, outcome.metadata)
        return outcome


def write_keys(directory: Path) -> str:
    path = directory / "keys.toml"
    digest = hashlib.sha256(b"of blue").hexdigest()
    path.write_text(f'[blue]\nsha256 = "{digest}"\ntenant = "blue"\n')
    return str(path)


async def unauthenticated(directory: Path) -> Outcome:
    async with served(directory, api_keys_path=write_keys(directory)) as (_, channel):
        wrong = await generate(channel, HELLO, metadata=[("authorization", "Bearer of red")])
        none = await generate(channel, HELLO)
        assert (wrong.reason, wrong.text) == (none.reason, none.text)
        return none


async def permission_denied(directory: Path) -> Outcome:
    key = [("authorization", "Bearer of blue")]
    async with served(directory, api_keys_path=write_keys(directory)) as (_, channel):
        assert (await generate(channel, HELLO, metadata=key)).finished.usage.output_token_count == 40
        return await generate(channel, pb.GenerateRequest(text="hello", tenant="red"), metadata=key)


async def queue_full(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS, max_in_flight_count=1, queue_limit=0) as (_, channel):
        running = Stream(channel, HELLO)
        await running.started()
        outcome = await generate(channel, HELLO)
        assert outcome.metadata == {"queued_count": "0", "queue_limit": "0"}
        running.call.cancel()
        return outcome


async def no_worker(directory: Path) -> Outcome:
    async with served(directory, max_no_worker_wait_s=0.05) as (cluster, channel):
        cluster.set_workers("prefill-0")
        await cluster.until(lambda: len(cluster.server.roster.view().ready()) == 1, "the decode worker gone")
        cluster.set_workers()
        return await generate(channel, HELLO)


async def draining(directory: Path) -> Outcome:
    async with served(directory) as (cluster, channel):
        # A drain, but for the goodbye to connections: so come calls that were on their way when it was said.
        await cluster.server.health.drain()
        cluster.server.generation.begin_drain()
        cluster.server.models.begin_drain()
        for path in ("ListModels", "GetModel"):
            request = getattr(models, f"{path}Request")()
            assert (await ask(channel, f"/{MODELS}/{path}", request)).reason == "DRAINING"
        return await generate(channel, HELLO)


async def draining_after_a_token(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS, drain_notice_s=0.0, drain_grace_s=0.0) as (cluster, channel):
        running = Stream(channel, HELLO)
        await running.started()
        await running.chunk()
        await cluster.server.drain(asyncio.Event())
        closing = asyncio.create_task(cluster.server.close())
        outcome = await running.rest()
        await closing
        assert outcome.code is grpc.StatusCode.ABORTED
        assert int(outcome.metadata["emitted_token_count"]) == running.token_count
        return outcome


async def attempts_exhausted_before_a_token(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_PREFILL, max_attempt_count=1) as (cluster, channel):
        running = Stream(channel, HELLO)
        engine = cluster.workers["prefill-0"].engine
        await cluster.until(lambda: engine.load().running_count == 1, "a prefill")
        engine.kill()
        outcome = await running.rest()
        assert outcome.code is grpc.StatusCode.UNAVAILABLE
        assert outcome.metadata["emitted_token_count"] == "0"
        return outcome


async def attempts_exhausted_after_a_token(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS, max_attempt_count=1) as (cluster, channel):
        running = Stream(channel, HELLO)
        await running.started()
        await running.chunk()
        await running.chunk()
        cluster.workers["decode-0"].engine.kill()
        outcome = await running.rest()
        assert outcome.code is grpc.StatusCode.ABORTED
        assert int(outcome.metadata["emitted_token_count"]) == running.token_count
        return outcome


async def stalled_before_a_token(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_PREFILL, max_attempt_count=1, prefill_timeout_s=0.3) as (_, channel):
        outcome = await generate(channel, HELLO)
        assert outcome.code is grpc.StatusCode.UNAVAILABLE
        assert outcome.metadata["emitted_token_count"] == "0"
        return outcome


async def stalled_after_a_token(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS, max_attempt_count=1, gap_timeout_s=0.5) as (cluster, channel):
        running = Stream(channel, HELLO)
        await running.started()
        await running.chunk()
        await running.chunk()
        engine = cluster.workers["decode-0"].engine
        engine.hang()
        outcome = await running.rest()
        engine.resume()
        assert outcome.code is grpc.StatusCode.ABORTED
        assert int(outcome.metadata["emitted_token_count"]) == running.token_count
        return outcome


async def deadline_exceeded(directory: Path) -> Outcome:
    """The server's own: of two clocks that end together, a machine that pauses could let the caller's be first."""
    async with served(directory, sim=SLOW_PREFILL, default_deadline_s=0.4) as (_, channel):
        return await generate(channel, HELLO, timeout=None)


async def too_many_resumable(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS, max_resumable_count=1) as (_, channel):
        running = Stream(channel, resumable())
        token = (await running.started()).resume_token
        outcome = await generate(channel, resumable())
        assert outcome.metadata == {"kept_count": "1", "limit": "1"}
        cancel = pb.CancelGenerationRequest(resume_token=token)
        assert (await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)).messages[0].was_running
        return outcome


async def resume_unknown(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS) as (_, channel):
        running = Stream(channel, resumable())
        token = (await running.started()).resume_token
        cancel = pb.CancelGenerationRequest(resume_token=token)
        await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)
        again = await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)
        assert not again.messages[0].was_running, "to cancel twice is no error"
        return await ask(channel, f"/{GENERATION}/ResumeGenerate", pb.ResumeGenerateRequest(resume_token=token))


async def resume_denied(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS) as (_, channel):
        running = Stream(channel, resumable(tenant="blue"))
        token = (await running.started()).resume_token
        stranger = pb.ResumeGenerateRequest(resume_token=token, tenant="red")
        outcome = await ask(channel, f"/{GENERATION}/ResumeGenerate", stranger)
        forged = pb.ResumeGenerateRequest(resume_token="forged", tenant="blue")
        assert (await ask(channel, f"/{GENERATION}/ResumeGenerate", forged)).text == outcome.text
        cancel = pb.CancelGenerationRequest(resume_token=token, tenant="red")
        assert (await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)).reason == "RESUME_DENIED"
        cancel.tenant = "blue"
        assert (await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)).messages[0].was_running
        return outcome


async def resume_too_late(directory: Path) -> Outcome:
    async with served(directory, resume_window_token_count=64) as (_, channel):
        whole = await generate(channel, resumable(108))
        assert whole.finished.usage.output_token_count == 108
        request = pb.ResumeGenerateRequest(resume_token=whole.started.resume_token, next_token_index=2)
        outcome = await ask(channel, f"/{GENERATION}/ResumeGenerate", request)
        assert outcome.metadata["next_token_index"] == "2"
        cancel = pb.CancelGenerationRequest(resume_token=whole.started.resume_token)
        await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)
        return outcome


async def reader_too_slow(directory: Path) -> Outcome:
    """Many tokens with many log probabilities, into a window of the smallest size, which nobody empties."""
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    request = pb.GenerateRequest(
        text="hello",
        stop=pb.StopConditions(max_output_token_count=2000, ignore_eos=True),
        output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS, top_logprob_count=20),
    )
    async with (
        sim_cluster(directory, max_unread_bytes=64 * 1024) as cluster,
        grpc.aio.insecure_channel(cluster.endpoint.address, options=options) as channel,
    ):
        running = Stream(channel, request)
        await running.started()
        await cluster.until(
            lambda: all(flight.outbox.is_given_up for flight in cluster.server.relay._flights), "the bound is met"
        )
        await cluster.until(
            lambda: all(each.is_balanced() for each in cluster.workers.values()), "the engines stopped"
        )
        outcome = await running.rest()
        chunks = [message.chunk for message in outcome.messages if message.HasField("chunk")]
        indices = [chunk.first_token_index + offset for chunk in chunks for offset in range(chunk.token_count)]
        assert indices == list(range(int(outcome.metadata["emitted_token_count"])))
        assert 0 < len(indices) < 2000
        assert outcome.metadata["limit_bytes"] == str(64 * 1024)
        return outcome


async def attached_elsewhere(directory: Path) -> Outcome:
    async with served(directory, sim=SLOW_STEPS) as (_, channel):
        first = Stream(channel, resumable())
        token = (await first.started()).resume_token
        await first.chunk()
        second = Stream(channel, pb.ResumeGenerateRequest(resume_token=token), "ResumeGenerate")
        await second.started()
        outcome = await first.rest()
        cancel = pb.CancelGenerationRequest(resume_token=token)
        assert (await ask(channel, f"/{GENERATION}/CancelGeneration", cancel)).messages[0].was_running
        return outcome


async def internal(directory: Path) -> Outcome:
    async with served(directory) as (cluster, channel):

        def broken(*_: object, **__: object) -> Any:
            raise KeyError("what the user said")

        whole = cluster.server.relay.run
        cluster.server.relay.run = broken  # type: ignore[method-assign]
        outcome = await generate(channel, HELLO)
        cluster.server.relay.run = whole  # type: ignore[method-assign]
        assert "user" not in outcome.text
        with mock.patch("router.stream_writer.finished_to_proto", broken):
            late = await generate(channel, HELLO)
        assert (late.reason, late.code, late.chunks[-1].token_count) == ("INTERNAL", grpc.StatusCode.INTERNAL, 1)
        assert late.metadata == {"generation_id": late.started.generation_id}, "the id that the caller knows it by"
        return outcome


# Of the internal API: over the sockets of a worker.


async def _of_worker(stub: Any, method: str, request: Any, metadata: Any = WORKER_TOKEN) -> Outcome:
    call = getattr(stub, method)(request, timeout=60, metadata=metadata)
    messages: list[Any] = []
    try:
        if method == "Decode":
            messages += [message async for message in call]
        else:
            messages.append(await call)
    except grpc.aio.AioRpcError:
        pass  # told below
    trailers = dict(await call.trailing_metadata() or ())
    return Outcome(await call.code(), await call.details() or "", messages, trailers, bool(messages))


async def unauthenticated_at_a_worker(_: Path) -> Outcome:
    async with a_worker() as worker:
        return await _of_worker(worker.prefill_stub, "Prefill", prefill_request(), metadata=())


async def ticket_refused(_: Path) -> Outcome:
    async with a_worker() as worker:
        outcome = await _of_worker(worker.decode_stub, "Decode", decode_request(ticket=b"forged"))
        assert outcome.metadata == {"check": "format"}
        return outcome


async def engine_failed(_: Path) -> Outcome:
    async with a_worker() as worker:
        worker.engine.kill()
        return await _of_worker(worker.prefill_stub, "Prefill", prefill_request())


async def no_room(_: Path) -> Outcome:
    """A decode with a ticket, at a worker whose few blocks another decode has."""
    network = SimNetwork(spans_processes=False)
    async with a_worker("p0", network) as prefill, a_worker("d0", network) as decode:
        decode.decode._book = BlockBook(42)
        running = decode.decode_stub.Decode(decode_request(max_token_count=5000), metadata=WORKER_TOKEN, timeout=60)
        await running.read()
        reply = await prefill.prefill_stub.Prefill(prefill_request(), metadata=WORKER_TOKEN, timeout=60)
        prompt = (*PROMPT, reply.first_token_id)
        outcome = await _of_worker(decode.decode_stub, "Decode", decode_request(prompt, 5, reply.ticket))
        running.cancel()
        release = worker_pb2.ReleaseKvRequest(ticket_id=reply.ticket_id)
        assert (await prefill.prefill_stub.ReleaseKv(release, metadata=WORKER_TOKEN, timeout=60)).was_held
        assert int(outcome.metadata["free_block_count"]) < int(outcome.metadata["wanted_block_count"])
        return outcome


PRODUCERS: dict[str, list[Callable[[Path], Awaitable[Outcome]]]] = {
    "INVALID_REQUEST": [invalid_request],
    "PROMPT_TOO_LONG": [prompt_too_long, prompt_too_long_for_the_cache],
    "MODEL_NOT_FOUND": [model_not_found],
    "UNAUTHENTICATED": [unauthenticated, unauthenticated_at_a_worker],
    "PERMISSION_DENIED": [permission_denied],
    "QUEUE_FULL": [queue_full],
    "NO_WORKER": [no_worker],
    "DRAINING": [draining, draining_after_a_token],
    "ATTEMPTS_EXHAUSTED": [attempts_exhausted_before_a_token, attempts_exhausted_after_a_token],
    "STALLED": [stalled_before_a_token, stalled_after_a_token],
    "DEADLINE_EXCEEDED": [deadline_exceeded],
    "TOO_MANY_RESUMABLE": [too_many_resumable],
    "RESUME_UNKNOWN": [resume_unknown],
    "RESUME_DENIED": [resume_denied],
    "RESUME_TOO_LATE": [resume_too_late],
    "ATTACHED_ELSEWHERE": [attached_elsewhere],
    "READER_TOO_SLOW": [reader_too_slow],
    "INTERNAL": [internal],
    "NO_ROOM": [no_room],
    "TICKET_REFUSED": [ticket_refused],
    "ENGINE_FAILED": [engine_failed],
}
Value = str | Callable[[str], bool]


def at_least(count: int) -> Callable[[str], bool]:
    return lambda value: value.isdecimal() and int(value) >= count


METADATA: dict[Callable[[Path], Awaitable[Outcome]], dict[str, Value]] = {
    invalid_request: {},
    prompt_too_long: {"prompt_token_count": "2048", "max_prompt_token_count": "2047"},
    # 500 tokens and an answer of 40 are 34 blocks of 16.
    prompt_too_long_for_the_cache: {"prompt_token_count": "500", "wanted_block_count": "34", "block_count": "8"},
    model_not_found: {"model": "other", "available": "tiny"},
    unauthenticated: {},
    unauthenticated_at_a_worker: {},
    permission_denied: {},
    queue_full: {"queued_count": "0", "queue_limit": "0"},
    no_worker: {"role": "decode", "worker_count": "0"},
    draining: {},
    draining_after_a_token: {"emitted_token_count": at_least(1)},
    attempts_exhausted_before_a_token: {"attempt_count": "1", "emitted_token_count": "0", "phase": "prefill"},
    attempts_exhausted_after_a_token: {"attempt_count": "1", "emitted_token_count": at_least(2), "phase": "decode"},
    stalled_before_a_token: {"phase": "prefill", "gap_s": "0.3", "emitted_token_count": "0"},
    stalled_after_a_token: {"phase": "decode", "gap_s": "0.5", "emitted_token_count": at_least(2)},
    deadline_exceeded: {"phase": "prefill", "emitted_token_count": "0"},
    too_many_resumable: {"kept_count": "1", "limit": "1"},
    resume_unknown: {},
    resume_denied: {},
    resume_too_late: {"next_token_index": "2", "first_token_index": "44"},  # of 108, the window keeps 64
    attached_elsewhere: {},
    reader_too_slow: {
        "unread_bytes": at_least(1),
        "limit_bytes": str(64 * 1024),
        "emitted_token_count": at_least(1),
    },
    internal: {"generation_id": lambda value: value.startswith("gen-")},
    no_room: {"wanted_block_count": "2", "free_block_count": "1"},
    ticket_refused: {"check": "format"},
    engine_failed: {"worker_id": "w0"},
}
"""What each has to say, exactly; of counts that depend on how far something got, the least."""

RETRY_MS: dict[Callable[[Path], Awaitable[Outcome]], int] = {
    queue_full: 1000,
    no_worker: 1000,
    too_many_resumable: 1000,
    no_room: 250,
}
_seen: dict[str, set[str]] = {}
"""Statuses seen of each reason, for the last test."""


@pytest.mark.parametrize(
    ("reason", "produce"),
    [pytest.param(reason, each, id=each.__name__) for reason, makers in PRODUCERS.items() for each in makers],
)
async def test_a_reason_comes_from_a_real_call_as_the_page_says(
    reason: str, produce: Callable[[Path], Awaitable[Outcome]], tmp_path: Path
) -> None:
    outcome = await produce(tmp_path)
    line = LINES[reason]
    assert outcome.reason == reason
    assert outcome.code.name in line.statuses
    assert set(outcome.metadata) <= line.metadata
    wanted = METADATA[produce]
    assert set(outcome.metadata) == set(wanted)
    for key, value in wanted.items():
        assert value(outcome.metadata[key]) if callable(value) else outcome.metadata[key] == value, outcome.metadata
    assert ("RetryInfo" in outcome.details) == line.has_retry
    if line.has_retry:
        delay_ms = outcome.details["RetryInfo"].retry_delay.ToMilliseconds()
        assert delay_ms == RETRY_MS[produce]
        assert outcome.trailers["grpc-retry-pushback-ms"] == str(delay_ms), "the deadline leaves time for it"
    else:
        assert "grpc-retry-pushback-ms" not in outcome.trailers
    assert ("BadRequest" in outcome.details) == (outcome.code is grpc.StatusCode.INVALID_ARGUMENT)
    assert set(outcome.details) <= {"ErrorInfo", "BadRequest", "RetryInfo"}
    if not outcome.messages and produce not in (
        draining_after_a_token,
        attempts_exhausted_after_a_token,
        stalled_after_a_token,
        attached_elsewhere,
        attempts_exhausted_before_a_token,
    ):
        assert not outcome.has_headers, "a refusal travels as trailers only, so that gRPC may repeat the call"
    _seen.setdefault(reason, set()).add(outcome.code.name)


def test_every_reason_of_the_page_is_produced_with_each_of_its_statuses_and_all_its_metadata() -> None:
    assert set(PRODUCERS) == set(LINES)
    for reason, line in LINES.items():
        assert {key for each in PRODUCERS[reason] for key in METADATA[each]} == line.metadata, reason
    for reason, makers in PRODUCERS.items():
        assert len(makers) >= len(LINES[reason].statuses), reason

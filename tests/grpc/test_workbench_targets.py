"""The load generator's targets against real sockets: counts, outcomes, and that leaving is noticed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sim_cluster import MODEL, sim_cluster

from bench.generator.baton_target import BatonTarget
from bench.generator.openai_target import CHAT, DIALECTS, OpenAiTarget
from bench.generator.sender import send_plan
from bench.generator.target import ServerFacts, TargetError, TargetEvent, Tokens
from bench.results.records import Outcome
from bench.traffic.plan import Plan, PlannedRequest

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
SECRET_TEXT = "a prompt that nobody may repeat"


def request(output_token_count: int = 4, **changes: Any) -> PlannedRequest:
    values = {"index": 0, "at_s": 0.0, "prompt_token_ids": (5, 6, 7), **changes}
    return PlannedRequest(output_token_count=output_token_count, **values)


async def taken(
    events: AsyncGenerator[TargetEvent, None],
) -> tuple[list[int], ServerFacts | None, TargetError | None]:
    """Tokens by message, facts, and the error that ended it."""
    counts: list[int] = []
    facts = None
    try:
        async with aclosing(events) as answer:
            async for event in answer:
                if isinstance(event, Tokens):
                    counts.append(event.token_count)
                else:
                    facts = event
    except TargetError as error:
        return counts, facts, error
    return counts, facts, None


class FakeServer:
    """Answers with scripted bytes and remembers what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = asyncio.Event()
        """Set when a caller closed its connection in the middle of an answer."""
        self.pieces: list[bytes] = []
        self.status = 200
        self.reply_headers: dict[str, str] = {}
        self.stays_open = False

    async def answer(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.json())
        self.headers.append(dict(http.headers))
        if self.status != 200:
            return web.Response(status=self.status, headers=self.reply_headers, text=f"no: {SECRET_TEXT}")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        try:
            for piece in self.pieces:
                await response.write(piece)
                await asyncio.sleep(0)
            if self.stays_open:
                async with asyncio.timeout(60):
                    while True:  # until the connection is closed under it
                        await response.write(b": still here\n\n")
                        await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.CancelledError):
            self.left.set()
            raise
        return response


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post(CHAT, server.answer)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def openai_target(server: FakeServer, **changes: Any) -> AsyncIterator[OpenAiTarget]:
    target = OpenAiTarget(server.url, "m", **{"text_of": lambda _: "three words here", **changes})
    try:
        yield target
    finally:
        await target.close()


def event(text: str | None = None, *, total: int | None = None, finish: str | None = None) -> bytes:
    """One event of a completion; ``total``: cumulative usage."""
    body: dict[str, Any] = {"id": "x", "choices": []}
    if text is not None or finish is not None:
        body["choices"] = [{"index": 0, "text": text or "", "finish_reason": finish}]
    body["usage"] = None if total is None else {"prompt_tokens": 3, "completion_tokens": total}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(finish: str | None = None, **fields: str) -> bytes:
    body = {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def test_running_usage_counts_tokens_message_by_message() -> None:
    async with fake_server() as server, openai_target(server) as target:
        # Two tokens in one event, and one without text: half of a character.
        server.pieces = [event("a b", total=2), event("", total=3), event("d", total=4, finish="length"), DONE]
        counts, facts, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, error, target.counting) == ([2, 1, 1], None, "running usage")
        assert facts is not None
        assert facts.prompt_token_count == 3


async def test_a_usage_event_after_the_last_token_adds_nothing() -> None:
    async with fake_server() as server, openai_target(server) as target:
        tokens = [event("x", total=i + 1) for i in range(4)]
        server.pieces = [*tokens, event("", total=4, finish="length"), event(total=4), DONE]
        counts, _, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, error) == ([1, 1, 1, 1], None)


async def test_without_running_usage_an_event_is_a_token_and_the_rest_is_booked_at_the_end() -> None:
    async with fake_server() as server, openai_target(server, dialect="llamacpp") as target:
        server.pieces = [event("a"), event("b c"), event("", finish="length"), event(total=4), DONE]
        counts, _, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, error, target.counting) == ([1, 1, 2], None, "final usage")


async def test_without_any_usage_events_are_counted() -> None:
    async with fake_server() as server, openai_target(server, dialect="generic") as target:
        server.pieces = [event("a"), event("b"), event("c"), event("d", finish="length"), DONE]
        counts, facts, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, facts, error, target.counting) == ([1, 1, 1, 1], None, None, "events")


async def test_chat_answers_count_content_and_reasoning_and_no_empty_role() -> None:
    async with fake_server() as server, openai_target(server, dialect="ollama") as target:
        server.pieces = [
            delta(role="assistant", content=""),
            delta(reasoning="hm"),
            delta(content="a"),
            delta(content="b"),
            delta(content="c"),
            delta(finish="stop", content=""),
            event(total=4),
            DONE,
        ]
        counts, _, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, error) == ([1, 1, 1, 1], None)
        assert server.bodies[0]["messages"] == [{"role": "user", "content": "three words here"}]
        assert "prompt" not in server.bodies[0]


async def test_an_answer_that_the_model_ended_is_whole_only_where_ends_cannot_be_ignored() -> None:
    async with fake_server() as server:
        server.pieces = [event("a"), event("b", finish="stop"), event(total=2), DONE]
        async with openai_target(server, dialect="tgi") as target:
            assert (await taken(target.generate(request(), timeout_s=60)))[2] is None
        async with openai_target(server, dialect="llamacpp") as target:
            _, _, error = await taken(target.generate(request(), timeout_s=60))
            assert error is not None
            assert (error.outcome, str(error)) == (Outcome.INCOMPLETE, "2 tokens came for 4")


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([event("a", total=1)], "the stream ended without its end; 1 tokens came for 4"),
        ([event("a", total=1), DONE], "1 tokens came for 4"),
        ([event("a", total=5, finish="length"), DONE], "5 tokens came for 4"),
        ([DONE], "0 tokens came for 4"),
        ([event("a"), event("b", finish="length"), event(total=1), DONE], "the server counts 1 tokens and showed 2"),
    ],
)
async def test_an_answer_of_another_length_is_incomplete(pieces: list[bytes], words: str) -> None:
    async with fake_server() as server, openai_target(server) as target:
        server.pieces = pieces
        _, _, error = await taken(target.generate(request(), timeout_s=60))
        assert error is not None
        assert (error.outcome, str(error)) == (Outcome.INCOMPLETE, words)


async def test_error_events_and_broken_ones_are_errors_without_their_text() -> None:
    async with fake_server() as server, openai_target(server) as target:
        for broken, words in (
            (b'data: {"error": {"message": "' + SECRET_TEXT.encode() + b'"}}\n\n', "the server sent an error event"),
            (b"data: {not json\n\n", "JSONDecodeError"),
            (b"data: 7\n\n", "the server sent an error event"),
        ):
            server.pieces = [event("a", total=1), broken]
            counts, _, error = await taken(target.generate(request(), timeout_s=60))
            assert error is not None
            assert (counts, error.outcome) == ([1], Outcome.ERROR)
            assert str(error) == f"{words} after tokens had come"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((429, Outcome.REFUSED), (503, Outcome.REFUSED), (400, Outcome.REFUSED)),
        *((401, Outcome.ERROR), (500, Outcome.ERROR)),
    ],
)
async def test_a_status_becomes_an_outcome_without_the_servers_text(status: int, outcome: Outcome) -> None:
    async with fake_server() as server, openai_target(server) as target:
        server.status, server.reply_headers = status, {"Retry-After": "7"}
        _, _, error = await taken(target.generate(request(), timeout_s=60))
        assert error is not None
        assert (error.outcome, str(error)) == (outcome, f"HTTP {status}, Retry-After 7")


async def test_nobody_at_the_address_is_an_error() -> None:
    async with fake_server() as server:
        url = server.url
    target = OpenAiTarget(url, "m")
    try:
        _, _, error = await taken(target.generate(request(), timeout_s=60))
        assert error is not None
        assert (error.outcome, str(error)) == (Outcome.ERROR, "ClientConnectorError before any token")
        with pytest.raises(TargetError, match="ClientConnectorError"):
            await target.models(timeout_s=60)
    finally:
        await target.close()


async def test_leaving_closes_the_connection_so_that_the_server_stops() -> None:
    async with fake_server() as server, openai_target(server) as target:
        server.pieces, server.stays_open = [event("a", total=1)], True
        async with aclosing(target.generate(request(), timeout_s=60)) as answer:
            async for _ in answer:
                break
        async with asyncio.timeout(60):
            await server.left.wait()


async def test_a_deadline_of_the_target_is_a_timeout() -> None:
    async with fake_server() as server, openai_target(server) as target:
        server.pieces, server.stays_open = [event("a", total=1)], True
        counts, _, error = await taken(target.generate(request(), timeout_s=1.0))
        assert error is not None
        assert error.outcome is Outcome.TIMEOUT
        assert counts in ([1], []), "what had come by then"


async def test_the_api_key_is_sent_and_models_are_listed() -> None:
    async with fake_server() as server, openai_target(server, api_key="k") as target:
        server.pieces = [event("a", total=4, finish="length"), DONE]
        await taken(target.generate(request(), timeout_s=60))
        assert server.headers[0]["Authorization"] == "Bearer k"
        assert await target.models(timeout_s=60) == ["m"]


SNAPSHOTS: dict[str, dict[str, Any]] = {
    "vllm": {
        "prompt": [5, 6, 7],
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "sglang": {
        "prompt": [5, 6, 7],
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "trtllm": {
        "prompt": [5, 6, 7],
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "tgi": {"prompt": "three words here", "stream_options": {"include_usage": True}},
    "llamacpp": {"prompt": "three words here", "ignore_eos": True, "stream_options": {"include_usage": True}},
    "ollama": {
        "messages": [{"role": "user", "content": "three words here"}],
        "stream_options": {"include_usage": True},
    },
    "lmstudio": {"prompt": "three words here", "stream_options": {"include_usage": True}},
    "generic": {"prompt": "three words here", "stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize("name", DIALECTS)
async def test_a_dialect_sends_exactly_this(name: str) -> None:
    """Pinned whole: a field too many is refused by some servers, and changes what others compute."""
    common = {"model": "m", "max_tokens": 4, "temperature": 0.0, "stream": True}
    async with fake_server() as server, openai_target(server, dialect=name) as target:
        await taken(target.generate(request(), timeout_s=60))
        assert server.bodies == [{**common, **SNAPSHOTS[name]}]


async def test_a_dialect_that_takes_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        OpenAiTarget("http://127.0.0.1:1", "m", dialect="tgi")


async def test_bodies_are_made_before_the_run_and_sent_once_each() -> None:
    async with fake_server() as server:
        made: list[int] = []

        def text_of(token_ids: Any) -> str:
            made.append(len(token_ids))
            return "text"

        async with openai_target(server, dialect="generic", text_of=text_of) as target:
            server.pieces = [event("a b c d"), event(total=4), DONE]
            requests = tuple(request(index=i, at_s=0.01 * i) for i in range(3))
            plan = Plan(name="p", requests=requests, duration_s=1.0, facts={})
            records = await send_plan(plan, target, timeout_s=60)
        assert made == [3, 3, 3]
        assert [record.message_token_counts for record in records] == [[1, 3]] * 3
        assert len(server.bodies) == 3


async def test_baton_tells_tokens_phases_and_who_did_the_work(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        target = BatonTarget(cluster.endpoint.address, channel_count=2)
        try:
            await target.check(timeout_s=60)
            plan = Plan(
                name="p",
                requests=tuple(request(20, index=i, at_s=0.01 * i) for i in range(8)),
                duration_s=1.0,
                facts={},
            )
            records = await send_plan(plan, target, timeout_s=60)
        finally:
            await target.close()
        assert target.model == MODEL
        for record in records:
            assert (record.outcome, record.error) == (Outcome.OK, None)
            assert record.output_token_count == 20
            assert record.phases_s is not None
            assert set(record.phases_s) == {
                *("queue", "prefill", "handoff_wait", "kv_transfer", "decode_wait", "decode"),
            }
            assert (record.prefill_worker_id, record.decode_worker_id) == ("prefill-0", "decode-0")
            assert record.placement is not None
            assert record.placement.startswith("split")
            assert (record.attempt_count, record.prompt_token_count) == (1, 3)


async def test_baton_turns_away_what_is_refused_and_ends_what_is_left(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, queue_limit=0, max_in_flight_count=1) as cluster:
        target = BatonTarget(cluster.endpoint.address)
        try:
            async with aclosing(target.generate(request(1500), timeout_s=60)) as first:
                assert isinstance(await anext(first), Tokens)
                _, _, error = await taken(target.generate(request(index=1), timeout_s=60))
                assert error is not None
                assert (error.outcome, str(error)) == (Outcome.REFUSED, "RESOURCE_EXHAUSTED/QUEUE_FULL")
            _, _, error = await taken(target.generate(request(prompt_token_ids=(5,) * 4000), timeout_s=60))
            assert error is not None
            assert (error.outcome, str(error)) == (Outcome.REFUSED, "INVALID_ARGUMENT/PROMPT_TOO_LONG")
            with cluster.standing():  # the first was left, and is not over
                await cluster.until_balanced()
        finally:
            await target.close()


async def test_no_baton_at_the_address_is_an_error_and_not_a_refusal() -> None:
    target = BatonTarget("127.0.0.1:9")
    try:
        _, _, error = await taken(target.generate(request(), timeout_s=60))
        assert error is not None
        assert error.outcome is Outcome.ERROR
        assert str(error).endswith("(connection)")
    finally:
        await target.close()


async def test_final_usage_counts_where_the_server_ends_without_done() -> None:
    async with fake_server() as server, openai_target(server, dialect="tgi") as target:
        server.pieces = [event("a"), event("b c"), event("d", finish="length"), event(total=4)]
        counts, facts, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, error, target.counting) == ([1, 1, 1, 1], None, "final usage")
        assert facts is not None


async def test_an_error_of_null_is_none() -> None:
    async with fake_server() as server, openai_target(server) as target:
        tokens = [event("x", total=i + 1).replace(b'"id": "x"', b'"error": null') for i in range(4)]
        assert b'"error": null' in tokens[0]
        server.pieces = [*tokens, DONE]
        counts, _, error = await taken(target.generate(request(), timeout_s=60))
        assert (counts, error) == ([1, 1, 1, 1], None)

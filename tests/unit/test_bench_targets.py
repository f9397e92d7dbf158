"""The OpenAI target and the stock proxy against small servers that speak vLLM's protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from bench.stock_proxy import StockProxy
from bench.targets import OpenAiTarget, TargetError, TokenEvent


@asynccontextmanager
async def serving(application: web.Application) -> AsyncGenerator[str, None]:
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        assert site._server is not None
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    finally:
        await runner.cleanup()


class FakeVllm:
    """Streams ``max_tokens`` tokens in the given message sizes; a prefill request gets transfer parameters."""

    def __init__(self, sizes: list[int], *, status: int = 200, error_after: int | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._sizes, self._status, self._error_after = sizes, status, error_after

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/v1/completions", self._completions)
        application.router.add_get("/health", self._health)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self._status != 200:
            return web.json_response({"error": "no"}, status=self._status)
        if not body.get("stream"):
            return web.json_response({"choices": [], "kv_transfer_params": {"remote_engine_id": "p", "n": 7}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        total = 0
        for number, size in enumerate(self._sizes):
            total += size
            event: dict[str, Any] = {"choices": [{"text": ""}], "usage": {"completion_tokens": total}}
            if number == self._error_after:
                event = {"error": {"message": "broken"}}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(0.01)
        await response.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % total)
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def serving_pd(prefill: FakeVllm, decode: FakeVllm) -> AsyncGenerator[str, None]:
    """The address of a proxy before the two."""
    async with (
        serving(prefill.application()) as prefill_url,
        serving(decode.application()) as decode_url,
        serving(StockProxy(prefill_url, decode_url).application()) as url,
    ):
        yield url


async def answer(url: str, max_token_count: int) -> list[TokenEvent]:
    target = OpenAiTarget(url, "m")
    try:
        events = [event async for event in target.generate([5, 6, 7], max_token_count, timeout_s=60)]
    finally:
        await target.close()
    assert all(isinstance(event, TokenEvent) for event in events)
    return [event for event in events if isinstance(event, TokenEvent)]


async def test_tokens_are_counted_by_message_and_the_final_usage_adds_none() -> None:
    server = FakeVllm([1, 1, 3])
    async with serving(server.application()) as url:
        events = await answer(url, 5)
    assert [event.token_count for event in events] == [1, 1, 3]
    assert events[0].at < events[1].at < events[2].at
    assert server.bodies[0]["prompt"] == [5, 6, 7]
    assert server.bodies[0]["ignore_eos"] is True


async def test_an_answer_that_is_too_short_is_an_error() -> None:
    async with serving(FakeVllm([1, 1]).application()) as url:
        with pytest.raises(TargetError, match="2 tokens came for 5"):
            await answer(url, 5)


async def test_an_error_in_the_stream_is_an_error() -> None:
    async with serving(FakeVllm([1, 1, 1], error_after=1).application()) as url:
        with pytest.raises(TargetError, match=r"after 1 tokens.*error"):
            await answer(url, 3)


async def test_a_refused_request_is_an_error() -> None:
    async with serving(FakeVllm([], status=400).application()) as url:
        with pytest.raises(TargetError, match="HTTP 400"):
            await answer(url, 3)


async def test_the_proxy_prefills_first_and_hands_the_transfer_parameters_to_decode() -> None:
    prefill, decode = FakeVllm([]), FakeVllm([1, 1, 1])
    async with serving_pd(prefill, decode) as url:
        events = await answer(url, 3)
    assert [event.token_count for event in events] == [1, 1, 1]
    (first,), (second,) = prefill.bodies, decode.bodies
    assert first["max_tokens"] == 1
    assert first["stream"] is False
    assert first["kv_transfer_params"]["do_remote_decode"] is True
    assert second["kv_transfer_params"] == {"remote_engine_id": "p", "n": 7}
    assert (second["prompt"], second["max_tokens"], second["stream"]) == ([5, 6, 7], 3, True)


async def test_the_proxy_streams_instead_of_gathering() -> None:
    async with serving_pd(FakeVllm([]), FakeVllm([1] * 5)) as url:
        events = await answer(url, 5)
    assert events[-1].at - events[0].at > 0.03  # five messages 10 ms apart


async def test_the_proxy_passes_a_refusal_on_and_never_calls_decode() -> None:
    prefill, decode = FakeVllm([], status=400), FakeVllm([1])
    async with serving_pd(prefill, decode) as url:
        with pytest.raises(TargetError, match="HTTP 400"):
            await answer(url, 1)
    assert decode.bodies == []

"""The stock proxy between small servers that speak vLLM's protocol and the generator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from bench.generator.openai_target import OpenAiTarget
from bench.generator.target import TargetError, TargetEvent, Tokens
from bench.stock_proxy import StockProxy
from bench.traffic.plan import PlannedRequest


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

    def __init__(self, sizes: list[int], *, status: int = 200) -> None:
        """``may_go_on`` is waited for after the first message."""
        self.bodies: list[dict[str, Any]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self._sizes, self._status = sizes, status

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
        for size in self._sizes:
            total += size
            event: dict[str, Any] = {"choices": [{"text": ""}], "usage": {"completion_tokens": total}}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await self.may_go_on.wait()
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


@asynccontextmanager
async def answering(url: str, token_count: int) -> AsyncGenerator[AsyncGenerator[TargetEvent, None], None]:
    request = PlannedRequest(index=0, at_s=0.0, prompt_token_ids=(5, 6, 7), output_token_count=token_count)
    target = OpenAiTarget(url, "m")
    try:
        async with aclosing(target.generate(request, timeout_s=60)) as events:
            yield events
    finally:
        await target.close()


async def answer(url: str, token_count: int) -> list[Tokens]:
    async with answering(url, token_count) as events:
        return [event async for event in events if isinstance(event, Tokens)]


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
    decode = FakeVllm([1] * 5)
    decode.may_go_on.clear()
    counts = []
    async with serving_pd(FakeVllm([]), decode) as url, answering(url, 5) as events:
        async for event in events:
            if isinstance(event, Tokens):
                counts.append(event.token_count)
                decode.may_go_on.set()  # only what was seen lets the rest come
    assert counts == [1] * 5


async def test_the_proxy_passes_a_refusal_on_and_never_calls_decode() -> None:
    prefill, decode = FakeVllm([], status=400), FakeVllm([1])
    async with serving_pd(prefill, decode) as url:
        with pytest.raises(TargetError, match="HTTP 400"):
            await answer(url, 1)
    assert decode.bodies == []

"""The naive peer as its callers see it: exact counts, and no work for who has left."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager

import aiohttp
import pytest
import uvicorn

from bench.comparison.naive_server import CompletionRequest, application
from bench.generator.openai_target import OpenAiTarget
from bench.generator.target import TargetError, Tokens
from bench.traffic.plan import PlannedRequest

DEADLINE_S = 60.0


def request(output_token_count: int) -> PlannedRequest:
    return PlannedRequest(index=0, at_s=0.0, prompt_token_ids=(1, 2, 3), output_token_count=output_token_count)


class Echo:
    """Says a word per token; as the streamer does, the last word only at the end. Waits for ``gate`` before it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.gone: threading.Event | None = None
        """Of the last request."""
        self.given_count = 0
        self.is_broken = False

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        return [len(word) for word in prompt.split()] if isinstance(prompt, str) else prompt

    def stream(
        self, prompt_ids: Sequence[int], request: CompletionRequest, gone: threading.Event
    ) -> Iterator[tuple[str, int]]:
        self.gone = gone
        for number in range(1, request.max_tokens + 1):
            self.given_count = number
            yield ("w " if number > 1 else ""), number
            if number == 2:
                if self.is_broken:
                    raise RuntimeError("the model broke")
                self.gate.wait(DEADLINE_S)
        yield "w", request.max_tokens


class Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@asynccontextmanager
async def serving(echo: Echo) -> AsyncIterator[str]:
    service = application(echo, model_name="tiny", max_context_token_count=32)
    server = Server(uvicorn.Config(service, host="127.0.0.1", port=0, log_level="critical"))
    running = asyncio.create_task(server.serve())
    try:
        await asyncio.wait_for(server.is_up.wait(), DEADLINE_S)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        echo.gate.set()
        server.should_exit = True
        await asyncio.wait_for(running, DEADLINE_S)


async def test_every_token_is_counted_also_those_whose_text_comes_later(echo: Echo) -> None:
    async with serving(echo) as url:
        target = OpenAiTarget(url, "tiny")
        async with aclosing(target.generate(request(5), timeout_s=DEADLINE_S)) as events:
            counts = [event.token_count async for event in events if isinstance(event, Tokens)]
        await target.close()
    assert counts == [1, 1, 1, 1, 1]


async def test_a_whole_answer_has_text_reason_and_usage(echo: Echo) -> None:
    async with serving(echo) as url, aiohttp.ClientSession() as session:
        body = {"model": "tiny", "prompt": "a bc", "max_tokens": 3}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200
            said = await answer.json()
        async with session.get(f"{url}/v1/models") as answer:
            assert (await answer.json())["data"][0]["id"] == "tiny"
    assert said["choices"] == [{"index": 0, "text": "w w w", "finish_reason": "length"}]
    assert said["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


async def test_usage_comes_once_at_the_end_when_only_that_was_asked(echo: Echo) -> None:
    async with serving(echo) as url, aiohttp.ClientSession() as session:
        body = {"prompt": [1], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.content_type == "text/event-stream"
            lines = [line.removeprefix("data: ") for line in (await answer.text()).split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    usages = [json.loads(line).get("usage") for line in lines[:-1]]
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


async def test_what_does_not_fit_is_refused(echo: Echo) -> None:
    async with serving(echo) as url, aiohttp.ClientSession() as session:
        for body in (
            {"prompt": [1] * 30, "max_tokens": 3},
            {"prompt": [], "max_tokens": 3},
            {"prompt": [1], "max_tokens": 0},
        ):
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                assert answer.status == 400


async def test_a_broken_model_ends_the_stream_without_its_end(echo: Echo) -> None:
    echo.is_broken = True
    async with serving(echo) as url:
        target = OpenAiTarget(url, "tiny")
        with pytest.raises(TargetError):
            async for _ in target.generate(request(5), timeout_s=DEADLINE_S):
                pass
        await target.close()


async def test_what_nobody_reads_any_more_is_not_computed_to_its_end(echo: Echo) -> None:
    echo.gate.clear()
    async with serving(echo) as url:
        target = OpenAiTarget(url, "tiny")
        async with aclosing(target.generate(request(20), timeout_s=DEADLINE_S)) as events:
            async for _ in events:
                break  # the caller leaves after the first token
        await target.close()
        assert echo.gone is not None
        echo.gate.set()
        assert await asyncio.to_thread(echo.gone.wait, DEADLINE_S)
    assert echo.given_count < 20

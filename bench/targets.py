"""What a load generator talks to: Baton over gRPC or an OpenAI-compatible server over HTTP, behind one protocol.

A target turns one request into a stream of (time, tokens). It never decides when to send and never aggregates.
Both ask for the same work: greedy, token ids in, text out, exactly ``max_token_count`` tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from baton.client import BatonClient, Chunk, Finished
from baton.errors import BatonError
from baton.request import StopConditions


class TargetError(RuntimeError):
    """The target refused or broke a request. The message never has prompt or output text."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens that arrived together, and when, on the event loop's clock."""

    at: float
    token_count: int


@dataclass(frozen=True, slots=True)
class ServerNotes:
    """What the server itself said of the request, fit for JSON; last, and only from targets that say anything."""

    facts: dict[str, Any]


TargetEvent = TokenEvent | ServerNotes


class Target(Protocol):
    """A system under load."""

    def generate(
        self, prompt_token_ids: Sequence[int], max_token_count: int, *, timeout_s: float
    ) -> AsyncGenerator[TargetEvent, None]:
        """Streams one answer. Raises ``TargetError``; also when the answer is not ``max_token_count`` tokens."""
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


class OpenAiTarget:
    """``/v1/completions`` of an OpenAI-compatible server, streamed as server-sent events."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._model = model
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def generate(
        self, prompt_token_ids: Sequence[int], max_token_count: int, *, timeout_s: float
    ) -> AsyncGenerator[TargetEvent, None]:
        body = {
            "model": self._model,
            "prompt": list(prompt_token_ids),
            "max_tokens": max_token_count,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            # The only count of tokens that is exact whatever the text: cumulative usage on every event.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        loop = asyncio.get_running_loop()
        seen = 0
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(self._url, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise TargetError(f"HTTP {answer.status}")
                async with aclosing(_events(answer.content)) as events:
                    async for data in events:
                        at = loop.time()
                        event = json.loads(data)
                        if event.get("usage") is None:
                            raise TargetError(f"after {seen} tokens, an event with only: {sorted(event)}")
                        total = int(event["usage"]["completion_tokens"])
                        if total > seen:
                            yield TokenEvent(at, total - seen)
                            seen = total
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TargetError(f"{type(error).__name__} after {seen} tokens") from error
        _check_count(seen, max_token_count)

    async def close(self) -> None:
        await self._session.close()


class BatonTarget:
    """Baton's public gRPC service."""

    def __init__(self, address: str) -> None:
        self._client = BatonClient(address)

    async def generate(
        self, prompt_token_ids: Sequence[int], max_token_count: int, *, timeout_s: float
    ) -> AsyncGenerator[TargetEvent, None]:
        loop = asyncio.get_running_loop()
        seen = 0
        finished: Finished | None = None
        stop = StopConditions(max_output_token_count=max_token_count, ignore_eos=True)
        try:
            async with aclosing(self._client.generate(prompt_token_ids, timeout=timeout_s, stop=stop)) as events:
                async for event in events:
                    match event:
                        case Chunk(token_count=token_count) if token_count:
                            yield TokenEvent(loop.time(), token_count)
                            seen += token_count
                        case Finished():
                            finished = event
        except BatonError as error:
            raise TargetError(f"{error.status.value}/{error.reason.value} after {seen} tokens") from error
        _check_count(seen, max_token_count)
        if finished is not None:
            yield ServerNotes(_notes(finished))

    async def close(self) -> None:
        await self._client.close()


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event, up to "[DONE]"."""
    async for line in content:
        data = line.strip()
        if not data.startswith(b"data:"):
            continue
        data = data[5:].strip()
        if data == b"[DONE]":
            return
        yield data


def _check_count(seen: int, wanted: int) -> None:
    if seen != wanted:
        raise TargetError(f"{seen} tokens came for {wanted}")


def _notes(finished: Finished) -> dict[str, Any]:
    phases = finished.phases
    return {
        "phases_ms": {phase.value: round(seconds * 1e3, 3) for phase, seconds in phases.seconds.items()},
        "kv_transfer_bytes": phases.kv_transfer_bytes,
        "placement": f"{phases.placement_mode.value if phases.placement_mode else '?'}/{phases.placement_reason}",
        "attempt_count": phases.attempt_count,
        "cached_prompt_token_count": finished.usage.cached_prompt_token_count,
    }

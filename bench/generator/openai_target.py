"""Any OpenAI-compatible server over HTTP, streaming, as a target.

The servers agree on the shape of a stream and on little else: whether a prompt may be token ids, whether end tokens
can be ignored, whether every event tells how many tokens came. A ``Dialect`` says what one server accepts; nothing
else is sent to it. ``min_tokens`` is sent to none: what knows it knows ``ignore_eos`` as well, which costs nothing a
step, while a minimum is a logits processor on every one.

How tokens are counted, found out by the first text of each answer and told by ``counting``: where cumulative usage is
on every event (``continuous_usage_stats``), exactly, message by message. Elsewhere an event with text is a message of
one token, and what the final usage counts beyond that is one more message at the end: the number is exact, which
message carried two tokens is not known. Where a server sends no usage at all, events with text are counted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.generator.sse import EventStream
from bench.generator.target import ServerFacts, TargetError, TargetEvent, Tokens
from bench.results.records import Outcome
from bench.traffic.plan import PlannedRequest

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
KEEP_ALIVE_S = 3.0
"""Idle connections are dropped before servers do so (uvicorn: after 5 s): else a request meets a closing one."""

_decode = json.JSONDecoder().decode
"""``json.loads`` of bytes guesses their encoding first, on every event."""

TextOf = Callable[[Sequence[int]], str]
"""Text of token ids; the model's own tokenizer without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What one kind of server accepts beyond model, prompt, max_tokens, temperature and stream."""

    name: str
    endpoint: str = COMPLETIONS
    """Which it is measured on unless told otherwise."""
    takes_token_ids: bool = False
    """As prompt of /v1/completions. Others get text, whose tokens may differ in number; they report the number."""
    ignores_end: bool = False
    """Knows ``ignore_eos``. Where not, an answer that the model ended is complete, whatever its length."""
    has_usage: bool = True
    """Knows ``stream_options.include_usage``."""
    has_running_usage: bool = False
    """Knows ``stream_options.continuous_usage_stats``."""


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(name="vllm", takes_token_ids=True, ignores_end=True, has_running_usage=True),
        Dialect(name="sglang", takes_token_ids=True, ignores_end=True, has_running_usage=True),
        Dialect(name="trtllm", takes_token_ids=True, ignores_end=True, has_running_usage=True),
        Dialect(name="tgi"),
        Dialect(name="llamacpp", ignores_end=True),
        Dialect(name="ollama", endpoint=CHAT),
        Dialect(name="lmstudio"),
        Dialect(name="generic"),
    )
}


class OpenAiTarget:
    """Must be made inside the event loop that uses it. Connects at the first request."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        dialect: Dialect | str = "vllm",
        endpoint: str | None = None,
        text_of: TextOf | None = None,
        api_key: str | None = None,
    ) -> None:
        """``url``: scheme, host and port. ``endpoint``: another than the dialect's. ``text_of`` is needed where
        prompts go as text. Raises ``ValueError`` where it is missing."""
        self.dialect = DIALECTS[dialect] if isinstance(dialect, str) else dialect
        self.endpoint = endpoint or self.dialect.endpoint
        self._is_chat = self.endpoint.endswith("/chat/completions")
        self.takes_token_ids = self.dialect.takes_token_ids and not self._is_chat
        if text_of is None and not self.takes_token_ids:
            raise ValueError(f"{self.dialect.name} takes prompts as text at {self.endpoint}: a tokenizer is needed")
        self.url = url.rstrip("/")
        self.model = model
        self._text_of = text_of
        self.counting: str | None = None
        """How tokens of the last answer were counted: "running usage", "final usage" or "events"."""
        self._bodies: dict[int, tuple[PlannedRequest, bytes]] = {}
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S), headers=headers
        )

    def prepare(self, requests: Sequence[PlannedRequest]) -> None:
        """Makes every body before the clock starts."""
        self._bodies = {request.index: (request, self._serialised(request)) for request in requests}

    def body(self, request: PlannedRequest) -> dict[str, Any]:
        """What is sent for a request."""
        dialect = self.dialect
        body: dict[str, Any] = {"model": self.model}
        if self._is_chat:
            body["messages"] = [{"role": "user", "content": self._text(request)}]
        elif dialect.takes_token_ids:
            body["prompt"] = list(request.prompt_token_ids)
        else:
            body["prompt"] = self._text(request)
        body |= {"max_tokens": request.output_token_count, "temperature": 0.0, "stream": True}
        if dialect.ignores_end:
            body["ignore_eos"] = True
        if dialect.has_usage:
            body["stream_options"] = {"include_usage": True}
            if dialect.has_running_usage:
                body["stream_options"]["continuous_usage_stats"] = True
        return body

    async def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        kept = self._bodies.pop(request.index, None)
        data = kept[1] if kept is not None and kept[0] is request else self._serialised(request)
        loop = asyncio.get_running_loop()
        answer = _Answer(request.output_token_count, is_end_ignored=self.dialect.ignores_end)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(self.url + self.endpoint, data=data, timeout=timeout) as response:
                if response.status != 200:
                    raise _refusal(response)
                stream = EventStream()
                async for piece in response.content.iter_any():
                    at_s = loop.time()
                    for event in stream.feed(piece):
                        if count := answer.token_count_of(event):
                            yield Tokens(at_s, count)
                    if answer.is_done:
                        break
                else:
                    at_s = loop.time()
                    for event in stream.end():
                        if count := answer.token_count_of(event):
                            yield Tokens(at_s, count)
                    if count := answer.end():
                        yield Tokens(at_s, count)
        except TimeoutError:
            raise TargetError(Outcome.TIMEOUT, "the deadline passed") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Their texts may have parts of what was sent or came.
            where = "after tokens had come" if answer.seen_count else "before any token"
            raise TargetError(Outcome.ERROR, f"{type(error).__name__} {where}") from None
        self.counting = answer.counting
        answer.check()
        if answer.prompt_token_count is not None:
            yield ServerFacts(
                prompt_token_count=answer.prompt_token_count,
                cached_prompt_token_count=answer.cached_prompt_token_count,
            )

    async def models(self, *, timeout_s: float) -> list[str]:
        """Names of /v1/models. Raises ``TargetError`` when nobody answers, or not as such a server does."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(f"{self.url}/v1/models", timeout=timeout) as response:
                if response.status != 200:
                    raise _refusal(response)
                return [str(model["id"]) for model in (await response.json(content_type=None))["data"]]
        except TimeoutError:
            raise TargetError(Outcome.TIMEOUT, f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise TargetError(Outcome.ERROR, type(error).__name__) from None
        except (ValueError, KeyError, TypeError):
            raise TargetError(Outcome.ERROR, "/v1/models did not answer with a list of models") from None

    async def close(self) -> None:
        await self._session.close()

    def _serialised(self, request: PlannedRequest) -> bytes:
        return json.dumps(self.body(request), separators=(",", ":")).encode()

    def _text(self, request: PlannedRequest) -> str:
        assert self._text_of is not None
        return self._text_of(request.prompt_token_ids)


class _Answer:
    """Counts one answer, event by event."""

    def __init__(self, wanted_count: int, *, is_end_ignored: bool) -> None:
        self._is_end_ignored = is_end_ignored
        self._has_running_usage: bool | None = None
        """None until an event had text."""
        self._wanted_count = wanted_count
        self._total: int | None = None
        self._finish_reason: str | None = None
        self.seen_count = 0
        self.is_done = False
        self.prompt_token_count: int | None = None
        self.cached_prompt_token_count: int | None = None

    def token_count_of(self, data: bytes) -> int:
        """How many tokens came with it. Raises ``TargetError`` for an event that reports an error."""
        if self.is_done:
            return 0
        if data == b"[DONE]":
            self.is_done = True
            return self._surplus()
        event = _decode(data.decode())
        if not isinstance(event, dict) or event.get("error"):
            where = "after tokens had come" if self.seen_count else "before any token"
            raise TargetError(Outcome.ERROR, f"the server sent an error event {where}")
        usage, choices = event.get("usage"), event.get("choices")
        has_text = False
        if choices:
            choice = choices[0]
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            has_text = _has_text(choice)
        if usage:
            self._take_usage(usage)
        if self._has_running_usage is None and (has_text or (usage and choices and self._total)):
            # An event of its own (without choices) is the final usage.
            self._has_running_usage = bool(usage)
        count = int(has_text)
        if self._has_running_usage:
            # A token whose text is not complete yet (half of a character) is counted when it came.
            count = (self._total or 0) - self.seen_count if usage else 0
        if count < 0:
            raise TargetError(Outcome.ERROR, "the server's count of tokens went backwards")
        self.seen_count += count
        return count

    def end(self) -> int:
        """Tokens that are still to be counted when the response has ended, for a server that sends no ``[DONE]``."""
        return 0 if self.is_done else self._surplus()

    @property
    def counting(self) -> str:
        if self._has_running_usage:
            return "running usage"
        return "events" if self._total is None else "final usage"

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self._total = int(usage.get("completion_tokens") or 0)
        self.prompt_token_count = usage.get("prompt_tokens")
        details = usage.get("prompt_tokens_details") or {}
        self.cached_prompt_token_count = details.get("cached_tokens")

    def _surplus(self) -> int:
        """Tokens of the final usage that no event showed."""
        if self._total is None or self._total <= self.seen_count or self.seen_count == 0:
            return 0
        surplus = self._total - self.seen_count
        self.seen_count = self._total
        return surplus

    def check(self) -> None:
        """Raises ``TargetError`` unless the answer is whole."""
        wanted, seen = self._wanted_count, self.seen_count
        if self._total is not None and self._total != seen:
            raise TargetError(Outcome.INCOMPLETE, f"the server counts {self._total} tokens and showed {seen}")
        if not self.is_done and self._finish_reason is None:
            raise TargetError(
                Outcome.INCOMPLETE, f"the stream ended without its end; {seen} tokens came for {wanted}"
            )
        has_ended_itself = not self._is_end_ignored and self._finish_reason == "stop" and 0 < seen < wanted
        if seen != wanted and not has_ended_itself:
            raise TargetError(Outcome.INCOMPLETE, f"{seen} tokens came for {wanted}")


def _has_text(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"))


def _refusal(response: aiohttp.ClientResponse) -> TargetError:
    """Without the body: servers repeat prompts in theirs."""
    words = f"HTTP {response.status}"
    if (retry_after := response.headers.get("Retry-After", "")) and len(retry_after) < 40:
        words += f", Retry-After {retry_after}"
    is_refused = response.status in (400, 413, 422, 429, 503)
    return TargetError(Outcome.REFUSED if is_refused else Outcome.ERROR, words)

"""The golden server's HTTP side: OpenAI's completions and chat completions, streamed or whole, written straight to
the socket of each connection.

A web framework would put queues and tasks between the script and the socket: the time of sending would be a guess.
Here a message is one ``send`` in the callback of its own timer, and its stamp is taken one line before. Knows as much
of HTTP/1.1 as clients of this API speak: requests with Content-Length, one after the other, kept alive.

    GET  /health  /metrics  /v1/models  /golden/records (everything noted so far)  /golden/drain (and forgets it)
    POST /v1/completions  /v1/chat/completions
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from bench.generator.golden import TOKEN_ID, WORD, Ending, GoldenRecord, GoldenScript, prompt_digest
from bench.generator.golden import prompt_token_count as count_prompt

MAX_REQUEST_BYTES = 16 * 2**20
MAX_UNSENT_BYTES = 2**20
"""A reader that lags behind by more is cut off."""
STALL_LIMIT_S = 120.0
"""A stalled answer whose caller never leaves is given up after this."""
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 413: "Content Too Large", 429: "Too Many Requests"}


class HttpGolden:
    """What all connections share. ``records`` is bounded by its maker."""

    def __init__(self, script: GoldenScript, records: deque[GoldenRecord], *, model: str) -> None:
        self.script = script
        self.records = records
        self.model = model
        self.running_count = 0

    def connection(self) -> Connection:
        return Connection(self)


class Connection(asyncio.Protocol):
    """One caller. Owns the timer of the answer in progress; ``connection_lost`` ends it."""

    def __init__(self, golden: HttpGolden) -> None:
        self._golden = golden
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._head_end = -1
        self._need = 0
        self._answer: _Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None:
            self._answer.leave()

    def data_received(self, data: bytes) -> None:
        received_at = self._loop.time()
        self._buffer += data
        if len(self._buffer) > MAX_REQUEST_BYTES:
            self.transport.abort()
        elif self._answer is None:
            self._next_request(received_at)

    def _next_request(self, received_at: float) -> None:
        if self._head_end < 0:
            self._head_end = self._buffer.find(b"\r\n\r\n")
            if self._head_end < 0:
                return
            self._need = self._head_end + 4 + _content_length(bytes(self._buffer[: self._head_end]))
        if len(self._buffer) < self._need:
            return
        line = bytes(self._buffer[: self._buffer.find(b"\r\n")]).decode("latin-1")
        body = bytes(self._buffer[self._head_end + 4 : self._need])
        del self._buffer[: self._need]
        self._head_end = -1
        method, path, _version = (*line.split(" "), "", "")[:3]
        self._route(method, path.partition("?")[0], body, received_at)

    def _route(self, method: str, path: str, body: bytes, received_at: float) -> None:
        golden = self._golden
        match method, path:
            case "GET", "/health" | "/ping":
                self._whole(200, b"")
            case "GET", "/v1/models":
                model = {"id": golden.model, "object": "model", "owned_by": "golden", "max_model_len": 131072}
                self._json(200, {"object": "list", "data": [model]})
            case "GET", "/metrics":
                label = f'{{model_name="{golden.model}"}}'
                lines = (
                    f"vllm:num_requests_running{label} {golden.running_count}",
                    f"vllm:num_requests_waiting{label} 0",
                    f"vllm:kv_cache_usage_perc{label} 0",
                )
                self._whole(200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")
            case "GET", "/golden/records" | "/golden/drain":
                self._json(200, [record.as_json() for record in golden.records])
                if path == "/golden/drain":
                    golden.records.clear()
            case "POST", "/v1/completions" | "/v1/chat/completions":
                self._generate(path, body, received_at)
            case _:
                self._error(404, "no such path")

    def _generate(self, path: str, body: bytes, received_at: float) -> None:
        try:
            order = _Order(json.loads(body), is_chat="chat" in path)
        except (ValueError, TypeError, KeyError, AttributeError):
            self._error(400, "a request that this server does not understand")
            return
        record = GoldenRecord(
            protocol="http",
            prompt_digest=prompt_digest(order.prompt),
            prompt_token_count=count_prompt(order.prompt),
            received_at_s=received_at,
        )
        self._golden.records.append(record)
        self._golden.running_count += 1
        self._answer = _Stream(self, self._golden, order, record, self._ended)

    def _ended(self) -> None:
        self._answer = None
        self._golden.running_count -= 1
        if self._buffer and not self.transport.is_closing():
            self._next_request(self._loop.time())

    def _json(self, status: int, content: Any) -> None:
        self._whole(status, json.dumps(content).encode())

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "golden", "code": status}})

    def _whole(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {content_type}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    def whole_json(self, status: int, content: Any) -> None:
        self._json(status, content)

    def refuse(self) -> None:
        self._error(429, "refused, as the script says")


class _Order:
    """The fields of a request that matter here. Raises ValueError, TypeError or KeyError for what it is not."""

    def __init__(self, fields: dict[str, Any], *, is_chat: bool) -> None:
        self.is_chat = is_chat
        self.prompt: list[int] | str
        if is_chat:
            self.prompt = "\n".join(_content_text(message["content"]) for message in fields["messages"])
        else:
            prompt = fields["prompt"]
            if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
                prompt = prompt[0]
            if not isinstance(prompt, str) and not (prompt and all(isinstance(token, int) for token in prompt)):
                raise ValueError("prompt")
            self.prompt = prompt
        self.output_token_count = int(fields.get("max_completion_tokens") or fields.get("max_tokens") or 16)
        if self.output_token_count < 1:
            raise ValueError("max_tokens")
        self.is_streamed = bool(fields.get("stream", False))
        options = fields.get("stream_options") or {}
        self.wants_usage = bool(options.get("include_usage", False))
        self.wants_running_usage = self.wants_usage and bool(options.get("continuous_usage_stats", False))
        self.wants_token_ids = bool(fields.get("return_token_ids", False))


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


class _Stream:
    """One answer: a timer that sends the next message, until the ending. Calls ``ended`` exactly once."""

    def __init__(
        self,
        connection: Connection,
        golden: HttpGolden,
        order: _Order,
        record: GoldenRecord,
        ended: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._transport = connection.transport
        self._order = order
        self._record = record
        self._ended = ended
        self._answer = golden.script.answer(order.prompt, order.output_token_count)
        kind = "chat.completion.chunk" if order.is_chat else "text_completion"
        # The parts of an event that never change are made once: what is left to do at the due time is short.
        self._head = (
            f'data: {{"id":"golden-{record.prompt_digest}","object":"{kind}","created":0,'
            f'"model":{json.dumps(golden.model)},"choices":['
        )
        self._model = golden.model
        self._next = 0
        self._sent_token_count = 0
        self._is_begun = False
        if order.is_streamed and self._answer.ending is not Ending.REFUSE:
            self._begin()
        self._timer = self._wait()

    def leave(self) -> None:
        self._timer.cancel()
        self._end("left")

    def _wait(self) -> asyncio.TimerHandle:
        answer = self._answer
        if not self._order.is_streamed or self._next >= len(answer.due_after_s):
            due_after_s, then = answer.ends_after_s, self._finish
        else:
            due_after_s, then = answer.due_after_s[self._next], self._send
        return self._loop.call_at(self._record.received_at_s + due_after_s, then)

    def _begin(self) -> None:
        self._is_begun = True
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    def _send(self) -> None:
        index, answer, record = self._next, self._answer, self._record
        token_count = answer.token_counts[index]
        self._sent_token_count += token_count
        self._next += 1
        is_last = self._next == len(answer.due_after_s)
        is_end = is_last and answer.ending in (Ending.COMPLETE, Ending.SURPLUS)
        data = _chunk(self._event(token_count, is_end, is_first=index == 0))
        if self._transport.get_write_buffer_size() > 0:
            record.held_count += 1
        now = self._loop.time()
        self._transport.write(data)
        record.due_at_s.append(record.received_at_s + answer.due_after_s[index])
        record.sent_at_s.append(now)
        record.token_counts.append(token_count)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._transport.abort()
            self._end("left")
        elif is_end:
            self._finish()
        else:
            self._timer = self._wait()

    def _event(self, token_count: int, is_end: bool, *, is_first: bool) -> str:
        order = self._order
        finish = '"length"' if is_end else "null"
        ids = f',"token_ids":{json.dumps([TOKEN_ID] * token_count)}' if order.wants_token_ids else ""
        text = WORD * token_count
        usage = f',"usage":{self._usage()}' if order.wants_running_usage else ""
        part = f'"delta":{{"content":"{text}"}}' if order.is_chat else f'"text":"{text}"'
        choice = f'{{"index":0,{part},"logprobs":null,"finish_reason":{finish}{ids}}}'
        event = f"{self._head}{choice}]{usage}}}\n\n"
        if not order.is_chat or not is_first:
            return event
        # As vLLM does it: an event with the role and no text, together with the first token.
        role = '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return f"{self._head}{role}}}\n\n{event}"

    def _usage(self) -> str:
        prompt, output = self._record.prompt_token_count, self._sent_token_count
        return f'{{"prompt_tokens":{prompt},"total_tokens":{prompt + output},"completion_tokens":{output}}}'

    def _finish(self) -> None:
        """The ending's own time: nothing with tokens is left to send, except in an answer that is not streamed."""
        ending = self._answer.ending
        match ending:
            case Ending.REFUSE:
                self._connection.refuse()
            case Ending.DISCONNECT:
                self._transport.abort()
            case Ending.STALL:
                self._timer = self._loop.call_later(STALL_LIMIT_S, self._give_up)
                return
            case Ending.ERROR if not self._is_begun:
                self._connection.whole_json(400, {"error": {"message": "as the script says", "code": 500}})
            case Ending.ERROR:
                error = {"message": "as the script says", "type": "InternalServerError", "code": 500}
                self._transport.write(
                    _chunk(f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n") + _LAST_CHUNK
                )
            case _ if self._is_begun:
                usage = f'{self._head}],"usage":{self._usage()}}}\n\n' if self._order.wants_usage else ""
                self._transport.write(_chunk(f"{usage}data: [DONE]\n\n") + _LAST_CHUNK)
            case _:
                self._whole_answer()
        self._end(ending.value)

    def _whole_answer(self) -> None:
        record, counts = self._record, self._answer.token_counts
        self._sent_token_count = sum(counts)
        text = WORD * self._sent_token_count
        part = {"message": {"role": "assistant", "content": text}} if self._order.is_chat else {"text": text}
        content = {
            "id": f"golden-{record.prompt_digest}",
            "object": "chat.completion" if self._order.is_chat else "text_completion",
            "created": 0,
            "model": self._model,
            "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": "length"}],
            "usage": json.loads(self._usage()),
        }
        record.due_at_s.append(record.received_at_s + self._answer.ends_after_s)
        record.sent_at_s.append(self._loop.time())
        record.token_counts.append(self._sent_token_count)
        self._connection.whole_json(200, content)

    def _give_up(self) -> None:
        self._transport.abort()
        self._end(Ending.STALL.value)

    def _end(self, how: str) -> None:
        if self._record.ending:
            return  # the connection was lost after the last message, or by our own abort
        self._record.ending = how
        self._ended()


_LAST_CHUNK = b"0\r\n\r\n"


def _chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0

"""The naive peer: FastAPI around ``transformers.generate``, as one writes it in the first week. No batching.

    python naive_server.py --model DIR --name NAME --port PORT

Runs in an environment of its own (``deploy/locks/peer-naive.txt``), so it imports nothing of Baton. Speaks as much of
OpenAI's completions as a load generator needs: text or token ids as prompt, ``max_tokens``, ``ignore_eos``, streaming
as server-sent events with usage.

Requests compute side by side in threads, which is what FastAPI does with them, and here twice as fast for eight
callers as a lock around the model (--one-at-a-time). Kinder than a first week's code in one thing: what nobody reads
any more is not computed to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

NEXT_TOKEN_DEADLINE_S = 1800.0


class StreamOptions(BaseModel):
    """Of OpenAI, and vLLM's ``continuous_usage_stats``: cumulative usage on every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionRequest(BaseModel):
    """What is read of a request; the rest is ignored, as one does in the first week."""

    prompt: str | list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class Generator(Protocol):
    """The model and its tokenizer."""

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of text, or those given."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], request: CompletionRequest, gone: threading.Event
    ) -> Iterator[tuple[str, int]]:
        """Text as it comes, with the tokens computed so far. Ends early once ``gone`` is set."""
        ...


def application(generator: Generator, *, model_name: str, max_context_token_count: int) -> FastAPI:
    """The service: /v1/completions, /v1/models and /health."""
    service = FastAPI()

    @service.get("/health")
    def health() -> Response:
        return Response()

    @service.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model_name, "object": "model"}]}

    @service.post("/v1/completions")
    def completions(request: CompletionRequest) -> Response:
        prompt_ids = generator.prompt_ids(request.prompt)
        if not prompt_ids or request.max_tokens < 1:
            raise HTTPException(400, "prompt and max_tokens must not be empty")
        if len(prompt_ids) + request.max_tokens > max_context_token_count:
            raise HTTPException(400, f"more than {max_context_token_count} tokens of prompt and answer")
        gone = threading.Event()
        pieces = generator.stream(prompt_ids, request, gone)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = model_name
        if request.stream:
            return _Watched(_events(head, pieces, len(prompt_ids), request), gone)
        text, count = "", 0
        for piece, count in pieces:  # noqa: B007 the last count is the answer's
            text += piece
        choice = {"index": 0, "text": text, "finish_reason": _reason(count, request)}
        return JSONResponse({**head, "choices": [choice], "usage": _usage(len(prompt_ids), count)})

    return service


def _events(
    head: dict[str, Any],
    pieces: Iterator[tuple[str, int]],
    prompt_token_count: int,
    request: CompletionRequest,
) -> Iterator[str]:
    options, count = request.stream_options, 0
    for text, count in pieces:
        event = {**head, "choices": [{"index": 0, "text": text, "finish_reason": None}]}
        if options.include_usage and options.continuous_usage_stats:
            event["usage"] = _usage(prompt_token_count, count)
        yield f"data: {json.dumps(event)}\n\n"
    usage = {"usage": _usage(prompt_token_count, count)} if options.include_usage else {}
    end = {"index": 0, "text": "", "finish_reason": _reason(count, request)}
    yield f"data: {json.dumps({**head, 'choices': [end], **usage})}\n\n"
    yield "data: [DONE]\n\n"


class _Watched(StreamingResponse):
    """Sets ``gone`` as soon as the caller has left. Starlette itself waits for the next piece before it stops."""

    def __init__(self, events: Iterator[str], gone: threading.Event) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                self._gone.set()
            return message

        try:
            await super().__call__(scope, watched, send)
        finally:
            self._gone.set()


def _usage(prompt_token_count: int, count: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_token_count,
        "completion_tokens": count,
        "total_tokens": prompt_token_count + count,
    }


def _reason(count: int, request: CompletionRequest) -> str:
    return "length" if count >= request.max_tokens else "stop"


class TransformersGenerator:
    """``model.generate`` in a thread of its own per request, its text through a ``TextIteratorStreamer``."""

    def __init__(self, path: str, dtype: str, *, is_serial: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._turn: AbstractContextManager[Any] = threading.Lock() if is_serial else nullcontext()

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        return self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def stream(
        self, prompt_ids: Sequence[int], request: CompletionRequest, gone: threading.Event
    ) -> Iterator[tuple[str, int]]:
        from transformers import StoppingCriteria, TextIteratorStreamer

        class Gone(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> bool:
                return gone.is_set()

        class CountingStreamer(TextIteratorStreamer):  # type: ignore[misc]
            """Yields once a token, with the text of complete words (often none), and the rest at the end."""

            computed = -1  # the prompt comes first

            def put(self, value: Any) -> None:
                self.computed += 1
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                self.text_queue.put((text, self.computed))
                if stream_end:
                    self.text_queue.put(self.stop_signal)

        streamer = CountingStreamer(
            self._tokenizer, skip_prompt=True, timeout=NEXT_TOKEN_DEADLINE_S, skip_special_tokens=True
        )
        ids = self._torch.tensor([list(prompt_ids)])
        options: dict[str, Any] = {"max_new_tokens": request.max_tokens, "do_sample": request.temperature > 0}
        if request.temperature > 0:
            options["temperature"] = request.temperature
        if request.ignore_eos:
            options["min_new_tokens"] = request.max_tokens
        failures: list[BaseException] = []

        def compute() -> None:
            try:
                with self._turn:
                    if not gone.is_set():
                        self._model.generate(
                            ids,
                            attention_mask=self._torch.ones_like(ids),
                            streamer=streamer,
                            stopping_criteria=[Gone()],
                            pad_token_id=self._tokenizer.eos_token_id,
                            **options,
                        )
            except BaseException as error:
                failures.append(error)
            finally:
                if failures or gone.is_set():
                    streamer.end()

        threading.Thread(target=compute, daemon=True).start()
        yield from streamer
        if failures:
            raise RuntimeError(f"{type(failures[0]).__name__} while computing") from failures[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--name", required=True, help="what callers name it")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-context-tokens", type=int, default=8192)
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    parser.add_argument("--one-at-a-time", action="store_true", help="a lock around the model")
    options = parser.parse_args(arguments)

    import uvicorn

    generator = TransformersGenerator(options.model, options.dtype, is_serial=options.one_at_a_time)
    service = application(generator, model_name=options.name, max_context_token_count=options.max_context_tokens)
    uvicorn.run(service, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A chat in the browser: a FastAPI bridge from server-sent events to Baton, and the page beside it.

    .venv/bin/python examples/chat_ui/bridge.py --baton 127.0.0.1:50051 --port 8200

``POST /chat`` with ``{"messages": [{"role": "user", "content": "…"}]}`` streams ``event: token`` (``{"text": …}``),
then one ``event: done`` (usage and times) or ``event: error`` (``{"reason": …, "retry_after_s": …}``). What to copy:

- a browser that goes away, or presses stop, cancels the generation: nothing is computed for nobody;
- a connection to Baton that is cut, or a router that restarts, is not seen in the browser: ``resume=True``;
- an error is an event, since the status of the HTTP response went out with the first byte.
"""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

from baton.client import BatonClient, Chunk, Finished, Tls
from baton.errors import BatonError

ANSWER_TIMEOUT_S = 120.0
PAGE = Path(__file__).with_name("index.html")


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=100_000)]


class Conversation(BaseModel):
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)]


def make_app(address: str) -> FastAPI:
    """The bridge to the Baton at ``address``. Its client is made when the server starts, in its loop."""
    clients: list[BatonClient] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with BatonClient(address, tls=Tls.from_environment()) as client:
            clients.append(client)
            yield
            clients.clear()

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    @app.post("/chat")
    async def chat(conversation: Conversation) -> StreamingResponse:
        (client,) = clients
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy must not hold tokens back
        return StreamingResponse(sse(client, conversation), media_type="text/event-stream", headers=headers)

    return app


async def sse(client: BatonClient, conversation: Conversation) -> AsyncIterator[str]:
    """The answer as events. When the browser leaves, this is cancelled, and ``aclosing`` ends the call."""
    messages = [(message.role, message.content) for message in conversation.messages]
    try:
        async with aclosing(client.chat(messages, timeout=ANSWER_TIMEOUT_S, resume=True)) as stream:
            async for event in stream:
                match event:
                    case Chunk() if event.text:
                        yield line("token", {"text": event.text})
                    case Finished():
                        yield line("done", summary(event))
    except BatonError as error:
        told = {"reason": error.reason.value, "message": error.message, "retry_after_s": error.retry_after_s}
        yield line("error", told)


def summary(finished: Finished) -> dict[str, Any]:
    return {
        "output_token_count": finished.usage.output_token_count,
        "time_to_first_token_s": finished.phases.time_to_first_token_s,
        "total_s": finished.phases.total_s,
        "resume_count": finished.resume_count,
    }


def line(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat in the browser.")
    parser.add_argument("--baton", default="127.0.0.1:50051", help="host:port of the router")
    parser.add_argument("--port", type=int, default=8200)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", options.port)) as listening:
        print(f"open http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
        uvicorn.Server(uvicorn.Config(make_app(options.baton), log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
